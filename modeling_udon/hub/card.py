"""The model card: `model_card.md` filled in from the run's config, its domains and its measured results."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_udon.evaluation.changes import Change, compare_with_start, name_worse
from modeling_udon.hub.sources import Sources, domain_licenses, teacher_name
from modeling_udon.search.results_page import html_text

TEMPLATE = Path(__file__).with_name("model_card.md")
TASK = "image-feature-extraction"
METRICS = ("R@1", "mMP@5")
NOT_STATED = "not stated"
SEE_PACKAGE = "see the package"
TASK_ID = "image-retrieval"

_METRIC_TYPES = {"R@1": "recall_at_1", "mMP@5": "mean_modified_precision_at_5"}
_DEMO_SOURCES = {
    "demo:numbers": "handwritten digits that come with scikit-learn",
    "demo:letters": "letters drawn with the fonts that come with matplotlib",
    "demo:symbols": "symbols drawn with the fonts that come with matplotlib",
    "demo:places": "patches of the photographs that come with scikit-image and scikit-learn",
}


def render_card(
    name: str,
    path: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    sources: Sources,
    *,
    revision: str | None = None,
    licences: Mapping[str, str] | None = None,
    gallery: Sequence[str] = (),
    calibrated: bool = False,
    javascript: bool = False,
    license: str | None = None,
) -> ModelCard:
    """Renders the card of a student.

    Args:
        name: The model's name.
        path: What `from_pretrained` takes: a Hub id or a folder.
        config: The run's resolved config; of a model without a run, what is known of it.
        results: What `results.json` holds, or `None` before the test.
        sources: What of backbone and data came from the Hub.
        revision: What the snippets pin; `None` for a folder.
        licences: Licences of data sets by their Hub id, as far as they are known.
        gallery: Files of the failure gallery, each named after its domain; those in a folder `examples` hold one query.
        calibrated: Whether `calibration.json` goes along.
        javascript: Whether ONNX graphs go along.
        license: The model's own; `None` leaves it out.
    """
    scores = None if results is None else results["splits"].get("test")
    domains = describe_domains(config.get("domains", {}), sources, licences or {})
    hub_data = list(dict.fromkeys(domain["hub_id"] for domain in domains if domain["hub_id"]))
    examples = [file for file in gallery if Path(file).parent.name == "examples"]
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag=TASK,
        license=license,
        base_model=sources.backbone,
        datasets=hub_data or None,
        metrics=list(_METRIC_TYPES.values()) if scores else None,
        tags=["udon", "image-retrieval", "image-embedding"],
        eval_results=_model_index(scores, sources) if scores else None,
        widget=_widget(path, revision, examples) or None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        path=path,
        pin="" if revision is None else f', revision="{revision}"',
        repo=revision is not None,
        facts={
            "embedding_dim": config["model"]["embedding_dim"],
            "nested_dims": ", ".join(map(str, config["model"].get("matryoshka", ()))),
        },
        domains=domains,
        domain_names=", ".join(domain["name"] for domain in domains),
        results=None if results is None or scores is None else _results(results, scores),
        training=_training(config, sources, results, licences or {}),
        gallery=[{"domain": Path(file).stem, "path": file} for file in gallery if file not in examples],
        calibrated=calibrated,
        javascript=javascript,
    )


def describe_domains(specs: Mapping[str, Any], sources: Sources, licences: Mapping[str, str]) -> list[dict[str, Any]]:
    """Says of each domain where its images come from and under which licence.

    Args:
        specs: The specs of the domains, as the resolved config has them.
        sources: What of the data came from the Hub.
        licences: Licences of data sets by their Hub id; what a spec says itself comes first.
    """
    stated = domain_licenses(specs, sources, licences)
    described = []
    for name, spec in specs.items():
        hub_id, demo = sources.domains.get(name), _DEMO_SOURCES.get(spec["path"])
        licence = str(spec.get("license") or stated.get(name) or (SEE_PACKAGE if demo else NOT_STATED))
        source = f"[{hub_id}](https://huggingface.co/datasets/{hub_id})" if hub_id else "own data"
        described.append(
            {
                "name": name,
                "hub_id": hub_id,
                "source": demo or source,
                # A data set's own words: neither HTML nor further cells of the table.
                "licence": html_text(licence).replace("|", "&#124;"),
            }
        )
    return described


def evaluation_files(results: Mapping[str, Any] | None, sources: Sources) -> dict[str, str]:
    """The scores on data sets of the Hub, in the form of `.eval_results/*.yaml`.

    Args:
        results: What `results.json` holds.
        sources: What of the data came from the Hub.

    Returns:
        Text by path in the repository. Scores are those of the separate index: a data set's own, whatever other
        domains the model was tested with.
    """
    if results is None or "test" not in results["splits"]:
        return {}
    separate = results["splits"]["test"]["separate"]["domains"]
    files = {}
    for name, spec in results["config"]["domains"].items():
        hub_id = sources.domains.get(name)
        if name not in separate or hub_id is None:
            continue
        dataset = {"id": hub_id, "task_id": TASK_ID}
        if spec.get("revision"):
            dataset["revision"] = spec["revision"]
        entries = [
            {"dataset": dict(dataset), "value": _round(separate[name][metric]), "notes": f"{metric} in percent"}
            for metric in METRICS
        ]
        files[f".eval_results/udon-{name}.yaml"] = yaml.safe_dump(entries, sort_keys=False)
    return files


def _model_index(scores: Mapping[str, Any], sources: Sources) -> list[EvalResult]:
    """R@1 and mMP@5 of each domain, and the means over domains, on the merged index."""
    merged = scores["merged"]
    # What is not on the Hub is called by the domain's name: a folder of the author's says nothing.
    rows = [(name, sources.domains.get(name) or name, values) for name, values in merged["domains"].items()]
    rows.append(("mean over the domains", "mean-over-the-domains", merged["mean"]))
    return [
        EvalResult(
            task_type=TASK,
            task_name="image retrieval, merged index",
            dataset_name=name,
            dataset_type=dataset,
            dataset_split="test",
            metric_type=_METRIC_TYPES[metric],
            metric_name=metric,
            metric_value=_round(values[metric]),
        )
        for name, dataset, values in rows
        for metric in METRICS
    ]


def _results(results: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any]:
    intervals = results.get("analysis", {}).get("test", {}).get("intervals")
    kinds = [(kind, scores[kind], intervals[kind] if intervals else None) for kind in ("merged", "separate")]
    header = [f"{metric} {kind}" for kind, _, _ in kinds for metric in METRICS]
    table = [_line(["domain", *header]), _line(["---"] * (1 + len(header)))]
    for name in scores["merged"]["domains"]:
        cells = [
            _cell(values["domains"][name], bounds and bounds["domains"][name], metric)
            for _, values, bounds in kinds
            for metric in METRICS
        ]
        table.append(_line([name, *cells]))
    means = [
        _cell(values["mean"], bounds and bounds["mean"], metric) for _, values, bounds in kinds for metric in METRICS
    ]
    table.append(_line(["**mean**", *means]))
    baseline = results.get("baseline") or {}
    rows = [
        _line([title, *(_percent(baseline[key][metric]) for metric in METRICS)])
        for key, title in (("untrained", "backbone before training"), ("raw_pixels", "raw pixels"))
        if key in baseline
    ]
    changes = compare_with_start(results)
    return {
        "intervals": intervals is not None,
        "confidence": f"{100 * intervals['confidence']:.0f}" if intervals else "",
        "table": table,
        "baselines": [_line(["", *METRICS]), _line(["---"] * 3), *rows] if rows else [],
        "changes": _changes(changes) if changes else [],
        "worse": name_worse(changes) if changes else "",
    }


def _changes(changes: Sequence[Change]) -> list[str]:
    """A table of each domain before and after training, with the difference in points."""
    columns = [f"{metric}{what}" for metric in METRICS for what in (" before", "", " difference")]
    rows = [
        [
            text
            for metric in METRICS
            for text in (_percent(change.before[metric]), _percent(change.after[metric]), change.points(metric))
        ]
        for change in changes
    ]
    table = [_line([change.domain, *cells]) for change, cells in zip(changes, rows, strict=True)]
    return [_line(["domain", *columns]), _line(["---"] * (1 + len(columns))), *table]


def _training(
    config: Mapping[str, Any], sources: Sources, results: Mapping[str, Any] | None, licences: Mapping[str, str]
) -> list[str]:
    """The settings that make the run, a line each."""
    model, train = config["model"], config.get("train")
    if train is None:
        return []
    backbone = model["backbone"]
    if backbone is None:
        told = f"{model['backbone_config']['model_type']}, from scratch"
    else:
        told = f"`{sources.backbone}`" if sources.backbone else "weights of an own folder"
    length = f"{train['num_steps']} steps" if train["num_steps"] is not None else f"{train['num_epochs']:g} epochs"
    optim, loss, sampling = config["optim"], config["loss"], config["sampling"]
    weights = [
        f"{term.replace('_', ' ')} {loss[term]:g}"
        for term in (
            "student_classification",
            "teacher_classification",
            "logit_distillation",
            "relational_distillation",
        )
    ]
    lines = [
        f"Backbone: {told}; images of {config['data']['image_size']} pixels",
        f"Length: {length} of {train['batch_size']} images, each step of one domain; seed {config['seed']}",
        f"Optimiser: AdamW, learning rate {optim['lr']:g} for heads and prototypes, {optim['backbone_lr']:g} for the "
        f"backbone, {optim['schedule']} schedule, weight decay {optim['weight_decay']:g}",
        f"Loss: {loss['kind']}, scale {loss['scale']:g}; weights of its terms: {', '.join(weights)}",
        f"Sampling of domains: {sampling['strategy'].replace('_', ' ')}",
        f"System: {config.get('system', 'udon')}; precision: {train['mixed_precision']}",
    ]
    if frozen := config.get("frozen_teachers"):
        lines.append(f"Frozen teachers: {'; '.join(_frozen_teacher(spec, sources, licences) for spec in frozen)}")
    if results is not None:
        versions = results["versions"]
        used = [f"{name} {versions[name]}" for name in ("torch", "transformers", "modeling_udon") if name in versions]
        lines.append(f"Versions: {', '.join(used)}")
    return [line.replace("precision: no", "precision: float32") for line in lines]


def _frozen_teacher(spec: Mapping[str, Any], sources: Sources, licences: Mapping[str, str]) -> str:
    name = teacher_name(spec)
    told = "the moving average of the student" if name == "average" else "the backbone as it was before training"
    if name in sources.teachers:
        stated = sources.teachers[name]
        shown = f"`{name}`" if stated is None or ":" in name else "an own folder"
        known = licences.get(name) if stated is None else stated.replace("unknown", NOT_STATED)
        told = f"{shown} (licence: {html_text(known or NOT_STATED)})"
    return f"{told}, relational weight {spec['relational']:g}, logit weight {spec['logit']:g}"


def _widget(path: str, revision: str | None, examples: Iterable[str]) -> list[dict[str, str]]:
    return [
        {
            "src": f"https://huggingface.co/{path}/resolve/{revision}/{file}",
            "example_title": Path(file).stem,
        }
        for file in examples
    ]


def _cell(values: Mapping[str, float], bounds: Mapping[str, Sequence[float]] | None, metric: str) -> str:
    interval = "" if not bounds else f" ({_percent(bounds[metric][0])} to {_percent(bounds[metric][1])})"
    return _percent(values[metric]) + interval


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _round(value: float) -> float:
    return float(_percent(value))
