"""Evaluation protocol: embedded query and index sets, their neighbours in a merged and in separate indexes, scores.

The search is the expensive part, so it runs once: `search_merged` and `search_separate` return the neighbours, and
every number, interval, confusion matrix and gallery is made from those.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np

from modeling_udon.evaluation.copies import most_copies, right_copies, without_copies
from modeling_udon.evaluation.metrics import (
    Integers,
    QueryLabels,
    count_positives,
    flatten_labels,
    mean_average_precision_at_r,
    mean_modified_precision_at_k,
    recall_at_k,
)
from modeling_udon.search.exact_search import exact_search

METRICS = ("R@1", "mMP@5")


@dataclass(frozen=True)
class EmbeddedDomain:
    """The embedded query and index set of one domain.

    Attributes:
        query_embeds: Of shape `(num_queries, dim)`, unit norm.
        query_labels: An integer a query, or a list of integers, any of which is right.
        index_embeds: Of shape `(num_index, dim)`. `None`: the query set is the index, and each query is taken out of
            it by identity.
        index_labels: Of shape `(num_index,)`, `None` together with `index_embeds`.
        query_rows: Rows of the queries in the data, ascending, where some could not be read; `None` for all rows.
        index_rows: The same of the index.
        num_left_out: Images of both that could not be read.
        copies: Of shape `(num_pairs, 2)`: a position among the queries, and one in the index that has the query's own
            picture and is left out for it. `None` for no pairs.
    """

    query_embeds: np.ndarray
    query_labels: QueryLabels
    index_embeds: np.ndarray | None = None
    index_labels: Integers | None = None
    query_rows: np.ndarray | None = None
    index_rows: np.ndarray | None = None
    num_left_out: int = 0
    copies: np.ndarray | None = None


@dataclass(frozen=True)
class Neighbours:
    """What one search found for the queries of one domain.

    Attributes:
        ids: Rows of the searched index, of shape `(num_queries, num_neighbours)`, best first, -1 for none.
        scores: Their inner products.
        query_labels: As in `EmbeddedDomain`, but unique over the domains that were searched together.
        index_labels: Of shape `(num_index,)`, of the whole searched index, unique over the domains.
        num_positives: Of shape `(num_queries,)`, the query itself left out.
        index_domains: The domains in the index, in the order of its rows.
        index_starts: Of shape `(num_domains,)`: the row at which each of them begins.
        query_rows: As in `EmbeddedDomain`.
        index_rows: The same of each domain in the index.
        num_left_out: As in `EmbeddedDomain`.
        num_copied: Queries whose own picture was in the index and left out for them.
    """

    ids: np.ndarray
    scores: np.ndarray
    query_labels: np.ndarray | Sequence[np.ndarray]
    index_labels: np.ndarray
    num_positives: np.ndarray
    index_domains: tuple[str, ...]
    index_starts: np.ndarray
    query_rows: np.ndarray | None = None
    index_rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    num_left_out: int = 0
    num_copied: int = 0

    def query_row(self, query: int) -> int:
        """The row in the data of a query."""
        return query if self.query_rows is None else int(self.query_rows[query])

    def locate(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each neighbour lies: its position in `index_domains` and the row in the data of that domain's index.

        Both have the shape of `ids`, and -1 where there is no neighbour.
        """
        domains = np.searchsorted(self.index_starts, self.ids, side="right") - 1
        rows = np.where(self.ids < 0, -1, self.ids - self.index_starts[domains])
        for position, name in enumerate(self.index_domains):
            if name in self.index_rows:
                chosen = (domains == position) & (self.ids >= 0)
                rows[chosen] = self.index_rows[name][rows[chosen]]
        return domains, rows


class Scores(TypedDict):
    """Values by metric, as fractions: of each domain, and their unweighted mean over the domains."""

    mean: dict[str, float]
    domains: dict[str, dict[str, float]]


@dataclass(frozen=True)
class SplitScores:
    """All scores of one split; the teachers are scored on the index of their own domain.

    `left_out` counts the images of a domain that could not be read and are in no score, `copies` its queries whose own
    picture was in the index and left out for them.
    """

    merged: Scores
    separate: Scores
    teachers: Scores | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    copies: Mapping[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Scores]:
        """The scores as a row of `metrics.jsonl` holds them."""
        teachers = {} if self.teachers is None else {"teachers": self.teachers}
        return {"merged": self.merged, "separate": self.separate, **teachers}


