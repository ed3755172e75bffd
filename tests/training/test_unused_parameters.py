"""Parameters that no step gives a gradient: two processes train on, and as one process does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeling_udon.systems import SYSTEMS

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

SHORT = {"train__num_steps": 3, "log__every": 1, "optim__eps": 1e-4, "optim__frozen_fraction": 0.0}
SIZES = {"image_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BACKBONES: dict[str, dict[str, Any]] = {
    "dinov2": {"model_type": "dinov2", "patch_size": 8, "mlp_ratio": 2, **SIZES},
    "dinov3": {
        "model_type": "dinov3_vit",
        "patch_size": 8,
        "intermediate_size": 32,
        "pos_embed_rescale": None,
        **SIZES,
    },
}


def without_evaluation(values: dict[str, Any]) -> dict[str, Any]:
    for spec in values["domains"].values():
        spec |= {"validation_split": None, "test_split": None}
    return values


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_with_a_mask_token_trains_in_two_processes_as_in_one(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, kind: str
) -> None:
    def values(name: str) -> dict[str, Any]:
        made = without_evaluation(make_values(tmp_path, **SHORT, name=name))
        made["model"]["backbone_config"] = BACKBONES[kind]
        return made

    one, two = run_train(values("one")), run_two_processes(values("two"))
    assert len(losses(one)) == 3 and losses(two) == pytest.approx(losses(one), rel=1e-4)


# Those that look at domains without labels have a test of their own, in test_adaptation.py.
LABELLED = [name for name, values in SYSTEMS.items() if "adaptation" not in values and name != "separate_teachers"]


@pytest.mark.parametrize("system", LABELLED)
def test_every_system_trains_in_two_processes_as_in_one(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path, system: str
) -> None:
    steady = SHORT | {"model__backbone_config__hidden_dropout_prob": 0.0, "system": system}
    one, two = (
        run(without_evaluation(make_values(tmp_path, **steady, name=name)))
        for run, name in ((run_train, "one"), (run_two_processes, "two"))
    )
    assert len(losses(one)) == 3 and losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_student_of_trained_teachers_trains_in_two_processes(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    teacher = run_train(without_evaluation(make_values(tmp_path, **SHORT, system="shared_teacher", name="teacher")))
    values = make_values(tmp_path, **SHORT, system="separate_teachers", teachers=str(teacher))
    assert len(losses(run_two_processes(without_evaluation(values)))) == 3
