"""Centred features: the student's head learns as if the backbone's features had mean 0.

Features of a trained backbone share a large mean, along which a linear layer `W x + b` gets most of its gradient though
it tells no image from another. Here the layer is trained as `W (x - m) + c` with the mean `m` of features before
training, and kept as the same function in the form that everything else knows: `b = c - W m`. Only the steps differ, so
that a student is published, exported and resumed as any other.
"""

import torch
from torch import nn

from modeling_udon.modeling_udon import UdonHead
from modeling_udon.training.distillation import UdonForDistillation

# Images of each domain that the mean is of.
CENTRE_IMAGES = 256
_CENTRE = "feature_centre"


def add_centre(model: UdonForDistillation) -> None:
    """Makes room for the mean, which checkpoints then keep."""
    model.register_buffer(_CENTRE, torch.zeros(model.udon.feature_dim))


@torch.no_grad()
def set_centre(model: UdonForDistillation, centre: torch.Tensor, trained: bool) -> None:
    """Sets the mean, and moves a new head so that it maps the mean where it mapped 0.

    Args:
        model: The training model.
        centre: The mean, of shape `(feature_dim,)`.
        trained: Whether the head is that of a student that was trained before; then it keeps what it maps, and `c`
            alone is another.
    """
    layer = first_layer(model.udon.student_head)
    model.get_buffer(_CENTRE).copy_(centre)
    if not trained:
        layer.bias.sub_(layer.weight @ model.get_buffer(_CENTRE))


def first_layer(head: UdonHead) -> nn.Linear:
    """The linear layer of a head that reads the features."""
    layer = head.hidden[0] if len(head.hidden) else head.projection
    assert isinstance(layer, nn.Linear), "every head begins with one"
    return layer


class CentredStep:
    """One step of the optimiser on `W` and `c` in the place of `W` and `b`.

    Args:
        model: The training model, with its gradients.
    """

    @torch.no_grad()
    def __init__(self, model: UdonForDistillation) -> None:
        self._layer = first_layer(model.udon.student_head)
        self._centre = model.get_buffer(_CENTRE)
        weight, bias = self._layer.weight, self._layer.bias
        if weight.grad is not None and bias.grad is not None:
            # With b = c - W m: dL/dW at a fixed c is dL/dW - dL/db m', and dL/dc is dL/db.
            weight.grad.addr_(bias.grad, self._centre.to(weight.grad.dtype), alpha=-1)
        self._before = weight.detach().clone()

    @torch.no_grad()
    def finish(self) -> None:
        """Turns the bias that the optimiser moved as `c` back into `b`."""
        self._layer.bias.sub_((self._layer.weight - self._before) @ self._centre)
