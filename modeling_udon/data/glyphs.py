"""Characters as the fonts inside matplotlib's wheel draw them, for the demo's letters and symbols."""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFilter, ImageFont

from modeling_udon.faults import require

GLYPH_SIZE = 64

_FONT_SIZE = 56
_LOOKALIKE_CORRELATION = 0.88
_LOOKALIKE_TURN = 15  # degrees
_MATH_LETTERS = range(0x1D400, 0x1D800)

# Two glyphs are alike if they are alike in one of these, so that a serif or a slant cannot hide a twin.
_REFERENCE_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSansMono",
    "DejaVuSerif",
    "DejaVuSerif-Italic",
    "STIXGeneral",
)

CodePoints = tuple[tuple[int, int], ...]  # inclusive ranges
Face = tuple[str, str]  # font name, character to draw with it


def require_source(module: str) -> Any:
    """Imports a module that holds source images.

    Raises:
        ImportError: If its package is missing; the message names the extra that brings it.
    """
    return require(module, "demo-data", "the demo domains need")


def characters_in(ranges: CodePoints) -> list[str]:
    """Assigned characters of these ranges that stand for themselves."""
    return [
        chr(code)
        for first, last in ranges
        for code in range(first, last + 1)
        if unicodedata.category(chr(code)) not in ("Cn", "Mn")
    ]


def find_faces(characters: Sequence[str]) -> dict[str, list[Face]]:
    """For each character, all faces that show it, mathematical styles included."""
    wanted: dict[str, list[Face]] = {character: [] for character in characters}
    for path in sorted(_font_path("*").parent.glob("*.ttf")):
        if path.stem.startswith(("LastResort", "STIXNonUni", "cmex", "cmsy")):
            continue
        for drawn in sorted(_charmap(path.stem)):
            base = unicodedata.normalize("NFKC", drawn) if ord(drawn) in _MATH_LETTERS else drawn
            # Computer Modern keeps TeX's own order: only its ASCII letters stand at their code points.
            if base in wanted and (not path.stem.startswith("cm") or drawn.isascii()):
                wanted[base].append((path.stem, drawn))
    return wanted


def pick_faces(faces: Sequence[Face], num_images: int, rng: np.random.Generator) -> Iterator[Face]:
    """Draws `num_images` faces, no face again before all have been drawn."""
    for start in range(0, num_images, len(faces)):
        for index in rng.permutation(len(faces))[: num_images - start]:
            yield faces[index]


def draw_glyph(face: Face) -> PILImage.Image:
    """The glyph in white on black, its ink centred and its longer side filling the square of `GLYPH_SIZE`."""
    font, character = face
    typeface = _typeface(font)
    left, top, right, bottom = typeface.getbbox(character)
    canvas = PILImage.new("L", (max(1, int(right - left)), max(1, int(bottom - top))))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=typeface)
    ink = canvas.crop(canvas.getbbox() or (0, 0, 1, 1))
    scale = GLYPH_SIZE / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))))
    square = PILImage.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    square.paste(ink, ((GLYPH_SIZE - ink.width) // 2, (GLYPH_SIZE - ink.height) // 2))
    return square


@functools.cache
def without_lookalikes(characters: tuple[str, ...]) -> list[str]:
    """Keeps a character only if no earlier one that is kept looks like it, however the two are turned."""
    alike = np.zeros((len(characters), len(characters)), bool)
    for font in _REFERENCE_FONTS:
        charmap = _charmap(font)
        drawn = [row for row, character in enumerate(characters) if character in charmap]
        # Blurred, because two thin outlines need not overlap to be the same shape.
        glyphs = [
            draw_glyph((font, characters[row])).filter(ImageFilter.GaussianBlur(3)).resize((24, 24)) for row in drawn
        ]
        upright = _unit_pixels(glyphs)
        for angle in range(0, 360, _LOOKALIKE_TURN):
            turned = _unit_pixels([glyph.rotate(angle, PILImage.Resampling.BILINEAR) for glyph in glyphs])
            alike[np.ix_(drawn, drawn)] |= upright @ turned.T > _LOOKALIKE_CORRELATION
    kept: list[int] = []
    for row in range(len(characters)):
        if not alike[row, kept].any():
            kept.append(row)
    return [characters[row] for row in kept]


def _font_path(font: str) -> Path:
    return Path(require_source("matplotlib").get_data_path(), "fonts", "ttf", f"{font}.ttf")


def _charmap(font: str) -> set[str]:
    return {chr(code) for code in require_source("matplotlib.ft2font").FT2Font(str(_font_path(font))).get_charmap()}


@functools.cache
def _typeface(font: str) -> ImageFont.FreeTypeFont:
    # The basic layout is in every build of Pillow, so that all draw the same.
    return ImageFont.truetype(_font_path(font), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _unit_pixels(shapes: Sequence[PILImage.Image]) -> np.ndarray:
    pixels = np.array([np.asarray(shape, np.float32).ravel() for shape in shapes])
    pixels -= pixels.mean(axis=1, keepdims=True)
    return pixels / (np.linalg.norm(pixels, axis=1, keepdims=True) + 1e-6)
