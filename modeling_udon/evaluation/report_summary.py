"""Opening of the report: one sentence, one table of domains and systems, and the settings that are not the defaults."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from modeling_udon.config import TrainConfig
from modeling_udon.config_sections import section_of
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.evaluation.protocol import mean_over_domains

METRIC = "R@1"
# What a score is compared with, the first that was measured.
_BASELINES = {"untrained": "the untrained backbone", "raw_pixels": "raw pixels"}
# Smaller differences are none: a table shows tenths of a percent.
_LEAST_POINTS = 0.05


def opening_sentence(name: str, split: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    """Score, against what, and the weakest domain, in one sentence.

    Args:
        name: The split.
        split: What `results.json` holds of it.
        baseline: What it holds of baselines, measured on the test split.
    """
    scores = split["merged"]
    score, domains = scores["mean"][METRIC], scores["domains"]
    over = f", mean of {len(domains)} domains" if len(domains) > 1 else ""
    text = f"{METRIC} is {_percent(score)} % on the {name} split{over}"
    known = next((key for key in _BASELINES if name == "test" and METRIC in baseline.get(key, {})), None)
    if known is not None:
        other = baseline[known][METRIC]
        text += f", against {_percent(other)} % by {_BASELINES[known]} ({_signed(100 * (score - other))} points)"
    if len(domains) > 1:
        weakest = min(domains, key=lambda domain: domains[domain][METRIC])
        text += f"; the weakest domain is {weakest} with {_percent(domains[weakest][METRIC])} %"
    return text + "."


def overview(name: str, split: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """The table of domains and systems: R@1 of each, and by how many points the student is above or below.

    Args:
        name: The split.
        split: What `results.json` holds of it.
        baseline: What it holds of baselines.
    """
    student = {**split["merged"]["domains"], "mean": split["merged"]["mean"]}
    systems = {"own index": {**split["separate"]["domains"], "mean": split["separate"]["mean"]}}
    if split["teachers"]:
        systems["teachers"] = {**split["teachers"], "mean": mean_over_domains(split["teachers"])}
    for key, title in (("untrained", "untrained"), ("raw_pixels", "raw pixels")):
        if name == "test" and key in baseline:
            systems[title] = {**baseline[key].get("domains", {}), "mean": baseline[key]}
    rows = []
    for domain, values in student.items():
        cells = [_compared(values[METRIC], scores.get(domain, {}).get(METRIC)) for scores in systems.values()]
        rows.append((domain, _percent(values[METRIC]), cells))
    return {"columns": list(systems), "rows": rows[:-1], "mean": rows[-1]}


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The keys of a run whose values are not the defaults, each with its value and the default; all of another model.

    Args:
        config: What `results.json` says of the run or model.
    """
    if "system" not in config:
        return [(key, _json(value), "") for key, value in config.items()]
    return [
        (key, _json(value), "" if default is None else default)
        for key, value, default in _changed(config, TrainConfig, "")
    ]


def _changed(config: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any, str | None]]:
    for name, field in model.model_fields.items():
        if name not in config:
            continue
        value, inner = config[name], section_of(field)
        if name == "domains" and isinstance(value, Mapping):
            for domain, spec in value.items():
                yield from _changed(spec, DomainSpec, f"domains.{domain}.")
        elif inner is not None and isinstance(value, Mapping):
            yield from _changed(value, inner, f"{prefix}{name}.")
        elif field.is_required():
            yield f"{prefix}{name}", value, None
        else:
            default = _json(field.get_default(call_default_factory=True))
            if _json(value) != default:
                yield f"{prefix}{name}", value, default


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _compared(student: float, other: float | None) -> dict[str, str]:
    if other is None:
        return {"value": "–", "difference": "", "kind": ""}
    points = 100 * (student - other)
    if abs(points) < _LEAST_POINTS:
        return {"value": _percent(other), "difference": "= same", "kind": ""}
    arrow, kind = ("▲", "above") if points > 0 else ("▼", "below")
    return {"value": _percent(other), "difference": f"{arrow} {_signed(points)}", "kind": kind}


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
