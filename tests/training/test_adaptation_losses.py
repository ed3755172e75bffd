"""The terms for domains without labels, recomputed by plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

from modeling_udon.training.adaptation_losses import (
    MMD_BANDWIDTHS,
    affinity_of_batch,
    affinity_of_patches,
    aggregate,
    aggregate_distillation_loss,
    aggregate_share,
    cleaning_of_batch,
    cleaning_of_patches,
    confusion_share,
    domain_classification_loss,
    largest_share,
    mean_log_probabilities,
    mmd_loss,
    reverse_gradient,
    token_distance,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def test_the_mmd_is_the_mean_of_kernels_over_pairs() -> None:
    source, target = unit(4, 3), unit(4, 3, seed=1)

    def kernel(one: torch.Tensor, other: torch.Tensor) -> float:
        return sum(math.exp(-float((one - other).square().sum()) / bandwidth) for bandwidth in MMD_BANDWIDTHS)

    total = 0.0
    for i in range(4):
        for j in range(4):
            total += kernel(source[i], source[j]) + kernel(target[i], target[j]) - 2 * kernel(source[i], target[j])
    assert float(mmd_loss(source, target)) == pytest.approx(total / 16)
    assert float(mmd_loss(source, source)) == pytest.approx(0, abs=1e-12)


def test_blocks_of_the_mmd_add_up_to_the_whole() -> None:
    source, target = unit(6, 3).requires_grad_(), unit(6, 3, seed=1).requires_grad_()
    whole = mmd_loss(source, target)
    expected = torch.autograd.grad(whole, (source, target))
    parts = [
        mmd_loss(source[start : start + 2], target[start : start + 2], source.detach(), target.detach(), start)
        for start in (0, 2, 4)
    ]
    mean = torch.stack(parts).mean()
    torch.testing.assert_close(mean, whole)
    for one, other in zip(torch.autograd.grad(mean, (source, target)), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_reversed_gradient_is_the_plain_one_times_minus_the_factor() -> None:
    features = unit(5, 3).requires_grad_()
    weight = torch.randn(3, dtype=torch.float64)
    (plain,) = torch.autograd.grad((features @ weight).square().sum(), features)
    (turned,) = torch.autograd.grad((reverse_gradient(features, 0.3) @ weight).square().sum(), features)
    torch.testing.assert_close(turned, -0.3 * plain)
    assert torch.equal(reverse_gradient(features, 0.3), features)


def test_shares_rise_as_the_papers_say() -> None:
    assert confusion_share(0) == 0 and confusion_share(1) == pytest.approx(2 / (1 + math.exp(-10)) - 1)
    assert aggregate_share(0) == pytest.approx(math.exp(-5)) and aggregate_share(0.4) == 1 == aggregate_share(0.9)


def test_a_critic_is_to_say_one_for_the_source_and_zero_for_the_target() -> None:
    source, target = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    sigmoid = [1 / (1 + math.exp(-value)) for value in (2.0, -1.0, 0.5, -3.0)]
    expected = -(math.log(sigmoid[0]) + math.log(sigmoid[1])) / 4
    expected -= (math.log(1 - sigmoid[2]) + math.log(1 - sigmoid[3])) / 4
    assert float(domain_classification_loss(source, target)) == pytest.approx(expected)


def test_affinities_of_a_batch_are_the_highest_similarities_to_others() -> None:
    embeds = unit(6, 4)
    found = affinity_of_batch(embeds, 3)
    for row in range(6):
        others = sorted((float(embeds[row] @ embeds[other]) for other in range(6) if other != row), reverse=True)
        assert found[row].tolist() == pytest.approx(others[:3])


def test_affinities_of_patches_are_products_with_the_eight_around() -> None:
    maps = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    found = affinity_of_patches(maps)
    assert found.shape == (1, 8, 3, 4)
    places = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]
    for row in range(3):
        for column in range(4):
            for number, (down, right) in enumerate(places):
                other = maps[0, :, min(max(row + down, 0), 2), min(max(column + right, 0), 3)]
                assert float(found[0, number, row, column]) == pytest.approx(float(maps[0, :, row, column] @ other))


def test_cleaning_is_the_disagreement_of_neighbours() -> None:
    embeds, probabilities = unit(5, 3), torch.rand(5, 4, dtype=torch.float64).softmax(1)
    total = 0.0
    for row in range(5):
        near = sorted(
            (other for other in range(5) if other != row), key=lambda other: -float(embeds[row] @ embeds[other])
        )
        total += sum(1 - float(probabilities[row] @ probabilities[other]) for other in near[:2])
    assert float(cleaning_of_batch(probabilities, embeds, 2)) == pytest.approx(total / 10)
    sure = torch.zeros(2, 3, 4, 4)
    sure[:, 1] = 1
    assert float(cleaning_of_patches(sure)) == 0


def test_several_teachers_give_the_mean_of_their_probabilities() -> None:
    logits = [torch.randn(3, 4), torch.randn(3, 4)]
    expected = ((logits[0] / 2).softmax(1) + (logits[1] / 2).softmax(1)) / 2
    torch.testing.assert_close(mean_log_probabilities(logits, 2.0).exp(), expected)


def test_token_distance_looks_at_directions_and_leaves_the_targets_alone() -> None:
    tokens, targets = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6, requires_grad=True)
    assert float(token_distance(tokens.detach(), 3 * tokens + 1)) == pytest.approx(0, abs=1e-4)
    token_distance(tokens, targets).backward()
    assert targets.grad is None and tokens.grad is not None
    assert token_distance(tokens, torch.randn(2, 16, 6)).ndim == 0


def test_the_aggregate_is_followed_and_follows_nobody() -> None:
    logits, weights = torch.randn(3, 2, 4, requires_grad=True), torch.rand(3, 2).softmax(1).requires_grad_()
    aggregated = aggregate(logits, weights)
    for row in range(3):
        mixed = weights[row, 0] * logits[row, 0] + weights[row, 1] * logits[row, 1]
        torch.testing.assert_close(aggregated[row], mixed)
    loss, expected = aggregate_distillation_loss(logits, aggregated), 0.0
    for row in range(3):
        wanted = aggregated[row].detach().softmax(0)
        for branch in range(2):
            expected += float((wanted * (wanted.log() - logits[row, branch].detach().softmax(0).log())).sum())
    assert float(loss.detach()) == pytest.approx(expected / 3, rel=1e-5)
    loss.backward()
    assert weights.grad is None


def test_the_largest_share_is_one_where_all_are_taken_for_one_class() -> None:
    assert float(largest_share(torch.tensor([[2.0, 1.0], [3.0, 0.0]]))) == 1
    assert float(largest_share(torch.tensor([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0]]))) == pytest.approx(2 / 3)
