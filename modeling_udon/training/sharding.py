"""The backbone in shards (FSDP2): each process keeps its part of weights, gradients and moments; heads stay whole.

A shard is a `DTensor` of torch. What a checkpoint and the published student hold are whole tensors, so a run can go on
with another number of processes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from modeling_udon.modeling_udon import UdonModel


def shard_backbone(udon: UdonModel, device_type: str, num_processes: int) -> None:
    """Cuts the backbone's parameters over all processes, in place; an optimiser has to be made after it."""
    mesh = init_device_mesh(device_type, (num_processes,))
    blocks = set(udon.backbone._no_split_modules or ())
    # Shards are put away after each forward pass: else an evaluation would leave some whole, out of the optimiser's
    # sight.
    for module in [module for module in udon.backbone.modules() if type(module).__name__ in blocks]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(udon.backbone, mesh=mesh, reshard_after_forward=True)


def gather_shards(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Puts shards together; all processes have to call it.

    Args:
        tensors: Whole tensors, which stay as they are, and shards.
        keep: Whether this process wants the result; the others get nothing and hold one tensor at a time.
    """
    gathered = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = whole
    return gathered


def shard_like(whole: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cuts a tensor as another one is cut, if it is; all processes have to call it."""
    if not isinstance(other, DTensor):
        return whole
    return distribute_tensor(whole.to(other.device), other.device_mesh, other.placements)


def load_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Loads whole weights into a model that may be in shards; all processes have to call it."""
    state = model.state_dict()
    model.load_state_dict({name: shard_like(whole, state[name]) for name, whole in weights.items()})


def unsharded(udon: UdonModel, keep: bool) -> UdonModel:
    """Returns a model of whole tensors, or the same where nothing is in shards; all processes have to call it.

    Args:
        udon: The model.
        keep: Whether this process wants it; the others get one without weights.
    """
    if not any(isinstance(parameter, DTensor) for parameter in udon.parameters()):
        return udon
    weights = gather_shards(udon.state_dict(), keep)
    with torch.device("meta"):
        whole = UdonModel(udon.config)
    whole.load_state_dict(weights, strict=keep, assign=True)
    return whole


def total_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """The norm of all gradients together, of shards and of whole tensors; all processes have to call it."""
    shards, others = _split(parameters)
    norms = [
        nn.utils.get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        for group in (shards, others)
        if group
    ]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack(whole).norm() if len(whole) > 1 else whole[0]


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clips the norm of all gradients together, where a part of them is in shards, and returns what it was."""
    norm = total_norm(parameters)
    shards, others = _split(parameters)
    mesh = shards[0].device_mesh
    nn.utils.clip_grads_with_norm_(shards, max_norm, DTensor.from_local(norm, mesh))
    nn.utils.clip_grads_with_norm_(others, max_norm, norm)
    return norm


def _split(parameters: Sequence[nn.Parameter]) -> tuple[Sequence[DTensor], Sequence[nn.Parameter]]:
    shards = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    return shards, [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
