"""The time in which training waits for data."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_udon.training.data_wait import DataWait


def test_only_the_time_until_a_batch_comes_is_counted() -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    wait, taken = DataWait(torch.device("cpu")), []
    for batch in wait.over(batches()):
        time.sleep(0.1)
        taken.append(batch)
    assert taken == [0, 1, 2]
    assert 0.15 <= wait.take() < 0.3
    assert wait.take() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_loop_that_waits_while_the_gpu_works_costs_nothing() -> None:
    def batches(seconds: float) -> Iterator[int]:
        for number in range(5):
            time.sleep(seconds)
            yield number

    def wait_for(seconds: float, cycles: int) -> float:
        wait = DataWait(torch.device("cuda"))
        for _ in wait.over(batches(seconds)):
            torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        return wait.take()

    wait_for(0.0, 1000)
    # 50 ms of data beside about 200 ms of work: the GPU waits for the first batch alone.
    assert 0.04 < wait_for(0.05, 400_000_000) < 0.1
    assert 0.2 < wait_for(0.05, 1000) < 0.4


def test_a_run_reports_its_share(
    make_values: Callable[..., dict[str, Any]], run_train: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, train__num_steps=4))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [row["data_wait_share"] for row in rows if "loss" in row]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)
