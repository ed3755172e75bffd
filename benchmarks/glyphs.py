"""A benchmark with many classes and conflicting cues, drawn from free fonts and icons.

    python benchmarks/glyphs.py --cache DOWNLOADS --out FOLDER [--seed 0]

Five domains, of which pairs conflict: what is identity in one is nuisance in the other.

| domain | class | images of a class |
|---|---|---|
| letters | character | typefaces |
| fonts | typeface | random strings |
| hanzi | Chinese character | typefaces |
| icons | name of an icon | icon sets |
| iconsets | icon set and style | random icons, of names that `icons` does not have |

Downloads 212 Debian font packages and 119 icon sets from npm once (700 MB, nothing is installed), and writes
`FOLDER/DOMAIN/{train,val,test}-00000.parquet` with the columns `image`, `class_name` and `source`, each split with
classes of its own, and `counts.json` and `licences.json` beside them. Equal seeds and versions give equal files.
"""

import argparse
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from datasets import Dataset, Features, Image, Value
from glyph_drawing import draw_icon, draw_text, without_lookalikes
from glyph_sources import IconSet, Typeface, download, read_icon_sets, read_licences, read_typefaces
from PIL import Image as PILImage

SPLITS = ("train", "val", "test")
_SCRIPTS = ((0x30, 0x39), (0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x587))
_SCRIPTS += ((0x5D0, 0x5EA), (0x621, 0x64A), (0x904, 0x939), (0xE01, 0xE2E), (0x10D0, 0x10F0), (0x1E00, 0x1FFF))
_SCRIPTS += ((0x3041, 0x3096), (0x30A1, 0x30FA))
_HANGUL, _NUM_HANGUL = (0xAC00, 0xD7A3), 600
_HANZI = (0x4E00, 0x9FFF)
_ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Words at the end of an icon's name that say its style.
_STYLES = ("outline", "outlined", "line", "linear", "filled", "fill", "solid", "bold", "duotone", "twotone", "two-tone")
_STYLES += ("light", "thin", "regular", "rounded", "round", "sharp", "broken", "20", "24", "16", "32", "alt")
# Above these correlations two classes look alike.
_LETTER_LIMIT, _FONT_LIMIT = 0.9, 0.97


@dataclass(frozen=True)
class Plan:
    """How many classes and images a domain has at most.

    Attributes:
        classes: Classes of the train, val and test split; scaled down where there are fewer.
        images: Images of a class in val and test, and the mean of those in train.
        tail: Whether classes of the train split have from one to many images; else all have equally many.
        least: Images that a class needs to be taken.
    """

    classes: tuple[int, int, int] = (820, 100, 400)
    images: int = 5
    tail: bool = False
    least: int = 6


PLANS = {
    "letters": Plan(tail=True),
    "fonts": Plan(),
    "hanzi": Plan(),
    "icons": Plan(tail=True),
    "iconsets": Plan(classes=(110, 20, 66), images=20, least=24),
}


@dataclass(frozen=True)
class Picture:
    """What an image is to show: how to draw it, and where it is from."""

    draw: Callable[[], np.ndarray | None]
    source: str


Classes = dict[str, list[Picture]]
"""Pictures of each class, in the order in which they are taken."""


def make_letters(faces: Sequence[Typeface], rng: np.random.Generator, plan: Plan) -> Classes:
    """Characters of many scripts, without those that look like another."""
    hangul = rng.choice(np.arange(_HANGUL[0], _HANGUL[1] + 1), _NUM_HANGUL, replace=False).tolist()
    codes = [code for first, last in _SCRIPTS for code in range(first, last + 1)] + sorted(hangul)
    codes = [code for code in codes if unicodedata.category(chr(code)) in ("Lu", "Ll", "Lo", "Nd")]
    return _distinct_characters(faces, codes, rng, plan)


def make_hanzi(faces: Sequence[Typeface], rng: np.random.Generator, plan: Plan) -> Classes:
    """Chinese characters that simplified, traditional and Japanese writing have in common."""
    codes = [code for code in range(_HANZI[0], _HANZI[1] + 1) if all(_encodable(code, n) for n in _CHARACTER_SETS)]
    codes = sorted(rng.permutation(codes)[: 2 * sum(plan.classes)].tolist())
    return _distinct_characters(faces, codes, rng, plan)


