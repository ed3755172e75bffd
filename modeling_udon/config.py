"""Training configuration: typed, frozen, checked sections, which `config_file.py` reads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modeling_udon.config_adaptation import AdaptationConfig
from modeling_udon.config_sections import (
    AblationConfig,
    DataConfig,
    FrozenTeacherConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SamplingConfig,
    Section,
)
from modeling_udon.domain_spec import DomainSpec, check_domain_name
from modeling_udon.systems import SystemName
from modeling_udon.text import printable


class ConfigError(ValueError):
    """A config that cannot be used; its message is one line for the user, whatever its values hold."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class TrainSection(Section):
    """Length and shape of the run."""

    num_steps: int | None = Field(None, gt=0, le=10**12)
    """Optimiser steps."""
    num_epochs: float | None = Field(None, gt=0, le=10**6)
    """Passes over as many images as all domains have together, instead of `num_steps`."""
    batch_size: int = Field(128, gt=1)
    """Images of one optimiser step, over all processes and accumulated batches."""
    accumulation_steps: int = Field(1, gt=0)
    """Parts into which each process cuts its share of the batch; more parts need less memory."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the backbone's arithmetic; losses and weights stay float32."""
    compile: bool = False
    """Whether the backbone is compiled by torch."""
    shard_backbone: bool = False
    """Whether each process keeps only its part of the backbone's weights, gradients and moments (FSDP2)."""
    shard_prototypes: bool = False
    """Whether each process keeps only its share of the classes' prototypes, with their gradients and moments."""
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between two checkpoints; there is always one at the end."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many checkpoints are kept."""
    max_nonfinite: int = Field(5, gt=0)
    """Steps in a row whose loss or gradient is not finite, which are not applied, that end the run."""
    keep_teachers: bool = False
    """Whether the teacher heads go out with the student in `best/`."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of a moving average of the student's weights, which is measured and published in their place; `null`: none.
    """
    heads_only: bool = False
    """Whether the backbone stays as it is: its features of all training images are computed once and kept on disk."""
    feature_views: int = Field(1, gt=0)
    """Views of each image whose features are kept: first that of the evaluation, then random ones as in training."""
    feature_cache: Path | None = None
    """Folder of the features, which several runs may share; `null`: `features` in the run's folder."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, precision: Any) -> Any:
        # YAML reads `no` as false.
        return "no" if precision is False else precision

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give either `num_steps` or `num_epochs`, not both")
        return self

    @model_validator(mode="after")
    def _shards_fit(self) -> "TrainSection":
        if self.shard_backbone and (self.mixed_precision == "fp16" or self.compile):
            raise ValueError("`shard_backbone` must go with `mixed_precision` 'no' or 'bf16' and without `compile`")
        if self.shard_backbone and self.heads_only:
            raise ValueError(
                "`heads_only` must go without `shard_backbone`; a backbone at rest has nothing to share out"
            )
        return self


class EvalConfig(Section):
    """Validation on the way and the test at the end."""

    every: int = Field(1000, gt=0)
    """Steps between two validations; the start and the end are always measured."""
    batch_size: int = Field(128, gt=0)
    """Images of one forward pass on each process."""
    metric: str = "R@1"
    """What the best student is chosen by, its mean over the domains on the merged index: `R@k`, `mMP@k` or `mAP@R`."""
    max_images: int | None = Field(None, gt=1)
    """About so many queries of each domain at a validation: whole classes, drawn by the seed; the test is always whole.
    `null` takes all."""
    patience: int | None = Field(None, gt=0)
    """Validations in a row without a better student that end the run early; `null` never does."""
    baselines: bool = True
    """Whether the untrained backbone and raw pixels are scored on the test split as well, before the first step."""

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if not re.fullmatch(r"(R|mMP)@[1-9]\d*|mAP@R", metric):
            raise ValueError("must be `R@k` or `mMP@k` with k from 1, or `mAP@R`")
        return metric


class LogConfig(Section):
    """Where progress is told."""

    every: int = Field(50, gt=0)
    """Steps between two lines of `metrics.jsonl`, the log and the trackers."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that get the same numbers, through Accelerate."""
    project: str = "udon"
    """The trackers' project."""


class PushConfig(Section):
    """Where the student goes when the run has ended."""

    repo: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository on the Hub, `owner/name`; `null` publishes nothing."""
    private: bool = False
    """Whether a repository that is made for it is private."""
    revision: str | None = None
    """Branch to commit to, made if need be; `null` is the main one."""
    tag: str | None = None
    """Tag of the commit; `null` makes one of the files' contents."""
    gallery: bool = False
    """Whether small pictures of the test split are published with the card."""
    license: str | None = None
    """Licence of the model, as the Hub calls it; `null` derives it from those of the backbone and the data."""


