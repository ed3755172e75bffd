"""Weights by what a domain can still learn beside plain loops, and draws within a domain by its classes."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from modeling_udon.data.class_draws import ClassDraws
from modeling_udon.data.learnable import (
    MOST_POINTS,
    ExcessLoss,
    LearningProgress,
    LossOverLogClasses,
    ValidationGain,
    expected_fall,
)

LOSSES = {0: [1.0, 2.0], 1: [4.0], 2: [3.0, 3.0, 6.0]}


def observe(weights, losses):
    for domain, values in losses.items():
        for value in values:
            weights.observe(domain, value)


def mixed(worth, share):
    return [(1 - share) * value / sum(worth) + share / len(worth) for value in worth]


def test_a_loss_counts_by_that_of_a_guess_among_the_classes():
    weights = LossOverLogClasses([10, 1000, 4], 0.25)
    observe(weights, LOSSES)
    weights.update()
    expected = mixed([1.5 / math.log(10), 4 / math.log(1000), 4 / math.log(4)], 0.25)
    assert weights.weights.tolist() == pytest.approx(expected)
    assert weights.last_means.tolist() == [1.5, 4, 4]


def test_what_lies_below_the_reference_has_no_more_to_learn():
    weights = ExcessLoss([1.0, 1.0, 5.0], 0.25)
    observe(weights, LOSSES)
    weights.update()
    assert weights.weights.tolist() == pytest.approx(mixed([0.5, 3.0, 0.0], 0.25))
    before = weights.weights.copy()
    observe(weights, {0: [0.5], 1: [0.5], 2: [0.5]})
    weights.update()
    assert weights.weights.tolist() == before.tolist()


@pytest.mark.parametrize(("eps", "beta", "alpha"), [(0.0, 3.0, 0.3), (1.0, 5.0, 0.5), (2.0, 50.0, 1.0)])
def test_the_fall_of_a_power_law_is_foreseen(eps, beta, alpha):
    batches = np.array([50.0, 150, 250, 350, 450])
    losses = eps + beta * batches**-alpha
    expected = beta * 500**-alpha - beta * 600**-alpha
    assert expected_fall(batches, losses, 500, 100) == pytest.approx(expected, rel=0.05)


def test_a_loss_that_rises_or_stays_has_nothing_to_gain():
    assert expected_fall(np.array([1.0, 2, 3]), np.array([1.0, 2, 3]), 3, 2) == 0
    assert expected_fall(np.array([1.0, 2, 3]), np.array([2.0, 2, 2]), 3, 2) == pytest.approx(0, abs=1e-9)


def test_progress_moves_weights_once_every_domain_has_a_curve():
    weights = LearningProgress(2, 0.0)
    for interval in range(4):
        n = 10 * interval + 5.5
        for domain, alpha in enumerate((0.5, 0.1)):
            observe(weights, {domain: [3 * n**-alpha] * 10})
        weights.update()
        if interval < 2:
            assert weights.weights.tolist() == [0.5, 0.5]
    curve = np.array([10 * interval + 5.5 for interval in range(4)])
    falls = [expected_fall(curve, 3 * curve**-alpha, 40, 10) for alpha in (0.5, 0.1)]
    assert weights.weights.tolist() == pytest.approx([fall / sum(falls) for fall in falls])
    assert weights.weights[0] > 0.5


def test_a_curve_stays_a_few_numbers():
    weights = LearningProgress(1, 0.2)
    for interval in range(300):
        observe(weights, {0: [1 / (interval + 1)] * 3})
        weights.update()
    (curve,) = weights.state_dict()["curves"]
    assert len(curve) <= MOST_POINTS
    assert [n for n, _ in curve] == sorted(n for n, _ in curve) and curve[-1][0] == 899


def test_a_gain_of_the_score_moves_the_log_weight_by_its_size_over_its_steps():
    weights = ValidationGain(2, 0.1)
    for domain in (0, 1):
        weights.observe_score(domain, 0.5)
    observe(weights, {0: [1.0] * 3, 1: [1.0]})
    weights.update()
    assert weights.weights.tolist() == [0.5, 0.5]
    weights.observe_score(0, 0.56)
    weights.observe_score(1, 0.51)
    observe(weights, {0: [1.0] * 3, 1: [1.0]})
    weights.update()
    gains = [0.06 / 1.5, 0.01 / 0.5]
    worth = [math.exp(gain / max(gains)) for gain in gains]
    assert weights.weights.tolist() == pytest.approx(mixed(worth, 0.1))


@pytest.mark.parametrize("kind", [LearningProgress, ValidationGain])
def test_the_state_survives_json_exactly(kind):
    def train(weights, first, last):
        for step in range(first, last):
            observe(weights, {step % 3: [1 / (step + 1)], (step + 1) % 3: [0.3]})
            weights.observe_score(step % 3, math.sin(step))
            if step % 5 == 4:
                weights.update()
        return weights

    whole, part, again = kind(3, 0.2), kind(3, 0.2), kind(3, 0.2)
    train(whole, 0, 40)
    again.load_state_dict(json.loads(json.dumps(train(part, 0, 17).state_dict())))
    train(again, 17, 40)
    assert again.weights.tolist() == whole.weights.tolist()
    assert again.state_dict() == whole.state_dict()


LABELS = np.array([0, 1, 1, 1, 1, 2, 0, 2, 2, 3])


@pytest.mark.parametrize("images", [1, 2, 3])
def test_every_class_comes_as_often_with_its_images_side_by_side(images):
    rows = ClassDraws(LABELS, images, (0, 1)).rows(np.arange(4 * images * 30))
    labels = LABELS[rows].reshape(30, 4, images)
    assert (labels == labels[:, :, :1]).all()
    assert all(sorted(turn) == [0, 1, 2, 3] for turn in labels[:, :, 0].tolist())
    assert len({tuple(turn) for turn in labels[:, :, 0].tolist()}) > 5
    for label in range(4):
        given = rows[LABELS[rows] == label].tolist()
        size = int((label == LABELS).sum())
        # None comes again before all others of the class did.
        for start in range(0, len(given) - size + 1, size):
            assert len(set(given[start : start + size])) == size
        counts = Counter(given)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_depends_on_key_and_position_alone():
    draws = ClassDraws(LABELS, 2, (7, 0))
    whole = draws.rows(np.arange(64))
    assert np.array_equal(draws.rows(np.arange(40, 64)), whole[40:])
    assert not np.array_equal(ClassDraws(LABELS, 2, (8, 0)).rows(np.arange(64)), whole)
    assert not np.array_equal(ClassDraws(LABELS, 2, (7, 1)).rows(np.arange(64)), whole)
