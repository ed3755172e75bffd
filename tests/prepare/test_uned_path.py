"""UnED's whole path on a miniature of its layout, through the public commands alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage
from tiny_models import TINY_VIT

from modeling_udon.prepare.uned import PUBLISHED

ROOT = Path(__file__).parents[2]
# Classes of each split; UnED's splits have classes of their own, and query and index share theirs.
CLASSES = {"train": range(3), "val": range(3, 5), "test": range(5, 8), "index": range(5, 8), "small_index": range(3, 8)}
IMAGES_A_CLASS = 4
# RP2K's folders have Chinese names; some archivers unpack them escaped.
NAME, ESCAPED = "饼干", "#U997c#U5e72"

TINY = {
    "model": {
        "backbone": None,
        "backbone_config": {name: TINY_VIT[name] for name in TINY_VIT if name != "initializer_range"},
    },
    "data": {"image_size": 16, "num_workers": 0},
    "train": {"num_epochs": None, "num_steps": 16, "batch_size": 8, "mixed_precision": "no"},
    "sampling": {"update_every": 8},
}


def write_uned(info: Path, images: Path) -> None:
    """Writes info files and images of eight domains, each of its kind as in UnED."""
    rng = np.random.default_rng(0)
    for domain in PUBLISHED:
        entries: dict[str, list[dict[str, Any]]] = {}
        for split, classes in CLASSES.items():
            rows = [(label, copy) for label in classes for copy in range(IMAGES_A_CLASS)]
            folder = f"{domain}/{NAME if domain == 'rp2k' else 'images'}/{split}"
            entries[split] = [{"path": f"{folder}/{label}_{copy}.jpg", "class_id": label} for label, copy in rows]
            unpacked = images / folder.replace(NAME, ESCAPED)
            unpacked.mkdir(parents=True)
            for label, copy in rows:
                pixels = rng.integers(0, 255, (20 + copy, 30, 3)).astype(np.uint8)
                PILImage.fromarray(pixels).save(unpacked / f"{label}_{copy}.jpg")
        if domain == "met":
            # A query may show several exhibits.
            entries["test"][0]["class_id"] = [5, 7]
        else:
            del entries["small_index"]
        if domain in ("cars", "sop"):
            # Where there is no index, UnED lists the queries again.
            entries["index"] = entries["test"]
        (info / domain).mkdir(parents=True)
        for split, rows_of_split in entries.items():
            (info / domain / f"{split}.json").write_text(json.dumps(rows_of_split), encoding="utf-8")


def call(*words: object, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Prepares and trains; gives the folder, and what both commands said."""
    folder = tmp_path_factory.mktemp("uned")
    write_uned(folder / "info_files", folder / "images")
    words = ["--info-files", folder / "info_files", "--images", folder / "images", "--out", folder / "uned"]
    prepared = call("-m", "modeling_udon.cli", "prepare", "uned", *words, "--num-workers", 0)
    config = {"base": str(ROOT / "configs" / "uned_vits16_in21k.yaml"), "name": "miniature", **TINY}
    config |= {"output_dir": str(folder / "runs")}
    (folder / "miniature.yaml").write_text(yaml.safe_dump(config))
    uned = {"UNED_DIR": str(folder / "uned")}
    return folder, prepared, call("train_udon.py", "--config", folder / "miniature.yaml", **uned)


def test_a_miniature_of_uned_is_prepared_whole(path: tuple[Path, str, str]) -> None:
    folder, prepared, _ = path
    for name, (images, classes) in PUBLISHED.items():
        assert f"{name}: WARNING: 12 training images of 3 classes, published are {images:,} of {classes:,}" in prepared
        assert not (folder / "uned" / name / "unreadable.txt").exists()
    specs = yaml.safe_load((folder / "uned" / "domains.yaml").read_text())["domains"]
    indexes = {name: (spec.get("validation_index_split"), spec.get("test_index_split")) for name, spec in specs.items()}
    of_their_own = dict.fromkeys(PUBLISHED, (None, "index"))
    assert indexes == of_their_own | {"cars": (None, None), "sop": (None, None), "met": ("small_index", "index")}


def test_training_on_it_ends_with_scores_of_all_eight_domains(path: tuple[Path, str, str]) -> None:
    folder, _, said = path
    run = folder / "runs" / "miniature"
    results = json.loads((run / "results.json").read_text())["splits"]["test"]
    num_queries = IMAGES_A_CLASS * len(CLASSES["test"])
    tables = [results["merged"]["domains"], results["separate"]["domains"], results["teachers"]]
    for table in tables:
        assert table.keys() == PUBLISHED.keys()
        for scores in table.values():
            assert (scores["R@1"] * num_queries) % 1 == pytest.approx(0, abs=1e-9)
    for name in PUBLISHED:
        assert f"domain {name}: 12 images, 3 classes" in said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Round-robin before the weights are updated for the first time.
    counts = next(row["steps_by_domain"] for row in rows if "steps_by_domain" in row)
    assert counts == dict.fromkeys(PUBLISHED, 1)


def test_the_student_scores_the_same_again_by_udon_evaluate(path: tuple[Path, str, str]) -> None:
    folder, _, _ = path
    run = folder / "runs" / "miniature"
    words = ["--model", run / "best", "--config", folder / "miniature.yaml", "--output", folder / "again"]
    uned = {"UNED_DIR": str(folder / "uned")}
    call("-m", "modeling_udon.cli", "evaluate", *words, "--num-workers", 0, **uned)
    first, again = (json.loads((path / "results.json").read_text()) for path in (run, folder / "again"))
    for kind in ("merged", "separate"):
        assert again["splits"]["test"][kind] == first["splits"]["test"][kind]
