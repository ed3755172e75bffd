"""A published model as a function from pixels to embeddings, with its own preprocessing and a fingerprint."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig
from transformers.utils import cached_file

from modeling_udon.data.transforms import EvalTransform, normalize
from modeling_udon.modeling_udon import UdonModel

CALIBRATION_FILE = "calibration.json"

_COMMIT = re.compile(r"[0-9a-f]{40}")

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Calibration:
    """From which score on an image counts as one of the index.

    Attributes:
        threshold: The least score that is accepted.
        false_accept_rate: Share of foreign images that were accepted at this threshold, on the validation split.
    """

    threshold: float
    false_accept_rate: float


@dataclass(frozen=True)
class EmbeddingModel:
    """A model with the preprocessing that it was published with.

    Attributes:
        name: The folder or Hub id that it came from.
        network: The model, in float32 and evaluation mode.
        transform: Turns a decoded image, `(height, width, 3)`, uint8, into one of the model's size.
        mean: Mean of each channel.
        std: Standard deviation of each channel.
        dim: Size of an embedding.
        fingerprint: Digest of the weights and of the preprocessing: equal embeddings have equal ones.
        calibration: What `udon evaluate --calibrate` left with the model, if it did.
    """

    name: str
    network: nn.Module
    transform: Transform
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dim: int
    fingerprint: str
    calibration: Calibration | None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeds pixels of shape `(batch_size, height, width, 3)`, uint8: `(batch_size, dim)`, float32, unit norm."""
        return _embed(self.network, normalize(pixels, self.mean, self.std))


@dataclass(frozen=True)
class ProcessorTransform:
    """Resizes and crops as an image processor does, for one that does otherwise than `EvalTransform`."""

    processor: Any

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """`(height, width, 3)` -> the processor's size, uint8."""
        done = self.processor(image, do_rescale=False, do_normalize=False, input_data_format="channels_last")
        return np.ascontiguousarray(np.asarray(done["pixel_values"][0]).transpose(1, 2, 0)).astype(np.uint8)


def load_embedding_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> EmbeddingModel:
    """Loads a model with its image processor.

    Args:
        model: A folder, or an id on the Hub. A UDON model needs no remote code.
        revision: Commit, tag or branch on the Hub.
        trust_remote_code: Whether code that lies beside a model of another kind may run.

    Raises:
        ValueError: If the model or its image processor cannot be opened, or it gives no embedding; or its code may
            run, and no commit says which.
    """
    check_remote_code(model, revision, trust_remote_code)
    source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model, **source)
        network = AutoModel.from_pretrained(model, config=config, dtype=torch.float32, **source).eval()
    except Exception as error:  # On damaged or hostile folders transformers raises nearly every type there is.
        raise ValueError(
            f"`model` must be a model folder or Hub id that opens. Got {model!r}: {_line(error)}"
        ) from error
    try:
        processor = AutoImageProcessor.from_pretrained(model, **source)
    except (OSError, ValueError) as error:
        raise ValueError(f"`model` must have a preprocessor_config.json. Got {model!r}: {_line(error)}") from error
    if isinstance(network, UdonModel):
        network = network.student()
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    transform = _transform(processor)
    return EmbeddingModel(
        name=model,
        network=network,
        transform=transform,
        mean=mean,
        std=std,
        dim=_probe(network, transform, model),
        fingerprint=_fingerprint(network, config, processor.to_dict()),
        calibration=_read_calibration(model, revision),
    )


def check_remote_code(model: str, revision: str | None, trust_remote_code: bool) -> None:
    """Refuses to run code of the Hub that may be another tomorrow than what was read today.

    Args:
        model: A folder, or an id on the Hub.
        revision: What is asked for of it.
        trust_remote_code: Whether its code may run.

    Raises:
        ValueError: If the code of a model on the Hub may run and `revision` is no commit.
    """
    if trust_remote_code and not Path(model).is_dir() and not _COMMIT.fullmatch(revision or ""):
        raise ValueError(
            f"`revision` must be a commit, 40 digits, where code of {model} may run: a branch or tag can be moved. Got "
            f"{revision!r}; read the code and name its commit."
        )


def _embed(network: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    outputs = network(pixel_values)
    embeds = outputs["image_embeds"] if "image_embeds" in outputs else outputs["pooler_output"]
    return F.normalize(embeds.float(), dim=-1)


@torch.no_grad()
def _probe(network: nn.Module, transform: Transform, name: str) -> int:
    """Embeds a grey image; returns the size of the embedding."""
    size = transform(np.full((64, 64, 3), 128, dtype=np.uint8)).shape
    try:
        return _embed(network, torch.zeros(1, size[2], size[0], size[1])).shape[-1]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            "`model` must take images alone and give `image_embeds` or `pooler_output`. "
            f"Got {name!r}, a {type(network).__name__}: {_line(error)}"
        ) from error


def _transform(processor: Any) -> Transform:
    """Ours where it does the same, since it is quicker."""
    values = processor.to_dict()
    size, crop = dict(values.get("size") or {}), dict(values.get("crop_size") or {})
    side = size.get("shortest_edge")
    ours = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 2}
    same = all(values.get(key) == value for key, value in ours.items())
    if same and side is not None and list(size) == ["shortest_edge"] and crop == {"height": side, "width": side}:
        return EvalTransform(side)
    return ProcessorTransform(processor)


def _fingerprint(network: nn.Module, config: PretrainedConfig, processing: dict[str, Any]) -> str:
    """Digest of values, not of names: those of weights change with the version of transformers.

    Teacher heads do not count, since the student's embeddings do not depend on them.
    """
    digests = []
    for value in network.state_dict().values():
        array = value.contiguous().cpu().numpy()
        digests.append(hashlib.sha256(str((array.shape, array.dtype.str)).encode() + array.data).digest())
    fields = ("size", "crop_size", "do_resize", "do_center_crop", "resample", "image_mean", "image_std")
    kept = {field: _plain(processing.get(field)) for field in fields}
    described = json.dumps([kept, getattr(config, "pooling", None)], sort_keys=True)
    return hashlib.sha256(b"".join(sorted(digests)) + described.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: part for key, part in dict(value).items() if part is not None}
    return list(value) if isinstance(value, tuple) else value


def _read_calibration(model: str, revision: str | None) -> Calibration | None:
    path = cached_file(
        model,
        CALIBRATION_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        return Calibration(float(values["threshold"]), float(values["false_accept_rate"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{CALIBRATION_FILE} of `model` must hold the numbers `threshold` and `false_accept_rate`. "
            f"Got {path}: {_line(error)}; write it anew with `udon evaluate --calibrate`."
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
