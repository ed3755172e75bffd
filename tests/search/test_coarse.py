"""Lists of large indexes: trained in two steps and found by a graph, they find as much as those of FAISS."""

import faiss
import numpy as np
import pytest
from made_embeddings import unit_vectors

from modeling_udon.search import coarse, faiss_index
from modeling_udon.search.coarse import centroids_of, points_per_list, train_lists
from modeling_udon.search.faiss_index import empty_index, search_faiss


def clustered(seed, num, dim=16):
    centres = np.random.default_rng(7).standard_normal((300, dim))
    generator = np.random.default_rng(seed)
    vectors = centres[generator.integers(0, 300, num)] + 0.5 * generator.standard_normal((num, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("num_lists", [1, 7, 100])
def test_there_are_as_many_centroids_as_lists_each_of_unit_norm(num_lists):
    centroids = centroids_of(unit_vectors(0, 500), num_lists)
    assert centroids.shape == (num_lists, 16)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-5)
    skewed = np.concatenate([np.repeat(unit_vectors(1, 2), 200, axis=0), unit_vectors(2, 30)])
    assert centroids_of(skewed, 20).shape == (20, 16)


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
@pytest.mark.parametrize("graph_from", [10, 10**9])
def test_an_index_with_many_lists_finds_as_much_as_one_that_faiss_trains(monkeypatch, kind, graph_from):
    vectors, queries = clustered(0, 8_000), clustered(1, 50)
    plain = empty_index(kind, 16, len(vectors))
    plain.train(vectors)
    monkeypatch.setattr(coarse, "MANY_LISTS", 50)
    monkeypatch.setattr(faiss_index, "LISTS_FOR_GRAPH", graph_from)
    quick = empty_index(kind, 16, len(vectors))
    train_lists(quick, vectors)
    exact = faiss.knn(queries, vectors, 10, faiss.METRIC_INNER_PRODUCT)[1]
    recalls = []
    for index in (plain, quick):
        index.add(vectors)
        found = search_faiss(index, queries, 10, 16)[1]
        recalls.append(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]))
    assert isinstance(faiss.downcast_index(quick.quantizer), faiss.IndexHNSW) is (graph_from == 10)
    assert recalls[1] >= recalls[0] - 0.02 and quick.ntotal == 8_000


def test_the_more_lists_and_dimensions_the_fewer_vectors_are_trained_with():
    assert [points_per_list(lists, 64) for lists in (100, 5_656, 8_000, 40_000)] == [256, 256, 129, 50]
    assert points_per_list(5_656, 768) == 50 and points_per_list(2_000, 768) == 256
