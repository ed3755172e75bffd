"""Decode image files safely: encoded bytes -> upright RGB pixels, uint8 of shape `(H, W, 3)`.

`decode_image` runs in `DataLoader` workers; give every `DataLoader` that decodes `worker_init_fn=use_one_thread`.
"""

import io
import os
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
from PIL import Image

from modeling_udon.data.levels import assumed_bits, declared_bits, to_8_bit

# Pillow's default limit, 2**30 // 4 // 3, kept here because other libraries move Pillow's own.
MAX_IMAGE_PIXELS = 89_478_485
# JPEG first, since nearly every file is one; AVIF last, since Pillow has it from 11.3 on and stops at a name it does
# not know. Not all that Pillow reads: for EPS, for one, it starts a program.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

_EXIF_ORIENTATION = 0x0112
# TIFF 6.0, and two of the values.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR, _SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SEPARATE, _SIGNED = 0, 2, 2
# Tables, restart interval, comment, application data; not APP1, which holds EXIF and XMP.
_HARMLESS_JPEG_MARKERS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)})
_warnings_lock = threading.Lock()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_one_thread(worker_id: int = 0) -> None:
    """Keep OpenCV to one thread in this process: the `worker_init_fn` of each `DataLoader` that decodes.

    The workers share the cores among themselves already. It is not done on import, since that would also slow
    down whatever else a user's process does with OpenCV.
    """
    cv2.setNumThreads(0)


def decode_image(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decode an image file into upright RGB, `(H, W, 3)` uint8, contiguous and writable.

    Grey and RGB JPEGs go through OpenCV, which gives Pillow's bytes in half of Pillow's time; all other files through
    Pillow. EXIF orientation is applied; transparency is composited on white; of an animation the first frame counts.
    Grey of more than 8 bits and of floats is brought to 8 bits by `to_8_bit`. Colour profiles are not applied. Damage
    within the pixels of a whole JPEG may pass unnoticed.

    Raises:
        ValueError: if the file is empty, no image of `IMAGE_FORMATS`, damaged, cut short, or of more than
            `max_pixels` pixels, which the header alone shows.
    """
    if not data:
        raise ValueError("data must be the bytes of an image file, but it is empty: leave it out or fetch it again")
    if _is_bare_jpeg(data, max_pixels) and (pixels := _decode_with_opencv(data)) is not None:
        return pixels
    image = _open_image(data, max_pixels)
    is_plain_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    pixels = _decode_with_opencv(data) if is_plain_jpeg else None
    if pixels is None:
        pixels = _decode_with_pillow(image, data)
    return _turn_upright(pixels, _read_orientation(image))


def read_picture(image: Image.Image) -> np.ndarray:
    """Turn a PIL image into upright RGB as `decode_image` does a file: `(H, W, 3)` uint8, contiguous and writable.

    Raises:
        ValueError: if the file behind it is damaged or cut short.
    """
    pixels = _decode_with_pillow(image)
    return _turn_upright(pixels, _read_orientation(image))


def _is_bare_jpeg(data: bytes, max_pixels: int) -> bool:
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
            if channels not in (1, 3) or not 0 < height * width <= max_pixels:
                return False
            has_frame = True
        elif marker not in _HARMLESS_JPEG_MARKERS:
            return False
        position += 2 + length
    return False


def _decode_with_opencv(data: bytes) -> np.ndarray | None:
    """None where OpenCV gives up, on files that are cut short among others: Pillow will say why."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def _open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only."""
    try:
        with _without_warnings():
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large(f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,}", max_pixels)) from error
    except Exception as error:  # On damaged headers Pillow's readers raise nearly every type there is.
        raise ValueError(
            f"data must be an image ({', '.join(IMAGE_FORMATS)}). Got {len(data)} bytes that begin with {data[:12]!r}: "
            "the file is of another kind, or its header is damaged or of size zero; leave it out or fetch it again"
        ) from error
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(_too_large(f"{width} x {height} = {width * height:,}", max_pixels))
    return image


def _too_large(got: str, max_pixels: int) -> str:
    return f"data must be an image of at most {max_pixels:,} pixels. Got {got}: shrink it or leave it out"


def _decode_with_pillow(image: Image.Image, data: bytes = b"") -> np.ndarray:
    """Upright or not, as `_read_orientation` will tell afterwards: of a TIFF, Pillow itself turns the pixels."""
    try:
        with _without_warnings():
            return _to_rgb(image, data)
    except Exception as error:  # As above; there is nothing of ours in that call that a caller could mend.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"data must be a whole image. Got a damaged or truncated {image.format} of "
            f"{image.width} x {image.height} pixels ({reason}); leave it out or fetch it again"
        ) from error


