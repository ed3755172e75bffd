"""A model's retrieval on the splits of its domains, and what it has to beat."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from modeling_udon.data.dataset import BrokenImage
from modeling_udon.data.domains import Domain, EvaluationSplit
from modeling_udon.data.labels import Labels
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.embedder import EmbeddedImages, ImageEmbedder
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
from modeling_udon.evaluation.rules import embedded_domain
from modeling_udon.networks import RAW_PIXELS

# By domain, then by kind of embedding: "student", "teacher", "backbone".
EmbeddedSplit = dict[str, dict[str, EmbeddedDomain]]


@dataclass(frozen=True)
class SplitNeighbours:
    """The neighbours that all numbers of one split are made from, by domain.

    Attributes:
        merged: In the index of all domains.
        separate: In the index of the own domain.
        teachers: In the index of the own domain, by the teachers' embeddings; empty without teachers.
        broken: Images that could not be read.
    """

    merged: dict[str, Neighbours]
    separate: dict[str, Neighbours]
    teachers: dict[str, Neighbours]
    broken: tuple[BrokenImage, ...] = ()

    def scores(self, metrics: Sequence[str] = METRICS) -> SplitScores:
        """Scores what was found."""
        return SplitScores(
            merged=score(self.merged, metrics),
            separate=score(self.separate, metrics),
            teachers=score(self.teachers, metrics) if self.teachers else None,
            left_out={name: found.num_left_out for name, found in self.merged.items() if found.num_left_out},
            copies={name: found.num_copied for name, found in self.merged.items() if found.num_copied},
        )


def search_model(
    encoder: Encoder,
    domains: Mapping[str, Domain],
    split: str,
    embedder: ImageEmbedder,
    metrics: Sequence[str] = METRICS,
) -> SplitNeighbours:
    """Finds the neighbours of student and teachers on every domain that has the split.

    All processes embed, and the main one searches: the others get nothing but the images that could not be read.

    Args:
        encoder: A student; its network is put into evaluation mode meanwhile.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        embedder: Runs the images through the encoder.
        metrics: As many neighbours are found as they need.
    """
    with _evaluation_mode(encoder.network):
        embedded, broken = embed_split(domains, split, embedder, encoder)
    if not embedded:
        return SplitNeighbours({}, {}, {}, broken)
    return replace(search_split(embedded, encoder.kind, metrics, **search_options(embedder)), broken=broken)


def evaluate_baselines(
    encoder: Encoder, domains: Mapping[str, Domain], split: str, embedder: ImageEmbedder
) -> tuple[dict[str, Scores], tuple[BrokenImage, ...]]:
    """Scores what a trained student has to beat, on the merged index.

    Args:
        encoder: The student before training.
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        embedder: Runs the images through the encoder.

    Returns:
        Scores of `"untrained"`, the backbone's own features at their full width, and `"raw_pixels"`, on the main
        process; and the images that could not be read.
    """
    scores, search = {}, search_options(embedder)
    broken: tuple[BrokenImage, ...] = ()
    for name, baseline in (("untrained", encoder.backbone()), ("raw_pixels", Encoder.open(RAW_PIXELS))):
        with _evaluation_mode(baseline.network):
            embedded, broken = embed_split(domains, split, embedder, baseline)
        if embedded:
            scores[name] = score_merged(choose_kind(embedded, baseline.kind), **search)
    return scores, broken


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)


def domains_with(domains: Mapping[str, Domain], split: str) -> dict[str, Domain]:
    """Returns the domains that have a split."""
    return {name: domain for name, domain in domains.items() if split in domain.evaluation}


def embed_split(
    domains: Mapping[str, Domain], split: str, embedder: ImageEmbedder, encoder: Encoder
) -> tuple[EmbeddedSplit, tuple[BrokenImage, ...]]:
    """Embeds query and index set of every domain that has the split.

    Args:
        domains: The opened domains.
        split: `"validation"` or `"test"`.
        embedder: Runs the images through the encoder.
        encoder: The encoder, in evaluation mode.

    Returns:
        The embeddings, on the main process, and the images that could not be read.
    """
    embedded: EmbeddedSplit = {}
    broken: list[BrokenImage] = []
    for name, domain in domains_with(domains, split).items():
        images = domain.evaluation[split]
        query = embedder(images.query.images, encoder, name, f"{split} query")
        index = None if images.index is None else embedder(images.index.images, encoder, name, f"{split} index")
        broken += [*query.broken, *(() if index is None else index.broken)]
        if not query.embeddings:  # another process has them
            continue
        query_labels, index_labels = integer_labels(images)
        query_rows = _readable_rows(query)
        index_rows = None if index is None else _readable_rows(index)
        for kind in query.embeddings:
            embedded.setdefault(name, {})[kind] = embedded_domain(
                name,
                images,
                query_labels,
                index_labels,
                _chosen(query.embeddings[kind], query_rows),
                None if index is None else _chosen(index.embeddings[kind], index_rows),
                query_rows,
                index_rows,
            )
    return embedded, tuple(broken)


def _readable_rows(images: EmbeddedImages) -> np.ndarray | None:
    """Rows of the images that could be read; `None` for all."""
    if not images.broken:
        return None
    num_images = len(next(iter(images.embeddings.values())))
    return np.setdiff1d(np.arange(num_images), [image.row for image in images.broken])


def _chosen(values: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    return values if rows is None else values[rows]


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
    assert isinstance(index, np.ndarray), "what is searched has one label per image"
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