def search_merged(
    domains: Mapping[str, EmbeddedDomain], metrics: Sequence[str] = METRICS, **search: Any
) -> dict[str, Neighbours]:
    """Search the queries of each domain in one index that holds all domains.

    Args:
        domains: By name; all embedded by the same model.
        metrics: Names such as "R@1", "mMP@5", "mAP@R": as many neighbours are found as they need.
        search: Options of `exact_search`: `backend`, `device`, `chunk_size`.

    Returns:
        The neighbours by domain; two queries or index rows have the same label only if label and domain agree.

    Raises:
        ValueError: If a domain's arrays do not fit together or with those of the others, or a metric is unknown.
    """
    index_embeds, index_labels, index_starts, query_labels = _merge(domains)
    searched = {name: d.query_rows if d.index_embeds is None else d.index_rows for name, d in domains.items()}
    index_rows = {name: rows for name, rows in searched.items() if rows is not None}
    neighbours = {}
    for (name, domain), start in zip(domains.items(), index_starts, strict=True):
        own_rows = own_rows_of(domain, int(start))
        copies = copies_in(domain, int(start))
        num_positives = count_positives(query_labels[name], index_labels, own_rows)
        num_positives -= right_copies(copies, query_labels[name], index_labels)
        depth = max(_depth(metric, num_positives) for metric in metrics)
        found = depth + most_copies(copies)
        scores, ids = exact_search(domain.query_embeds, index_embeds, found, exclude=own_rows, **search)
        scores, ids = without_copies(scores, ids, copies, depth)
        neighbours[name] = Neighbours(
            ids,
            scores,
            query_labels[name],
            index_labels,
            num_positives,
            tuple(domains),
            index_starts,
            domain.query_rows,
            index_rows,
            domain.num_left_out,
            len(np.unique(copies[:, 0])),
        )
    return neighbours


def own_rows_of(domain: EmbeddedDomain, start: int) -> np.ndarray | None:
    """The row of each query in the merged index, where the query set is the index.

    Args:
        domain: The domain.
        start: The row at which its index begins.
    """
    return start + np.arange(len(domain.query_embeds)) if domain.index_embeds is None else None


def copies_in(domain: EmbeddedDomain, start: int) -> np.ndarray:
    """The domain's `copies` by rows of the merged index, where its own begin at `start`: shape `(num_pairs, 2)`."""
    pairs = np.empty((0, 2), np.int64) if domain.copies is None else np.asarray(domain.copies, np.int64)
    return pairs + (0, start)


def search_separate(
    domains: Mapping[str, EmbeddedDomain], metrics: Sequence[str] = METRICS, **search: Any
) -> dict[str, Neighbours]:
    """Search the queries of each domain in the index of that domain alone; see `search_merged`.

    The domains may differ in their dimension, as those of teachers do.
    """
    return {name: search_merged({name: domain}, metrics, **search)[name] for name, domain in domains.items()}


def score_queries(neighbours: Neighbours, metrics: Sequence[str] = METRICS) -> dict[str, np.ndarray]:
    """The value of each query by metric, of shape `(num_queries,)`.

    Raises:
        ValueError: If a metric is unknown or needs more neighbours than were searched for.
    """
    ids, query_labels, index_labels = neighbours.ids, neighbours.query_labels, neighbours.index_labels
    values = {}
    for metric in metrics:
        kind, k = _parse(metric)
        if kind == "R":
            values[metric] = recall_at_k(ids, query_labels, index_labels, k, reduce=False)
        elif kind == "mMP":
            values[metric] = mean_modified_precision_at_k(
                ids, query_labels, index_labels, neighbours.num_positives, k, reduce=False
            )
        else:
            values[metric] = mean_average_precision_at_r(
                ids, query_labels, index_labels, neighbours.num_positives, reduce=False
            )
    return values


def score(neighbours: Mapping[str, Neighbours], metrics: Sequence[str] = METRICS) -> Scores:
    """The mean over the queries of each domain, and the unweighted mean over the domains."""
    domains = {
        name: {metric: float(values.mean()) for metric, values in score_queries(found, metrics).items()}
        for name, found in neighbours.items()
    }
    return {"mean": mean_over_domains(domains), "domains": domains}


