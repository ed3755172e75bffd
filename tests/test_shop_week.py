"""The week of `examples/shop_week.py` under `kill -9`: whatever was killed, the answers at its end are exact."""

import contextlib
import importlib.util
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "shop_week.py"
NUM_PICTURES = 60


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    for library in ("duckdb", "lancedb", "uvicorn", "prometheus_client"):
        pytest.importorskip(library)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    spec = importlib.util.spec_from_file_location("shop_week", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(work: Callable[[], object]) -> int:
    """Starts a child in a process group of its own, as what it starts itself must end with it."""
    process = os.fork()
    if process == 0:
        os.setsid()
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def ended(process: int) -> int:
    """Waits for a child and ends what it has left; its status."""
    status = os.waitpid(process, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    return status


def live(week: Any) -> None:
    """Lives the days that are left without comparing, since a kill there would hit nothing that is written."""
    week.days = [(title, work, lambda: "") for title, work, _ in week.days]
    week.live(say=lambda text: None)


def compare(week: Any) -> None:
    """Compares all answers: with an exact search from nothing, with LanceDB, over HTTP."""
    for _, _, check in week.days[-3:]:
        check()


def kill_at_random(example: ModuleType, model: Path, folder: Path, num_kills: int) -> Counter[str]:
    """Lives weeks of which so many processes are killed at random moments; the days on which they were."""
    generator, hit = random.Random(2), Counter[str]()
    began = time.perf_counter()
    assert ended(start(lambda: live(example.Week(folder / "whole", str(model), NUM_PICTURES)))) == 0
    longest = time.perf_counter() - began
    while hit.total() < num_kills:
        week = example.Week(folder / f"after-{hit.total()}", str(model), NUM_PICTURES)
        while week.num_done < len(week.days) and hit.total() < num_kills:
            process = start(lambda week=week: live(week))
            time.sleep(generator.random() * longest / 2)
            os.kill(process, signal.SIGKILL)
            if ended(process) == signal.SIGKILL:
                hit[week.days[min(week.num_done, len(week.days) - 1)][0].split()[0]] += 1
        assert ended(start(lambda week=week: live(week))) == 0
        assert week.num_done == len(week.days) and ended(start(lambda week=week: compare(week))) == 0
    return hit


def test_a_week_that_is_killed_ends_with_the_right_answers(example, searchable, tmp_path) -> None:
    assert kill_at_random(example, searchable.model, tmp_path, 2).total() == 2


@pytest.mark.long
def test_a_week_that_is_killed_thirty_times_ends_with_the_right_answers(example, searchable, tmp_path) -> None:
    hit = kill_at_random(example, searchable.model, tmp_path, 30)
    print(dict(hit))
    assert hit.total() == 30 and len(hit) >= 4