def _to_rgb(image: Image.Image, data: bytes) -> np.ndarray:
    _check_tiff(image)
    raw = str(_tile(image)[3])
    if image.format == "BMP" and image.mode in ("RGB", "RGBA"):
        image = _bitmap_with_alpha(image, raw, data)
    else:
        image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        return np.repeat(_to_grey_8_bit(image, declared_bits(image, data))[:, :, None], 3, axis=2)
    if ";16" in raw and image.mode in ("RGB", "RGBA"):
        image = _with_fewer_bits(image, data)
    if image.has_transparency_data:
        # Never a plain convert("RGB"): it shows the colours under the transparent pixels, which are arbitrary.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


def _tile(image: Image.Image) -> Any:
    """How Pillow will read the pixels: codec, extents, offset and arguments, among them the raw mode."""
    tiles: Any = getattr(image, "tile", None)
    return tiles[0] if tiles else ("", None, 0, "")


def _bitmap_with_alpha(image: Image.Image, raw: str, data: bytes) -> Image.Image:
    """A BMP whose fourth byte is alpha if any is set: so Pillow itself writes it, though the format calls it unused."""
    if "BGRX" in raw:
        _, _, offset, (_, _, direction) = _tile(image)
        pixels = np.frombuffer(data, np.uint8, 4 * image.width * image.height, offset)
        pixels = pixels.reshape(image.height, image.width, 4)[::direction, :, [2, 1, 0, 3]]
        image = Image.fromarray(np.ascontiguousarray(pixels))
    image.load()
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[1] == 0:
        return image.convert("RGB")
    return image


def _with_fewer_bits(image: Image.Image, data: bytes) -> Image.Image:
    """The image with its colours by `to_8_bit` where a 16-bit file does not use all bits: Pillow's are nearly black."""
    bits = declared_bits(image, data)
    values = None if bits in (None, 16) and _uses_high_bits(image) else _wide_colours(image, data)
    if values is None:
        return image
    colours = Image.fromarray(to_8_bit(values, bits=bits))
    if image.mode == "RGBA":
        colours.putalpha(image.getchannel("A"))
    return colours


def _uses_high_bits(image: Image.Image) -> bool:
    """Whether Pillow's 8-bit colours of a 16-bit file say already that it is read as 16 bits."""
    return assumed_bits(int(np.asarray(image)[:, :, :3].max()) << 8) == 16


def _wide_colours(image: Image.Image, data: bytes) -> np.ndarray | None:
    """The colours of a 16-bit file with all their bits, RGB; `None` where OpenCV reads it otherwise."""
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.ndim != 3 or values.shape[:2] != (image.height, image.width):
        return None
    return np.ascontiguousarray(values[:, :, 2::-1])


def undeclared_largest(data: bytes) -> int | None:
    """The largest value of a file of 16-bit integers that does not say how many of its bits count; else `None`.

    Raises:
        ValueError: As `decode_image`.
    """
    if not data or _is_bare_jpeg(data, MAX_IMAGE_PIXELS):
        return None
    image = _open_image(data, MAX_IMAGE_PIXELS)
    is_grey = image.mode.startswith("I;16")
    if declared_bits(image, data) is not None or not (is_grey or ";16" in str(_tile(image)[3])):
        return None
    with _without_warnings():
        values = np.asarray(image) if is_grey else _wide_colours(image, data)
    return None if values is None else int(values.max())


def _to_grey_8_bit(image: Image.Image, bits: int | None) -> np.ndarray:
    values = np.asarray(image)
    transparent = image.info.get("transparency")
    grey = to_8_bit(values, _tiff_tag(image, _SAMPLE_FORMAT) == _SIGNED, bits)
    if _tiff_tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts those of 8 bits only.
        grey = 255 - grey
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def encode_array(values: np.ndarray) -> bytes:
    """Encodes pixels from a column of arrays as PNG, without loss but for what `to_8_bit` drops.

    Args:
        values: Of shape `(H, W)`, `(H, W, 1 | 3 | 4)` or `(1 | 3 | 4, H, W)`.

    Raises:
        ValueError: If they have another shape, or values of no known range.
    """
    if values.ndim == 3 and values.shape[-1] not in (1, 3, 4) and values.shape[0] in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[:, :, 0]
    if values.dtype.kind not in "biuf" or not (values.ndim == 2 or (values.ndim == 3 and values.shape[-1] in (3, 4))):
        raise ValueError(
            f"data must be numbers of shape (H, W), (H, W, 3) or (3, H, W). Got {values.dtype} of shape {values.shape}"
        )
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(to_8_bit(values))).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    """The value of a TIFF's tag, of several equal ones the first; `None` where there is none."""
    value = getattr(image, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def _check_tiff(image: Image.Image) -> None:
    """Refuses TIFFs that Pillow would read as other values than they hold."""
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))
    if _tiff_tag(image, _PLANAR) == _SEPARATE and len(bits) > 1 and max(bits) > 8:
        raise ValueError(f"planes of {max(bits)} bits are not read; save it with interleaved channels or 8 bits")
    if _tiff_tag(image, _SAMPLE_FORMAT) == _SIGNED and max(bits) <= 8:
        raise ValueError("signed 8-bit values are not read; save it with values of 0 to 255")


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
