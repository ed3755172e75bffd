"""Ranked lists of neighbours: merged over segments, without what is excluded, one of each group."""

from collections.abc import Collection, Sequence

import numpy as np


def merge(scores: Sequence[np.ndarray], places: Sequence[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The best `k` of several lists per query, best first, equal scores by place; padded with -inf and -1.

    Args:
        scores: For each list an array of shape `(num_queries, its length)`.
        places: The same of what was found, -1 for nothing.
        k: How many are wanted.
    """
    all_scores, all_places = np.concatenate(scores, axis=1), np.concatenate(places, axis=1)
    return ranked(np.where(all_places < 0, -np.inf, all_scores).astype(np.float32), all_places, k)


def ranked(scores: np.ndarray, places: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of shape `(num_queries, num_candidates)` by score, equal scores by place, cut or padded to `k`."""
    # What is not there comes last, whatever its place.
    order = np.lexsort((np.where(places < 0, np.iinfo(np.int64).max, places), -scores))[:, :k]
    padding = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(scores, order, axis=1), padding, constant_values=-np.inf),
        np.pad(np.take_along_axis(places, order, axis=1), padding, constant_values=-1),
    )


def rescored(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Products in float64, rounded to float32, of queries `(n, dim)` with their candidates `(n, c, dim)`."""
    products: np.ndarray = np.einsum("qd,qcd->qc", queries.astype(np.float64), vectors.astype(np.float64))
    return products.astype(np.float32)


def pick(
    scores: np.ndarray,
    places: np.ndarray,
    k: int,
    excluded: Sequence[Collection[int]] | None = None,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first `k` of each ranked list that are not excluded and the first of their group.

    Args:
        scores: Of shape `(num_queries, num_candidates)`, best first.
        places: The same of what was found, -1 for nothing.
        k: How many are wanted.
        excluded: For each query the places that are left out.
        groups: For each place the number of its group.
    """
    kept_scores = np.full((len(scores), k), -np.inf, np.float32)
    kept_places = np.full((len(scores), k), -1, np.int64)
    for query, (line_scores, line) in enumerate(zip(scores, places, strict=True)):
        good = line >= 0
        if excluded is not None and len(excluded[query]):
            good &= ~np.isin(line, list(excluded[query]))
        columns = np.flatnonzero(good)
        if groups is not None:
            firsts = np.unique(groups[line[columns]], return_index=True)[1]
            columns = columns[np.sort(firsts)]
        columns = columns[:k]
        kept_scores[query, : len(columns)], kept_places[query, : len(columns)] = line_scores[columns], line[columns]
    return kept_scores, kept_places
