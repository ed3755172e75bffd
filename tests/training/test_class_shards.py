"""Prototypes in shards of classes: training as on one process, resuming with another number, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training import sharing
from modeling_udon.training.distillation import UdonForDistillation

# Domains of 5, 3 and 4 classes: on four processes some have one class, some two, some none.
SHARDED = {
    "train__shard_prototypes": True,
    "model__backbone_config__hidden_dropout_prob": 0.0,
    "optim__eps": 1e-4,
    "log__every": 1,
    "loss__kind": "arcface",
    "loss__margin": 0.2,
    "loss__label_smoothing": 0.1,
    "optim__max_grad_norm": 0.5,
    "model__matryoshka": [4],
}


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def tensors(run: Path, step: int = 11) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


def assert_same(found: Path, expected: Path) -> None:
    assert losses(found) == pytest.approx(losses(expected), rel=1e-5)
    wanted, now = tensors(expected), tensors(found)
    assert now.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(now[name], value, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def alone(make_values, run_train, tmp_path_factory):
    return run_train(make_values(tmp_path_factory.mktemp("alone"), **SHARDED))


@pytest.mark.parametrize("num_processes", [2, 4])
def test_shards_on_several_processes_train_as_one_process_does(
    make_values, run_two_processes, alone, tmp_path, num_processes
):
    assert_same(run_two_processes(make_values(tmp_path, **SHARDED), num_processes=num_processes), alone)


def test_parts_chunks_and_a_student_that_stops_distillation_go_with_shards(
    make_values, run_train, run_two_processes, tmp_path
):
    changes = SHARDED | {"loss__chunk_size": 1, "ablation__distill_through_backbone": False, "loss__subcenters": 2}
    one = run_train(make_values(tmp_path / "one", **changes))
    assert_same(run_two_processes(make_values(tmp_path / "two", **changes, train__accumulation_steps=2)), one)


def test_a_killed_run_with_shards_goes_on_and_with_another_number_of_processes(
    make_values, run_train, run_two_processes, alone, tmp_path
):
    values = make_values(tmp_path, **SHARDED)
    run_two_processes(values, stop_at=7)
    again = run_two_processes(values, resume=True)
    assert_same(again, alone)
    for folder in sorted((again / "checkpoints").glob("step-*"))[2:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert_same(run_train(values, resume=True, allow=["processes"]), alone)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss__sampled_classes": 20}, "loss.sampled_classes"),
        ({"system": "ujcrr"}, "loss.classifier 'joint'"),
        ({"loss__gate": "per_image"}, "loss.gate"),
        ({"loss__scale_by": "adacos"}, "loss.scale_by 'adacos'"),
        ({"train__mixed_precision": "fp16"}, "train.mixed_precision 'fp16'"),
        ({"train__shard_backbone": True}, "train.shard_backbone"),
    ],
)
def test_what_does_not_go_with_shards_is_refused(
    tiny_config: Callable[..., Path], changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"`train.shard_prototypes` must go without {named}"):
        load_config(tiny_config(train__shard_prototypes=True, **changes))


def test_prototypes_are_cut_before_they_move_so_that_no_device_holds_all_whole(monkeypatch, tiny_config):
    config, done = load_config(tiny_config(train__shard_prototypes=True)), []
    backbone = config.model.backbone_config
    model = UdonForDistillation(UdonConfig(backbone_config=backbone, domains={"a": 5, "b": 3}))
    monkeypatch.setattr(sharing, "shard_prototypes", lambda prototypes, *others: done.append(len(prototypes)))
    monkeypatch.setattr(sharing, "_without_gradient", lambda *arguments: [])
    monkeypatch.setattr(model, "to", lambda device: done.append("moved") or model)
    accelerator = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), prepare_model=lambda model, evaluation_mode: model
    )
    sharing.share_model(config, model, accelerator)
    assert done[:3] == [2, 2, "moved"]
