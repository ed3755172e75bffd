"""Stronger augmentation than the paper's, for training from scratch on few images."""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np

from modeling_udon.data.transforms import check_image_size


@dataclass(frozen=True)
class StrongTransform:
    """Random crop of random size and aspect, turned; mirrored; other light and colours; a part painted over.

    An image is first shrunk, with antialiasing, to where its smallest crop has the resolution of the result; all
    geometry is then one affine map.

    Args:
        image_size: Side of the result.
        flip: Whether half of the results are mirrored.
        min_area: Least share of the image's area that a crop has.
        max_rotation: Degrees by which a crop is turned to either side at most.
        colour: Strength of the changes of brightness, contrast and saturation; each channel changes by a third of it.
        erase: Share of the results with a rectangle of one colour in them.

    Raises:
        ValueError: If `image_size` is not positive.
    """

    image_size: int
    flip: bool = True
    min_area: float = 0.4
    max_rotation: float = 15.0
    colour: float = 0.4
    erase: float = 0.25

    def __post_init__(self) -> None:
        check_image_size(self.image_size)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`(H, W, 3)` -> `(image_size, image_size, 3)`, uint8."""
        crop = self._crop(self._shrink(image), rng)
        changed = self._change_colours(crop, rng)
        if rng.random() < self.erase:
            height, width = rng.integers(self.image_size // 8, self.image_size // 2, 2)
            top, left = rng.integers(self.image_size - height), rng.integers(self.image_size - width)
            changed[top : top + height, left : left + width] = np.round(rng.uniform(0, 255, 3))
        return changed

    def for_teacher(self, image_size: int, min_area: float) -> "StrongTransform":
        """What gives a teacher's view of the same image from the same numbers: more of it, and nothing painted over.

        Position, aspect, angle, side and colours are the same shares of what there is, so that the larger crop holds
        the smaller one but for corners of turned ones.
        """
        return replace(self, image_size=image_size, min_area=min_area, erase=0.0)

    def _shrink(self, image: np.ndarray) -> np.ndarray:
        factor = self.image_size / math.sqrt(self.min_area) / min(image.shape[:2])
        if factor >= 1:
            return image
        return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)

    def _crop(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        height, width = image.shape[:2]
        area, aspect = rng.uniform(self.min_area, 1), math.exp(rng.uniform(-0.25, 0.25))
        crop_width = min(1.0, math.sqrt(area * aspect)) * width
        crop_height = min(1.0, math.sqrt(area / aspect)) * height
        x = width / 2 + rng.uniform(-0.5, 0.5) * (width - crop_width)
        y = height / 2 + rng.uniform(-0.5, 0.5) * (height - crop_height)
        angle = math.radians(rng.uniform(-self.max_rotation, self.max_rotation))
        mirror = -1 if self.flip and rng.random() < 0.5 else 1
        # Columns: what one pixel to the right and one pixel down in the result are in the image.
        step_x, step_y = mirror * crop_width / self.image_size, crop_height / self.image_size
        matrix = np.array(
            [
                [step_x * math.cos(angle), -step_y * math.sin(angle), x],
                [step_x * math.sin(angle), step_y * math.cos(angle), y],
            ]
        )
        matrix[:, 2] -= matrix[:, :2] @ np.full(2, (self.image_size - 1) / 2)
        matrix[:, 2] -= 0.5  # from corners of pixels to their centres
        return cv2.warpAffine(
            image,
            matrix,
            (self.image_size, self.image_size),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT,
        )

    def _change_colours(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        brightness, contrast, saturation = rng.uniform(1 - self.colour, 1 + self.colour, 3)
        channels = brightness * rng.uniform(1 - self.colour / 3, 1 + self.colour / 3, 3)
        mean = sum(cv2.mean(pixels)) / 3
        # Contrast about the mean, light of each channel, saturation about grey: one affine map of colours.
        saturate = saturation * np.eye(3) + (1 - saturation) / 3
        matrix = np.column_stack([saturate * (contrast * channels), saturate @ ((1 - contrast) * mean * channels)])
        return cv2.transform(pixels, matrix)
