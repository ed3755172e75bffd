"""How much of what exact search finds an index finds too, and the effort that it takes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.faiss_index import efforts_of, sample_rows, search_others

RECALL_AT = 10
NUM_RECALL_QUERIES = 500
# Rows that tie with the last exact neighbour, so that either may be found.
_NUM_TIES = 50
_TIE = 1e-6
_LEAST_GAIN = 0.002
# The effort is at most a part of this size of it above one that is too little.
_FINEST = 8


class RowSource(Protocol):
    """Rows to be indexed, which can be read more than once."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    def blocks(self, columns: bool = True) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Blocks of embeddings of shape `(num_rows, dim)`, float32, each with a table of its other columns."""


def vectors_of(opened: Sequence[RowSource]) -> Iterator[np.ndarray]:
    """The embeddings alone, a block at a time."""
    for part in opened:
        for vectors, _ in part.blocks(columns=False):
            yield vectors


def read_rows(opened: Sequence[RowSource], rows: np.ndarray) -> np.ndarray:
    """The embeddings of some rows, which are in ascending order, of shape `(num_rows, dim)`; one shard at a time."""
    found, start = [], 0
    for vectors in vectors_of(opened):
        first, last = np.searchsorted(rows, [start, start + len(vectors)])
        found.append(vectors[rows[first:last] - start])
        start += len(vectors)
    return np.concatenate(found)


def exact_neighbours(
    opened: Sequence[RowSource], queries: np.ndarray, own_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the `k` exact neighbours of each query, its own row left out; one shard at a time."""
    scores, ids, start = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64), 0
    for vectors in vectors_of(opened):
        own = np.where((own_rows >= start) & (own_rows < start + len(vectors)), own_rows - start, -1)
        more_scores, more_ids = exact_search(queries, vectors, k, exclude=own)
        scores = np.concatenate([scores, more_scores], axis=1)
        ids = np.concatenate([ids, np.where(more_ids < 0, -1, more_ids + start)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
        start += len(vectors)
    return scores, ids


def measure_recall(
    index: Any,
    opened: Sequence[RowSource],
    num_images: int,
    target: float,
    say: Callable[[str], None],
    asked: np.ndarray | None,
) -> tuple[int, float | None]:
    """Doubles the effort until the target is reached or it no longer helps; then finds the least that reaches it.

    Args:
        index: An index of FAISS.
        opened: What is in it.
        num_images: How many rows that are.
        target: Recall that is aimed at.
        say: Called with lines for the user.
        asked: Queries, of shape `(num_queries, dim)`; without, rows of the index, themselves left out.

    Returns:
        Effort and recall; 0 and `None` where there is nothing to find.
    """
    k = min(RECALL_AT, num_images - 1)
    if k < 1:
        return 0, None
    if asked is None:
        own_rows = sample_rows(num_images, NUM_RECALL_QUERIES)
        queries, asked_what = read_rows(opened, own_rows), f"{len(own_rows)} images as queries"
    else:
        queries, own_rows, asked_what = asked, np.full(len(asked), -1), f"{len(asked)} queries"
    exact_scores, exact_rows = exact_neighbours(opened, queries, own_rows, min(k + _NUM_TIES, num_images - 1))
    right = np.where(exact_scores >= exact_scores[:, k - 1 : k] - _TIE, exact_rows, -2)
    efforts, most = efforts_of(index)

    def measured(effort: int) -> float:
        found = search_others(index, queries, own_rows, k, effort or None)[1]
        recall = float(np.mean([np.isin(line, good).sum() / k for line, good in zip(found, right, strict=True)]))
        what = f" looking at {effort} of {most}" if effort else ""
        say(f"recall@{k} against exact search{what}: {100 * recall:.1f} % ({asked_what})")
        return recall

    too_little, best_effort, best_recall = 0, 0, -1.0
    for effort in efforts:
        recall = measured(effort)
        if recall < best_recall + _LEAST_GAIN:
            break
        too_little, best_effort, best_recall = best_effort, effort, recall
        if recall >= target:
            break
    while too_little and best_recall >= target and best_effort - too_little > max(best_effort // _FINEST, 1):
        effort = (too_little + best_effort) // 2
        recall = measured(effort)
        if recall >= target:
            best_effort, best_recall = effort, recall
        else:
            too_little = effort
    return best_effort, best_recall
