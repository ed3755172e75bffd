"""Networks of model folders and Hub ids, opened with what prepares their images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.auto_classes import UdonModel
from modeling_udon.backbones import (
    ImageFeatures,
    Pooling,
    check_missing,
    check_remote_code,
    load_model,
    one_line,
    open_backbone,
    open_processor,
)
from modeling_udon.configuration_udon import UdonConfig, backbone_facts
from modeling_udon.data.preprocessing import ChannelStatistics, processor_transform
from modeling_udon.data.processor_statistics import statistics_of_processor
from modeling_udon.data.transforms import EvalTransform, ImageTransform

RAW_PIXELS = "raw-pixels"


@dataclass(frozen=True)
class OpenedNetwork:
    """A network with its preprocessing.

    Attributes:
        network: A `UdonModel` without teachers, or an `ImageFeatures`; in evaluation mode.
        processor: The model's image processor.
        statistics: Channel statistics that the network takes.
        transform: Turns a decoded image into one of the network's size.
        image_size: Side in pixels of the images that the network takes.
        source: Folder or Hub id that it was opened from: of a run its `best`.
        run: Folder of the run that the student was found in, `None` if the student was named itself.
    """

    network: nn.Module
    processor: BaseImageProcessor
    statistics: ChannelStatistics
    transform: ImageTransform
    image_size: int
    source: str
    run: Path | None


def open_network(
    name: str, revision: str | None, trust_remote_code: bool, pooling: Pooling | None, image_size: int | None
) -> OpenedNetwork:
    """Opens the network of a folder or Hub id; the arguments are those of `Encoder.open`.

    Raises:
        ValueError: If the model or its image processor cannot be opened, weights are missing, `pooling` does not fit,
            or code may run and no commit says which.
    """
    check_remote_code(name, revision, trust_remote_code)
    run = Path(name) if (Path(name) / "best" / "config.json").is_file() else None
    source = name if run is None else str(run / "best")
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if isinstance(config, UdonConfig):
            network: nn.Module = _open_student(source, config, pooling, image_size, options["revision"])
        else:
            network = ImageFeatures(open_backbone(source, config, pooling, **options), pooling, image_size).eval()
    except ValueError as error:
        if str(error).startswith(("`model`", "--")):
            raise
        raise _refusal(name, error) from error
    except Exception as error:  # On damaged or hostile folders transformers raises nearly every type there is.
        raise _refusal(name, error) from error
    processor = open_processor(source, **options)
    transform, side = _preparation(processor, image_size, name)
    statistics = statistics_of_processor(processor)
    return OpenedNetwork(network, processor, statistics, transform, side, source, run)


def _open_student(
    name: str, config: PretrainedConfig, pooling: Pooling | None, image_size: int | None, revision: str
) -> UdonModel:
    if pooling not in (None, config.pooling):
        raise ValueError(
            f"--pooling must be left out for the student {name}, or {config.pooling} for its backbone's own features. "
            f"Got {pooling}."
        )
    model, missing = load_model(UdonModel, name, config=config, revision=revision)
    check_missing(name, missing, None)
    if image_size is not None and backbone_facts(model.config.backbone_config).sizes == "request":
        model.config.interpolate_pos_encoding = True
    # What is published with its teachers is searched without.
    return model.student().eval()


def _refusal(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"`model` must be a model folder or Hub id that opens, timm:NAME or {RAW_PIXELS}. "
        f"Got {name!r}: {one_line(error)}"
    )


def _preparation(processor: BaseImageProcessor, image_size: int | None, name: str) -> tuple[ImageTransform, int]:
    """What prepares images of any shape, and the side of the squares that it gives.

    Raises:
        ValueError: If it cannot, or gives other images.
    """
    try:
        transform = processor_transform(processor) if image_size is None else EvalTransform(image_size)
        shapes = {transform(np.full((*shape, 3), 128, np.uint8)).shape[:2] for shape in ((64, 64), (64, 96))}
    except Exception as error:  # Of odd values, image processors raise nearly every type there is.
        raise ValueError(
            "`model` must have a preprocessor_config.json by which images can be prepared. "
            f"Got {name!r}: {one_line(error)}"
        ) from error
    if len(shapes) > 1 or len(set(next(iter(shapes)))) > 1:
        raise ValueError(
            f"`model` must prepare all images as squares of one size. Got {name!r}, which gives "
            f"{' and '.join(f'{height} x {width}' for height, width in sorted(shapes))}; name `image_size`."
        )
    return transform, next(iter(shapes))[0]


def checked_features(features: torch.Tensor) -> torch.Tensor:
    """Returns features of a plain image; raises ValueError if they cannot be an embedding."""
    if not (torch.isfinite(features).all() and features.any()):
        what = "zeros" if torch.isfinite(features).all() else "NaN or infinity"
        raise ValueError(f"a grey image gives {what}, so its weights are spoilt; take those of an earlier step")
    return features


def nested_dims(network: nn.Module) -> tuple[int, ...]:
    """How many of a student's first dimensions are embeddings by themselves; none of another network's are."""
    return tuple(network.config.matryoshka_dims) if isinstance(network, UdonModel) else ()


def digest_weights(network: nn.Module) -> list[bytes]:
    """A digest of each weight by its values, not its name: names change with the version of transformers."""
    digests = []
    for value in network.state_dict().values():
        array = value.contiguous().cpu().numpy()
        digests.append(hashlib.sha256(str((array.shape, array.dtype.str)).encode() + array.data).digest())
    return digests
