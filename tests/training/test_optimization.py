"""The schedule, the groups, and heads that sit out beside AdamW with gradients of zero."""

import math

import pytest
import torch

from modeling_udon.config import OptimConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.optimization import (
    IdleHeads,
    frozen_steps,
    learning_rates,
    make_optimizer,
    set_learning_rates,
)

BACKBONE = {
    "model_type": "vit",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 8,
}
DOMAINS = {f"d{number}": 3 + number for number in range(5)}


def make_model():
    torch.manual_seed(0)
    return UdonForDistillation(UdonConfig(BACKBONE, embedding_dim=4, teacher_dim=6, domains=DOMAINS))


def test_the_backbone_waits_its_share_of_the_run_and_the_heads_do_not():
    optim = OptimConfig(lr=1e-3, backbone_lr=1e-5, frozen_fraction=0.2)
    rates = [learning_rates(optim, step, num_steps=10) for step in range(10)]
    assert [rate["heads"] for rate in rates] == [1e-3] * 10
    assert [rate["backbone"] for rate in rates] == [0, 0] + [1e-5] * 8
    assert frozen_steps(optim, 10) == 2


def test_the_warm_up_rises_by_equal_steps_to_the_full_rate():
    optim = OptimConfig(lr=4e-3, backbone_lr=4e-5, frozen_fraction=0, warmup_steps=4)
    rates = [learning_rates(optim, step, num_steps=10) for step in range(6)]
    assert [rate["heads"] for rate in rates] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3, 4e-3])
    assert [rate["backbone"] for rate in rates] == pytest.approx([1e-5, 2e-5, 3e-5, 4e-5, 4e-5, 4e-5])


def test_cosine_falls_from_the_full_rate_after_the_warm_up_to_zero():
    optim = OptimConfig(lr=1e-2, frozen_fraction=0, schedule="cosine", warmup_steps=2)
    rates = [learning_rates(optim, step, num_steps=10)["heads"] for step in range(11)]
    assert rates[1] == rates[2] == pytest.approx(1e-2)
    assert rates[6] == pytest.approx(0.5e-2)
    assert rates[4] == pytest.approx(1e-2 * (0.5 + math.sqrt(2) / 4))
    assert rates[10] == 0
    assert sorted(rates[2:], reverse=True) == rates[2:]


def test_a_warm_up_as_long_as_the_run_is_no_division_by_zero():
    optim = OptimConfig(schedule="cosine", warmup_steps=3)
    assert learning_rates(optim, 3, num_steps=3)["heads"] == optim.lr


def test_every_parameter_is_in_one_of_two_groups():
    model = make_model()
    groups = {group["name"]: group["params"] for group in make_optimizer(model, OptimConfig()).param_groups}
    backbone = set(model.udon.backbone.parameters())
    assert set(groups["backbone"]) == backbone
    assert set(groups["heads"]) == set(model.parameters()) - backbone


def test_learning_rates_reach_their_groups():
    optimizer = make_optimizer(make_model(), OptimConfig())
    set_learning_rates(optimizer, {"heads": 3.0, "backbone": 2.0})
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"backbone": 2.0, "heads": 3.0}


class TwoWays:
    """The same gradients to AdamW that sees every head at every step, and to ours with idle heads."""

    def __init__(self, optim, num_steps, seed, hold=False):
        self.optim, self.num_steps = optim, num_steps
        self.dense, self.lazy = make_model(), make_model()
        self.dense_optimizer, self.lazy_optimizer = (make_optimizer(m, optim) for m in (self.dense, self.lazy))
        self.idle_heads = IdleHeads(self.lazy, self.lazy_optimizer, optim, num_steps, hold=hold)
        self.random = torch.Generator().manual_seed(seed)

    def take_step(self, step, domain):
        self.idle_heads.catch_up(domain, step)
        active = self.lazy.domain_parameters(domain)
        for name, parameter in self.dense.named_parameters():
            parameter.grad = torch.zeros_like(parameter)
            if name in active:
                # Gradients of very different sizes, as prototypes of rare and of frequent classes have them.
                size = 10 ** -(3 * torch.rand(len(parameter), generator=self.random))
                gradient = torch.randn(parameter.shape, generator=self.random)
                parameter.grad = gradient * size.reshape(-1, *[1] * (gradient.dim() - 1))
                active[name].grad = parameter.grad.clone()
        for optimizer in (self.dense_optimizer, self.lazy_optimizer):
            set_learning_rates(optimizer, learning_rates(self.optim, step, self.num_steps))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def largest_difference(self):
        pairs = zip(self.dense.named_parameters(), self.lazy.named_parameters(), strict=True)
        return max(
            (a - b).abs().max().item() for (name, a), (_, b) in pairs if not name.startswith(("udon.b", "udon.s"))
        )


