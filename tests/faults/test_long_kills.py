"""Fifty kills at random moments, in one process and in two; each followed by `--resume` to the end."""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hurt import die

from modeling_udon.training import validation as assessment
from modeling_udon.training.checkpoint import CheckpointWriter
from modeling_udon.training.trainer import Trainer
from modeling_udon.training.validation import Assessment

NUM_KILLS = 50
STAGES = ("start", "step", "validation", "best", "checkpoint", "end")
# What the other process says.
SILENT = "error: another process of this run has ended or gone silent"
# Function calls between two notes of where a run is.
EVERY = 100


class Clock:
    """Counts the function calls of a process: a time that does not depend on how busy the machine is.

    Args:
        stage: Where the process is, a shared number of `STAGES`, which outlives it.
        deadline: Call at which the process kills itself; 0 for never.
    """

    def __init__(self, stage: Any, deadline: int = 0) -> None:
        self.notes: list[int] = []
        self._calls = 0
        self._stage = stage
        self._deadline = deadline

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        self._calls += 1
        if self._calls == self._deadline:
            die()
        if self._calls % EVERY == 0:
            self.notes.append(self._stage.value)

    def start(self) -> None:
        self._enter(Trainer, "catch_up", "start", then="step")
        self._enter(assessment.Assessment, "validate", "validation")
        self._enter(Assessment, "keep_best", "best")
        self._enter(CheckpointWriter, "save", "checkpoint")
        self._enter(Trainer, "finish", "end", then="end")
        # A worker has a life of its own.
        os.register_at_fork(after_in_child=lambda: sys.setprofile(None))
        sys.setprofile(self)

    def _enter(self, owner: Any, name: str, stage: str, then: str | None = None) -> None:
        function = getattr(owner, name)

        def run(*values: Any, **options: Any) -> Any:
            before, self._stage.value = self._stage.value, STAGES.index(stage)
            result = function(*values, **options)
            self._stage.value = before if then is None else STAGES.index(then)
            return result

        setattr(owner, name, run)


def end_as_launchers_do(hurt: Any) -> None:
    """Gives processes half a minute to end by themselves, as torchrun and accelerate do once one of theirs has died."""
    deadline = time.monotonic() + 30
    for process in hurt.processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hurt.send(signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("num_processes", [1, 2])
def test_fifty_kills_at_random_moments_lose_nothing(
    num_processes: int,
    make_whole: Callable[..., Any],
    make_values: Callable[..., dict[str, Any]],
    write: Any,
    start: Any,
    tmp_path: Path,
    tell: Callable[..., None],
) -> None:
    changes = {"train__keep_checkpoints": 1, "data__num_workers": 1, "seed": 5}
    whole = make_whole(num_processes=num_processes, **changes)
    context = multiprocessing.get_context("fork")
    # Of each process. Without a lock, which a killed one could not let go.
    stages = [context.RawValue("i", 0) for _ in range(num_processes)]
    notes = [context.SimpleQueue() for _ in range(num_processes)]

    def count(rank: int) -> None:
        clock = Clock(stages[rank])
        util.Finalize(None, lambda: (sys.setprofile(None), notes[rank].put(clock.notes)), exitpriority=100)
        clock.start()

    counted = start(write(make_values(tmp_path / "counted", **changes)), num_processes=num_processes, before=count)
    passed = [np.asarray(queue.get()) for queue in notes]
    assert counted.wait() == [0] * num_processes

    rng, killed, lost = np.random.default_rng(num_processes), Counter[str](), []
    for number in range(NUM_KILLS):
        round_, wanted = divmod(number, len(STAGES))
        victim = round_ % num_processes
        moment = int(rng.choice(np.flatnonzero(passed[victim] == wanted))) * EVERY + int(rng.integers(1, EVERY + 1))
        config = write(make_values(tmp_path / f"{number}", **changes))
        stages[victim].value = 0
        clock = Clock(stages[victim], moment)
        hurt = start(
            config,
            num_processes=num_processes,
            before=lambda rank, victim=victim, clock=clock: clock.start() if rank == victim else None,
        )
        hurt.processes[victim].join()
        died = time.monotonic()
        stage = STAGES[stages[victim].value]
        if stage == "start":
            # Who waits for a process that has not been heard of cannot tell a dead one from a slow one; launchers can.
            end_as_launchers_do(hurt)
        codes = hurt.wait()
        assert time.monotonic() - died < 60, "the other process hangs"
        killed["ended before" if codes[victim] == 0 else f"in: {stage}"] += 1
        assert codes.pop(victim) in (0, 128 + signal.SIGKILL), hurt.said()
        # It may have been through with everything.
        ended = {0, 1, 128 + signal.SIGKILL} if stage == "start" else {0, 1}
        assert set(codes) <= ended and hurt.said().count(SILENT) == codes.count(1), hurt.said()
        assert "Traceback" not in hurt.said(), hurt.said()
        resumed = start(config, "--resume", num_processes=num_processes)
        assert resumed.wait() == [0] * num_processes, (moment, resumed.said())
        try:
            whole.compare(config.parent / "run")
        except AssertionError as error:
            lost.append((stage, moment, str(error)[:500]))
    where = ", ".join(f"{count} {name.removeprefix('in: ')}" for name, count in sorted(killed.items()))
    whom = "of one process" if num_processes == 1 else "of either of two processes"
    tell(f"kill -9 at a random moment {whom}: {where}", NUM_KILLS, len(lost))
    assert lost == []
    assert killed["ended before"] <= NUM_KILLS // 10