def make_fonts(faces: Sequence[Typeface], rng: np.random.Generator, plan: Plan) -> Classes:
    """Typefaces by random strings of three to five letters, without those that look like another."""
    latin = [face for face in faces if face.characters.issuperset(map(ord, _ALPHABET))]
    samples = [(face, draw_text(face.path, face.index, "Rag5ek")) for face in latin]
    wide = [(face, picture) for face, picture in samples if picture is not None]
    kept = without_lookalikes([picture for _, picture in wide], _FONT_LIMIT) if wide else []
    classes: Classes = {}
    for face, _ in (wide[position] for position in kept):
        texts = ["".join(rng.choice(list(_ALPHABET), rng.integers(3, 6))) for _ in range(max(plan.images, plan.least))]
        classes[face.family] = [_text(face, text) for text in dict.fromkeys(texts)]
    return classes


def make_icons(sets: Sequence[IconSet], rng: np.random.Generator, plan: Plan) -> Classes:
    """Names of icons that at least so many sets have; one icon of each set."""
    classes: Classes = {}
    by_name = [(one, _icons_by_name(one)) for one in sets]
    for name in _shared_names(sets, plan):
        having = [(one, icons[name]) for one, icons in by_name if name in icons]
        order = rng.permutation(len(having))
        classes[name] = [_icon(*having[position]) for position in order]
    return classes


def make_iconsets(sets: Sequence[IconSet], rng: np.random.Generator, plan: Plan, shared: set[str]) -> Classes:
    """Icon sets, those of several styles a class each, by icons of names that are not shared."""
    found: dict[str, list[Picture]] = {}
    for one in sets:
        names = [name for name in one.icons if _plain_name(name)[0] not in shared]
        for name in rng.permutation(names).tolist():
            label = "-".join(filter(None, (one.name, _plain_name(name)[1])))
            found.setdefault(label, []).append(_icon(one, name))
    return {label: pictures for label, pictures in found.items() if len(pictures) >= plan.least}


def split_classes(classes: Classes, rng: np.random.Generator, plan: Plan) -> dict[str, Classes]:
    """Shares the classes out over the splits, none in two, and cuts each to its number of images."""
    usable = sorted(name for name, pictures in classes.items() if len(pictures) >= plan.least)
    share = min(1.0, len(usable) / sum(plan.classes))
    order = [usable[position] for position in rng.permutation(len(usable))]
    splits: dict[str, Classes] = {}
    for split, number in zip(SPLITS, plan.classes, strict=True):
        chosen, order = order[: max(2, int(number * share))], order[max(2, int(number * share)) :]
        sizes = [plan.images] * len(chosen)
        if split == "train" and plan.tail:
            sizes = _tail(len(chosen), plan.images)
            # The longest tails go to the classes that have as many images.
            chosen.sort(key=lambda name: -len(classes[name]))
        splits[split] = {name: classes[name][:size] for name, size in zip(chosen, sizes, strict=True)}
    return splits


