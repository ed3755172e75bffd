"""Retrieval metrics: neighbour ids and labels in, numbers out; no model, no search.

`neighbour_ids`, of shape `(num_queries, num_neighbours)`, are rows of the index, best first, -1 where there is none.
The label of a query is an integer or a list of integers (any of them counts as right), the label of an index row is
one integer; labels are unique over the domains. Numpy arrays, torch tensors and lists are taken. Values are fractions,
0 to 1. A query without positives counts as 0 and stays in the mean (UnED, arXiv 2309.01858).
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypeAlias, overload

import numpy as np
import torch

Integers: TypeAlias = np.ndarray | torch.Tensor | Sequence[int] | Sequence[Sequence[int]]
QueryLabels: TypeAlias = np.ndarray | torch.Tensor | Sequence[int | Sequence[int] | np.ndarray]


@overload
def recall_at_k(
    neighbour_ids: Integers, query_labels: QueryLabels, index_labels: Integers, k: int = 1, reduce: Literal[True] = True
) -> float: ...
@overload
def recall_at_k(
    neighbour_ids: Integers, query_labels: QueryLabels, index_labels: Integers, k: int = 1, *, reduce: Literal[False]
) -> np.ndarray: ...
def recall_at_k(
    neighbour_ids: Integers, query_labels: QueryLabels, index_labels: Integers, k: int = 1, reduce: bool = True
) -> float | np.ndarray:
    """R@k: 1 for a query with a positive among its first `k` neighbours, else 0.

    Args:
        neighbour_ids: Of shape `(num_queries, >= k)`.
        query_labels: Of length `num_queries`.
        index_labels: Of shape `(num_index,)`.
        k: How many neighbours count.
        reduce: The mean over the queries, or with `False` one value per query, of shape `(num_queries,)`.

    Raises:
        ValueError: If lengths, ids or `k` do not fit together.
    """
    hits = _hits(_first_neighbours(neighbour_ids, k), query_labels, _integers("index_labels", index_labels, ndim=1))
    return _reduce(np.any(hits, axis=0).astype(np.float64), reduce)


@overload
def mean_modified_precision_at_k(
    neighbour_ids: Integers,
    query_labels: QueryLabels,
    index_labels: Integers,
    num_positives: Integers,
    k: int = 5,
    reduce: Literal[True] = True,
) -> float: ...
@overload
def mean_modified_precision_at_k(
    neighbour_ids: Integers,
    query_labels: QueryLabels,
    index_labels: Integers,
    num_positives: Integers,
    k: int = 5,
    *,
    reduce: Literal[False],
) -> np.ndarray: ...
def mean_modified_precision_at_k(
    neighbour_ids: Integers,
    query_labels: QueryLabels,
    index_labels: Integers,
    num_positives: Integers,
    k: int = 5,
    reduce: bool = True,
) -> float | np.ndarray:
    """mMP@k: the precision among the first `min(num_positives, k)` neighbours.

    A query with fewer than `k` positives is looked at only as deep as a perfect ranking would put them: a hit below
    that depth does not count. This is the sum in the UnED paper, and what the original computes.

    Args:
        neighbour_ids: Of shape `(num_queries, >= k)`.
        query_labels: Of length `num_queries`.
        index_labels: Of shape `(num_index,)`.
        num_positives: Of shape `(num_queries,)`: the index rows that are right for each query, the query itself left
            out; see `count_positives`.
        k: The largest depth.
        reduce: The mean over the queries, or with `False` one value per query, of shape `(num_queries,)`.

    Raises:
        ValueError: If lengths, ids or `k` do not fit together.
    """
    ids = _first_neighbours(neighbour_ids, k)
    depth = np.minimum(_positives(num_positives, len(ids)), k)
    hits = _hits(ids, query_labels, _integers("index_labels", index_labels, ndim=1))
    hits &= np.arange(k)[:, None] < depth
    return _reduce(hits.sum(axis=0) / np.maximum(depth, 1), reduce)


@overload
def mean_average_precision_at_r(
    neighbour_ids: Integers,
    query_labels: QueryLabels,
    index_labels: Integers,
    num_positives: Integers,
    reduce: Literal[True] = True,
) -> float: ...
@overload
def mean_average_precision_at_r(
    neighbour_ids: Integers,
    query_labels: QueryLabels,
    index_labels: Integers,
    num_positives: Integers,
    *,
    reduce: Literal[False],
) -> np.ndarray: ...
def mean_average_precision_at_r(
    neighbour_ids: Integers,
    query_labels: QueryLabels,
    index_labels: Integers,
    num_positives: Integers,
    reduce: bool = True,
) -> float | np.ndarray:
    """mAP@R: `1/R * sum over i = 1..R of precision(i) * hit(i)`, `R` the number of positives of the query.

    Source: Musgrave, Belongie and Lim, "A Metric Learning Reality Check", arXiv 2003.08505.

    Args:
        neighbour_ids: Of shape `(num_queries, >= max(num_positives))`; fewer would give another metric and are refused.
        query_labels: Of length `num_queries`.
        index_labels: Of shape `(num_index,)`.
        num_positives: Of shape `(num_queries,)`, the query itself left out; see `count_positives`.
        reduce: The mean over the queries, or with `False` one value per query, of shape `(num_queries,)`.

    Raises:
        ValueError: If lengths or ids do not fit together, or a query has more positives than neighbours.
    """
    all_ids = _integers("neighbour_ids", neighbour_ids, ndim=2)
    depth = _positives(num_positives, len(all_ids))
    deepest = int(depth.max(initial=0))
    if deepest > all_ids.shape[1]:
        raise ValueError(
            f"mAP@R needs as many neighbours as a query has positives, up to {deepest} here, but neighbour_ids has "
            f"{all_ids.shape[1]} columns; search with k={deepest}"
        )
    ranks = np.arange(1, deepest + 1)[:, None]
    hits = _hits(all_ids[:, :deepest], query_labels, _integers("index_labels", index_labels, ndim=1))
    hits &= ranks <= depth
    precision = hits.cumsum(axis=0) / ranks
    return _reduce((precision * hits).sum(axis=0) / np.maximum(depth, 1), reduce)


def count_positives(query_labels: QueryLabels, index_labels: Integers, exclude: Integers | None = None) -> np.ndarray:
    """How many rows of the index are right for each query, of shape `(num_queries,)`.

    Args:
        query_labels: Of length `num_queries`.
        index_labels: Of shape `(num_index,)`.
        exclude: Of shape `(num_queries,)`: the row of the index that is the query itself, -1 for none. It is not
            counted.

    Raises:
        ValueError: If lengths or rows do not fit together.
    """
    labels = _integers("index_labels", index_labels, ndim=1)
    flat, label_counts = flatten_labels(query_labels)
    vocabulary, num_rows = np.unique(labels, return_counts=True)
    codes = np.searchsorted(vocabulary, flat)
    known = np.append(vocabulary, 0)[codes] == flat
    known &= codes < len(vocabulary)
    queries = np.repeat(np.arange(len(label_counts)), label_counts)[known]
    codes = codes[known]
    if label_counts.max(initial=0) > 1:  # a label that a query names twice counts once
        queries, codes = np.divmod(np.unique(queries * len(vocabulary) + codes), len(vocabulary))
    positives = np.bincount(queries, weights=num_rows[codes], minlength=len(label_counts)).astype(np.int64)
    if exclude is not None:
        own_rows = _integers("exclude", exclude, ndim=1)
        _check_ids("exclude", own_rows, len(labels))
        positives -= _hits(own_rows[:, None], query_labels, labels, name="exclude")[0]
    return positives


def flatten_labels(query_labels: QueryLabels) -> tuple[np.ndarray, np.ndarray]:
    """The labels of all queries one after the other, and how many each query has.

    Args:
        query_labels: An integer or a list of integers a query; a matrix gives each query as many as it has columns.

    Returns:
        `flat` of shape `(total,)` and `counts` of shape `(num_queries,)`.

    Raises:
        ValueError: If something else than integers is found.
    """
    try:
        labels = _to_numpy(query_labels)
    except ValueError:  # numpy's answer to lists of unequal lengths
        labels = np.empty(0, dtype=object)
    if labels.dtype != object:
        if labels.ndim not in (1, 2):
            raise ValueError(
                f"query_labels must be an integer or a list of integers a query. Got shape {labels.shape}."
            )
        per_query = 1 if labels.ndim == 1 else labels.shape[1]
        flat = _integers("query_labels", labels.reshape(-1), ndim=1)
        return flat, np.full(len(labels), per_query, dtype=np.int64)
    rows = [row if isinstance(row, list) else np.atleast_1d(_to_numpy(row)) for row in query_labels]
    flat = _integers("query_labels", list(chain.from_iterable(rows)), ndim=1)
    return flat, np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))


def _hits(
    ids: np.ndarray, query_labels: QueryLabels, index_labels: np.ndarray, name: str = "neighbour_ids"
) -> np.ndarray:
    """Which neighbours are right, of shape `(num_neighbours, num_queries)`: numpy is fast along the long axis."""
    flat, counts = flatten_labels(query_labels)
    if len(counts) != len(ids):
        raise ValueError(f"{name} and query_labels must have one row per query. Got {len(ids)} and {len(counts)} rows.")
    _check_ids(name, ids, len(index_labels))
    if len(index_labels) == 0:
        return np.zeros(ids.T.shape, dtype=bool)
    ranked = ids.T
    found = index_labels[ranked]  # a missing neighbour, -1, takes the last row's label here and is struck out below
    if np.all(counts == 1):
        hits = np.ascontiguousarray(found == flat)  # numpy kept the memory order of `ids`
    else:
        hits = np.zeros(found.shape, dtype=bool)
        first_label = np.cumsum(counts) - counts
        for position in range(counts.max(initial=0)):
            queries = np.flatnonzero(counts > position)
            hits[:, queries] |= found[:, queries] == flat[first_label[queries] + position]
    hits &= ranked >= 0
    return hits


def _first_neighbours(neighbour_ids: Integers, k: int) -> np.ndarray:
    """The first `k` columns."""
    if k < 1:
        raise ValueError(f"k must be at least 1. Got {k}.")
    ids = _integers("neighbour_ids", neighbour_ids, ndim=2)
    if k > ids.shape[1]:
        raise ValueError(
            f"k must be at most the number of neighbours given. Got k={k} for neighbour_ids of shape {ids.shape}; "
            "search with a larger k (-1 stands for a neighbour that does not exist)"
        )
    return ids[:, :k]


def _positives(num_positives: Integers, num_queries: int) -> np.ndarray:
    positives = _integers("num_positives", num_positives, ndim=1)
    if len(positives) != num_queries:
        raise ValueError(
            f"num_positives must have a value for each of the {num_queries} queries. Got {len(positives)}."
        )
    if positives.min(initial=0) < 0:
        raise ValueError(f"num_positives must not be negative. Got {positives.min()}; use count_positives.")
    return positives


def _check_ids(name: str, ids: np.ndarray, num_index: int) -> None:
    low, high = ids.min(initial=-1), ids.max(initial=-1)
    if low < -1 or high >= num_index:
        raise ValueError(
            f"{name} must be rows of the index, 0 to {num_index - 1}, or -1 for none. Got {low if low < -1 else high}"
        )


def _reduce(values: np.ndarray, reduce: bool) -> float | np.ndarray:
    if not reduce:
        return values
    if len(values) == 0:
        raise ValueError("the mean over no queries is not defined; give at least one query or reduce=False")
    return float(values.mean())


def _integers(name: str, values: Integers, ndim: int) -> np.ndarray:
    try:
        array = _to_numpy(values)
    except ValueError:  # numpy's answer to lists of unequal lengths
        raise ValueError(f"{name} must have {ndim} dimension(s). Got lists of unequal lengths.") from None
    if array.size == 0:  # numpy reads an empty list as floats
        array = array.astype(np.int64)
    if array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension(s). Got shape {array.shape}.")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must hold integers. Got {array.dtype}; map names to integers first.")
    return array.astype(np.int64, copy=False)


def _to_numpy(values: Integers | QueryLabels | int) -> np.ndarray:
    return np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
