"""Train and eval preprocessing: decoded uint8 pixels in the workers -> float pixels on the device.

The two transforms run in `DataLoader` workers on numpy uint8 arrays of shape `(H, W, 3)`; `normalize` runs once per
batch in torch, wherever the batch lies, so that a quarter of the bytes cross to the device.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from PIL import Image

# What the transforms begin with, so that preprocessing has one address.
from modeling_udon.data.images import decode_image as decode_image

# A longer side of more than this many shorter sides loses its ends before the resize, not only after it.
MAX_ASPECT_RATIO = 32
# Longest side that a network takes; one image of it takes 800 MB as float32.
MOST_PIXELS = 8192

# `(height, width, 3) -> (size, size, 3)`, uint8.
ImageTransform = Callable[[np.ndarray], np.ndarray]
RandomTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclass(frozen=True)
class TrainTransform:
    """Resize to a square, random crop, random horizontal flip: the original's training preprocessing.

    The resize ignores the aspect ratio and is bilinear without antialiasing, with half-pixel centres. The original
    keeps its result in float; ours is rounded to uint8 and differs from it by 0.27 grey levels of 255 in the mean and
    0.75 at most (on the three images of the reference vectors).

    Args:
        image_size: side of the result.
        resize_size: side of the square that it is cut from; by default as 256 is to 224.
        flip: whether half of the results are mirrored.

    Raises:
        ValueError: if `image_size` is not positive or larger than `resize_size`.
    """

    image_size: int
    resize_size: int | None = None
    flip: bool = True

    def __post_init__(self) -> None:
        check_image_size(self.image_size)
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size must be at least image_size, {self.image_size}. Got {self.resize_size}; "
                f"leave it out for {round(self.image_size * 256 / 224)}"
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`(H, W, 3)` -> `(image_size, image_size, 3)`, uint8; it may be a view of the resized image.

        From `rng` come the top row, the left column and, with `flip`, one number for the flip, in this order.
        """
        top, left, mirrored = self.draw(rng)
        return _resize_and_crop(image, self.side, self.image_size, top, left, mirrored)

    @property
    def side(self) -> int:
        """Side of the square that the result is cut from."""
        return round(self.image_size * 256 / 224) if self.resize_size is None else self.resize_size

    def draw(self, rng: np.random.Generator) -> tuple[int, int, bool]:
        """Draws the top row, the left column and whether the result is mirrored."""
        room = self.side - self.image_size + 1
        top, left = int(rng.integers(room)), int(rng.integers(room))
        return top, left, self.flip and bool(rng.random() < 0.5)


@dataclass(frozen=True)
class TeacherCrop:
    """What `TrainTransform` cuts out, with more pixels or with more of the image around it, from the same numbers.

    Args:
        student: The transform whose crop lies within this one.
        image_size: Side of the result.
        resize_size: Side of the square that it is cut from.
    """

    student: TrainTransform
    image_size: int
    resize_size: int

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`(H, W, 3)` -> `(image_size, image_size, 3)`, uint8; `rng` stands where it did for the student."""
        top, left, mirrored = self.student.draw(rng)
        # At the same share of the room that there is, a larger crop holds the smaller one.
        share = (self.resize_size - self.image_size) / max(1, self.student.side - self.student.image_size)
        place = round(top * share), round(left * share)
        return _resize_and_crop(image, self.resize_size, self.image_size, *place, mirrored)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to `image_size`, keeping the aspect ratio, and cut out the centre.

    With `antialias` (default) it equals, bit for bit, what `preprocessing.image_processor` gives to a user of the
    published student from the same RGB image in its Pillow backend. Without, it is the original's preprocessing,
    rounded to uint8. Beyond `MAX_ASPECT_RATIO` only the middle of the image is resized, so that memory stays bounded:
    whole, an image of 1 x 5000 pixels would become one of 224 x 1,120,000.

    Raises:
        ValueError: if `image_size` is not positive.
    """

    image_size: int
    antialias: bool = True

    def __post_init__(self) -> None:
        check_image_size(self.image_size)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """`(H, W, 3)` -> `(image_size, image_size, 3)`, uint8."""
        size = self.image_size
        image = _cut_long_ends(image)
        height, width = self._resized_shape(*image.shape[:2])
        top, left = (height - size) // 2, (width - size) // 2
        if self.antialias:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
            return np.array(resized.crop((left, top, left + size, top + size)))
        pixels = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return np.ascontiguousarray(pixels[top : top + size, left : left + size])

    def _resized_shape(self, height: int, width: int) -> tuple[int, int]:
        short, long = min(height, width), max(height, width)
        # Both round down, but not the same number: 61 x 56 at 224 gives 244 in transformers, 243 in the original.
        longer_side = int(self.image_size * long / short) if self.antialias else int(long / short * self.image_size)
        return (longer_side, self.image_size) if width <= height else (self.image_size, longer_side)


