"""Decode, train and eval preprocessing: encoded bytes -> uint8 pixels in the workers -> float pixels on the device.

`decode_image` and the two transforms run in `DataLoader` workers on numpy uint8 arrays of shape `(H, W, 3)`;
`normalize` runs once a batch in torch, wherever the batch lies, so that a quarter of the bytes cross to the device.
Give every `DataLoader` that decodes `worker_init_fn=use_one_thread`.
"""

import io
import struct
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
import torch
from PIL import Image

# Pillow's default limit, 2**30 // 4 // 3, kept here because other libraries move Pillow's own.
MAX_IMAGE_PIXELS = 89_478_485
# JPEG first, since nearly every file is one; AVIF last, since Pillow has it from 11.3 on and stops at a name it does
# not know. Not all that Pillow reads: for EPS, for one, it starts a program.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# A longer side of more than this many shorter sides loses its ends before the resize, not only after it.
MAX_ASPECT_RATIO = 32

# `(height, width, 3) -> (size, size, 3)`, uint8.
ImageTransform = Callable[[np.ndarray], np.ndarray]
RandomTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_EXIF_ORIENTATION = 0x0112
# Tables, restart interval, comment, application data; not APP1, which holds EXIF and XMP.
_HARMLESS_JPEG_MARKERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)})
_warnings_lock = threading.Lock()


