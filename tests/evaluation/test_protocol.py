"""From embeddings to `results.json`, against plain loops over all queries and all domains."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_udon.evaluation.protocol import (
    METRICS,
    EmbeddedDomain,
    SplitScores,
    score,
    score_merged,
    score_queries,
    score_separate,
    search_merged,
    search_separate,
)
from modeling_udon.evaluation.results import build_results, write_results
from modeling_udon.evaluation.tables import format_table

ALL_METRICS = ("R@1", "R@3", "mMP@5", "mAP@R")


def unit_vectors(generator, num, dim=6):
    vectors = generator.standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def three_domains(seed=0):
    """Label numbers shared by all domains; queries that are the index, with duplicates; several labels; none at all."""
    generator = np.random.default_rng(seed)
    own = unit_vectors(generator, 24)
    own[[5, 11]] = own[2]
    labels = generator.integers(0, 4, (5, 30))
    return {
        "apart": EmbeddedDomain(
            unit_vectors(generator, 10), (labels[1, :10] + 1).tolist(), unit_vectors(generator, 17), labels[2, :17]
        ),
        "own": EmbeddedDomain(own, labels[0, :24]),
        "several": EmbeddedDomain(
            unit_vectors(generator, 6),
            [[0], [1, 2], [9], [3, 0, 1], [], [2]],
            unit_vectors(generator, 9),
            labels[3, :9],
        ),
    }


def values_by_loop(domains, merged):
    """Every metric of every query, by domain: `{name: {metric: [..]}}`."""
    rows = []
    for name, domain in domains.items():
        embeds = domain.query_embeds if domain.index_embeds is None else domain.index_embeds
        labels = domain.query_labels if domain.index_labels is None else domain.index_labels
        rows += [
            (name, number, vector, label) for number, (vector, label) in enumerate(zip(embeds, labels, strict=True))
        ]
    return {name: _domain_by_loop(name, domain, rows, merged) for name, domain in domains.items()}


def _domain_by_loop(name, domain, rows, merged):
    values = {metric: [] for metric in ALL_METRICS}
    for number, (query, label) in enumerate(zip(domain.query_embeds, domain.query_labels, strict=True)):
        right_labels = {int(one) for one in np.atleast_1d(label)}
        ranking = []
        for place, (row_name, row_number, vector, row_label) in enumerate(rows):
            is_self = domain.index_embeds is None and (row_name, row_number) == (name, number)
            if not is_self and (merged or row_name == name):
                similarity = np.float32(query.astype(np.float64) @ vector.astype(np.float64))
                ranking.append((-similarity, place, row_name == name and int(row_label) in right_labels))
        hits = [right for _, _, right in sorted(ranking)]
        positives = sum(hits)
        depth = min(positives, 5)
        precisions = [sum(hits[:rank]) / rank for rank in range(1, positives + 1) if hits[rank - 1]]
        values["R@1"].append(float(hits[0]))
        values["R@3"].append(float(any(hits[:3])))
        values["mMP@5"].append(sum(hits[:depth]) / depth if depth else 0.0)
        values["mAP@R"].append(sum(precisions) / positives if positives else 0.0)
    return values


@pytest.mark.parametrize("search", [{}, {"backend": "torch", "device": "cpu", "chunk_size": 4}], ids=["faiss", "torch"])
@pytest.mark.parametrize("merged", [True, False], ids=["merged", "separate"])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_loop_over_all_queries(seed, merged, search):
    domains = three_domains(seed)
    expected = values_by_loop(domains, merged)
    neighbours = (search_merged if merged else search_separate)(domains, ALL_METRICS, **search)
    for name, found in neighbours.items():
        for metric, values in score_queries(found, ALL_METRICS).items():
            np.testing.assert_allclose(values, expected[name][metric], atol=1e-12, err_msg=f"{name} {metric}")

    scores = (score_merged if merged else score_separate)(domains, ALL_METRICS, **search)

    assert scores == score(neighbours, ALL_METRICS)
    means = {name: {metric: np.mean(values[metric]) for metric in ALL_METRICS} for name, values in expected.items()}
    for metric in ALL_METRICS:
        for name in domains:
            assert scores["domains"][name][metric] == pytest.approx(means[name][metric])
        assert scores["mean"][metric] == pytest.approx(np.mean([means[name][metric] for name in domains]))


def test_the_same_label_number_in_another_domain_is_wrong():
    axes = np.eye(2, dtype=np.float32)
    domains = {
        "a": EmbeddedDomain(axes[:1], [0], axes[1:], [0]),  # its positive is far, the row of "b" is near
        "b": EmbeddedDomain(axes[:1], [0], axes[:1], [0]),
    }
    assert score_merged(domains)["domains"]["a"]["R@1"] == 0.0
    assert score_merged(domains)["domains"]["b"]["R@1"] == 1.0
    assert score_separate(domains)["domains"]["a"]["R@1"] == 1.0
    assert score_merged(domains)["mean"]["R@1"] == 0.5


def test_each_neighbour_is_located_in_the_index_of_its_domain():
    domains = three_domains()
    found = search_merged(domains, ("R@60",))["apart"]
    position, row = found.locate()
    sizes = {"apart": 17, "own": 24, "several": 9}
    assert found.index_domains == tuple(sizes)
    for name, size in sizes.items():
        own_rows = np.where(position == list(sizes).index(name), row, size)
        assert (np.sort(own_rows, axis=1)[:, :size] == np.arange(size)).all()
    assert ((position == -1) == (found.ids == -1)).all() and ((row == -1) == (found.ids == -1)).all()
    assert (found.ids == -1).sum(axis=1).tolist() == [60 - sum(sizes.values())] * 10


def test_teachers_of_different_dimensions_are_scored_separately():
    generator = np.random.default_rng(1)
    domains = {
        "a": EmbeddedDomain(unit_vectors(generator, 8, dim=3), [0, 1] * 4),
        "b": EmbeddedDomain(unit_vectors(generator, 8, dim=5), [0, 1] * 4),
    }
    assert set(score_separate(domains)["domains"]) == {"a", "b"}
    with pytest.raises(ValueError, match="same dimension. Got {'a': 3, 'b': 5}; use search_separate"):
        score_merged(domains)


def domain(**changes):
    vectors = unit_vectors(np.random.default_rng(2), 3)
    fields = {"query_embeds": vectors, "query_labels": [0, 1, 1], "index_embeds": vectors, "index_labels": [0, 1, 1]}
    return {"cars": EmbeddedDomain(**{**fields, **changes})}


@pytest.mark.parametrize(
    ("domains", "message"),
    [
        ({}, "domains must name at least one domain. Got none"),
        (domain(index_labels=None), "domain 'cars': index_embeds and index_labels must be given together"),
        (domain(query_labels=[0, 1]), r"domain 'cars': query_embeds .* each of the 2 query_labels. Got shape \(3, 6\)"),
        (domain(index_labels=[0]), r"domain 'cars': index_embeds .* each of the 1 index_labels. Got shape \(3, 6\)"),
        (domain(query_embeds=np.ones(3)), r"domain 'cars': query_embeds must have .* Got shape \(3,\)"),
        (domain(query_embeds=np.ones((0, 6)), query_labels=[]), "domain 'cars' must have at least one query. Got none"),
        (
            domain(index_embeds=None, index_labels=None, query_labels=[0, [0, 1], 1]),
            "domain 'cars': a query set that is its own index must have one label per query",
        ),
    ],
)
def test_a_domain_that_does_not_fit_is_named(domains, message):
    for search in (search_merged, search_separate) if domains else (search_merged,):
        with pytest.raises(ValueError, match=message) as error:
            search(domains)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("metric", ["R@0", "recall@1", "mMP", "mAP@10", ""])
def test_an_unknown_metric_is_named(metric):
    with pytest.raises(
        ValueError, match=f'a metric must be "R@k" or "mMP@k" with k from 1, or "mAP@R". Got {metric!r}'
    ):
        search_merged(domain(), (metric,))


def test_scoring_deeper_than_the_search_is_refused():
    with pytest.raises(ValueError, match=r"k must be at most .* Got k=5 for .* \(3, 1\); search with a larger k"):
        score(search_merged(domain(), ("R@1",)), METRICS)


def scores(**values):
    """Scores of `{domain: (R@1, mMP@5)}`; the mean is that of the numbers given."""
    domains = {name: dict(zip(METRICS, pair, strict=True)) for name, pair in values.items()}
    mean = {metric: float(np.mean([one[metric] for one in domains.values()])) for metric in METRICS}
    return {"mean": mean, "domains": domains}


def example_results():
    split = SplitScores(
        merged=scores(digits=(0.98, 0.9), emoji=(0.5, 0.25)),
        separate=scores(digits=(1.0, 0.95), emoji=(0.6, 0.35)),
        teachers=scores(digits=(0.97, 0.91), emoji=(0.61, 0.31)),
    )
    baseline = {
        "untrained": scores(digits=(0.4, 0.3), emoji=(0.2, 0.1)),
        "raw_pixels": scores(digits=(0.9, 0.8), emoji=(0, 0)),
    }
    return build_results({"test": split}, baseline=baseline, config={"seed": 3})


def test_results_keep_their_schema_through_the_file(tmp_path):
    results = example_results()
    write_results(tmp_path / "results.json", results)
    found = json.loads((tmp_path / "results.json").read_text())

    assert found == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert found["schema"] == 1 and found["config"] == {"seed": 3}
    test = found["splits"]["test"]
    assert test["merged"] == {
        "mean": {"R@1": 0.74, "mMP@5": 0.575},
        "domains": {"digits": {"R@1": 0.98, "mMP@5": 0.9}, "emoji": {"R@1": 0.5, "mMP@5": 0.25}},
    }
    assert test["separate"]["mean"]["R@1"] == 0.8
    assert test["teachers"] == {"digits": {"R@1": 0.97, "mMP@5": 0.91}, "emoji": {"R@1": 0.61, "mMP@5": 0.31}}
    assert found["baseline"]["untrained"]["R@1"] == pytest.approx(0.3)
    assert found["baseline"]["raw_pixels"]["domains"]["digits"] == {"R@1": 0.9, "mMP@5": 0.8}
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["numpy"] == np.__version__
    assert {"python", "modeling_udon"} <= set(found["versions"])


def test_results_that_json_cannot_hold_leave_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, example_results())
    before = path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        write_results(path, {"schema": 1, "R@1": float("nan")})
    assert path.read_text() == before


def test_results_that_could_not_be_finished_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, example_results())
    before = path.read_text()

    def power_cut(*_):
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_results(path, {"schema": 1})
    assert path.read_text() == before


def test_the_table_shows_percent_a_line_a_domain():
    lines = format_table(example_results()).splitlines()
    assert lines[0] == "test split, in percent; untrained and raw pixels on the merged index"
    titles = ["student, merged", "student, separate", "teachers, own domain", "untrained", "raw pixels"]
    assert re.split(r"\s{2,}", lines[2].strip()) == titles
    numbers = {line.split()[0]: line.split()[1:] for line in lines[3:] if not line.startswith("-")}
    assert numbers["domain"] == ["R@1", "mMP@5"] * 5
    assert numbers["digits"] == ["98.0", "90.0", "100.0", "95.0", "97.0", "91.0", "40.0", "30.0", "90.0", "80.0"]
    assert numbers["emoji"] == ["50.0", "25.0", "60.0", "35.0", "61.0", "31.0", "20.0", "10.0", "0.0", "0.0"]
    assert numbers["mean"] == ["74.0", "57.5", "80.0", "65.0", "79.0", "61.0", "30.0", "20.0", "45.0", "40.0"]
    assert len({len(line) for line in lines[2:]}) == 1


def test_the_table_of_a_model_without_teachers_and_baselines_is_narrower():
    split = SplitScores(scores(digits=(0.98, 0.9)), scores(digits=(1.0, 0.95)))
    results = build_results({"val": split}, baseline={}, config={})
    assert results["splits"]["val"]["teachers"] == {}
    lines = format_table(results, "val").splitlines()
    assert lines[0] == "val split, in percent"
    numbers = lines[-1].split()
    assert numbers == ["mean", "98.0", "90.0", "100.0", "95.0"]


def test_the_table_marks_what_a_baseline_does_not_say_of_a_domain():
    results = example_results()
    del results["baseline"]["raw_pixels"]["domains"]
    table = {line.split()[0]: line.split()[1:] for line in format_table(results).splitlines() if line}
    assert table["emoji"][-2:] == ["-", "-"] and table["mean"][-2:] == ["45.0", "40.0"]
