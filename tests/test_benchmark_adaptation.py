"""The data of the benchmark of domains without labels, and its table."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

pytest.importorskip("sklearn")
pytest.importorskip("fontTools")
import adaptation_data
from adaptation import CONFIGS, ROWS, SOURCE, STARTS, TARGETS, format_table
from adaptation_data import LETTERS, blended, kind_of, read_optdigits, split_by_class, write
from glyph_sources import Typeface

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


def test_a_typeface_is_what_its_panose_numbers_say(monkeypatch: pytest.MonkeyPatch) -> None:
    for (family, serifs, proportion), kind in {
        (2, 11, 2): "sans",
        (2, 5, 3): "serif",
        (2, 11, 9): "mono",
        (2, 0, 0): "",
        (3, 11, 0): "",
    }.items():
        panose = SimpleNamespace(bFamilyType=family, bSerifStyle=serifs, bProportion=proportion)
        opened = nullcontext({"OS/2": SimpleNamespace(panose=panose)})
        monkeypatch.setattr(adaptation_data, "TTFont", lambda *_, opened=opened, **__: opened)
        assert kind_of(Typeface("", "", "", "", 0, frozenset())) == kind


@pytest.mark.long
def test_every_row_trains_by_the_launcher_from_its_config(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (SOURCE, *TARGETS, *LETTERS):
        images, labels = rng.integers(0, 256, (60, 28, 28), np.uint8), list("0123456789" * 6)
        write(tmp_path / name, split_by_class(images, labels, (4, 1, 1)))
    variables = {f"UDON_ADAPTATION_{name}": str(tmp_path) for name in ("DIR", "START", "RUNS")}
    variables["PYTHONPATH"] = str(CONFIGS.parents[1])
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    words = ["--train.num_steps", "2", "--output_dir", str(tmp_path)]
    for row in (*STARTS, *ROWS, "letters"):
        command = [accelerate, "launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
        command += ["--dynamo_backend", "no", "--cpu", "train_udon.py", "--config", str(CONFIGS / f"{row}.yaml")]
        subprocess.run(
            [*command, *words, "--name", row], cwd=CONFIGS.parents[1], env=os.environ | variables, check=True
        )
        assert (tmp_path / row / "best" / "model.safetensors").is_file(), row


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
