"""What training changed, domain by domain: the student beside the backbone that it started from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modeling_udon.evaluation.protocol import METRICS


@dataclass(frozen=True)
class Change:
    """Scores of one domain on the merged index of the test split, before and after training.

    Attributes:
        domain: Name of the domain.
        before: Value of each metric of the untrained backbone's own features at their full width.
        after: The student's.
    """

    domain: str
    before: Mapping[str, float]
    after: Mapping[str, float]

    def points(self, metric: str) -> str:
        """The difference in percentage points, with its sign."""
        return f"{self._points(metric):+.1f}"

    @property
    def worse(self) -> tuple[str, ...]:
        """Metrics that have fallen, by a tenth of a point at least."""
        return tuple(metric for metric in METRICS if self._points(metric) < 0)

    def _points(self, metric: str) -> float:
        return round(100 * (self.after[metric] - self.before[metric]), 1)


def compare_with_start(results: Mapping[str, Any], split: str = "test") -> list[Change]:
    """Lists the change of each domain; nothing where the start was not measured, which is done on the test split alone.

    Args:
        results: What `results.json` holds.
        split: The split that is shown.
    """
    before = results.get("baseline", {}).get("untrained", {}).get("domains", {})
    if split != "test" or split not in results["splits"]:
        return []
    after = results["splits"][split]["merged"]["domains"]
    return [Change(name, before[name], values) for name, values in after.items() if name in before]


def format_changes(changes: Sequence[Change]) -> str:
    """Says for each domain whether its R@1 rose or fell, and names those that training has made worse."""
    lines = []
    for change in changes:
        start, end = change.before["R@1"], change.after["R@1"]
        verb = "rose" if end > start else "fell" if end < start else "stayed"
        warning = "  WARNING: worse than before training" if end < start else ""
        told = f"R@1 {verb} from {100 * start:.1f} (untrained backbone) to {100 * end:.1f}"
        lines.append(f"{change.domain}: {told}{warning}")
    return "\n".join([*lines, name_worse(changes)])


def name_worse(changes: Sequence[Change]) -> str:
    """One sentence on the domains that the start finds better than the student does."""
    worse = [
        f"{change.domain} ({', '.join(f'{metric} {change.points(metric)}' for metric in change.worse)})"
        for change in changes
        if change.worse
    ]
    if not worse:
        return f"Training has made none of the {len(changes)} domains worse."
    return f"Training has made {len(worse)} of {len(changes)} domains worse: {', '.join(worse)}."