@dataclass(frozen=True)
class Letterbox:
    """Pads images to squares, so that another transform cuts nothing off.

    Args:
        transform: The other transform.
        colour: Of the padding: red, green, blue.
    """

    transform: ImageTransform
    colour: tuple[int, int, int]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """`(H, W, 3)` -> what the other transform makes of the image in the middle of a square."""
        image = _cut_long_ends(image)
        height, width = image.shape[:2]
        side = max(height, width)
        padded = np.empty((side, side, 3), np.uint8)
        padded[:] = self.colour
        top, left = (side - height) // 2, (side - width) // 2
        padded[top : top + height, left : left + width] = image
        return self.transform(padded)


def _resize_and_crop(image: np.ndarray, side: int, size: int, top: int, left: int, mirrored: bool) -> np.ndarray:
    """Resizes to a square of `side` and cuts a square of `size` out of it."""
    scales = side / image.shape[0], side / image.shape[1]
    # What the crop does not need is cut off before, which gives the same pixels and spares some of the work: both ends
    # of a side that has its length already, the far end of another one, whose grid of pixels begins at the near end.
    if image.shape[0] == side:
        image, top = image[top:], 0
    if image.shape[1] == side:
        image, left = image[:, left:], 0
    height, width = (_num_needed(first + size, scale) for first, scale in zip((top, left), scales, strict=True))
    resized = cv2.resize(image[:height, :width], None, fx=scales[1], fy=scales[0], interpolation=cv2.INTER_LINEAR)
    crop = resized[top : top + size, left : left + size]
    return cv2.flip(crop, 1) if mirrored else crop


def _num_needed(number: int, scale: float) -> int:
    """How many pixels the first ones of a bilinear resize are made of."""
    return math.floor((number - 0.5) / scale - 0.5) + 2


def cut_box(image: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """The part of an image in a box.

    Args:
        image: Shape `(H, W, 3)`.
        box: Left, top, width and height in pixels; what lies outside of the image is left out.

    Raises:
        ValueError: If nothing of the image lies in the box.
    """
    left, top, width, height = box
    rows = max(math.floor(top), 0), min(math.ceil(top + height), image.shape[0])
    columns = max(math.floor(left), 0), min(math.ceil(left + width), image.shape[1])
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        raise ValueError(
            f"`box` must lie in the image of {image.shape[1]} x {image.shape[0]} pixels. Got left, top, width, height "
            f"of {', '.join(f'{value:g}' for value in box)}; correct it."
        )
    return np.ascontiguousarray(image[slice(*rows), slice(*columns)])


def _cut_long_ends(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    excess = max(height, width) - MAX_ASPECT_RATIO * min(height, width)
    if excess <= 0:
        return image
    end = excess // 2  # The same number on both ends: the centre stays where it is.
    return np.ascontiguousarray(image[end : height - end] if height > width else image[:, end : width - end])


def check_image_size(image_size: int) -> None:
    """Refuses a size that no image can have, or that takes all memory for one."""
    if not 1 <= image_size <= MOST_PIXELS:
        rule = "at least 1" if image_size < 1 else f"at most {MOST_PIXELS}"
        raise ValueError(f"image_size must be {rule}. Got {image_size}; the backbones here use 224.")


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """`(pixels / 255 - mean) / std`: uint8 `(B, H, W, 3)` -> float32 `(B, 3, H, W)`, on the device of `pixels`.

    One multiply and one add in place, with constants that stay on the device. The result is contiguous: a patch
    embedding takes as long from it as from channels-last, and the arithmetic on whole planes is quicker.

    Raises:
        ValueError: if `pixels` is not uint8 of shape `(B, H, W, 3)`.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(
            f"pixels must be uint8 of shape (B, H, W, 3). Got {pixels.dtype} of shape {tuple(pixels.shape)}; "
            "pass the stacked results of a transform"
        )
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), pixels.device)
    planes = pixels.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)


@lru_cache(maxsize=16)  # Made again, they would wait for the device at each step.
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # (x / 255 - mean) / std = x * scale + shift, each of shape (3, 1, 1)
    scale = [1 / (255 * channel_std) for channel_std in std]
    shift = [-channel_mean / channel_std for channel_mean, channel_std in zip(mean, std, strict=True)]
    return torch.tensor(scale, device=device).view(3, 1, 1), torch.tensor(shift, device=device).view(3, 1, 1)
