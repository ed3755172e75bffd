"""Shared memory in which workers hand over batches, used again: a fresh page costs more than what it holds."""

import weakref

import torch
from torch.utils.data import get_worker_info

# A cache line, so that pixels start as aligned as in memory of their own. Its first byte tells whose the slot is.
_HEADER_BYTES = 64
_FREE, _TAKEN = 0, 1
# What a worker keeps. Batches beyond, which only a parent that hoards them brings about, get memory of their own.
_MAX_SLOTS = 8


class Slots:
    """A worker's pieces of shared memory, each of one batch at a time; outside of a worker, ordinary memory."""

    def __init__(self) -> None:
        self._slots: list[torch.Tensor] = []

    def take(self, num_bytes: int) -> torch.Tensor | None:
        """Gives a slot to fill through `contents` and to hand over through `receive`; `None` outside of a worker."""
        if get_worker_info() is None:
            return None
        length = _HEADER_BYTES + num_bytes
        # Of another size than the batches now: they would never be taken again.
        self._slots = [slot for slot in self._slots if len(slot) == length]
        slot = next((slot for slot in self._slots if slot[0] == _FREE), None)
        if slot is None:
            # What torch's own `default_collate` does in a worker.
            storage = torch.UntypedStorage._new_shared(length, device="cpu")
            slot = torch.empty(0, dtype=torch.uint8).set_(storage)
            if len(self._slots) < _MAX_SLOTS:
                self._slots.append(slot)
        slot[0] = _TAKEN
        return slot


def contents(slot: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """What a slot holds, uint8 of the given shape, without a copy."""
    return slot[_HEADER_BYTES:].view(shape)


def receive(slot: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Gives the contents of a worker's slot, which is free for the next batch when nothing refers to them any more."""
    # Of all that may refer to them, slices and other views included, each keeps this array alive.
    array = contents(slot, shape).numpy()
    weakref.finalize(array, slot[:1].fill_, _FREE).atexit = False
    return torch.from_numpy(array)
