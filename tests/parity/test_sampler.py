"""Steps of each domain and dynamic weights beside the original's."""

from itertools import islice

import numpy as np
import pytest

from modeling_udon.data.sampling import DomainBatchSampler
from modeling_udon.data.weights import DynamicWeights

# What the original calls the strategies.
STRATEGIES = {
    "round_robin": "round_robin",
    "balanced": "balanced",
    "dataset_size": "dataset_size",
    "specialist_top_steps": "fixed",
}


@pytest.fixture
def facts(reference):
    return reference("sampler.json")


def cases(facts):
    return [case for case in facts["updates"] if "raises" not in case["trace"][1]]


def make_sampler(facts, strategy, **options):
    sizes = dict(zip(facts["domains"], facts["sizes"], strict=True))
    return DomainBatchSampler(sizes, facts["total_steps"], batch_size=4, strategy=strategy, **options)


def count_steps(sampler):
    domains = [draw.domain for draw in sampler]
    return [domains.count(name) for name in sampler.names]


@pytest.mark.parametrize("there", STRATEGIES)
def test_weights_and_counts_of_each_strategy_are_the_originals(facts, there):
    expected = facts["strategies"][there]
    options = {}
    if there == "specialist_top_steps":
        options["weights"] = dict(zip(facts["domains"], expected["specialist_top_steps"], strict=True))
    sampler = make_sampler(facts, STRATEGIES[there], **options)
    assert sampler.weights == pytest.approx(expected["weights"], abs=1e-15)
    counts = count_steps(sampler)
    assert sum(counts) == expected["len"]
    # The original rounds down and gives what is left to the last domain; ours gives it to the largest remainders.
    shares = np.array(list(expected["weights"].values())) * expected["len"]
    assert (np.abs(np.array(counts) - shares) < 1).all()
    assert (np.abs(np.array(counts) - expected["counts"]) < len(counts)).all()
    if there == "round_robin":
        assert counts == expected["counts"]


def test_round_robin_takes_the_domains_in_the_originals_order(facts):
    numbers = [facts["domains"].index(draw.domain) for draw in islice(make_sampler(facts, "round_robin"), 30)]
    assert numbers == facts["strategies"]["round_robin"]["first_30"]


def test_dynamic_weights_after_each_update_are_the_originals(facts):
    for case in cases(facts):
        start, *updates = case["trace"]
        dynamic = DynamicWeights(len(facts["domains"]))
        dynamic.weights = np.array(list(start["weights"].values()))
        for update in updates:
            for name, loss in update["mean_teacher_loss"].items():
                for offset in np.linspace(-loss / 2, loss / 2, update["n_batches"][name]):
                    dynamic.observe(facts["domains"].index(name), loss + offset)
            dynamic.update()
            expected = list(update["weights"].values())
            # The original divides in float32, ours in float64: equal to the last place of float32.
            np.testing.assert_allclose(dynamic.weights, expected, rtol=1e-7, err_msg=case["case"])


def test_steps_after_an_update_are_shared_out_as_in_the_original(facts):
    for case in cases(facts):
        for update in case["trace"][1:]:
            weights = np.array(list(update["weights"].values()))
            sampler = make_sampler(facts, "fixed", weights=dict(zip(facts["domains"], weights, strict=True)))
            counts, there = np.array(count_steps(sampler)), np.array(update["counts_full_horizon"])
            assert (np.abs(counts - there) < len(weights)).all(), case["case"]
            shares = weights * facts["total_steps"]
            if np.abs(there - shares).max() < 1e-3:  # nothing is left over to be given to anyone
                assert (counts == there).all(), case["case"]


def test_losses_of_zero_leave_the_weights_where_the_original_stops(facts):
    (case,) = [case for case in facts["updates"] if "raises" in case["trace"][1]]
    dynamic = DynamicWeights(len(facts["domains"]))
    for name, loss in case["trace"][1]["losses"].items():
        dynamic.observe(facts["domains"].index(name), loss)
    dynamic.update()
    assert dynamic.weights.tolist() == list(case["trace"][0]["weights"].values())
