"""What sets the weights of domains, and the order of images within them, from a config."""

import json
from collections.abc import Mapping
from pathlib import Path

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.data.class_draws import ClassDraws
from modeling_udon.data.domains import Domain
from modeling_udon.data.learnable import ExcessLoss, LearningProgress, LossOverLogClasses, ValidationGain
from modeling_udon.data.weights import DynamicWeights

# Without some steps for all, a domain that has nothing to learn now would never be asked again.
_UNIFORM_SHARE = 0.2


def make_weights(config: TrainConfig, domains: Mapping[str, Domain]) -> DynamicWeights:
    """Makes what sets the weights of domains by the config's strategy.

    Args:
        config: The run.
        domains: The domains that are trained on.

    Raises:
        ConfigError: If a domain lacks what the strategy goes by: a reference loss, or a validation split.
    """
    sampling, number = config.sampling, len(domains)
    share = sampling.uniform_share
    if share is None:
        share = 0.0 if sampling.strategy == "dynamic" else _UNIFORM_SHARE
    if sampling.strategy == "loss_over_log_c":
        classes = [len(domain.classes) for domain in domains.values()]
        by_student = config.ablation.signal == "student" or not config.loss.needs_teachers
        if config.loss.classifier == "joint" and by_student:
            classes = [sum(classes)] * number
        return LossOverLogClasses(classes, share)
    if sampling.strategy == "excess_loss":
        return ExcessLoss(_reference_losses(config, domains), share)
    if sampling.strategy == "learning_progress":
        return LearningProgress(number, share)
    if sampling.strategy == "validation_gain":
        if missing := [name for name, domain in domains.items() if "validation" not in domain.evaluation]:
            raise ConfigError(
                "`sampling.strategy` 'validation_gain' must have a validation split of every domain. "
                f"Got none of {', '.join(missing)}; add one, or take another strategy."
            )
        return ValidationGain(number, share)
    return DynamicWeights(number, share)


def make_class_draws(config: TrainConfig, domains: Mapping[str, Domain]) -> dict[str, ClassDraws]:
    """Makes the order of images within each domain where it goes by classes; empty where it does not.

    Raises:
        ConfigError: If a domain is streamed, whose rows come in windows.
    """
    images = config.sampling.images_per_class
    if images is None:
        return {}
    for name, domain in domains.items():
        if domain.row_groups is not None:
            raise ConfigError(
                f"`sampling.images_per_class` must be null where a domain is streamed. Got {images} with {name!r}; "
                "leave it out, or download the data."
            )
    return {
        name: ClassDraws(domain.labels, images, (config.seed, number))
        for number, (name, domain) in enumerate(domains.items())
    }


def _reference_losses(config: TrainConfig, domains: Mapping[str, Domain]) -> list[float]:
    reference = config.sampling.reference
    losses = reference if isinstance(reference, dict) else _losses_of_run(Path(str(reference)))
    if not set(domains) <= set(losses):
        raise ConfigError(
            f"`sampling.reference` must have a loss of each of {', '.join(domains)}. Got {losses}; give them by name, "
            "or a run whose last interval had steps of all."
        )
    return [losses[name] for name in domains]


def _losses_of_run(folder: Path) -> dict[str, float]:
    path = folder / "metrics.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        told: list[dict[str, float]] = [row["signal_losses"] for row in rows if "signal_losses" in row]
    except (OSError, ValueError, TypeError):
        told = []
    if not told:
        raise ConfigError(
            "`sampling.reference` must be a run that lasted an interval of the sampler, `sampling.update_every`. "
            f"Got {folder}, whose metrics.jsonl tells of none; train it longer, or give the losses by name."
        )
    return told[-1]