class InitConfig(Section):
    """A trained run to go on from, with more domains or the same."""

    run: Path
    """Folder of the run: its best student is where this one starts, with the teachers and prototypes it has."""
    old_data: Literal["replay", "measure", "none"] = "replay"
    """Data of the run's own domains: trained on as well, only to measure what is forgotten, or not available."""
    retain: float = Field(1.0, ge=0)
    """Weight of the term that holds the student's embeddings to those of the run's student; 0 leaves it out."""


def check_adaptation(config: "TrainConfig") -> None:
    """Refuses what does not go with `adaptation`.

    Raises:
        ValueError: If there is something.
    """
    assert config.adaptation is not None, "asked for with it alone"
    parts = {
        "loss.classifier": config.loss.classifier == "joint",
        "loss.chunk_size": config.loss.chunk_size is not None,
        "loss.sampled_classes": config.loss.sampled_classes is not None,
        "loss.scale_by": config.loss.scale_by == "adacos",
        "loss.retention": config.loss.retention > 0,
        "loss.student_classification": config.loss.student_classification == 0,
        "train.heads_only": config.train.heads_only,
        "train.shard_backbone": config.train.shard_backbone,
        "train.accumulation_steps": config.train.accumulation_steps > 1,
        "model.lora": config.model.lora is not None,
        "model.centre_features": config.model.centre_features,
        "data.targets": config.data.targets == "images",
        "init": config.init is not None,
        "frozen_teachers": len(config.frozen_teachers) > 0,
    }
    if named := [f"`{name}`" for name, is_set in parts.items() if is_set]:
        raise ValueError(f"{', '.join(named)} must be left as it is by default with `adaptation`")
    if config.loss.needs_teachers or config.ablation.idle_heads != "hold":
        raise ValueError("`loss` must have no teacher terms and `ablation.idle_heads` be 'hold' with `adaptation`")
    if config.sampling.strategy != "round_robin":
        raise ValueError("`sampling.strategy` must be 'round_robin' with `adaptation`; leave it out")
    has_backbone = config.model.teacher_backbone is not None or config.model.teacher_backbone_config is not None
    if has_backbone != config.adaptation.teachers_learn:
        raise ValueError(
            "`model.teacher_backbone` or `model.teacher_backbone_config` must be given where `adaptation.teachers` is "
            "'shared' or 'separate', and nowhere else"
        )
    if config.optim.student_share is not None and not has_backbone:
        raise ValueError("`optim.student_share` must be null without teachers that learn in `adaptation`")


