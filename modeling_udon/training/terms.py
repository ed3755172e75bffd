"""Terms of the objective on embeddings and prototypes: on all cosines at a time, or over chunks of classes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from modeling_udon.config import LossConfig
from modeling_udon.training.adaptive_scale import hardness
from modeling_udon.training.chunked import (
    chunked_classification_loss,
    chunked_confidence,
    chunked_hardness,
    chunked_logit_distillation_loss,
)
from modeling_udon.training.class_shards import ClassShard
from modeling_udon.training.feature_teachers import FeatureTeacher
from modeling_udon.training.gates import confidence
from modeling_udon.training.losses import (
    classification_loss,
    cosine_logits,
    logit_distillation_loss,
    relational_distillation_block,
    relational_distillation_loss,
    scale_for,
)
from modeling_udon.training.parts import Cosines, RelationalBank

FROZEN_TERMS = ("frozen_relational", "frozen_logit")


def frozen_weights(teachers: Sequence[FeatureTeacher]) -> dict[str, float]:
    """The weight of each term of frozen teachers that any of them takes part in: the sum of theirs."""
    sums = (sum(teacher.spec.relational for teacher in teachers), sum(teacher.spec.logit for teacher in teachers))
    return {name: weight for name, weight in zip(FROZEN_TERMS, sums, strict=True) if weight > 0}


@dataclass(frozen=True)
class Terms:
    """What an objective makes of cosines.

    Attributes:
        objective: Weights, temperatures and margins of the loss, and whether it goes over chunks.
    """

    objective: LossConfig

    def cosines(
        self,
        embeds: torch.Tensor,
        prototypes: torch.Tensor,
        scale: torch.Tensor | None = None,
        shard: ClassShard | None = None,
    ) -> Cosines:
        """Compares embeddings with prototypes, unless the losses do it chunk by chunk or over processes.

        Args:
            embeds: Shape `(batch_size, dim)`, unit norm.
            prototypes: Shape `(num_classes, dim)`.
            scale: Factor on the cosines, where it is not that of the config.
            shard: Which of the classes they are, where they are a process's own; of a `DTensor` it is known.
        """
        if isinstance(prototypes, DTensor):
            shard, prototypes = ClassShard.of(prototypes), prototypes.to_local()
        whole = self.objective.chunk_size is None and shard is None
        return Cosines(embeds, prototypes, cosine_logits(embeds, prototypes) if whole else None, scale, shard)

    def classification(self, cosines: Cosines, labels: torch.Tensor) -> torch.Tensor:
        """The classification loss, a scalar."""
        objective, smoothing = self.objective, self.objective.label_smoothing
        hardness = self.scale(cosines), objective.margin, objective.kind
        if cosines.logits is not None:
            return classification_loss(cosines.logits, labels, *hardness, smoothing)
        chunks = self._chunk_size(cosines), smoothing, cosines.shard
        return chunked_classification_loss(cosines.embeds, cosines.prototypes, labels, *hardness, *chunks)

    def nested_classification(self, cosines: Cosines, labels: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
        """The mean of the classification losses of whole embeddings and of their first dimensions.

        Matryoshka representations (arXiv 2205.13147), with the prototypes cut off where the embeddings are.

        Args:
            cosines: Those of the whole embeddings.
            labels: Classes of shape `(batch_size,)`.
            dims: How many of the first dimensions are classified by themselves as well.
        """
        losses = [self.classification(cosines, labels)]
        for dim in dims:
            cut = F.normalize(cosines.embeds[:, :dim], dim=1), cosines.prototypes[..., :dim]
            first = self.cosines(*cut, cosines.scale, cosines.shard)
            losses.append(self.classification(first, labels))
        return torch.stack(losses).mean() if dims else losses[0]

    def confidence(self, cosines: Cosines, labels: torch.Tensor) -> torch.Tensor:
        """How well each image is classified, see `gates.confidence`; shape `(batch_size,)`."""
        how = self.scale(cosines), self.objective.gate_by
        if cosines.logits is not None:
            return confidence(cosines.logits, labels, *how)
        return chunked_confidence(cosines.embeds, cosines.prototypes, labels, *how, self._chunk_size(cosines))

    def hardness(self, *heads: tuple[Cosines | None, torch.Tensor]) -> torch.Tensor:
        """What the next scales of student and teacher, if any, depend on; see `adaptive_scale.hardness`.

        Args:
            heads: Cosines of each, with the labels among their classes.

        Returns:
            Shape `(batch_size, num_heads, 2)`.
        """
        found = []
        for cosines, labels in heads:
            if cosines is None:
                continue
            scale = self.scale(cosines)
            if cosines.logits is not None:
                found.append(hardness(cosines.logits, labels, scale))
            else:
                chunk_size = self._chunk_size(cosines)
                found.append(chunked_hardness(cosines.embeds, cosines.prototypes, labels, scale, chunk_size))
        return torch.stack(found, dim=1)

    def logit_distillation(self, student: Cosines, teacher: Cosines, gates: torch.Tensor | None) -> torch.Tensor:
        """The distillation of class probabilities, a scalar; `gates`, if any, weight each image."""
        temperatures = self.objective.student_temperature, self.objective.teacher_temperature
        if student.logits is not None and teacher.logits is not None:
            return logit_distillation_loss(student.logits, teacher.logits, *temperatures, gates)
        both = student.embeds, student.prototypes, teacher.embeds, teacher.prototypes
        return chunked_logit_distillation_loss(*both, *temperatures, self._chunk_size(student), gates, student.shard)

    def relational_distillation(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        bank: RelationalBank | None,
        teacher_bank: torch.Tensor | None,
    ) -> torch.Tensor:
        """The distillation of similarities, a scalar, within a batch or with the embeddings of all its blocks."""
        if bank is None or teacher_bank is None:
            return relational_distillation_loss(student, teacher, len(student) / 4)
        banks, size = (bank.student_embeds, teacher_bank), len(bank.student_embeds)
        return relational_distillation_block(student, teacher, *banks, bank.position, size / 4)

    def of_frozen(
        self,
        teachers: Sequence[FeatureTeacher],
        frozen: Sequence[torch.Tensor],
        student: Cosines,
        domain: str,
        sampled_classes: torch.Tensor | None,
        bank: RelationalBank | None,
    ) -> dict[str, torch.Tensor]:
        """The terms of frozen teachers, each a mean over those by their weights.

        Args:
            teachers: The teachers.
            frozen: Embeddings that each has of the batch, of shape `(batch_size, dim)`.
            student: The student's cosines with the classes of the domain.
            domain: Name of the domain.
            sampled_classes: Classes that the student's cosines are cut down to; `None` for all.
            bank: Embeddings of the global batch, if this is a block of it.
        """
        weights = frozen_weights(teachers)
        losses = {name: torch.zeros((), device=student.embeds.device) for name in weights}
        for number, (teacher, embeds) in enumerate(zip(teachers, frozen, strict=True)):
            if teacher.spec.relational:
                of_all = None if bank is None else bank.frozen_embeds[number]
                loss = self.relational_distillation(student.embeds, embeds, bank, of_all)
                losses[FROZEN_TERMS[0]] = losses[FROZEN_TERMS[0]] + teacher.spec.relational * loss
            if teacher.spec.logit:
                means = teacher.prototypes[domain]
                of_classes = self.cosines(embeds, means if sampled_classes is None else means[sampled_classes])
                loss = self.logit_distillation(student, of_classes, None)
                losses[FROZEN_TERMS[1]] = losses[FROZEN_TERMS[1]] + teacher.spec.logit * loss
        return {name: loss / weights[name] for name, loss in losses.items()}

    def scale(self, cosines: Cosines) -> float | torch.Tensor:
        """Factor on the cosines in a classification among these classes."""
        if cosines.scale is not None:
            return cosines.scale
        return scale_for(cosines.num_classes, self.objective.scale, self.objective.scale_by)

    def _chunk_size(self, cosines: Cosines) -> int:
        return self.objective.chunk_size or max(len(cosines.prototypes), 1)
