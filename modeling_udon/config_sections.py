"""Sections of the training configuration that make up the method: model, loss, sampling, optimiser, ablations."""

from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, infinite and undefined numbers too."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds: one, one or `null`, or a list of them; `None` for a plain value."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


class LoraConfig(Section):
    """Low-rank adapters in a frozen backbone, under the names that PEFT gives; merged before anything goes out."""

    r: int = Field(8, gt=0)
    """Rank of an adapter."""
    lora_alpha: float = Field(16, gt=0)
    """An adapter is multiplied by this over `r`."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: tuple[str, ...] | None = None
    """Last names of the layers that get one; `null`: the query and value projections of all blocks."""


class ModelConfig(Section):
    """The backbone and the heads."""

    backbone: str | None = None
    """Trained vision encoder to start from: a Hub id, a folder or `timm:NAME`; a UDON model stands for its backbone."""
    revision: str | None = None
    """Commit, tag or branch of `backbone` on the Hub."""
    trust_remote_code: bool = False
    """Whether code that comes with `backbone` may run."""
    backbone_config: dict[str, Any] | None = None
    """Vision encoder to train from scratch: its `model_type` and values of its configuration."""
    pooling: Literal["cls", "mean", "cls+mean", "pooler"] | None = None
    """Feature of the backbone; `null` takes the one it was trained to give, mostly the class token after the norm."""
    embedding_dim: int = Field(64, gt=0)
    """Size of the student embedding."""
    matryoshka: tuple[PositiveInt, ...] = ()
    """Numbers of first dimensions of the student embedding that are trained to be an embedding by themselves."""
    teacher_dim: int = Field(256, gt=0)
    """Size of the teacher embeddings."""
    head_hidden_dims: tuple[PositiveInt, ...] = ()
    """Widths of the hidden layers of every head; empty for linear heads."""
    head_bias: bool = True
    """Whether the last layer of every head has a bias."""
    centre_features: bool = False
    """Whether the student's head learns as if the mean of the backbone's features before training were 0."""
    lora: LoraConfig | None = None
    """Adapters that are trained in the place of the backbone's own weights, such as `{r: 8}`; `null`: none."""
    keep_layers: int | None = Field(None, gt=0)
    """First layers of `backbone` that are kept, of a plain transformer; `null` keeps all."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    """How attention is computed; `null` leaves it to transformers, which takes the fastest that the backbone has."""
    teacher_backbone: str | None = None
    """Trained vision encoder that the teachers of `adaptation` start from, named as `backbone` is."""
    teacher_backbone_config: dict[str, Any] | None = None
    """Vision encoder of the teachers of `adaptation` from scratch, as in `backbone_config`."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass: less memory, about a third more time."""

    @model_validator(mode="after")
    def _of_a_trained_one(self) -> "ModelConfig":
        if self.keep_layers is not None and self.backbone is None:
            raise ValueError("`keep_layers` must go with `backbone`; `backbone_config` has `num_hidden_layers`")
        if self.keep_layers is not None and str(self.backbone).startswith("timm:"):
            raise ValueError("`keep_layers` must be left out for a model of timm")
        return self

    @model_validator(mode="after")
    def _nested(self) -> "ModelConfig":
        if list(self.matryoshka) != sorted({dim for dim in self.matryoshka if dim < self.embedding_dim}):
            raise ValueError(
                f"`matryoshka` must be ascending numbers below `embedding_dim`, {self.embedding_dim}. "
                f"Got {list(self.matryoshka)}"
            )
        return self

    @model_validator(mode="after")
    def _one_backbone(self) -> "ModelConfig":
        if (self.backbone is None) == (self.backbone_config is None):
            raise ValueError("name either `backbone` (a trained one) or `backbone_config` (from scratch), not both")
        if self.teacher_backbone is not None and self.teacher_backbone_config is not None:
            raise ValueError("name either `teacher_backbone` or `teacher_backbone_config`, not both")
        return self

    @model_validator(mode="after")
    def _bias_takes_the_mean(self) -> "ModelConfig":
        if self.centre_features and not (self.head_bias or self.head_hidden_dims):
            raise ValueError("`centre_features` must go with `head_bias`, which takes the mean up")
        return self


# What is taken from the true class's cosine, or added to its angle: beyond these no image could ever be right.
_LARGEST_MARGINS = {"cosface": 1.0, "arcface": 1.5}


class LossConfig(Section):
    """The objective; every term can be weighted."""

    classifier: Literal["separate", "joint"] = "separate"
    """Label space of the student's classifier: the classes of one domain, or those of all domains."""
    kind: Literal["normface", "cosface", "arcface"] = "normface"
    """Margin of the classification loss."""
    scale: float = Field(16.0, gt=0)
    """Factor on the cosines in the classification loss."""
    scale_by: Literal["fixed", "log_classes", "adacos"] = "fixed"
    """Whether `scale` is that of any number of classes, or of 1,000, and goes by the logarithm of their number; with
    `adacos` each classifier has its own, which follows its cosines (AdaCos), and `scale` is not read."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that goes to all classes equally."""
    subcenters: PositiveInt = 1
    """Prototypes of each class, of which the nearest counts; 3 in sub-centre ArcFace."""
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
    retention: float = Field(0.0, ge=0)
    """Weight of half the squared distance between the backbone's weights and those it started from."""
    gate: Literal["none", "per_image", "per_domain"] = "none"
    """Where logit distillation counts: everywhere, or only for the images, or in the domains, whose teacher classifies
    better than the student."""
    gate_by: Literal["loss", "margin"] = "loss"
    """What decides who classifies better: cross entropy, or the true class's probability minus the best other one's."""
    chunk_size: int | None = Field(None, gt=0)
    """Classes whose cosines are held at a time; `null` holds those of all, which costs memory with many classes."""
    sampled_classes: int | float | None = None
    """Number or share of its domain's classes that a batch is compared with; its own are always among them. With a
    joint classifier: of the classes of all other domains, beside all of its own."""

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
            raise ValueError(f"`margin` must be 0 for kind 'normface'. Got {self.margin:g}; use 'cosface' or 'arcface'")
        if self.kind != "normface" and not 0 < self.margin <= _LARGEST_MARGINS[self.kind]:
            raise ValueError(
                f"`margin` must be above 0 and at most {_LARGEST_MARGINS[self.kind]:g} for kind {self.kind!r}. "
                f"Got {self.margin:g}"
            )
        if self.gate != "none" and self.logit_distillation == 0:
            raise ValueError("`gate` must be 'none' where `logit_distillation` is 0; there is nothing to weigh")
        return self