def write_domain(folder: Path, splits: Mapping[str, Classes], rng: np.random.Generator) -> dict[str, Any]:
    """Draws and writes the images of a domain; what cannot be drawn is left out, and counted.

    Returns:
        Number of classes and images of each split, and the images of a class, least, median and most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: dict[str, Any] = {}
    seen: set[bytes] = set()
    for split, classes in splits.items():
        rows: list[tuple[bytes, str, str]] = []
        for name, pictures in sorted(classes.items()):
            drawn = []
            for picture in pictures:
                png = _png(picture.draw())
                if png is not None and png not in seen:
                    seen.add(png)
                    drawn.append((png, name, picture.source))
            # In an evaluation split, a class of one image has nothing to be found by.
            rows += drawn if split == "train" or len(drawn) > 1 else []
        if split == "train":
            rows = [rows[position] for position in rng.permutation(len(rows))]
        features = Features({"image": Image(), "class_name": Value("string"), "source": Value("string")})
        images, names, sources = zip(*rows, strict=True)
        columns = {"image": [{"bytes": png, "path": None} for png in images], "class_name": names, "source": sources}
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-00000.parquet")
        sizes = sorted(Counter(names).values())
        middle = sizes[len(sizes) // 2]
        counts[split] = {"classes": len(sizes), "images": len(rows), "images_per_class": [sizes[0], middle, sizes[-1]]}
    return counts


def build(
    out: Path, faces: Sequence[Typeface], sets: Sequence[IconSet], plans: Mapping[str, Plan], seed: int = 0
) -> dict[str, Any]:
    """Builds the domains that are planned; each has random numbers of its own.

    Returns:
        Counts by domain and split.
    """
    shared = set(_shared_names(sets, plans.get("icons", PLANS["icons"])))
    makers: dict[str, Callable[[np.random.Generator, Plan], Classes]] = {
        "letters": lambda rng, plan: make_letters(faces, rng, plan),
        "fonts": lambda rng, plan: make_fonts(faces, rng, plan),
        "hanzi": lambda rng, plan: make_hanzi(faces, rng, plan),
        "icons": lambda rng, plan: make_icons(sets, rng, plan),
        "iconsets": lambda rng, plan: make_iconsets(sets, rng, plan, shared),
    }

    def build_one(name: str) -> dict[str, Any]:
        rng = np.random.default_rng((seed, crc32(name.encode())))
        classes = makers[name](rng, plans[name])
        return write_domain(out / name, split_classes(classes, rng, plans[name]), rng)

    # Drawing leaves Python's lock most of the time.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(plans, pool.map(build_one, plans), strict=True))


def main(words: Sequence[str] | None = None) -> None:
    """Parses the command line, downloads what is missing, draws, and writes counts and licences."""
    parser = argparse.ArgumentParser(description="Builds a benchmark with conflicting cues from fonts and icons.")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the downloads, 2.3 GB once unpacked")
    parser.add_argument("--out", type=Path, required=True, help="folder of the benchmark")
    parser.add_argument("--domains", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    download(arguments.cache)
    folders = sorted((arguments.cache / "fonts").iterdir())
    faces = read_typefaces(folders, arguments.cache / "typefaces.json")
    sets = read_icon_sets(arguments.cache / "npm")
    counts = build(arguments.out, faces, sets, {name: PLANS[name] for name in arguments.domains}, arguments.seed)
    about = {"seed": arguments.seed, "typefaces": len(faces), "icon_sets": len(sets), "domains": counts}
    (arguments.out / "counts.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    licences = json.dumps(read_licences(arguments.cache), indent=1)
    (arguments.out / "licences.json").write_text(licences + "\n", encoding="utf-8")
    print(json.dumps(about, indent=1))  # noqa: T201


_CHARACTER_SETS = ("gb2312", "big5", "shift_jis")


def _distinct_characters(
    faces: Sequence[Typeface], codes: Sequence[int], rng: np.random.Generator, plan: Plan
) -> Classes:
    """Characters that enough typefaces draw, without those that look like one before them."""
    known = set(codes)
    drawing: dict[int, list[Typeface]] = {}
    for face in faces:
        for code in known & face.characters:
            drawing.setdefault(code, []).append(face)
    candidates = [code for code in codes if len(drawing.get(code, ())) >= plan.least]
    # Each character as the typeface draws it that has most of them, so that twins are drawn by the same hand.
    first = {
        code: max(drawing[code], key=lambda face: (len(face.characters & known), face.family)) for code in candidates
    }
    pictures = {code: draw_text(first[code].path, first[code].index, chr(code)) for code in candidates}
    drawn = [(code, picture) for code, picture in pictures.items() if picture is not None]
    kept = without_lookalikes([picture for _, picture in drawn], _LETTER_LIMIT) if drawn else []
    classes: Classes = {}
    for code, _ in (drawn[position] for position in kept):
        order = rng.permutation(len(drawing[code]))
        classes[chr(code)] = [_text(drawing[code][position], chr(code)) for position in order]
    return classes


def _text(face: Typeface, text: str) -> Picture:
    return Picture(lambda: draw_text(face.path, face.index, text), f"{face.package}: {face.family}")


def _icon(one: IconSet, name: str) -> Picture:
    return Picture(lambda: draw_icon(*one.icons[name]), f"{one.name}:{name}")


def _plain_name(name: str) -> tuple[str, str]:
    """An icon's name without the words for its style, and these."""
    words, styles = name.split("-"), []
    while len(words) > 1 and words[-1] in _STYLES:
        styles.append(words.pop())
    return "-".join(words), "-".join(reversed(styles))


def _icons_by_name(one: IconSet) -> dict[str, str]:
    """An icon of a set for each name without its style: the first."""
    found: dict[str, str] = {}
    for name in one.icons:
        found.setdefault(_plain_name(name)[0], name)
    return found


def _shared_names(sets: Sequence[IconSet], plan: Plan) -> list[str]:
    counted = Counter(name for one in sets for name in _icons_by_name(one))
    return sorted(name for name, count in counted.items() if count >= plan.least)


def _encodable(code: int, character_set: str) -> bool:
    try:
        return bool(chr(code).encode(character_set))
    except UnicodeEncodeError:
        return False


def _tail(num_classes: int, mean: int) -> list[int]:
    """Images of each class, descending: few have many, most have one to five, of about the mean that is asked for."""
    ranks = np.arange(1, num_classes + 1) ** -0.5
    return np.clip(np.round(ranks * mean * num_classes / ranks.sum()), 1, 40).astype(int).tolist()


def _png(picture: np.ndarray | None) -> bytes | None:
    if picture is None:
        return None
    buffer = io.BytesIO()
    PILImage.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
