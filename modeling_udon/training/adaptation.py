"""Training model for domains without labels: a student, its online teachers, critics and branches, in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modeling_udon.config import LossConfig
from modeling_udon.config_adaptation import AdaptationConfig
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.evaluation.adaptation import SHARED
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.adaptation_losses import (
    NUM_NEIGHBOURS,
    affinity_of_batch,
    affinity_of_patches,
    aggregate,
    aggregate_distillation_loss,
    aggregate_share,
    cleaning_of_batch,
    cleaning_of_patches,
    confusion_share,
    domain_classification_loss,
    largest_share,
    mean_log_probabilities,
    mmd_loss,
    reverse_gradient,
    token_distance,
)
from modeling_udon.training.adaptation_parts import (
    Aggregator,
    Branch,
    DomainCritic,
    OnlineTeacher,
    PatchCritic,
    blocks_of,
    blocks_replaced,
    exit_features,
    patch_grid,
    patch_tokens,
)
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.losses import cosine_logits, logit_distillation_loss
from modeling_udon.training.parts import Cosines, DistillationOutput, Peers, RelationalBank
from modeling_udon.training.teachers import prepared

# Not a term of the loss: the share of the target images that are taken for one class.
LARGEST_CLASS = "largest_class"


class UdonForAdaptation(UdonForDistillation):
    """A student that learns from labelled sources and from images of a target without labels.

    A batch is images of a source and, in the same number, of the target. The student follows what its teacher says in
    the pass in which the teacher learns, one step behind the papers' code, which saves a forward pass.

    Args:
        udon: The student's network.
        objective: Scale, margin and the like of classification.
        adaptation: Terms and their weights.
        domains: Names of the domains that steps belong to: the targets, or without them the sources.
        num_classes: Classes of the shared class space.
        teachers: Teachers by target, or one under `SHARED`.
        statistics: Channel statistics that images are normalised by.
        peers: The processes of the run; `None` where there is one.
        is_paired: Whether images of a target come with those of a source.
    """

    def __init__(
        self,
        udon: UdonModel,
        objective: LossConfig,
        adaptation: AdaptationConfig,
        domains: Sequence[str],
        num_classes: int,
        teachers: Mapping[str, OnlineTeacher],
        statistics: ChannelStatistics,
        peers: Peers | None = None,
        is_paired: bool = True,
    ) -> None:
        super().__init__(udon.config, objective, udon, {SHARED: num_classes}, peers=peers)
        self.num_classes = dict.fromkeys(domains, num_classes)
        self.adaptation, self.is_paired = adaptation, is_paired
        self.images_per_label = 2 if is_paired else 1
        self._statistics = statistics
        self.teachers = nn.ModuleDict(dict(teachers))
        self.critic, self.affinity_critic = self._make_critics()
        options = num_classes, objective
        specs = [(one.depth, one.embedding_dim) for one in adaptation.branches]
        self.branches = nn.ModuleList(Branch(udon, *options, *spec) for spec in specs)
        number = len(self.branches) + 1
        self.aggregator = Aggregator(udon.config.backbone_config.hidden_size, number) if self.branches else None

    def domain_parameters(self, domain: str) -> dict[str, nn.Parameter]:
        """Returns the parameters that only batches of `domain` use: a teacher of its own."""
        if self.adaptation.teachers != "separate":
            return {}
        return {f"teachers.{domain}.{name}": value for name, value in self.teachers[domain].named_parameters()}

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
            pixel_values: Images of a source, then as many of the target `domain` where batches come in pairs.
            labels: Classes of the source's images, of shape `(batch_size,)`, int64.
            domain: Name of the target, or of the source without targets.
            bank: Not used; as in `UdonForDistillation`.
            distillation_share: Not used.
            sampled_classes: Not used.
            targets: Not used.
            view: Not used.
        """
        outputs = self.udon(pixel_values, output_hidden_states=self._reads_tokens or None)
        losses: dict[str, torch.Tensor] = {}
        # As in `UdonForDistillation`: half precision would round cosines too much.
        student = self._cosines(outputs.image_embeds, self.student_prototypes[SHARED])
        own = student.embeds[: len(labels)]
        losses["student_classification"] = self._terms.nested_classification(
            self._cosines(own, student.prototypes), labels, self.config.matryoshka_dims
        )
        if self.teachers:
            losses |= self._teach_online(pixel_values, labels, domain, outputs, student)
        if self.adaptation.student_confusion:
            losses["student_confusion"] = self._confusion(outputs.backbone_embeds, len(labels), self.critic)
        losses |= self._affinity(outputs, student, len(labels))
        if self.aggregator is not None:
            losses |= self._aggregate(outputs, student, labels)
        if self.is_paired:
            losses[LARGEST_CLASS] = largest_share(_of_all(student)[len(labels) :].detach())
        weights = self._weights()
        total: torch.Tensor = sum(weights[name] * loss for name, loss in losses.items() if weights[name])  # type: ignore[assignment]
        return DistillationOutput(
            loss=total, losses=losses, student_logits=student.logits, image_embeds=outputs.image_embeds
        )

    def _teach_online(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, domain: str, outputs: Any, student: Cosines
    ) -> dict[str, torch.Tensor]:
        """The terms that teachers take part in: their own, and what the student follows."""
        options, number = self.adaptation, len(labels)
        key = domain if options.teachers == "separate" else SHARED
        teacher: OnlineTeacher = self.teachers[key]  # type: ignore[assignment]
        seen, losses = self._prepared(pixel_values, teacher), {}
        of_teacher = teacher.udon(seen)
        cosines = self._cosines(of_teacher.image_embeds, teacher.prototypes)
        if teacher.learns:
            on_source = self._cosines(cosines.embeds[:number], cosines.prototypes)
            losses["teacher_classification"] = self._terms.classification(on_source, labels)
        if options.teacher_confusion:
            losses["teacher_confusion"] = self._confusion(of_teacher.backbone_embeds, number, teacher.critic)
        if options.distillation:
            losses |= self._distil(pixel_values, key, cosines, student, number)
        if options.feature_distillation:
            losses |= self._map(seen, labels, teacher, of_teacher, outputs)
        return losses

    def _distil(
        self, pixel_values: torch.Tensor, key: str, cosines: Cosines, student: Cosines, number: int
    ) -> dict[str, torch.Tensor]:
        # On the scale of cosines: logits are cosines times the scale.
        temperature = self.adaptation.temperature / self._scale(student)
        logits = [_of_all(cosines).detach()]
        if self.adaptation.combine == "average":
            logits += [self._cosines_of(name, pixel_values) for name in self.teachers if name != key]
        followed = mean_log_probabilities(logits, temperature)
        parts = {"distillation_source": slice(0, number), "distillation_target": slice(number, None)}
        both = parts if self.is_paired else {"distillation_source": parts["distillation_source"]}
        return {
            name: self.adaptation.temperature**2
            * logit_distillation_loss(_of_all(student)[part], followed[part], temperature, 1.0)
            for name, part in both.items()
        }

    @torch.no_grad()
    def _cosines_of(self, key: str, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cosines of another target's teacher, which does not learn from this batch."""
        teacher: OnlineTeacher = self.teachers[key]  # type: ignore[assignment]
        embeds = teacher.udon(self._prepared(pixel_values, teacher)).image_embeds
        return cosine_logits(embeds, teacher.prototypes)

    def _map(
        self, seen: torch.Tensor, labels: torch.Tensor, teacher: OnlineTeacher, of_teacher: Any, outputs: Any
    ) -> dict[str, torch.Tensor]:
        """Trains the map that stands for some of the teacher's blocks, and the student's tokens to follow it."""
        assert teacher.map is not None, "made for this term"
        blocks = blocks_of(teacher.udon.backbone)
        first, last = mapped_blocks(self.adaptation, len(blocks))
        with blocks_replaced(blocks, first, last, teacher.map) as bottlenecks:
            mapped = teacher.udon(seen)
        number, own = len(labels), of_teacher.last_hidden_state
        on_source = self._cosines(mapped.image_embeds[:number], teacher.prototypes)
        depth = len(outputs.hidden_states) - 1
        block = self.adaptation.student_block or max(1, round(depth * last / len(blocks)))
        tokens = patch_tokens(self.udon.backbone, outputs.hidden_states[block])
        return {
            "mapping": self._terms.classification(on_source, labels)
            + F.mse_loss(mapped.last_hidden_state.float(), own.detach().float()),
            "feature_distillation": token_distance(
                tokens.float(), patch_tokens(teacher.udon.backbone, bottlenecks[0]).float()
            ),
        }

    def _confusion(self, features: torch.Tensor, number: int, critic: nn.Module | None) -> torch.Tensor:
        """Domain confusion of unit-norm features: the source's first, then the target's."""
        share = confusion_share(self.progress)
        with torch.autocast(features.device.type, enabled=False):
            return self._confused(features, number, critic, share)

    def _confused(self, features: torch.Tensor, number: int, critic: nn.Module | None, share: float) -> torch.Tensor:
        if critic is None:
            source, target = features[:number], features[number:]
            if self.peers is None:
                return share * mmd_loss(source, target)
            banks = (self.peers.gather(source.detach()), self.peers.gather(target.detach()))
            return share * mmd_loss(source, target, *banks, self.peers.rank * number)
        logits = critic(reverse_gradient(features, share))
        return domain_classification_loss(logits[:number], logits[number:])

    def _affinity(self, outputs: Any, student: Cosines, number: int) -> dict[str, torch.Tensor]:
        """Similarities of neighbours: those of source and target made alike, those in the target made to agree."""
        options = self.adaptation
        if not options.affinity_alignment + options.affinity_cleaning:
            return {}
        losses, scale = {}, self._scale(student)
        if options.affinity == "batch":
            source, target = student.embeds[:number], student.embeds[number:]
            affinities = [affinity_of_batch(source), affinity_of_batch(target)]
            probabilities = (scale * _of_all(student)[number:]).softmax(1)
            cleaning = cleaning_of_batch(probabilities, target)
        else:
            maps = patch_grid(self.udon.backbone, outputs.last_hidden_state.float())
            patches = F.normalize(maps.flatten(2).transpose(1, 2), dim=-1)
            embeds = self.udon.student_head(patches)  # (B, N, D) -> (B, N, embedding_dim)
            grid = embeds.transpose(1, 2).unflatten(2, maps.shape[2:])
            affinities = list(affinity_of_patches(grid).split(number))
            of_classes = cosine_logits(embeds[number:].flatten(0, 1), student.prototypes)
            probabilities = (scale * of_classes).softmax(1).unflatten(0, embeds[number:].shape[:2])
            cleaning = cleaning_of_patches(probabilities.transpose(1, 2).unflatten(2, maps.shape[2:]))
        if options.affinity_cleaning:
            losses["affinity_cleaning"] = cleaning
        if self.affinity_critic is not None:
            # The weight is in the reversal: the critic itself learns at full strength.
            factor = options.affinity_alignment * (1 - self.progress)
            logits = [self.affinity_critic(reverse_gradient(one, factor)) for one in affinities]
            losses["affinity_alignment"] = domain_classification_loss(*logits)
        return losses

    def _aggregate(self, outputs: Any, student: Cosines, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The branches' own classification, that of their aggregate, and the aggregate's distillation into them."""
        assert self.aggregator is not None, "made with the branches"
        number, cosines = len(labels), [student]
        branch: Branch
        for branch in self.branches:  # type: ignore[assignment]
            hidden = None if branch.depth is None else outputs.hidden_states[branch.depth]
            features = outputs.backbone_embeds if hidden is None else exit_features(self.udon, hidden)
            cosines.append(self._cosines(branch.head(features), branch.prototypes))
        on_source = [self._cosines(one.embeds[:number], one.prototypes) for one in cosines[1:]]
        logits = torch.stack([_of_all(one) for one in cosines], dim=1)  # K of (B, C) -> (B, K, C)
        weights = self.aggregator(patch_grid(self.udon.backbone, outputs.last_hidden_state.float()))
        aggregated, scale = aggregate(logits, weights), self._scale(student)
        return {
            "branch_classification": torch.stack([self._terms.classification(one, labels) for one in on_source]).sum(),
            "aggregate_classification": F.cross_entropy(scale * aggregated[:number], labels),
            "aggregate_distillation": aggregate_share(self.progress)
            * aggregate_distillation_loss(scale * logits, scale * aggregated),
        }

    def _weights(self) -> dict[str, float]:
        options, follows = self.adaptation, len(self.teachers) > 0 and self.adaptation.distillation > 0
        own = self.objective.student_classification
        weights = {"student_classification": own * (1 - options.alpha) if follows else own}
        if options.teachers_learn:
            weights["teacher_classification"] = 1.0
        if options.teacher_confusion:
            weights["teacher_confusion"] = options.teacher_confusion
        if follows:
            weights["distillation_source"] = options.distillation * options.alpha
        if follows and self.is_paired:
            weights["distillation_target"] = options.distillation
        if options.feature_distillation:
            weights |= {"mapping": 1.0, "feature_distillation": options.feature_distillation}
        if options.student_confusion:
            weights["student_confusion"] = options.student_confusion
        if options.affinity_cleaning:
            weights["affinity_cleaning"] = options.affinity_cleaning
        if options.affinity_alignment:
            weights["affinity_alignment"] = 1.0
        if self.branches:
            weights |= {"branch_classification": 1.0, "aggregate_classification": options.aggregate_classification}
            weights["aggregate_distillation"] = options.aggregate_distillation
        return weights | ({LARGEST_CLASS: 0.0} if self.is_paired else {})

    def _make_critics(self) -> tuple[DomainCritic | None, nn.Module | None]:
        options = self.adaptation
        confused = options.student_confusion > 0 and options.confusion == "dann"
        critic = DomainCritic(self.udon.feature_dim) if confused else None
        if not options.affinity_alignment:
            return critic, None
        return critic, PatchCritic() if options.affinity == "tokens" else DomainCritic(NUM_NEIGHBOURS)

    @property
    def _reads_tokens(self) -> bool:
        """Whether a term reads tokens between the blocks."""
        exits = any(branch.depth is not None for branch in self.branches)
        return exits or self.adaptation.feature_distillation > 0

    def _scale(self, cosines: Cosines) -> float:
        return float(self._terms.scale(cosines))

    def _prepared(self, pixel_values: torch.Tensor, teacher: OnlineTeacher) -> torch.Tensor:
        return prepared(pixel_values, self._statistics, teacher.statistics, pixel_values.shape[-1])

    def _cosines(self, embeds: torch.Tensor, prototypes: torch.Tensor) -> Cosines:
        with torch.autocast(embeds.device.type, enabled=False):
            return self._terms.cosines(embeds.float(), prototypes)


def mapped_blocks(options: AdaptationConfig, num_blocks: int) -> tuple[int, int]:
    """First and last block of a teacher, from 1, that a map stands for."""
    half = num_blocks // 2
    return options.mapped_blocks or (half + 1, max(half + 1, num_blocks * 3 // 4))


def _of_all(cosines: Cosines) -> torch.Tensor:
    assert cosines.logits is not None, "the config refuses chunks"
    return cosines.logits
