"""Estimate of the device memory for prototypes and their cosines, before anything is allocated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import psutil
import torch

from modeling_udon.config import LossConfig

_FLOAT32 = 4
# Tensors of `(batch_size, num_classes)` at the peak of a step, counted by torch's profiler: the student's alone, with a
# teacher's, with a second student's where distillation stops at the backbone. Last, of `(batch_size, chunk_size)`.
_COSINES_NESTED = 5
_COSINES_ALONE, _COSINES_TAUGHT, _COSINES_APART, _COSINES_OF_CHUNK = 3, 9, 10, 4
# Where embeddings are wider than the batch is long, products stand beside cosines (`losses.cosine_logits`).
_COSINES_ALONE_WIDE, _COSINES_OF_CHUNK_WIDE = 5, 7


@dataclass(frozen=True)
class PrototypeMemory:
    """Bytes on each process.

    Attributes:
        weights: All prototypes.
        moments: AdamW's two moments of them, once every domain has been trained.
        gradients: Of the domain with most classes, since a step trains one; with the copies of sampled rows.
        cosines: Of a batch with the classes of its loss, with what the backward pass keeps of them.
        coasting: Copies while idle heads coast: for a validation, or after a step on sampled classes.
    """

    weights: int
    moments: int
    gradients: int
    cosines: int
    coasting: int

    @property
    def total(self) -> int:
        """The peak, or somewhat more: a step's cosines are half gone by the time its gradients are all there."""
        return self.weights + self.moments + max(self.gradients + self.cosines, self.coasting)


def estimate_prototypes(
    num_classes: Mapping[str, int],
    embedding_dim: int,
    teacher_dim: int,
    batch_size: int,
    loss: LossConfig,
    coasting: bool = True,
    distill_through_backbone: bool = True,
    nested: int = 0,
) -> PrototypeMemory:
    """Adds up what prototypes take in training; activations and weights of backbone and heads are not in it.

    Args:
        num_classes: Classes of each domain.
        embedding_dim: Size of the student embedding.
        teacher_dim: Size of the teacher embeddings; 0 where no teacher learns.
        batch_size: Images of one forward pass on one process.
        loss: Says whether the classifier is joint, and whether classes are sampled or come in chunks.
        coasting: Whether idle heads coast.
        distill_through_backbone: Whether distillation reads the student's own cosines, not a second set of them.
        nested: Numbers of first dimensions that are classified by themselves.
    """
    # Each sub-centre takes what a prototype does.
    embedding_dim, teacher_dim = loss.subcenters * embedding_dim, loss.subcenters * teacher_dim
    widths = embedding_dim + teacher_dim
    every, most = sum(num_classes.values()), max(num_classes.values())
    weights = _FLOAT32 * every * widths
    joint = loss.classifier == "joint"
    classes = every if joint else most
    rows = _sampled(classes, most if joint else 0, batch_size, loss)
    gradients = _FLOAT32 * rows * widths
    if joint:
        # The prototypes of all domains side by side, their gradient, and its parts; one teacher's beside them. Of a
        # sample, the rows themselves and their moments are copies as well.
        copies = 3 * (rows - most) if rows < classes else 0
        gradients = _FLOAT32 * ((3 * rows + copies) * embedding_dim + most * teacher_dim)
    elif rows < classes:
        gradients *= 4  # The same copies.
    if loss.chunk_size is not None:
        # Two terms give the student's prototypes a gradient each before they are added.
        second = rows * embedding_dim if loss.needs_teachers else 0
        held = _COSINES_OF_CHUNK if max(embedding_dim, teacher_dim) < batch_size else _COSINES_OF_CHUNK_WIDE
        cosines = held * batch_size * min(loss.chunk_size, rows) + second
    elif not loss.needs_teachers:
        cosines = (_COSINES_ALONE if embedding_dim < batch_size else _COSINES_ALONE_WIDE) * batch_size * rows
    elif joint:
        cosines = batch_size * (_COSINES_ALONE * rows + (_COSINES_TAUGHT - _COSINES_ALONE) * most)
    else:
        cosines = (_COSINES_TAUGHT if distill_through_backbone else _COSINES_APART) * batch_size * rows
    if loss.chunk_size is None:
        # Cosines with sub-centres stand beside those of the classes, and those of first dimensions are kept likewise.
        cosines += batch_size * rows * ((loss.subcenters if loss.subcenters > 1 else 0) + _COSINES_NESTED * nested)
    # The prototypes of a joint classifier have no idle steps but for rows outside of a sample; teachers beside it have.
    idle_dim = 0 if joint else embedding_dim
    cut_dim = 0 if rows == classes else embedding_dim if joint else max(embedding_dim, teacher_dim)
    idle = _coasting(num_classes, idle_dim + teacher_dim, cut_dim) if coasting else 0
    return PrototypeMemory(weights, 2 * weights, gradients, _FLOAT32 * cosines, idle)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device: of the GPU, or of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def describe_memory(estimate: PrototypeMemory, free: int) -> list[str]:
    """Says what prototypes will take, with a warning and the way out where it is more than is free."""
    parts = " + ".join(f"{name} {_size(getattr(estimate, name))}" for name in ("weights", "moments"))
    step = f"gradients {_size(estimate.gradients)} + cosines {_size(estimate.cosines)}"
    lines = [
        f"prototypes take {_size(estimate.total)} on each process, of {_size(free)} free: {parts} + the larger of "
        f"{step} in a step and {_size(estimate.coasting)} while idle heads coast; backbone and activations come on top"
    ]
    if estimate.total > free:
        lines.append(
            "WARNING: prototypes need more memory than is free; set loss.sampled_classes (gradients and cosines), "
            "loss.chunk_size (cosines), ablation.idle_heads hold (coasting) or a smaller model.teacher_dim (all)"
        )
    return lines


def _coasting(num_classes: Mapping[str, int], read_dims: int, cut_dim: int) -> int:
    most = max(num_classes.values())
    # For a validation a copy of all, and of one domain the moments and a workspace of the prototypes' size.
    reading = sum(num_classes.values()) * read_dims + 3 * most * read_dims if len(num_classes) > 1 else 0
    return _FLOAT32 * max(reading, most * cut_dim)


def _sampled(classes: int, always: int, batch_size: int, loss: LossConfig) -> int:
    """Classes that a batch is compared with: those that always are, and a sample of the others."""
    wanted = loss.sampled_classes
    if wanted is None:
        return classes
    size = math.ceil(wanted * (classes - always)) if isinstance(wanted, float) else wanted
    return min(max(always + size, batch_size), classes)


def _size(num_bytes: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{num_bytes / (1 << 10):.1f} KiB"
