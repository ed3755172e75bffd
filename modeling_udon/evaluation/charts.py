"""Line charts of a run, laid out as SVG paths: losses, sampling weights, validation."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# A chart's drawing area, in units of its own; the page scales it.
WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 10, 56
# As many series as have a colour of their own in the template; the one after them is the text's, for a mean.
NUM_COLOURS = 8
MEAN = "mean"

LOSS_TITLES = {
    "student_classification": "student classification",
    "teacher_classification": "teacher classification",
    "logit_distillation": "logit distillation",
    "relational_distillation": "relational distillation",
    "retention": "retention of the old student",
    "frozen_relational": "relational distillation of frozen teachers",
    "frozen_logit": "logit distillation of frozen teachers",
    "weight_retention": "distance of the weights to their start",
}

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What it shows.
        colour: Number of its colour.
        path: Its points, as an SVG path.
        last: Its last value, as text.
    """

    name: str
    colour: int
    path: str
    last: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it lies, and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A line chart, ready to be drawn.

    Attributes:
        title: What it shows.
        series: The lines.
        x_ticks: Marks of the horizontal axis.
        y_ticks: Marks of the vertical axis.
        x_title: What the horizontal axis is.
        y_title: What the vertical axis is; empty where the title says it.
        has_points: Whether the points of the lines are drawn too.
    """

    title: str
    series: list[Series]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_title: str = "step"
    y_title: str = ""
    has_points: bool = False


def make_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Charts of losses, sampling weights and validation from the rows of `metrics.jsonl`; none without rows."""
    losses = _collect(
        (
            row["step"],
            {"total": row["loss"]}
            | {LOSS_TITLES.get(key, key.replace("_", " ")): value for key, value in row["losses"].items()},
        )
        for row in rows
        if "losses" in row
    )
    by_domain = _collect((row["step"], row["domain_losses"]) for row in rows if "domain_losses" in row)
    weights = _collect((row["step"], row["weights"]) for row in rows if "weights" in row)
    recall = _collect(
        (
            row["step"],
            {name: 100 * values["R@1"] for name, values in row["validation"]["merged"]["domains"].items()}
            | {MEAN: 100 * row["validation"]["merged"]["mean"]["R@1"]},
        )
        for row in rows
        if "validation" in row
    )
    # A domain has the same colour in all charts.
    by_domain = {name: by_domain[name] for name in weights if name in by_domain}
    titled = {
        "Losses": losses,
        "Total loss by domain": by_domain,
        "Sampling weights": weights,
        "R@1 on validation, merged index, in percent": recall,
    }
    return [make_chart(title, series) for title, series in titled.items() if series]


def make_chart(title: str, series: Mapping[str, Sequence[Point]]) -> Chart:
    """Lays out a line chart whose vertical axis begins at 0 or at the least value, if that is negative.

    Args:
        title: What it shows.
        series: Points `(step, value)` by name.
    """
    points = [point for line in series.values() for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    y_steps = axis_steps(low, high)
    low, high = y_steps[0], y_steps[-1]

    def across(x: float) -> float:
        return round(LEFT + (x - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT), 1)

    def upward(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    drawn = [
        Series(
            name,
            NUM_COLOURS if name == MEAN else number % NUM_COLOURS,
            "M" + " L".join(f"{across(x)} {upward(y)}" for x, y in line),
            _short(line[-1][1]),
        )
        for number, (name, line) in enumerate(series.items())
    ]
    x_ticks = [Tick(across(x), f"{x:g}") for x in axis_steps(first, last) if first <= x <= last]
    return Chart(title, drawn, x_ticks, [Tick(upward(y), f"{y:g}") for y in y_steps])


def make_quality_chart(rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """R@1 by the bytes of a vector, a line for each code; bytes in powers of two. `None` without reduced ones.

    Args:
        rows: What `quality_per_byte` gave.
    """
    lines: dict[str, list[Point]] = {}
    for row in rows:
        # The embeddings as they are would lie on the lines' ends.
        if row["pca"]:
            lines.setdefault(row["code"], []).append((math.log2(row["bytes"]), 100 * row["R@1"]))
    if not lines:
        return None
    chart = make_chart("Quality per byte", {name: sorted(line) for name, line in lines.items()})
    ends = [x for line in lines.values() for x, _ in line]
    low, high = min(ends), max(ends)
    span = max(high - low, 1)
    powers = range(math.ceil(low), math.floor(high) + 1)
    ticks = [Tick(round(LEFT + (x - low) / span * (WIDTH - LEFT - RIGHT), 1), f"{2**x:g}") for x in powers]
    return replace(chart, x_ticks=ticks, x_title="bytes of a vector", y_title="R@1, percent", has_points=True)


def axis_steps(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, evenly spaced, from at most `low` to at least `high`: 1, 2 or 5 times a power of ten apart."""
    span = high - low if high > low else 1.0
    size = 10 ** math.floor(math.log10(span / most))
    step = next(factor * size for factor in (1, 2, 5, 10, 20) if span / (factor * size) <= most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(max(high, low + span) / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _collect(rows: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, list[Point]]:
    series: dict[str, list[Point]] = {}
    for step, values in rows:
        for name, value in values.items():
            series.setdefault(name, []).append((step, value))
    return series


def _short(value: float) -> str:
    return f"{value:.3g}"
