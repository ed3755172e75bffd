"""Small pictures for pages that stand alone."""

import base64
import io

import numpy as np
from PIL import Image

THUMBNAIL_SIZE = 160


def make_thumbnail(image: np.ndarray) -> bytes:
    """A JPEG of at most 160 pixels a side of an image of shape `(height, width, 3)`, uint8."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def data_uri(jpeg: bytes) -> str:
    """A JPEG as the address of an `img`."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
