"""Centroids of inverted lists for large indexes: k-means on few vectors first, then a few rounds on all of the sample.

Plain k-means compares each of 256 training vectors per list with each centroid in ten rounds. Its first rounds only
bring the centroids near; a fifth of the vectors does that as well.
"""

from typing import Any

import faiss
import numpy as np

# Up to here FAISS trains the lists itself.
MANY_LISTS = 2_048
# Training vectors for each list: as FAISS takes them; fewer where a round would take more than so many multiplications.
_MOST_PER_LIST, _LEAST_PER_LIST = 256, 50
_WORK_OF_ROUND = 256 * 5_700**2 * 64
# From here on a graph finds the lists of a vector: with fewer lists, comparing all is quicker and misses none.
LISTS_FOR_GRAPH = 16_384
# Candidates of the graph; fewer would assign vectors to lists that are not their nearest.
GRAPH_EFFORT = 64
_FIRST_ROUNDS, _LAST_ROUNDS = 5, 5
_SEED = 0


def points_per_list(num_lists: int, dim: int) -> int:
    """How many training vectors each list gets."""
    affordable = _WORK_OF_ROUND // (num_lists**2 * dim)
    return min(max(affordable, _LEAST_PER_LIST), _MOST_PER_LIST) if num_lists > MANY_LISTS else _MOST_PER_LIST


def train_lists(index: Any, vectors: np.ndarray) -> None:
    """Trains an index; one with many lists gets its centroids from `centroids_of`.

    Args:
        index: The index, empty.
        vectors: Of shape `(num_vectors, dim)`, float32, unit norm.
    """
    if isinstance(index, faiss.IndexIVF) and index.nlist > MANY_LISTS:
        quantizer = faiss.downcast_index(index.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = GRAPH_EFFORT
        quantizer.add(centroids_of(vectors, index.nlist))
    # FAISS leaves lists alone that are there, and trains what is stored in them.
    index.train(vectors)


def centroids_of(vectors: np.ndarray, num_lists: int) -> np.ndarray:
    """Centroids of unit norm, of shape `(num_lists, dim)`.

    Args:
        vectors: Of shape `(num_vectors, dim)`, float32, unit norm, at least `num_lists` of them.
        num_lists: How many.
    """
    few = vectors[:: max(len(vectors) // (_LEAST_PER_LIST * num_lists), 1)]
    return _k_means(vectors, num_lists, _LAST_ROUNDS, _k_means(few, num_lists, _FIRST_ROUNDS))


def _k_means(vectors: np.ndarray, number: int, num_rounds: int, begin: np.ndarray | None = None) -> np.ndarray:
    made = faiss.Kmeans(
        vectors.shape[1],
        number,
        niter=num_rounds,
        spherical=True,
        seed=_SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=len(vectors),
    )
    made.train(np.ascontiguousarray(vectors), init_centroids=begin)
    return np.asarray(made.centroids)
