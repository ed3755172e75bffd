"""Copies: index images that are a query's own picture, left out of the neighbours of that query."""

from collections.abc import Sequence

import numpy as np


def most_copies(copies: np.ndarray) -> int:
    """How many more neighbours must be found, so that enough are left without the copies of a query."""
    return int(np.bincount(copies[:, 0]).max(initial=0))


def without_copies(
    scores: np.ndarray, ids: np.ndarray, copies: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `depth` neighbours of each query that are not its own picture.

    Args:
        scores: Of shape `(num_queries, >= depth + most_copies(copies))`.
        ids: Rows of the index, of the same shape.
        copies: Pairs of a query and a row of the index.
        depth: Neighbours to keep.
    """
    if len(copies) == 0:
        return scores[:, :depth], ids[:, :depth]
    # A number for each pair of query and row; a missing neighbour, -1, is of no pair.
    num_rows = max(int(ids.max(initial=0)), int(copies[:, 1].max())) + 1
    pairs = np.arange(len(ids))[:, None] * num_rows + ids
    is_copy = np.isin(pairs, copies[:, 0] * num_rows + copies[:, 1]) & (ids >= 0)
    order = np.argsort(is_copy, axis=1, kind="stable")[:, :depth]
    is_copy = np.take_along_axis(is_copy, order, axis=1)
    kept_scores, kept_ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return np.where(is_copy, -np.inf, kept_scores).astype(scores.dtype), np.where(is_copy, -1, kept_ids)


def right_copies(
    copies: np.ndarray, query_labels: np.ndarray | Sequence[np.ndarray], index_labels: np.ndarray
) -> np.ndarray:
    """How many of the left out images have a label of their query, of shape `(num_queries,)`."""
    right = [np.isin(index_labels[row], query_labels[query]) for query, row in copies]
    return np.bincount(copies[:, 0], weights=right, minlength=len(query_labels)).astype(np.int64)
