"""Converts weights of the original's files into a folder that transformers loads.

python -m scripts.convert_original FILE --format flax --out udon-vitb
"""

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelCardData
from torch.nn import functional as F
from transformers import AutoConfig, CLIPVisionModel, PreTrainedModel, ViTModel

from modeling_udon.data.preprocessing import IMAGENET_STANDARD, OPENAI_CLIP, image_processor
from modeling_udon.hub.student_folder import CARD_FILE, PROCESSOR_FILE, save_model, write_student
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.storage import check_out, replaced_folder
from modeling_udon.text import printable
from scripts.original_models import STUDENT_HEAD, Original, describe
from scripts.read_weights import read_arrays

_SOURCES = {
    "augreg": "a ViT of AugReg ([arXiv 2106.10270](https://arxiv.org/abs/2106.10270))",
    "clip-npy": "the image tower of CLIP ([arXiv 2103.00020](https://arxiv.org/abs/2103.00020))",
    "flax": "a UDON student ([arXiv 2406.08332](https://arxiv.org/abs/2406.08332))",
}
_CLASSES: dict[str, tuple[Any, dict[str, bool]]] = {
    "vit": (ViTModel, {"add_pooling_layer": False}),
    "clip_vision_model": (CLIPVisionModel, {}),
}
FORMATS = tuple(_SOURCES)
_CHECK_BATCH = 32

Say = Callable[[str], None]


def convert(
    file: Path,
    format: str,
    out: Path,
    *,
    image_size: int | None = None,
    inputs: str | None = None,
    outputs: str | None = None,
    head: str | None = None,
    keep_teachers: bool = False,
    domains: tuple[str, ...] = (),
    force: bool = False,
    say: Say = lambda text: None,
) -> None:
    """Writes the student of a flax checkpoint, or the backbone of another file, for `model.backbone` of a run.

    Args:
        file: The file of weights.
        format: One of `FORMATS`.
        out: Folder to write.
        image_size: Side in pixels that the model is to take; by default the one that it was trained with.
        inputs: Images that the original was given, `.npy` of shape `(num_images, height, width, 3)`, normalised.
        outputs: What the original made of them, `.npy` of shape `(num_images, dim)`.
        head: Name of the student's head in a flax checkpoint.
        keep_teachers: Whether the teachers of a flax checkpoint are kept.
        domains: Names of the domains that they teach, in the checkpoint's order.
        force: Whether a model in `out` is replaced.
        say: Called with lines for the user.

    Raises:
        ValueError: If the file is not what it should be, or something that is asked for does not go with the rest.
        ImportError: If msgpack is missing.
    """
    _check_options(format, inputs, outputs, head, keep_teachers, domains)
    check_out(out, PROCESSOR_FILE, "of a model to replace", "a model", force)
    arrays = read_arrays(file, format)
    original = describe(arrays, format, head or STUDENT_HEAD, keep_teachers)
    state = _our_state(arrays, original)
    values = dict(original.backbone)
    if image_size is not None and image_size != values["image_size"]:
        state[original.positions] = _resize(state[original.positions], values, image_size)
        say(f"position embeddings interpolated from {values['image_size']} to {image_size} pixels")
        values["image_size"] = image_size
    backbone = _build_backbone(values, state)
    model = backbone if original.student is None else _build_student(backbone, original, domains, state)
    model.eval()
    if original.left_out:
        say(f"left out: {_listed(original.left_out)}")
    if inputs is not None and outputs is not None:
        difference, num_images, what = _compare(model, inputs, outputs)
        say(f"largest difference of {what}: {difference:.1e} ({num_images} images)")
    _write(model, _card(out.name, file, format, original), out)
    width = original.backbone["hidden_size"] if original.student is None else original.student.dim
    say(f"wrote {out}: {type(model).__name__}, {values['image_size']} pixels, {width} dimensions")


