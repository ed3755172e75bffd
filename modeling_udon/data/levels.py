"""Levels of pixels: values of any type and range as 0 to 255, and how many bits a file says that its values have."""

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

# How far above white values may lie; a floating-point image of 0 to 255 that is darker than this cannot be told.
_OVERSHOOT, _LEAST_FLOAT_LEVEL = 1.5, 8
_LARGEST_12_BIT = 4095
# TIFF 6.0.
_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE = 258, 281
_PNG = b"\x89PNG\r\n\x1a\n"


def declared_bits(image: Any, data: bytes) -> int | None:
    """How many bits of its wider type the values of a file have, as the file says: `None` where it says nothing.

    A PNG says it by `sBIT`, where all channels have as many. A TIFF by its bits per sample, where these are neither 8,
    16 nor 32; or by the largest value that its samples may have, which many writers fill with the largest that they do
    have: so only a value that all bits of a number give counts.

    Args:
        image: The file as Pillow has opened it.
        data: Its bytes.
    """
    tags = getattr(image, "tag_v2", {})
    if bits := _number(tags.get(_BITS_PER_SAMPLE)):
        if bits not in (8, 16, 32):
            return bits
        most = _number(tags.get(_MAX_SAMPLE_VALUE)) or 0
        return most.bit_length() if 8 < most.bit_length() < bits and most & (most + 1) == 0 else None
    for kind, content in _png_chunks(data):
        if kind == b"sBIT":
            colours = set(content[:-1] if len(content) in (2, 4) else content)
            return colours.pop() if len(colours) == 1 else None
    return None


def assumed_bits(largest: int) -> int:
    """How many bits integers are taken to have that say nothing of it, by the largest of an image: 8, 12 or 16.

    Cameras and scanners store 12 bits in 16. As 16 bits, 8-bit integers in a wider type would all be black.
    """
    return 8 if largest <= 255 else 12 if largest <= _LARGEST_12_BIT else 16


def to_8_bit(values: np.ndarray, signed: bool = False, bits: int | None = None) -> np.ndarray:
    """Grey or colour values of any type as 0 to 255, uint8, of the same shape.

    Of integers, the higher 8 of their bits count, which are as many as the file says or `assumed_bits` takes them to
    have; floats are fractions of white, of 8 bits, or of 16. What lies a little outside is clipped, since resampling
    overshoots.

    Args:
        values: Values of one image.
        signed: Whether integers come from a signed type, whose largest value is half of the unsigned one's.
        bits: See `declared_bits`.

    Raises:
        ValueError: If values lie outside of these ranges, as heights, depths and normalised images do.
    """
    if values.dtype == np.uint8 or values.size == 0:
        return values.astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    is_float = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if is_float else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if is_float:
        white = 1 if high <= _OVERSHOOT else 255 if high <= 255 * _OVERSHOOT else 65535
    elif bits is not None and 8 < bits <= 16 and high < 1 << bits:
        white = (1 << bits) - 1
    else:
        white = (1 << assumed_bits(int(high))) - 1
        white = 32767 if white == 65535 and signed and high <= 32767 else white
    if low < -white / 8 or high > white * _OVERSHOOT or (white == 255 and is_float and high < _LEAST_FLOAT_LEVEL):
        raise ValueError(
            f"data must hold values of 0 to 1, 0 to 255 or 0 to 65535. Got {low:g} to {high:g}; scale them before"
        )
    if is_float:
        return np.clip(np.nan_to_num(values, nan=0.0) * (255 / white), 0, 255).round().astype(np.uint8)
    clipped = np.clip(values, 0, white)
    return (clipped >> (white.bit_length() - 8)).astype(np.uint8)


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the chunks of a PNG before its pixels (PNG, 5.3); none of another file."""
    position = len(_PNG)
    while data.startswith(_PNG) and position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"IDAT":
            return
        yield kind, data[position + 8 : position + 8 + length]
        position += 12 + length


def _number(value: Any) -> int | None:
    """The value of a TIFF's tag, of several the largest."""
    value = max(value, default=None) if isinstance(value, tuple) else value
    return value if isinstance(value, int) else None
