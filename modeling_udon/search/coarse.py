"""Centroids of inverted lists for large indexes: k-means in two levels, then a few rounds over all lists.

Plain k-means compares each training vector with each centroid in each of its rounds: for 2 million images that took 20
minutes. Two levels of square-root size cost next to nothing, and begin where few rounds are left to do.
"""

from typing import Any

import faiss
import numpy as np

# From here on lists are trained in two levels.
MANY_LISTS = 2_048
# Training vectors for each of many lists; FAISS takes 256.
POINTS_PER_LIST = 50
# From here on a graph finds the lists of a vector: with fewer lists, comparing all is quicker and misses none.
LISTS_FOR_GRAPH = 16_384
# Candidates of the graph; fewer would assign vectors to lists that are not their nearest.
GRAPH_EFFORT = 64
_ROUNDS_OF_LEVEL = 8
_ROUNDS_OVER_ALL = 4
_SEED = 0


def train_lists(index: Any, vectors: np.ndarray) -> None:
    """Trains an index; one with many lists gets its centroids from `two_level_centroids`.

    Args:
        index: The index, empty.
        vectors: Of shape `(num_vectors, dim)`, float32, unit norm.
    """
    if isinstance(index, faiss.IndexIVF) and index.nlist > MANY_LISTS:
        quantizer = faiss.downcast_index(index.quantizer)
        if isinstance(quantizer, faiss.IndexHNSW):
            quantizer.hnsw.efSearch = GRAPH_EFFORT
        quantizer.add(two_level_centroids(vectors, index.nlist))
    # FAISS leaves lists alone that are there, and trains what is stored in them.
    index.train(vectors)


def two_level_centroids(vectors: np.ndarray, num_lists: int) -> np.ndarray:
    """Centroids of unit norm, of shape `(num_lists, dim)`.

    Args:
        vectors: Of shape `(num_vectors, dim)`, float32, unit norm, at least `num_lists` of them.
        num_lists: How many.
    """
    top = _k_means(vectors, int(num_lists**0.5), _ROUNDS_OF_LEVEL)
    owners = top.index.search(vectors, 1)[1][:, 0]
    sizes = np.bincount(owners, minlength=top.k)
    # Each cluster gets as many lists as it has vectors of all, and no more than it has vectors.
    shares = np.minimum(np.maximum((num_lists * sizes / len(vectors)).astype(int), sizes > 0), sizes)
    while shares.sum() != num_lists:
        behind = np.where(sizes > shares, sizes / np.maximum(shares, 1), -1)
        ahead = np.where(shares > 1, sizes / np.maximum(shares, 1), np.inf)
        if shares.sum() < num_lists:
            shares[behind.argmax()] += 1
        else:
            shares[ahead.argmin()] -= 1
    parts = [
        _k_means(vectors[owners == number], int(share), _ROUNDS_OF_LEVEL).centroids
        for number, share in enumerate(shares)
        if share
    ]
    centroids: np.ndarray = _k_means(vectors, num_lists, _ROUNDS_OVER_ALL, np.concatenate(parts)).centroids
    return centroids


def _k_means(vectors: np.ndarray, number: int, num_rounds: int, begin: np.ndarray | None = None) -> Any:
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
    return made
