"""Small pictures for pages that stand alone."""

import base64
import hashlib
import io
from contextlib import suppress

import numpy as np
from PIL import Image

from modeling_udon.data.files import read_file
from modeling_udon.data.images import decode_image

THUMBNAIL_SIZE = 160


def make_thumbnail(image: np.ndarray, size: int = THUMBNAIL_SIZE) -> bytes:
    """A JPEG of at most `size` pixels in width and height of an image of shape `(height, width, 3)`, uint8."""
    small = Image.fromarray(image)
    small.thumbnail((size, size))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def find_thumbnail(
    kept: bytes | None, file: str | None, sha256: str | None = None, size: int = THUMBNAIL_SIZE
) -> bytes | None:
    """The thumbnail that was kept, else one of the file, else `None`: the file may have moved, or be another by now.

    Args:
        kept: A JPEG, if one was kept.
        file: Where the image lies, if that is known.
        sha256: Digest of its bytes when it was embedded; a file with another one is not shown.
        size: Largest side of one that is made of the file, in pixels.
    """
    if kept is not None or file is None:
        return kept
    with suppress(OSError, ValueError):
        data = read_file(file)
        if sha256 is None or hashlib.sha256(data).hexdigest() == sha256:
            return make_thumbnail(decode_image(data), size)
    return None


def data_uri(jpeg: bytes) -> str:
    """A JPEG as the address of an `img`."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
