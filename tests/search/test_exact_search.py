"""Exact search against a plain loop over all pairs."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from modeling_udon.search import exact_search as index_module
from modeling_udon.search.exact_search import exact_search

BACKENDS = [{"backend": "faiss"}, {"backend": "torch", "device": "cpu"}]
both_backends = pytest.mark.parametrize("backend", BACKENDS, ids=["faiss", "torch"])


def search_by_loop(queries, index, k, exclude=None):
    """Scores in exact arithmetic, rounded to float32; sorted by score, then by row."""
    scores = np.full((len(queries), k), -np.inf, np.float32)
    ids = np.full((len(queries), k), -1)
    for number, query in enumerate(queries):
        found = []
        for row, vector in enumerate(index):
            if exclude is None or row != exclude[number]:
                score = np.float32(math.fsum(float(a) * float(b) for a, b in zip(query, vector, strict=True)))
                found.append((-score, row))
        for rank, (negative, row) in enumerate(sorted(found)[:k]):
            scores[number, rank], ids[number, rank] = -negative, row
    return scores, ids


def unit_vectors(seed, num, dim=8):
    vectors = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


@pytest.fixture(params=[2**24, 64], ids=["one block", "many blocks"])
def block_size(request, monkeypatch) -> Iterator[int]:
    monkeypatch.setattr(index_module, "BLOCK_SIZE", request.param)
    yield request.param


@both_backends
@pytest.mark.parametrize("num_index", [3, 12, 60])
def test_search_equals_a_loop_over_all_pairs(backend, num_index, block_size):
    queries, index = unit_vectors(0, 25), unit_vectors(1, num_index)
    assert_same(exact_search(queries, index, 5, **backend), search_by_loop(queries, index, 5))


@both_backends
@pytest.mark.parametrize("k", [1, 4, 20, 70])
def test_equal_scores_come_in_the_order_of_the_rows(backend, k, block_size):
    # Few distinct vectors of small integers: many exact ties, at the last place too, in more rows than are proposed.
    generator = np.random.default_rng(2)
    queries = generator.integers(-1, 2, (20, 4)).astype(np.float32)
    index = generator.integers(-1, 2, (60, 4)).astype(np.float32)
    assert_same(exact_search(queries, index, k, **backend), search_by_loop(queries, index, k))


@both_backends
@pytest.mark.parametrize("spread", [0, 1e-7, 1e-4])
def test_a_collapsed_model_gets_the_same_order(backend, spread, block_size):
    index = unit_vectors(3, 1) + spread * unit_vectors(4, 80)
    own_rows = np.arange(80)
    found = exact_search(index, index, 3, exclude=own_rows, **backend)
    assert_same(found, search_by_loop(index, index, 3, own_rows))


@both_backends
def test_a_query_is_left_out_by_identity_and_its_duplicates_stay(backend):
    vectors = unit_vectors(5, 30)
    vectors[[4, 9, 21]] = vectors[0]
    own_rows = np.arange(30)
    own_rows[7] = -1

    scores, ids = exact_search(vectors, vectors, 3, exclude=own_rows, **backend)

    assert_same((scores, ids), search_by_loop(vectors, vectors, 3, own_rows))
    assert ids[0].tolist() == [4, 9, 21] and ids[9].tolist() == [0, 4, 21]
    assert ids[7, 0] == 7


@both_backends
def test_places_that_the_index_cannot_fill_hold_no_id(backend):
    queries, index = unit_vectors(6, 4), unit_vectors(7, 3)
    scores, ids = exact_search(queries, index, 5, exclude=np.array([0, 2, -1, 1]), **backend)
    assert (ids >= 0).sum(axis=1).tolist() == [2, 2, 3, 2]
    assert np.isneginf(scores[ids < 0]).all() and np.isfinite(scores[ids >= 0]).all()
    scores, ids = exact_search(queries, index[:0], 2, **backend)
    assert (ids == -1).all() and np.isneginf(scores).all()


@both_backends
@pytest.mark.parametrize("chunk_size", [1, 7, 25])
def test_chunks_do_not_change_the_result(backend, chunk_size):
    queries, index = unit_vectors(8, 25, dim=64), unit_vectors(9, 200, dim=64)
    index[50:] = index[np.arange(150) % 5]  # some queries have more ties at the last place than are proposed
    expected = exact_search(queries, index, 6)
    assert_same(exact_search(queries, index, 6, chunk_size=chunk_size, **backend), expected)


def test_low_precision_products_do_not_change_the_result():
    queries = unit_vectors(10, 50)
    index = queries[:1] + 0.01 * unit_vectors(11, 400)  # scores closer than bfloat16 can tell apart
    expected = search_by_loop(queries, index, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(exact_search(queries, index, 5, backend="torch", device="cpu"), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_a_gpu_gives_the_same_result(precision):
    queries = unit_vectors(15, 300, dim=64)
    index = np.concatenate([queries[:1] + 0.001 * unit_vectors(16, 500, dim=64), unit_vectors(17, 5000, dim=64)])
    expected = exact_search(queries, index, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_same(exact_search(queries, index, 5, backend="torch", device="cuda"), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@both_backends
def test_inputs_of_other_types_and_layouts_are_taken(backend):
    queries, index = unit_vectors(12, 5), unit_vectors(13, 40)
    expected = exact_search(queries, index, 5)
    index.setflags(write=False)
    assert_same(exact_search(queries.astype(np.float64), index, 5, **backend), expected)
    assert_same(exact_search(np.asfortranarray(queries), np.asfortranarray(index), 5, **backend), expected)
    assert exact_search(queries[:0], index, 5, **backend)[1].shape == (0, 5)


VECTORS = unit_vectors(14, 3)
WITH_NAN = VECTORS.copy()
WITH_NAN[1, 2] = np.nan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": VECTORS[0]}, r"queries must be a matrix with one embedding per row. Got shape \(8,\)"),
        ({"index": VECTORS[None]}, r"index must be a matrix .* Got shape \(1, 3, 8\)"),
        ({"index": VECTORS[:, :4]}, "same dimension. Got 8 and 4; embed both with the same model"),
        ({"k": 0}, "k must be at least 1. Got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1. Got 0"),
        ({"exclude": np.array([0])}, r"exclude must have one row for each of the 3 queries. Got shape \(1,\)"),
        ({"exclude": np.array([0, 1, 3])}, "exclude must hold rows of the index, 0 to 2, or -1 for none. Got 3"),
        ({"exclude": np.array([0, -2, 1])}, "exclude must hold rows .* Got -2"),
        ({"queries": WITH_NAN}, "queries must be finite. Got NaN or infinity in row 1"),
        ({"index": WITH_NAN}, "index must be finite. Got NaN or infinity in row 1"),
        ({"backend": "annoy"}, 'backend must be "faiss" or "torch". Got \'annoy\''),
        ({"device": "cpu"}, 'device must be left out with backend="faiss". Got cpu; use backend="torch"'),
    ],
)
def test_wrong_input_is_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        exact_search(**{"queries": VECTORS, "index": VECTORS, "k": 1, **options})
    assert "\n" not in str(error.value)


@pytest.fixture
def quick(monkeypatch):
    """Candidates by products in bfloat16, whatever the processor and the sizes, in blocks of 96 rows."""
    monkeypatch.setattr(index_module, "_is_quick_in_halves", lambda *sizes: True)
    monkeypatch.setattr(index_module, "HALF_BLOCK", 96)
    monkeypatch.setattr(index_module, "HALF_CACHED", 32)
    monkeypatch.setattr(index_module, "HALF_GROUP", 4)
    monkeypatch.setattr(index_module, "HALF_QUERIES", 16)
    monkeypatch.setattr(index_module, "NUM_SPARE_HALVES", 6)


@pytest.mark.parametrize("num_index", [30, 96, 250])
def test_candidates_in_bfloat16_give_what_a_loop_gives(quick, num_index):
    queries, index = unit_vectors(0, 25), unit_vectors(1, num_index)
    assert_same(exact_search(queries, index, 5), search_by_loop(queries, index, 5))
    own = np.arange(25)
    assert_same(exact_search(index[:25], index, 5, exclude=own), search_by_loop(index[:25], index, 5, own))


@pytest.mark.parametrize("case", ["ties", "collapsed", "negative", "long"])
def test_what_bfloat16_cannot_decide_is_searched_exactly(quick, case):
    queries, index = unit_vectors(0, 20), unit_vectors(1, 200)
    if case == "ties":
        index = np.repeat(index[:10], 20, axis=0)
    elif case == "collapsed":
        index = index[:1] + 1e-4 * index
    elif case == "negative":
        index, queries = np.abs(index), -np.abs(queries)
    else:
        index = 1000 * index
    assert_same(exact_search(queries, index, 5), search_by_loop(queries, index, 5))


def test_most_queries_are_decided_in_bfloat16(quick):
    queries, index = unit_vectors(0, 64, 64), unit_vectors(1, 250, 64)
    scores, ids = np.empty((64, 3), np.float32), np.empty((64, 3), np.int64)
    left = index_module._search_in_halves(queries, index, np.full(64, -1), scores, ids)
    assert len(left) < 16
