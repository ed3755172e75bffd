"""Drawing for the glyph benchmark: characters, strings and icons as grey squares, and a search for look-alikes."""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

SIZE = 48
_MARGIN = 3
_FONT_SIZE = 72
# Side of the thumbnails in which look-alikes are searched.
_THUMBNAIL = 20


def draw_text(path: str, index: int, text: str) -> np.ndarray | None:
    """Draws a text black on white, scaled to fill a square.

    Returns:
        Shape `(SIZE, SIZE)`, uint8; `None` where the face draws nothing.
    """
    try:
        font = _open_font(path, index)
        left, top, right, bottom = font.getbbox(text)
        if right <= left or bottom <= top or right - left > 4000 or bottom - top > 4000:
            return None
        image = PILImage.new("L", (int(right - left) + 8, int(bottom - top) + 8), 255)
        ImageDraw.Draw(image).text((4 - left, 4 - top), text, fill=0, font=font)
    except (OSError, ValueError):  # FreeType refuses some glyphs of old fonts.
        return None
    return fit(np.asarray(image))


def draw_icon(body: str, width: float, height: float) -> np.ndarray | None:
    """Draws an icon black on white, scaled to fill a square; `None` where it shows nothing."""
    from resvg_py import svg_to_bytes  # Needed for the icons alone.

    body = body.replace("currentColor", "#000")
    side = 2 * SIZE
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    svg = f'{head}viewBox="0 0 {width:g} {height:g}" width="{side}" height="{side}" color="#000">{body}</svg>'
    try:
        png = svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    except ValueError:
        return None
    return fit(cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_GRAYSCALE))


def fit(image: np.ndarray) -> np.ndarray | None:
    """Cuts out what is drawn and scales it to fill a square, its shape kept; `None` for an empty image."""
    rows, columns = (np.flatnonzero((image < 128).any(axis=axis)) for axis in (1, 0))
    if len(rows) < 2 or len(columns) < 2:
        return None
    cut = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = (SIZE - 2 * _MARGIN) / max(cut.shape)
    height, width = (max(1, round(side * scale)) for side in cut.shape)
    cut = cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    square = np.full((SIZE, SIZE), 255, np.uint8)
    top, left = (SIZE - height) // 2, (SIZE - width) // 2
    square[top : top + height, left : left + width] = cut
    return square


def without_lookalikes(pictures: Sequence[np.ndarray], limit: float) -> list[int]:
    """Positions of the pictures that correlate with none of those kept before them by more than a limit.

    Args:
        pictures: Pictures of one shape, each of the same thing drawn for another class.
        limit: Correlation, -1 to 1.
    """
    size = (_THUMBNAIL * pictures[0].shape[1] // pictures[0].shape[0], _THUMBNAIL)
    rows = np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA).ravel() for one in pictures]).astype(
        np.float32
    )
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-6)
    alike = rows @ rows.T > limit
    kept: list[int] = []
    for position in range(len(rows)):
        if not alike[position, kept].any():
            kept.append(position)
    return kept


@lru_cache(maxsize=64)
def _open_font(path: str, index: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, _FONT_SIZE, index=index, layout_engine=ImageFont.Layout.BASIC)
