"""A run that is killed anywhere and goes on ends as one that was not, bit for bit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hurt import at, die

from modeling_udon.cli import train as publishing
from modeling_udon.training import checkpoint, run, run_folder
from modeling_udon.training import validation as assessment
from modeling_udon.training.logging import Reporter
from modeling_udon.training.skipped import StepGuard
from modeling_udon.training.trainer import Trainer


def die_within_a_row(rank: int) -> None:
    def record(self: Reporter, step: int, **values: Any) -> None:
        with self._path.open("a") as file:
            file.write('{"step": 8, "lo')
        die()

    Reporter.record = record


# In the order of the run, which goes on after each: checkpoints come after steps 3, 6, 9 and 11, validations after 0,
# 5, 10 and 11, logs every 2 steps.
KILLS = {
    "at the very start": at(run, "open_domain", 1, die),
    "while the folder is made": at(run_folder, "write_text", 2, die),
    "in the first validation": at(assessment.Assessment, "validate", 1, die),
    "between the weights and the optimiser of the first checkpoint": at(checkpoint, "_flatten", 1, die),
    "in a step, before it is applied": at(StepGuard, "judge", 5, die),
    "after a step, before it is counted": at(Trainer, "count_step", 2, die),
    "in a validation": at(assessment.Assessment, "validate", 1, die, after=True),
    "between the two names of the best": at(Path, "rename", 2, die),
    "before the manifest of a checkpoint": at(checkpoint, "_link", 1, die, after=True),
    "before the last checkpoint goes, after the new one stands": at(checkpoint, "list_checkpoints", 2, die),
    "in the middle of a row": die_within_a_row,
    "after the best was kept, before the next checkpoint": at(Trainer, "validate", 1, die, after=True),
    "in the last validation": at(assessment.Assessment, "validate", 2, die),
    "before the last checkpoint": at(checkpoint, "save_file", 1, die),
    "in the test": at(assessment.Assessment, "test", 1, die),
    "while the results are written": at(publishing, "write_report", 1, die),
    "at the very end": at(Reporter, "close", 1, die),
}


def test_a_run_killed_at_every_kind_of_moment_ends_as_one_that_was_not(
    whole: Any, make_values: Callable[..., dict[str, Any]], write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    config = write(make_values(tmp_path, **whole.changes))
    survived = [
        moment
        for moment, patch in KILLS.items()
        if start(config, "--resume", before=patch).wait() != [128 + signal.SIGKILL]
    ]
    assert survived == []
    assert start(config, "--resume").wait() == [0]
    whole.compare(tmp_path / "run")
    tell("kill -9 at chosen moments: " + ", ".join(KILLS), len(KILLS), 0)
    best = [row["validation"]["merged"]["mean"]["R@1"] for row in whole.outcome["rows"] if "validation" in row]
    assert best[2] > max(best[:2]), "the best that was kept before a kill must be a new one"


def test_where_the_results_lie_the_run_has_come_to_its_end(
    make_values: Callable[..., dict[str, Any]], write: Any, start: Any, tmp_path: Path
) -> None:
    config = write(make_values(tmp_path, train__num_steps=1))
    assert start(config, before=at(assessment, "write_results", 1, die)).wait() == [128 + signal.SIGKILL]
    folder = tmp_path / "run"
    assert not (folder / "results.json").exists() and (folder / "report.html").exists()
    assert "raw pixels" in (folder / "best" / "README.md").read_text(), "the card has its table"
