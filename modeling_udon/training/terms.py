"""Terms of the objective on embeddings and prototypes: on all cosines at a time, or over chunks of classes."""

from dataclasses import dataclass

import torch

from modeling_udon.config import LossConfig
from modeling_udon.training.chunked import (
    chunked_classification_loss,
    chunked_confidence,
    chunked_logit_distillation_loss,
)
from modeling_udon.training.gates import confidence
from modeling_udon.training.losses import classification_loss, cosine_logits, logit_distillation_loss
from modeling_udon.training.parts import Cosines


@dataclass(frozen=True)
class Terms:
    """What an objective makes of cosines.

    Attributes:
        objective: Weights, temperatures and margins of the loss, and whether it goes over chunks.
    """

    objective: LossConfig

    def cosines(self, embeds: torch.Tensor, prototypes: torch.Tensor) -> Cosines:
        """Compares embeddings with prototypes, unless the losses do it chunk by chunk."""
        whole = self.objective.chunk_size is None
        return Cosines(embeds, prototypes, cosine_logits(embeds, prototypes) if whole else None)

    def classification(self, cosines: Cosines, labels: torch.Tensor) -> torch.Tensor:
        """The classification loss, a scalar."""
        objective = self.objective
        hardness = objective.scale, objective.margin, objective.kind
        if cosines.logits is not None:
            return classification_loss(cosines.logits, labels, *hardness)
        return chunked_classification_loss(cosines.embeds, cosines.prototypes, labels, *hardness, self._chunk_size)

    def confidence(self, cosines: Cosines, labels: torch.Tensor) -> torch.Tensor:
        """How well each image is classified, see `gates.confidence`; shape `(batch_size,)`."""
        how = self.objective.scale, self.objective.gate_by
        if cosines.logits is not None:
            return confidence(cosines.logits, labels, *how)
        return chunked_confidence(cosines.embeds, cosines.prototypes, labels, *how, self._chunk_size)

    def logit_distillation(self, student: Cosines, teacher: Cosines, gates: torch.Tensor | None) -> torch.Tensor:
        """The distillation of class probabilities, a scalar; `gates`, if any, weight each image."""
        temperatures = self.objective.student_temperature, self.objective.teacher_temperature
        if student.logits is not None and teacher.logits is not None:
            return logit_distillation_loss(student.logits, teacher.logits, *temperatures, gates)
        both = student.embeds, student.prototypes, teacher.embeds, teacher.prototypes
        return chunked_logit_distillation_loss(*both, *temperatures, self._chunk_size, gates)

    @property
    def _chunk_size(self) -> int:
        assert self.objective.chunk_size is not None, "without it, all cosines are there"
        return self.objective.chunk_size
