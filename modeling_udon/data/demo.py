"""The embedded demo: four small domains of real images that come inside well-known packages, no download.

`numbers` (handwritten digits of scikit-learn), `letters` and `symbols` (drawn with the fonts that matplotlib brings),
`places` (patches of scikit-image's and scikit-learn's photographs). Classes are disjoint over train, validation and
test, and so is what they are made of: other pen strokes, other alphabets, other shapes, other photographs. Images are
stored encoded, as any dataset on the Hub, so that training reads them through the usual path.
"""

import io
import math
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageFilter

from modeling_udon.data.glyphs import (
    GLYPH_SIZE,
    CodePoints,
    characters_in,
    draw_glyph,
    find_faces,
    pick_faces,
    require_source,
    without_lookalikes,
)

IMAGE_SIZE = 48
PLACE_SIZE = 64
MIN_PLACE_DETAIL = 12.0
# Radians by which a print may be turned when it is photographed.
NUMBER_ROLL = 0.5
GLYPH_ROLL = 0.8

LATIN: CodePoints = ((0x41, 0x5A), (0x61, 0x7A))
CYRILLIC: CodePoints = ((0x410, 0x44F),)
PHONETIC: CodePoints = ((0x250, 0x2AF),)
GEORGIAN: CodePoints = ((0x10D0, 0x10F0),)
GREEK: CodePoints = ((0x391, 0x3A9), (0x3B1, 0x3C9))
ARMENIAN: CodePoints = ((0x531, 0x556), (0x561, 0x586))
ALPHABETS = LATIN + CYRILLIC + PHONETIC + GEORGIAN + GREEK + ARMENIAN
SYMBOLS: CodePoints = ((0x2190, 0x23FF), (0x25A0, 0x27BF), (0x2900, 0x2BFF))

TRAIN_PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "chelsea",
    "coffee",
    "hubble_deep_field",
    "immunohistochemistry",
    "rocket",
)
VALIDATION_PHOTOGRAPHS = ("camera", "flower.jpg")
TEST_PHOTOGRAPHS = ("china.jpg", "coins", "stereo_motorcycle")

Examples = list[tuple[str, bytes]]
Sight = tuple[PILImage.Image, float, float]  # photograph, x and y of the place's centre in it


def build_numbers(rng: np.random.Generator) -> dict[str, Examples]:
    """Two handwritten digits side by side: the class is the number that they write, "00" to "99".

    Source: `sklearn.datasets.load_digits`, 1797 grey images of 8x8 (the test half of UCI's Optical Recognition of
    Handwritten Digits, CC BY 4.0). 60 / 10 / 30 classes of 50 / 12 / 12 images. A number goes to a split by the
    difference of its digits, so every digit stands equally often in both positions of every split, and the digits of
    a split come from its own block of the source images, which follow the writers.
    """
    digits = require_source("sklearn.datasets").load_digits()
    differences = rng.permutation(10)
    plan = {
        "train": (differences[:6], slice(0, 1000), 50),
        "validation": (differences[6:7], slice(1000, 1300), 12),
        "test": (differences[7:], slice(1300, None), 12),
    }
    splits: dict[str, Examples] = {}
    for split, (split_differences, block, num_images) in plan.items():
        strokes = [digits.images[block][digits.target[block] == digit] for digit in range(10)]
        numbers = sorted((first, (first + int(d)) % 10) for first in range(10) for d in split_differences)
        splits[split] = [
            (f"{a}{b}", _photograph(_write(rng.choice(strokes[a]), rng.choice(strokes[b]), rng), NUMBER_ROLL, rng))
            for a, b in numbers
            for _ in range(num_images)
        ]
    return splits


def build_letters(rng: np.random.Generator) -> dict[str, Examples]:
    """Letters of six alphabets in many fonts: the class is the letter.

    Source: the fonts in matplotlib's wheel: DejaVu (Bitstream Vera licence), STIX (STIX font licence), Computer
    Modern (BaKoMa licence), with the mathematical styles of STIX (script, fraktur, double-struck) as further fonts.
    Train is Latin, Cyrillic and phonetic, validation Georgian, test Greek and Armenian: alphabets never seen. Of
    letters that look alike, also when turned (Latin A, Greek Alpha; p and d), the first stays. 95 / 23 / 49 classes of
    60 / 6 / 6 images.
    """
    letters = [shape for shape in _shapes() if shape in set(characters_in(ALPHABETS))]
    faces = find_faces(letters)
    plan = {"train": (LATIN + CYRILLIC + PHONETIC, 60), "validation": (GEORGIAN, 6), "test": (GREEK + ARMENIAN, 6)}
    return {
        split: [
            (letter, _photograph(draw_glyph(face), GLYPH_ROLL, rng))
            for letter in letters
            if letter in set(characters_in(ranges))
            for face in pick_faces(faces[letter], num_images, rng)
        ]
        for split, (ranges, num_images) in plan.items()
    }


