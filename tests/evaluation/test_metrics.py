"""Retrieval metrics against their definitions, written out as plain loops."""

import numpy as np
import pytest
import torch

from modeling_udon.evaluation.metrics import (
    count_positives,
    flatten_labels,
    mean_average_precision_at_r,
    mean_modified_precision_at_k,
    recall_at_k,
)


def as_set(label):
    return {int(one) for one in np.atleast_1d(label)}


def is_right(row, label, index_labels):
    return row >= 0 and int(index_labels[row]) in as_set(label)


def recall_by_loop(ids, query_labels, index_labels, k):
    return [
        float(any(is_right(row, label, index_labels) for row in list(found)[:k]))
        for found, label in zip(ids, query_labels, strict=True)
    ]


def precision_by_loop(ids, query_labels, index_labels, num_positives, k):
    values = []
    for found, label, positives in zip(ids, query_labels, num_positives, strict=True):
        depth = min(int(positives), k)
        right = [is_right(row, label, index_labels) for row in list(found)[:depth]]
        values.append(sum(right) / depth if depth else 0.0)
    return values


def average_precision_by_loop(ids, query_labels, index_labels, num_positives):
    values = []
    for found, label, positives in zip(ids, query_labels, num_positives, strict=True):
        right_so_far, total = 0, 0.0
        for rank, row in enumerate(list(found)[: int(positives)], start=1):
            if is_right(row, label, index_labels):
                right_so_far += 1
                total += right_so_far / rank
        values.append(total / int(positives) if positives else 0.0)
    return values


def positives_by_loop(query_labels, index_labels, exclude=None):
    counts = []
    for query, label in enumerate(query_labels):
        own_row = -1 if exclude is None else exclude[query]
        counts.append(sum(row != own_row and int(one) in as_set(label) for row, one in enumerate(index_labels)))
    return counts


def random_case(seed, labels_per_query):
    """Queries with known and unknown labels, some neighbours missing at the end, some rows the query itself."""
    generator = np.random.default_rng(seed)
    num_queries, num_index, num_neighbours = 40, 30, 30
    index_labels = generator.integers(-2, 8, num_index)
    ids = np.stack([generator.permutation(num_index)[:num_neighbours] for _ in range(num_queries)])
    for query, missing in enumerate(generator.integers(0, num_neighbours, num_queries)):
        ids[query, num_neighbours - missing :] = -1
    exclude = generator.integers(-1, num_index, num_queries)
    if labels_per_query == "one":
        query_labels = generator.integers(-2, 12, num_queries)
    else:
        query_labels = [generator.integers(-2, 12, generator.integers(0, 4)).tolist() for _ in range(num_queries)]
    return ids, query_labels, index_labels, exclude


@pytest.mark.parametrize("labels_per_query", ["one", "none to three"])
@pytest.mark.parametrize("seed", range(5))
def test_every_metric_equals_its_plain_loop(seed, labels_per_query):
    ids, query_labels, index_labels, exclude = random_case(seed, labels_per_query)
    num_positives = count_positives(query_labels, index_labels, exclude)

    assert num_positives.tolist() == positives_by_loop(query_labels, index_labels, exclude)
    assert count_positives(query_labels, index_labels).tolist() == positives_by_loop(query_labels, index_labels)
    for k in (1, 3, 5, 30):
        expected = recall_by_loop(ids, query_labels, index_labels, k)
        assert recall_at_k(ids, query_labels, index_labels, k, reduce=False).tolist() == expected
        assert recall_at_k(ids, query_labels, index_labels, k) == pytest.approx(sum(expected) / len(expected))
        expected = precision_by_loop(ids, query_labels, index_labels, num_positives, k)
        found = mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives, k, reduce=False)
        assert found.tolist() == expected
        mean = mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives, k)
        assert mean == pytest.approx(sum(expected) / len(expected))
    expected = average_precision_by_loop(ids, query_labels, index_labels, num_positives)
    found = mean_average_precision_at_r(ids, query_labels, index_labels, num_positives, reduce=False)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    mean = mean_average_precision_at_r(ids, query_labels, index_labels, num_positives)
    assert mean == pytest.approx(sum(expected) / len(expected))


def test_a_hit_below_the_number_of_positives_does_not_count_for_precision():
    # One positive, found at rank 2: a perfect ranking has it at rank 1, and the metric looks no deeper.
    assert mean_modified_precision_at_k([[0, 1, 2]], [7], [3, 7, 3], num_positives=[1], k=3) == 0.0
    assert mean_modified_precision_at_k([[1, 0, 2]], [7], [3, 7, 3], num_positives=[1], k=3) == 1.0
    assert mean_modified_precision_at_k([[0, 1, 2]], [7], [3, 7, 7], num_positives=[2], k=3) == 0.5


def test_a_query_without_positives_stays_in_the_mean_as_zero():
    ids, query_labels, index_labels = [[0], [0]], [5, 6], [5]
    assert recall_at_k(ids, query_labels, index_labels) == 0.5
    assert mean_modified_precision_at_k(ids, query_labels, index_labels, [1, 0], k=1) == 0.5
    assert mean_average_precision_at_r(ids, query_labels, index_labels, [1, 0]) == 0.5


