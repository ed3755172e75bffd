"""Training model: a `UdonModel` with the prototypes of its classes; returns the loss and its named terms."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from modeling_udon.config import LossConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.adaptive_scale import AdaptiveScales
from modeling_udon.training.feature_teachers import FeatureTeachers
from modeling_udon.training.gates import open_gates, running_means
from modeling_udon.training.inputs import Inputs
from modeling_udon.training.losses import retention_loss, squared_distance
from modeling_udon.training.parts import Cosines, DistillationOutput, Embeddings, Peers, RelationalBank, prototypes_of
from modeling_udon.training.teachers import FrozenTeachers, OldStudent, starting_weights
from modeling_udon.training.terms import Terms, frozen_weights

TERMS = ("student_classification", "teacher_classification", "logit_distillation", "relational_distillation")
RETENTION = "retention"
WEIGHT_RETENTION = "weight_retention"
# A buffer, so that a checkpoint has it: running confidence of student and teacher of each domain.
GATE_STATE = "gate_means"
# What each process moves by itself, by what all of them have seen; a run that starts from another begins anew.
STEP_STATE = (GATE_STATE, "scales.student", "scales.teacher")


class UdonForDistillation(nn.Module):
    """Teachers and student that learn together, one domain per batch, or the part of it that the objective asks for.

    Args:
        config: Shape of the model; `config.domains` gives the classes of each domain that has a teacher head.
        objective: Weights, temperatures and margins of the loss.
        udon: A model to train instead of a new one; its configuration must be `config`.
        num_classes: Classes of each domain, where not all have a teacher head.
        frozen_teachers: Trained teachers that stand for the model's own, which learn with it.
        old_student: The student that this one starts from and is held to.
        feature_teachers: Frozen models whose features the student follows.
        distill_through_backbone: Whether the distillation terms train the backbone too, or only the student's head.
        inputs: What comes into a step; images where it is `None`.
        peers: The processes of the run, so that the relational term compares the pairs of the whole global batch;
            `None` where there is one process.
    """

    gate_means: torch.Tensor
    # Share of the run that is over, which the trainer sets before each step.
    progress = 0.0
    # Images that come with each label: a target's beside a source's in `UdonForAdaptation`.
    images_per_label = 1
    # Whether the backbone is told to interpolate its positions for the teachers' view; `None`: as for the student's.
    view_interpolates: bool | None = None

    def __init__(
        self,
        config: UdonConfig,
        objective: LossConfig | None = None,
        udon: UdonModel | None = None,
        num_classes: Mapping[str, int] | None = None,
        frozen_teachers: FrozenTeachers | None = None,
        old_student: OldStudent | None = None,
        feature_teachers: FeatureTeachers | None = None,
        inputs: Inputs | None = None,
        peers: Peers | None = None,
        distill_through_backbone: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.objective = objective or LossConfig()
        self.num_classes = dict(num_classes or config.domains)
        self.frozen_teachers = frozen_teachers
        self.old_student = old_student
        self.feature_teachers = feature_teachers
        self.inputs = inputs or Inputs()
        self.peers = peers
        self._distill_through_backbone = distill_through_backbone
        self.udon = udon or UdonModel(config)
        self.student_prototypes = prototypes_of(self.num_classes, config.embedding_dim, self.objective)
        self.teacher_prototypes = prototypes_of(config.domains, config.teacher_dim, self.objective)
        self._terms = Terms(self.objective)
        self._start = starting_weights(self.udon.backbone) if self.objective.retention > 0 else []
        self._make_step_state()

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that `forward` computes, in its order."""
        return tuple(self._weights())

    def move_frozen(self, device: torch.device) -> None:
        """Brings to the device what is no part of this module: trained teachers and the old student."""
        if self.frozen_teachers is not None:
            self.frozen_teachers = self.frozen_teachers.to(device)
        if self.old_student is not None:
            self.old_student = self.old_student.to(device)
        if self.feature_teachers is not None:
            self.feature_teachers.to(device)
        self._start = [(parameter, start.to(device)) for parameter, start in self._start]

    def embed(
        self,
        inputs: torch.Tensor,
        domain: str,
        targets: Sequence[torch.Tensor] = (),
        view: torch.Tensor | None = None,
    ) -> Embeddings:
        """Embeds a batch of one domain by student and teacher, if any.

        Args:
            inputs: A batch of what `self.inputs` says.
            domain: Name of the domain.
            targets: Features that frozen teachers have of these images, as `FeatureTeachers.targets` gives them.
            view: What teachers see of the same images, of another size, or features of it; `None`: `inputs`.

        Raises:
            ValueError: If the model does not know the domain.
        """
        if domain not in self.num_classes:
            raise ValueError(f"`domain` must be one of {', '.join(self.num_classes)}. Got {domain!r}.")
        taught = domain in self.config.domains
        opened = self.feature_teachers is not None and self.feature_teachers.is_open
        seen = inputs if view is None else view
        frozen = self.feature_teachers(seen, targets) if self.feature_teachers is not None and opened else ()
        embeds = self.inputs(self.udon, inputs, domain if taught and view is None else None)
        teacher = embeds.teacher
        if self.frozen_teachers is not None:
            teacher = self.frozen_teachers(seen, domain)
        elif taught and view is not None:
            # A second pass of the same backbone: the teacher's own loss trains it by what the teacher sees.
            teacher = self.inputs(self.udon, view, domain, self.view_interpolates).teacher
        return replace(embeds, teacher=teacher, frozen=frozen)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        domain: str,
        bank: RelationalBank | None = None,
        distillation_share: float = 1.0,
        sampled_classes: torch.Tensor | None = None,
        targets: Sequence[torch.Tensor] = (),
        view: torch.Tensor | None = None,
    ) -> DistillationOutput:
        """Computes the loss of a batch.

        Args:
            pixel_values: A batch of ONE domain, as `embed` takes it.
            labels: Their classes in that domain, of shape `(batch_size,)`, int64.
            domain: Name of the domain.
            bank: Embeddings of the global batch that this batch is a block of; `None` if this is the whole share of
                its process.
            distillation_share: Factor on the weights of both distillation terms, for a ramp.
            sampled_classes: Classes, ascending, of shape `(num_sampled,)`, that the domain is cut down to while its
                prototypes hold these rows alone (see `sampled_classes.py`); `None` for all its classes.
            targets: As in `embed`.
            view: As in `embed`.
        """
        embeds = self.embed(pixel_values, domain, targets, view)
        old = None if self.old_student is None else self.old_student(pixel_values, self.inputs)
        if sampled_classes is not None:
            labels = torch.searchsorted(sampled_classes, labels)
        # Half precision would round the cosines to steps of 4e-3, a quarter of what one unit of `scale` can move.
        with torch.autocast(pixel_values.device.type, enabled=False):
            is_relational = self.objective.needs_teachers or len(embeds.frozen) > 0
            if bank is None and self.peers is not None and is_relational:
                position = self.peers.rank * len(embeds.student)
                bank = RelationalBank.gathered(self.peers.gather, embeds, position)
            number, scales = self._number(domain), self.scales
            scale = None if scales is None else scales.of_student(number)
            student = self._terms.cosines(embeds.student, self._student_prototypes(domain), scale)
            student_labels = self._student_labels(labels, domain)
            dims = self.config.matryoshka_dims
            losses = {TERMS[0]: self._terms.nested_classification(student, student_labels, dims)}
            teacher = confidences = None
            own = self._own_cosines(student, domain)
            distilled = self._distilled(embeds, own)
            if self.objective.needs_teachers:
                prototypes = self._teacher_prototypes(domain, sampled_classes)
                scale = None if scales is None else scales.teacher[number]
                assert embeds.teacher is not None, "the config gives every domain a teacher where one is needed"
                teacher = self._terms.cosines(embeds.teacher, prototypes, scale)
                gates, confidences = self._gates(own, teacher, labels, domain)
                losses |= self._teach(distilled, teacher, labels, gates, bank)
            if embeds.frozen:
                assert self.feature_teachers is not None, "they gave the embeddings"
                teachers = self.feature_teachers.teachers
                losses |= self._terms.of_frozen(teachers, embeds.frozen, distilled, domain, sampled_classes, bank)
            if self._start:
                losses[WEIGHT_RETENTION] = squared_distance(self._start)
            if old is not None:
                losses[RETENTION] = retention_loss(embeds.student, old)
        return DistillationOutput(
            loss=self._total(losses, distillation_share),
            losses=losses,
            student_logits=student.logits,
            teacher_logits=None if teacher is None else teacher.logits,
            image_embeds=embeds.student,
            teacher_embeds=embeds.teacher,
            confidences=confidences,
            hardness=None if scales is None else self._terms.hardness((student, student_labels), (teacher, labels)),
        )

    @torch.no_grad()
    def observe_confidences(self, domain: str, confidences: torch.Tensor, applied: torch.Tensor) -> None:
        """Moves the running means that a gate for each domain goes by.

        Args:
            domain: Domain of the step.
            confidences: Means of student and teacher over the whole batch of this process, of shape `(2,)`.
            applied: Whether the step was applied, a scalar on the device; else the means stay.
        """
        if self.peers is not None:
            confidences = self.peers.gather(confidences[None]).mean(0)
        means = self.gate_means[self._number(domain)]
        means.copy_(torch.where(applied, running_means(means, confidences), means))

    def observe_hardness(self, domain: str, hardness: torch.Tensor, applied: torch.Tensor) -> None:
        """Moves adaptive scales on by the hardness of this process's images; see `AdaptiveScales.observe`."""
        assert self.scales is not None, "without it there is no hardness"
        if self.peers is not None:
            hardness = self.peers.gather(hardness)
        self.scales.observe(self._number(domain), hardness, applied)

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
        weights = self._weights()
        shares = dict.fromkeys(TERMS[2:], distillation_share)
        weighted = [weights[name] * shares.get(name, 1.0) * loss for name, loss in losses.items() if weights[name]]
        # Never the sum of nothing: the config sees to it that a weight is above 0.
        total: torch.Tensor = sum(weighted)  # type: ignore[assignment]
        return total / sum(weights.values())

    def _weights(self) -> dict[str, float]:
        """The weight of each term, in the order in which `forward` computes them."""
        weights = self.objective.weights()
        if not self.objective.needs_teachers:
            weights = {TERMS[0]: weights[TERMS[0]]}
        if self.feature_teachers is not None:
            weights |= frozen_weights(self.feature_teachers.teachers)
        if self.objective.retention > 0:
            weights[WEIGHT_RETENTION] = self.objective.retention
        if self.old_student is not None:
            weights[RETENTION] = self.old_student.weight
        return weights

    def _distilled(self, embeds: Embeddings, own: Cosines) -> Cosines:
        """The student's cosines with the domain's classes, as distillation trains them."""
        if self._distill_through_backbone or not (self.objective.needs_teachers or embeds.frozen):
            return own
        return self._terms.cosines(self.udon.student_head(embeds.backbone.detach()), own.prototypes, shard=own.shard)

    def _teach(
        self,
        distilled: Cosines,
        teacher: Cosines,
        labels: torch.Tensor,
        gates: torch.Tensor | None,
        bank: RelationalBank | None,
    ) -> dict[str, torch.Tensor]:
        """Returns the three terms that a teacher takes part in.

        Args:
            distilled: The student's cosines with the classes of the domain.
            teacher: The teacher's.
            labels: Classes in the domain, of shape `(batch_size,)`.
            gates: Weight of each image in logit distillation, if it has gates.
            bank: As in `forward`.
        """
        of_all = None if bank is None else bank.teacher_embeds
        terms = (
            self._terms.classification(teacher, labels),
            self._terms.logit_distillation(distilled, teacher, gates),
            self._terms.relational_distillation(distilled.embeds, teacher.embeds, bank, of_all),
        )
        return dict(zip(TERMS[1:], terms, strict=True))

    def _gates(
        self, own: Cosines, teacher: Cosines, labels: torch.Tensor, domain: str
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the weight of each image in logit distillation, and the batch's mean confidences, as far as asked."""
        if self.objective.gate == "none":
            return None, None
        both = self._terms.confidence(own, labels), self._terms.confidence(teacher, labels)
        if self.objective.gate == "per_image":
            return open_gates(*both), None
        # What the domain's steps before this one have shown: a gate may not depend on how a batch is cut in parts.
        means = self.gate_means[self._number(domain)]
        return open_gates(*means).expand(len(labels)), torch.stack(both, 1).mean(0)

    def _own_cosines(self, student: Cosines, domain: str) -> Cosines:
        """The student's cosines with the classes of one domain, out of those of all where the classifier is joint."""
        if self.objective.classifier == "separate":
            return student
        first = self._first_class(domain)
        columns = slice(first, first + self.num_classes[domain])
        logits = None if student.logits is None else student.logits[:, columns]
        return Cosines(student.embeds, self.student_prototypes[domain], logits, student.scale)

    def _make_step_state(self) -> None:
        """Makes room for what steps move besides weights, as far as the objective asks for it."""
        adapts = self.objective.scale_by == "adacos"
        self.scales = AdaptiveScales(self.objective, list(self.num_classes.values())) if adapts else None
        if self.objective.gate == "per_domain":
            self.register_buffer(GATE_STATE, torch.zeros(len(self.num_classes), 2))

    def _number(self, domain: str) -> int:
        return list(self.num_classes).index(domain)

    def _first_class(self, domain: str) -> int:
        # Counted as they are: other domains may be cut down to a sample (`sampled_classes.py`).
        return sum(len(self.student_prototypes[name]) for name in list(self.num_classes)[: self._number(domain)])

    def _student_prototypes(self, domain: str) -> torch.Tensor:
        if self.objective.classifier == "joint":
            return torch.cat([self.student_prototypes[name] for name in self.num_classes])
        return self.student_prototypes[domain]

    def _teacher_prototypes(self, domain: str, sampled_classes: torch.Tensor | None) -> torch.Tensor:
        if self.frozen_teachers is None:
            return self.teacher_prototypes[domain]
        prototypes = self.frozen_teachers.prototypes(domain)
        return prototypes if sampled_classes is None else prototypes[sampled_classes]

    def _student_labels(self, labels: torch.Tensor, domain: str) -> torch.Tensor:
        if self.objective.classifier == "separate":
            return labels
        return labels + self._first_class(domain)
