"""Runs of `train_udon.py` in processes of their own that can be hurt: forks, which are there at once."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from huggingface_hub.utils import tqdm as hub_tqdm
from hurt import Whole, read_outcome
from tqdm import tqdm

import train_udon

# tqdm's own lock is one for all forks of a process: a run that is killed while it holds it would stop all later ones.
# Runs that a shell starts share none.
for kind_of_bar in (tqdm, hub_tqdm):
    kind_of_bar.set_lock(threading.RLock())

# A crowded machine may be slow; nothing here is known to hang.
PATIENCE = 300


@dataclass
class Running:
    """A run in one or more processes."""

    processes: Sequence[multiprocessing.Process]
    log: Path

    def send(self, number: int) -> None:
        """Sends a signal to the whole group of every process, as a terminal or a cluster does."""
        for process in self.processes:
            if process.is_alive():
                os.killpg(process.pid, number)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Returns the exit codes, as a shell shows them; a process that hangs is killed, and fails the test."""
        for process in self.processes:
            process.join(timeout)
            if process.exitcode is None:
                self.send(signal.SIGKILL)
                pytest.fail(f"a process hangs; it said:\n{self.said()}")
        return [code if code >= 0 else 128 - code for code in (process.exitcode for process in self.processes)]

    def said(self) -> str:
        return self.log.read_text()


Start = Callable[..., Running]


# What was done, how often, and in how many cases something was lost.
TOLD: dict[str, list[int]] = {}


@pytest.fixture(scope="session")
def tell() -> Callable[[str, int, int], None]:
    """Adds to the table at the end: what was done, how often, and how often something was lost."""

    def add(what: str, times: int, lost: int) -> None:
        row = TOLD.setdefault(what, [0, 0])
        row[0] += times
        row[1] += lost

    return add


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if TOLD:
        terminalreporter.write_line("\n times   lost  what was done")
    for what, (times, lost) in TOLD.items():
        terminalreporter.write_line(f"{times:6} {lost:6}  {what}")


@pytest.fixture
def write() -> Callable[[dict[str, Any]], Path]:
    """Writes values of a config beside its runs."""

    def write_values(values: dict[str, Any]) -> Path:
        path = Path(values["output_dir"]) / f"{values['name']}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write_values


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts `train_udon.py`: takes a config file, options, the number of processes, and what to do in each first."""
    logs = tmp_path / "logs"
    logs.mkdir()
    context = multiprocessing.get_context("fork")
    started: list[Running] = []

    def begin(
        config: Path, *options: str, num_processes: int = 1, before: Callable[[int], Any] = lambda rank: None
    ) -> Running:
        log = logs / f"{len(started)}.log"
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
        variables["LOCAL_WORLD_SIZE"] = variables["WORLD_SIZE"]

        def live(rank: int) -> None:
            os.setpgid(0, 0)
            # pytest in the background would hand down that Ctrl-C is ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            if num_processes > 1:
                os.environ |= variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv = sys.orig_argv = ["train_udon.py", "--config", str(config), *options]
            torch.set_num_threads(1)
            AcceleratorState._reset_state()
            PartialState._reset_state()
            before(rank)
            sys.exit(train_udon.main())

        running = Running([context.Process(target=live, args=(rank,)) for rank in range(num_processes)], log)
        for process in running.processes:
            process.start()
        started.append(running)
        return running

    yield begin
    for running in started:
        for process in running.processes:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)
                process.join()


@pytest.fixture(scope="session")
def make_whole(
    make_values: Callable[..., dict[str, Any]],
    run_train: Callable[..., Path],
    run_two_processes: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Whole]:
    """Trains without a fault: takes changes of the config and the number of processes."""

    def train(num_processes: int = 1, **changes: Any) -> Whole:
        values = make_values(tmp_path_factory.mktemp("whole"), **changes)
        run = run_train(values) if num_processes == 1 else run_two_processes(values)
        return Whole(changes, read_outcome(run))

    return train


# One checkpoint is kept, so that what replaces it and what goes when is seen; workers decode.
CHANGES = {"train__keep_checkpoints": 1, "data__num_workers": 2, "seed": 5}


@pytest.fixture(scope="session")
def whole(make_whole: Callable[..., Whole]) -> Whole:
    """One process."""
    return make_whole(**CHANGES)


@pytest.fixture(scope="session")
def whole_pair(make_whole: Callable[..., Whole]) -> Whole:
    """Two processes."""
    return make_whole(num_processes=2, **CHANGES)
