"""SIGTERM and SIGINT end a run between two steps, with a state to go on from; a second one ends it at once."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from torch import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Signals within so many seconds of each other are impatience, later ones a reminder by the system.
_QUICKLY = 5.0
# `torchrun` and `accelerate launch` pass on what the terminal has sent to their processes already.
_LAUNCHERS = ("launch", "torch.distributed.run", "torchrun")


class Stopped(BaseException):  # noqa: N818, it is no error, and no `except Exception` may hold it up
    """A run that was asked to end; `code` is what a shell expects of a process that got the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class StopSignals:
    """Listens for signals while it is entered as a context; in the main thread, for no other may listen.

    A first one is remembered, and the loop asks for it; within `interruptible` it raises `Stopped` at once. A second
    one within seconds ends the process on the spot, a third one where a launcher repeats the first.
    """

    def __init__(self) -> None:
        self._received: list[tuple[float, int]] = []
        self._may_raise = False
        self._process = os.getpid()
        self._enough = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 2

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS if in_main_thread}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether the run has been asked to end."""
        return bool(self._received)

    def raise_now(self) -> None:
        """Raises what ends the run, by the first signal; SIGTERM if another process got it."""
        raise Stopped(self._received[0][1] if self._received else signal.SIGTERM)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal break off what can be done again; one that came before breaks it off here."""
        self._may_raise = True
        try:
            if self.requested:
                self.raise_now()
            yield
        finally:
            self._may_raise = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # A worker that has just been forked.
        now = time.monotonic()
        self._received.append((now, number))
        recent = [when for when, _ in self._received if now - when < _QUICKLY]
        if len(recent) >= self._enough:
            # Not by an exception: whatever is being waited for would hold it up.
            os._exit(128 + number)
        if self._may_raise:
            self._may_raise = False
            self.raise_now()


class Agreement:
    """Lets all processes of a run end after the same step.

    Each step starts a message of one number and reads the answer to the step before, so that nobody waits. It goes
    over TCP whatever the gradients take: a GPU is not held up for it, and a process that has died is noticed here.

    Args:
        num_processes: Number of processes.
        timeout: How long a process may be silent.
    """

    def __init__(self, num_processes: int, timeout: timedelta) -> None:
        self._group = distributed.new_group(backend="gloo", timeout=timeout) if num_processes > 1 else None
        self._under_way: tuple[torch.Tensor, distributed.Work] | None = None

    def reached(self, wish: bool, last: bool) -> bool:
        """Says at the end of a step whether to stop after it.

        Args:
            wish: Whether this process has been asked to end.
            last: Whether no step follows.
        """
        if self._group is None:
            return wish
        answer = False
        if self._under_way is not None:
            number, work = self._under_way
            work.wait()
            answer = bool(number.item())
        number = torch.tensor(int(wish))
        work = distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None, "an asynchronous message can be waited for"
        self._under_way = number, work
        if answer or last:
            # A message that nobody waits for would hold up the end of the process for seconds.
            work.wait()
        return answer or (last and bool(number.item()))


def resume_command() -> str:
    """The command that this process, or its launcher, was started with, so that it goes on."""
    words, arguments = list(sys.orig_argv), sys.argv[1:]
    launcher = _parent_command()
    if any(word in _LAUNCHERS or Path(word).name in _LAUNCHERS for word in launcher):
        # A launcher ends with what it hands on; a parent that does not has started something else.
        words = launcher if launcher[len(launcher) - len(arguments) :] == arguments else words
    words = [word for word in words if word != "--overwrite"]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def _parent_command() -> list[str]:
    path = Path(f"/proc/{os.getppid()}/cmdline")
    return path.read_text(encoding="utf-8").rstrip("\0").split("\0") if path.exists() else []