SCHEDULES = {
    "constant": {},
    "warm-up": {"warmup_steps": 20},
    "cosine": {"schedule": "cosine", "warmup_steps": 5},
    "strong decay": {"weight_decay": 0.01, "schedule": "cosine"},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_heads_caught_up_are_those_that_had_a_gradient_of_zero_at_every_step(schedule):
    ways = TwoWays(OptimConfig(lr=1e-3, frozen_fraction=0.1, **SCHEDULES[schedule]), num_steps=120, seed=1)
    weights = torch.tensor([30.0, 10.0, 5.0, 1.0, 0.5])  # the last domains sit out for long
    for step in range(120):
        domain = int(torch.multinomial(weights, 1, generator=ways.random))
        ways.take_step(step, f"d{domain}")
        if step % 17 == 0 or step == 119:
            with ways.idle_heads.caught_up_for_reading(step + 1):
                assert ways.largest_difference() <= 1e-5, f"step {step}"


@pytest.mark.parametrize("first", [0, 3])
def test_moments_after_a_long_idle_time_are_those_of_dense_adamw(first):
    ways = TwoWays(OptimConfig(lr=1e-2, weight_decay=0.01), num_steps=400, seed=2)
    for step in range(400):
        ways.take_step(step, "d1" if step in (first, first + 1, 399) else "d0")
    lazy, dense = (m.domain_parameters("d1") for m in (ways.lazy, ways.dense))
    for name in lazy:
        torch.testing.assert_close(lazy[name], dense[name], atol=1e-5, rtol=0)
        ours, theirs = ways.lazy_optimizer.state[lazy[name]], ways.dense_optimizer.state[dense[name]]
        assert ours["step"] == theirs["step"] == 400
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(ours[moment], theirs[moment], atol=1e-9, rtol=1e-4)


def test_a_head_that_is_trained_at_every_step_is_plain_adamw():
    ways = TwoWays(OptimConfig(lr=1e-2), num_steps=20, seed=3)
    for step in range(20):
        ways.take_step(step, "d2")
    lazy, dense = (m.domain_parameters("d2") for m in (ways.lazy, ways.dense))
    assert all(torch.equal(lazy[name], dense[name]) for name in lazy)


def test_idle_heads_move_between_their_turns():
    ways = TwoWays(OptimConfig(lr=1e-2), num_steps=20, seed=4)
    ways.take_step(0, "d1")
    before = ways.lazy.teacher_prototypes["d1"].detach().clone()
    ways.take_step(1, "d0")
    with ways.idle_heads.caught_up_for_reading(2):
        assert (ways.lazy.teacher_prototypes["d1"] - before).abs().mean() > 1e-3


def test_reading_changes_nothing():
    optim = OptimConfig(lr=1e-2, weight_decay=0.01)
    read, unread = TwoWays(optim, num_steps=30, seed=5), TwoWays(optim, num_steps=30, seed=5)
    for step in range(30):
        domain = f"d{step % 3}"
        read.take_step(step, domain)
        unread.take_step(step, domain)
        before = {name: value.clone() for name, value in read.lazy.state_dict().items()}
        with read.idle_heads.caught_up_for_reading(step + 1):
            pass
        assert all(torch.equal(value, before[name]) for name, value in read.lazy.state_dict().items())
    pairs = zip(read.lazy.parameters(), unread.lazy.parameters(), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
        assert all(
            torch.equal(value, unread.lazy_optimizer.state[theirs][name])
            for name, value in read.lazy_optimizer.state.get(ours, {}).items()
        )


def test_what_was_shown_is_put_back_even_after_an_error():
    ways = TwoWays(OptimConfig(lr=1e-2), num_steps=20, seed=6)
    ways.take_step(0, "d1")
    ways.take_step(1, "d0")
    before = ways.lazy.teacher_prototypes["d1"].detach().clone()
    with pytest.raises(KeyError), ways.idle_heads.caught_up_for_reading(2):
        raise KeyError
    assert torch.equal(ways.lazy.teacher_prototypes["d1"], before)


def test_hold_leaves_idle_heads_where_they_are():
    ways = TwoWays(OptimConfig(lr=1e-2, weight_decay=0.1), num_steps=20, seed=7, hold=True)
    ways.take_step(0, "d1")
    before = {name: value.detach().clone() for name, value in ways.lazy.domain_parameters("d1").items()}
    for step in range(1, 10):
        ways.take_step(step, "d0")
    with ways.idle_heads.caught_up_for_reading(10):
        assert all(torch.equal(value, before[name]) for name, value in ways.lazy.domain_parameters("d1").items())
    ways.idle_heads.catch_up("d1", 10)
    assert all(torch.equal(value, before[name]) for name, value in ways.lazy.domain_parameters("d1").items())


def test_a_resumed_run_knows_how_far_each_head_is():
    optim = OptimConfig(lr=1e-2)
    ways, again = TwoWays(optim, num_steps=20, seed=8), TwoWays(optim, num_steps=20, seed=8)
    for step in range(9):
        for one in (ways, again):
            one.take_step(step, f"d{step % 2 if step < 5 else 0}")
    done = again.idle_heads.steps_done
    again.idle_heads = IdleHeads(again.lazy, again.lazy_optimizer, optim, num_steps=20, steps_done=done)
    for one in (ways, again):
        one.take_step(9, "d1")
    pairs = zip(ways.lazy.parameters(), again.lazy.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
