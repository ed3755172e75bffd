"""Values that the training model works with: embeddings, cosines, what a batch gives, what other processes hold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from modeling_udon.config import LossConfig
from modeling_udon.modeling_udon import init_lecun_normal_
from modeling_udon.training.class_shards import ClassShard


@dataclass
class DistillationOutput(ModelOutput):
    """Loss, terms, cosines and embeddings of one batch.

    Attributes:
        loss: Weighted sum of the terms over the sum of the weights, a scalar.
        losses: Each term of the objective by its name, unweighted scalars; without a teacher the student's
            classification alone; with an old student `retention` as well.
        student_logits: Cosines with the student's prototypes, of shape `(batch_size, num_classes)`; of the classes of
            all domains where the classifier is joint, of the sampled classes where they are sampled, `None` where the
            loss goes over chunks and never has them together.
        teacher_logits: Cosines with the teacher's prototypes, likewise, of the domain's classes alone.
        image_embeds: Student embeddings of shape `(batch_size, embedding_dim)`.
        teacher_embeds: Teacher embeddings of shape `(batch_size, teacher_dim)`.
        confidences: Mean confidence of student and teacher, of shape `(2,)`, where the gate asks for it.
        hardness: What the next scales depend on, of shape `(batch_size, 1 or 2, 2)`, where they adapt.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    student_logits: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    teacher_embeds: torch.Tensor | None = None
    confidences: torch.Tensor | None = None
    hardness: torch.Tensor | None = None


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of a batch of one domain.

    Attributes:
        student: Shape `(batch_size, embedding_dim)`, unit norm.
        backbone: The backbone's features of shape `(batch_size, hidden_size)`, unit norm.
        teacher: Shape `(batch_size, teacher_dim)`, unit norm, if there is a teacher.
        frozen: Those of each frozen teacher of features, of its own width, unit norm.
    """

    student: torch.Tensor
    backbone: torch.Tensor
    teacher: torch.Tensor | None
    frozen: tuple[torch.Tensor, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence["Embeddings"]) -> "Embeddings":
        """Puts the parts of a batch together."""
        teachers = [part.teacher for part in parts if part.teacher is not None]
        return cls(
            torch.cat([part.student for part in parts]),
            torch.cat([part.backbone for part in parts]),
            torch.cat(teachers) if teachers else None,
            tuple(torch.cat(of_parts) for of_parts in zip(*(part.frozen for part in parts), strict=True)),
        )


@dataclass(frozen=True)
class Cosines:
    """Embeddings beside the prototypes that they are classified by.

    Attributes:
        embeds: Shape `(batch_size, dim)`, unit norm.
        prototypes: Shape `(num_classes, dim)`.
        logits: Their cosines of shape `(batch_size, num_classes)`; `None` where a loss goes over chunks of classes.
        scale: Factor on the cosines, where it is not that of the config.
        shard: Which of the classes the prototypes are, where each process has some of them; `None` for all.
    """

    embeds: torch.Tensor
    prototypes: torch.Tensor
    logits: torch.Tensor | None
    scale: torch.Tensor | None = None
    shard: ClassShard | None = None

    @property
    def num_classes(self) -> int:
        """Classes of all processes."""
        return len(self.prototypes) if self.shard is None else self.shard.num_classes


@dataclass(frozen=True)
class Peers:
    """The processes of a run that has several.

    Attributes:
        gather: Concatenates a tensor of every process along its first dimension.
        rank: Number of this process.
        gather_on_host: The same for a tensor on the host, which waits for no device.
    """

    gather: Callable[[torch.Tensor], torch.Tensor]
    rank: int
    gather_on_host: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class RelationalBank:
    """Embeddings of the whole global batch, without gradient, when a forward pass sees only a block of it.

    Attributes:
        student_embeds: Shape `(global_batch_size, embedding_dim)`.
        teacher_embeds: Shape `(global_batch_size, teacher_dim)`, if there is a teacher.
        position: Row at which the block of the next forward pass starts.
        frozen_embeds: Those of each frozen teacher of features, of its own width.
    """

    student_embeds: torch.Tensor
    teacher_embeds: torch.Tensor | None
    position: int
    frozen_embeds: tuple[torch.Tensor, ...] = ()

    @classmethod
    def gathered(
        cls, gather: Callable[[torch.Tensor], torch.Tensor], embeds: Embeddings, position: int
    ) -> "RelationalBank":
        """Collects the embeddings of all processes.

        Args:
            gather: Concatenates a tensor of every process along its first dimension.
            embeds: This process's.
            position: As above.
        """
        teacher = None if embeds.teacher is None else gather(embeds.teacher.detach())
        frozen = tuple(gather(one) for one in embeds.frozen)
        return cls(gather(embeds.student.detach()), teacher, position, frozen)


def prototypes_of(domains: Mapping[str, int], dim: int, objective: LossConfig) -> nn.ParameterDict:
    """Makes classifier weights of each domain, by its number of classes."""
    return nn.ParameterDict({name: make_prototypes(number, dim, objective) for name, number in domains.items()})


def make_prototypes(num_classes: int, dim: int, objective: LossConfig) -> nn.Parameter:
    """Makes classifier weights of shape `(num_classes, dim)`, or `(num_classes, num_subcenters, dim)`."""
    several = () if objective.subcenters == 1 else (objective.subcenters,)
    weight = torch.empty(num_classes, *several, dim)
    init_lecun_normal_(weight)
    return nn.Parameter(weight)
