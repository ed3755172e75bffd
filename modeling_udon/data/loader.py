"""Processes that decode images and leave signals to their parent."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from modeling_udon.data.images import use_one_thread

Batch = TypeVar("Batch", covariant=True)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerLoader(DataLoader[Batch]):
    """A `DataLoader` whose workers outlive the signals that end a run, as long as their parent needs them.

    Ctrl-C reaches a whole group of processes, and so do the signals of a cluster. The parent still needs its workers
    for the step that it finishes; it ends them when it is done, and they end by themselves if it is gone.

    Its generator is its own: the default one is that of the training, which must not notice how data comes.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options |= {"worker_init_fn": start_worker, "generator": torch.Generator()}
        super().__init__(*arguments, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # Workers inherit what is held back, so that no signal finds them before `start_worker` has run.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker_id: int) -> None:
    """Keeps a worker to one thread, and to signals of its parent."""
    use_one_thread()
    if sys.platform == "linux":
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _obey_parent(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(_SIGNALS)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)
