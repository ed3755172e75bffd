"""The table of systems: scores over seeds, cost, its markdown page and its picture."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from system_rows import METRICS, TEACHERS, Settings, runs_of

matplotlib.use("Agg")
from matplotlib import pyplot

# Student's t for 95 %, by the number of seeds.
_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def read_row(settings: Settings, row: str, seeds: Sequence[int], rate: str | None = None) -> dict[str, Any]:
    """Scores of a row over the seeds, and what it took.

    Args:
        settings: Where the runs lie.
        row: Name of the row.
        seeds: Its seeds.
        rate: The learning rate that was chosen, where several were tried.
    """
    folders = {seed: [settings.run_dir(seed, run, rate) for run in runs_of(settings, row)] for seed in seeds}
    scores = [read_scores(folders[seed]) for seed in seeds]
    found: dict[str, Any] = {"seeds": list(seeds), "rate": rate}
    for index in ("merged", "separate"):
        found[index] = {
            metric: {
                name: _spread([of_seed[index][metric][name] for of_seed in scores])
                for name in ("mean", *settings.domains)
            }
            for metric in METRICS
        }
    teachers = TEACHERS.get(row)
    taught_by = [] if teachers is None else [settings.run_dir(seeds[0], run) for run in runs_of(settings, teachers)]
    for cost in ("seconds", "cpu_seconds"):
        found[cost] = statistics.mean(
            sum(_cost(folder)[cost] for folder in (*of_seed, *taught_by)) for of_seed in folders.values()
        )
    first = folders[seeds[0]]
    found["trained"] = sum(_cost(folder)["trained"] for folder in (*first, *taught_by))
    found["shipped"] = sum(_cost(folder)["shipped"] for folder in first)
    return found


def read_scores(folders: Sequence[Path], split: str = "test") -> dict[str, Any]:
    """Scores of one seed; specialists are put together, each on its domain."""
    results = [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
    found: dict[str, Any] = {"merged": {}, "separate": {}}
    for metric in METRICS:
        for index in ("merged", "separate"):
            by_domain = {
                name: values[metric]
                for result in results
                for name, values in result["splits"][split][index]["domains"].items()
            }
            found[index][metric] = {"mean": statistics.mean(by_domain.values()), **by_domain}
    return found


def format_tables(table: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The markdown page."""
    columns = (
        "system, R@1, 95 %, mMP@5, 95 %, separate R@1, mMP@5, learning rate, CPU seconds, x USCRR, trained, shipped"
    )
    lines = ["| " + columns.replace(", ", " | ") + " |", "|---" * (columns.count(",") + 1) + "|"]
    for name, title in (("raw_pixels", "raw pixels"), ("untrained", "the start, frozen, full width")):
        scores = table["baselines"][name]
        lines.append(
            f"| {title} | {_percent(scores['R@1']['mean'])} | | {_percent(scores['mMP@5']['mean'])} |" + " |" * 8
        )
    reference = table["rows"].get("uscrr", {}).get("cpu_seconds")
    for row, found in table["rows"].items():
        merged, separate = found["merged"], found["separate"]
        cells = [
            row,
            *(
                text
                for metric in METRICS
                for text in (_with_spread(merged[metric]["mean"]), _range(merged[metric]["mean"]))
            ),
            *(_with_spread(separate[metric]["mean"]) for metric in METRICS),
            found["rate"] or "",
            f"{found['cpu_seconds']:.1f}",
            f"{found['cpu_seconds'] / reference:.2f}" if reference else "",
            f"{found['trained'] / 1e6:.2f} M",
            f"{found['shipped'] / 1e6:.2f} M",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    domains = table["domains"]
    for metric in METRICS:
        lines += ["", f"{metric} of each domain, merged index:", "", "| system | " + " | ".join(domains) + " |"]
        lines.append("|---" * (1 + len(domains)) + "|")
        for name, title in (("raw_pixels", "raw pixels"), ("untrained", "the start, frozen")):
            cells = [_percent(table["baselines"][name][metric][domain]) for domain in domains]
            lines.append("| " + " | ".join([title, *cells]) + " |")
        for row, found in table["rows"].items():
            cells = [_with_spread(found["merged"][metric][domain]) for domain in domains]
            lines.append("| " + " | ".join([row, *cells]) + " |")
    lines += ["", *(f"- `{row}`: {titles[row]}" for row in table["rows"])]
    return "\n".join(lines) + "\n"


def draw(table: Mapping[str, Any], path: Path) -> None:
    """R@1 and mMP@5 of each row with its interval, and every seed as a dot."""
    names = list(table["rows"])[::-1]
    size = (10, 1.6 + 0.34 * len(names))
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for place, name in enumerate(names):
            found = table["rows"][name]
            low, high = interval(found["merged"][metric]["mean"]) or (math.nan, math.nan)
            colour = "#b3541e" if name == "udon" else "#35618f"
            axis.plot([100 * low, 100 * high], [place, place], color=colour, linewidth=2, alpha=0.5)
            seeds = found["merged"][metric]["mean"]["seeds"]
            axis.plot([100 * value for value in seeds], [place] * len(seeds), "o", color=colour, markersize=5)
        start = table["baselines"]["untrained"][metric]["mean"]
        line = axis.axvline(100 * start, color="#777777", linestyle=":", linewidth=1)
        axis.set(title=metric, xlabel="percent, mean over the domains, merged index", yticks=range(len(names)))
        axis.set_yticklabels(names)
        axis.grid(axis="x", alpha=0.3)
    figure.legend([line], ["the start, frozen"], loc="outside lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def interval(of: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 % interval of a mean over seeds, by Student's t; `None` for one seed."""
    number = len(of["seeds"])
    if number < 2:
        return None
    half = _T[number] * of["std"] / math.sqrt(number)
    return of["mean"] - half, of["mean"] + half


def _spread(values: Sequence[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": deviation, "seeds": list(values)}


def _cost(folder: Path) -> dict[str, float]:
    return json.loads((folder / "cost.json").read_text(encoding="utf-8"))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_spread(of: Mapping[str, Any]) -> str:
    return _percent(of["mean"]) + ("" if of["std"] is None else f" ± {_percent(of['std'])}")


def _range(of: Mapping[str, Any]) -> str:
    bounds = interval(of)
    return "" if bounds is None else f"{_percent(bounds[0])} to {_percent(bounds[1])}"