def _check_options(
    format: str,
    inputs: str | None,
    outputs: str | None,
    head: str | None,
    keep_teachers: bool,
    domains: tuple[str, ...],
) -> None:
    if (inputs is None) != (outputs is None):
        raise ValueError("--inputs and --outputs must be given together: images and what the original made of them.")
    if format != "flax":
        for name, value in (("--keep-teachers", keep_teachers), ("--domains", domains), ("--head", head)):
            if value:
                raise ValueError(f"{name} must go with --format flax. Got {format}, which has no heads.")
    if domains and not keep_teachers:
        raise ValueError("--domains must go with --keep-teachers: it names what the teachers teach.")


def _our_state(arrays: Mapping[str, np.ndarray], original: Original) -> dict[str, torch.Tensor]:
    return {
        ours: torch.from_numpy(np.array(layout(arrays[theirs]), dtype=np.float32))
        for theirs, tensor in original.tensors.items()
        for ours, layout in tensor.parts.items()
    }


def _resize(positions: torch.Tensor, values: Mapping[str, int], image_size: int) -> torch.Tensor:
    """Position embeddings of another resolution, the class token's left as it is.

    Bilinear from corner to corner, as google-research/vision_transformer does it (checkpoint.py,
    `interpolate_posembed`).
    """
    patch_size, width = values["patch_size"], values["hidden_size"]
    if image_size % patch_size:
        raise ValueError(f"--image-size must be a multiple of the patch size, {patch_size}. Got {image_size}.")
    old, new = values["image_size"] // patch_size, image_size // patch_size
    tokens = positions.reshape(-1, width)
    grid = tokens[1:].T.reshape(1, width, old, old)  # (N, D) -> (1, D, H, W)
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=True)
    resized = torch.cat([tokens[:1], grid.reshape(width, new * new).T])
    return resized.reshape(*positions.shape[:-2], -1, width)


