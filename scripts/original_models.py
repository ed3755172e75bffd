"""Names and layouts of the tensors in the original's files, and their counterparts here.

Kernels there are `(in, out)`, those of attention `(width, heads, head_width)`, convolutions HWIO. Our names are those
that every version of transformers reads.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scripts.original_tensors import (
    Tensor,
    attention_input,
    attention_output,
    convolution,
    dense,
    norm,
    same,
    third,
)

STUDENT_HEAD = "universal_student_projection_domain_0"
# OpenAI's CLIP towers have heads of this width, whatever their own (Radford et al. 2021).
_CLIP_HEAD_WIDTH = 64

_VIT_POSITIONS = "Transformer/posembed_input/pos_embedding"
_CLIP_POSITIONS = "positional_embedding"
# How AugReg's files and the original's checkpoints number the parts of a block.
_AUGREG_BLOCK = ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
_SCENIC_BLOCK = ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
# The parts of a block in the order of `_block`: there in Scenic's CLIP, here in a ViT and in a CLIP tower.
_SCENIC_CLIP_PARTS = ("ln_1", "attn/query", "attn/key", "attn/value", "attn/out", "ln_2", "mlp/c_fc", "mlp/c_proj")
_VIT_PARTS = (
    "layernorm_before",
    *(f"attention.attention.{part}" for part in ("query", "key", "value")),
    *("attention.output.dense", "layernorm_after", "intermediate.dense", "output.dense"),
)
_CLIP_PARTS = (
    "layer_norm1",
    *(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")),
    *("layer_norm2", "mlp.fc1", "mlp.fc2"),
)
# What goes with a backbone and is no part of the embedding: classifiers, CLIP's text tower and last projection.
_LEFT_OUT = {
    "augreg": r"(head|pre_logits)/(kernel|bias)",
    "clip-npy": r"visual\.proj|(transformer|token_embedding|ln_final)\..*|positional_embedding|text_projection|"
    r"logit_scale|input_resolution|context_length|vocab_size",
    "flax": r"(.*/)?(text/.*|logit_scale|visual/proj/kernel)|(\w+_)?output_projection(_\w+)?/(kernel|bias)",
}
_TEACHERS = r"teacher_projection_domain_(\d+)/.*"


@dataclass(frozen=True)
class Head:
    """Shape of a head.

    Attributes:
        hidden_dims: Widths of its hidden layers.
        dim: Width of its output.
        bias: Whether its last layer has a bias.
    """

    hidden_dims: tuple[int, ...]
    dim: int
    bias: bool


@dataclass(frozen=True)
class Original:
    """What a file holds.

    Attributes:
        backbone: Values of the backbone's configuration.
        positions: Our name of the position embeddings.
        tensors: What belongs to the model, by its name in the file: of the backbone under our names for it alone, of
            heads under `student_head.` and `teacher_heads.NUMBER.`.
        student: The student's head, `None` if the file is a backbone's.
        teachers: The teachers' heads, in the order of the domains.
        num_classes: Classes of each teacher's domain.
        left_out: Names in the file that belong to nothing here.
    """

    backbone: dict[str, Any]
    positions: str
    tensors: dict[str, Tensor]
    student: Head | None = None
    teachers: tuple[Head, ...] = ()
    num_classes: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()


def describe(
    arrays: Mapping[str, np.ndarray], file_format: str, head: str = STUDENT_HEAD, keep_teachers: bool = False
) -> Original:
    """Says what the arrays of a file are.

    Args:
        arrays: As `read_arrays` gives them.
        file_format: `"augreg"`, `"clip-npy"` or `"flax"`.
        head: Name of the student's head in a flax checkpoint.
        keep_teachers: Whether the teachers' heads are wanted.

    Raises:
        ValueError: If a tensor is missing, spare or of another shape; the message names it.
    """
    if file_format == "clip-npy":
        original = _describe_openai_clip(arrays)
    elif file_format == "augreg" or _find_prefix(arrays, _VIT_POSITIONS) is not None:
        original = _describe_vit(arrays)
    else:
        original = _describe_scenic_clip(arrays)
    if file_format == "flax":
        original = _with_heads(original, arrays, head, keep_teachers)
    pattern = _LEFT_OUT[file_format] + ("" if keep_teachers or file_format != "flax" else f"|{_TEACHERS}")
    left_out = tuple(name for name in arrays if name not in original.tensors and re.fullmatch(pattern, name))
    _check_names(arrays, original.tensors, left_out)
    return replace(original, left_out=left_out)


def _check_names(arrays: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor], left_out: Iterable[str]) -> None:
    missing = [name for name in tensors if name not in arrays]
    spare = [name for name in arrays if name not in tensors and name not in set(left_out)]
    if missing or spare:
        parts = [f"{what} {_listed(names)}" for what, names in (("missing", missing), ("spare", spare)) if names]
        raise ValueError(f"FILE must hold the tensors of its format, no fewer and no more. Got {'; '.join(parts)}.")
    for name, tensor in tensors.items():
        if arrays[name].shape != tensor.shape:
            raise ValueError(f"FILE must have {name} of shape {tensor.shape}. Got {arrays[name].shape}.")


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _find_prefix(arrays: Mapping[str, np.ndarray], anchor: str) -> str | None:
    """What stands before the names of a backbone, by one of its tensors."""
    found = [name.removesuffix(anchor) for name in arrays if name == anchor or name.endswith(f"/{anchor}")]
    found = [prefix for prefix in found if not prefix.endswith("text/")]
    return found[0] if found else None


def _shape(arrays: Mapping[str, np.ndarray], name: str, num_dims: int) -> tuple[int, ...]:
    if name not in arrays:
        raise ValueError(f"FILE must hold the tensors of its format. Got missing {name}; it has {_listed([*arrays])}.")
    shape = arrays[name].shape
    if len(shape) != num_dims:
        raise ValueError(f"FILE must have {name} of {num_dims} dimensions. Got the shape {shape}.")
    return shape


def _num_blocks(arrays: Mapping[str, np.ndarray], pattern: str) -> int:
    found = [int(match[1]) for name in arrays if (match := re.match(pattern, name))]
    return max(found, default=0) + 1


def _image_size(name: str, num_positions: int, patch_size: int) -> int:
    side = round((num_positions - 1) ** 0.5)
    if side < 1 or side**2 + 1 != num_positions:
        raise ValueError(f"FILE must have {name} for a class token and a square of patches. Got {num_positions}.")
    return side * patch_size


def _block(
    theirs: str, their_parts: Sequence[str], ours: str, our_parts: Sequence[str], sizes: tuple[int, int, int, int]
) -> dict[str, Tensor]:
    """Describes a block of a transformer.

    Args:
        theirs: Name of the block there.
        their_parts: Names in it: first norm, query, key, value, attention's output, second norm, the two layers.
        ours: Name of the block here.
        our_parts: Names in it, in the same order.
        sizes: Width, heads, width of a head, and width between the two layers.
    """
    width, heads, head_width, inner = sizes
    names = [(f"{theirs}/{their}", f"{ours}.{our}") for their, our in zip(their_parts, our_parts, strict=True)]
    tensors = {**norm(*names[0], width), **norm(*names[5], width)}
    for pair in names[1:4]:
        tensors |= attention_input(*pair, (width, heads, head_width))
    tensors |= attention_output(*names[4], (heads, head_width, width))
    return tensors | dense(*names[6], (width, inner)) | dense(*names[7], (inner, width))


def _describe_vit(arrays: Mapping[str, np.ndarray]) -> Original:
    prefix = _find_prefix(arrays, _VIT_POSITIONS) or ""
    is_augreg = any(f"/{_AUGREG_BLOCK[3]}/" in name for name in arrays)
    norm_1, attention, norm_2, mlp = _AUGREG_BLOCK if is_augreg else _SCENIC_BLOCK
    inputs = (f"{attention}/{part}" for part in ("query", "key", "value", "out"))
    their_parts = (norm_1, *inputs, norm_2, f"{mlp}/Dense_0", f"{mlp}/Dense_1")
    blocks = f"{prefix}Transformer/encoderblock_"
    patch, _, channels, width = _shape(arrays, f"{prefix}embedding/kernel", 4)
    _, heads, head_width = _shape(arrays, f"{blocks}0/{attention}/query/kernel", 3)
    inner = _shape(arrays, f"{blocks}0/{mlp}/Dense_0/kernel", 2)[1]
    num_positions = _shape(arrays, f"{prefix}{_VIT_POSITIONS}", 3)[1]
    num_blocks = _num_blocks(arrays, re.escape(blocks) + r"(\d+)/")
    tensors = {
        f"{prefix}cls": Tensor((1, 1, width), {"embeddings.cls_token": same}),
        f"{prefix}{_VIT_POSITIONS}": Tensor((1, num_positions, width), {"embeddings.position_embeddings": same}),
        **convolution(f"{prefix}embedding", "embeddings.patch_embeddings.projection", (patch, channels, width)),
        f"{prefix}embedding/bias": Tensor((width,), {"embeddings.patch_embeddings.projection.bias": same}),
        **norm(f"{prefix}Transformer/encoder_norm", "layernorm", width),
    }
    for number in range(num_blocks):
        theirs, ours = f"{blocks}{number}", f"encoder.layer.{number}"
        tensors |= _block(theirs, their_parts, ours, _VIT_PARTS, (width, heads, head_width, inner))
    config = {
        "model_type": "vit",
        "image_size": _image_size(f"{prefix}{_VIT_POSITIONS}", num_positions, patch),
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        # Flax's defaults, with which AugReg's ViTs were trained (arXiv 2106.10270).
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    }
    return Original(config, "embeddings.position_embeddings", tensors)


def _describe_scenic_clip(arrays: Mapping[str, np.ndarray]) -> Original:
    """CLIP's image tower as google-research/scenic names it in flax (projects/baselines/clip/layers.py)."""
    prefix = _find_prefix(arrays, _CLIP_POSITIONS) or ""
    blocks = f"{prefix}transformer/resblocks."
    patch, _, channels, width = _shape(arrays, f"{prefix}conv1/kernel", 4)
    _, heads, head_width = _shape(arrays, f"{blocks}0/attn/query/kernel", 3)
    inner = _shape(arrays, f"{blocks}0/mlp/c_fc/kernel", 2)[1]
    num_positions = _shape(arrays, f"{prefix}{_CLIP_POSITIONS}", 2)[0]
    num_blocks = _num_blocks(arrays, re.escape(blocks) + r"(\d+)/")
    tower, positions = "vision_model", "vision_model.embeddings.position_embedding.weight"
    tensors = {
        f"{prefix}class_embedding": Tensor((width,), {f"{tower}.embeddings.class_embedding": same}),
        f"{prefix}{_CLIP_POSITIONS}": Tensor((num_positions, width), {positions: same}),
        **convolution(f"{prefix}conv1", f"{tower}.embeddings.patch_embedding", (patch, channels, width)),
        **norm(f"{prefix}ln_pre", f"{tower}.pre_layrnorm", width),
        **norm(f"{prefix}ln_post", f"{tower}.post_layernorm", width),
    }
    for number in range(num_blocks):
        theirs, ours = f"{blocks}{number}", f"{tower}.encoder.layers.{number}"
        tensors |= _block(theirs, _SCENIC_CLIP_PARTS, ours, _CLIP_PARTS, (width, heads, head_width, inner))
    image_size = _image_size(f"{prefix}{_CLIP_POSITIONS}", num_positions, patch)
    config = _clip_config(image_size, patch, channels, width, num_blocks, heads, inner)
    return Original(config, positions, tensors)


