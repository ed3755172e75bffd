"""Partial FC: a step classifies its batch among its own classes and a random sample of the others.

The others are those of its domain; with a joint classifier those of all other domains, beside all of its own domain.

Method: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
FC", CVPR 2022 (arXiv 2203.15565).
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.optimization import IdleHeads

# Keeps this generator apart from those of the sampler and of the augmentation.
_SAMPLE_OF_CLASSES = 7


def draw_classes(own: np.ndarray, num_classes: int, wanted: int | float, seed: int, step: int) -> np.ndarray:
    """Draws the classes of a step, which depend on its batch, the seed and the step alone.

    Args:
        own: Classes of the whole batch, in any order and number.
        num_classes: Classes of the domain.
        wanted: How many classes there should be: a number, or a share of `num_classes`. The batch's own are taken
            even if they are more.
        seed: Seed of the run.
        step: Number of the step.

    Returns:
        Classes of shape `(num_sampled,)`, int64, ascending.
    """
    own = np.unique(own)
    size = math.ceil(wanted * num_classes) if isinstance(wanted, float) else min(wanted, num_classes)
    if size <= len(own):
        return own
    generator = np.random.default_rng((seed, _SAMPLE_OF_CLASSES, step))
    others = np.sort(generator.choice(num_classes - len(own), size - len(own), replace=False, shuffle=False))
    # `others` counts the classes that are not the batch's: each is moved up by how many of those lie below it.
    others += np.searchsorted(own - np.arange(len(own)), others, side="right")
    return np.sort(np.concatenate([own, others]))


def draw_from_others(
    num_classes: Mapping[str, int], domain: str, wanted: int | float, seed: int, step: int
) -> dict[str, np.ndarray]:
    """Draws classes of the domains that a batch is not of, by the domain, the seed and the step alone.

    Args:
        num_classes: Classes of each domain.
        domain: Domain of the batch.
        wanted: How many classes of all other domains together there should be: a number, or a share.
        seed: Seed of the run.
        step: Number of the step.

    Returns:
        Classes of each other domain, int64, ascending; of some there may be none.
    """
    edges = np.cumsum([0, *num_classes.values()])
    names = list(num_classes)
    number = names.index(domain)
    others = sum(num_classes.values()) - num_classes[domain]
    size = math.ceil(wanted * others) if isinstance(wanted, float) else min(wanted, others)
    generator = np.random.default_rng((seed, _SAMPLE_OF_CLASSES, step))
    drawn = np.sort(generator.choice(others, size, replace=False, shuffle=False))
    # Counted without the domain's own, which lie in the midst of all.
    drawn[drawn >= edges[number]] += num_classes[domain]
    starts = np.searchsorted(drawn, edges)
    return {
        name: drawn[starts[place] : starts[place + 1]] - edges[place]
        for place, name in enumerate(names)
        if name != domain
    }


class SampledClasses:
    """Cuts the prototypes of a step down to the sampled classes, and puts them back.

    In between the parameters ARE the sampled rows, with those rows of AdamW's moments: cosines, gradients, the exchange
    between processes and the optimiser's step touch nothing else. For the other rows it is a step without gradient, so
    that they follow the rule of idle heads: with `coast` momentum carries them on, which costs a pass over all the
    prototypes that are cut; with `hold` they stay as they are.

    Args:
        model: The training model.
        optimizer: Its AdamW.
        idle_heads: Moves rows that coast.
        wanted: Number or share of classes; `None` changes nothing.
        seed: Seed of the run.
    """

    def __init__(
        self,
        model: UdonForDistillation,
        optimizer: torch.optim.Optimizer,
        idle_heads: IdleHeads,
        wanted: int | float | None,
        seed: int,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._idle_heads = idle_heads
        self._wanted = wanted
        self._seed = seed
        self._whole: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    def take(
        self, domain: str, labels: torch.Tensor, step: int, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """Takes the rows of a step.

        Args:
            domain: The step's domain, whose heads have been caught up.
            labels: This process's share of the batch's classes, of shape `(batch_size,)`, on the host.
            step: Number of the step.
            device: Where the model is; that of the labels if left out.

        Returns:
            The sampled classes of the domain, ascending, of shape `(num_sampled,)`; `None` for all of its classes.
        """
        if self._wanted is None:
            return None
        device = device or labels.device
        numbers = self._model.num_classes
        if self._model.objective.classifier == "joint":
            for name, of_other in draw_from_others(numbers, domain, self._wanted, self._seed, step).items():
                self._cut(self._model.student_prototypes[name], torch.from_numpy(of_other).to(device))
            return None
        # The classes are drawn on the host, where labels come from.
        everyones = labels if self._model.peers is None else self._model.peers.gather_on_host(labels)
        classes = draw_classes(everyones.numpy(), numbers[domain], self._wanted, self._seed, step)
        rows = torch.from_numpy(classes).to(device)
        for prototypes in (self._model.student_prototypes, self._model.teacher_prototypes):
            if domain in prototypes:
                self._cut(prototypes[domain], rows)
        return rows

    def put_back(self, step: int, applied: torch.Tensor | None = None) -> None:
        """Brings the rows back to their places after the optimiser's step.

        Args:
            step: Number of the step.
            applied: Whether the step was applied, a scalar on the device; the other rows stay where it was not. `None`
                where it was.
        """
        for parameter, rows, data, whole in self._whole:
            state = self._optimizer.state[parameter]
            self._idle_heads.coast_once(data, whole | {"step": state["step"].clone()}, step, applied)
            data.index_copy_(0, rows, parameter.data)
            for name in whole.keys() - {"step"}:
                state[name] = whole[name].index_copy_(0, rows, state[name])
            parameter.data = data
        self._whole.clear()

    def _cut(self, parameter: nn.Parameter, rows: torch.Tensor) -> None:
        state = self._idle_heads.state_of(parameter)
        self._whole.append((parameter, rows, parameter.data, dict(state)))
        parameter.data = parameter.data.index_select(0, rows)
        state |= {name: value.index_select(0, rows) for name, value in state.items() if name != "step"}
