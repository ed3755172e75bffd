"""Training model: a `UdonModel` with the prototypes of its classes; returns the loss and its named terms."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from modeling_udon.config import LossConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel, init_lecun_normal_
from modeling_udon.training.chunked import chunked_classification_loss, chunked_logit_distillation_loss
from modeling_udon.training.losses import (
    classification_loss,
    cosine_logits,
    logit_distillation_loss,
    relational_distillation_block,
    relational_distillation_loss,
    retention_loss,
)
from modeling_udon.training.teachers import FrozenTeachers, OldStudent

TERMS = ("student_classification", "teacher_classification", "logit_distillation", "relational_distillation")
RETENTION = "retention"


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
        teacher_logits: Cosines with the teacher's prototypes, likewise.
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
    """

    student: torch.Tensor
    backbone: torch.Tensor
    teacher: torch.Tensor | None


@dataclass(frozen=True)
class Cosines:
    """Embeddings beside the prototypes that they are classified by.

    Attributes:
        embeds: Shape `(batch_size, dim)`, unit norm.
        prototypes: Shape `(num_classes, dim)`.
        logits: Their cosines of shape `(batch_size, num_classes)`; `None` where a loss goes over chunks of classes.
    """

    embeds: torch.Tensor
    prototypes: torch.Tensor
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Peers:
    """The processes of a run that has several.

    Attributes:
        gather: Concatenates a tensor of every process along its first dimension.
        rank: Number of this process.
    """

    gather: Callable[[torch.Tensor], torch.Tensor]
    rank: int


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
    """Teachers and student that learn together, one domain per batch, or the part of it that the objective asks for.

    Args:
        config: Shape of the model; `config.domains` gives the classes of each domain that has a teacher head.
        objective: Weights, temperatures and margins of the loss.
        udon: A model to train instead of a new one; its configuration must be `config`.
        num_classes: Classes of each domain, where not all have a teacher head.
        frozen_teachers: Trained teachers that stand for the model's own, which learn with it.
        old_student: The student that this one starts from and is held to.
        distill_through_backbone: Whether the distillation terms train the backbone too, or only the student's head.
        takes_features: Whether the backbone's features come in place of images, and the backbone is not run.
        peers: The processes of the run, so that the relational term compares the pairs of the whole global batch;
            `None` where there is one process.
    """

    def __init__(
        self,
        config: UdonConfig,
        objective: LossConfig | None = None,
        udon: UdonModel | None = None,
        num_classes: Mapping[str, int] | None = None,
        frozen_teachers: FrozenTeachers | None = None,
        old_student: OldStudent | None = None,
        takes_features: bool = False,
        peers: Peers | None = None,
        distill_through_backbone: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or LossConfig()
        self.num_classes = dict(num_classes or config.domains)
        self.frozen_teachers = frozen_teachers
        self.old_student = old_student
        self.takes_features = takes_features
        self.peers = peers
        self._distill_through_backbone = distill_through_backbone
        self.udon = udon or UdonModel(config)
        self.student_prototypes = _make_prototypes(self.num_classes, config.embedding_dim)
        self.teacher_prototypes = _make_prototypes(config.domains, config.teacher_dim)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that `forward` computes, in its order."""
        terms = TERMS if self.objective.needs_teachers else TERMS[:1]
        return terms if self.old_student is None else (*terms, RETENTION)

    def move_frozen(self, device: torch.device) -> None:
        """Brings to the device what is no part of this module: trained teachers and the old student."""
        if self.frozen_teachers is not None:
            self.frozen_teachers = self.frozen_teachers.to(device)
        if self.old_student is not None:
            self.old_student = self.old_student.to(device)

    def embed(self, inputs: torch.Tensor, domain: str) -> Embeddings:
        """Embeds a batch of one domain by student and teacher, if any.

        Args:
            inputs: Normalised images of shape `(batch_size, num_channels, height, width)`; where `takes_features`,
                unit-norm features of the backbone of shape `(batch_size, hidden_size)`.
            domain: Name of the domain.

        Raises:
            ValueError: If the model does not know the domain.
        """
        if domain not in self.num_classes:
            raise ValueError(f"`domain` must be one of {', '.join(self.num_classes)}. Got {domain!r}.")
        taught = domain in self.config.domains
        if self.takes_features:
            teacher = self.udon.teacher_heads[domain](inputs) if taught else None
            return Embeddings(self.udon.student_head(inputs), inputs, teacher)
        output = self.udon(inputs, domain=domain if taught else None)
        teacher = output.teacher_embeds
        if self.frozen_teachers is not None:
            teacher = self.frozen_teachers(inputs, domain)
        return Embeddings(output.image_embeds, output.backbone_embeds, teacher)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        domain: str,
        bank: RelationalBank | None = None,
        distillation_share: float = 1.0,
        sampled_classes: torch.Tensor | None = None,
    ) -> DistillationOutput:
        """Computes the loss of a batch.

        Args:
            pixel_values: Images of ONE domain or their features, as `embed` takes them.
            labels: Their classes in that domain, of shape `(batch_size,)`, int64.
            domain: Name of the domain.
            bank: Embeddings of the global batch that this batch is a block of; `None` if this is the whole share of
                its process.
            distillation_share: Factor on the weights of both distillation terms, for a ramp.
            sampled_classes: Classes, ascending, of shape `(num_sampled,)`, that the domain is cut down to while its
                prototypes hold these rows alone (see `sampled_classes.py`); `None` for all classes.
        """
        embeds = self.embed(pixel_values, domain)
        old = None if self.old_student is None else self.old_student(pixel_values, self.takes_features)
        if sampled_classes is not None:
            labels = torch.searchsorted(sampled_classes, labels)
        # Half precision would round the cosines to steps of 4e-3, a quarter of what one unit of `scale` can move.
        with torch.autocast(pixel_values.device.type, enabled=False):
            student = self._cosines(embeds.student, self._student_prototypes(domain))
            losses = {TERMS[0]: self._classification(student, self._student_labels(labels, domain))}
            teacher = None
            if self.objective.needs_teachers:
                prototypes = self._teacher_prototypes(domain, sampled_classes)
                teacher, terms = self._teach(embeds, student, prototypes, labels, bank)
                losses |= terms
            if old is not None:
                losses[RETENTION] = retention_loss(embeds.student, old)
        return DistillationOutput(
            loss=self._total(losses, distillation_share),
            losses=losses,
            student_logits=student.logits,
            teacher_logits=None if teacher is None else teacher.logits,
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

    def _total(self, losses: Mapping[str, torch.Tensor], distillation_share: float) -> torch.Tensor:
        """The weighted mean of the terms; a term without weight stays out of the graph."""
        weights = self.objective.weights()
        if self.old_student is not None:
            weights[RETENTION] = self.old_student.weight
        shares = dict.fromkeys(TERMS[2:], distillation_share)
        weighted = [weights[name] * shares.get(name, 1.0) * loss for name, loss in losses.items() if weights[name]]
        # Never the sum of nothing: the config sees to it that a weight is above 0.
        total: torch.Tensor = sum(weighted)  # type: ignore[assignment]
        return total / sum(weights.values())

    def _teach(
        self,
        embeds: Embeddings,
        student: Cosines,
        teacher_prototypes: torch.Tensor,
        labels: torch.Tensor,
        bank: RelationalBank | None,
    ) -> tuple[Cosines, dict[str, torch.Tensor]]:
        """Returns the teacher's cosines and the three terms that a teacher takes part in."""
        assert embeds.teacher is not None, "the config gives every domain a teacher where one is needed"
        teacher = self._cosines(embeds.teacher, teacher_prototypes)
        distilled = student
        if not self._distill_through_backbone:
            # A joint classifier has no teacher, so these are the domain's own prototypes.
            distilled = self._cosines(self.udon.student_head(embeds.backbone.detach()), student.prototypes)
        if bank is None and self.peers is not None:
            banks = self.peers.gather(embeds.student.detach()), self.peers.gather(embeds.teacher.detach())
            bank = RelationalBank(*banks, position=self.peers.rank * len(distilled.embeds))
        terms = (
            self._classification(teacher, labels),
            self._logit_distillation(distilled, teacher),
            self._relational_distillation(distilled.embeds, embeds.teacher, bank),
        )
        return teacher, dict(zip(TERMS[1:], terms, strict=True))

    def _student_prototypes(self, domain: str) -> torch.Tensor:
        if self.objective.classifier == "joint":
            return torch.cat(list(self.student_prototypes.values()))
        return self.student_prototypes[domain]

    def _teacher_prototypes(self, domain: str, sampled_classes: torch.Tensor | None) -> torch.Tensor:
        if self.frozen_teachers is None:
            return self.teacher_prototypes[domain]
        prototypes = self.frozen_teachers.prototypes(domain)
        return prototypes if sampled_classes is None else prototypes[sampled_classes]

    def _student_labels(self, labels: torch.Tensor, domain: str) -> torch.Tensor:
        if self.objective.classifier == "separate":
            return labels
        names = list(self.num_classes)
        return labels + sum(self.num_classes[name] for name in names[: names.index(domain)])

    def _cosines(self, embeds: torch.Tensor, prototypes: torch.Tensor) -> Cosines:
        whole = self.objective.chunk_size is None
        return Cosines(embeds, prototypes, cosine_logits(embeds, prototypes) if whole else None)

    def _classification(self, cosines: Cosines, labels: torch.Tensor) -> torch.Tensor:
        objective = self.objective
        hardness = objective.scale, objective.margin, objective.kind
        if cosines.logits is not None:
            return classification_loss(cosines.logits, labels, *hardness)
        assert objective.chunk_size is not None
        return chunked_classification_loss(cosines.embeds, cosines.prototypes, labels, *hardness, objective.chunk_size)

    def _logit_distillation(self, student: Cosines, teacher: Cosines) -> torch.Tensor:
        objective = self.objective
        temperatures = objective.student_temperature, objective.teacher_temperature
        if student.logits is not None and teacher.logits is not None:
            return logit_distillation_loss(student.logits, teacher.logits, *temperatures)
        assert objective.chunk_size is not None
        return chunked_logit_distillation_loss(
            student.embeds,
            student.prototypes,
            teacher.embeds,
            teacher.prototypes,
            *temperatures,
            objective.chunk_size,
        )

    def _relational_distillation(
        self, student: torch.Tensor, teacher: torch.Tensor, bank: RelationalBank | None
    ) -> torch.Tensor:
        if bank is None:
            return relational_distillation_loss(student, teacher, len(student) / 4)
        banks, size = (bank.student_embeds, bank.teacher_embeds), len(bank.student_embeds)
        return relational_distillation_block(student, teacher, *banks, bank.position, size / 4)


def _make_prototypes(domains: Mapping[str, int], dim: int) -> nn.ParameterDict:
    prototypes = nn.ParameterDict()
    for name, num_classes in domains.items():
        weight = torch.empty(num_classes, dim)
        init_lecun_normal_(weight)
        prototypes[name] = nn.Parameter(weight)
    return prototypes
