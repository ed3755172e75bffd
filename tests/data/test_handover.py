"""A worker's shared memory is used again when nothing in its parent refers to the batch that it held."""

import multiprocessing
from typing import Any

import pytest
import torch

from modeling_udon.data import handover
from modeling_udon.data.handover import Slots, contents, receive

SHAPE = (2, 4, 4, 3)
NUM_BYTES = 96


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> Slots:
    monkeypatch.setattr(handover, "get_worker_info", lambda: "a worker")
    return Slots()


def take(slots: Slots, num_bytes: int = NUM_BYTES) -> torch.Tensor:
    slot = slots.take(num_bytes)
    assert slot is not None and slot.is_shared()
    return slot


def test_there_is_no_shared_memory_outside_of_a_worker() -> None:
    assert Slots().take(NUM_BYTES) is None


def test_a_slot_is_free_when_the_last_view_of_its_batch_is_gone(slots: Slots) -> None:
    first = take(slots)
    contents(first, SHAPE).fill_(7)
    images = receive(first, SHAPE)
    assert torch.equal(images, torch.full(SHAPE, 7, dtype=torch.uint8))
    view = images[1:, :2].numpy()
    del images
    second = take(slots)
    assert second.data_ptr() != first.data_ptr()
    del view
    assert take(slots).data_ptr() == first.data_ptr()


def test_slots_of_another_size_are_let_go(slots: Slots) -> None:
    first = take(slots)
    receive(first, SHAPE)
    assert take(slots, 2 * NUM_BYTES).data_ptr() != first.data_ptr()
    assert take(slots).data_ptr() != first.data_ptr()


def test_a_worker_keeps_few_slots_however_many_batches_are_hoarded(slots: Slots) -> None:
    taken = [take(slots) for _ in range(20)]
    assert len({slot.data_ptr() for slot in taken}) == 20
    for slot in taken:
        receive(slot, SHAPE)
    kept = {take(slots).data_ptr() for _ in range(20)} & {slot.data_ptr() for slot in taken}
    assert len(kept) == 8


def _free(slot: torch.Tensor, answers: Any) -> None:
    answers.put(int(receive(slot, SHAPE).sum()))


def test_a_slot_comes_back_from_another_process(slots: Slots) -> None:
    context = multiprocessing.get_context("spawn")
    answers, slot = context.Queue(), take(slots)
    contents(slot, SHAPE).fill_(1)
    process = context.Process(target=_free, args=(slot, answers))
    process.start()
    assert answers.get(timeout=60) == NUM_BYTES
    process.join(60)
    assert take(slots).data_ptr() == slot.data_ptr()
