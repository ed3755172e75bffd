"""Samplers by what a domain can still learn, in runs: resumed, on two processes, refused where something lacks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}
OFTEN = {"sampling__update_every": 3, "eval__every": 2}
KINDS = {
    "learning_progress": {"sampling__strategy": "learning_progress", "sampling__images_per_class": 2},
    "validation_gain": {"sampling__strategy": "validation_gain"},
    "excess_loss": {"sampling__strategy": "excess_loss", "sampling__reference": {"stripes": 1, "blobs": 2, "noise": 0}},
    "loss_over_log_c": {"sampling__strategy": "loss_over_log_c", "sampling__images_per_class": 1},
}


def read_rows(run: Path, key: str) -> list[dict[str, Any]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if key in row]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_run_by_what_can_be_learned_goes_on_bit_for_bit(
    make_values: Values, run_train: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run_train(make_values(tmp_path / "whole", **changes, **OFTEN))
    weights = [row["next_weights"] for row in read_rows(whole, "next_weights")]
    assert any(max(row.values()) - min(row.values()) > 0.01 for row in weights)
    assert all(min(row.values()) >= 0.2 / 3 - 1e-9 for row in weights)
    again = tmp_path / "again"
    shutil.copytree(whole.parent, again)
    for folder in sorted((again / "run" / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(folder)
    run_train(make_values(again, **changes, **OFTEN), resume=True)
    for name, value in last_weights(whole).items():
        assert torch.equal(value, last_weights(again / "run")[name]), name
    assert read_rows(again / "run", "next_weights") == read_rows(whole, "next_weights")


def test_two_processes_go_by_the_same_gains_and_classes(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    changes = STEADY | OFTEN | KINDS["validation_gain"] | {"sampling__images_per_class": 2}
    one = run_train(make_values(tmp_path / "one", **changes))
    two = run_two_processes(make_values(tmp_path / "two", **changes))
    for expected, values in zip(read_rows(one, "next_weights"), read_rows(two, "next_weights"), strict=True):
        assert values["next_weights"] == pytest.approx(expected["next_weights"])
    for name, value in last_weights(one).items():
        torch.testing.assert_close(last_weights(two)[name], value, rtol=1e-5, atol=1e-5)


def test_a_run_is_a_reference_by_its_last_interval(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    reference = run_train(make_values(tmp_path / "reference", system="uscrr"))
    told = read_rows(reference, "signal_losses")
    assert set(told[-1]["signal_losses"]) == {"stripes", "blobs", "noise"}
    changes = {"sampling__strategy": "excess_loss", "ablation__signal": "student"}
    run = run_train(make_values(tmp_path / "run", **changes, sampling__reference=str(reference)))
    first = read_rows(run, "next_weights")[0]
    excess = {name: max(0.0, loss - told[-1]["signal_losses"][name]) for name, loss in first["signal_losses"].items()}
    for name, weight in first["next_weights"].items():
        assert weight == pytest.approx(0.8 * excess[name] / sum(excess.values()) + 0.2 / 3)
    with pytest.raises(ConfigError, match=r"`sampling\.reference` must be a run that lasted an interval"):
        run_train(make_values(tmp_path / "other", **changes, sampling__reference=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling__strategy": "excess_loss"}, "`reference` must be given for strategy 'excess_loss'"),
        ({"sampling__reference": {"blobs": 1}}, "`reference` must be given for strategy 'excess_loss'"),
    ],
)
def test_a_reference_goes_with_its_strategy(
    tiny_config: Callable[..., Path], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(tiny_config(**changes))
    assert words in str(refused.value)


def test_what_a_strategy_goes_by_must_be_there(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    values = make_values(tmp_path, sampling__strategy="excess_loss", sampling__reference={"blobs": 1})
    with pytest.raises(ConfigError, match=r"`sampling\.reference` must have a loss of each of stripes, blobs, noise"):
        run_train(values)
    values = make_values(tmp_path, sampling__strategy="validation_gain")
    values["domains"]["stripes"]["validation_split"] = None
    with pytest.raises(ConfigError, match="must have a validation split of every domain. Got none of stripes"):
        run_train(values)
