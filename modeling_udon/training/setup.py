"""Setup of a run: processes, model, preprocessing and sampler from a config."""

import math
import os
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import parse_flag_from_env
from torch import distributed
from transformers.utils import logging as transformers_logging

from modeling_udon.auto_classes import UdonModel
from modeling_udon.config import ConfigError, DataConfig, ModelConfig, TrainConfig
from modeling_udon.config_data import LEAST_AREA
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.data.augment import StrongTransform
from modeling_udon.data.domains import Domain
from modeling_udon.data.label_maps import label_maps
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.data.sampling import DomainBatchSampler
from modeling_udon.data.transforms import RandomTransform, TeacherCrop, TrainTransform
from modeling_udon.search.processes import start_accelerator
from modeling_udon.training.backbone import build_udon, channel_statistics, check_backbone, needs_interpolation
from modeling_udon.training.centring import add_centre
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.domain_weights import make_class_draws, make_weights
from modeling_udon.training.extension import load_start, old_student, open_start
from modeling_udon.training.feature_teachers import open_feature_teachers
from modeling_udon.training.inputs import inputs_of
from modeling_udon.training.lora import add_adapters
from modeling_udon.training.memory import describe_memory, estimate_prototypes, free_memory
from modeling_udon.training.parts import Peers
from modeling_udon.training.processes import make_host_gather
from modeling_udon.training.teachers import FrozenTeachers, OldStudent, load_frozen_teachers