def build_symbols(rng: np.random.Generator) -> dict[str, Examples]:
    """Arrows, operators, technical signs, dingbats: the class is the symbol; long-tailed.

    Source: the same fonts as `letters`. Symbols that look like a letter or like another symbol, also when turned, are
    left out, the rest are shuffled: 200 classes for training, 30 for validation, 90 for the test. The i-th training
    class has max(5, 240 / i^0.75) images, a power law as the counts of characters in texts; validation and test have
    4 images per class, in different fonts.
    """
    letters = set(characters_in(ALPHABETS))
    faces = find_faces([shape for shape in _shapes() if shape not in letters])
    symbols = [symbol for symbol, drawn in faces.items() if len(drawn) >= 4]
    order = [symbols[i] for i in rng.permutation(len(symbols))]
    plan = {
        "train": [(symbol, max(5, round(240 / rank**0.75))) for rank, symbol in enumerate(order[:200], start=1)],
        "validation": [(symbol, 4) for symbol in order[200:230]],
        "test": [(symbol, 4) for symbol in order[230:320]],
    }
    return {
        split: [
            (symbol, _photograph(draw_glyph(face), GLYPH_ROLL, rng))
            for symbol, num_images in counts
            for face in pick_faces(faces[symbol], num_images, rng)
        ]
        for split, counts in plan.items()
    }


def build_places(rng: np.random.Generator) -> dict[str, Examples]:
    """Views of a place in a photograph, as another camera from another stand would take them: the class is the place.

    Source: photographs inside the wheels of scikit-image (public domain or CC0 as its documentation says; the
    stereo pair is of the Middlebury 2014 benchmark) and of scikit-learn (china and flower, CC BY 2.0). A place is a
    square of 64 pixels on a grid, flat ones left out. Each view changes viewpoint, scale, roll, exposure, white
    balance, gamma, focus, noise and JPEG quality; the stereo pair adds a true second viewpoint. The splits have
    photographs of their own. 344 / 53 / 102 classes of 8 / 4 / 4 images.
    """
    plan = {
        "train": (TRAIN_PHOTOGRAPHS, 8),
        "validation": (VALIDATION_PHOTOGRAPHS, 4),
        "test": (TEST_PHOTOGRAPHS, 4),
    }
    return {
        split: [
            (place, _take_view(sights[view % len(sights)], rng))
            for photograph in photographs
            for place, sights in _places(photograph)
            for view in range(num_images)
        ]
        for split, (photographs, num_images) in plan.items()
    }


BUILDERS: dict[str, Callable[[np.random.Generator], dict[str, Examples]]] = {
    "numbers": build_numbers,
    "letters": build_letters,
    "symbols": build_symbols,
    "places": build_places,
}
DEMO_DOMAINS: tuple[str, ...] = tuple(BUILDERS)


def build_demo_domain(name: str, seed: int = 0) -> DatasetDict:
    """Build one domain of the demo.

    Args:
        name: One of `DEMO_DOMAINS`.
        seed: Which draw of the domain; the same seed and library versions give the same bytes.

    Returns:
        Splits "train", "validation" and "test" with disjoint classes; columns `image` (encoded, 48x48 pixels) and
        `label` (the class's name).

    Raises:
        ValueError: If `name` is not a demo domain.
        ImportError: If a package that holds the source images is missing.
    """
    if name not in BUILDERS:
        raise ValueError(f"demo domain must be one of {', '.join(DEMO_DOMAINS)}. Got {name!r}.")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    features = Features({"image": Image(), "label": Value("string")})
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {
                    "image": [{"bytes": encoded, "path": None} for _, encoded in examples],
                    "label": [label for label, _ in examples],
                },
                features=features,
            )
            for split, examples in BUILDERS[name](rng).items()
        }
    )


def _shapes() -> list[str]:
    """Letters, then symbols, no two of which look alike."""
    return without_lookalikes(tuple(characters_in(ALPHABETS + SYMBOLS)))


# Geometry and light, shared by the domains.


def _warp(image: PILImage.Image, corners: np.ndarray, size: int) -> PILImage.Image:
    """Map the quadrilateral `corners` of `image`, (4, 2) clockwise from the upper left, onto a square."""
    targets = [(0.0, 0.0), (size, 0.0), (size, size), (0.0, size)]
    rows, values = [], []
    for (u, v), (x, y) in zip(targets, corners, strict=True):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        values += [x, y]
    coefficients = np.linalg.solve(np.array(rows), np.array(values))
    return image.transform(
        (size, size), PILImage.Transform.PERSPECTIVE, tuple(coefficients), PILImage.Resampling.BILINEAR
    )


