"""Twenty thousand steps with validations and checkpoints: what a process holds stays as it is."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeling_udon.training.trainer import Trainer

NUM_STEPS = 20_000
PAGE = os.sysconf("SC_PAGE_SIZE")


def sampling(path: Path) -> Callable[[int], None]:
    """Writes down every hundred steps what the process holds, and the time that its steps have taken."""

    def patch(rank: int) -> None:
        train_step, busy, wall = Trainer.train_step, [0.0], [0.0]

        def timed(self: Trainer, batch: Any) -> Any:
            began, started = time.thread_time(), time.perf_counter()
            result = train_step(self, batch)
            busy[0] += time.thread_time() - began
            wall[0] += time.perf_counter() - started
            if self.step % 100 == 99:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
                held = {"memory": resident, "files": len(os.listdir("/proc/self/fd"))}
                held |= {"threads": threading.active_count(), "processor": busy[0], "wall": wall[0]}
                with path.open("a") as file:
                    file.write(json.dumps(held) + "\n")
                busy[0] = wall[0] = 0.0
            return result

        Trainer.train_step = timed

    return patch


@pytest.mark.long
def test_memory_files_and_threads_stay_flat_over_twenty_thousand_steps(
    make_values: Callable[..., dict[str, Any]], write: Any, start: Any, tmp_path: Path, tell: Callable[..., None]
) -> None:
    changes = {"train__num_steps": NUM_STEPS, "train__batch_size": 4, "train__checkpoint_every": 500}
    changes |= {"eval__every": 1000, "log__every": 50, "sampling__update_every": 250, "data__num_workers": 1}
    changes |= {"optim__skip_spikes": 50.0, "train__keep_checkpoints": 2, "optim__lr": 1e-3}
    soak = start(write(make_values(tmp_path, **changes)), before=sampling(tmp_path / "held.jsonl"))
    assert soak.wait(timeout=7200) == [0], soak.said()[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text().splitlines()]
    held = {name: np.asarray([row[name] for row in rows], dtype=float) for name in rows[0]}
    assert len(rows) == NUM_STEPS // 100
    tenth = len(rows) // 10
    second, last = slice(tenth, 2 * tenth), slice(-tenth, None)
    steps = np.arange(tenth, len(rows)) * 100
    slopes = {name: np.polyfit(steps, held[name][tenth:], 1)[0] * 1000 for name in ("memory", "files", "threads")}
    middle = {name: (np.median(held[name][last]), np.median(held[name][second])) for name in ("processor", "wall")}
    slower = {name: now / then - 1 for name, (now, then) in middle.items()}
    memory = f"{slopes['memory'] / 1024:.1f} kB to {held['memory'][-1] / 2**20:.0f} MiB of memory"
    adds = f"a thousand steps add {memory}, {slopes['files']:.3f} files, {slopes['threads']:.3f} threads"
    takes = f"{100 * slower['processor']:+.1f} % processor time, {100 * slower['wall']:+.1f} % time"
    tell(f"soak of {NUM_STEPS} steps: {adds}; steps of the last tenth against the second's: {takes}", 1, 0)
    assert np.median(held["memory"][last]) <= 1.02 * np.median(held["memory"][second])
    # By the processor's time: what else the machine does is no fault of the run's.
    assert slower["processor"] <= 0.03
    for name in ("files", "threads"):
        assert held[name][last].max() <= held[name][second].max()
