"""Whose turn it is, with which images, and how the past decides it."""

import json
from collections import Counter

import numpy as np
import pytest

from modeling_udon.data.learnable import ExcessLoss, LearningProgress, LossOverLogClasses, ValidationGain
from modeling_udon.data.sampling import STRATEGIES, DomainBatchSampler
from modeling_udon.data.weights import DynamicWeights, allocate_steps

SIZES = {"cars": 40, "food": 100, "sop": 25}
WEIGHTS = {"cars": 1.0, "food": 2.5, "sop": 0.5}
LOSSES = {"cars": 1.0, "food": 4.0, "sop": 2.0}

every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def make_sampler(strategy="dynamic", **options):
    values = {"num_steps": 47, "batch_size": 8, "update_every": 10, "seed": 5} | options
    if strategy == "fixed":
        values.setdefault("weights", WEIGHTS)
    sizes = values.pop("sizes", SIZES)
    adaptive = {
        "loss_over_log_c": lambda: LossOverLogClasses([10] * len(sizes), 0.2),
        "excess_loss": lambda: ExcessLoss([0.5] * len(sizes), 0.2),
        "learning_progress": lambda: LearningProgress(len(sizes), 0.2),
        "validation_gain": lambda: ValidationGain(len(sizes), 0.2),
    }
    weights = adaptive[strategy]() if strategy in adaptive else None
    return DomainBatchSampler(sizes, strategy=strategy, adaptive=weights, **values)


def train(sampler, num_steps=None, log_every=None):
    """Draws as the trainer does: an iterator an interval, a loss and an `advance` for each step."""
    draws = []
    while sampler.step < sampler.num_steps:
        for draw in sampler:
            draws.append(draw)
            sampler.observe(draw.domain, LOSSES[draw.domain] + 0.01 * sampler.step)
            if sampler.step % 7 == 0:
                sampler.observe_score(draw.domain, sampler.step / 50 / LOSSES[draw.domain])
            if log_every and sampler.step % log_every == 0:
                assert sampler.weights and sampler.steps_by_domain and sampler.state_dict()
            sampler.advance()
            if len(draws) == num_steps:
                return draws
    return draws


def as_lists(draws):
    return [(draw.domain, draw.rows.tolist(), draw.positions.tolist()) for draw in draws]


@every_strategy
def test_a_run_has_exactly_its_steps_and_counts_them_by_domain(strategy):
    sampler = make_sampler(strategy)
    draws = train(sampler)
    assert len(draws) == sampler.step == 47
    assert sampler.steps_by_domain == {name: Counter(draw.domain for draw in draws)[name] for name in SIZES}


def test_round_robin_goes_through_the_domains_in_turn_over_intervals():
    names = list(SIZES)
    assert [draw.domain for draw in train(make_sampler("round_robin"))] == [names[step % 3] for step in range(47)]


def test_dynamic_goes_round_robin_until_the_first_update():
    first = train(make_sampler("dynamic"), num_steps=10)
    assert as_lists(first) == as_lists(train(make_sampler("round_robin"), num_steps=10))


@pytest.mark.parametrize(
    ("strategy", "shares"),
    [
        ("balanced", {"cars": 1, "food": 1, "sop": 1}),
        ("dataset_size", {"cars": 40, "food": 100, "sop": 25}),
        ("fixed", {"cars": 1, "food": 2.5, "sop": 0.5}),
    ],
)
def test_steps_follow_the_weights_within_one_at_every_update(strategy, shares):
    sampler = make_sampler(strategy, num_steps=200)
    draws = train(sampler)
    for end in range(10, 201, 10):
        counts = Counter(draw.domain for draw in draws[:end])
        for name, share in shares.items():
            assert abs(counts[name] - end * share / sum(shares.values())) < 1, f"{name} after {end} steps"


def test_shares_without_remainder_are_exact():
    counts, owed = allocate_steps(np.array([0.1, 0.3, 0.6]), 1000, np.zeros(3))
    assert counts.tolist() == [100, 300, 600]
    np.testing.assert_allclose(owed, 0, atol=1e-9)


def test_what_is_left_over_goes_to_the_largest_remainders():
    counts, owed = allocate_steps(np.array([0.14, 0.37, 0.49]), 10, np.zeros(3))
    assert counts.tolist() == [1, 4, 5]  # shares of 1.4, 3.7 and 4.9
    np.testing.assert_allclose(owed, [0.4, -0.3, -0.1])


