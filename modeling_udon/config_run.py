"""Sections of the training configuration around the method: length of a run, measuring, logging, where it goes."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modeling_udon.config_sections import Section


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
    trained_layers: int | None = Field(None, gt=0)
    """Last layers of a plain transformer that learn, with the norm after them; all before them stays as it is, and what
    it makes of every image is computed once and kept on disk. `null`: all layers learn."""
    feature_views: int = Field(1, gt=0)
    """Views of each image whose features or tokens are kept: first that of the evaluation, then random ones as in
    training."""
    feature_cache: Path | None = None
    """Folder of the features or tokens, which several runs may share; `null`: `features` in the run's folder."""

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

    @model_validator(mode="after")
    def _part_of_the_backbone(self) -> "TrainSection":
        others = ("heads_only", "shard_backbone", "compile")
        if self.trained_layers is not None and (found := [f"`{name}`" for name in others if getattr(self, name)]):
            raise ValueError(f"`trained_layers` must go without {', '.join(found)}; leave one of them out")
        return self

    @property
    def cached_by(self) -> str | None:
        """The key by which a part of the backbone stays as it is, so that steps see no images; `None` without one."""
        if self.heads_only:
            return "train.heads_only"
        return None if self.trained_layers is None else "train.trained_layers"


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
