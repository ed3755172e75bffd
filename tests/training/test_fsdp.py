"""A backbone in shards on two processes: the numbers, checkpoints and student are those of one whole process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModel

from modeling_udon.data.dataset import DomainBatch
from modeling_udon.training.step import StepResult
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Any]

# No dropout, which processes draw for themselves, and an `eps` under which rounding does not move weights (see
# `test_processes.py`); the norm is one that most steps exceed.
STEADY = {
    "model__backbone_config__hidden_dropout_prob": 0.0,
    "model__backbone_config__num_hidden_layers": 2,
    "optim__eps": 1e-4,
    "optim__max_grad_norm": 0.5,
    "log__every": 1,
}
SHARDS = STEADY | {"train__shard_backbone": True}


def read_losses(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["losses"] | {"loss": row["loss"]} for row in rows if "losses" in row]


def assert_close_files(one: Path, other: Path) -> None:
    expected, values = load_file(one), load_file(other)
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(values[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    return run_train(make_values(tmp_path_factory.mktemp("whole"), **STEADY))


@pytest.fixture(scope="module")
def sharded(make_values: Values, run_two_processes: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes that are killed at step 5 and go on; each writes down what it holds of the backbone."""
    values = make_values(tmp_path_factory.mktemp("sharded"), **SHARDS)
    train_step = Trainer.train_step

    def telling_step(self: Trainer, batch: DomainBatch) -> StepResult:
        held = {"backbone": 0, "moments": 0, "whole": 0}
        losses = train_step(self, batch)
        for parameter in self.run.model.udon.backbone.parameters():
            held["whole"] += parameter.numel()
            held["backbone"] += parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
            held["moments"] += self.run.optimizer.state[parameter]["exp_avg"].to_local().numel()
        path = self.run.config.run_dir / f"held-{self.run.accelerator.process_index}.json"
        path.write_text(json.dumps(held))
        return losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", telling_step)
        run_two_processes(values, stop_at=5)
        return run_two_processes(values, resume=True)


def test_killed_and_resumed_shards_give_the_losses_and_weights_of_one_process(whole: Path, sharded: Path) -> None:
    pairs = list(zip(read_losses(whole), read_losses(sharded), strict=True))
    assert len(pairs) == 11
    for expected, values in pairs:
        assert values == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert_close_files(*(run / "checkpoints" / "step-00000011" / name for run in (whole, sharded)))


def test_each_process_holds_about_half_of_the_backbone_and_its_moments(sharded: Path) -> None:
    for rank in (0, 1):
        held = json.loads((sharded / f"held-{rank}.json").read_text())
        # A first dimension of 1 cannot be halved: the class token and the positions lie with the first process.
        assert held["backbone"] == held["moments"]
        assert held["backbone"] == pytest.approx(held["whole"] / 2, rel=0.05)


def test_the_student_of_a_sharded_run_is_published_whole(whole: Path, sharded: Path) -> None:
    students = [AutoModel.from_pretrained(run / "best", trust_remote_code=True) for run in (whole, sharded)]
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, embeds = (student.eval()(pixels).image_embeds for student in students)
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    scores = [json.loads((run / "results.json").read_text()) for run in (whole, sharded)]
    assert scores[0]["splits"] == scores[1]["splits"]


def test_one_process_goes_on_from_the_shards_of_two(
    whole: Path, make_values: Values, run_two_processes: Run, run_train: Run, tmp_path: Path
) -> None:
    run_two_processes(make_values(tmp_path, **SHARDS, train__accumulation_steps=2), stop_at=8)
    values = make_values(tmp_path, **STEADY, train__accumulation_steps=2)
    run = run_train(values, resume=True, allow=["processes"])
    assert_close_files(*(path / "checkpoints" / "step-00000011" / "model.safetensors" for path in (whole, run)))
