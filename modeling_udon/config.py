"""What a run can be told: typed, frozen, checked sections; `config_file.py` reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from modeling_udon.domain_spec import DomainSpec, check_domain_name
from modeling_udon.systems import SystemName
from modeling_udon.text import printable


class ConfigError(ValueError):
    """A config that cannot be used; its message is one line for the user, whatever its values hold."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, infinite and undefined numbers too."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The backbone and the heads."""

    backbone: str | None = None
    """Trained vision encoder to start from: a Hub id or a folder; a UDON model stands for its backbone."""
    revision: str | None = None
    """Commit, tag or branch of `backbone` on the Hub."""
    trust_remote_code: bool = False
    """Whether code that comes with `backbone` may run."""
    backbone_config: dict[str, Any] | None = None
    """Vision encoder to train from scratch: its `model_type` and values of its configuration."""
    pooling: Literal["cls", "pooler"] | None = None
    """What of the backbone's output is the image's feature; `null` takes the class token after the last norm."""
    embedding_dim: int = Field(64, gt=0)
    """Size of the student embedding."""
    teacher_dim: int = Field(256, gt=0)
    """Size of the teacher embeddings."""
    head_hidden_dims: tuple[PositiveInt, ...] = ()
    """Widths of the hidden layers of every head; empty for linear heads."""
    head_bias: bool = True
    """Whether the last layer of every head has a bias."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """How attention is computed."""
    gradient_checkpointing: bool = False
    """Whether activations are computed anew in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _one_backbone(self) -> "ModelConfig":
        if (self.backbone is None) == (self.backbone_config is None):
            raise ValueError("name either `backbone` (a trained one) or `backbone_config` (from scratch), not both")
        return self


class DataConfig(Section):
    """From encoded images to batches."""

    image_size: int = Field(224, gt=0)
    """Side of the square images that the model sees, in pixels."""
    augmentation: Literal["crop", "strong"] = "crop"
    """`crop`: the paper's square, crop and flip; `strong`: crops of many sizes, turned, other colours, parts erased."""
    targets: Literal["classes", "images"] = "classes"
    """What is told apart in training: the data's classes, or each image by itself, which needs no labels."""
    flip: bool = True
    """Whether half of the training images are mirrored; false where left and right matter, as in letters."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of each channel of images in 0..1; `null`: CLIP's for CLIP backbones, 0.5 elsewhere."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of each channel; `null` as for `image_mean`."""
    max_broken_share: float = Field(0.01, ge=0, lt=1)
    """Share of the images drawn from a domain (of 1,000 at least) that may be broken and replaced; 0: not one."""
    num_workers: int = Field(2, ge=0)
    """Processes that decode images, for each training process."""


class LossConfig(Section):
    """The objective; every term can be weighted."""

    classifier: Literal["separate", "joint"] = "separate"
    """What the student tells apart in its classification: the classes of a domain, or those of all domains."""
    kind: Literal["normface", "cosface", "arcface"] = "normface"
    """Margin of the classification loss."""
    scale: float = Field(16.0, gt=0)
    """Factor on the cosines in the classification loss."""
    margin: float = Field(0.0, ge=0)
    """Margin of cosface (a cosine) or arcface (radians)."""
    student_temperature: float = Field(0.1, gt=0)
    """Divisor of the student's cosines in logit distillation."""
    teacher_temperature: float = Field(0.1, gt=0)
    """Divisor of the teacher's cosines in logit distillation."""
    student_classification: float = Field(1.0, ge=0)
    """Weight of the student's classification loss."""
    teacher_classification: float = Field(1.0, ge=0)
    """Weight of the teacher's classification loss."""
    logit_distillation: float = Field(1.0, ge=0)
    """Weight of the distillation of class probabilities."""
    relational_distillation: float = Field(1.0, ge=0)
    """Weight of the distillation of similarities."""
    chunk_size: int | None = Field(None, gt=0)
    """Classes whose cosines are held at a time; `null` holds those of all, which costs memory with many classes."""
    sampled_classes: int | float | None = None
    """Classes of its domain that a batch is told apart from: a number or a share; its own are always among them."""

    @property
    def needs_teachers(self) -> bool:
        """Whether any term has a teacher in it."""
        return self.teacher_classification + self.logit_distillation + self.relational_distillation > 0

    def weights(self) -> dict[str, float]:
        """Returns the weight of each term by its name."""
        return {
            "student_classification": self.student_classification,
            "teacher_classification": self.teacher_classification,
            "logit_distillation": self.logit_distillation,
            "relational_distillation": self.relational_distillation,
        }

    @field_validator("sampled_classes")
    @classmethod
    def _number_or_share(cls, classes: int | float | None) -> int | float | None:
        number = isinstance(classes, int) and classes >= 2
        if classes is not None and not number and not (isinstance(classes, float) and 0 < classes <= 1):
            raise ValueError("must be a number of classes, an integer from 2 on, or a share above 0.0 and up to 1.0")
        return classes

    @model_validator(mode="after")
    def _usable(self) -> "LossConfig":
        if sum(self.weights().values()) == 0:
            raise ValueError("at least one term must have a weight above 0")
        if self.kind == "normface" and self.margin != 0:
            raise ValueError("`margin` must be 0 for kind 'normface'; use 'cosface' or 'arcface'")
        if self.classifier == "joint" and self.needs_teachers:
            raise ValueError("`classifier` 'joint' must go without teachers, whose classes are those of one domain")
        if self.classifier == "joint" and self.sampled_classes is not None:
            raise ValueError(
                "`sampled_classes` must be left out for `classifier` 'joint'; `chunk_size` saves memory too"
            )
        return self


