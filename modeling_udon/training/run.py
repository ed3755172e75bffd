"""A run in its order of making: domains, sampler, model, processes, optimiser, state, folder."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import dump_config
from modeling_udon.data.class_space import with_shared_classes
from modeling_udon.data.dataset import DomainBatch
from modeling_udon.data.domains import Domain, open_domain, with_images_as_classes
from modeling_udon.data.doubts import find_doubts
from modeling_udon.data.folders import describe_passed_over
from modeling_udon.data.preprocessing import ChannelStatistics
from modeling_udon.data.sampling import DomainBatchSampler
from modeling_udon.training.adaptation_setup import build_adaptation, classified_domains, is_paired
from modeling_udon.training.average import StudentAverage
from modeling_udon.training.backbone import channel_statistics
from modeling_udon.training.checkpoint import CheckpointError, TrainState, load_checkpoint
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.extension import labelled_domains, trained_domains
from modeling_udon.training.optimization import IdleHeads, frozen_steps, learning_rates, make_optimizer
from modeling_udon.training.processes import Agreement, on_main
from modeling_udon.training.resuming import leaves
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.run_lock import FolderInUseError
from modeling_udon.training.sampled_classes import SampledClasses
from modeling_udon.training.setup import (
    SILENCE,
    build_model,
    describe_launch,
    describe_prototypes,
    make_accelerator,
    make_sampler,
)
from modeling_udon.training.sharing import share_model, start_equal
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.skipped import StepGuard

# What of the work on the folder every process has to know.
_SOURCES = 2**30  # Beyond the config's seeds: sources are drawn in other orders than targets.
_FOLDER_ERRORS = (ConfigError, CheckpointError, FolderInUseError, OSError)


@dataclass(frozen=True)
class Run:
    """What a config becomes: all objects that training works with, ready for the next step.

    Attributes:
        config: The run's configuration.
        folder: Its folder, locked.
        signals: The signals that end it.
        agreement: Ends all processes at the same place.
        accelerator: Its processes.
        domains: All opened domains by name, those that are only measured among them.
        sampler: Draws the batches and counts the steps.
        model: The training model.
        wrapped: The same model as the processes share it: the one to call for a gradient.
        optimizer: AdamW.
        wrapped_optimizer: The same, which a gradient scaler may hold back.
        shared_heads: Heads of all domains whose gradients nobody averages over processes, see `share_model`.
        guard: Decides whether a step is applied.
        idle_heads: Moves the heads of domains that are not in the batch.
        sampled_classes: Cuts a step down to some classes.
        average: Average of the student's weights.
        statistics: Channel statistics that the model is trained with.
        state: What the run goes on from; the start, if it is new.
        checkpoint: Folder of the checkpoint that it goes on from, if any.
    """

    config: TrainConfig
    folder: RunFolder
    signals: StopSignals
    agreement: Agreement
    accelerator: Accelerator
    domains: dict[str, Domain]
    sampler: DomainBatchSampler
    model: UdonForDistillation
    wrapped: nn.Module
    optimizer: torch.optim.AdamW
    wrapped_optimizer: AcceleratedOptimizer
    shared_heads: tuple[nn.Parameter, ...]
    guard: StepGuard
    idle_heads: IdleHeads
    sampled_classes: SampledClasses
    average: StudentAverage
    statistics: ChannelStatistics
    state: TrainState
    checkpoint: Path | None

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.sampler.step

    @property
    def num_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.sampler.num_steps

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.accelerator.is_main_process


def build_run(
    config: TrainConfig,
    folder: RunFolder,
    signals: StopSignals,
    resume: bool = False,
    overwrite: bool = False,
    allow: Collection[str] = (),
) -> Run:
    """Makes a run and restores its state; the folder is written only when all else has been found right.

    Args:
        config: The run.
        folder: Its folder.
        signals: What ends it.
        resume: Goes on from the last checkpoint, or starts if there is none.
        overwrite: Removes what is in the folder first.
        allow: What may have changed since the run was started, see `train`.

    Raises:
        ConfigError: If the config does not go with the data, the backbone or the folder.
        CheckpointError: If there is no whole checkpoint to go on from.
        FolderInUseError: If another run is using the folder.
    """
    accelerator = make_accelerator(config)
    checkpoint = _find_checkpoint(accelerator, folder, resume, overwrite)
    domains = _open_domains(config)
    trained = trained_domains(config, domains)
    sampler = _sampler(config, trained, domains, accelerator)
    # Estimated before anything is made: an out-of-memory error says nothing useful.
    for line in describe_prototypes(config, classified_domains(config, trained, domains), accelerator):
        accelerator.print(line)
    # `from_pretrained` opens in evaluation mode: without dropout and without gradient checkpointing.
    model = (build_adaptation if config.adaptation else build_model)(config, trained, domains, accelerator).train()
    statistics, source = channel_statistics(config, model.config.backbone_config)
    accelerator.print(f"channel statistics: mean {statistics.mean}, std {statistics.std}, of {source}")
    wrapped, shared_heads = share_model(config, model, accelerator)
    optimizer = make_optimizer(model, config.optim)
    wrapped_optimizer = accelerator.prepare_optimizer(optimizer)
    start_equal(model, shared_heads, accelerator)
    guard = StepGuard(config.optim, optimizer, domains, accelerator.scaler is not None)
    state, average = TrainState(), StudentAverage(model, config.train.ema_decay)
    if checkpoint:
        on_main(
            accelerator,
            lambda: folder.check_unchanged(domains, checkpoint, accelerator.num_processes, allow),
            *_FOLDER_ERRORS,
        )
        state = load_checkpoint(checkpoint, model, optimizer, average)
        _restore(state, sampler, guard, accelerator)
    holds = config.ablation.idle_heads == "hold"
    idle_heads = IdleHeads(model, optimizer, config.optim, sampler.num_steps, state.heads, holds)
    sampled = SampledClasses(model, optimizer, idle_heads, config.loss.sampled_classes, config.seed)
    launch = describe_launch(accelerator)
    on_main(accelerator, lambda: folder.prepare(domains, overwrite, sampler.step, launch), *_FOLDER_ERRORS)
    return Run(
        config=config,
        folder=folder,
        signals=signals,
        agreement=Agreement(signals, accelerator.num_processes, SILENCE),
        accelerator=accelerator,
        domains=domains,
        sampler=sampler,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        wrapped_optimizer=wrapped_optimizer,
        shared_heads=shared_heads,
        guard=guard,
        idle_heads=idle_heads,
        sampled_classes=sampled,
        average=average,
        statistics=statistics,
        state=state,
        checkpoint=checkpoint,
    )


def describe_run(run: Run) -> Iterator[str]:
    """Gives lines on domains and parameter groups."""
    for name, domain in run.domains.items():
        passed_over = f"; passed over: {describe_passed_over(domain.passed_over)}" if domain.passed_over else ""
        classes = f"{len(domain.classes)} classes" if domain.has_labels else "no labels"
        yield f"domain {name}: {len(domain.images)} images, {classes}{passed_over}"
        if run.config.data.targets == "classes":
            for line in find_doubts(domain):
                yield f"WARNING: {line}"
    optim = run.config.optim
    rates, frozen = learning_rates(optim, run.step, run.num_steps), frozen_steps(optim, run.num_steps)
    for group in run.optimizer.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        state = f"learning rate {rates[group['name']] * group['scale']:g} now"
        if group["name"] == "backbone" and frozen:
            rate = group["scale"] * optim.backbone_lr
            state += f", 0 for the first {frozen} of {run.num_steps} steps, then {rate:g}"
        yield f"parameter group {group['name']}: {size:,} weights, {state}"
    if run.step:
        yield f"going on from step {run.step} of {run.num_steps}"


def as_it_is(batch: DomainBatch) -> DomainBatch:
    """Collates nothing: each draw of the sampler is a whole batch."""
    return batch


def start_trackers(run: Run) -> None:
    """Starts the trackers of the config, if any, with its values."""
    if run.config.log.trackers:
        values = leaves(dump_config(run.config))
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
        run.accelerator.init_trackers(run.config.log.project, config=numbers)


def _sampler(
    config: TrainConfig, trained: dict[str, Domain], domains: dict[str, Domain], accelerator: Accelerator
) -> DomainBatchSampler:
    sampler = make_sampler(config, trained, accelerator)
    if is_paired(trained):
        sampler.paired_with(make_sampler(config, labelled_domains(domains), accelerator, _SOURCES))
    return sampler


def _find_checkpoint(accelerator: Accelerator, folder: RunFolder, resume: bool, overwrite: bool) -> Path | None:
    checkpoint, faults = on_main(accelerator, lambda: folder.find_checkpoint(resume, overwrite), *_FOLDER_ERRORS)
    for fault in faults:
        accelerator.print(f"WARNING: {fault}; going on from {checkpoint.name if checkpoint else 'nothing'}")
    return checkpoint


def _open_domains(config: TrainConfig) -> dict[str, Domain]:
    try:
        domains = {name: open_domain(name, spec, config.seed) for name, spec in config.domains.items()}
        if config.adaptation is not None:
            return with_shared_classes(domains)
    except (ValueError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    if config.data.targets == "images":
        return {name: with_images_as_classes(domain) for name, domain in domains.items()}
    return domains


def _restore(state: TrainState, sampler: DomainBatchSampler, guard: StepGuard, accelerator: Accelerator) -> None:
    if state.step > sampler.num_steps:
        raise ConfigError(
            f"`train.num_steps` must be at least the steps taken, {state.step}. Got {sampler.num_steps}; raise it."
        )
    sampler.load_state_dict(state.sampler)
    guard.load_state_dict(state.gradient_norms)
    if accelerator.scaler is not None and state.scaler is not None:
        accelerator.scaler.load_state_dict(state.scaler)
