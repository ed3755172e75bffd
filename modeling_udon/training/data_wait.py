"""Measures how long training waits for data."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

Batch = TypeVar("Batch")


class DataWait:
    """Adds up the time in which the device has nothing to do because the next batch is not there.

    On a GPU, which works off what it was given while the loop waits already, only the gap on its own clock counts;
    elsewhere it is the time that the loop waits.

    Args:
        device: Where training happens.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    def over(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Gives the batches and watches how long each takes to come."""
        iterator: Iterator[Batch] | None = None
        while True:
            before, started = self._mark(), time.perf_counter()
            try:
                # The first batch waits for the workers to start as well.
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator)
            except StopIteration:
                return
            after = self._mark()
            if before is None or after is None:
                self._seconds += time.perf_counter() - started
            else:
                self._gaps.append((before, after))
            yield batch

    def take(self) -> float:
        """Returns the seconds waited since the last time; on a GPU the steps so far must have been waited for."""
        seconds = self._seconds + sum(before.elapsed_time(after) for before, after in self._gaps) / 1000
        self._seconds = 0.0
        self._gaps.clear()
        return seconds

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
