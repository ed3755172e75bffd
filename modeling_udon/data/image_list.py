"""A list of images of a caller's own, decoded for embedding: paths, PIL images, arrays."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset as TorchDataset

from modeling_udon.data.files import read_file
from modeling_udon.data.images import decode_image, read_picture
from modeling_udon.data.transforms import ImageTransform

ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be decoded.

    Attributes:
        row: Its place among the images.
        path: Its path, empty for an image that is no file.
        reason: Why it could not be read.
    """

    row: int
    path: str
    reason: str


class ImageList(TorchDataset[tuple[int, np.ndarray | UnreadableImage]]):
    """Images decoded and brought to the network's size, with their rows."""

    def __init__(self, images: Sequence[ImageLike], transform: ImageTransform) -> None:
        if isinstance(images, str | bytes | os.PathLike | Image.Image | np.ndarray):
            raise ValueError(f"`images` must be a list of images. Got one {type(images).__name__}; put it into a list.")
        for row, image in enumerate(images):
            if not isinstance(image, str | os.PathLike | Image.Image | np.ndarray):
                raise ValueError(
                    f"`images` must be paths, PIL images or arrays. Got {type(image).__name__} in row {row}; open it "
                    "as a PIL image."
                )
        self._images = images
        self._transform = transform

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> tuple[int, np.ndarray | UnreadableImage]:
        image = self._images[row]
        try:
            return row, self._transform(_decoded(image))
        except (ValueError, OSError) as error:
            path = "" if isinstance(image, Image.Image | np.ndarray) else os.fspath(image)
            return row, UnreadableImage(row, path, " ".join(str(error).split()))


def _decoded(image: ImageLike) -> np.ndarray:
    if isinstance(image, Image.Image):
        return read_picture(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
            raise ValueError(
                "`images` must be RGB arrays of uint8, (height, width, 3). "
                f"Got {image.dtype} of shape {image.shape}; convert it, or pass it as a PIL image."
            )
        return image
    return decode_image(read_file(Path(image)))
