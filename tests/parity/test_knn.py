"""R@1 and mMP@k of the original implementation, a value a query."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from modeling_udon.evaluation.metrics import count_positives, mean_modified_precision_at_k, recall_at_k
from modeling_udon.evaluation.protocol import EmbeddedDomain, score_queries, search_merged
from modeling_udon.search.exact_search import exact_search

CASES = ["a_self", "b_separate", "c_merged_q0", "d_list"]


@pytest.fixture(scope="module")
def vectors():
    reference = Path(__file__).parents[1] / "reference"
    for folder in (Path(os.environ.get("UDON_PARITY_DIR", reference)), reference):
        if (folder / "knn.npz").is_file() and (folder / "knn.json").is_file():
            with np.load(folder / "knn.npz") as arrays:
                return dict(arrays), json.loads((folder / "knn.json").read_text())
    pytest.skip("no knn.npz and knn.json in tests/reference; set UDON_PARITY_DIR to the reference vectors")


@pytest.fixture(params=CASES)
def case(request, vectors):
    arrays, facts = vectors
    prefix = f"{request.param}/"
    named = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return {**named, **facts[request.param]}


@pytest.mark.parametrize("search", [{}, {"backend": "torch", "device": "cpu"}], ids=["faiss", "torch"])
def test_metrics_equal_the_original_for_each_query(case, search):
    # Labels of the original are local to a domain: number them apart.
    num_domains = int(case["index_domains"].max()) + 1
    index_labels = case["index_labels"] * num_domains + case["index_domains"]
    query_labels = [
        (np.atleast_1d(labels) * num_domains + domain).tolist()
        for labels, domain in zip(case["query_labels"], case["query_domains"], strict=True)
    ]
    own_rows = np.arange(case["n_query"]) if case["throw_first"] else None
    k = case["top_k"]

    _, ids = exact_search(case["query_emb"], case["index_emb"], k, exclude=own_rows, **search)
    num_positives = count_positives(query_labels, index_labels, own_rows)

    # The original counts the query itself among the positives in its index.
    assert (num_positives + case["throw_first"] == case["positives_in_index"]).all()
    assert (recall_at_k(ids, query_labels, index_labels, reduce=False) == case["per_query_acc"]).all()
    precision = mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives, k, reduce=False)
    np.testing.assert_allclose(precision, case["per_query_mp"], atol=1e-12)
    assert recall_at_k(ids, query_labels, index_labels) == pytest.approx(case["mean_acc"], abs=1e-12)
    mean = mean_modified_precision_at_k(ids, query_labels, index_labels, num_positives, k)
    assert mean == pytest.approx(case["mean_mmp_at_k"], abs=1e-12)


def test_the_protocol_equals_the_original_for_each_query(case):
    domains = {}
    for number in np.unique(case["index_domains"]):
        rows = case["index_domains"] == number
        embeds, labels = case["index_emb"][rows], case["index_labels"][rows]
        if number != case["query_domains"][0]:  # the original asked queries of one domain only
            domains[str(number)] = EmbeddedDomain(embeds[:1], labels[:1], embeds, labels)
        elif case["throw_first"]:
            domains["asked"] = EmbeddedDomain(embeds, labels)
        else:
            domains["asked"] = EmbeddedDomain(case["query_emb"], case["query_labels"], embeds, labels)

    values = score_queries(search_merged(domains)["asked"])

    assert (values["R@1"] == case["per_query_acc"]).all()
    np.testing.assert_allclose(values["mMP@5"], case["per_query_mp"], atol=1e-12)