def _random_corners(
    centre: tuple[float, float], side: float, roll: float, tilt: float, rng: np.random.Generator
) -> np.ndarray:
    """Corners (4, 2) of a square around `centre`, rolled by up to `roll` radians, each moved by up to `tilt` sides."""
    angle = rng.uniform(-roll, roll)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    square = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    return np.array(centre) + side * ((square + rng.uniform(-tilt, tilt, (4, 2))) @ rotation.T)


def _expose(image: PILImage.Image, strength: float, rng: np.random.Generator) -> PILImage.Image:
    """Focus, exposure, white balance, gamma and sensor noise; `strength` 1 is a careless photographer."""
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2 * strength))), np.float32) / 255
    gain = 2 ** (rng.uniform(-0.7, 0.7) * strength)
    balance = 2 ** (rng.uniform(-0.25, 0.25, pixels.shape[2:]) * strength)
    pixels = np.clip(pixels * gain * balance, 0, 1) ** (2 ** (rng.uniform(-0.4, 0.4) * strength))
    pixels = pixels + rng.normal(0, 0.04 * strength * rng.uniform(), pixels.shape)
    return PILImage.fromarray(np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


def _photograph(ink: PILImage.Image, roll: float, rng: np.random.Generator) -> bytes:
    """Print white-on-black `ink`, a square, in a dark colour on light paper, turned by up to `roll` radians."""
    side = ink.width * rng.uniform(1.1, 1.3)
    centre = tuple(ink.width / 2 + rng.uniform(-0.5, 0.5, 2) * (side - ink.width))
    corners = _random_corners(centre, side, roll=roll, tilt=0.04, rng=rng)
    cover = np.asarray(_warp(ink, corners, 2 * IMAGE_SIZE).reduce(2), np.float32)[..., None] / 255
    dark, light = rng.uniform(0, 110, 3), rng.uniform(150, 255, 3)
    pixels = (light + (dark - light) * cover).astype(np.uint8)
    return _encode(_expose(PILImage.fromarray(pixels), 0.5, rng), "JPEG", quality=90)


def _encode(image: PILImage.Image, format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# Numbers.


def _write(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> PILImage.Image:
    """Write two digits, (8, 8) with values 0 to 16, beside each other in white on black."""
    ink = PILImage.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    half = GLYPH_SIZE // 2
    for digit, x in ((first, 0), (second, half)):
        tile = PILImage.fromarray((np.pad(digit, 1) * 15).astype(np.uint8))
        corners = _random_corners((5, 5), 10, roll=0.15, tilt=0.05, rng=rng)
        ink.paste(_warp(tile, corners, half), (x, half // 2 + int(rng.integers(-4, 5))))
    return ink


# Places.


def _load_photograph(name: str) -> list[np.ndarray]:
    """One photograph, or two of a stereo pair followed by the disparity of the first."""
    if name.endswith(".jpg"):
        return [require_source("sklearn.datasets").load_sample_image(name)]
    loaded = getattr(require_source("skimage.data"), name)()
    return list(loaded) if isinstance(loaded, tuple) else [loaded]


def _places(name: str) -> Iterator[tuple[str, list[Sight]]]:
    """Yield each place of a photograph with one sight of it, or with one in each photograph of a stereo pair."""
    first, *stereo = _load_photograph(name)
    image = PILImage.fromarray(first).convert("RGB")
    grey = image.convert("L")
    detail = np.asarray(grey, np.float32) - np.asarray(grey.filter(ImageFilter.GaussianBlur(8)), np.float32)
    # Half a place of margin: views turn and zoom out, and must not leave the photograph.
    for y in range(PLACE_SIZE, image.height - PLACE_SIZE + 1, PLACE_SIZE):
        for x in range(PLACE_SIZE, image.width - PLACE_SIZE + 1, PLACE_SIZE):
            window = np.s_[y - PLACE_SIZE // 2 : y + PLACE_SIZE // 2, x - PLACE_SIZE // 2 : x + PLACE_SIZE // 2]
            if detail[window].std() < MIN_PLACE_DETAIL:
                continue
            sights: list[Sight] = [(image, x, y)]
            if stereo:
                shift = float(np.nanmedian(np.where(np.isfinite(stereo[1][window]), stereo[1][window], np.nan)))
                sights.append((PILImage.fromarray(stereo[0]), x - shift, y))
            yield f"{name.removesuffix('.jpg')}-{x}-{y}", sights


def _take_view(sight: Sight, rng: np.random.Generator) -> bytes:
    image, x, y = sight
    centre = (x + rng.uniform(-6, 6), y + rng.uniform(-6, 6))
    corners = _random_corners(centre, PLACE_SIZE * rng.uniform(0.75, 1.3), roll=math.pi, tilt=0.1, rng=rng)
    view = _expose(_warp(image, corners, 2 * IMAGE_SIZE).reduce(2), 1.0, rng)
    return _encode(view, "JPEG", quality=int(rng.integers(40, 95)))