def test_map_at_r_weighs_hits_by_the_precision_at_their_rank():
    # Hits at ranks 1 and 3 of R = 4: (1/1 + 2/3) / 4.
    found = mean_average_precision_at_r([[0, 1, 2, 3]], [1], [1, 0, 1, 0, 1, 1], num_positives=[4])
    assert found == pytest.approx((1 + 2 / 3) / 4)


def test_an_index_without_rows_gives_zeros():
    assert recall_at_k([[-1], [-1]], [1, 2], []) == 0.0
    assert count_positives([0, 2], []).tolist() == [0, 0]
    assert mean_average_precision_at_r(np.empty((2, 0)), [1, 2], [], [0, 0]) == 0.0


def test_a_label_that_the_index_lacks_has_no_positives():
    assert count_positives([-9, -2, 0, 3], [-3, -1, -3]).tolist() == [0, 0, 0, 0]


def test_a_label_named_twice_counts_once():
    assert count_positives([[4, 4], [4, 5]], [4, 4, 5]).tolist() == [2, 3]


def test_tensors_lists_and_arrays_give_the_same():
    ids, query_labels, index_labels, _ = random_case(0, "one")
    num_positives = count_positives(query_labels, index_labels)
    expected = mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives)
    arrays = (ids, query_labels, index_labels, num_positives)
    assert mean_modified_precision_at_k(*(torch.from_numpy(array) for array in arrays)) == expected
    assert mean_modified_precision_at_k(*(array.tolist() for array in arrays)) == expected
    assert mean_modified_precision_at_k(*(array.astype(np.int32) for array in arrays)) == expected


@pytest.mark.parametrize(
    ("query_labels", "flat", "counts"),
    [
        ([3, 1], [3, 1], [1, 1]),
        ([[3, 1], [2, 2]], [3, 1, 2, 2], [2, 2]),
        (torch.tensor([[3, 1], [2, 2]]), [3, 1, 2, 2], [2, 2]),
        ([3, [1, 2], (), np.array([4])], [3, 1, 2, 4], [1, 2, 0, 1]),
        (np.array([[1, 2], [3]], dtype=object), [1, 2, 3], [2, 1]),
        ([[], []], [], [0, 0]),
        ([], [], []),
    ],
)
def test_labels_of_every_form_are_flattened(query_labels, flat, counts):
    found_flat, found_counts = flatten_labels(query_labels)
    assert found_flat.tolist() == flat and found_flat.dtype == np.int64
    assert found_counts.tolist() == counts


IDS, LABELS, INDEX = [[0, 1], [1, 0]], [0, 1], [0, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall_at_k(IDS, LABELS, INDEX, k=0), "k must be at least 1. Got 0"),
        (lambda: recall_at_k(IDS, LABELS, INDEX, k=3), r"k must be at most .* Got k=3 for .* \(2, 2\); search with"),
        (lambda: recall_at_k([0, 1], LABELS, INDEX), r"neighbour_ids must have 2 dimension\(s\). Got shape \(2,\)"),
        (lambda: recall_at_k([[0], [0, 1]], LABELS, INDEX), "neighbour_ids must have .* lists of unequal lengths"),
        (lambda: recall_at_k([[0.0], [1.0]], LABELS, INDEX), "neighbour_ids must hold integers. Got float64"),
        (lambda: recall_at_k([[2], [0]], LABELS, INDEX), "neighbour_ids must be rows of the index, 0 to 1, .* Got 2"),
        (lambda: recall_at_k([[-2], [0]], LABELS, INDEX), "neighbour_ids must be rows .* or -1 for none. Got -2"),
        (lambda: recall_at_k(IDS, [0], INDEX), "neighbour_ids and query_labels .* one row per query. Got 2 and 1 rows"),
        (lambda: recall_at_k(IDS, ["a", "b"], INDEX), "query_labels must hold integers. Got <U1; map names"),
        (lambda: recall_at_k(IDS, [["a"], ["b", "c"]], INDEX), "query_labels must hold integers. Got <U1"),
        (lambda: recall_at_k(IDS, np.zeros((2, 1, 1), int), INDEX), r"query_labels must be .* Got shape \(2, 1, 1\)"),
        (lambda: recall_at_k(IDS, LABELS, [[0], [1]]), r"index_labels must have 1 dimension\(s\). Got shape \(2, 1\)"),
        (lambda: recall_at_k(np.empty((0, 1), int), [], INDEX), "mean over no queries is not defined; give at least"),
        (lambda: mean_modified_precision_at_k(IDS, LABELS, INDEX, [1], k=1), "num_positives .* the 2 queries. Got 1"),
        (lambda: mean_modified_precision_at_k(IDS, LABELS, INDEX, [1, -1], k=1), "num_positives must not .* Got -1"),
        (lambda: mean_modified_precision_at_k(IDS, LABELS, INDEX, [1, 1]), "k must be at most .* Got k=5"),
        (
            lambda: mean_average_precision_at_r(IDS, LABELS, INDEX, [1, 3]),
            "up to 3 here, .* 2 columns; search with k=3",
        ),
        (
            lambda: count_positives(LABELS, INDEX, [0]),
            "exclude and query_labels must have one row per query. Got 1 and 2",
        ),
        (lambda: count_positives(LABELS, INDEX, [0, 2]), "exclude must be rows of the index, 0 to 1, .* Got 2"),
    ],
)
def test_wrong_input_is_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_values_a_query_of_no_queries_are_empty():
    assert recall_at_k(np.empty((0, 1), int), [], INDEX, reduce=False).shape == (0,)
