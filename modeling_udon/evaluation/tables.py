"""The tables that `udon evaluate` prints: percent, right-aligned, one line per domain."""

from collections.abc import Mapping, Sequence
from typing import Any

from modeling_udon.evaluation.changes import compare_with_start, format_changes
from modeling_udon.evaluation.protocol import METRICS, Scores, mean_over_domains

Row = Sequence[str]


def format_table(results: Mapping[str, Any], split: str = "test", model: str = "student") -> str:
    """The results of one split in percent, a line per domain and one for the mean, with notes on its images."""
    return "\n".join([_format_scores_of_split(results, split, model), *format_notes(results["splits"][split])])


def _format_scores_of_split(results: Mapping[str, Any], split: str, model: str) -> str:
    # Baselines are of the test split.
    scores, baseline = results["splits"][split], results["baseline"] if split == "test" else {}
    groups: dict[str, Scores] = {f"{model}, merged": scores["merged"], f"{model}, separate": scores["separate"]}
    if scores["teachers"]:
        groups["teachers, own domain"] = {"mean": mean_over_domains(scores["teachers"]), "domains": scores["teachers"]}
    for name, title in (("untrained", "untrained"), ("raw_pixels", "raw pixels")):
        if name in baseline:
            groups[title] = {"mean": baseline[name], "domains": baseline[name].get("domains", {})}
    names = list(scores["merged"]["domains"])
    first_width = max(len(name) for name in ("domain", *names))
    rows = [
        ("", list(groups)),
        ("domain", [_metric_cells(METRICS)] * len(groups)),
        *((name, [_metrics_percent(group["domains"].get(name, {})) for group in groups.values()]) for name in names),
        ("mean", [_metrics_percent(group["mean"]) for group in groups.values()]),
    ]
    widths = [max(len(cells[column]) for _, cells in rows) for column in range(len(groups))]
    lines = [
        "  ".join([first.ljust(first_width), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for first, cells in rows
    ]
    rule = "-" * len(lines[0])
    caption = f"{split} split, in percent" + ("; untrained and raw pixels on the merged index" if baseline else "")
    return "\n".join([caption, "", *lines[:2], rule, *lines[2:-1], rule, lines[-1]])


def format_notes(scores: Mapping[str, Any]) -> list[str]:
    """Lines about the images of a split that are in no score, or not as one may think."""
    notes = [format_left_out(scores.get("left_out", {})), format_copies(scores.get("copies", {}))]
    return [note for note in notes if note]


def format_copies(copies: Mapping[str, int]) -> str:
    """Says how many queries of each domain have their own picture in the index; empty if none has."""
    if not copies:
        return ""
    counts = ", ".join(f"{name} {count}" for name, count in copies.items())
    return (
        f"WARNING: queries whose own picture is in the index too: {counts}; "
        "for such a query its picture (the same bytes) was left out of the index"
    )


def format_left_out(left_out: Mapping[str, int]) -> str:
    """Says how many images of each domain are in no score, empty if all are."""
    if not left_out:
        return ""
    return "broken images left out: " + ", ".join(f"{name} {count}" for name, count in left_out.items())


def format_measurement(results: Mapping[str, Any], split: str, model: str = "student") -> str:
    """All tables of one split.

    Args:
        results: What `results.json` holds, of `measure`.
        split: `"validation"` or `"test"`.
        model: What to call what was measured.
    """
    analysis = results["analysis"][split]
    scores = results["splits"][split]
    parts = [_format_scores_of_split(results, split, model), _format_intervals(scores, analysis["intervals"])]
    for dim, reduced in analysis.get("pca", {}).items():
        parts.append(_format_scores(f"reduced to {dim} dimensions, merged index, in percent", reduced))
    parts += [_format_confusion(analysis["confusion"]), _format_frequency(analysis["frequency"])]
    if "quality_per_byte" in analysis:
        parts.append(_format_quality(analysis["quality_per_byte"]))
    if "leaks" in analysis:
        parts.append(_format_leaks(analysis["leaks"], split))
    if changes := compare_with_start(results, split):
        parts.append(format_changes(changes))
    # Last, where they are not overlooked.
    notes = [*format_notes(scores), *(f"WARNING: {line}" for line in analysis.get("known_classes", []))]
    parts += ["\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def format_calibration(calibration: Mapping[str, Any]) -> str:
    """The threshold, and what it does in each domain."""
    rate, threshold = calibration["false_accept_rate"], calibration["threshold"]
    keys = ("false_accept_rate", "accept_rate", "right_accept_rate")
    rows = [
        [
            name,
            f"{of_domain['threshold']:.4f}",
            *(_percent(of_domain["own_thresholds"][key]) for key in keys),
        ]
        for name, of_domain in calibration["domains"].items()
    ]
    caption = (
        f"a score of at least {threshold:.4f} is taken for an answer: at most {_percent(rate)} % of queries without "
        f"one get one ({calibration['split']} split, {calibration['num_queries']} queries), in percent"
    )
    table = align([["domain", "threshold", "false accepts", "accepted", "accepted and right"], *rows])
    how = "where the index names domains, a neighbour is held to the threshold of its domain:"
    parts = [caption, how, table]
    shares = {name: of["own_thresholds"]["accept_rate"] for name, of in calibration["domains"].items()}
    if few := [f"{name} {_percent(share)} %" for name, share in shares.items() if share < 0.5]:
        parts.append(
            f"WARNING: most right answers would count as not in the index: accepted are {', '.join(few)} of the "
            "queries with one; raise --false-accept-rate or train longer"
        )
    return "\n\n".join(parts)


def align(rows: Sequence[Row]) -> str:
    """Lines up columns, the first to the left, all others to the right, with a rule below the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _format_intervals(scores: Mapping[str, Any], intervals: Mapping[str, Any]) -> str:
    merged, bounds = scores["merged"], intervals["merged"]
    metrics = list(merged["mean"])

    def row(name: str, values: Mapping[str, float], of: Mapping[str, Sequence[float]]) -> Row:
        cells = [f"{_percent(values[m])} ({_percent(of[m][0])} to {_percent(of[m][1])})" for m in metrics]
        return [name, *cells]

    rows = [row(name, values, bounds["domains"][name]) for name, values in merged["domains"].items()]
    rows.append(row("mean", merged["mean"], bounds["mean"]))
    caption = "merged index with 95 % intervals over the queries, in percent"
    return caption + "\n\n" + align([["domain", *metrics], *rows])


def _format_scores(caption: str, scores: Scores) -> str:
    named = {**scores["domains"], "mean": scores["mean"]}
    rows = [[name, *map(_percent, values.values())] for name, values in named.items()]
    return caption + "\n\n" + align([["domain", *scores["mean"]], *rows])


def _format_confusion(confusion: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(column for row in confusion.values() for column in row))
    rows = [[name, *(_percent(row.get(column, 0.0)) for column in columns)] for name, row in confusion.items()]
    return "domain of the first neighbour, in percent of the queries\n\n" + align([["queries of", *columns], *rows])


def _format_frequency(frequency: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    rows = [
        [
            name,
            frequency_range(row["from"], row.get("to")),
            f"{row['num_queries']}",
            *(_percent(row[metric]) for metric in METRICS),
        ]
        for name, found in frequency.items()
        for row in found
    ]
    caption = "merged index by the images of its class that a query can find, in percent"
    return caption + "\n\n" + align([["domain", "images to find", "queries", *METRICS], *rows])


def frequency_range(low: float, high: float | None) -> str:
    """The numbers from `low` to below `high`, as text."""
    if high is None:
        return f"{low:g} or more"
    return f"{low:g}" if high == low + 1 else f"{low:g} to {high - 1:g}"


def _format_quality(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            f"{row['dim']}" + ("" if row["pca"] else " as it is"),
            row["code"],
            f"{row['bytes']:g}",
            *(_percent(row[metric]) for metric in METRICS),
        ]
        for row in rows
    ]
    caption = "quality per byte: principal components of the index, merged index, mean over the domains, in percent"
    return caption + "\n\n" + align([["dim", "code", "bytes", *METRICS], *cells])


def _format_leaks(leaks: Mapping[str, Any], split: str) -> str:
    counts = ", ".join(f"{name} {of['num_leaked']}" for name, of in leaks["domains"].items())
    return (
        f"{leaks['num_leaked']} of {leaks['num_images']} images of the {split} split occur in training "
        f"(compared: {leaks['compared']}): {counts}"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _metrics_percent(values: Mapping[str, Any]) -> str:
    return _metric_cells([f"{100 * values[metric]:.1f}" if metric in values else "-" for metric in METRICS])


def _metric_cells(texts: Sequence[str]) -> str:
    return " ".join(text.rjust(6) for text in texts)
