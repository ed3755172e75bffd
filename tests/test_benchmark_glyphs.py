"""The glyph benchmark from a handful of installed fonts and two hand-made icon sets."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parent.parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def glyphs() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield __import__("glyphs")
    for name in ("glyphs", "glyph_sources", "glyph_drawing"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def built(glyphs: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same plan built twice with one seed and once with another."""
    faces = glyphs.read_typefaces([FONTS])
    plans = {
        "letters": glyphs.Plan(classes=(12, 4, 6), images=3, tail=True, least=4),
        "fonts": glyphs.Plan(classes=(3, 2, 2), images=3, least=3),
    }
    folders = []
    for number, seed in enumerate((0, 0, 1)):
        folders.append(tmp_path_factory.mktemp(f"glyphs-{number}"))
        glyphs.build(folders[-1], faces, [], plans, seed)
    return folders


def read(folder: Path, domain: str, split: str) -> dict[str, list[object]]:
    return pq.read_table(folder / domain / f"{split}-00000.parquet").to_pydict()


def test_equal_seeds_give_equal_files_and_others_do_not(built: list[Path]) -> None:
    for domain in ("letters", "fonts"):
        for split in ("train", "val", "test"):
            one, same, other = (read(folder, domain, split) for folder in built)
            assert one == same and one != other


def test_no_class_is_in_two_splits_and_no_picture_twice(built: list[Path]) -> None:
    for domain in ("letters", "fonts"):
        tables = [read(built[0], domain, split) for split in ("train", "val", "test")]
        classes = [set(table["class_name"]) for table in tables]
        assert all(classes) and sum(map(len, classes)) == len(set.union(*classes))
        pictures = [image["bytes"] for table in tables for image in table["image"]]  # type: ignore[index]
        assert len(pictures) == len(set(pictures))
        # What is searched in val and test can be found: no class has one image.
        for table in tables[1:]:
            assert min(np.unique(table["class_name"], return_counts=True)[1]) > 1


def test_characters_that_look_alike_are_one_class(glyphs: ModuleType) -> None:
    faces = glyphs.read_typefaces([FONTS])
    twins = [ord(character) for character in "AΑАBΒВQW"]  # Latin, Greek and Cyrillic
    plan = glyphs.Plan(least=2)
    found = glyphs._distinct_characters(faces, twins, np.random.default_rng(0), plan)
    assert sorted(found) == ["A", "B", "Q", "W"]


def test_a_domains_train_split_has_a_long_tail_where_it_is_planned(glyphs: ModuleType) -> None:
    pictures = {f"class {number}": [glyphs.Picture(lambda: None, "")] * 60 for number in range(200)}
    plan = glyphs.Plan(classes=(150, 10, 40), images=5, tail=True)
    train = glyphs.split_classes(pictures, np.random.default_rng(0), plan)["train"]
    sizes = sorted(map(len, train.values()))
    assert sizes[0] <= 3 and sizes[-1] >= 30 and 4 <= np.mean(sizes) <= 6


def test_icons_are_the_sets_drawings_of_a_name_and_iconsets_have_other_names(glyphs: ModuleType) -> None:
    box = '<path fill="currentColor" d="M{0} 4h10v{0}h-10z"/>'
    sets = [
        glyphs.IconSet(f"set{number}", "MIT", {name: (box.format(number + 2), 24.0, 24.0) for name in names})
        for number, names in enumerate((("home", "star-outline", "own"), ("home-filled", "star", "rare-bold")))
    ]
    plan, rng = glyphs.Plan(least=2), np.random.default_rng(0)
    icons = glyphs.make_icons(sets, rng, plan)
    assert {name: sorted(one.source for one in found) for name, found in icons.items()} == {
        "home": ["set0:home", "set1:home-filled"],
        "star": ["set0:star-outline", "set1:star"],
    }
    rest = glyphs.make_iconsets(sets, rng, glyphs.Plan(least=1), set(icons))
    assert {name: [one.source for one in found] for name, found in rest.items()} == {
        "set0": ["set0:own"],
        "set1-bold": ["set1:rare-bold"],
    }


def test_a_drawing_fills_its_square_in_black_on_white(glyphs: ModuleType) -> None:
    picture = sys.modules["glyph_drawing"].draw_text(str(FONTS / "DejaVuSans.ttf"), 0, "H")
    assert picture.shape == (48, 48) and picture.min() < 30 and (picture[:3] > 225).all()
    rows = np.flatnonzero((picture < 128).any(axis=1))
    assert rows[-1] - rows[0] >= 40
    assert sys.modules["glyph_drawing"].draw_text(str(FONTS / "DejaVuSans.ttf"), 0, " ") is None
