"""Ways to hurt a run at a moment that does not depend on the clock, and what it has to end with all the same."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

# Called in the process of a run, with its rank, before it starts.
Patch = Callable[[int], None]

# What of a row the clock decides.
TIMES = ("images_per_second", "data_wait_share")


def die() -> None:
    """Ends this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(
    owner: Any, name: str, call: int, deed: Callable[[], Any], after: bool = False, ranks: tuple[int, ...] = (0, 1)
) -> Patch:
    """Does something before, or after, some call of a function, counted from 1."""

    def patch(rank: int) -> None:
        function, calls = getattr(owner, name), [0]

        def counted(*values: Any, **options: Any) -> Any:
            calls[0] += 1
            now = calls[0] == call and rank in ranks
            if now and not after:
                deed()
            result = function(*values, **options)
            if now and after:
                deed()
            return result

        setattr(owner, name, counted)

    return patch


def raising(error: Exception) -> Callable[[], None]:
    """A deed that raises."""

    def deed() -> None:
        raise error

    return deed


def signalling(number: int) -> Callable[[], None]:
    """A deed that has another process send a signal to this one and its workers, as Ctrl-C does."""

    def deed() -> None:
        sender = os.fork()
        if not sender:
            os.killpg(os.getpgrp(), number)
            os._exit(0)
        os.waitpid(sender, 0)

    return deed


@dataclass
class Whole:
    """A run that nothing happened to: its values but for the folder, and what it ended with."""

    changes: dict[str, Any]
    outcome: dict[str, Any]

    def compare(self, run: Path) -> None:
        """Names what differs, instead of printing weights."""
        found = read_outcome(run)
        assert found.keys() == self.outcome.keys()
        assert [key for key in found if found[key] != self.outcome[key]] == []


def read_outcome(run: Path) -> dict[str, Any]:
    """All that a run ends with: tensors bit for bit, everything else without times."""
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    tensors = {
        f"{name}:{key}": tensor.numpy().tobytes()
        for name, path in {
            "weights": checkpoint / "model.safetensors",
            "optimizer": checkpoint / "optimizer.safetensors",
            "best with teachers": run / "checkpoints" / "best" / "model.safetensors",
            "best": run / "best" / "model.safetensors",
        }.items()
        for key, tensor in load_file(path).items()
    }
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in TIMES:
            row.pop(key, None)
    results = json.loads((run / "results.json").read_text())
    state = json.loads((checkpoint / "state.json").read_text())
    return {"rows": rows, "state": state, "splits": results["splits"], "baseline": results["baseline"], **tensors}