def score_merged(domains: Mapping[str, EmbeddedDomain], metrics: Sequence[str] = METRICS, **search: Any) -> Scores:
    """`search_merged`, then `score`: a neighbour is right if it has the query's label and domain."""
    return score(search_merged(domains, metrics, **search), metrics)


def score_separate(domains: Mapping[str, EmbeddedDomain], metrics: Sequence[str] = METRICS, **search: Any) -> Scores:
    """`search_separate`, then `score`: what the model could reach if the domain of a query were known."""
    return score(search_separate(domains, metrics, **search), metrics)


def mean_over_domains(domains: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric, every domain counting the same."""
    metrics = next(iter(domains.values()))
    return {metric: sum(values[metric] for values in domains.values()) / len(domains) for metric in metrics}


def _merge(
    domains: Mapping[str, EmbeddedDomain],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray | list[np.ndarray]]]:
    """The embeddings of all index sets, their labels, where each domain begins, and the query labels by domain."""
    if not domains:
        raise ValueError("domains must name at least one domain. Got none.")
    embeds, labels, query_labels, num_labels = [], [], {}, 0
    for name, domain in domains.items():
        flat, counts, index_embeds, index_labels = _checked(name, domain)
        # Labels are numbered again, after those of the domains before: equal numbers of two domains are not one class.
        vocabulary, codes = np.unique(np.concatenate([flat, index_labels]), return_inverse=True)
        codes += num_labels
        num_labels += len(vocabulary)
        query_codes = codes[: len(flat)]
        query_labels[name] = query_codes if np.all(counts == 1) else np.split(query_codes, np.cumsum(counts)[:-1])
        embeds.append(index_embeds)
        labels.append(codes[len(flat) :])
    dims = {name: part.shape[1] for name, part in zip(domains, embeds, strict=True)}
    if len(set(dims.values())) > 1:
        raise ValueError(f"domains of one merged index must have the same dimension. Got {dims}; use search_separate.")
    starts = np.cumsum([0, *map(len, embeds)])[:-1]
    return np.concatenate(embeds), np.concatenate(labels), starts, query_labels


def _checked(name: str, domain: EmbeddedDomain) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flat query labels, their number a query, and the index, which may be the query set."""
    flat, counts = flatten_labels(domain.query_labels)
    if (domain.index_embeds is None) != (domain.index_labels is None):
        raise ValueError(f"domain {name!r}: index_embeds and index_labels must be given together, or neither")
    if domain.index_embeds is None or domain.index_labels is None:
        if not np.all(counts == 1):
            raise ValueError(
                f"domain {name!r}: a query set that is its own index must have one label per query. Got several "
                "or none; give index_embeds and index_labels"
            )
        index_embeds, index_labels = domain.query_embeds, flat
    else:
        index_embeds, index_labels = domain.index_embeds, flatten_labels(domain.index_labels)[0]
    for what, embeds, num_labels in (
        ("query", domain.query_embeds, len(counts)),
        ("index", index_embeds, len(index_labels)),
    ):
        if embeds.ndim != 2 or len(embeds) != num_labels:
            raise ValueError(
                f"domain {name!r}: {what}_embeds must have one row for each of the {num_labels} {what}_labels. "
                f"Got shape {embeds.shape}"
            )
    if len(counts) == 0:
        raise ValueError(f"domain {name!r} must have at least one query. Got none.")
    return flat, counts, index_embeds, index_labels


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuses names of metrics that there are not, before any work.

    Raises:
        ValueError: If a metric is unknown.
    """
    for metric in metrics:
        _parse(metric)


def _parse(metric: str) -> tuple[str, int]:
    """The kind of a metric and its `k`, which is 0 for mAP@R."""
    if metric == "mAP@R":
        return "mAP", 0
    match = re.fullmatch(r"(R|mMP)@([1-9]\d*)", metric)
    if match is None:
        raise ValueError(f'a metric must be "R@k" or "mMP@k" with k from 1, or "mAP@R". Got {metric!r}.')
    return match[1], int(match[2])


def _depth(metric: str, num_positives: np.ndarray) -> int:
    """How many neighbours the metric looks at."""
    kind, k = _parse(metric)
    return max(int(num_positives.max()), 1) if kind == "mAP" else k
