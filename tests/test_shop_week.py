"""The week of `examples/shop_week.py` under `kill -9`: whatever was killed, the answers at its end are exact."""

import contextlib
import importlib.util
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "shop_week.py"
NUM_PICTURES = 60


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    for library in ("duckdb", "lancedb", "uvicorn", "prometheus_client"):
        pytest.importorskip(library)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parents[1]))
    return load_example()


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shop_week", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def live(folder: Path, model: str, ready: Event) -> None:
    """Lives the days that are left without comparing, since a kill there would hit nothing that is written."""
    os.setsid()  # What it starts itself must end with it.
    week = load_example().Week(folder, model, NUM_PICTURES)
    importlib.import_module("lancedb")  # Else most kills would meet this on Sunday.
    ready.set()
    week.days = [(title, work, lambda: "") for title, work, _ in week.days]
    week.live(say=lambda text: None)


def compare(folder: Path, model: str, ready: Event) -> None:
    """Compares all answers: with an exact search from nothing, with LanceDB, over HTTP."""
    os.setsid()
    ready.set()
    for _, _, check in load_example().Week(folder, model, NUM_PICTURES).days[-3:]:
        check()


def ended(process: BaseProcess) -> int | None:
    """Waits for a child and ends what it has left; its exit code."""
    process.join()
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.exitcode


def kill_at_random(example: ModuleType, model: Path, folder: Path, num_kills: int) -> Counter[str]:
    """Lives weeks of which so many processes are killed at random moments; the days on which they were."""
    # LanceDB's threads do not outlive a fork of a process that has searched, as this one may have.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["modeling_udon.encoder", "modeling_udon.search.catalogue"])

    def start(work: Callable[[Path, str, Event], None], place: Path) -> BaseProcess:
        ready = processes.Event()
        process = processes.Process(target=work, args=(place, str(model), ready))
        process.start()
        assert ready.wait(120)
        return process

    generator, hit = random.Random(2), Counter[str]()
    whole, began = start(live, folder / "whole"), time.perf_counter()
    assert ended(whole) == 0
    longest = time.perf_counter() - began
    while hit.total() < num_kills:
        place = folder / f"after-{hit.total()}"
        week = example.Week(place, str(model), NUM_PICTURES)
        while week.num_done < len(week.days) and hit.total() < num_kills:
            process = start(live, place)
            time.sleep(generator.random() * longest / 2)
            process.kill()
            if ended(process) == -signal.SIGKILL:
                hit[week.days[min(week.num_done, len(week.days) - 1)][0].split()[0]] += 1
        assert ended(start(live, place)) == 0
        assert week.num_done == len(week.days) and ended(start(compare, place)) == 0
    return hit


def test_a_week_that_is_killed_ends_with_the_right_answers(example, searchable, tmp_path) -> None:
    assert kill_at_random(example, searchable.model, tmp_path, 2).total() == 2


@pytest.mark.long
def test_a_week_that_is_killed_thirty_times_ends_with_the_right_answers(example, searchable, tmp_path) -> None:
    hit = kill_at_random(example, searchable.model, tmp_path, 30)
    print(dict(hit))
    assert hit.total() == 30 and len(hit) >= 4
