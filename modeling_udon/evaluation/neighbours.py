"""A model's retrieval on the splits of its domains, and what it has to beat."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modeling_udon.data.domains import Domain, EvaluationSplit, ImageSplit
from modeling_udon.data.labels import Labels
from modeling_udon.evaluation.embedder import (
    Embed,
    ImageEmbedder,
    embed_raw_pixels,
    embed_with_model,
    shrink_to_thumbnail,
)
from modeling_udon.evaluation.protocol import (
    METRICS,
    EmbeddedDomain,
    Neighbours,
    Scores,
    SplitScores,
    score,
    score_merged,
    search_merged,
    search_separate,
)
from modeling_udon.modeling_udon import UdonModel

Channels = tuple[float, float, float]
# By domain, then by kind of embedding: "student", "teacher", "backbone".
EmbeddedSplit = dict[str, dict[str, EmbeddedDomain]]


@dataclass(frozen=True)
class SplitNeighbours:
    """The neighbours that all numbers of one split are made from, by domain.

    Attributes:
        merged: In the index of all domains.
        separate: In the index of the own domain.
        teachers: In the index of the own domain, by the teachers' embeddings; empty without teachers.
    """

    merged: dict[str, Neighbours]
    separate: dict[str, Neighbours]
    teachers: dict[str, Neighbours]

    def scores(self, metrics: Sequence[str] = METRICS) -> SplitScores:
        """Scores what was found."""
        return SplitScores(
            merged=score(self.merged, metrics),
            separate=score(self.separate, metrics),
            teachers=score(self.teachers, metrics) if self.teachers else None,
            left_out={name: found.num_left_out for name, found in self.merged.items() if found.num_left_out},
        )


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
    return search_model(model, domains, split, embedder, mean, std).scores()


def search_model(
    model: UdonModel,
    domains: Mapping[str, Domain],
    split: str,
    embedder: ImageEmbedder,
    mean: Channels,
    std: Channels,
) -> SplitNeighbours:
    """Finds what `evaluate_model` scores; the same arguments."""
    was_training = model.training
    model.eval()
    embedded = embed_split(domains, split, embedder, lambda name: embed_with_model(model, mean, std, name))
    model.train(was_training)
    return search_split(embedded, "student", **search_options(embedder))


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
    backbone = embed_split(domains, split, embedder, lambda name: embed_with_model(model, mean, std))
    model.train(was_training)
    thumbnails = replace(embedder, transform=shrink_to_thumbnail)
    pixels = embed_split(domains, split, thumbnails, lambda name: embed_raw_pixels)
    search = search_options(embedder)
    return {
        "untrained": score_merged(choose_kind(backbone, "backbone"), **search),
        "raw_pixels": score_merged(choose_kind(pixels, "raw_pixels"), **search),
    }


def domains_with(domains: Mapping[str, Domain], split: str) -> dict[str, Domain]:
    """Returns the domains that have a split."""
    return {name: domain for name, domain in domains.items() if split in domain.evaluation}


def embed_split(
    domains: Mapping[str, Domain], split: str, embedder: ImageEmbedder, embed_for: Callable[[str], Embed]
) -> EmbeddedSplit:
    """Embeds query and index set of every domain that has the split.

    Args:
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        embedder: Runs the images through the embedding function.
        embed_for: Gives the embedding function of a domain.
    """
    embedded: EmbeddedSplit = {}
    for name, domain in domains_with(domains, split).items():
        images, embed = domain.evaluation[split], embed_for(name)
        query_labels, index_labels = integer_labels(images)
        query, query_rows = _embed_whole(images.query, embedder, embed, name, f"{split} query")
        index, index_rows = None, None
        if images.index is not None:
            index, index_rows = _embed_whole(images.index, embedder, embed, name, f"{split} index")
        num_images = len(images.query) + (0 if images.index is None else len(images.index))
        for kind, values in query.items():
            of_index = None if index is None else index[kind]
            embedded.setdefault(name, {})[kind] = EmbeddedDomain(
                values,
                query_labels if query_rows is None else [query_labels[row] for row in query_rows],
                of_index,
                index_labels if index_labels is None or index_rows is None else index_labels[index_rows],
                query_rows,
                index_rows,
                num_images - len(values) - (0 if of_index is None else len(of_index)),
            )
    return embedded


def _embed_whole(
    images: ImageSplit, embedder: ImageEmbedder, embed: Embed, name: str, split: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Embeds what can be read; gives its rows as well, `None` for all."""
    num_broken = len(embedder.broken)
    embeds = embedder(images.images, embed, name, split)
    broken = [image.row for image in embedder.broken[num_broken:]]
    if not broken:
        return embeds, None
    rows = np.setdiff1d(np.arange(len(images)), broken)
    return {kind: values[rows] for kind, values in embeds.items()}, rows


def search_split(
    embedded: EmbeddedSplit, kind: str, metrics: Sequence[str] = METRICS, **search: Any
) -> SplitNeighbours:
    """Searches one kind of embedding in the merged and in separate indexes, and the teachers', where there are any.

    Args:
        embedded: What `embed_split` gave.
        kind: Which embeddings are the model's, such as `"student"`.
        metrics: As many neighbours are found as they need.
        search: Options of `exact_search`.
    """
    chosen, teachers = choose_kind(embedded, kind), choose_kind(embedded, "teacher")
    return SplitNeighbours(
        merged=search_merged(chosen, metrics, **search),
        separate=search_separate(chosen, metrics, **search),
        teachers=search_separate(teachers, metrics, **search) if teachers else {},
    )


def choose_kind(embedded: EmbeddedSplit, kind: str) -> dict[str, EmbeddedDomain]:
    """Returns the embeddings of one kind, of the domains that have it."""
    return {name: kinds[kind] for name, kinds in embedded.items() if kind in kinds}


def integer_labels(images: EvaluationSplit) -> tuple[list[np.ndarray] | np.ndarray, np.ndarray | None]:
    """Numbers the classes of query and index set, whatever they are called."""
    numbers: dict[int | str, int] = {}
    query = _numbered(images.query.labels, numbers)
    if images.index is None:
        return query, None
    index = _numbered(images.index.labels, numbers)
    assert isinstance(index, np.ndarray), "what is searched has one label an image"
    return query, index


def _numbered(labels: Labels, numbers: dict[int | str, int]) -> list[np.ndarray] | np.ndarray:
    """Numbers of each image's labels, after those in `numbers`, which takes up the new ones."""
    of_codes = np.asarray([numbers.setdefault(name, len(numbers)) for name in labels.names], dtype=np.int64)
    codes = of_codes[labels.codes]
    if labels.starts is None or np.all(np.diff(labels.starts) == 1):
        return codes
    return np.split(codes, labels.starts[1:-1])


def search_options(embedder: ImageEmbedder) -> dict[str, Any]:
    """Returns where `exact_search` runs: on the device that embeds, if that is a GPU."""
    device = embedder.accelerator.device
    return {"backend": "torch", "device": device} if device.type == "cuda" else {"backend": "faiss"}
