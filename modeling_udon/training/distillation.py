"""The training model: a `UdonModel` with the prototypes of its classes, giving the loss and its named terms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel, init_lecun_normal_
from modeling_udon.training.config import LossConfig
from modeling_udon.training.frozen import FrozenTeachers
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
        losses: Each term of the objective by its name, unweighted scalars; without a teacher the student's
            classification alone.
        student_logits: Cosines with the student's prototypes, of shape `(batch_size, num_classes)`; of the classes of
            all domains where the classifier is joint.
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
class Embeddings:
    """Embeddings of a batch of one domain.

    Attributes:
        student: Shape `(batch_size, embedding_dim)`, unit norm.
        backbone: The backbone's features of shape `(batch_size, hidden_size)`, unit norm.
        teacher: Shape `(batch_size, teacher_dim)`, unit norm, if there is a teacher.
        teacher_logits: Cosines of shape `(batch_size, num_classes)` of a teacher that brings its own prototypes.
    """

    student: torch.Tensor
    backbone: torch.Tensor
    teacher: torch.Tensor | None
    teacher_logits: torch.Tensor | None


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
    """Teachers and student learning together, one domain a batch; or what of it the objective asks for.

    Args:
        config: Shape of the model; `config.domains` gives the classes of each domain that has a teacher head.
        objective: Weights, temperatures and margins of the loss.
        udon: A model to train instead of a new one; its configuration must be `config`.
        num_classes: Classes of each domain, where not all have a teacher head.
        frozen_teachers: Trained teachers that stand for the model's own, which learn with it.

    Attributes:
        gather: Concatenates a tensor of every process along its first dimension; `None` where there is one process.
            The relational term then compares pairs of the whole global batch.
        rank: This process's number.
        distillation_share: Factor on both distillation terms, for a ramp.
    """

    def __init__(
        self,
        config: UdonConfig,
        objective: LossConfig | None = None,
        udon: UdonModel | None = None,
        num_classes: Mapping[str, int] | None = None,
        frozen_teachers: FrozenTeachers | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or LossConfig()
        self.num_classes = dict(num_classes or config.domains)
        self.frozen_teachers = frozen_teachers
        self.gather: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.rank = 0
        self.distillation_share = 1.0
        self.udon = udon or UdonModel(config)
        self.student_prototypes = _make_prototypes(self.num_classes, config.embedding_dim)
        self.teacher_prototypes = _make_prototypes(config.domains, config.teacher_dim)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that `forward` computes, in its order."""
        return TERMS if self.objective.needs_teachers else TERMS[:1]

    def embed(self, pixel_values: torch.Tensor, domain: str) -> Embeddings:
        """Embeds images of one domain, `(batch_size, num_channels, height, width)`, by student and teacher, if any.

        Raises:
            ValueError: If the model does not know the domain.
        """
        if domain not in self.num_classes:
            raise ValueError(f"`domain` must be one of {', '.join(self.num_classes)}. Got {domain!r}.")
        learning = domain if domain in self.config.domains else None
        output = self.udon(pixel_values, domain=learning)
        teacher, logits = output.teacher_embeds, None
        if self.frozen_teachers is not None:
            teacher, logits = self.frozen_teachers(pixel_values, domain)
        return Embeddings(output.image_embeds, output.backbone_embeds, teacher, logits)

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
        embeds = self.embed(pixel_values, domain)
        # Half precision would round the cosines to steps of 4e-3, a quarter of what one unit of `scale` can move.
        with torch.autocast(pixel_values.device.type, enabled=False):
            student_logits = self._student_logits(embeds.student, domain)
            losses = {TERMS[0]: self._classification(student_logits, self._student_labels(labels, domain))}
            teacher_logits = None
            if self.objective.needs_teachers:
                teacher_logits, terms = self._teach(embeds, student_logits, labels, domain, bank)
                losses |= dict(zip(TERMS[1:], terms, strict=True))
        weights = self.objective.weights()
        shares = dict.fromkeys(TERMS[2:], self.distillation_share)
        weighted = [weights[name] * shares.get(name, 1.0) * loss for name, loss in losses.items() if weights[name]]
        # Never the sum of nothing: the config sees to it that a weight is above 0.
        total: torch.Tensor = sum(weighted)  # type: ignore[assignment]
        return DistillationOutput(
            loss=total / sum(weights.values()),
            losses=losses,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            image_embeds=embeds.student,
            teacher_embeds=embeds.teacher,
        )

    def domain_parameters(self, domain: str) -> dict[str, nn.Parameter]:
        """Returns the parameters that only batches of `domain` use, by their names in this model."""
        # Looked up, not searched for: a walk over all parameters would take longer with each domain.
        own: dict[str, nn.Parameter] = {}
        if domain in self.config.domains:
            head = self.udon.teacher_heads[domain]
            own |= {f"udon.teacher_heads.{domain}.{name}": parameter for name, parameter in head.named_parameters()}
            own[f"teacher_prototypes.{domain}"] = self.teacher_prototypes[domain]
        if self.objective.classifier == "separate":
            own[f"student_prototypes.{domain}"] = self.student_prototypes[domain]
        return own

    def shared_head_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters outside of the backbone that batches of every domain use."""
        owned = {name for domain in self.num_classes for name in self.domain_parameters(domain)}
        return [
            parameter
            for name, parameter in self.named_parameters()
            if not name.startswith("udon.backbone.") and name not in owned
        ]

    def _teach(
        self,
        embeds: Embeddings,
        student_logits: torch.Tensor,
        labels: torch.Tensor,
        domain: str,
        bank: RelationalBank | None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The teacher's cosines and the three terms that it has a part in."""
        teacher, teacher_logits = embeds.teacher, embeds.teacher_logits
        assert teacher is not None, "the config gives every domain a teacher where one is needed"
        if teacher_logits is None:
            teacher_logits = cosine_logits(teacher, self.teacher_prototypes[domain])
        distilled, distilled_logits = embeds.student, student_logits
        if not self.objective.distill_through_backbone:
            distilled = self.udon.student_head(embeds.backbone.detach())
            distilled_logits = cosine_logits(distilled, self.student_prototypes[domain])
        if bank is None and self.gather is not None:
            position = self.rank * len(distilled)
            bank = RelationalBank(self.gather(embeds.student.detach()), self.gather(teacher.detach()), position)
        return teacher_logits, (
            self._classification(teacher_logits, labels),
            self._logit_distillation(distilled_logits, teacher_logits),
            self._relational_distillation(distilled, teacher, bank),
        )

    def _student_logits(self, student: torch.Tensor, domain: str) -> torch.Tensor:
        if self.objective.classifier == "joint":
            return cosine_logits(student, torch.cat(list(self.student_prototypes.values())))
        return cosine_logits(student, self.student_prototypes[domain])

    def _student_labels(self, labels: torch.Tensor, domain: str) -> torch.Tensor:
        if self.objective.classifier == "separate":
            return labels
        names = list(self.num_classes)
        return labels + sum(self.num_classes[name] for name in names[: names.index(domain)])

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


def _make_prototypes(domains: Mapping[str, int], dim: int) -> nn.ParameterDict:
    prototypes = nn.ParameterDict()
    for name, num_classes in domains.items():
        weight = torch.empty(num_classes, dim)
        init_lecun_normal_(weight)
        prototypes[name] = nn.Parameter(weight)
    return prototypes
