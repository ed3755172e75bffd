"""What can be evaluated: a run with its teachers, a student, any vision encoder, raw pixels."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.transforms import EvalTransform, ImageTransform, normalize
from modeling_udon.encoder import ProcessorTransform, check_remote_code
from modeling_udon.evaluation.embedder import Embed, embed_raw_pixels, embed_with_model, shrink_to_thumbnail
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.run_record import RunRecord

RAW_PIXELS = "raw-pixels"
TIMM_PREFIX = "timm:"
POOLINGS = ("cls", "mean", "pooler")

Channels = tuple[float, float, float]
Pooling = Literal["cls", "mean", "pooler"]


@dataclass(frozen=True)
class Encoder:
    """A way from decoded images to embeddings.

    Attributes:
        name: What it is called in results.
        kind: Which of the embeddings count as the model's: `"student"`, `"features"` or `"raw_pixels"`.
        transform: Turns a decoded image into one of the size that the model takes.
        embed_for: Gives the embedding function of a domain; it may give `"teacher"` as well.
        module: What is to be moved to a device, `None` for raw pixels.
        folder: The model's folder on disk, if it lies in one.
        settings: What makes the embeddings repeatable, as JSON takes it.
    """

    name: str
    kind: str
    transform: ImageTransform
    embed_for: Callable[[str], Embed]
    module: nn.Module | None
    folder: Path | None
    settings: dict[str, Any]


def open_run(run: RunRecord) -> Encoder:
    """Opens the best student of a run, with its teachers where the run still has them."""
    best = run.folder / "best"
    model = open_teachers(run) if run.weights.is_file() else UdonModel.from_pretrained(best)
    processor = _open_processor(str(best), None)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    transform = EvalTransform(processor.size["shortest_edge"], run.config["data"]["eval_antialias"])
    return _udon_encoder(model, run.config["name"], transform, mean, std, best)


def open_teachers(run: RunRecord) -> UdonModel:
    """Opens the best model of a run as it was trained, with its teacher heads.

    Raises:
        ValueError: If the run's checkpoints are gone.
    """
    if not run.weights.is_file():
        raise ValueError(f"the run must still have its checkpoints, got {run.folder} without {run.weights.name}")
    student = UdonConfig.from_pretrained(run.folder / "best")
    # The weights of the training model, whose `udon.` is ours.
    weights = {
        name.removeprefix("udon."): tensor
        for name, tensor in load_file(run.weights).items()
        if name.startswith("udon.")
    }
    classes = json.loads((run.folder / "domains.json").read_text(encoding="utf-8"))
    taught = {name: entry["num_classes"] for name, entry in classes.items() if _head_of(name) in weights}
    sizes = ("embedding_dim", "teacher_dim", "head_hidden_dims", "head_bias", "pooling")
    values = {name: getattr(student, name) for name in sizes}
    model = UdonModel(UdonConfig(student.backbone_config, domains=taught, **values))
    model.load_state_dict(weights)
    return model.eval()


def open_model(
    name: str,
    pooling: Pooling | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
) -> Encoder:
    """Opens a UDON student, another vision encoder of transformers, one of timm, or raw pixels.

    Images are prepared as the model's own image processor does it.

    Args:
        name: A folder or Hub id; `timm:NAME` for a model of timm; `raw-pixels` for the baseline.
        pooling: What of a vision encoder's output is the image's feature: `"cls"`, the first token of the last hidden
            state; `"mean"`, the mean over all its positions; `"pooler"`, the model's own. A UDON model needs none;
            `"cls"` takes its backbone's features in place of the student's embedding.
        revision: Commit, tag or branch on the Hub.
        trust_remote_code: Whether code that lies beside a model may run.
        image_size: Side in pixels, if the preparation is to be another: shorter side to it, bilinear, centre cut out.

    Raises:
        ValueError: If the model cannot be opened, or `pooling` does not go with it.
        ImportError: If timm is asked for and not installed.
    """
    if name == RAW_PIXELS:
        if pooling is not None:
            raise ValueError(f"--pooling must be left out for {name}, which are no tokens. Got {pooling}.")
        return Encoder(name, "raw_pixels", shrink_to_thumbnail, lambda domain: embed_raw_pixels, None, None, {})
    if name.startswith(TIMM_PREFIX):
        return _open_timm(name, _require_pooling(name, pooling), image_size)
    check_remote_code(name, revision, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--model must be a folder of a model, a Hub id, timm:NAME or {RAW_PIXELS}: {reason}"
        ) from None
    revision = revision or "main"
    processor = _open_processor(name, revision, trust_remote_code)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    folder = Path(name) if Path(name).is_dir() else None
    if isinstance(config, UdonConfig):
        if pooling not in (None, "cls"):
            raise ValueError(
                f"--pooling must be left out for the student {name}, or cls for its backbone's own features. "
                f"Got {pooling}."
            )
        student = UdonModel.from_pretrained(name, revision=revision)
        ours = EvalTransform(image_size or processor.size["shortest_edge"])
        encoder = _udon_encoder(student, name, ours, mean, std, folder)
        return encoder if pooling is None else _backbone_of(encoder, student, mean, std)
    chosen = _require_pooling(name, pooling)
    model = AutoModel.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code, dtype=torch.float32
    ).eval()
    # Of a model for images and texts, the tower that sees.
    model = model.vision_model if hasattr(config, "vision_config") else model
    transform: ImageTransform = ProcessorTransform(processor) if image_size is None else EvalTransform(image_size)
    settings = {"pooling": chosen, "revision": revision, "image_size": image_size, "processor": _plain(processor)}
    embed = _embed_features(lambda pixels: _pool(model(pixel_values=pixels), chosen), mean, std)
    return Encoder(name, "features", transform, lambda domain: embed, model, folder, settings)


def _head_of(domain: str) -> str:
    return f"teacher_heads.{domain}.projection.weight"


def _udon_encoder(
    model: UdonModel, name: str, transform: EvalTransform, mean: Channels, std: Channels, folder: Path | None
) -> Encoder:
    model = model.float().eval()

    def embed_for(domain: str) -> Embed:
        embed = embed_with_model(model, mean, std, domain)
        return lambda pixels: {kind: values for kind, values in embed(pixels).items() if kind != "backbone"}

    settings = _settings(transform.image_size, mean, std)
    return Encoder(name, "student", transform, embed_for, model, folder, settings)


def _open_timm(name: str, pooling: Pooling, image_size: int | None) -> Encoder:
    timm = _import_timm()
    try:
        model = timm.create_model(name.removeprefix(TIMM_PREFIX), pretrained=True, num_classes=0).eval()
    except RuntimeError as error:
        raise ValueError(f"--model must name a model of timm after {TIMM_PREFIX}: {error}") from None
    data = timm.data.resolve_model_data_config(model)
    size, mean, std = image_size or data["input_size"][-1], tuple(data["mean"]), tuple(data["std"])

    def features(pixels: torch.Tensor) -> torch.Tensor:
        hidden = model.forward_features(pixels)
        if pooling == "pooler":
            return model.forward_head(hidden, pre_logits=True)
        if hidden.ndim == 4 and hidden.shape[-1] == model.num_features:
            hidden = hidden.flatten(1, 2)  # (B, H, W, D), as Swin has it -> (B, N, D)
            if pooling == "cls":
                raise ValueError(
                    f"--pooling must fit the model's output, got cls for {name}, a map; use mean or pooler"
                )
        return _pool_hidden(hidden, pooling)

    settings = _settings(size, mean, std) | {"pooling": pooling, "timm": timm.__version__}
    embed = _embed_features(features, mean, std)
    return Encoder(name, "features", EvalTransform(size), lambda domain: embed, model, None, settings)


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"--model {TIMM_PREFIX}NAME needs timm, which is missing: pip install timm") from error


def _embed_features(features: Callable[[torch.Tensor], torch.Tensor], mean: Channels, std: Channels) -> Embed:
    return lambda pixels: {"features": F.normalize(features(normalize(pixels, mean, std)).float(), dim=1)}


def _pool(outputs: Any, pooling: Pooling) -> torch.Tensor:
    if pooling == "pooler":
        if getattr(outputs, "pooler_output", None) is None:
            raise ValueError("--pooling must be one that the model has, got pooler from one without; use cls or mean")
        return outputs.pooler_output.flatten(1)
    return _pool_hidden(outputs.last_hidden_state, pooling)


def _pool_hidden(hidden: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Tokens of shape `(B, N, D)` or feature maps of shape `(B, D, H, W)` to `(B, D)`."""
    if hidden.ndim == 4 and pooling == "mean":
        return hidden.mean(dim=(2, 3))
    if hidden.ndim != 3:
        raise ValueError(
            f"--pooling must fit the model's output, got {pooling} for a last hidden state of "
            f"{hidden.ndim} dimensions; use mean or pooler"
        )
    return hidden[:, 0] if pooling == "cls" else hidden.mean(dim=1)


def _open_processor(name: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--model must have a preprocessor_config.json that says how images are prepared, got {name}: {reason}"
        ) from None


def _backbone_of(encoder: Encoder, model: UdonModel, mean: Channels, std: Channels) -> Encoder:
    """The same model by the features of its backbone, at their full width."""
    embed = embed_with_model(model, mean, std)
    settings = encoder.settings | {"pooling": "cls"}

    def features(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"features": embed(pixels)["backbone"]}

    return replace(encoder, kind="features", embed_for=lambda domain: features, folder=None, settings=settings)


def _settings(image_size: int, mean: Channels, std: Channels) -> dict[str, Any]:
    return {"image_size": image_size, "image_mean": list(mean), "image_std": list(std)}


def _plain(processor: Any) -> dict[str, Any]:
    return json.loads(processor.to_json_string())


def _require_pooling(name: str, pooling: Pooling | None) -> Pooling:
    if pooling is None:
        raise ValueError(f"--pooling must be named for {name}, which is not a UDON model: one of {', '.join(POOLINGS)}")
    return pooling
