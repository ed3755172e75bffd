"""AdamW over two groups, its schedule as a function of the step, and the heads of domains that sit out."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from modeling_udon.training.config import OptimConfig
from modeling_udon.training.distillation import UdonForDistillation


def learning_rates(optim: OptimConfig, step: int, num_steps: int) -> dict[str, float]:
    """Learning rate of each parameter group in a step.

    Args:
        optim: The schedule.
        step: Number of the step, from 0.
        num_steps: Steps of the whole run.
    """
    factor = 1.0
    if step < optim.warmup_steps:
        factor = (step + 1) / optim.warmup_steps
    elif optim.schedule == "cosine":
        progress = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    frozen = step < frozen_steps(optim, num_steps)
    return {"backbone": 0.0 if frozen else factor * optim.backbone_lr, "heads": factor * optim.lr}


def frozen_steps(optim: OptimConfig, num_steps: int) -> int:
    """Number of first steps in which the backbone's learning rate is 0."""
    return round(optim.frozen_fraction * num_steps)


def make_optimizer(model: UdonForDistillation, optim: OptimConfig) -> torch.optim.AdamW:
    """Makes AdamW with the groups `backbone` and `heads` (heads and prototypes)."""
    backbone: list[nn.Parameter] = []
    heads: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (backbone if name.startswith("udon.backbone.") else heads).append(parameter)
    groups = [
        {"params": backbone, "name": "backbone", "lr": optim.backbone_lr},
        {"params": heads, "name": "heads", "lr": optim.lr},
    ]
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Gives each parameter group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]]


class IdleHeads:
    """Heads and prototypes of domains that are not in the batch.

    The original gives them a gradient of zero, so that AdamW's momentum carries them on while its second moment
    decays. Done at every step for every domain, that would cost more with each domain; here a head is caught up at
    once when its domain comes next, or for reading. What the steps in between add up to is exact up to AdamW's
    `eps`, which enters as its mean over those steps.

    Args:
        model: The training model.
        optimizer: Its AdamW; a head without state there has not been trained yet: it has no momentum, only decay.
        optim: The schedule and AdamW's values; with `idle_heads: hold` nothing moves and nothing is caught up.
        num_steps: Steps of the whole run.
    """

    def __init__(
        self, model: UdonForDistillation, optimizer: torch.optim.Optimizer, optim: OptimConfig, num_steps: int
    ) -> None:
        self._parameters = {name: list(model.domain_parameters(name).values()) for name in model.num_classes}
        self._optimizer = optimizer
        self._optim = optim
        self._num_steps = num_steps
        # AdamW keeps its step counts on the device; asking there would stop the device at every step.
        self._steps_done = {name: self._count_steps(parameters) for name, parameters in self._parameters.items()}

    @torch.no_grad()
    def catch_up(self, domain: str, step: int) -> None:
        """Brings the head of the domain that is trained in `step` (counted from 0), with its moments, up to it."""
        if self._optim.idle_heads == "hold":
            return
        for parameter in self._parameters[domain]:
            state = self._optimizer.state[parameter]
            if not state:
                # As if AdamW had seen gradients of zero from the start: its bias correction counts those steps.
                state.update(_empty_state(parameter))
            self._coast(parameter, state, self._steps_done[domain], step)
        self._steps_done[domain] = step + 1

    @contextmanager
    def caught_up_for_reading(self, step: int) -> Iterator[None]:
        """Shows all heads as they are before `step`, and puts back what training goes on from.

        Reading changes nothing, so a run does not depend on how often it is evaluated.
        """
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for domain, done in self._steps_done.items():
            for parameter in self._parameters[domain]:
                if self._optim.idle_heads == "coast" and done < step:
                    state = self._optimizer.state.get(parameter) or _empty_state(parameter)
                    kept.append((parameter.data, parameter.detach().clone()))
                    with torch.no_grad():
                        self._coast(parameter, {name: value.clone() for name, value in state.items()}, done, step)
        try:
            yield
        finally:
            for data, before in kept:
                data.copy_(before)

    def _count_steps(self, parameters: list[nn.Parameter]) -> int:
        state = self._optimizer.state.get(parameters[0]) if parameters else None
        return int(state["step"]) if state else 0

    def _coast(self, parameter: torch.Tensor, state: dict[str, torch.Tensor], done: int, step: int) -> None:
        """Applies to one parameter the AdamW steps without gradient from `done` to before `step`."""
        if done >= step:
            return
        beta1, beta2 = self._optim.betas
        decay, scale, scale_by_root = 1.0, 0.0, 0.0
        for missed in range(done, step):
            rate = learning_rates(self._optim, missed, self._num_steps)["heads"]
            count, idle = missed + 1, missed + 1 - done
            moment = rate * beta1**idle / (1 - beta1**count)
            root = math.sqrt(beta2**idle / (1 - beta2**count))
            # Weight decay comes first in each step, so it shrinks what earlier steps moved.
            shrink = 1 - rate * self._optim.weight_decay
            decay *= shrink
            scale = scale * shrink + moment
            scale_by_root = scale_by_root * shrink + (moment / root if root > 0 else 0.0)
        if scale > 0 and done > 0:
            denominator = state["exp_avg_sq"].sqrt().mul_(scale / scale_by_root).add_(self._optim.eps)
            parameter.mul_(decay).addcdiv_(state["exp_avg"], denominator, value=-scale)
        else:
            parameter.mul_(decay)
        state["exp_avg"].mul_(beta1 ** (step - done))
        state["exp_avg_sq"].mul_(beta2 ** (step - done))
        state["step"].fill_(float(step))


def _empty_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
