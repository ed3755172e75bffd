"""Features are computed once, found again, mended, and train the same heads as the frozen backbone itself."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.data.dataset import BrokenImageError, DomainBatch, MultiDomainDataset
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.evaluation.evaluate import evaluate
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training import feature_file
from modeling_udon.training.features import FeatureDataset
from modeling_udon.training.step import StepResult
from modeling_udon.training.trainer import Trainer
from modeling_udon.training.training_data import training_data

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
Open = Callable[[TrainConfig], Trainer]
Told = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("small_blocks")
HEADS_ONLY = {"train__heads_only": True}


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def feature_files(folder: Path) -> list[Path]:
    """Files of the training images."""
    return sorted(
        path for path in folder.glob("*.npy") if not path.name.endswith(".sums.npy") and "query" not in path.name
    )


@pytest.fixture(scope="module")
def run(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("run"), **HEADS_ONLY))


def test_the_backbone_stays_and_the_heads_move(run: Path) -> None:
    start, last = load_file(run / "checkpoints" / "step-00000003" / "model.safetensors"), last_weights(run)
    for name, weight in start.items():
        assert torch.equal(weight, last[name]) == name.startswith("udon.backbone."), name
    optimizer = load_file(run / "checkpoints" / "step-00000011" / "optimizer.safetensors")
    assert not any(name.startswith("udon.backbone.") for name in optimizer)


def test_steps_run_no_backbone(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_step, forward, running = Trainer.train_step, UdonModel.forward, []

    def watched_step(self: Trainer, batch: DomainBatch) -> StepResult:
        running.append(True)
        losses = train_step(self, batch)
        running.clear()
        return losses

    def watched_forward(self: UdonModel, *inputs: Any, **options: Any) -> Any:
        assert not running
        return forward(self, *inputs, **options)

    monkeypatch.setattr(Trainer, "train_step", watched_step)
    monkeypatch.setattr(UdonModel, "forward", watched_forward)
    run_train(make_values(tmp_path, **HEADS_ONLY, train__accumulation_steps=2))


def test_the_first_view_is_the_evaluations(tiny_config: Callable[..., Path], open_trainer: Open) -> None:
    trainer = open_trainer(load_config(tiny_config(**HEADS_ONLY)))
    batch = next(iter(trainer.batches()))
    domain = trainer.run.domains[batch.domain]
    plain = EvalTransform(16)
    (draw,) = [draw for number, draw in enumerate(trainer.run.sampler) if number == 0]
    images = MultiDomainDataset(trainer.run.domains, lambda image, rng: plain(image), 0)[draw]
    model = trainer.run.model.udon.eval()
    with torch.no_grad():
        expected = model(trainer.run.statistics.normalize(images.pixels)).backbone_embeds
    torch.testing.assert_close(batch.pixels, expected)
    assert torch.equal(batch.labels, torch.from_numpy(domain.labels[draw.rows]))


def test_each_pass_over_the_images_takes_their_next_view(tiny_config: Callable[..., Path], open_trainer: Open) -> None:
    config = load_config(
        tiny_config(**HEADS_ONLY, train__feature_views=3, train__num_steps=60, sampling__update_every=60)
    )
    trainer = open_trainer(config)
    (file,) = [path for path in _fill(trainer) if path.name.startswith("blobs")]
    rows, size = np.load(file), 30
    views = rows.reshape(3, size, -1)
    assert np.abs(views[0] - views[1]).max() > 1e-3 and np.abs(views[1] - views[2]).max() > 1e-3
    for draw, batch in zip(trainer.run.sampler, trainer.batches(), strict=False):
        if draw.domain == "blobs":
            expected = [
                views[position // size % 3, row] for position, row in zip(draw.positions, draw.rows, strict=True)
            ]
            assert np.array_equal(batch.pixels.numpy(), np.stack(expected))


def _fill(trainer: Trainer) -> list[Path]:
    next(iter(trainer.batches()))
    return feature_files(trainer.run.folder.path / "features")


def test_cached_features_train_the_heads_as_the_frozen_backbone_does(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steady = {"model__backbone_config__hidden_dropout_prob": 0.0, "log__every": 1}
    cached = run_train(make_values(tmp_path / "cached", **HEADS_ONLY, **steady))
    plain = EvalTransform(16)
    monkeypatch.setattr(
        "modeling_udon.training.training_data.training_transform", lambda data: lambda image, rng: plain(image)
    )
    live = run_train(make_values(tmp_path / "live", **steady, optim__backbone_lr=0.0, optim__weight_decay=0.0))
    losses = [
        [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for run in (cached, live)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_on_features_goes_on_bit_for_bit_and_finds_them(
    run: Path, make_values: Values, run_train: Run, tmp_path: Path, capsys: Told
) -> None:
    values = make_values(tmp_path, **HEADS_ONLY)
    part = run_train(values)
    for folder in sorted((part / "checkpoints").glob("step-*"))[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    capsys.readouterr()
    run_train(values, resume=True)
    assert capsys.readouterr().out.count(", all there\n") == 3
    assert all(torch.equal(value, last_weights(part)[name]) for name, value in last_weights(run).items())


def test_two_processes_fill_one_cache(run: Path, make_values: Values, run_two_processes: Run, tmp_path: Path) -> None:
    two = run_two_processes(make_values(tmp_path, **HEADS_ONLY))
    ours, theirs = (feature_files(folder / "features") for folder in (two, run))
    assert [path.name for path in ours] == [path.name for path in theirs]
    assert all(np.array_equal(np.load(a), np.load(b)) for a, b in zip(ours, theirs, strict=True))


def test_what_is_missing_or_damaged_is_computed_again(
    make_values: Values, run_train: Run, tmp_path: Path, capsys: Told
) -> None:
    shared = tmp_path / "shared"
    changes = HEADS_ONLY | {"train__feature_cache": str(shared)}
    run_train(make_values(tmp_path / "one", **changes))
    blobs, noise, stripes = feature_files(shared)
    whole = {path: path.read_bytes() for path in (blobs, noise, stripes)}
    np.lib.format.open_memmap(blobs, "r+")[13] += 1
    noise.write_bytes(whole[noise][:100])
    capsys.readouterr()
    run_train(make_values(tmp_path / "two", **changes))
    told = capsys.readouterr().out
    for words in ("features of blobs: 30 rows of 16 in", "1 of 3 blocks to compute", "3 of 3 blocks", "all there"):
        assert words in told
    assert all(path.read_bytes() == content for path, content in whole.items())


def test_another_image_stands_in_for_one_that_has_no_features(
    tiny_config: Callable[..., Path], open_trainer: Open
) -> None:
    trainer = open_trainer(load_config(tiny_config(**HEADS_ONLY)))
    dataset, (draw, *_) = training_data(trainer.run, lambda line: None), list(trainer.run.sampler)
    whole, place = dataset[draw], 3
    features = dict(dataset._features)
    features[draw.domain] = features[draw.domain].copy()
    features[draw.domain][draw.rows[place]] = np.nan
    batch = FeatureDataset(trainer.run.domains, features, seed=3, replace_broken=True)[draw]
    assert [(image.row, image.position) for image in batch.broken] == [(draw.rows[place], draw.positions[place])]
    others = np.arange(len(draw.rows)) != place
    assert torch.equal(batch.pixels[others], whole.pixels[others]) and batch.pixels.isfinite().all()
    (row,) = (features[draw.domain] == batch.pixels[place].numpy()).all(axis=1).nonzero()[0]
    assert batch.labels[place] == trainer.run.domains[draw.domain].labels[row]
    with pytest.raises(BrokenImageError, match=f"has a broken image in row {draw.rows[place]}: it has no features"):
        FeatureDataset(trainer.run.domains, features, seed=3, replace_broken=False)[draw]


def test_an_image_that_cannot_be_read_gets_no_features(
    make_values: Values, tiny_domains: Path, run_train: Run, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_domains / "blobs", broken)
    (file,) = broken.glob("train*.parquet")
    table = pq.read_table(file)
    images = table["image"].to_pylist()
    images[4] = {"bytes": b"<html>", "path": "page.jpg"}
    column = pa.array(images, table.schema.field("image").type)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), "image", column), file)
    changes = HEADS_ONLY | {"train__feature_views": 2, "data__max_broken_share": 0.5, "data__num_workers": 1}
    run = run_train(make_values(tmp_path, **changes, domains__blobs__path=str(broken)))
    (features,) = [np.load(path) for path in feature_files(run / "features") if path.name.startswith("blobs")]
    assert np.flatnonzero(np.isnan(features).any(axis=1)).tolist() == [4, 34]
    named = [json.loads(line) for line in (run / "broken.jsonl").read_text().splitlines()]
    assert {(row["domain"], row["row"]) for row in named if row["split"] == "train"} == {("blobs", 4)}


def test_a_cache_that_was_stopped_goes_on_where_it_was(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    values = make_values(tmp_path, **HEADS_ONLY, train__feature_cache=str(tmp_path / "shared"))
    write, written = feature_file.FeatureFile.write, []

    def dying_write(self: Any, block: int, features: np.ndarray) -> None:
        if "query" not in self.path.name:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(block)
        write(self, block, features)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_file.FeatureFile, "write", dying_write)
        run_train(values)
    capsys.readouterr()
    run_train(values, overwrite=True)
    assert "2 of 4 blocks to compute" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"data__image_mean": [0.4, 0.5, 0.5]},
        {"train__mixed_precision": "bf16"},
        {"train__feature_views": 2},
        {"model__pooling": "pooler"},
    ],
)
def test_features_of_another_backbone_or_view_are_another_file(
    make_values: Values, tmp_path: Path, changes: dict[str, Any], open_trainer: Open
) -> None:
    names = []
    for folder, change in (("one", {}), ("two", changes)):
        values = make_values(tmp_path / folder, **HEADS_ONLY, **change)
        path = tmp_path / f"{folder}.yaml"
        path.write_text(json.dumps(values))
        AcceleratorState._reset_state()
        trainer = open_trainer(load_config(path))
        names.append([file.name for file in _fill(trainer)])
    assert not set(names[0]) & set(names[1])


def test_evaluation_reads_features_and_scores_what_the_published_student_does(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = HEADS_ONLY | {"train__feature_cache": str(tmp_path / "shared")}
    first = run_train(make_values(tmp_path / "one", **changes))
    forward, sizes = UdonModel.forward, []

    def watched_forward(self: UdonModel, pixel_values: torch.Tensor, *inputs: Any, **options: Any) -> Any:
        sizes.append(len(pixel_values))
        return forward(self, pixel_values, *inputs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(UdonModel, "forward", watched_forward)
        second = run_train(make_values(tmp_path / "two", **changes))
    assert set(sizes) == {1}, "the check of the backbone, and no image"
    results = [json.loads((run / "results.json").read_text()) for run in (first, second)]
    assert results[0]["splits"] == results[1]["splits"] and results[0]["baseline"] == results[1]["baseline"]
    measured = evaluate(first).results["splits"]["test"]
    for index in ("merged", "separate"):
        for name, scores in results[0]["splits"]["test"][index]["domains"].items():
            assert scores == pytest.approx(measured[index]["domains"][name], abs=1e-6)


def test_a_backbone_at_rest_is_not_cut_into_shards(tiny_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="`heads_only` must go without `shard_backbone`"):
        load_config(tiny_config(**HEADS_ONLY, train__shard_backbone=True))


def test_trained_teachers_need_images(tiny_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="`train.heads_only` must go without `teachers`"):
        load_config(tiny_config(**HEADS_ONLY, system="separate_teachers", teachers="runs/x"))
