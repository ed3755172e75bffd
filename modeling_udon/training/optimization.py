"""AdamW over two groups, its schedule as a function of the step, and the heads of domains that sit out."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_udon.config import OptimConfig
from modeling_udon.training.distillation import UdonForDistillation

# `encoder.layer.3.`, or in a stage `encoder.stages.1.layers.0.` or `encoder.block.1.0.`.
_BLOCK = re.compile(r"(?:[A-Za-z_]\w*\.)*?(?!patch_embed)[A-Za-z_]\w*\.\d+\.(?:(?:(?:layers|blocks)\.)?\d+\.)?")

# How the parameter groups of online teachers begin.
_TEACHER = "teacher_"


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
    rates = {"backbone": 0.0 if frozen else factor * optim.backbone_lr, "heads": factor * optim.lr}
    if optim.student_share is None:
        return rates
    # A factor on the loss would do nothing: AdamW divides by the size of the gradient.
    first, last = optim.student_share
    share = first * (last / first) ** (step / num_steps)
    teachers = {f"{_TEACHER}{name}": (1 - share) * rate for name, rate in rates.items()}
    return {name: share * rate for name, rate in rates.items()} | teachers


def frozen_steps(optim: OptimConfig, num_steps: int) -> int:
    """Number of first steps in which the backbone's learning rate is 0."""
    return round(optim.frozen_fraction * num_steps)


def make_optimizer(model: UdonForDistillation, optim: OptimConfig) -> torch.optim.AdamW:
    """Makes AdamW with the groups `backbone`, unless it is frozen for good, and `heads` (heads and prototypes).

    With a layer decay each block of the backbone is a group of its own, whose learning rate is that of `backbone` times
    the group's `scale`. Online teachers have groups of their own, `teacher_backbone` and `teacher_heads`, where their
    learning rates differ.
    """
    named = dict(model.named_parameters())
    of_teachers = {name: value for name, value in named.items() if name.startswith("teachers.")}
    groups = _groups({name: value for name, value in named.items() if name not in of_teachers}, optim, "")
    groups += _groups(of_teachers, optim, "" if optim.student_share is None else _TEACHER)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def _groups(named: Mapping[str, nn.Parameter], optim: OptimConfig, prefix: str) -> list[dict[str, Any]]:
    """Groups of the parameters of one learner; a backbone is what is called so in a `UdonModel`, `udon.backbone`."""
    heads: list[nn.Parameter] = []
    backbones: dict[str, list[str]] = {}
    for name, parameter in named.items():
        owner, is_backbone, _ = name.partition("udon.backbone.")
        if is_backbone:
            backbones.setdefault(owner + is_backbone, []).append(name)
        elif parameter.requires_grad:
            heads.append(parameter)
    by_scale: dict[float, list[nn.Parameter]] = {}
    for start, names in backbones.items():
        depths = block_depths([name.removeprefix(start) for name in names])
        for name in names:
            if named[name].requires_grad:
                scale = (optim.layer_decay or 1.0) ** (max(depths.values()) - depths[name.removeprefix(start)])
                by_scale.setdefault(scale, []).append(named[name])
    groups: list[dict[str, Any]] = [
        {"params": parameters, "name": f"{prefix}backbone", "lr": scale * optim.backbone_lr, "scale": scale}
        for scale, parameters in by_scale.items()
    ]
    for in_shards in (False, True):
        # Apart, since one call of the fused optimiser takes whole tensors or shards.
        own_kind = [parameter for parameter in heads if isinstance(parameter, DTensor) == in_shards]
        groups.append({"params": own_kind, "name": f"{prefix}heads", "lr": optim.lr, "scale": 1.0})
    return groups


def block_depths(names: Sequence[str]) -> dict[str, int]:
    """Returns the depth of each parameter of a backbone by its place among the blocks, in the order of registration.

    What comes before the first block has depth 0, the blocks 1, 2 and so on, and what comes after the last one the next
    (arXiv 2106.08254, appendix). A block is an element of a list of modules, or of such a list in a stage.

    Args:
        names: Names of all parameters.
    """
    blocks: dict[str, int] = {}
    depths: dict[str, int | None] = {}
    for name in names:
        found = _BLOCK.match(name)
        if found is None:
            depths[name] = 0 if not blocks else None
        else:
            depths[name] = blocks.setdefault(found[0], len(blocks) + 1)
    return {name: len(blocks) + 1 if depth is None else depth for name, depth in depths.items()}


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Mapping[str, float]) -> None:
    """Gives each parameter group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["name"]] * group["scale"]


def with_gradients(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Returns the parameters that have a gradient, without a walk through the modules of every domain."""
    groups = (group["params"] for group in optimizer.param_groups)
    return [parameter for group in groups for parameter in group if parameter.grad is not None]


