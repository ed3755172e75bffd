"""The data of the benchmark of domains without labels, and its table."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

pytest.importorskip("sklearn")
from adaptation import format_table
from adaptation_data import blended, read_optdigits, split_by_class, write

from modeling_udon.data.domains import open_domain
from modeling_udon.domain_spec import DomainSpec


def test_blends_are_the_same_each_time_and_keep_the_digit_apart() -> None:
    digits = np.zeros((3, 28, 28), np.uint8)
    digits[:, 10:18, 10:18] = 255
    found = blended(digits)
    assert np.array_equal(found, blended(digits)) and found.shape == (3, 28, 28, 3)
    # Inside the digit colours are turned: there a bright photograph is dark.
    plain = blended(np.zeros_like(digits))
    assert np.array_equal(found[:, 12, 12], 255 - plain[:, 12, 12]) and np.array_equal(found[:, 2, 2], plain[:, 2, 2])


def test_splits_share_no_image_and_open_as_a_domain(tmp_path: Path) -> None:
    images, labels = read_optdigits()
    pictures = split_by_class(images, [str(label) for label in labels], (5, 0, 3))
    assert set(pictures) == {"train", "test"} and len(pictures["train"]) == 50 and len(pictures["test"]) == 30
    bytes_of = {split: {image.tobytes() for image, _ in of_split} for split, of_split in pictures.items()}
    assert not bytes_of["train"] & bytes_of["test"]
    write(tmp_path / "digits", pictures)
    domain = open_domain("digits", DomainSpec(path=str(tmp_path / "digits"), labels="none", validation_split=None))
    assert len(domain.images) == 50 and len(domain.evaluation["test"].query) == 30


def test_the_table_pairs_rows_with_the_source_alone_by_seed() -> None:
    def run(seed: int, accuracy: float) -> dict[str, object]:
        names = ("mnist", "optdigits", "blends", "fonts")
        of = {"accuracy": accuracy, "within": 0.5, "across": 0.25}
        cost = {"trained": 2000, "shipped": 1000, "cpu_seconds": 3.0}
        return {
            "asked": {"seed": seed},
            "cost": cost,
            "student": dict.fromkeys(names, of),
            "teachers": {},
            "branches": [],
        }

    rows = {"source_only": [run(0, 0.2), run(1, 0.4)], "uda_mmd": [run(0, 0.3), run(1, 0.5)]}
    page = format_table({"crop": rows}, {"optdigits": {"within": 0.7, "across": 0.3}})
    assert "| `uda_mmd` | 2 | 40.0 ± 127.1 |" in page and "| raw pixels | - |" in page
    assert "- `uda_mmd` minus `source_only`, mean accuracy, paired by seed: 10.0 ± 0.0" in page