def _build_backbone(values: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    own = {name: value for name, value in state.items() if not name.startswith(("student_head.", "teacher_heads."))}
    model_class, options = _CLASSES[str(values["model_type"])]
    config = AutoConfig.for_model(**values)
    # Loading, unlike `load_state_dict`, takes the names of every version of transformers.
    model, loading = model_class.from_pretrained(
        None, config=config, state_dict=own, output_loading_info=True, **options
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"], "the names are ours"
    return model


def _build_student(
    backbone: PreTrainedModel, original: Original, domains: tuple[str, ...], state: Mapping[str, torch.Tensor]
) -> UdonModel:
    student, num_domains = original.student, len(original.teachers)
    assert student is not None, "checked by the caller"
    if domains and len(domains) != num_domains:
        raise ValueError(f"--domains must name the checkpoint's {num_domains} domains. Got {len(domains)}.")
    names = domains or tuple(f"domain_{number}" for number in range(num_domains))
    teacher_dim = {"teacher_dim": original.teachers[0].dim} if original.teachers else {}
    model = UdonModel.from_backbone(
        backbone,
        embedding_dim=student.dim,
        head_hidden_dims=student.hidden_dims,
        head_bias=student.bias,
        domains=dict(zip(names, original.num_classes, strict=True)),
        **teacher_dim,
    )
    _load_head(model.student_head, "student_head.", state)
    for number, name in enumerate(names):
        _load_head(model.teacher_heads[name], f"teacher_heads.{number}.", state)
    return model


def _load_head(head: torch.nn.Module, prefix: str, state: Mapping[str, torch.Tensor]) -> None:
    head.load_state_dict({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})


def _write(model: PreTrainedModel, card: ModelCard, folder: Path) -> None:
    config = model.config.backbone_config if isinstance(model, UdonModel) else model.config
    is_clip = config.model_type == "clip_vision_model"
    processor = image_processor(config.image_size, OPENAI_CLIP if is_clip else IMAGENET_STANDARD)
    if isinstance(model, UdonModel):
        write_student(folder, model, processor, card, keep_teachers=True)
        return
    with replaced_folder(folder) as draft:
        save_model(model, draft)
        processor.save_pretrained(draft)
        card.save(draft / CARD_FILE)


@torch.no_grad()
def _compare(model: PreTrainedModel, inputs: str, outputs: str) -> tuple[float, int, str]:
    """Largest difference of what the model makes of the original's images and what the original made of them.

    Both as vectors of unit norm: the student's, or, if they have its width, the backbone's.
    """
    images, expected = _read_array("--inputs", inputs, 4), _read_array("--outputs", outputs, 2)
    config = model.config.backbone_config if isinstance(model, UdonModel) else model.config
    shape = (config.image_size, config.image_size, config.num_channels)
    if not len(images) or tuple(images.shape[1:]) != shape:
        raise ValueError(f"--inputs must be images of shape (num_images, {str(shape)[1:]}. Got {tuple(images.shape)}.")
    widths = {config.hidden_size: "backbone features"}
    if isinstance(model, UdonModel):
        widths[model.config.embedding_dim] = "embeddings"
    if len(expected) != len(images) or expected.shape[1] not in widths:
        raise ValueError(
            f"--outputs must be {len(images)} vectors of {' or '.join(map(str, widths))} dimensions. "
            f"Got the shape {tuple(expected.shape)}."
        )
    what = widths[expected.shape[1]]
    pixel_values = images.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)
    embeds = torch.cat([_embed(model, part, what) for part in pixel_values.split(_CHECK_BATCH)])
    return (embeds - F.normalize(expected, dim=-1)).abs().max().item(), len(images), what


def _embed(model: PreTrainedModel, pixel_values: torch.Tensor, what: str) -> torch.Tensor:
    outputs = model(pixel_values)
    if isinstance(model, UdonModel):
        return outputs.image_embeds if what == "embeddings" else outputs.backbone_embeds
    is_clip = model.config.model_type == "clip_vision_model"
    return F.normalize(outputs.pooler_output if is_clip else outputs.last_hidden_state[:, 0], dim=-1)


def _read_array(argument: str, path: str, num_dims: int) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{argument} must be a .npy file of numbers. Got {path!r}: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != num_dims or array.dtype.kind not in "fiu":
        raise ValueError(f"{argument} must be a .npy file of {num_dims} dimensions. Got {path!r}.")
    return torch.from_numpy(array.astype(np.float32))


def _card(name: str, file: Path, file_format: str, original: Original) -> ModelCard:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(2**24):
            digest.update(part)
    student = original.student is not None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["udon", "image-retrieval", "image-embedding"] if student else ["udon"],
    )
    use = (
        "It embeds images: see the docstrings of `modeling_udon.py` beside it."
        if student
        else f"It gives {original.backbone['hidden_size']} features an image, and is a backbone to train with."
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"Weights of {_SOURCES[file_format]}, converted to the format of transformers from "
        f"`{file.name}` (SHA-256 `{digest.hexdigest()}`). {use}\n\n"
        "Their licence is the one of that file, which does not name it.\n"
    )


def _listed(names: tuple[str, ...], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Converts one file; returns the exit code: 2 for a wrong argument, 1 for what the system refused, 0 otherwise."""
    arguments = vars(_make_parser().parse_args(argv))
    arguments["domains"] = tuple(arguments["domains"])
    try:
        convert(**arguments, say=lambda text: print("\n".join(map(printable, text.split("\n")))))
    except (ValueError, OSError, ImportError) as error:
        print(f"convert_original: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert_original",
        description="Brings weights of the original's files into the format of transformers.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="file of weights")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="augreg: a ViT, .npz; clip-npy: CLIP, .npy; flax: a trained UDON checkpoint, msgpack",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the model")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="interpolate the position embeddings for images of N pixels"
    )
    parser.add_argument("--inputs", metavar="NPY", help="images that the original was given: (num, side, side, 3)")
    parser.add_argument("--outputs", metavar="NPY", help="what it made of them; the largest difference is printed")
    parser.add_argument("--force", action="store_true", help="replace the model in FOLDER")
    flax = parser.add_argument_group("of --format flax")
    flax.add_argument("--head", metavar="NAME", help="the student's head, if it has another name than UDON's")
    flax.add_argument("--keep-teachers", action="store_true", help="keep the teachers' heads")
    flax.add_argument("--domains", nargs="+", default=[], metavar="NAME", help="what they teach, in order")
    return parser


if __name__ == "__main__":
    sys.exit(main())
