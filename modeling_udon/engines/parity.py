"""Comparison of an engine's answers with those of exact search over the same vectors."""

from dataclasses import dataclass

import numpy as np

from modeling_udon.engines.columns import Columns
from modeling_udon.engines.store import EngineError, Store
from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.faiss_index import sample_rows
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.ranking import merge

RECALL_AT = 10
NUM_QUERIES = 200
_TIE = 1e-5


@dataclass(frozen=True)
class ExactAnswers:
    """Exact neighbours of a sample of an index.

    Attributes:
        rows: Numbers of the rows that are the queries.
        queries: Their vectors, of shape `(num_queries, dim)`.
        k: Neighbours of each query, itself left out.
        worst: For each query the score of its last exact neighbour.
    """

    rows: np.ndarray
    queries: np.ndarray
    k: int
    worst: np.ndarray

    def recall_of(self, found: np.ndarray, index: ImageIndex) -> float:
        """Share of the exact neighbours among what was found; of several that tie, any counts.

        Args:
            found: Numbers of rows, of shape `(num_queries, >= k + 1)`, which may hold the query itself.
            index: The index.
        """
        hits = 0
        for query, (own, line) in enumerate(zip(self.rows, found, strict=True)):
            others = np.array([row for row in dict.fromkeys(line.tolist()) if row not in (own, -1)][: self.k], np.int64)
            scores = index.vectors(others) @ self.queries[query]
            hits += int((scores >= self.worst[query] - _TIE).sum())
        return hits / (self.k * len(self.rows))


def exact_answers(index: ImageIndex) -> ExactAnswers | None:
    """The exact neighbours of a sample of images; `None` where there is but one image."""
    live = index.select()
    k = min(RECALL_AT, len(live) - 1)
    if k < 1:
        return None
    rows = live[sample_rows(len(live), NUM_QUERIES)]
    queries = index.vectors(rows)
    scores, numbers = np.empty((len(rows), 0), np.float32), np.empty((len(rows), 0), np.int64)
    for block in index.blocks(columns=[]):
        own = np.searchsorted(block.rows, rows)
        is_here = block.rows[np.minimum(own, len(block.rows) - 1)] == rows
        more, places = exact_search(queries, block.vectors, k, exclude=np.where(is_here, own, -1))
        found = np.where(places < 0, -1, block.rows[places])
        scores, numbers = merge([scores, more], [numbers, found], k)
    return ExactAnswers(rows, queries, k, scores[:, -1])


def check_ids(store: Store, columns: Columns) -> int:
    """Reads all ids back; returns how many rows there are.

    Raises:
        EngineError: If one is missing, another than it was, or there twice.
    """
    expected, num_seen = columns.ids(), 0
    for row, name in store.ids():
        if row not in expected or expected[row] != name:
            raise EngineError(f"the engine gave back row {row} with the id {name!r}, which was {expected.get(row)!r}")
        num_seen += 1
    if num_seen != len(expected):
        raise EngineError(f"the engine gave back {num_seen:,} rows of {len(expected):,}")
    return num_seen