def test_steps_are_always_shared_out_in_full_and_none_is_negative():
    random = np.random.default_rng(0)
    for _ in range(300):
        owed = np.zeros(6)
        for _ in range(5):
            weights = random.dirichlet(np.full(6, 0.2))  # changes from one interval to the next, as dynamic ones do
            num_steps = int(random.integers(1, 8))
            counts, owed_next = allocate_steps(weights, num_steps, owed)
            assert counts.sum() == num_steps and counts.min() >= 0
            np.testing.assert_allclose(owed_next, owed + weights * num_steps - counts, atol=1e-9)
            owed = owed_next


def test_a_domain_of_tiny_weight_gets_its_turn():
    weights = {"cars": 100.0, "food": 100.0, "sop": 1.0}  # 1 step in 201, 0.05 in an interval
    draws = train(make_sampler("fixed", num_steps=402, weights=weights))
    counts = Counter(draw.domain for draw in draws)
    assert counts["sop"] == 2 and abs(counts["cars"] - counts["food"]) <= 1


def test_dynamic_weights_follow_the_mean_losses_and_the_unseen_keep_theirs():
    dynamic = DynamicWeights(3)
    for domain, losses in {0: [1.0], 1: [2.0, 3.0, 4.0]}.items():
        for loss in losses:
            dynamic.observe(domain, loss)
    dynamic.update()
    assert dynamic.weights.tolist() == [0.1875, 0.5625, 0.25]


def test_an_update_forgets_the_losses_before_it():
    dynamic = DynamicWeights(2)
    dynamic.observe(0, 100.0)
    dynamic.update()
    dynamic.observe(0, 1.0)
    dynamic.observe(1, 3.0)
    dynamic.update()
    assert dynamic.weights.tolist() == [0.25, 0.75]


@pytest.mark.parametrize("losses", [{}, {0: 0.0, 1: 0.0}])
def test_without_losses_the_weights_stay(losses):
    dynamic = DynamicWeights(2)
    dynamic.weights = np.array([0.3, 0.7])
    for domain, loss in losses.items():
        dynamic.observe(domain, loss)
    dynamic.update()
    assert dynamic.weights.tolist() == [0.3, 0.7]


def test_a_harder_domain_gets_more_steps_after_the_first_update():
    sampler = make_sampler("dynamic", num_steps=110, update_every=50)
    draws = train(sampler)
    means = {  # of the first interval, in plain loops
        name: np.mean([LOSSES[name] + 0.01 * step for step, draw in enumerate(draws[:50]) if draw.domain == name])
        for name in SIZES
    }
    counts = Counter(draw.domain for draw in draws[50:100])
    for name in SIZES:
        assert abs(counts[name] - 50 * means[name] / sum(means.values())) < 1
    assert counts["food"] > counts["sop"] > counts["cars"]


def test_no_image_comes_twice_within_an_epoch():
    draws = train(make_sampler("balanced", num_steps=120))
    for name, size in SIZES.items():
        rows = np.concatenate([draw.rows for draw in draws if draw.domain == name])
        assert len(rows) > 2 * size
        orders = [rows[start : start + size].tolist() for start in range(0, len(rows) - size + 1, size)]
        assert all(sorted(order) == list(range(size)) for order in orders)
        assert orders[0] != orders[1]


def test_positions_count_the_images_of_a_domain():
    draws = train(make_sampler("dynamic"))
    for name in SIZES:
        positions = np.concatenate([draw.positions for draw in draws if draw.domain == name])
        assert positions.tolist() == list(range(len(positions)))


@every_strategy
def test_draws_depend_on_the_seed_and_not_on_how_often_anything_is_read(strategy):
    draws = as_lists(train(make_sampler(strategy)))
    assert as_lists(train(make_sampler(strategy), log_every=1)) == draws
    assert as_lists(train(make_sampler(strategy), log_every=7)) == draws
    assert as_lists(train(make_sampler(strategy, seed=6))) != draws


def test_the_order_of_domains_changes_with_seed_and_interval():
    first, second = (
        [draw.domain for draw in train(make_sampler("balanced", num_steps=60, update_every=30, seed=seed))]
        for seed in (1, 2)
    )
    assert first[:30] != first[30:] and first != second
    assert Counter(first[:30]) == Counter(first[30:]) == Counter(second[:30])


@every_strategy
def test_iterating_changes_nothing(strategy):
    sampler = make_sampler(strategy)
    train(sampler, num_steps=13)
    state = json.dumps(sampler.state_dict())
    ahead = as_lists(sampler)
    assert as_lists(sampler) == ahead and len(sampler) == len(ahead) == 7
    assert json.dumps(sampler.state_dict()) == state


