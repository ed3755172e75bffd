"""Twenty thousand steps with validations and checkpoints: what a process holds and a step takes stays as it is."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modeling_udon.training.trainer import Trainer

NUM_STEPS = 20_000
# Steps between two looks at the process.
EVERY = 100
# A step's on the processor and by the clock, and that of the same work each time.
TIMES = ("step", "wall", "yardstick")
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_yardstick() -> Callable[[], None]:
    """Work that is always the same and of a step's kind: how long it takes shows how busy the machine is."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(8)))
    values = torch.ones(16, 16)

    def work() -> None:
        layers.zero_grad()
        layers(values).sum().backward()

    return work


def sampling(path: Path) -> Callable[[int], None]:
    """Writes down every hundred steps what the process holds, and how long each step and the yardstick took."""

    def patch(rank: int) -> None:
        train_step, yardstick, times = Trainer.train_step, make_yardstick(), []

        def noted(self: Trainer, batch: Any) -> Any:
            times.append((time.thread_time(), time.perf_counter()))
            yardstick()
            times.append((time.thread_time(), time.perf_counter()))
            if len(times) > 2 * EVERY + 1:
                # Yardstick, step, yardstick, step, ...
                processor, wall = np.diff(times[:-1], axis=0).T
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
                held = {"memory": resident, "files": len(os.listdir("/proc/self/fd"))}
                held |= {"threads": len(os.listdir("/proc/self/task")), "step": processor[1::2].tolist()}
                held |= {"yardstick": processor[::2].tolist(), "wall": wall[1::2].tolist()}
                with path.open("a") as file:
                    file.write(json.dumps(held) + "\n")
                del times[:-2]
            return train_step(self, batch)

        Trainer.train_step = noted

    return patch


@pytest.mark.long
def test_memory_files_threads_and_step_time_stay_flat_over_twenty_thousand_steps(
    make_values: Callable[..., dict[str, Any]], write: Any, start: Any, tmp_path: Path, tell: Callable[..., None]
) -> None:
    changes = {"train__num_steps": NUM_STEPS, "train__batch_size": 4, "train__checkpoint_every": 500}
    changes |= {"eval__every": 1000, "log__every": 50, "sampling__update_every": 250, "data__num_workers": 1}
    changes |= {"optim__skip_spikes": 50.0, "train__keep_checkpoints": 2, "optim__lr": 1e-3}
    soak = start(write(make_values(tmp_path, **changes)), before=sampling(tmp_path / "held.jsonl"))
    assert soak.wait(timeout=7200) == [0], soak.said()[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    held = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    assert len(rows) == NUM_STEPS // EVERY - 1
    tenth = NUM_STEPS // EVERY // 10
    second, last = slice(tenth, 2 * tenth), slice(-tenth, None)
    steps = np.arange(tenth, len(rows)) * EVERY
    slopes = {name: np.polyfit(steps, held[name][tenth:], 1)[0] * 1000 for name in ("memory", "files", "threads")}
    # What else the machine does only adds to a step: the fastest tenth of them shows what a step itself takes, most of
    # all beside the yardstick's.
    floor = {name: [np.quantile(held[name][part], 0.1) for part in (second, last)] for name in TIMES}
    slower = {name: after / before - 1 for name, (before, after) in floor.items()}
    by_yardstick = (1 + slower["step"]) / (1 + slower["yardstick"]) - 1
    memory = f"{slopes['memory'] / 1024:.1f} KiB to {held['memory'][-1] / 2**20:.0f} MiB of memory"
    adds = f"a thousand steps add {memory}, {slopes['files']:.3f} files, {slopes['threads']:.3f} threads"
    takes = f"{100 * slower['step']:+.1f} % of {1000 * floor['step'][0]:.2f} ms of the processor"
    takes += f" and {100 * slower['wall']:+.1f} % of the time more than of the second"
    takes += f", {100 * by_yardstick:+.1f} % by work that is always the same"
    tell(f"soak of {NUM_STEPS} steps: {adds}; a step of the last tenth takes {takes}", 1, 0)
    assert np.median(held["memory"][last]) <= 1.02 * np.median(held["memory"][second])
    for name in ("files", "threads"):
        assert held[name][last].max() <= held[name][second].max()
    assert by_yardstick <= 0.03
