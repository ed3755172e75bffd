"""Extension of a trained run: weights it starts from, the old student it is held to, gain and forgetting."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import read_initial_run
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.domains import Domain
from modeling_udon.data.label_maps import LABEL_MAPS, label_maps
from modeling_udon.evaluation.protocol import METRICS, Scores, SplitScores
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.run_record import RunRecord
from modeling_udon.storage import read_json, write_json, write_text
from modeling_udon.training.distillation import STEP_STATE
from modeling_udon.training.teachers import OldStudent

OLD_SCORES_FILE = "old_student.json"
_REPORT = "extension.md"
_SIZES = ("embedding_dim", "teacher_dim", "head_hidden_dims", "head_bias")


@dataclass(frozen=True)
class Start:
    """A trained run as what another starts from.

    Attributes:
        run: What the run was told.
        shape: The configuration of its student.
        weights: The best weights with teachers and prototypes, by their names in the training model.
        label_maps: What `domains.json` says of its domains.
    """

    run: RunRecord
    shape: UdonConfig
    weights: dict[str, torch.Tensor]
    label_maps: dict[str, Any]


def open_start(config: TrainConfig) -> Start | None:
    """Opens the run that `config.init` names, if any.

    Raises:
        ConfigError: If it is no run with its best weights, or its heads have other sizes.
    """
    if config.init is None:
        return None
    run = read_initial_run(config.init.run)
    if not (run.folder / "domains.json").is_file():
        raise ConfigError(
            f"`init.run` must still have its domains.json, the classes that it knows. Got {run.folder} without it; "
            "bring it back, or give another run."
        )
    shape = UdonConfig.from_pretrained(run.folder / "best")
    for name in _SIZES:
        theirs, ours = getattr(shape, name), getattr(config.model, name)
        ours = list(ours) if isinstance(ours, tuple) else ours
        if ours != theirs:
            raise ConfigError(
                f"`model.{name}` must be that of the run in `init.run`, {theirs}. Got {ours}; leave it out."
            )
    known = read_json(run.folder / "domains.json", LABEL_MAPS)
    return Start(run, shape, load_file(run.weights), known)


def trained_domains(config: TrainConfig, domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """Returns the domains that steps belong to: all, or the new ones where the old ones are only measured.

    Where domains have no labels, those whose images are trained on, or else the labelled ones.

    Raises:
        ConfigError: If none would be left.
    """
    if config.adaptation is not None:
        targets = {name: domain for name, domain in domains.items() if not domain.has_labels}
        return targets if targets and config.adaptation.use_targets else labelled_domains(domains)
    if config.init is None or config.init.old_data != "measure":
        return dict(domains)
    old = read_initial_run(config.init.run).domains
    new = {name: domain for name, domain in domains.items() if name not in old}
    if not new:
        raise ConfigError(
            "`init.old_data` must be 'replay' where no domain is new. Got 'measure'; or add one with --add-domain."
        )
    return new


def labelled_domains(domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """Returns the domains whose training images have labels."""
    return {name: domain for name, domain in domains.items() if domain.has_labels}


def load_start(module: nn.Module, start: Start, domains: Mapping[str, Domain], prefix: str = "") -> None:
    """Gives weights the values of the run to start from; what belongs to a new domain stays as it was drawn.

    Args:
        module: The training model, or a part of it.
        start: The run to start from.
        domains: The domains that are trained on.
        prefix: Name of the part in the training model, with a dot after it.

    Raises:
        ConfigError: If a domain of the run has other data now, or the run has no weights for a part of the model.
    """
    maps = label_maps(domains)
    for name, now in maps.items():
        then = start.label_maps.get(name)
        if then is not None and any(then[what] != now[what] for what in ("classes", "fingerprint")):
            raise ConfigError(
                f"`domains.{name}` must hold the images and classes that {start.run.folder} was trained on. They "
                "changed; bring the old data back, or leave the domain out with --init.old_data none."
            )
    new = [name for name in maps if name not in start.label_maps]
    fresh = [f"{kind}_prototypes.{name}" for kind in ("student", "teacher") for name in new]
    heads = tuple(f"udon.teacher_heads.{name}." for name in new)
    names = {f"{prefix}{name}": name for name in module.state_dict()}
    fresh += STEP_STATE
    wanted = {full: name for full, name in names.items() if full not in fresh and not full.startswith(heads)}
    missing = [full for full in wanted if full not in start.weights]
    if missing:
        raise ConfigError(
            f"`init.run` must be a run that has trained all that this one keeps. Got {start.run.folder} without "
            f"{missing[0]}; start from the run that trained it, or leave its domain out with --init.old_data none."
        )
    module.load_state_dict({name: start.weights[full] for full, name in wanted.items()}, strict=False)


def old_student(udon: UdonModel, weight: float, shares_backbone: bool) -> OldStudent:
    """Copies the student as it is now.

    Args:
        udon: The model with the old weights.
        weight: Weight of the retention term.
        shares_backbone: Whether the backbone is frozen, so that one serves both.
    """
    old = udon.student()
    old.student_head = copy.deepcopy(udon.student_head)
    if not shares_backbone:
        old.backbone = copy.deepcopy(udon.backbone)
    for parameter in old.student_head.parameters() if shares_backbone else old.parameters():
        parameter.requires_grad_(False)
    return OldStudent(old if shares_backbone else old.eval(), weight)


def keep_old_scores(run_dir: Path, scores: SplitScores) -> None:
    """Writes down what the old student scores on the test split of all domains, before the first step."""
    values = {"merged": scores.merged, "separate": scores.separate}
    write_json(run_dir / OLD_SCORES_FILE, values, indent=1)


def compare_with_old(config: TrainConfig, scores: SplitScores) -> dict[str, Any]:
    """Sets the new student's scores beside the old one's, on the same index.

    Args:
        config: The run, which started from another.
        scores: What the new student scores.

    Returns:
        What `results.json` holds under `extension`: the run it started from, the new domains, and scores on the merged
        and the separate index, `old` and `new`.
    """
    assert config.init is not None
    old = read_json(config.run_dir / OLD_SCORES_FILE)
    known = read_initial_run(config.init.run).domains
    return {
        **config.init.model_dump(mode="json"),
        "new_domains": [name for name in config.domains if name not in known],
        "test": {
            "merged": {"old": old["merged"], "new": scores.merged},
            "separate": {"old": old["separate"], "new": scores.separate},
        },
    }


def format_extension(extension: Mapping[str, Any]) -> str:
    """What was gained and what was forgotten, as a table in Markdown that reads as text as well."""
    merged = extension["test"]["merged"]
    old, new = merged["old"], merged["new"]
    cells = [["domain", *(f"{metric} {when}" for metric in METRICS for when in ("old", "new", "change"))]]
    for name in new["domains"]:
        mark = " (new)" if name in extension["new_domains"] else ""
        cells.append([name + mark, *_changes(old["domains"][name], new["domains"][name])])
    for title, names in (("mean, old domains", False), ("mean, new domains", True)):
        group = [name for name in new["domains"] if (name in extension["new_domains"]) == names]
        if len(group) > 1:
            cells.append([title, *_changes(_mean(old, group), _mean(new, group))])
    cells.append(["mean", *_changes(old["mean"], new["mean"])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in [cells[0], rule, *cells[1:]]]
    caption = (
        f"old student (of {extension['run']}) and new student on the same merged index of the test split, in percent"
    )
    return "\n".join([caption, "", *(f"| {' | '.join(row)} |" for row in rows)])


def write_extension(run_dir: Path, extension: Mapping[str, Any]) -> None:
    """Writes the table beside the other reports of the run."""
    write_text(run_dir / _REPORT, f"# What was gained, what was forgotten\n\n{format_extension(extension)}\n")


def _changes(old: Mapping[str, float], new: Mapping[str, float]) -> list[str]:
    pairs = [(100 * old[metric], 100 * new[metric]) for metric in METRICS]
    return [cell for before, after in pairs for cell in (f"{before:.1f}", f"{after:.1f}", f"{after - before:+.1f}")]


def _mean(scores: Scores, names: list[str]) -> dict[str, float]:
    return {metric: sum(scores["domains"][name][metric] for name in names) / len(names) for metric in METRICS}