def _describe_openai_clip(arrays: Mapping[str, np.ndarray]) -> Original:
    """CLIP's image tower under the names of OpenAI's PyTorch modules, `visual.`."""
    blocks = "visual.transformer.resblocks."
    width, channels, patch, _ = _shape(arrays, "visual.conv1.weight", 4)
    num_positions = _shape(arrays, "visual.positional_embedding", 2)[0]
    inner = _shape(arrays, f"{blocks}0.mlp.c_fc.weight", 2)[0]
    num_blocks = _num_blocks(arrays, re.escape(blocks) + r"(\d+)\.")
    if width % _CLIP_HEAD_WIDTH:
        raise ValueError(f"FILE must have a tower of a multiple of {_CLIP_HEAD_WIDTH} in width. Got {width}.")
    tower, kinds = "vision_model", ("weight", "bias")
    plain = {
        "class_embedding": ((width,), "embeddings.class_embedding"),
        "positional_embedding": ((num_positions, width), "embeddings.position_embedding.weight"),
        "conv1.weight": ((width, channels, patch, patch), "embeddings.patch_embedding.weight"),
    }
    for theirs, ours in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        plain |= {f"{theirs}.{kind}": ((width,), f"{ours}.{kind}") for kind in kinds}
    tensors = {}
    for number in range(num_blocks):
        theirs, ours = f"transformer.resblocks.{number}", f"encoder.layers.{number}"
        for part, name, outputs, inputs in (
            ("attn.out_proj", "self_attn.out_proj", width, width),
            ("mlp.c_fc", "mlp.fc1", inner, width),
            ("mlp.c_proj", "mlp.fc2", width, inner),
        ):
            plain[f"{theirs}.{part}.weight"] = ((outputs, inputs), f"{ours}.{name}.weight")
            plain[f"{theirs}.{part}.bias"] = ((outputs,), f"{ours}.{name}.bias")
        plain |= {f"{theirs}.ln_{n}.{kind}": ((width,), f"{ours}.layer_norm{n}.{kind}") for n in "12" for kind in kinds}
        for kind, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            parts = {f"{tower}.{ours}.self_attn.{part}_proj.{kind}": third(place) for place, part in enumerate("qkv")}
            tensors[f"visual.{theirs}.attn.in_proj_{kind}"] = Tensor(shape, parts)
    tensors |= {f"visual.{name}": Tensor(shape, {f"{tower}.{ours}": same}) for name, (shape, ours) in plain.items()}
    image_size = _image_size("visual.positional_embedding", num_positions, patch)
    config = _clip_config(image_size, patch, channels, width, num_blocks, width // _CLIP_HEAD_WIDTH, inner)
    return Original(config, f"{tower}.embeddings.position_embedding.weight", tensors)


def _clip_config(
    image_size: int, patch: int, channels: int, width: int, num_blocks: int, heads: int, inner: int
) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "image_size": image_size,
        "patch_size": patch,
        "num_channels": channels,
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }


