"""SIGTERM and SIGINT end a run between two steps, with a state to go on from; a second one ends it at once."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Signals within so many seconds of each other are impatience, later ones a reminder by the system.
_QUICKLY = 5.0
# Seconds until `Stopped` is raised again where Python has dropped it.
_SOON = 0.01
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

    Python drops what is raised in a finaliser or in a hook of a fork. `Stopped` is raised again then.
    """

    def __init__(self) -> None:
        self._received: list[tuple[float, int]] = []
        self._may_raise = False
        self._inside = False
        self._process = os.getpid()
        self._enough = 3 if "TORCHELASTIC_RUN_ID" in os.environ else 2

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS if in_main_thread}
        if in_main_thread:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise_again)
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._look_at_dropped
        return self

    def __exit__(self, *error: object) -> None:
        sys.unraisablehook = self._unraisable
        signal.setitimer(signal.ITIMER_REAL, 0)
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
        self._may_raise = self._inside = True
        try:
            if self.requested:
                self.raise_now()
            yield
        finally:
            self._may_raise = self._inside = False

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

    def _look_at_dropped(self, dropped: Any) -> None:
        if not isinstance(dropped.exc_value, Stopped):
            self._unraisable(dropped)
        elif self._inside:
            signal.setitimer(signal.ITIMER_REAL, _SOON)

    def _raise_again(self, number: int, frame: FrameType | None) -> None:
        if self._inside:
            self.raise_now()


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
