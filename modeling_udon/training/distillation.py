"""The training model: a `UdonModel` with the prototypes of its classes, giving the loss and its named terms."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel, init_lecun_normal_
from modeling_udon.training.config import LossConfig
from modeling_udon.training.losses import (
    classification_loss,
    cosine_logits,
    logit_distillation_loss,
    relational_distillation_block,
    relational_distillation_loss,
)

TERMS = ("student_classification", "teacher_classification", "logit_distillation", "relational_distillation")


@dataclass
class DistillationOutput(ModelOutput):
    """What one batch gives.

    Attributes:
        loss: Weighted sum of the terms over the sum of the weights, a scalar.
        losses: Each term of the objective by its name, unweighted scalars.
        student_logits: Cosines with the student's prototypes, of shape `(batch_size, num_classes)`.
        teacher_logits: Cosines with the teacher's prototypes, of shape `(batch_size, num_classes)`.
        image_embeds: Student embeddings of shape `(batch_size, embedding_dim)`.
        teacher_embeds: Teacher embeddings of shape `(batch_size, teacher_dim)`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    student_logits: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    teacher_embeds: torch.Tensor | None = None


@dataclass(frozen=True)
class RelationalBank:
    """Embeddings of the whole global batch, without gradient, when a forward pass sees only a block of it.

    Attributes:
        student_embeds: Shape `(global_batch_size, embedding_dim)`.
        teacher_embeds: Shape `(global_batch_size, teacher_dim)`.
        position: Row at which the block of the next forward pass starts.
    """

    student_embeds: torch.Tensor
    teacher_embeds: torch.Tensor
    position: int


class UdonForDistillation(nn.Module):
    """Teachers and student learning together, one domain a batch.

    Args:
        config: Shape of the model; `config.domains` gives the classes of each domain.
        objective: Weights, temperatures and margins of the loss.
        udon: A model to train instead of a new one; its configuration must be `config`.

    Attributes:
        gather: Concatenates a tensor of every process along its first dimension; `None` where there is one process.
            The relational term then compares pairs of the whole global batch.
        rank: This process's number.
    """

    def __init__(self, config: UdonConfig, objective: LossConfig | None = None, udon: UdonModel | None = None) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or LossConfig()
        self.gather: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.rank = 0
        self.udon = udon or UdonModel(config)
        self.student_prototypes = _make_prototypes(config.domains, config.embedding_dim)
        self.teacher_prototypes = _make_prototypes(config.domains, config.teacher_dim)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, domain: str, bank: RelationalBank | None = None
    ) -> DistillationOutput:
        """Computes the loss of a batch.

        Args:
            pixel_values: Normalised images of ONE domain, of shape `(batch_size, num_channels, height, width)`.
            labels: Their classes in that domain, of shape `(batch_size,)`, int64.
            domain: Name of the domain.
            bank: Embeddings of the global batch that this batch is a block of; `None` if this is the whole share of
                its process.
        """
        embeds = self.udon(pixel_values, domain=domain)
        student, teacher = embeds.image_embeds, embeds.teacher_embeds
        if bank is None and self.gather is not None:
            bank = RelationalBank(
                self.gather(student.detach()), self.gather(teacher.detach()), self.rank * len(student)
            )
        distilled = (
            student
            if self.objective.distill_through_backbone
            else self.udon.student_head(embeds.backbone_embeds.detach())
        )
        # Half precision would round the cosines to steps of 4e-3, a quarter of what one unit of `scale` can move.
        with torch.autocast(pixel_values.device.type, enabled=False):
            student_logits = cosine_logits(student, self.student_prototypes[domain])
            teacher_logits = cosine_logits(teacher, self.teacher_prototypes[domain])
            distilled_logits = student_logits
            if distilled is not student:
                distilled_logits = cosine_logits(distilled, self.student_prototypes[domain])
            terms = (
                self._classification(student_logits, labels),
                self._classification(teacher_logits, labels),
                self._logit_distillation(distilled_logits, teacher_logits),
                self._relational_distillation(distilled, teacher, bank),
            )
        losses = dict(zip(TERMS, terms, strict=True))
        weights = self.objective.weights()
        weighted = [weights[name] * loss for name, loss in losses.items() if weights[name]]
        # Never the sum of nothing: the config sees to it that a weight is above 0.
        total: torch.Tensor = sum(weighted)  # type: ignore[assignment]
        return DistillationOutput(
            loss=total / sum(weights.values()),
            losses=losses,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            image_embeds=student,
            teacher_embeds=teacher,
        )

    def domain_parameters(self, domain: str) -> dict[str, nn.Parameter]:
        """Returns the parameters that only batches of `domain` use, by their names in this model."""
        prefixes = (f"udon.teacher_heads.{domain}.", f"student_prototypes.{domain}", f"teacher_prototypes.{domain}")
        own = {prefixes[1], prefixes[2]}
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name in own or name.startswith(prefixes[0])
        }

    def _classification(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        objective = self.objective
        return classification_loss(logits, labels, objective.scale, objective.margin, objective.kind)

    def _logit_distillation(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        objective = self.objective
        return logit_distillation_loss(
            student_logits, teacher_logits, objective.student_temperature, objective.teacher_temperature
        )

    def _relational_distillation(
        self, student: torch.Tensor, teacher: torch.Tensor, bank: RelationalBank | None
    ) -> torch.Tensor:
        if bank is None:
            return relational_distillation_loss(student, teacher, len(student) / 4)
        return relational_distillation_block(
            student,
            teacher,
            bank.student_embeds,
            bank.teacher_embeds,
            bank.position,
            len(bank.student_embeds) / 4,
        )


def _make_prototypes(domains: dict[str, int], dim: int) -> nn.ParameterDict:
    prototypes = nn.ParameterDict()
    for name, num_classes in domains.items():
        weight = torch.empty(num_classes, dim)
        init_lecun_normal_(weight)
        prototypes[name] = nn.Parameter(weight)
    return prototypes
