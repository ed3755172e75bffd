"""Training configuration: typed, frozen, checked sections, which `config_file.py` reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from modeling_udon.config_adaptation import AdaptationConfig
from modeling_udon.config_data import DataConfig
from modeling_udon.config_run import EvalConfig, InitConfig, LogConfig, PushConfig, TrainSection
from modeling_udon.config_sections import (
    AblationConfig,
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
        "train.trained_layers": config.train.trained_layers is not None,
        "train.shard_backbone": config.train.shard_backbone,
        "train.accumulation_steps": config.train.accumulation_steps > 1,
        "model.lora": config.model.lora is not None,
        "model.centre_features": config.model.centre_features,
        "data.targets": config.data.targets == "images",
        "data.teacher_image_size": config.data.teacher_image_size is not None,
        "data.teacher_area": config.data.teacher_area is not None,
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
        if self.train.cached_by is not None and self.teachers is not None:
            raise ValueError(f"`{self.train.cached_by}` must go without `teachers`, which have to see the images")
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
            # Of features, the start sees what the student does; the average always does.
            alike = ("start", "average") if self.train.heads_only else ("average",)
            if self.train.cached_by is not None and teacher.sees == "crop" and teacher.model not in alike:
                raise ValueError(
                    f"`frozen_teachers.{number}.sees` must be 'image' with `{self.train.cached_by}`, which sees no "
                    "crops"
                )
        rests = self.train.heads_only or self.model.lora is not None
        if self.loss.retention and (rests or self.train.shard_backbone):
            raise ValueError(
                "`loss.retention` must be 0 with `train.heads_only`, `model.lora` or `train.shard_backbone`: the "
                "backbone's weights rest, or are in shards"
            )
        return self

    @model_validator(mode="after")
    def _teachers_see_their_view(self) -> "TrainConfig":
        if not self.data.has_teacher_view or self.adaptation is not None:
            return self
        key = "teacher_area" if self.data.teacher_image_size is None else "teacher_image_size"
        if not (self.has_teacher_view or any(teacher.model == "start" for teacher in self.frozen_teachers)):
            raise ValueError(
                f"`data.{key}` must go with teachers that see crops: of `loss`, of `teachers`, or in `frozen_teachers` "
                "'start', 'average' or `sees` 'crop'; leave it out"
            )
        if self.train.trained_layers is not None:
            raise ValueError(f"`data.{key}` must go without `train.trained_layers`, whose tokens are of one view")
        if self.loss.student_classification == 0 or self.train.keep_teachers:
            raise ValueError(
                f"`data.{key}` must go with a student, `loss.student_classification` above 0, and without "
                "`train.keep_teachers`, since images are prepared for the student wherever teachers are given out"
            )
        if key == "teacher_area" and self.train.heads_only and self.train.feature_views == 1:
            raise ValueError(
                "`data.teacher_area` must go with `train.feature_views` above 1 where `train.heads_only` is true: the "
                "first view is the whole image for both"
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
    def has_teacher_view(self) -> bool:
        """Whether each batch comes with a second view of its images, which teachers see."""
        reads = self.loss.needs_teachers or any(teacher.reads_batches for teacher in self.frozen_teachers)
        if self.train.heads_only:
            reads = reads or any(teacher.model == "start" for teacher in self.frozen_teachers)
        return self.data.has_teacher_view and reads

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