class TrainConfig(Section):
    """A run."""

    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    output_dir: Path = Path("runs")
    """Folder of the runs."""
    seed: int = Field(0, ge=0, lt=2**30)
    """Seed of everything that is drawn."""
    domains: dict[str, DomainSpec] = Field(min_length=1)
    """Domains by name; a plain string stands for `path`."""
    system: SystemName = "udon"
    """Which system is trained: it sets what makes it up in `loss`, `sampling` and `frozen_teachers`."""
    teachers: Path | dict[str, Path] | None = None
    """Run, or a run for each domain, whose teachers stand for learning ones; for system `separate_teachers`."""
    frozen_teachers: tuple[FrozenTeacherConfig, ...] = ()
    """Models that stay as they are and whose similarities, or class probabilities, the student follows."""
    init: InitConfig | None = None
    """Trained run that this one starts from; the command line's `--init` fills in its settings and domains too."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    adaptation: AdaptationConfig | None = None
    """Terms and teachers for domains without labels; `null`: all domains have labels."""
    sampling: SamplingConfig = SamplingConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainSection
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    push: PushConfig = PushConfig()
    ablation: AblationConfig = AblationConfig()

    @field_validator("domains", mode="before")
    @classmethod
    def _expand_domains(cls, domains: Any) -> Any:
        if not isinstance(domains, Mapping):
            return domains
        names = [check_domain_name(str(name)) for name in domains]
        specs = [{"path": spec} if isinstance(spec, str) else spec for spec in domains.values()]
        return dict(zip(names, specs, strict=True))

    @model_validator(mode="after")
    def _sections_fit(self) -> "TrainConfig":
        if self.sampling.strategy == "dynamic" and self.ablation.signal == "teacher" and not self.loss.needs_teachers:
            raise ValueError("`ablation.signal` must be 'student' where there is no teacher")
        if (self.teachers is not None) != (self.loss.needs_teachers and self.loss.teacher_classification == 0):
            raise ValueError(
                "`teachers` must name trained runs where `loss.teacher_classification` is 0 and distillation is not, "
                "and nowhere else"
            )
        if self.optim.skip_spikes is not None and self.train.mixed_precision == "fp16":
            raise ValueError(
                "`optim.skip_spikes` must be null for `train.mixed_precision` 'fp16', whose scaler skips steps by "
                "itself; use 'bf16'"
            )
        if isinstance(self.teachers, dict) and set(self.teachers) != set(self.domains):
            raise ValueError(f"`teachers` must name a run for each of {', '.join(self.domains)}")
        return self

    @model_validator(mode="after")
    def _backbone_can_change(self) -> "TrainConfig":
        if self.train.shard_backbone and (self.model.lora is not None or self.train.ema_decay is not None):
            raise ValueError("`train.shard_backbone` must go without `model.lora` and `train.ema_decay`")
        if self.train.heads_only and self.model.lora is not None:
            raise ValueError("`train.heads_only` must go without `model.lora`, which trains the backbone")
        return self

    @model_validator(mode="after")
    def _prototypes_can_be_cut(self) -> "TrainConfig":
        others = {
            "loss.sampled_classes": self.loss.sampled_classes is not None,
            "loss.classifier 'joint'": self.loss.classifier == "joint",
            "loss.scale_by 'adacos'": self.loss.scale_by == "adacos",
            "loss.gate": self.loss.gate != "none",
            "teachers": self.teachers is not None,
            "frozen_teachers with `logit`": any(teacher.logit for teacher in self.frozen_teachers),
            "init": self.init is not None,
            "adaptation": self.adaptation is not None,
            "train.shard_backbone": self.train.shard_backbone,
            "train.mixed_precision 'fp16'": self.train.mixed_precision == "fp16",
        }
        if self.train.shard_prototypes and (found := [name for name, there in others.items() if there]):
            raise ValueError(f"`train.shard_prototypes` must go without {', '.join(found)}")
        return self

    @model_validator(mode="after")
    def _features_suffice(self) -> "TrainConfig":
        if self.train.heads_only and self.teachers is not None:
            raise ValueError("`train.heads_only` must go without `teachers`, which have to see the images")
        return self

    @model_validator(mode="after")
    def _frozen_teachers_fit(self) -> "TrainConfig":
        if self.frozen_teachers and self.loss.student_classification == 0:
            raise ValueError("`frozen_teachers` must go with a student: `loss.student_classification` above 0")
        for number, teacher in enumerate(self.frozen_teachers):
            if teacher.model == "average" and self.train.ema_decay is None:
                raise ValueError(
                    f"`frozen_teachers.{number}.model` 'average' must go with `train.ema_decay`, such as 0.99"
                )
            if self.train.heads_only and teacher.sees == "crop" and teacher.model not in ("start", "average"):
                raise ValueError(
                    f"`frozen_teachers.{number}.sees` must be 'image' with `train.heads_only`, which sees no crops"
                )
        rests = self.train.heads_only or self.model.lora is not None
        if self.loss.retention and (rests or self.train.shard_backbone):
            raise ValueError(
                "`loss.retention` must be 0 with `train.heads_only`, `model.lora` or `train.shard_backbone`: the "
                "backbone's weights rest, or are in shards"
            )
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> "TrainConfig":
        unlabelled = [name for name, spec in self.domains.items() if spec.labels == "none"]
        if unlabelled and self.adaptation is None and self.data.targets != "images":
            raise ValueError(
                f"`domains.{unlabelled[0]}.labels` must be 'column' for system {self.system!r}, or take a system for "
                "domains without labels, such as 'kd_stda', or `data.targets` 'images'"
            )
        if self.adaptation is None:
            if self.model.teacher_backbone or self.model.teacher_backbone_config or self.optim.student_share:
                raise ValueError(
                    "`model.teacher_backbone`, `model.teacher_backbone_config` and `optim.student_share` must go with "
                    "`adaptation`"
                )
            return self
        if len(unlabelled) == len(self.domains):
            raise ValueError("`domains` must name one with labels at least; leave out its `labels` 'none'")
        if self.adaptation.needs_targets and not unlabelled:
            raise ValueError("`domains` must name one with `labels` 'none' for a term that looks at targets")
        check_adaptation(self)
        return self

    @model_validator(mode="after")
    def _old_run_stays(self) -> "TrainConfig":
        if self.init is not None and self.init.run.resolve() == self.run_dir.resolve():
            raise ValueError(
                f"`name` must be another than that of the run in `init.run`, {self.name!r}; give --name NEW"
            )
        return self

    @property
    def teacher_runs(self) -> dict[str, Path]:
        """Run of the trained teacher of each domain; empty where teachers learn or there are none."""
        if self.teachers is None:
            return {}
        return self.teachers if isinstance(self.teachers, dict) else dict.fromkeys(self.domains, self.teachers)

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output_dir / self.name
