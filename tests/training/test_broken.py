"""Images that cannot be read are replaced, counted and named; too many of them end the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from safetensors.torch import load_file

from modeling_udon.data.dataset import BrokenImage, BrokenImageError, DomainBatch, MultiDomainDataset
from modeling_udon.data.domains import Domain, open_domain
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.data.transforms import TrainTransform
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.training import broken as broken_module
from modeling_udon.training.broken import BrokenImages

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
Spoiled = Any


@pytest.fixture(scope="module", params=[False, True], ids=["map-style", "streamed"])
def domain(request: pytest.FixtureRequest, spoiled: Spoiled) -> Domain:
    return open_domain("blobs", DomainSpec(path=str(spoiled.folder), streaming=request.param))


def draw(*rows: int, first: int = 0) -> BatchDraw:
    return BatchDraw("blobs", np.asarray(rows), np.arange(first, first + len(rows)))


def test_another_image_of_the_domain_stands_in_with_its_own_label(domain: Domain, spoiled: Spoiled) -> None:
    dataset = MultiDomainDataset({"blobs": domain}, TrainTransform(16), seed=3, replace_broken=True)
    batch = dataset[draw(0, 2, 3, 11, 25, 29, first=40)]
    assert [image.row for image in batch.broken] == [2, 3, 11, 25]
    assert [image.position for image in batch.broken] == [41, 42, 43, 44]
    assert [image.path for image in batch.broken] == ["page.html", "", "", "/nowhere/gone.png"]
    for image, words in zip(batch.broken, ("must be an image", "truncated", "neither", "No such file"), strict=True):
        assert image.domain == "blobs" and image.split == "train" and words in image.reason
    whole = [row for row in range(30) if row not in spoiled.rows["train"]]
    for place in range(6):
        candidates = whole if place in (1, 2, 3, 4) else [(0, 29)[place == 5]]
        alone = [
            MultiDomainDataset({"blobs": domain}, TrainTransform(16), 3)[draw(row, first=40 + place)]
            for row in candidates
        ]
        same = [one for one in alone if (one.pixels[0] == batch.pixels[place]).all()]
        assert len(same) == 1 and same[0].labels[0] == batch.labels[place]


def test_the_substitute_depends_on_seed_and_position_alone(domain: Domain) -> None:
    dataset = MultiDomainDataset({"blobs": domain}, TrainTransform(16), seed=3, replace_broken=True)
    together = dataset[draw(7, 2, 11, first=5)]
    alone = dataset[draw(2, first=6)]
    assert (alone.pixels[0] == together.pixels[1]).all() and alone.labels[0] == together.labels[1]
    elsewhere = [int(dataset[draw(2, first=first)].labels[0]) for first in range(40)]
    assert len(set(elsewhere)) == 3


def test_without_replacement_a_broken_image_is_an_error(domain: Domain) -> None:
    dataset = MultiDomainDataset({"blobs": domain}, TrainTransform(16), seed=3)
    with pytest.raises(BrokenImageError, match=r"^`domains.blobs` has a broken image in row 2 \(page.html\): "):
        dataset[draw(1, 2)]


def test_a_domain_without_a_whole_image_is_an_error(tmp_path: Path) -> None:
    images = [{"bytes": b"no", "path": None}] * 4
    schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()})
    pq.write_table(pa.Table.from_pydict({"image": images, "label": [0, 1, 0, 1]}, schema), tmp_path / "train.parquet")
    spec = DomainSpec(path=str(tmp_path), validation_split=None, test_split=None, streaming=True)
    dataset = MultiDomainDataset({"blobs": open_domain("blobs", spec)}, TrainTransform(16), 0, replace_broken=True)
    with pytest.raises(BrokenImageError, match="100 others in its place are broken too"):
        dataset[draw(0)]


def make_images(path: Path, max_share: float = 0.01, step: int = 0, **counts: int) -> BrokenImages:
    return BrokenImages(path, max_share, Accelerator(cpu=True), counts, step)


def make_batch(*rows: int, domain: str = "blobs", first: int = 0) -> DomainBatch:
    images = [BrokenImage(domain, "train", row, "", "why", first + place) for place, row in enumerate(rows)]
    return DomainBatch(domain, None, None, tuple(images))  # type: ignore[arg-type]


def test_the_share_is_taken_of_a_thousand_images_at_least(tmp_path: Path) -> None:
    images = make_images(tmp_path / "broken.jsonl")
    images.collect(make_batch(*range(10)), 1)
    (line,) = images.count({"blobs": 16})
    assert line == (
        "WARNING: 10 of 16 images drawn from blobs are broken and were replaced, the last: `domains.blobs` has a "
        f"broken image in row 9: why; all in {tmp_path / 'broken.jsonl'}"
    )
    assert images.count({"blobs": 32}) == []
    images.collect(make_batch(3), 2)
    with pytest.raises(BrokenImageError, match=r"max_broken_share` allows 0.01, but 11 of 999 images drawn from blobs"):
        images.count({"blobs": 999})
    enough = make_images(tmp_path / "other.jsonl", blobs=10)
    enough.collect(make_batch(3), 2)
    assert len(enough.count({"blobs": 1100})) == 1
    assert broken_module.MIN_DRAWN == 1000


def test_every_domain_has_its_own_share(tmp_path: Path) -> None:
    images = make_images(tmp_path / "broken.jsonl")
    images.collect(make_batch(*range(8)), 1)
    images.collect(make_batch(*range(7), domain="cars"), 1)
    assert [line.split()[1] for line in images.count({"blobs": 100, "cars": 100})] == ["8", "7"]
    assert images.counts == {"blobs": 8, "cars": 7}


def test_an_image_is_named_once_and_forgotten_where_a_run_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    images = make_images(path)
    for step, rows in ((1, (4, 5)), (2, (5,)), (3, (6,))):
        images.collect(make_batch(*rows), step)
        images.count({"blobs": 100})

    def read() -> list[tuple[int, int]]:
        return [(row["step"], row["row"]) for row in map(json.loads, path.read_text().splitlines())]

    assert read() == [(1, 4), (1, 5), (3, 6)] and images.counts == {"blobs": 4}
    again = make_images(path, step=2, blobs=3)
    assert read() == [(1, 4), (1, 5)]
    again.collect(make_batch(5, 6), 3)
    again.count({"blobs": 100})
    assert read() == [(1, 4), (1, 5), (3, 6)] and again.counts == {"blobs": 5}


def changes_for(folder: Path, **more: Any) -> dict[str, Any]:
    return {"domains__blobs__path": str(folder), "data__max_broken_share": 0.1, **more}


def read_named(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "broken.jsonl").read_text().splitlines()]


def test_a_run_skips_names_and_counts_and_leaves_out_of_its_scores(
    make_values: Values, run_train: Run, tmp_path: Path, spoiled: Spoiled, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(make_values(tmp_path, **changes_for(spoiled.folder)))
    told = capsys.readouterr().out
    named = read_named(run)
    for split, name in (("train", "train"), ("validation", "validation query"), ("test", "test query")):
        assert sorted(row["row"] for row in named if row["split"] == name) == list(spoiled.rows[split])
    assert {row["domain"] for row in named} == {"blobs"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    counted = [row["broken_images"]["blobs"] for row in rows if "broken_images" in row]
    state = json.loads((run / "checkpoints" / "step-00000011" / "state.json").read_text())
    assert counted[-1] == state["broken"]["blobs"] >= 4
    assert "images drawn from blobs are broken and were replaced, the last: `domains.blobs` has a" in told
    assert (
        told.count("| broken images left out: blobs 4\n") == 4
        and told.count("\nbroken images left out: blobs 4\n") == 1
    )
    assert json.loads((run / "results.json").read_text())["splits"]["test"]["left_out"] == {"blobs": 4}


def test_scores_are_those_of_the_images_that_are_left(
    make_values: Values, run_train: Run, tmp_path: Path, spoiled: Spoiled, tiny_domains: Path
) -> None:
    without = tmp_path / "without"
    shutil.copytree(tiny_domains / "blobs", without)
    for split in ("validation", "test"):
        table = pq.read_table(without / f"{split}.parquet")
        whole = [row for row in range(len(table)) if row not in spoiled.rows[split]]
        pq.write_table(table.take(whole), without / f"{split}.parquet")
    shutil.copy(spoiled.folder / "train.parquet", without / "train.parquet")
    results = [
        json.loads(
            (run_train(make_values(tmp_path / path.parent.name, **changes_for(path))) / "results.json").read_text()
        )
        for path in (spoiled.folder, without)
    ]
    assert results[0]["splits"]["test"].pop("left_out")
    for key in ("splits", "baseline", "analysis"):
        assert results[0][key] == results[1][key]


def test_a_run_ends_where_too_many_are_broken(
    make_values: Values, run_train: Run, tmp_path: Path, spoiled: Spoiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broken_module, "MIN_DRAWN", 20)
    with pytest.raises(BrokenImageError, match="`data.max_broken_share` allows 0.1, but"):
        run_train(make_values(tmp_path, **changes_for(spoiled.folder)))
    monkeypatch.undo()
    run_train(make_values(tmp_path, **changes_for(spoiled.folder, data__max_broken_share=0.5)), resume=True)


def test_none_may_be_broken_in_an_evaluation_either(
    make_values: Values, run_train: Run, tmp_path: Path, spoiled: Spoiled
) -> None:
    with pytest.raises(BrokenImageError, match=r"^`domains.blobs` has a broken image in row 1 \(page.html\)"):
        run_train(make_values(tmp_path, **changes_for(spoiled.folder, data__max_broken_share=0.0)))


def test_two_processes_name_and_count_what_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, spoiled: Spoiled
) -> None:
    steady = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4}
    values = [make_values(tmp_path / name, **changes_for(spoiled.folder, **steady)) for name in ("one", "two")]
    one, two = run_train(values[0]), run_two_processes(values[1])
    assert read_named(one) == read_named(two)
    left_out = [json.loads((run / "results.json").read_text())["splits"]["test"]["left_out"] for run in (one, two)]
    assert left_out == [{"blobs": 4}] * 2
    weights = [load_file(run / "best" / "model.safetensors") for run in (one, two)]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-4 for name in weights[0])