def average_gradients(parameters: Iterable[nn.Parameter], num_processes: int, number: torch.Tensor) -> torch.Tensor:
    """Averages over processes the gradients that nobody else averages, in one message, in place.

    Args:
        parameters: Above all those of the active domain.
        num_processes: Number of processes.
        number: A scalar that goes along.

    Returns:
        The sum of the processes' numbers.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in (*gradients, number)])
    torch.distributed.all_reduce(flat)
    *means, total = flat.split([gradient.numel() for gradient in (*gradients, number)])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient) / num_processes)
    return total.reshape(())


class IdleHeads:
    """Heads and prototypes of domains that are not in the batch.

    The original gives them a gradient of zero, so that AdamW's momentum carries them on while its second moment
    decays. Done at every step for every domain, that would cost more with each domain; here a head is caught up at
    once when its domain comes next, or for reading. What the steps in between add up to is exact up to AdamW's
    `eps`, which enters as its mean over those steps.

    Args:
        model: The training model.
        optimizer: Its AdamW; a head without state there has not been trained yet: it has no momentum, only decay.
        optim: The schedule and AdamW's values.
        num_steps: Steps of the whole run.
        steps_done: Step up to which each head is, where a run goes on.
        hold: Leaves idle heads as they are: nothing moves and nothing is caught up.
    """

    def __init__(
        self,
        model: UdonForDistillation,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        num_steps: int,
        steps_done: Mapping[str, int] | None = None,
        hold: bool = False,
    ) -> None:
        self._parameters = {name: list(model.domain_parameters(name).values()) for name in model.num_classes}
        self._optimizer = optimizer
        self._optim = optim
        self._hold = hold
        steps = range(0 if hold else num_steps)
        self._head_rates = np.fromiter((learning_rates(optim, step, num_steps)["heads"] for step in steps), np.float64)
        # AdamW's own counts leave out steps that were not applied, and asking for them would stop the device.
        self._steps_done = dict(steps_done) if steps_done else dict.fromkeys(self._parameters, 0)

    @property
    def steps_done(self) -> dict[str, int]:
        """Step up to which the head of each domain is, which a checkpoint keeps."""
        return dict(self._steps_done)

    @torch.no_grad()
    def catch_up(self, domain: str, step: int) -> None:
        """Brings the head of the domain that is trained in `step` (counted from 0), with its moments, up to it."""
        if self._hold:
            return
        parameters = self._parameters[domain]
        # Without state: as if AdamW had seen gradients of zero from the start, and its bias correction counts them.
        states = [self.state_of(parameter) for parameter in parameters]
        self._coast(parameters, states, self._steps_done[domain], step)
        self._steps_done[domain] = step + 1

    def state_of(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns a parameter's state in the optimiser, made of zeros if there was none."""
        state: dict[str, torch.Tensor] = self._optimizer.state[parameter]
        if not state:
            state.update(_empty_state(parameter))
        return state

    @torch.no_grad()
    def coast_once(
        self, values: torch.Tensor, state: dict[str, torch.Tensor], step: int, applied: torch.Tensor | None = None
    ) -> None:
        """Moves weights through one step without gradient, if idle heads coast.

        Args:
            values: Weights of any shape.
            state: Their moments, as they were before the step.
            step: Number of the step, from 0.
            applied: Whether the step was applied, a scalar on the device; nothing moves where it was not.
        """
        if not self._hold:
            self._coast([values], [state], step, step + 1, applied)

    @contextmanager
    def caught_up_for_reading(self, step: int) -> Iterator[None]:
        """Shows all heads as they are before `step`, and puts back what training goes on from.

        Reading changes nothing, so a run does not depend on how often it is evaluated.
        """
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for domain, done in self._steps_done.items():
            if not self._hold and done < step:
                parameters = self._parameters[domain]
                kept += [(parameter.data, parameter.detach().clone()) for parameter in parameters]
                states = [self._optimizer.state.get(parameter) or _empty_state(parameter) for parameter in parameters]
                copies = [{name: value.clone() for name, value in state.items()} for state in states]
                with torch.no_grad():
                    self._coast(parameters, copies, done, step)
        try:
            yield
        finally:
            for data, before in kept:
                data.copy_(before)

    def _idle_steps(self, done: int, step: int) -> tuple[float, float, float]:
        """What the AdamW steps without gradient from `done` to before `step` add up to, for every parameter of a head.

        Returns:
            The factor of weight decay; the factor of the first moment, all learning rates in it; and the same with
            each step's over the root of what is left of the second moment.
        """
        beta1, beta2 = self._optim.betas
        rates = self._head_rates[done:step]
        idle = np.arange(1, step - done + 1)
        count = done + idle
        shrinks = 1 - rates * self._optim.weight_decay
        # Weight decay comes first in each step, so it shrinks what earlier steps moved.
        later = np.append(np.cumprod(shrinks[:0:-1])[::-1], 1.0)
        moments = later * rates * beta1**idle / (1 - beta1**count)
        roots = np.sqrt(beta2**idle / (1 - beta2**count))
        by_root = np.divide(moments, roots, out=np.zeros_like(moments), where=roots > 0)
        return float(shrinks.prod()), float(moments.sum()), float(by_root.sum())

    def _coast(
        self,
        parameters: Sequence[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        done: int,
        step: int,
        applied: torch.Tensor | None = None,
    ) -> None:
        """Applies to the parameters of a head the AdamW steps without gradient from `done` to before `step`.

        Where `applied` is false, which the device alone knows, every factor becomes one that changes nothing.
        """

        def factor(value: float, neutral: float = 1.0) -> float | torch.Tensor:
            return value if applied is None else torch.where(applied, value, neutral)

        if done >= step:
            return
        beta1, beta2 = self._optim.betas
        decay, scale, scale_by_root = self._idle_steps(done, step)
        for parameter, state in zip(parameters, states, strict=True):
            parameter.mul_(factor(decay))
            if scale > 0 and done > 0:
                denominator = state["exp_avg_sq"].sqrt().mul_(scale / scale_by_root).add_(self._optim.eps)
                if applied is None:
                    parameter.addcdiv_(state["exp_avg"], denominator, value=-scale)
                else:
                    parameter.sub_(denominator.reciprocal_().mul_(state["exp_avg"]).mul_(factor(scale, 0.0)))
            state["exp_avg"].mul_(factor(beta1 ** (step - done)))
            state["exp_avg_sq"].mul_(factor(beta2 ** (step - done)))
            state["step"].fill_(float(step))


def _empty_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }
