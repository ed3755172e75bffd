"""The threshold for "not in the index", against loops over all pairs."""

import json

import numpy as np
import pytest

from modeling_udon.calibration import read_calibration
from modeling_udon.evaluation.calibration import best_wrong_scores, calibrate, threshold_at, write_calibration
from modeling_udon.evaluation.protocol import EmbeddedDomain
from modeling_udon.evaluation.tables import format_calibration


def unit_vectors(rng, num, dim=4):
    vectors = rng.standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def two_domains(seed):
    rng = np.random.default_rng(seed)
    several = [[0, 2], [1], [], [3], [9], [2, 1, 0]]
    return {
        "own": EmbeddedDomain(unit_vectors(rng, 25), rng.integers(0, 4, 25)),
        "apart": EmbeddedDomain(unit_vectors(rng, 6), several, unit_vectors(rng, 12), rng.integers(0, 4, 12)),
    }


def pairs(domains):
    """For each domain and query: scores of wrong rows, scores of right rows, by loops."""
    rows = []
    for name, domain in domains.items():
        vectors = domain.query_embeds if domain.index_embeds is None else domain.index_embeds
        labels = domain.query_labels if domain.index_labels is None else domain.index_labels
        rows += [(name, number, v, int(label)) for number, (v, label) in enumerate(zip(vectors, labels, strict=True))]
    found = {}
    for name, domain in domains.items():
        found[name] = []
        for number, (query, label) in enumerate(zip(domain.query_embeds, domain.query_labels, strict=True)):
            wanted = {int(one) for one in np.atleast_1d(label)}
            wrong, right = [], []
            for of, row, vector, row_label in rows:
                is_self = domain.index_embeds is None and (of, row) == (name, number)
                is_right = of == name and row_label in wanted
                if not is_self:
                    (right if is_right else wrong).append(np.float32(query.astype(np.float64) @ vector))
            found[name].append((wrong, right))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_best_wrong_score_leaves_the_own_classes_out(seed):
    domains = two_domains(seed)
    scores = best_wrong_scores(domains)
    for name, queries in pairs(domains).items():
        np.testing.assert_array_equal(scores[name], [max(wrong) for wrong, _ in queries])


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_the_threshold_is_the_least_that_keeps_the_rate(seed, rate):
    rng = np.random.default_rng(seed)
    scores = {"a": rng.integers(0, 9, 30).astype(np.float32) / 9, "b": rng.random(7).astype(np.float32)}

    def false_accepts(threshold):
        return sum(sum(score >= threshold for score in of) / len(of) for of in scores.values()) / 2

    candidates = sorted(np.nextafter(score, np.float32(np.inf)) for of in scores.values() for score in of)
    expected = next(candidate for candidate in candidates if false_accepts(candidate) <= rate + 1e-9)
    assert threshold_at(scores, rate) == expected


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match=f"--false-accept-rate must be above 0 and below 1. Got {rate}"):
        threshold_at({"a": np.ones(3)}, rate)


def test_an_index_of_one_class_cannot_be_calibrated():
    domains = {"a": EmbeddedDomain(unit_vectors(np.random.default_rng(0), 5), [3] * 5)}
    with pytest.raises(ValueError, match="calibration must have an index of at least two classes"):
        calibrate(domains, 0.1, "validation")


@pytest.mark.parametrize("seed", range(3))
def test_calibration_says_what_the_threshold_does_by_domain(seed):
    domains = two_domains(seed)
    calibration = calibrate(domains, 0.2, "validation")
    threshold = calibration["threshold"]
    assert (calibration["false_accept_rate"], calibration["split"]) == (0.2, "validation")
    assert (calibration["num_queries"], calibration["num_index"]) == (31, 37)
    rates = []
    for name, queries in pairs(domains).items():
        row = calibration["domains"][name]
        answerable = [(wrong, right) for wrong, right in queries if right]
        accepted = [(wrong, right) for wrong, right in answerable if max(wrong + right) >= threshold]
        rates.append(sum(max(wrong) >= threshold for wrong, _ in queries) / len(queries))
        assert row["false_accept_rate"] == pytest.approx(rates[-1])
        assert row["accept_rate"] == pytest.approx(len(accepted) / len(answerable))
        num_right = sum(max(right) > max(wrong) for wrong, right in accepted)
        assert row["right_accept_rate"] == pytest.approx(num_right / len(answerable))
        assert row["threshold"] == threshold_at({name: best_wrong_scores(domains)[name]}, 0.2)
    assert sum(rates) / 2 <= 0.2


def test_calibration_is_written_beside_the_model(tmp_path):
    calibration = calibrate(two_domains(0), 0.1, "validation")
    path = write_calibration(tmp_path, calibration)
    assert path == tmp_path / "calibration.json" and json.loads(path.read_text()) == calibration
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("seed", range(3))
def test_each_neighbour_is_held_to_the_threshold_of_its_own_domain(seed):
    domains = two_domains(seed)
    calibration = calibrate(domains, 0.3, "validation")
    own = {name: row["threshold"] for name, row in calibration["domains"].items()}
    rows = [("own", v) for v in domains["own"].query_embeds] + [("apart", v) for v in domains["apart"].index_embeds]
    for name, queries in pairs(domains).items():
        num_false = num_accepted = num_answerable = 0
        for query, (wrong, right) in zip(domains[name].query_embeds, queries, strict=True):
            of = {np.float32(query.astype(np.float64) @ vector): domain for domain, vector in rows}
            num_false += max(wrong) >= own[of[max(wrong)]]
            if right:
                best = max(wrong + right)
                num_answerable += 1
                num_accepted += best >= own[of[best]]
        found = calibration["domains"][name]["own_thresholds"]
        assert found["false_accept_rate"] == pytest.approx(num_false / len(queries))
        assert found["accept_rate"] == pytest.approx(num_accepted / num_answerable)


def test_a_threshold_that_refuses_most_right_answers_is_warned_of():
    calibration = calibrate(two_domains(0), 0.05, "validation")
    for share, warned in ((0.49, True), (0.5, False)):
        for row in calibration["domains"].values():
            row["own_thresholds"]["accept_rate"] = share
        text = format_calibration(calibration)
        assert ("WARNING: most right answers would count as not in the index" in text) == warned
        assert f"{100 * share:.1f}" in text


def test_a_model_gives_the_thresholds_of_its_domains(tmp_path):
    calibration = calibrate(two_domains(0), 0.1, "validation")
    write_calibration(tmp_path, calibration)
    found = read_calibration(str(tmp_path), None)
    assert found.threshold_of("own") == calibration["domains"]["own"]["threshold"]
    assert found.threshold_of("elsewhere") == found.threshold_of(None) == calibration["threshold"]
