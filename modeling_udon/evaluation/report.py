"""`report.html`: one page that needs nothing else; tables, curves, the confusion of domains, galleries."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from modeling_udon.evaluation.adaptation import adaptation_rows
from modeling_udon.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, make_charts, make_quality_chart
from modeling_udon.evaluation.gallery import Gallery
from modeling_udon.evaluation.protocol import mean_over_domains
from modeling_udon.evaluation.report_summary import changed_settings, opening_sentence, overview
from modeling_udon.evaluation.tables import format_notes, frequency_range
from modeling_udon.storage import write_text

REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(folder: Path, results: Mapping[str, Any] | None, gallery: Mapping[str, Gallery]) -> Path:
    """Writes the page of a run, or of a model that was evaluated.

    Args:
        folder: Where `report.html` goes; `metrics.jsonl` there gives the curves, if it is there.
        results: What `results.json` holds, `None` for a run without a test.
        gallery: Galleries by split.

    Returns:
        The page's path.
    """
    path = folder / REPORT_FILE
    page = render_report(folder.resolve().name, results, read_rows(folder / "metrics.jsonl"), gallery)
    write_text(path, page)
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a `metrics.jsonl`; none if the file is not there."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def render_report(
    title: str,
    results: Mapping[str, Any] | None,
    rows: Sequence[Mapping[str, Any]],
    gallery: Mapping[str, Gallery],
) -> str:
    """Renders the page; all text that comes from data is escaped.

    Args:
        title: Name of the run or model.
        results: What `results.json` holds.
        rows: What `metrics.jsonl` holds.
        gallery: Galleries by split.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = results or {}
    return environment.get_template(TEMPLATE.name).render(
        title=title,
        splits=[
            _split(name, split, results.get("analysis", {}).get(name, {}), gallery.get(name, {}), results["baseline"])
            | {"adaptation": _adaptation(results.get("adaptation", {}).get(name), split)}
            for name, split in results.get("splits", {}).items()
        ],
        charts=make_charts(rows),
        settings=changed_settings(results.get("config", {})),
        versions=results.get("versions", {}),
        config=json.dumps(results.get("config", {}), indent=2),
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        right=WIDTH - RIGHT,
        bottom=HEIGHT - BOTTOM,
    )


def _split(
    name: str,
    split: Mapping[str, Any],
    analysis: Mapping[str, Any],
    gallery: Gallery,
    baseline: Mapping[str, Any],
) -> dict[str, Any]:
    """What the template shows of a split, numbers as text."""
    intervals = analysis.get("intervals", {})
    groups = {
        "merged index": (split["merged"], intervals.get("merged")),
        "separate indexes": (split["separate"], intervals.get("separate")),
    }
    if split["teachers"]:
        teachers = {"mean": mean_over_domains(split["teachers"]), "domains": split["teachers"]}
        groups["teachers, own domain"] = (teachers, intervals.get("teachers"))
    for key, title in (("untrained", "untrained backbone"), ("raw_pixels", "raw pixels")):
        if name == "test" and key in baseline:
            values = baseline[key]
            mean = {metric: value for metric, value in values.items() if metric != "domains"}
            groups[title] = ({"mean": mean, "domains": values.get("domains", {})}, None)
    names = list(split["merged"]["domains"])
    return {
        "name": name,
        "tables": [_table(title, scores, bounds, names) for title, (scores, bounds) in groups.items()],
        "confusion": _confusion(analysis.get("confusion", {})),
        "frequency": _frequency(analysis.get("frequency", {})),
        "reduced": [
            _table(f"reduced to {dim} dimensions", scores, None, names)
            for dim, scores in analysis.get("pca", {}).items()
        ],
        "opening": opening_sentence(name, split, baseline),
        "overview": overview(name, split, baseline),
        "quality": _quality(analysis.get("quality_per_byte", [])),
        "quality_chart": make_quality_chart(analysis.get("quality_per_byte", [])),
        "leaks": analysis.get("leaks"),
        "notes": format_notes(split) + list(analysis.get("known_classes", [])),
        "gallery": gallery,
    }


def _adaptation(adaptation: Mapping[str, Any] | None, split: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text on domains that share classes, the header first; none for a run without them."""
    return [] if adaptation is None else adaptation_rows(adaptation, split["separate"])


def _table(title: str, scores: Mapping[str, Any], bounds: Mapping[str, Any] | None, names: list[str]) -> dict[str, Any]:
    metrics = list(scores["mean"])

    def cells(values: Mapping[str, float], intervals: Mapping[str, list[float]] | None) -> list[dict[str, str]]:
        return [
            {
                "value": _percent(values.get(metric)),
                "interval": "" if not intervals else " to ".join(map(_percent, intervals[metric])),
            }
            for metric in metrics
        ]

    by_domain = bounds["domains"] if bounds else {}
    rows = [(name, cells(scores["domains"].get(name, {}), by_domain.get(name))) for name in names]
    return {
        "title": title,
        "metrics": metrics,
        "rows": rows,
        "mean": cells(scores["mean"], bounds["mean"] if bounds else None),
        "intervals": bounds is not None,
    }


def _confusion(confusion: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(column for row in confusion.values() for column in row))
    rows = [
        (
            name,
            [
                {"text": _percent(row.get(column, 0.0)), "share": round(row.get(column, 0.0), 4), "own": column == name}
                for column in columns
            ],
        )
        for name, row in confusion.items()
    ]
    return {"columns": columns, "rows": rows}


def _frequency(frequency: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """One row per domain, one column per class of frequency: R@1 with the number of queries."""
    bins = dict(sorted((row["from"], row.get("to")) for rows in frequency.values() for row in rows))
    table = []
    for name, rows in frequency.items():
        found = {row["from"]: row for row in rows}
        table.append(
            (
                name,
                [
                    {"value": _percent(found[low]["R@1"]), "count": f"{int(found[low]['num_queries'])}"}
                    if low in found
                    else {"value": "", "count": ""}
                    for low in bins
                ],
            )
        )
    return {"columns": [frequency_range(low, high) for low, high in bins.items()], "rows": table}


def _quality(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row per dimension, one column per code: R@1, the bytes of a vector, and how near it comes to the best."""
    best = max((row["R@1"] for row in rows), default=0.0) or 1.0
    columns = list(dict.fromkeys(row["code"] for row in rows))
    by_dim: dict[str, dict[str, Any]] = {}
    for row in rows:
        dim = f"{row['dim']}" if row["pca"] else f"{row['dim']}, as it is"
        by_dim.setdefault(dim, {})[row["code"]] = {
            "value": _percent(row["R@1"]),
            "bytes": f"{row['bytes']:g}",
            "share": round(row["R@1"] / best, 4),
        }
    nothing = {"value": "–", "bytes": "", "share": 0}
    table = [(dim, [codes.get(code, nothing) for code in columns]) for dim, codes in by_dim.items()]
    return {"columns": columns, "rows": table}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
