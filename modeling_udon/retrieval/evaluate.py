"""A model's retrieval on the splits of its domains, and what it has to beat."""

from collections.abc import Callable, Mapping

import numpy as np

from modeling_udon.data.domains import Domain, EvaluationSplit, ImageSplit
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.retrieval.embed import Embed, ImageEmbedder, embed_raw_pixels, embed_with_model
from modeling_udon.retrieval.protocol import EmbeddedDomain, Scores, SplitScores, score_merged, score_separate

Channels = tuple[float, float, float]


def evaluate_model(
    model: UdonModel,
    domains: Mapping[str, Domain],
    split: str,
    embedder: ImageEmbedder,
    mean: Channels,
    std: Channels,
) -> SplitScores:
    """Scores student and teachers on every domain that has the split.

    Args:
        model: The model; it is put into evaluation mode for the while.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        embedder: Runs the images through the model.
        mean: Mean of each channel that the model was trained with.
        std: Standard deviation of each channel.
    """
    was_training = model.training
    model.eval()
    embedded = _embed_domains(domains, split, embedder, lambda name: embed_with_model(model, mean, std, name))
    model.train(was_training)
    students = {name: kinds["student"] for name, kinds in embedded.items()}
    teachers = {name: kinds["teacher"] for name, kinds in embedded.items() if "teacher" in kinds}
    search = _search_options(embedder)
    return SplitScores(
        merged=score_merged(students, **search),
        separate=score_separate(students, **search),
        teachers=score_separate(teachers, **search) if teachers else None,
    )


def evaluate_baselines(
    model: UdonModel,
    domains: Mapping[str, Domain],
    split: str,
    embedder: ImageEmbedder,
    mean: Channels,
    std: Channels,
) -> dict[str, Scores]:
    """Scores what a trained student has to beat, on the merged index.

    Args:
        model: The model before training.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        embedder: Runs the images through the model.
        mean: Mean of each channel that the model is trained with.
        std: Standard deviation of each channel.

    Returns:
        `"untrained"`, the backbone's own features at their full width, and `"raw_pixels"`.
    """
    was_training = model.training
    model.eval()
    backbone = _embed_domains(domains, split, embedder, lambda name: embed_with_model(model, mean, std))
    model.train(was_training)
    pixels = _embed_domains(domains, split, embedder, lambda name: embed_raw_pixels)
    search = _search_options(embedder)
    return {
        "untrained": score_merged({name: kinds["backbone"] for name, kinds in backbone.items()}, **search),
        "raw_pixels": score_merged({name: kinds["raw_pixels"] for name, kinds in pixels.items()}, **search),
    }


def domains_with(domains: Mapping[str, Domain], split: str) -> dict[str, Domain]:
    """Returns the domains that have a split."""
    return {name: domain for name, domain in domains.items() if split in domain.evaluation}


def _embed_domains(
    domains: Mapping[str, Domain], split: str, embedder: ImageEmbedder, embed_for: Callable[[str], Embed]
) -> dict[str, dict[str, EmbeddedDomain]]:
    """Embeds query and index sets; the result is by domain, then by kind of embedding."""
    embedded = {}
    for name, domain in domains_with(domains, split).items():
        images, embed = domain.evaluation[split], embed_for(name)
        query = embedder(images.query.images, embed, name)
        index = None if images.index is None else embedder(images.index.images, embed, name)
        query_labels, index_labels = _integer_labels(images)
        embedded[name] = {
            kind: EmbeddedDomain(values, query_labels, None if index is None else index[kind], index_labels)
            for kind, values in query.items()
        }
    return embedded


def _integer_labels(images: EvaluationSplit) -> tuple[list[list[int]] | np.ndarray, np.ndarray | None]:
    """Numbers the classes of query and index set, whatever they are called."""
    query, index = _label_lists(images.query), [] if images.index is None else _label_lists(images.index)
    numbers: dict[int | str, int] = {}
    for label in (label for labels in (*query, *index) for label in labels):
        numbers.setdefault(label, len(numbers))
    query_numbers: list[list[int]] | np.ndarray = [[numbers[label] for label in labels] for labels in query]
    if all(len(labels) == 1 for labels in query):
        query_numbers = np.asarray(query_numbers).reshape(-1)
    if images.index is None:
        return query_numbers, None
    return query_numbers, np.asarray([numbers[label] for labels in index for label in labels])


def _label_lists(split: ImageSplit) -> list[list[int | str]]:
    return [label if isinstance(label, list) else [label] for label in split.labels]


def _search_options(embedder: ImageEmbedder) -> dict[str, object]:
    device = embedder.accelerator.device
    return {"backend": "torch", "device": device} if device.type == "cuda" else {"backend": "faiss"}
