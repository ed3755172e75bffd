"""Preprocessing as published with a model: channel statistics, and image processors of transformers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BaseImageProcessor

from modeling_udon.data.transforms import EvalTransform, ImageTransform, check_image_size, normalize

try:
    from transformers import CLIPImageProcessorPil as PillowImageProcessor
except ImportError:  # transformers 4.x has one class, with the plain name.
    from transformers import CLIPImageProcessor as PillowImageProcessor  # type: ignore[assignment]

Channels = tuple[float, float, float]
# Fields of image processors that seldom differ, and what they are then.
_USUAL = {"do_rescale": True, "rescale_factor": 1 / 255, "rescale_offset": None, "do_normalize": True}


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each colour channel, on pixels from 0 to 1.

    Attributes:
        mean: Mean of red, green and blue.
        std: Standard deviation of red, green and blue.

    Raises:
        ValueError: If there are not three of each, or a standard deviation is not positive.
    """

    mean: Channels
    std: Channels

    def __post_init__(self) -> None:
        known = len(self.mean) == len(self.std) == 3 and all(isinstance(value, int | float) for value in self.mean)
        if not (known and all(map(math.isfinite, (*self.mean, *self.std))) and all(value > 0 for value in self.std)):
            raise ValueError(
                "`mean` and `std` must be three numbers each, red, green and blue, `std` above 0. "
                f"Got {self.mean} and {self.std}; take those that the backbone was trained with."
            )

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(pixels / 255 - mean) / std`: uint8 `(B, H, W, 3)` -> float32 `(B, 3, H, W)`; see `transforms.normalize`."""
        return normalize(pixels, self.mean, self.std)


# The original's `MEAN_RGB` and `STDDEV_RGB` for its ViT backbones; transformers.image_utils uses the same name.
IMAGENET_STANDARD = ChannelStatistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Measured on ImageNet; DINOv2, DINOv3, ConvNeXt, ResNet and most of timm.
IMAGENET_DEFAULT = ChannelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Of the data that OpenAI trained CLIP on: the preprocessing in their `clip/clip.py`, and the original's CLIP config.
OPENAI_CLIP = ChannelStatistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# Pixels from 0 to 1, not shifted.
UNIT_RANGE = ChannelStatistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def image_processor(image_size: int, statistics: ChannelStatistics) -> BaseImageProcessor:
    """Builds the published student's image processor; its `save_pretrained` writes `preprocessor_config.json`.

    It does to an RGB image what `EvalTransform(image_size)` and `statistics.normalize` do. The file names
    `CLIPImageProcessor`, which `AutoImageProcessor` finds in transformers 4.56 as in 5.x, without torchvision. Where
    torchvision is installed, 5.x takes that backend, whose resize differs by a grey level; `backend="pil"` brings the
    equality back. Unlike `decode_image` it neither turns an image upright nor composites it on white.

    Raises:
        ValueError: If `image_size` is not positive.
    """
    check_image_size(image_size)
    return PillowImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BILINEAR,
        image_mean=list(statistics.mean),
        image_std=list(statistics.std),
        do_convert_rgb=True,
    )


def idle_processor() -> BaseImageProcessor:
    """Builds an image processor that gives pixels as they are, planes from 0 to 255: a graph prepares them itself."""
    return PillowImageProcessor(
        do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False, do_convert_rgb=True
    )


@dataclass(frozen=True)
class ProcessorTransform:
    """Resizes and crops as an image processor does, for one that `EvalTransform` cannot reproduce."""

    processor: Any

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """`(height, width, 3)` -> the processor's size, uint8."""
        plain = {"do_rescale": False, "do_normalize": False}
        if "include_top" in self.processor.to_dict():
            # EfficientNet's processor would divide by the deviation all the same.
            plain["include_top"] = False
        done = self.processor(image, **plain, input_data_format="channels_last")
        return np.ascontiguousarray(np.asarray(done["pixel_values"][0]).transpose(1, 2, 0)).astype(np.uint8)


def processor_transform(processor: Any) -> ImageTransform:
    """Returns what an image processor does to an image's shape: `EvalTransform` where it is the same, being quicker.

    Raises:
        ValueError: If it makes images of a size that none can have.
    """
    values = processor.to_dict()
    size, crop = dict(values.get("size") or {}), dict(values.get("crop_size") or {})
    side = size.get("shortest_edge")
    for sides in (size, crop):
        for name in ("height", "width", "shortest_edge"):
            if sides.get(name) is not None:
                check_image_size(sides[name])
    ours = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 2}
    same = all(values.get(key) == value for key, value in ours.items())
    if same and side is not None and list(size) == ["shortest_edge"] and crop == {"height": side, "width": side}:
        return EvalTransform(side)
    return ProcessorTransform(processor)


def processor_fields(processor: Any) -> dict[str, Any]:
    """Returns the fields of an image processor that decide what it does to an image."""
    fields = ("size", "crop_size", "do_resize", "do_center_crop", "resample", "image_mean", "image_std")
    values = processor.to_dict()
    # What is as it nearly always is stays out, so that fingerprints are the same as before these were looked at.
    others = {name: values.get(name, usual) for name, usual in _USUAL.items() if values.get(name, usual) != usual}
    return {field: _plain(values.get(field)) for field in fields} | others


def _plain(value: Any) -> Any:
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: part for key, part in dict(value).items() if part is not None}
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