class SamplingConfig(Section):
    """Which domain each step takes."""

    strategy: Literal["dynamic", "round_robin", "balanced", "dataset_size", "fixed"] = "dynamic"
    """`dynamic` gives more steps to domains whose loss is higher."""
    update_every: int = Field(1000, gt=0)
    """Steps between two updates of the weights, over which steps are shared out exactly."""
    weights: dict[str, float] | None = None
    """Weight of each domain, for `fixed` alone."""


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-3, ge=0)
    """Learning rate of heads and prototypes."""
    backbone_lr: float = Field(1e-5, ge=0)
    """Learning rate of the backbone."""
    frozen_fraction: float = Field(0.2, ge=0, lt=1)
    """Share of the run in which the backbone's learning rate is 0 while its moments gather; 2 of 10 epochs."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(1e-6, ge=0)
    """Decoupled weight decay of every parameter."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rates after the warm-up; `cosine` ends at 0."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rates rise from 0."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Norm to which the gradient is clipped; `null`: never."""
    skip_spikes: float | None = Field(None, gt=1)
    """Steps whose gradient norm is more than so many times the domain's running norm are not applied; `null`: all are.
    """

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        # At a second beta of 0 a head's second moment would be gone after one idle step, and AdamW divides by it.
        if not (0 <= betas[0] < 1 and 0 < betas[1] < 1):
            raise ValueError("the first must be at least 0, the second above 0, both below 1")
        return betas


class AblationConfig(Section):
    """Parts of the method that can be switched off to measure what they do; the defaults are the method."""

    idle_heads: Literal["coast", "hold"] = "coast"
    """Heads of domains that are not in the batch: `coast` moves them on by their momentum, as in the original; `hold`
    leaves them as they are."""
    distill_through_backbone: bool = True
    """Whether the distillation terms train the backbone too, as in the original; false trains only the student's head
    by them."""
    distillation_ramp_steps: int = Field(0, ge=0)
    """Steps in which the weights of both distillation terms rise from 0; 0 gives them their full weight at once."""
    signal: Literal["teacher", "student"] = "teacher"
    """Head whose classification loss sets the weights of `sampling.strategy: dynamic`."""


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
    checkpoint_every: int = Field(1000, gt=0)
    """Steps between two checkpoints; there is always one at the end."""
    keep_checkpoints: int = Field(2, gt=0)
    """How many checkpoints are kept."""
    max_nonfinite: int = Field(5, gt=0)
    """Steps in a row whose loss or gradient is not finite, which are not applied, that end the run."""
    keep_teachers: bool = False
    """Whether the teacher heads go out with the student in `best/`."""
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
    license: str = "apache-2.0"
    """Licence of the model, as the Hub calls it."""


class InitConfig(Section):
    """A trained run to go on from, with more domains or the same."""

    run: Path
    """Folder of the run: its best student is where this one starts, with the teachers and prototypes it has."""
    old_data: Literal["replay", "measure", "none"] = "replay"
    """Data of the run's own domains: trained on as well, only to measure what is forgotten, or not at hand."""
    retain: float = Field(1.0, ge=0)
    """Weight of the term that holds the student's embeddings to those of the run's student; 0 leaves it out."""


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
    """Which system of the papers is trained: it sets what makes it up in `loss` and `sampling`."""
    teachers: Path | dict[str, Path] | None = None
    """Run, or a run for each domain, whose teachers stand for learning ones; for system `separate_teachers`."""
    init: InitConfig | None = None
    """Trained run that this one starts from; the command line's `--init` fills in its settings and domains too."""
    model: ModelConfig
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
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
    def _features_suffice(self) -> "TrainConfig":
        if self.train.heads_only and self.teachers is not None:
            raise ValueError("`train.heads_only` must go without `teachers`, which have to see the images")
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