# How long one process may keep the others waiting: a process that has died is noticed at once, one that hangs after
# this. The main process alone writes checkpoints and reports, which takes minutes at the most.
SILENCE = timedelta(minutes=10)
# Process groups of this process, for as long as it lives. The destructor of one joins threads that may wait for
# Python's lock; it gives the lock free when Python's own object goes last, but DDP's reducer holds the group too, and
# would destroy it with the lock in its hand, and wait for ever.
_GROUPS: list[Any] = []
_OF_THE_LAUNCHER = ("ACCELERATE_", "FSDP_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Starts Accelerate with the run's precision and trackers.

    Raises:
        ConfigError: If a tracker is not installed, which Accelerate would only warn of, the launch wants the whole
            model wrapped by FSDP, DeepSpeed or Megatron-LM, or it started processes that do not know of each other.
    """
    for tracker in config.log.trackers:
        if find_spec(tracker) is None:
            raise ConfigError(
                f"`log.trackers` must be installed. Got {tracker!r}, which is missing: "
                'pip install "modeling-udon[trackers]", or leave it out.'
            )
    _check_launcher(config)
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        # They would reduce or shard the heads of all domains, which the trainer itself reduces for one domain.
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ConfigError(
                f"`accelerate launch` must go without {name}, which would take the domains' heads as well. Got "
                f"ACCELERATE_USE_{name}=true; launch with configs/accelerate/multi_gpu.yaml and set "
                "`train.shard_backbone` to shard the backbone."
            )
    try:
        accelerator = start_accelerator(
            mixed_precision=config.train.mixed_precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=SILENCE)],
            log_with=list(config.log.trackers) or None,
            project_dir=str(config.run_dir) if config.log.trackers else None,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if distributed.is_initialized():
        _GROUPS.append(distributed.group.WORLD)
    return accelerator


def describe_launch(accelerator: Accelerator) -> dict[str, Any]:
    """Says how the processes of a run were started: how many, on what, with which variables of the launcher."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    variables = {key: value for key, value in sorted(os.environ.items()) if key.startswith(_OF_THE_LAUNCHER)}
    return {"processes": accelerator.num_processes, "device": name, "environment": variables}


def _check_launcher(config: TrainConfig) -> None:
    """Refuses what `accelerate launch` would set over the config's head, or what the config sets over the launcher's.

    Raises:
        ConfigError: If a variable of the launcher says other than the config.
    """
    precision = config.train.mixed_precision
    wanted: dict[str, tuple[set[str], str]] = {
        "GRADIENT_ACCUMULATION_STEPS": ({"1", "auto"}, "set `train.accumulation_steps`"),
        "MIXED_PRECISION": ({"no", precision}, f"set `train.mixed_precision`, which is {precision!r}"),
        "DYNAMO_BACKEND": ({"no"}, "set `train.compile`"),
    }
    for name, (agreeing, way) in wanted.items():
        value = os.environ.get(f"ACCELERATE_{name}", "")
        if value and value.lower() not in agreeing:
            raise ConfigError(
                f"`accelerate launch` must leave {name.lower()} to the config. Got ACCELERATE_{name}={value}; {way}, "
                "and launch without it."
            )


def make_peers(accelerator: Accelerator) -> Peers | None:
    """Returns what the processes of a run can ask each other; `None` where there is one."""
    if accelerator.num_processes == 1:
        return None
    return Peers(accelerator.gather, accelerator.process_index, make_host_gather(accelerator.num_processes, SILENCE))


def describe_prototypes(config: TrainConfig, domains: Mapping[str, Domain], accelerator: Accelerator) -> list[str]:
    """Says what the prototypes of a run will take of the memory that is free now."""
    learning = config.loss.needs_teachers and config.teachers is None
    # A process compares the images of all with its share of the classes.
    shards = accelerator.num_processes if config.train.shard_prototypes else 1
    estimate = estimate_prototypes(
        {name: -(-len(domain.classes) // shards) for name, domain in domains.items()},
        config.model.embedding_dim,
        config.model.teacher_dim if learning else 0,
        shards * config.train.batch_size // (accelerator.num_processes * config.train.accumulation_steps),
        config.loss,
        config.ablation.idle_heads == "coast",
        config.ablation.distill_through_backbone,
        len(config.model.matryoshka),
    )
    return describe_memory(estimate, free_memory(accelerator.device))


def build_model(
    config: TrainConfig, domains: Mapping[str, Domain], all_domains: Mapping[str, Domain], accelerator: Accelerator
) -> UdonForDistillation:
    """Builds the training model, with the generator seeded so that every process draws the same weights.

    Args:
        config: The run.
        domains: The domains that are trained on.
        all_domains: Those that are only measured among them.
        accelerator: The run's processes.

    Raises:
        ConfigError: If the backbone cannot be opened or built, its image size is not the data's, or the run to start
            from does not go with the config.
    """
    transformers_logging.disable_progress_bar()
    start = open_start(config)
    torch.manual_seed(config.seed)
    learning = config.loss.needs_teachers and config.teachers is None
    sizes = {
        "embedding_dim": config.model.embedding_dim,
        "teacher_dim": config.model.teacher_dim,
        "head_hidden_dims": config.model.head_hidden_dims,
        "head_bias": config.model.head_bias,
        "domains": {name: len(domain.classes) for name, domain in domains.items()} if learning else {},
        "pooling": config.model.pooling,
        "matryoshka_dims": config.model.matryoshka,
    }
    udon = open_udon(config.model, sizes, config.data.image_size, None if start is None else start.shape)
    old: OldStudent | None = None
    if start is not None:
        load_start(udon, start, domains, prefix="udon.")
        assert config.init is not None, "a start is opened for `init` alone"
        if config.init.retain > 0:
            old = old_student(udon, config.init.retain, config.train.heads_only)
    inputs = inputs_of(config)
    inputs.freeze(udon)
    statistics = channel_statistics(config, udon.config.backbone_config)[0]
    view_interpolates = _check_teacher_size(udon, config.data)
    model = UdonForDistillation(
        udon.config,
        config.loss,
        udon,
        num_classes={name: len(domain.classes) for name, domain in domains.items()},
        frozen_teachers=_frozen_teachers(config, domains, statistics),
        old_student=old,
        feature_teachers=open_feature_teachers(config, list(domains), udon, statistics),
        inputs=inputs,
        distill_through_backbone=config.ablation.distill_through_backbone,
        peers=make_peers(accelerator),
    )
    model.view_interpolates = view_interpolates
    if start is not None:
        load_start(model, start, domains)
    if config.model.lora is not None:
        # Last, since a start has the names of a plain backbone.
        add_adapters(udon.backbone, config.model.lora, inputs.adapted(udon.backbone))
    if config.model.centre_features:
        add_centre(model)
    return model


def open_udon(
    model: ModelConfig, sizes: dict[str, object], image_size: int, like: UdonConfig | None = None, prefix: str = ""
) -> UdonModel:
    """Opens a backbone with fresh heads, and checks that it takes the run's images.

    Args:
        model: Names the backbone.
        sizes: Values of `UdonConfig` other than the backbone.
        image_size: Side of the run's images in pixels.
        like: Shape of a student whose weights are still to come, in place of a backbone.
        prefix: Put before `backbone` where an error names the key.

    Raises:
        ConfigError: If it cannot be opened or built, or its image size is not the data's.
    """
    try:
        udon = build_udon(model, sizes, image_size) if like is None else _build_like(like, model, sizes, image_size)
    except Exception as error:  # On values that transformers does not expect it raises nearly every type there is.
        what = "backbone" if model.backbone else "backbone_config"
        reason = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"`model.{prefix}{what}` must be a vision encoder that opens. {reason[:400]}") from error
    check_backbone(udon, image_size)
    if model.gradient_checkpointing:
        # transformers 5 has another name for it, and warns about the one that transformers 4 has.
        enable = getattr(udon, "activation_checkpointing_enable", None) or udon.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return udon


def training_transform(data: DataConfig) -> RandomTransform:
    """The augmentation that the config asks for."""
    if data.augmentation == "strong":
        return StrongTransform(data.image_size, data.flip, LEAST_AREA["strong"])
    return TrainTransform(data.image_size, flip=data.flip)


def teacher_transform(data: DataConfig) -> RandomTransform:
    """The view of the same image that teachers have, from the same random numbers.

    Flip, turn and colours are the student's, since a student follows a teacher best on the same view (Beyer et al.,
    arXiv 2106.05237); the crop may be larger (as in DINO, arXiv 2104.14294) but holds the student's.
    """
    size, area = data.teacher_size, data.teacher_area or LEAST_AREA[data.augmentation]
    own = training_transform(data)
    if isinstance(own, StrongTransform):
        return own.for_teacher(size, area)
    assert isinstance(own, TrainTransform), "there are two"
    return TeacherCrop(own, size, round(size / math.sqrt(area)))


def make_sampler(
    config: TrainConfig, domains: Mapping[str, Domain], accelerator: Accelerator, other_seed: int = 0
) -> DomainBatchSampler:
    """Makes the sampler of this process.

    Args:
        config: The run.
        domains: The domains that it draws from.
        accelerator: The run's processes.
        other_seed: Added to the config's seed, for a second sampler.

    Raises:
        ConfigError: If the batch does not go with the domains, the processes or the accumulation.
    """
    sizes = {name: len(domain.images) for name, domain in domains.items()}
    train = config.train
    share = accelerator.num_processes * train.accumulation_steps
    if train.batch_size % share:
        raise ConfigError(
            "`train.batch_size` must be a multiple of processes x `train.accumulation_steps`. "
            f"Got {train.batch_size} with {accelerator.num_processes} x {train.accumulation_steps}."
        )
    num_steps = train.num_steps
    if num_steps is None:
        assert train.num_epochs is not None, "checked by the config"
        num_steps = math.ceil(train.num_epochs * sum(sizes.values()) / train.batch_size)
    try:
        return DomainBatchSampler(
            sizes,
            num_steps,
            train.batch_size,
            strategy=config.sampling.strategy,
            update_every=config.sampling.update_every,
            seed=config.seed + other_seed,
            weights=config.sampling.weights,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            row_groups={name: domain.row_groups for name, domain in domains.items() if domain.row_groups is not None},
            adaptive=make_weights(config, domains),
            class_draws=make_class_draws(config, domains),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_teacher_size(udon: UdonModel, data: DataConfig) -> bool | None:
    """Whether the backbone has to interpolate for the teachers' view; `None`: as for the student's.

    Raises:
        ConfigError: If it does not take images of that size.
    """
    if data.teacher_image_size is None:
        return None
    key = "data.teacher_image_size"
    try:
        interpolates = needs_interpolation(udon.config.backbone_config, data.teacher_image_size, key)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_backbone(udon, data.teacher_image_size, key, interpolates)
    return interpolates


def _frozen_teachers(
    config: TrainConfig, domains: Mapping[str, Domain], statistics: ChannelStatistics
) -> FrozenTeachers | None:
    if not config.teacher_runs:
        return None
    try:
        return load_frozen_teachers(config.teacher_runs, label_maps(domains), statistics)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"`teachers` must be runs with trained teachers. {' '.join(str(error).split())}") from error


def _build_like(shape: UdonConfig, model: ModelConfig, sizes: dict[str, object], image_size: int) -> UdonModel:
    """A model with the backbone of a student, whose weights are still to come.

    Raises:
        ValueError: If the config asks for another feature of it, or other layers.
    """
    for name, own in (
        ("pooling", shape.pooling),
        ("keep_layers", getattr(shape.backbone_config, "num_hidden_layers", None)),
    ):
        if (wanted := getattr(model, name)) not in (None, own):
            raise ValueError(
                f"`model.{name}` must be that of the run in `init.run`, {own}. Got {wanted}; leave it out."
            )
    kept = {name: getattr(shape, name) for name in ("pooling", "token_norm", "feature_dim")}
    interpolates = shape.interpolate_pos_encoding or needs_interpolation(shape.backbone_config, image_size)
    values = sizes | kept | {"attn_implementation": model.attn_implementation}
    return UdonModel(
        UdonConfig(backbone_config=shape.backbone_config, interpolate_pos_encoding=interpolates, **values)  # type: ignore[arg-type]
    )