def _with_heads(original: Original, arrays: Mapping[str, np.ndarray], name: str, keep_teachers: bool) -> Original:
    width = original.backbone["hidden_size"]
    student, tensors = _describe_head(arrays, name, "student_head", width)
    teachers, num_classes = [], []
    if keep_teachers:
        numbers = sorted({int(match[1]) for name in arrays if (match := re.fullmatch(_TEACHERS, name))})
        if not numbers:
            raise ValueError("--keep-teachers must go with a checkpoint that has teachers. Got one without.")
        for position, number in enumerate(numbers):
            theirs, ours = f"teacher_projection_domain_{number}", f"teacher_heads.{position}"
            teacher, own = _describe_head(arrays, theirs, ours, width)
            if (teacher.hidden_dims, teacher.bias) != (student.hidden_dims, student.bias):
                raise ValueError(f"FILE must have heads that differ in `dim` alone. Got {student} and {teacher}.")
            tensors |= own
            teachers.append(teacher)
            num_classes.append(_shape(arrays, f"teacher_output_projection_{number}/kernel", 2)[1])
        if len({teacher.dim for teacher in teachers}) > 1:
            raise ValueError(f"FILE must have teachers of one width. Got {[teacher.dim for teacher in teachers]}.")
    return replace(
        original,
        tensors=original.tensors | tensors,
        student=student,
        teachers=tuple(teachers),
        num_classes=tuple(num_classes),
    )


