"""Progress of a run: `metrics.jsonl`, trackers, a progress bar on a terminal, plain lines in a log."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from modeling_udon.evaluation.protocol import SplitScores
from modeling_udon.evaluation.tables import format_left_out
from modeling_udon.storage import sync, write_text


@dataclass
class LossWindow:
    """Sums of the losses of each domain since the last log, which a checkpoint keeps.

    Attributes:
        totals: Sum of the total loss of each domain.
        terms: Sums of the terms by their names, of each domain.
        counts: Applied steps of each domain.
        skipped: Steps that were not applied.
    """

    totals: dict[str, float] = field(default_factory=dict)
    terms: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    skipped: int = 0

    def add(self, domain: str, loss: float, terms: Mapping[str, float]) -> None:
        """Adds the total loss of one step and its terms by name."""
        sums = self.terms.get(domain, {})
        self.totals[domain] = self.totals.get(domain, 0.0) + loss
        self.terms[domain] = {name: sums.get(name, 0.0) + value for name, value in terms.items()}
        self.counts[domain] = self.counts.get(domain, 0) + 1

    def means(self) -> dict[str, Any]:
        """Returns means over all applied steps, of the named terms as well, and the total of each domain."""
        skipped = {"skipped": self.skipped} if self.skipped else {}
        if not self.counts:
            return skipped
        steps = sum(self.counts.values())
        names = next(iter(self.terms.values()))
        losses = {name: sum(terms[name] for terms in self.terms.values()) / steps for name in names}
        domains = {name: self.totals[name] / self.counts[name] for name in sorted(self.totals)}
        return {"loss": sum(self.totals.values()) / steps, "losses": losses, "domain_losses": domains, **skipped}


class Reporter:
    """Tells of a run on the main process and is silent on the others.

    Args:
        run_dir: Folder of the run.
        accelerator: Knows the main process and the trackers.
        num_steps: Steps of the whole run.
        step: Step that the run goes on from; later rows of an interrupted run are taken out of `metrics.jsonl`.
        validates: Whether the validation of that step is still to come.
    """

    def __init__(
        self, run_dir: Path, accelerator: Accelerator, num_steps: int, step: int, validates: bool = False
    ) -> None:
        self._accelerator = accelerator
        self._path = run_dir / "metrics.jsonl"
        self._is_main = accelerator.is_main_process
        if self._is_main:
            # A run that is started again measures its start again.
            keep_rows(self._path, step if step else -1, validates)
        self._bar = tqdm(
            total=num_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            disable=not (self._is_main and _on_terminal()),
        )

    def record(self, step: int, **values: Any) -> None:
        """Writes a row to `metrics.jsonl` and its numbers to the trackers."""
        if not self._is_main:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = dict(_flatten(values))
        if numbers and self._accelerator.trackers:
            self._accelerator.log(numbers, step=step)

    def sync(self) -> None:
        """Has the rows written to the disk, so that a checkpoint never knows more than they."""
        if self._path.exists():
            sync(self._path)

    def say(self, text: str) -> None:
        """Prints lines above the progress bar."""
        if self._is_main:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def count_step(self) -> None:
        """Moves the progress bar on."""
        self._bar.update()

    def show_progress(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows where training is: beside the bar on a terminal, as a line in a log."""
        if "losses" not in values:
            self.say(f"step {step}/{self._bar.total} | no step since the last one was applied: see incidents/")
            return
        losses = " ".join(
            f"{_SHORT.get(name, name.replace('_', ' '))} {value:.3f}" for name, value in values["losses"].items()
        )
        weights = " ".join(f"{name} {weight:.2f}" for name, weight in values["weights"].items())
        speed = f"{values['images_per_second']:.0f} images/s, {values['data_wait_share']:.0%} waiting for data"
        text = f"loss {values['loss']:.3f} ({losses}) | {speed} | {weights}"
        if self._bar.disable:
            self.say(f"step {step}/{self._bar.total} | {text}")
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Ends the progress bar and the trackers."""
        self._bar.close()
        self._accelerator.end_training()


_SHORT = {
    "student_classification": "student",
    "teacher_classification": "teacher",
    "logit_distillation": "logit",
    "relational_distillation": "relational",
    "retention": "retention",
    "frozen_relational": "frozen relational",
    "frozen_logit": "frozen logit",
    "weight_retention": "weights",
}


def format_validation(step: int, scores: SplitScores, metric: str, best: bool) -> str:
    """One line on a validation: mean and each domain's score on the merged index, in percent."""
    by_domain = " ".join(f"{name} {100 * values[metric]:.1f}" for name, values in scores.merged["domains"].items())
    mark = " (best)" if best else ""
    left_out = f" | {format_left_out(scores.left_out)}" if scores.left_out else ""
    mean = 100 * scores.merged["mean"][metric]
    return f"validation at step {step}: mean {metric} {mean:.1f}{mark} | {by_domain}{left_out}"


def format_weights(path: Path, most: int = 12) -> str:
    """The sampling weights over time as a table, from a run's `metrics.jsonl`, at most `most` rows."""
    rows = [row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()) if "next_weights" in row]
    if not rows:
        return ""
    stride = -(-len(rows) // most)
    names = list(rows[0]["next_weights"])
    widths = [max(8, len(name)) for name in names]
    lines = [
        "sampling weights after step",
        "  ".join(["    step", *(n.rjust(w) for n, w in zip(names, widths, strict=True))]),
    ]
    for row in [*rows[:-1:stride], rows[-1]]:
        cells = [f"{row['next_weights'][name]:.3f}".rjust(width) for name, width in zip(names, widths, strict=True)]
        lines.append("  ".join([str(row["step"]).rjust(8), *cells]))
    return "\n".join(lines)


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def keep_rows(path: Path, step: int, validates: bool = False) -> None:
    """Drops rows that will be written again, and all from a row on that was cut short or damaged.

    Args:
        path: A file of rows of JSON, each with its `step`.
        step: Step that the run goes on from.
        validates: Whether the validation of that step will be written again.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        again = row["step"] > step or (validates and row["step"] == step and "validation" in row)
        if line.endswith("\n") and not again:
            kept.append(line)
    write_text(path, "".join(kept))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    flat: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat.append((f"{prefix}{name}", value))
    return flat
