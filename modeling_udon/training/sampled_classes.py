"""Partial FC: a step classifies its batch among its own classes and a random sample of the others of its domain.

Method: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs by Partial
FC", CVPR 2022 (arXiv 2203.15565).
"""

import math

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


class SampledClasses:
    """Cuts the prototypes of a step's domain down to the sampled classes, and puts them back.

    In between the parameters ARE the sampled rows, with those rows of AdamW's moments: cosines, gradients, the exchange
    between processes and the optimiser's step touch nothing else. For the other rows it is a step without gradient, so
    that they follow the rule of idle heads: with `coast` momentum carries them on, which costs a pass over the domain's
    prototypes; with `hold` they stay as they are.

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
        self._rows = torch.empty(0, dtype=torch.int64)
        self._whole: list[tuple[nn.Parameter, torch.Tensor, dict[str, torch.Tensor]]] = []

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
            The sampled classes, ascending, of shape `(num_sampled,)`; `None` for all classes.
        """
        if self._wanted is None:
            return None
        # The classes are drawn on the host, where labels come from.
        everyones = labels if self._model.peers is None else self._model.peers.gather_on_host(labels)
        number = self._model.num_classes[domain]
        classes = draw_classes(everyones.numpy(), number, self._wanted, self._seed, step)
        rows = self._rows = torch.from_numpy(classes).to(device or labels.device)
        for parameter in self._prototypes(domain):
            state = self._idle_heads.state_of(parameter)
            self._whole.append((parameter, parameter.data, dict(state)))
            parameter.data = parameter.data[rows]
            state |= {name: value[rows] for name, value in state.items() if name != "step"}
        return rows

    def put_back(self, step: int, applied: torch.Tensor | None = None) -> None:
        """Brings the rows back to their places after the optimiser's step.

        Args:
            step: Number of the step.
            applied: Whether the step was applied, a scalar on the device; the other rows stay where it was not. `None`
                where it was.
        """
        for parameter, data, whole in self._whole:
            state = self._optimizer.state[parameter]
            self._idle_heads.coast_once(data, whole | {"step": state["step"].clone()}, step, applied)
            data[self._rows] = parameter.data
            for name in whole.keys() - {"step"}:
                whole[name][self._rows] = state[name]
                state[name] = whole[name]
            parameter.data = data
        self._whole.clear()

    def _prototypes(self, domain: str) -> list[nn.Parameter]:
        both = self._model.student_prototypes, self._model.teacher_prototypes
        return [prototypes[domain] for prototypes in both if domain in prototypes]
