"""What a run writes and tells, and what it does not depend on."""

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config
from modeling_udon.training.errors import TrainingError
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer
from modeling_udon.training.validation import Assessment

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def read_rows(run: Path, key: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def same_weights(one: Path, other: Path) -> bool:
    first, second = read_weights(one), read_weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def run(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize(
    "changes",
    [
        {"log__every": 1},
        {"log__every": 11, "eval__every": 1},
        {"eval__every": 11, "eval__batch_size": 7},
        {"train__checkpoint_every": 1, "train__keep_checkpoints": 1},
        {"data__num_workers": 1},
        {"data__num_workers": 2, "log__every": 3},
        {"model__gradient_checkpointing": True},
        {"train__keep_teachers": True, "log__trackers": ["tensorboard"]},
    ],
)
def test_weights_do_not_depend_on_how_a_run_is_watched_or_fed(
    run: Path, make_values: Values, run_train: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert same_weights(run, run_train(make_values(tmp_path, **changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"ablation__idle_heads": "hold"},
        {"optim__schedule": "cosine"},
        {"optim__warmup_steps": 5},
        {"optim__max_grad_norm": 0.1},
        {"optim__frozen_fraction": 0.5},
        {"train__mixed_precision": "bf16"},
        {"sampling__strategy": "balanced"},
        {"sampling__strategy": "fixed", "sampling__weights": {"stripes": 1, "blobs": 1, "noise": 4}},
        {"loss__kind": "arcface", "loss__margin": 0.2},
        {"loss__relational_distillation": 0.0},
        {"model__head_hidden_dims": [24]},
    ],
)
def test_a_run_with_other_settings_ends_elsewhere_with_finite_losses(
    run: Path, make_values: Values, run_train: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    other = run_train(make_values(tmp_path, **changes))
    assert not same_weights(run, other)
    assert all(math.isfinite(row["loss"]) for row in read_rows(other, "loss"))


def test_the_same_run_ends_at_the_same_weights(run: Path, make_values: Values, run_train: Run, tmp_path: Path) -> None:
    assert same_weights(run, run_train(make_values(tmp_path)))


def test_the_learning_rates_follow_warmup_freezing_and_cosine(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    changes = {"optim__warmup_steps": 4, "optim__schedule": "cosine", "log__every": 1}
    rows = read_rows(run_train(make_values(tmp_path, **changes)), "learning_rates")
    assert [row["step"] for row in rows] == list(range(1, 12))
    for row in rows:
        step = row["step"] - 1
        factor = (step + 1) / 4 if step < 4 else (1 + math.cos(math.pi * (step - 4) / 7)) / 2
        assert row["learning_rates"]["heads"] == pytest.approx(1e-2 * factor)
        assert row["learning_rates"]["backbone"] == pytest.approx(0 if step < 2 else 1e-3 * factor)


def test_a_frozen_backbone_stays_while_its_heads_move(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    changes = {"train__checkpoint_every": 1, "train__keep_checkpoints": 20, "train__num_steps": 5}
    run = run_train(make_values(tmp_path, **changes, optim__frozen_fraction=0.4, optim__weight_decay=0.0))
    steps = [load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors") for step in (1, 2, 3)]
    kernel, head = "udon.backbone.embeddings.patch_embeddings.projection.weight", "udon.student_head.projection.weight"
    assert torch.equal(steps[0][kernel], steps[1][kernel])
    assert not torch.equal(steps[1][kernel], steps[2][kernel])
    assert not torch.equal(steps[0][head], steps[1][head])


def test_the_start_is_measured_and_the_best_validation_is_kept(run: Path) -> None:
    rows = read_rows(run, "validation")
    assert [row["step"] for row in rows] == [0, 5, 10, 11]
    scores = [row["validation"]["merged"]["mean"]["R@1"] for row in rows]
    best = json.loads((run / "checkpoints" / "step-00000011" / "state.json").read_text())["best"]
    trained = scores[1:]
    assert best == {"step": rows[1 + trained.index(max(trained))]["step"], "R@1": max(trained)}


def test_the_start_is_never_the_best_even_where_training_makes_it_worse(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.9, 0.1, 0.2, 0.15])
    monkeypatch.setattr(Assessment, "quality", lambda self, scores_of_split: next(scores))
    run = run_train(make_values(tmp_path))
    best = json.loads((run / "checkpoints" / "step-00000011" / "state.json").read_text())["best"]
    assert best == {"step": 10, "R@1": 0.2}


def test_the_best_is_chosen_by_the_metric_that_is_named(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    run = run_train(make_values(tmp_path, eval__metric="mAP@R", eval__max_images=9))
    scores = {row["step"]: row["validation"]["merged"]["mean"] for row in read_rows(run, "validation")}
    best = json.loads((run / "checkpoints" / "step-00000011" / "state.json").read_text())["best"]
    del scores[0]
    top = max(scores, key=lambda step: scores[step]["mAP@R"])
    assert best == {"step": top, "mAP@R": scores[top]["mAP@R"]}
    tested = json.loads((run / "results.json").read_text())["splits"]["test"]["merged"]
    assert tested["mean"].keys() == {"R@1", "mMP@5", "mAP@R"}


def test_a_run_ends_when_patience_does_and_resuming_it_takes_no_further_step(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    changes = {"eval__every": 2, "eval__patience": 2, "eval__baselines": False}
    scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(Assessment, "quality", lambda self, scores_of_split: next(scores))
    run = run_train(make_values(tmp_path, **changes))
    assert "stopped at step 6: no better student in 2 validations" in capsys.readouterr().out
    folder = run / "checkpoints" / "step-00000006"
    assert json.loads((folder / "state.json").read_text())["best"] == {"step": 2, "R@1": 0.5}
    results = json.loads((run / "results.json").read_text())
    assert results["baseline"] == {} and results["splits"]["test"]["merged"]["mean"]["R@1"] > 0
    run_train(make_values(tmp_path, **changes), resume=True)
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == folder.name
    # With more patience it goes on from there.
    run_train(make_values(tmp_path, **changes | {"eval__patience": 9, "eval__every": 50}), resume=True, allow=["every"])
    assert (run / "checkpoints" / "step-00000011").is_dir()


@pytest.mark.parametrize("first", [6, 8])
def test_a_finished_run_that_is_extended_ends_as_one_that_was_longer_from_the_start(
    run: Path, make_values: Values, run_train: Run, tmp_path: Path, first: int
) -> None:
    # Nothing of the schedule may depend on the length; an interval has 4 steps.
    changes = {"optim__frozen_fraction": 0.0}
    whole = run_train(make_values(tmp_path / "whole", **changes))
    run_train(make_values(tmp_path / "part", **changes, train__num_steps=first))
    extended = run_train(make_values(tmp_path / "part", **changes), resume=True, allow=["num_steps"])
    assert same_weights(whole, extended)


class NoFloat64(TorchDispatchMode):
    """Refuses what Apple's GPUs do not have."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64), function
        return result


@pytest.mark.parametrize("changes", [{"optim__skip_spikes": 3.0}, {"loss__sampled_classes": 4, "loss__chunk_size": 2}])
def test_a_step_makes_no_float64_on_the_device(
    tiny_config: Callable[..., Path], open_trainer: Callable[..., Trainer], changes: dict[str, Any]
) -> None:
    trainer = open_trainer(load_config(tiny_config(**changes)))
    for batch, _ in zip(trainer.batches(), range(3), strict=False):
        with NoFloat64():
            result = trainer.train_step(batch)
        trainer.count_step(batch, result)


def test_a_log_row_is_the_mean_of_the_steps_since_the_last_one(
    run: Path, make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    every = read_rows(run_train(make_values(tmp_path, log__every=1)), "loss")
    pairs = read_rows(run, "loss")
    assert [row["step"] for row in pairs] == [2, 4, 6, 8, 10, 11]
    for number, row in enumerate(pairs[:-1]):
        steps = every[2 * number : 2 * number + 2]
        assert row["loss"] == pytest.approx(sum(step["loss"] for step in steps) / 2)
        for name, value in row["losses"].items():
            assert value == pytest.approx(sum(step["losses"][name] for step in steps) / 2)
        assert set(row["domain_losses"]) == {name for step in steps for name in step["domain_losses"]}


def test_the_next_weights_are_the_teachers_mean_losses_of_their_interval(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, log__every=1, sampling__update_every=5))
    losses: dict[str, list[float]] = {}
    for row in read_rows(run, "losses")[:5]:
        (domain,) = row["domain_losses"]
        losses.setdefault(domain, []).append(row["losses"]["teacher_classification"])
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    first = read_rows(run, "next_weights")[0]
    assert first["step"] == 5
    assert first["next_weights"] == pytest.approx({name: mean / sum(means.values()) for name, mean in means.items()})
    assert sum(first["steps_by_domain"].values()) == 5


def test_the_resolved_config_and_the_label_maps_are_written(run: Path) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["versions"]["python"] == platform.python_version()
    assert saved["optim"]["betas"] == [0.9, 0.999]
    domains = json.loads((run / "domains.json").read_text())
    assert {name: values["num_classes"] for name, values in domains.items()} == {"stripes": 5, "blobs": 3, "noise": 4}
    assert domains["blobs"]["classes"] == [0, 1, 2]


def test_groups_domains_and_changes_are_told(
    make_values: Values, run_train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_train(make_values(tmp_path, optim__lr=0.0, optim__backbone_lr=0.0, train__num_steps=2))
    told, weights = capsys.readouterr().out, load_file(run / "checkpoints" / "step-00000002" / "model.safetensors")
    backbone = sum(weight.numel() for name, weight in weights.items() if name.startswith("udon.backbone."))
    heads = sum(weight.numel() for name, weight in weights.items()) - backbone
    assert "domain stripes: 40 images, 5 classes\n" in told
    assert f"parameter group backbone: {backbone:,} weights, learning rate 0 now\n" in told
    assert f"parameter group heads: {heads:,} weights, learning rate 0 now\n" in told
    results = json.loads((run / "results.json").read_text())
    for name in ("stripes", "blobs", "noise"):
        before = results["baseline"]["untrained"]["domains"][name]["R@1"]
        after = results["splits"]["test"]["merged"]["domains"][name]["R@1"]
        verb = "rose" if after > before else "fell" if after < before else "stayed"
        (line,) = (line for line in told.splitlines() if line.startswith(f"{name}: R@1 "))
        assert line.startswith(f"{name}: R@1 {verb} from {100 * before:.1f} (untrained backbone) to {100 * after:.1f}")
        assert line.endswith("WARNING: worse than before training") == (verb == "fell")


def test_a_run_without_validation_or_test_keeps_its_last_student(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    values = make_values(tmp_path)
    for spec in values["domains"].values():
        spec |= {"validation_split": None, "test_split": None}
    run = run_train(values)
    assert not (run / "results.json").exists()
    kept, last = load_file(run / "checkpoints" / "best" / "model.safetensors"), read_weights(run)
    assert torch.equal(kept["udon.student_head.projection.weight"], last["udon.student_head.projection.weight"])


def test_a_run_may_be_given_in_epochs(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    run = run_train(make_values(tmp_path, train__num_steps=None, train__num_epochs=1))
    steps = math.ceil((40 + 30 + 28) / 16)
    assert (run / "checkpoints" / f"step-{steps:08d}").is_dir()


def test_an_overwritten_run_leaves_nothing_of_the_old_one(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    run = run_train(make_values(tmp_path))
    with pytest.raises(ConfigError, match="holds a run"):
        run_train(make_values(tmp_path))
    run_train(make_values(tmp_path, train__num_steps=2), overwrite=True)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["best", "step-00000002"]


def test_a_loss_that_is_not_finite_stops_the_run(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError,
        match=r"The loss must be finite. Got 5 steps in a row .* for domain '.*' at step 5; their",
    ):
        run_train(make_values(tmp_path, optim__lr=1e38, log__every=1))


def test_tensorboard_gets_the_numbers_of_the_run(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = run_train(make_values(tmp_path, log__trackers=["tensorboard"]))
    reader = accumulator.EventAccumulator(str(run / "udon"))
    reader.Reload()
    written = [(event.step, event.value) for event in reader.Scalars("loss")]
    assert written == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_rows(run, "loss")]
    assert "validation/merged/mean/R@1" in reader.Tags()["scalars"]


def test_dropout_draws_from_seed_step_and_process_alone(tiny_config: Callable[..., Path]) -> None:
    config = load_config(tiny_config())
    with RunFolder(config) as folder:
        trainer = Trainer(build_run(config, folder, StopSignals()))
        trainer.run.model.train()
        batch = next(iter(trainer.batches()))
        torch.manual_seed(99)
        trainer.train_step(batch)
        first = torch.rand(3)
        torch.manual_seed(7)
        trainer.train_step(batch)
    assert torch.equal(first, torch.rand(3))