def use_one_thread(worker_id: int = 0) -> None:
    """Keep OpenCV to one thread in this process: the `worker_init_fn` of each `DataLoader` that decodes.

    The workers share the cores among themselves already. It is not done on import, since that would also slow
    down whatever else a user's process does with OpenCV.
    """
    cv2.setNumThreads(0)


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image file into upright RGB, `(H, W, 3)` uint8, contiguous and writable.

    Grey and RGB JPEGs go through OpenCV, which gives Pillow's bytes in half of Pillow's time; all other files through
    Pillow. EXIF orientation is applied; transparency is composited on white; of an animation the first frame
    counts. 16-bit values are divided by 256, not clipped (Pillow's mode `I` is read as 16-bit); floats are read as 0
    to 1, or as 0 to 255 if one of them is above 1. Colour profiles are not applied. Damage within the pixels of a
    whole JPEG may pass unnoticed.

    Raises:
        ValueError: if the file is empty, no image of `IMAGE_FORMATS`, damaged, cut short, or of more than
            `MAX_IMAGE_PIXELS` pixels, which the header alone shows.
    """
    if not data:
        raise ValueError("data must be the bytes of an image file, but it is empty: leave it out or fetch it again")
    if _is_bare_jpeg(data) and (pixels := _decode_with_opencv(data)) is not None:
        return pixels
    image = _open_image(data)
    is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    pixels = _decode_with_opencv(data) if is_plain_jpeg else None
    if pixels is None:
        pixels = _decode_with_pillow(image)
    return _turn_upright(pixels, _read_orientation(image))


def _is_bare_jpeg(data: bytes) -> bool:
    """Whether this is a grey or RGB JPEG of allowed size without EXIF or XMP: there is nothing to ask Pillow about.

    Pillow's reading of the header would cost a seventh of the decoding of a 341 x 256 image. Markers as in ITU-T T.81,
    table B.1.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    position, has_frame = 2, False
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker == 0xDA:  # start of scan
            return has_frame
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended or progressive frame
            height, width, channels = struct.unpack_from(">HHB", data, position + 5)
            if channels not in (1, 3) or not 0 < height * width <= MAX_IMAGE_PIXELS:
                return False
            has_frame = True
        elif marker not in _HARMLESS_JPEG_MARKERS:
            return False
        position += 2 + length
    return False


def _decode_with_opencv(data: bytes) -> np.ndarray | None:
    """None where OpenCV gives up, on files that are cut short among others: Pillow will say why."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _open_image(data: bytes) -> Image.Image:
    """Read the header only."""
    try:
        with _without_warnings():
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}")) from error
    except Exception as error:  # On damaged headers Pillow's readers raise nearly every type there is.
        raise ValueError(
            f"data must be an image ({', '.join(IMAGE_FORMATS)}), got {len(data)} bytes that begin with {data[:12]!r}: "
            "the file is of another kind, or its header is damaged or of size zero; leave it out or fetch it again"
        ) from error
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(_too_large(f"{width} x {height} = {width * height:,}"))
    return image


def _too_large(got: str) -> str:
    return f"data must be an image of at most {MAX_IMAGE_PIXELS:,} pixels, got {got}: shrink it or leave it out"


def _decode_with_pillow(image: Image.Image) -> np.ndarray:
    """Upright or not, as `_read_orientation` will tell afterwards: of a TIFF, Pillow itself turns the pixels."""
    try:
        with _without_warnings():
            return _to_rgb(image)
    except Exception as error:  # As above; there is nothing of ours in that call that a caller could mend.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data must be a whole image, got a damaged or truncated {image.format} of "
            f"{image.width} x {image.height} pixels ({reason}); leave it out or fetch it again"
        ) from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        return np.repeat(_to_grey_8_bit(image)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        # Never a plain convert("RGB"): it shows the colours under the transparent pixels, which are arbitrary.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def read_picture(image: Image.Image) -> np.ndarray:
    """Turn a PIL image into upright RGB as `decode_image` does a file: `(H, W, 3)` uint8, contiguous and writable.

    Raises:
        ValueError: if the file behind it is damaged or cut short.
    """
    pixels = _decode_with_pillow(image)
    return _turn_upright(pixels, _read_orientation(image))


def _to_grey_8_bit(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values, nan=0.0)
        grey = np.clip(values * (255 if values.max() <= 1 else 1), 0, 255).round().astype(np.uint8)
    else:
        grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def _read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8, from EXIF or XMP (of a JPEG in the newer Pillows only)."""
    try:
        with _without_warnings():
            return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # Pillow's reader again; damaged metadata says nothing against the pixels.
        return 1


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (CIPA DC-008, tag 0x0112); another value leaves the pixels as they are."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


@contextmanager
def _without_warnings() -> Iterator[None]:
    # Pillow warns about metadata that nobody here reads. The filters belong to the whole process, and threads that
    # save and restore them in turns would leave them off for good: hence the lock.
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
                f"resize_size must be at least image_size, {self.image_size}, got {self.resize_size}; "
                f"leave it out for {round(self.image_size * 256 / 224)}"
            )

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`(H, W, 3)` -> `(image_size, image_size, 3)`, uint8; it may be a view of the resized image.

        From `rng` come the top row, the left column and, with `flip`, one number for the flip, in this order.
        """
        size = self.image_size
        side = round(size * 256 / 224) if self.resize_size is None else self.resize_size
        top, left = int(rng.integers(side - size + 1)), int(rng.integers(side - size + 1))
        # A side that has its length already is cut before, which gives the same pixels and spares some of the resize.
        height, width = side, side
        if image.shape[0] == side:
            image, top, height = image[top : top + size], 0, size
        if image.shape[1] == side:
            image, left, width = image[:, left : left + size], 0, size
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        crop = resized[top : top + size, left : left + size]
        return cv2.flip(crop, 1) if self.flip and rng.random() < 0.5 else crop


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


def _cut_long_ends(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    excess = max(height, width) - MAX_ASPECT_RATIO * min(height, width)
    if excess <= 0:
        return image
    end = excess // 2  # The same number on both ends: the centre stays where it is.
    return np.ascontiguousarray(image[end : height - end] if height > width else image[:, end : width - end])


def check_image_size(image_size: int) -> None:
    """Refuses a size that no image can have."""
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}; the backbones here use 224")


def normalize(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """`(pixels / 255 - mean) / std`: uint8 `(B, H, W, 3)` -> float32 `(B, 3, H, W)`, on the device of `pixels`.

    One multiply and one add in place, with constants that stay on the device. The result is contiguous: a patch
    embedding takes as long from it as from channels-last, and the arithmetic on whole planes is quicker.

    Raises:
        ValueError: if `pixels` is not uint8 of shape `(B, H, W, 3)`.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ValueError(
            f"pixels must be uint8 of shape (B, H, W, 3), got {pixels.dtype} of shape {tuple(pixels.shape)}; "
            "pass the stacked results of a transform"
        )
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), pixels.device)
    planes = pixels.permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)
    return planes.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)


@lru_cache(maxsize=16)  # Made anew, they would wait for the device at each step.
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    # (x / 255 - mean) / std = x * scale + shift, each of shape (3, 1, 1)
    scale = [1 / (255 * channel_std) for channel_std in std]
    shift = [-channel_mean / channel_std for channel_mean, channel_std in zip(mean, std, strict=True)]
    return torch.tensor(scale, device=device).view(3, 1, 1), torch.tensor(shift, device=device).view(3, 1, 1)
