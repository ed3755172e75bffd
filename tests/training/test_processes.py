"""Processes and accumulated parts share a batch; the numbers are those of the whole batch in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Any]

# Dropout draws for each process and each part anew, so it is left out where their numbers are compared.
# Attention does not depend on the bias of its keys, whose gradient is rounding alone: at AdamW's usual `eps` of 1e-8
# it would move all the same, elsewhere in each run.
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}


def read_losses(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["losses"] | {"loss": row["loss"]} for row in rows if "losses" in row]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


def assert_close_runs(one: Path, other: Path) -> None:
    pairs = list(zip(read_losses(one), read_losses(other), strict=True))
    assert len(pairs) == 11
    for expected, values in pairs:
        assert values == pytest.approx(expected, abs=1e-5, rel=1e-5)
        assert values.get("relational_distillation", 1) > 0
    other_weights = read_weights(other)
    for name, weight in read_weights(one).items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def whole(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, one part."""
    return run_train(make_values(tmp_path_factory.mktemp("whole"), **STEADY))


def test_two_launched_processes_give_the_losses_and_weights_of_one(
    whole: Path, make_values: Values, run_script: Run, tmp_path: Path
) -> None:
    run_script(make_values(tmp_path, **STEADY), num_processes=2)
    assert_close_runs(whole, tmp_path / "run")
    scores = [json.loads((run / "results.json").read_text()) for run in (whole, tmp_path / "run")]
    assert scores[0]["splits"] == scores[1]["splits"]
    assert scores[0]["baseline"] == scores[1]["baseline"]


def test_two_processes_of_two_parts_each_give_the_losses_and_weights_of_one(
    whole: Path, make_values: Values, run_two_processes: Run, tmp_path: Path
) -> None:
    assert_close_runs(whole, run_two_processes(make_values(tmp_path, **STEADY, train__accumulation_steps=2)))


def test_a_batch_in_four_parts_gives_the_losses_and_weights_of_the_whole(
    whole: Path, make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    assert_close_runs(whole, run_train(make_values(tmp_path, **STEADY, train__accumulation_steps=4)))


def test_parts_equal_the_whole_where_distillation_stops_at_the_backbone(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    changes = STEADY | {"ablation__distill_through_backbone": False}
    whole = run_train(make_values(tmp_path / "whole", **changes))
    assert_close_runs(whole, run_train(make_values(tmp_path / "parts", **changes, train__accumulation_steps=2)))


def test_two_processes_train_the_joint_classifier_as_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    one = run_train(make_values(tmp_path / "one", **STEADY, system="ujcds"))
    assert_close_runs(one, run_two_processes(make_values(tmp_path / "two", **STEADY, system="ujcds")))


def test_two_processes_of_two_parts_learn_from_frozen_teachers_as_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    teacher = run_train(make_values(tmp_path / "teacher", **STEADY, system="shared_teacher"))
    changes = STEADY | {"system": "separate_teachers", "teachers": str(teacher)}
    one = run_train(make_values(tmp_path / "one", **changes))
    changes |= {"train__accumulation_steps": 2}
    assert_close_runs(one, run_two_processes(make_values(tmp_path / "two", **changes)))
