"""Rules that embeddings must obey before they are scored, whichever way they come in: a model, a run, files.

A score of a split with one class is always 1, and a query that finds its own picture in the index says nothing.
"""

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np

from modeling_udon.data.domains import EvaluationSplit, Images, encoded_bytes
from modeling_udon.evaluation.protocol import EmbeddedDomain

# Images read at a time.
_CHUNK_SIZE = 1024


def embedded_domain(
    name: str,
    images: EvaluationSplit,
    query_labels: Any,
    index_labels: np.ndarray | None,
    query: np.ndarray,
    index: np.ndarray | None,
    query_rows: np.ndarray | None = None,
    index_rows: np.ndarray | None = None,
) -> EmbeddedDomain:
    """Puts a domain's embeddings together with its labels, and with the index images that are a query's own picture.

    Args:
        name: Name of the domain.
        images: Query and index images.
        query_labels: Labels of all queries, numbered.
        index_labels: Labels of all index images, `None` where the query set is the index.
        query: Embeddings of the queries that could be read, of shape `(num_queries, dim)`.
        index: The same of the index.
        query_rows: Rows of the queries that could be read, ascending; `None` for all.
        index_rows: The same of the index.

    Raises:
        ValueError: If nothing, or images of one class alone, could be read to be searched.
    """
    copies = copies_of_queries(images)
    if query_rows is not None:
        query_labels = [query_labels[row] for row in query_rows]
        copies = _renumbered(copies, 0, query_rows)
    if index_rows is not None and index_labels is not None:
        index_labels = index_labels[index_rows]
        copies = _renumbered(copies, 1, index_rows)
    searched = query_labels if index_labels is None else index_labels
    num_classes = len(np.unique(np.asarray(searched)))
    if num_classes < 2:
        raise ValueError(
            f"`domains.{name}` must be searched among images of at least two classes that can be read. "
            f"Got {num_classes}; with one class every score is 100 %."
        )
    num_images = len(images.query) + (0 if images.index is None else len(images.index))
    num_left_out = num_images - len(query) - (0 if index is None else len(index))
    return EmbeddedDomain(query, query_labels, index, index_labels, query_rows, index_rows, num_left_out, copies)


@lru_cache(maxsize=64)
def copies_of_queries(images: EvaluationSplit) -> np.ndarray:
    """Finds the index images that are a query's own picture: the same encoded bytes.

    Where the query set is the index there are none: there, a query is taken out by its row.

    Args:
        images: Query and index images.

    Returns:
        Pairs of a row of the queries and a row of the index, of shape `(num_pairs, 2)`.
    """
    pairs: list[tuple[int, int]] = []
    if images.index is not None:
        queries: dict[bytes, list[int]] = {}
        for row, digest in enumerate(_digests(images.query.images)):
            if digest is not None:
                queries.setdefault(digest, []).append(row)
        for row, digest in enumerate(_digests(images.index.images)):
            pairs += [(query, row) for query in queries.get(digest, ())] if digest is not None else []
    return np.asarray(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def _digests(images: Images) -> Iterator[bytes | None]:
    """Hashes of the encoded images, one chunk of them in memory; `None` for one that cannot be read."""
    for start in range(0, len(images), _CHUNK_SIZE):
        yield from map(_digest, images[start : start + _CHUNK_SIZE]["image"])


def _digest(image: Any) -> bytes | None:
    try:
        return blake2b(encoded_bytes(image), digest_size=16).digest()
    except (ValueError, OSError):
        return None


def _renumbered(pairs: np.ndarray, column: int, rows: np.ndarray) -> np.ndarray:
    """Rows of the data become positions among those that could be read; pairs with another row go."""
    kept = pairs[np.isin(pairs[:, column], rows)].copy()
    kept[:, column] = np.searchsorted(rows, kept[:, column])
    return kept
