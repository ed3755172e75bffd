"""The training model on several processes: what each of them shares, and what it holds by itself."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modeling_udon.config import TrainConfig
from modeling_udon.training.class_shards import shard_prototypes
from modeling_udon.training.distillation import STEP_STATE, UdonForDistillation
from modeling_udon.training.sharding import shard_backbone

# Labels of the batch that finds parameters without gradient; more than the neighbours that a term may compare.
_PROBES = 10


def share_model(
    config: TrainConfig, model: UdonForDistillation, accelerator: Accelerator
) -> tuple[nn.Module, tuple[nn.Parameter, ...]]:
    """Brings the model to the device and shares it between processes: wrapped by DDP, or its backbone in shards.

    Returns:
        The module to call for a gradient, and the shared heads whose gradients nobody averages: all where the backbone
        is in shards, else prototypes of a joint classifier that a step cuts down.
    """
    sharded = config.train.shard_backbone and accelerator.num_processes > 1
    # Heads and prototypes of one domain get gradients in a step; DDP would wait for all the others.
    ignored = [name for domain in model.num_classes for name in model.domain_parameters(domain)]
    ignored += STEP_STATE
    # DDP knows no gradient that changes its shape from step to step.
    is_cut = config.loss.classifier == "joint" and config.loss.sampled_classes is not None
    cut = dict(model.student_prototypes.named_parameters("student_prototypes")) if is_cut else {}
    ignored += cut
    model.move_frozen(accelerator.device)
    if config.train.shard_prototypes and accelerator.num_processes > 1:
        # Before anything moves, so that a GPU holds the whole prototypes of one domain at a time, not of all.
        for prototypes in (model.student_prototypes, model.teacher_prototypes):
            shard_prototypes(prototypes, accelerator.device.type, accelerator.num_processes)
        model.to(accelerator.device)
    if accelerator.num_processes > 1 and not sharded:
        ignored += _without_gradient(config, model.to(accelerator.device), accelerator)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    if config.train.compile:
        model.udon.backbone.compile()
    # In shards, the backbone reduces its own gradients; around it there is nothing for DDP.
    wrapped = accelerator.prepare_model(model, evaluation_mode=sharded)
    if not sharded:
        return wrapped, tuple(cut.values())
    shard_backbone(model.udon, accelerator.device.type, accelerator.num_processes)
    return wrapped, tuple(model.shared_head_parameters())


def _without_gradient(config: TrainConfig, model: UdonForDistillation, accelerator: Accelerator) -> list[str]:
    """Finds the shared parameters that no step gives a gradient, by a backward pass of random images.

    Among them are a mask token (DINOv2, DINOv3), an unused pooler, and the student's head in a run without student.
    """
    domain = next(iter(model.num_classes))
    size = config.data.image_size
    number = _PROBES * model.images_per_label
    device = accelerator.device
    # Batch normalisation would count the random images among those that it has seen.
    seen = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        labels = torch.zeros(_PROBES, dtype=torch.int64, device=device)
        with torch.no_grad():
            inputs = model.inputs.made_of(model.udon, torch.randn(number, 3, size, size, device=device))
        with accelerator.autocast():
            loss = model(inputs, labels, domain).loss
        loss.backward()
    shared = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = [name for name, parameter in shared.items() if parameter.grad is None]
    model.zero_grad(set_to_none=True)
    for name, buffer in model.named_buffers():
        buffer.copy_(seen[name])
    return found


def start_equal(model: UdonForDistillation, shared_heads: tuple[nn.Parameter, ...], accelerator: Accelerator) -> None:
    """Gives every process the first one's weights, as far as DDP does not."""
    if accelerator.num_processes > 1:
        owned = [parameter for domain in model.num_classes for parameter in model.domain_parameters(domain).values()]
        for parameter in (*shared_heads, *owned):
            if not isinstance(parameter, DTensor):  # Those were cut from the first one's.
                torch.distributed.broadcast(parameter.data, src=0)


def share_buffers(backbone: nn.Module, num_processes: int) -> None:
    """Gives every process the first one's buffers: those of batch normalisation go by what a process has seen."""
    if num_processes > 1:
        for buffer in backbone.buffers():
            torch.distributed.broadcast(buffer, src=0)
