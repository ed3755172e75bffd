"""A step whose loss or gradient is not finite, or whose gradient is a spike, is not applied, and is written down."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hurt import Whole, at, die, read_outcome
from safetensors.torch import load_file

from modeling_udon.config import OptimConfig
from modeling_udon.data import dataset
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.skipped import StepGuard, Verdict
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]


def poison(*steps: int, factor: float = float("nan"), ranks: tuple[int, ...] = (0, 1)) -> Callable[[int], None]:
    """Multiplies the loss of some steps, counted from 0, in some processes."""

    def patch(rank: int) -> None:
        forward, train_step, now = UdonForDistillation.forward, Trainer.train_step, [0]

        def noted(self: Trainer, batch: Any) -> torch.Tensor:
            now[0] = self.step
            return train_step(self, batch)

        def poisoned(self: UdonForDistillation, *values: Any, **options: Any) -> Any:
            output = forward(self, *values, **options)
            if now[0] in steps and rank in ranks:
                output.loss = output.loss * factor
            return output

        Trainer.train_step, UdonForDistillation.forward = noted, poisoned

    return patch


def weights_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def test_one_process_with_a_loss_that_is_not_finite_keeps_both_from_the_step(
    make_values: Values, write: Any, start: Any, tmp_path: Path
) -> None:
    changes = {"train__checkpoint_every": 1, "ablation__idle_heads": "hold", "train__num_steps": 7, "log__every": 1}
    config = write(make_values(tmp_path, **changes))
    assert start(config, num_processes=2, before=poison(4, ranks=(1,))).wait() == [0, 0]
    run = tmp_path / "run"
    before, after, later = (weights_at(run, step) for step in (4, 6, 7))
    assert not (run / "checkpoints" / "step-00000005").exists(), "the checkpoint before is worth more"
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in later.values())
    (path,) = (run / "incidents").iterdir()
    told = json.loads(path.read_text())
    assert (told["step"], told["kind"], told["losses"]["loss"]) == (4, "not_finite", "nan")
    assert len(told["rows"]) == 16 == len(told["paths"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row.get("skipped")] == [5]


def test_a_step_that_is_left_out_changes_no_weight_and_no_moment(
    make_values: Values, write: Any, start: Any, tmp_path: Path
) -> None:
    changes = {"train__checkpoint_every": 1, "ablation__idle_heads": "hold", "train__num_steps": 6}
    changes |= {"optim__skip_spikes": 2.0, "sampling__update_every": 100, "train__num_steps": 36}
    config = write(make_values(tmp_path, **changes, train__keep_checkpoints=99))
    assert start(config, before=poison(33, factor=1e6)).wait() == [0]
    run = tmp_path / "run"
    for name in ("model", "optimizer"):
        before, after, later = (
            load_file(run / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors") for step in (33, 34, 35)
        )
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert not all(torch.equal(after[key], later[key]) for key in after)
    told = json.loads((run / "incidents" / "step-00000033.json").read_text())
    assert told["kind"] == "spike" and told["gradient_norm"] > 1e4


def test_the_batch_that_is_written_down_is_the_one_that_was_trained_on(
    make_values: Values, write: Any, start: Any, tmp_path: Path
) -> None:

    def note_rows(rank: int) -> None:
        try_images = dataset._try_images

        def noting(images: Any, rows: np.ndarray, name: str, split: str) -> Any:
            if split == "train":
                with (tmp_path / "read.txt").open("a") as file:
                    file.write(json.dumps([name, rows.tolist()]) + "\n")
            return try_images(images, rows, name, split)

        dataset._try_images = noting
        poison(6)(rank)

    assert start(write(make_values(tmp_path)), before=note_rows).wait() == [0]
    told = json.loads((tmp_path / "run" / "incidents" / "step-00000006.json").read_text())
    read = [json.loads(line) for line in (tmp_path / "read.txt").read_text().splitlines()]
    assert [told["domain"], told["rows"]] == read[6]


def test_a_run_with_steps_left_out_that_is_killed_goes_on_bit_for_bit(
    make_values: Values, write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    changes = {"optim__skip_spikes": 1.5, "train__max_nonfinite": 2}
    bad = poison(2, 4, 7)
    whole = write(make_values(tmp_path / "whole", **changes))
    assert start(whole, before=bad).wait() == [0]
    config = write(make_values(tmp_path / "killed", **changes))

    def both(rank: int) -> None:
        bad(rank)
        at(Trainer, "train_step", 6, die)(rank)

    assert start(config, "--resume", before=both).wait() == [128 + signal.SIGKILL]
    assert start(config, "--resume", before=bad).wait() == [0]
    Whole(changes, read_outcome(tmp_path / "whole" / "run")).compare(tmp_path / "killed" / "run")
    incidents = [
        sorted(p.name for p in (tmp_path / name / "run" / "incidents").iterdir()) for name in ("whole", "killed")
    ]
    assert incidents[0] == incidents[1] and len(incidents[0]) == 3
    tell("steps whose loss is not finite, in a run that is killed between them", len(incidents[0]), 0)


def test_losses_that_stay_infinite_end_the_run_with_the_state_before_them(
    make_values: Values, write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    changes = {"train__max_nonfinite": 3, "log__every": 1}
    config = write(make_values(tmp_path, **changes))
    ended = start(config, before=poison(*range(4, 99)))
    assert ended.wait() == [1]
    assert "error: The loss must be finite. Got 3 steps in a row where it or its gradient was not" in ended.said()
    assert "Traceback" not in ended.said()
    assert sorted(p.name for p in (tmp_path / "run" / "incidents").iterdir()) == [
        f"step-{step:08d}.json" for step in (4, 5, 6)
    ]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-00000003"]
    assert start(config, "--resume", "--resume-allow", "lr", "--optim.lr", "1e-4").wait() == [0]
    tell("losses that stay infinite: the run ends, and goes on with another learning rate", 1, 0)


def make_guard(factor: float | None) -> tuple[StepGuard, torch.nn.Parameter, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    return StepGuard(OptimConfig(skip_spikes=factor), optimizer, ["a", "b"], scaled=False), weight, optimizer


def test_a_spike_is_measured_by_the_running_norm_of_its_own_domain() -> None:
    guard, weight, _ = make_guard(3.0)
    good = torch.tensor(0.0)

    def judge(domain: str, norm: float) -> Verdict:
        weight.grad = torch.tensor([norm, 0.0])
        return Verdict(int(guard.judge(domain, good)[0]))

    norms = [1.0, 2.0] * 5
    assert [judge("a", norm) for norm in norms] == [Verdict.APPLIED] * 10
    assert judge("b", 1000.0) == Verdict.APPLIED  # Nothing is known of it yet.
    shares = [0.99 ** (9 - i) for i in range(10)]
    mean = sum(share * norm for share, norm in zip(shares, norms, strict=True)) / sum(shares)
    copy, other, _ = make_guard(3.0)
    copy.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert judge("a", 3 * mean + 0.01) == Verdict.SPIKE
    other.grad = torch.tensor([3 * mean - 0.01, 0.0])
    assert copy.judge("a", good)[0] == Verdict.APPLIED
    # A lasting change is followed.
    assert judge("a", 9.0) == Verdict.SPIKE
    verdicts = [judge("a", 9.0) for _ in range(100)]
    assert verdicts[-1] == Verdict.APPLIED


@pytest.mark.parametrize(("gradient", "faulty"), [(float("inf"), 0.0), (float("nan"), 0.0), (1.0, 1.0)])
def test_adamw_leaves_out_a_step_that_is_not_finite(gradient: float, faulty: float) -> None:
    guard, weight, optimizer = make_guard(None)
    weight.grad = torch.tensor([1.0, 1.0])
    guard.judge("a", torch.tensor(0.0))
    optimizer.step()
    before = weight.detach().clone(), {key: value.clone() for key, value in optimizer.state[weight].items()}
    weight.grad = torch.tensor([gradient, 1.0])
    assert guard.judge("a", torch.tensor(faulty))[0] == Verdict.NOT_FINITE
    optimizer.step()
    assert torch.equal(weight, before[0])
    assert all(torch.equal(value, before[1][key]) for key, value in optimizer.state[weight].items())