def test_an_iterator_that_is_still_held_is_not_moved_by_training():
    sampler, untouched = make_sampler("balanced"), make_sampler("balanced")
    held = iter(sampler)
    draws = [next(held)]
    for _ in range(10):
        sampler.advance()  # the interval ends and the next one is planned
    assert as_lists(draws + list(held)) == as_lists(untouched)


@every_strategy
def test_slices_of_all_ranks_make_up_the_batch_of_one_process(strategy):
    whole = train(make_sampler(strategy))
    ranks = [train(make_sampler(strategy, rank=rank, world_size=2)) for rank in range(2)]
    for one, *parts in zip(whole, *ranks, strict=True):
        assert np.concatenate([part.rows for part in parts]).tolist() == one.rows.tolist()
        assert np.concatenate([part.positions for part in parts]).tolist() == one.positions.tolist()


@every_strategy
def test_every_rank_sees_the_same_domain(strategy):
    ranks = [train(make_sampler(strategy, rank=rank, world_size=4)) for rank in range(4)]
    for draws in zip(*ranks, strict=True):
        assert len({draw.domain for draw in draws}) == 1


@every_strategy
@pytest.mark.parametrize("at", [0, 4, 10, 23, 46, 47])
def test_a_restored_sampler_goes_on_as_the_one_that_was_not_stopped(strategy, at):
    whole, stopped, again = (make_sampler(strategy) for _ in range(3))
    draws = train(whole)
    if at:
        train(stopped, num_steps=at)
    again.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert again.step == at and again.weights == stopped.weights
    assert again.steps_by_domain == stopped.steps_by_domain
    assert as_lists(train(again)) == as_lists(draws[at:])
    assert again.weights == whole.weights and again.steps_by_domain == whole.steps_by_domain


def test_the_last_step_of_an_interval_is_known_before_it_is_counted():
    sampler = make_sampler("dynamic", num_steps=23)
    ends = []
    for step in range(23):
        if sampler.ends_interval:
            ends.append(step)
        assert sampler.advance() == (step in (9, 19))  # nothing is planned after the run's last step
    assert ends == [9, 19, 22]


@every_strategy
@pytest.mark.parametrize("first", [7, 10, 13, 20, 40])
def test_a_finished_run_that_is_extended_draws_as_if_it_had_been_longer_from_the_start(strategy, first):
    short, extended, whole = (make_sampler(strategy, num_steps=steps) for steps in (first, 47, 47))
    draws = train(short)
    extended.load_state_dict(json.loads(json.dumps(short.state_dict())))
    assert as_lists(draws + train(extended)) == as_lists(train(whole))
    assert extended.weights == whole.weights and extended.steps_by_domain == whole.steps_by_domain


@pytest.mark.parametrize("batch_size", [26, 30, 64])
def test_a_domain_smaller_than_a_batch_is_drawn_over_the_end_of_its_epoch(batch_size):
    draws = train(make_sampler("round_robin", sizes={"cars": 40, "sop": 25}, batch_size=batch_size, num_steps=40))
    rows = np.concatenate([draw.rows for draw in draws if draw.domain == "sop"])
    assert all(len(draw.rows) == batch_size for draw in draws)
    epochs = [sorted(rows[start : start + 25].tolist()) for start in range(0, len(rows) - 24, 25)]
    assert len(epochs) > 10 and all(epoch == list(range(25)) for epoch in epochs)


def test_every_rank_takes_its_part_of_a_batch_that_is_larger_than_its_domain():
    ranks = [make_sampler(batch_size=60, rank=rank, world_size=2) for rank in (0, 1)]
    whole = make_sampler(batch_size=60)
    for draw, *parts in zip(whole, *ranks, strict=True):
        assert np.concatenate([part.rows for part in parts]).tolist() == draw.rows.tolist()


def test_a_batch_that_cannot_be_shared_equally_is_refused():
    with pytest.raises(ValueError, match=r"multiple of the number of processes. Got 8 with 3\."):
        make_sampler(world_size=3)


@pytest.mark.parametrize(("strategy", "weights"), [("fixed", None), ("balanced", WEIGHTS)])
def test_weights_belong_to_the_fixed_strategy(strategy, weights):
    with pytest.raises(ValueError, match=rf"given for strategy 'fixed' and for no other. Got .* with '{strategy}'"):
        make_sampler(strategy, weights=weights)


@pytest.mark.parametrize("weights", [{"cars": 1, "food": 1}, WEIGHTS | {"met": 1}, WEIGHTS | {"sop": 0}])
def test_every_domain_needs_a_positive_weight(weights):
    with pytest.raises(ValueError, match=r"positive weight to each of cars, food, sop. Got"):
        make_sampler("fixed", weights=weights)
