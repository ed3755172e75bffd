"""The `evaluate` module: loaded offline from its folder, equal to the functions that it wraps."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from modeling_udon.evaluation.metrics import (
    count_positives,
    mean_average_precision_at_r,
    mean_modified_precision_at_k,
    recall_at_k,
)

FOLDER = Path(__file__).parents[2] / "metrics" / "universal_retrieval"


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory):
    return evaluate.load(str(FOLDER), cache_dir=str(tmp_path_factory.mktemp("metrics")))


@pytest.mark.parametrize("several", [False, True], ids=["one label", "several labels"])
def test_the_module_gives_what_the_functions_give(retrieval, several):
    rng = np.random.default_rng(0)
    index_labels = rng.integers(0, 5, 40)
    ids = np.stack([rng.permutation(40) for _ in range(20)])
    labels = [sorted({*rng.integers(0, 6, 3).tolist()}) if several else int(rng.integers(0, 6)) for _ in range(20)]
    positives = count_positives(labels, index_labels)
    found = retrieval.compute(
        predictions=ids, references=labels, index_labels=index_labels, num_positives=positives, k=[1, 3], precision_k=4
    )
    assert found == {
        "R@1": recall_at_k(ids, labels, index_labels, 1),
        "R@3": recall_at_k(ids, labels, index_labels, 3),
        "mMP@4": mean_modified_precision_at_k(ids, labels, index_labels, positives, 4),
        "mAP@R": mean_average_precision_at_r(ids, labels, index_labels, positives),
    }


def test_only_recall_needs_no_number_of_positives(retrieval):
    found = retrieval.compute(predictions=[[1, 2], [-1, -1]], references=[7, 7], index_labels=[7, 7, 3], k=2)
    assert found == {"R@2": 0.5}


def test_map_at_r_is_left_out_where_too_few_neighbours_are_given(retrieval):
    found = retrieval.compute(
        predictions=[[1, 2]], references=[7], index_labels=[7, 7, 7, 7, 3], num_positives=[3], precision_k=2
    )
    assert found == {"R@1": 1.0, "mMP@2": 1.0}


def test_batches_add_up(retrieval):
    retrieval.add_batch(predictions=[[0, 1]], references=[7])
    retrieval.add_batch(predictions=[[1, 0]], references=[7])
    assert retrieval.compute(index_labels=[7, 3]) == {"R@1": 0.5}


def test_what_does_not_fit_is_refused_as_by_the_functions(retrieval):
    with pytest.raises(ValueError, match="k must be at most the number of neighbours given. Got k=3"):
        retrieval.compute(predictions=[[1, 2]], references=[7], index_labels=[7, 7, 3], k=3)
