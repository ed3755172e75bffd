"""Section of the training configuration for domains without labels: what is adapted, by which terms and teachers."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from modeling_udon.config_sections import Section


class BranchConfig(Section):
    """One more student that learns beside the published one."""

    depth: int | None = Field(None, gt=0)
    """Blocks of the backbone that it uses; `null`: all, so that it is one more head."""
    embedding_dim: int | None = Field(None, gt=0)
    """Size of its embedding; `null`: that of the student."""


class AdaptationConfig(Section):
    """Domains without labels (`labels: none`) learn from those with labels, which share one class space."""

    use_targets: bool = True
    """Whether the images of domains without labels are trained on."""
    confusion: Literal["dann", "mmd"] = "mmd"
    """What makes features of source and target alike: gradient reversal, or the maximum mean discrepancy."""
    student_confusion: float = Field(0.0, ge=0)
    """Weight of the confusion of the student's features."""
    teacher_confusion: float = Field(0.0, ge=0)
    """Weight of the confusion of the teachers' features."""
    teachers: Literal["none", "shared", "separate", "adapted"] = "none"
    """Teachers with a backbone of their own (`model.teacher_backbone`) that learn too: one, or one for each target; or
    `adapted`: the student of a finished run, `teacher_run`, which stays as it is."""
    teacher_run: Path | None = None
    """Finished run with `adaptation` and the same classes, whose student is the teacher."""
    combine: Literal["alternating", "average"] = "alternating"
    """What the student follows on a target: its own teacher, or the mean probabilities of all teachers."""
    distillation: float = Field(1.0, ge=0)
    """Weight of the distillation of the teachers' class probabilities; 0 leaves it out."""
    alpha: float = Field(0.3, ge=0, le=1)
    """On the source, share of distillation; the rest is the student's own classification."""
    temperature: float = Field(20.0, gt=0)
    """Divisor of the logits (cosines times `loss.scale`) in distillation, whose square is a factor on it."""
    affinity: Literal["batch", "tokens"] = "batch"
    """Neighbours whose similarities are compared: images of the batch, or patches beside each other."""
    affinity_cleaning: float = Field(0.0, ge=0)
    """Weight of the disagreement of neighbours in the target."""
    affinity_alignment: float = Field(0.0, ge=0)
    """Weight at which similarities of neighbours are made alike in source and target, which falls to 0."""
    feature_distillation: float = Field(0.0, ge=0)
    """Weight of the distance of the student's tokens to those of the teacher's mapped blocks."""
    mapped_blocks: tuple[PositiveInt, PositiveInt] | None = None
    """First and last block of the teacher that a small map stands for; `null`: the third quarter of them."""
    student_block: int | None = Field(None, gt=0)
    """Block of the student whose tokens follow the map; `null`: at the same share of the depth as the last of them."""
    branches: tuple[BranchConfig, ...] = ()
    """Further students that learn beside the published one, and from an aggregate of all."""
    aggregate_classification: float = Field(6.0, ge=0)
    """Weight of the classification loss of the aggregate."""
    aggregate_distillation: float = Field(5.0, ge=0)
    """Weight of the distillation of the aggregate into every branch, once it has risen."""
    max_collapsed: int = Field(500, gt=0)
    """Steps in a row in which the student takes all target images for one class that end the run."""

    @property
    def teachers_learn(self) -> bool:
        """Whether there are teachers that learn with the student."""
        return self.teachers in ("shared", "separate")

    @property
    def needs_targets(self) -> bool:
        """Whether any term makes no sense without images of a domain without labels."""
        confusion = self.student_confusion + self.teacher_confusion
        affinity = self.affinity_cleaning + self.affinity_alignment
        return self.teachers == "separate" or confusion + affinity > 0

    @model_validator(mode="after")
    def _terms_fit(self) -> "AdaptationConfig":
        if self.needs_targets and not self.use_targets:
            raise ValueError("`use_targets` must be true where a term looks at targets; set its weight to 0")
        if not self.teachers_learn and self.teacher_confusion + self.feature_distillation > 0:
            raise ValueError(
                "`teachers` must be 'shared' or 'separate' where `teacher_confusion` or `feature_distillation` is "
                "above 0"
            )
        if (self.teachers == "adapted") != (self.teacher_run is not None):
            raise ValueError("`teacher_run` must name a finished run where `teachers` is 'adapted', and nowhere else")
        if self.combine == "average" and (self.teachers != "separate" or self.distillation == 0):
            raise ValueError("`combine` 'average' must go with `teachers` 'separate' and `distillation` above 0")
        if self.mapped_blocks is not None and self.mapped_blocks[0] > self.mapped_blocks[1]:
            raise ValueError(f"`mapped_blocks` must be the first and the last block. Got {list(self.mapped_blocks)}")
        return self