def _describe_head(
    arrays: Mapping[str, np.ndarray], theirs: str, ours: str, width: int
) -> tuple[Head, dict[str, Tensor]]:
    """`Dense_0`, or for each hidden layer `Dense_i` and `LayerNorm_i` before the last `Dense`: flax's own numbers."""
    last = _num_blocks(arrays, re.escape(theirs) + r"/Dense_(\d+)/kernel") - 1
    tensors: dict[str, Tensor] = {}
    hidden_dims: list[int] = []
    for layer in range(last):
        hidden = _shape(arrays, f"{theirs}/Dense_{layer}/kernel", 2)[1]
        # Linear, LayerNorm and GELU for each hidden layer.
        tensors |= dense(f"{theirs}/Dense_{layer}", f"{ours}.hidden.{3 * layer}", (width, hidden))
        tensors |= norm(f"{theirs}/LayerNorm_{layer}", f"{ours}.hidden.{3 * layer + 1}", hidden)
        hidden_dims.append(hidden)
        width = hidden
    dim = _shape(arrays, f"{theirs}/Dense_{last}/kernel", 2)[1]
    tensors |= dense(f"{theirs}/Dense_{last}", f"{ours}.projection", (width, dim))
    bias = f"{theirs}/Dense_{last}/bias" in arrays
    if not bias:
        del tensors[f"{theirs}/Dense_{last}/bias"]
    return Head(tuple(hidden_dims), dim, bias), tensors