class FrozenTeacherConfig(Section):
    """A model that stays as it is and whose features the student follows."""

    model: str = "start"
    """`start`, the run's own backbone before training; `average`, the moving average of the student, of
    `train.ema_decay`; a folder, a Hub id, a run or `timm:NAME`; a folder with `NAME.npy` for each domain: features of
    shape (training images, width), in the order of the data; or `text:NAME`, a model of sentences, which embeds the
    name of an image's class."""
    relational: float = Field(1.0, ge=0)
    """Weight of the distillation of its similarities."""
    logit: float = Field(0.0, ge=0)
    """Weight of the distillation of the class probabilities that the class means of its features give."""
    standardise: Literal["none", "mean", "mean_std"] = "none"
    """Whether the mean of its features is subtracted, and whether they are divided by their standard deviation as well;
    both are of the first 1,024 training images of each domain."""
    sees: Literal["image", "crop"] = "image"
    """`image`: every training image as the evaluation sees it, once, kept on disk; `crop`: the student's own crops, at
    every step. With `train.heads_only`, `start` sees what the student does in any case."""
    pooling: Literal["cls", "mean", "pooler"] | None = None
    """Feature of the model; `null` takes the one it was trained to give."""
    image_size: int | None = Field(None, gt=0, le=8192)
    """Side of the images that it sees, in pixels; `null`: its own."""
    revision: str | None = None
    """Commit, tag or branch of `model` on the Hub."""
    trust_remote_code: bool = False
    """Whether code that comes with `model` may run."""

    @property
    def reads_batches(self) -> bool:
        """Whether it embeds the images of every batch, by whatever backbone."""
        return self.model == "average" or self.sees == "crop"

    @model_validator(mode="after")
    def _has_a_say(self) -> "FrozenTeacherConfig":
        if self.relational + self.logit == 0:
            raise ValueError("`relational` or `logit` must be above 0, or the teacher has no say; leave it out")
        if self.logit and self.sees == "crop":
            raise ValueError("`logit` must go with `sees` 'image'; class means need the features of all images")
        if self.model in ("start", "average") and (self.pooling or self.image_size or self.revision):
            raise ValueError(f"`pooling`, `image_size` and `revision` must be left out for the model {self.model!r}")
        if self.model == "average" and (self.logit or self.standardise != "none"):
            raise ValueError("`logit` and `standardise` must be left out for the model 'average', which changes")
        if self.model.startswith("text:") and self.sees == "crop":
            raise ValueError("`sees` must be 'image' for a model of text, which sees none")
        return self


class SamplingConfig(Section):
    """Which domain each step takes."""

    strategy: Literal[
        "dynamic",
        "loss_over_log_c",
        "excess_loss",
        "learning_progress",
        "validation_gain",
        "round_robin",
        "balanced",
        "dataset_size",
        "fixed",
    ] = "dynamic"
    """`dynamic` gives more steps to domains whose loss is higher; the next four to those that can still learn: by the
    loss over the logarithm of their classes, above a reference run's, by its expected fall, by their score's gain."""
    update_every: int = Field(1000, gt=0)
    """Steps between two updates of the weights, over which steps are shared out exactly."""
    weights: dict[str, float] | None = None
    """Weight of each domain, for `fixed` alone."""
    reference: Path | dict[str, float] | None = None
    """For `excess_loss`: a reference loss of each domain, or the folder of a run that has had them."""
    uniform_share: float | None = Field(None, ge=0, le=1)
    """Share of the steps that all domains get equally, where weights change; `null`: 0 for `dynamic`, else 0.2."""
    images_per_class: PositiveInt | None = None
    """Images of a class that come side by side, with every class as often as any other; `null` takes every image once
    an epoch."""

    @model_validator(mode="after")
    def _reference_is_asked_for(self) -> "SamplingConfig":
        if (self.reference is not None) != (self.strategy == "excess_loss"):
            raise ValueError("`reference` must be given for strategy 'excess_loss' and for no other")
        return self


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-3, ge=0)
    """Learning rate of heads and prototypes."""
    backbone_lr: float = Field(1e-5, ge=0)
    """Learning rate of the backbone."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor on `backbone_lr` from each block to the one before it, so that early layers move less; `null`: none."""
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
    student_share: tuple[PositiveFloat, PositiveFloat] | None = None
    """Share of all learning rates that the student has at the start and at the end of the run, with a geometric course
    between them; teachers of `adaptation` have the rest. `null`: both have all."""
    skip_spikes: float | None = Field(None, gt=1)
    """Steps whose gradient norm is more than so many times the domain's running norm are not applied; `null`: all are.
    """

    @field_validator("student_share")
    @classmethod
    def _leaves_a_share(cls, share: tuple[float, float] | None) -> tuple[float, float] | None:
        if share is not None and max(share) > 1:
            raise ValueError("must be two shares above 0 and up to 1")
        return share

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
