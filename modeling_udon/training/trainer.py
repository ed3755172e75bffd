"""`train(config)`: domains are interleaved, teachers and student learn together, the best student goes out."""

import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging as transformers_logging

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import dump_config
from modeling_udon.data.dataset import DomainBatch, MultiDomainDataset
from modeling_udon.data.domains import find_known_classes, open_domain, with_images_as_classes
from modeling_udon.data.loader import WorkerLoader
from modeling_udon.data.transforms import EvalTransform, normalize
from modeling_udon.training.broken import BrokenImages
from modeling_udon.training.checkpoint import (
    BEST_FILE,
    CheckpointError,
    TrainState,
    check_weights,
    load_checkpoint,
    save_checkpoint,
)
from modeling_udon.training.data_wait import DataWait
from modeling_udon.training.distillation import RelationalBank
from modeling_udon.training.errors import TrainingError
from modeling_udon.training.extension import trained_domains
from modeling_udon.training.features import FeatureDataset, make_feature_cache
from modeling_udon.training.logging import LossWindow, Reporter, format_validation
from modeling_udon.training.optimization import (
    IdleHeads,
    average_gradients,
    frozen_steps,
    learning_rates,
    make_optimizer,
    set_learning_rates,
    with_gradients,
)
from modeling_udon.training.resuming import check_allowances, leaves
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.run_lock import FolderInUseError
from modeling_udon.training.sampled_classes import SampledClasses
from modeling_udon.training.setup import (
    SILENCE,
    build_model,
    channel_statistics,
    describe_prototypes,
    make_accelerator,
    make_sampler,
    training_transform,
)
from modeling_udon.training.sharding import clip_gradients, load_weights, shard_backbone
from modeling_udon.training.signals import Agreement, Stopped, StopSignals
from modeling_udon.training.skipped import Incidents, StepGuard, Verdict
from modeling_udon.training.validation import Assessment


def train(
    config: TrainConfig, resume: bool = False, overwrite: bool = False, allow: Collection[str] = ()
) -> dict[str, Any] | None:
    """Trains, validates, keeps the best student, and tests it.

    Args:
        config: The run.
        resume: Goes on from the last checkpoint of `config.run_dir`, or starts if there is none.
        overwrite: Removes what is in `config.run_dir` first.
        allow: What may have changed since the run was started: keys of the config, whole or their last part, or
            `"processes"`, `"versions"` or `"data"`.

    Returns:
        What `results.json` holds, or `None` if no domain has a test split.

    Raises:
        ConfigError: If the config does not go with the data, the backbone or the folder.
        CheckpointError: If there is no whole checkpoint to go on from.
        FolderInUseError: If another run is using the folder.
        TrainingError: If the loss is not finite.
        Stopped: If a signal asked for it; the state is saved.
    """
    check_allowances(allow, dump_config(config))
    with StopSignals() as signals, RunFolder(config) as folder:
        with signals.interruptible():
            trainer = Trainer(config, folder, signals, resume, overwrite, allow)
        try:
            trainer.describe()
            trainer.catch_up()
            for batch in trainer.batches():
                losses = trainer.train_step(batch)
                trainer.count_step(batch, losses)
                if trainer.is_due(config.log.every):
                    trainer.log()
                trainer.stop_if_asked()
                if trainer.is_due(config.eval.every):
                    trainer.validate()
                if trainer.is_due(config.train.checkpoint_every):
                    trainer.save()
            return trainer.finish()
        except Stopped:
            trainer.stop()
            raise


Answer = TypeVar("Answer")


class Trainer:
    """The state of a run and the verbs of its loop; see `train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        signals: StopSignals,
        resume: bool = False,
        overwrite: bool = False,
        allow: Collection[str] = (),
    ) -> None:
        self.config = config
        self.folder = folder
        self.signals = signals
        self.accelerator: Accelerator = make_accelerator(config)
        self._agreement = Agreement(self.accelerator.num_processes, SILENCE)
        checkpoint, faults = self._on_main(lambda: self.folder.find_checkpoint(resume, overwrite))
        for fault in faults:
            self.accelerator.print(f"WARNING: {fault}; going on from {checkpoint.name if checkpoint else 'nothing'}")
        transformers_logging.disable_progress_bar()
        try:
            self.domains = {name: open_domain(name, spec, config.seed) for name, spec in config.domains.items()}
        except (ValueError, ImportError) as error:
            raise ConfigError(" ".join(str(error).split())) from error
        if config.data.targets == "images":
            self.domains = {name: with_images_as_classes(domain) for name, domain in self.domains.items()}
        trained = trained_domains(config, self.domains)
        self.sampler = make_sampler(config, trained, self.accelerator)
        # Before anything is made of them: what does not fit fails without a word of the reason.
        for line in describe_prototypes(config, trained, self.accelerator):
            self.accelerator.print(line)
        self.model = build_model(config, trained)
        self.mean, self.std = channel_statistics(config.data, self.model.config.backbone_config)
        self.num_steps = self.sampler.num_steps
        self.best: dict[str, float] | None = None
        self._saved = 0
        self._validated: int | None = None
        self._data_wait = DataWait(self.accelerator.device)
        broken_before: dict[str, int] = {}
        self._window = LossWindow()
        self._pending: list[tuple[int, str, torch.Tensor]] = []
        self._prepare_processes()
        self._guard = StepGuard(config.optim, self._optimizer, self.domains, self.accelerator.scaler is not None)
        self._incidents = Incidents(self.folder.incidents, self.domains, self.accelerator.is_main_process)
        self.idle_heads = IdleHeads(self.model, self._optimizer, config.optim, self.num_steps)
        if checkpoint:
            broken_before = self._restore(checkpoint, allow).extra["broken"]
        wanted = config.loss.sampled_classes
        self.sampled_classes = SampledClasses(self.model, self._optimizer, self.idle_heads, wanted, config.seed)
        self._on_main(lambda: self.folder.prepare(self.domains, overwrite, self.step))
        self.reporter = Reporter(config.run_dir, self.accelerator, self.num_steps, self.step, self._owes_validation)
        share = config.data.max_broken_share
        self.broken = BrokenImages(self.folder.broken, share, self.accelerator, broken_before, self.step)
        self.assessment = Assessment(
            config,
            folder,
            self.model,
            self.domains,
            (self.mean, self.std),
            self.accelerator,
            signals,
            self.reporter,
            self.broken,
        )
        if checkpoint and self.best:
            self._restore_best(checkpoint)
        self._start_trackers()
        self._clock = time.perf_counter()

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.sampler.step

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; at the end everything does."""
        return self.step % every == 0 or self.step == self.num_steps

    def describe(self) -> None:
        """Prints domains and parameter groups."""
        say = self.reporter.say
        for name, domain in self.domains.items():
            say(f"domain {name}: {len(domain.images)} images, {len(domain.classes)} classes")
            if self.config.data.targets == "classes":
                for line in find_known_classes(domain):
                    say(f"WARNING: {line}; its scores are not those of new classes")
        rates = learning_rates(self.config.optim, self.step, self.num_steps)
        for group in self._optimizer.param_groups:
            size = sum(parameter.numel() for parameter in group["params"])
            state = f"learning rate {rates[group['name']]:g} now"
            frozen = frozen_steps(self.config.optim, self.num_steps)
            if group["name"] == "backbone" and frozen:
                state += f", 0 for the first {frozen} of {self.num_steps} steps, then {self.config.optim.backbone_lr:g}"
            say(f"parameter group {group['name']}: {size:,} weights, {state}")
        if self.step:
            say(f"going on from step {self.step} of {self.num_steps}")

    def catch_up(self) -> None:
        """Measures the start, or does what was left out where the run was stopped."""
        if self.step == 0:
            self.assessment.measure_start()
            self.validate()
        elif self._owes_validation:
            self.validate()
            if self.is_due(self.config.train.checkpoint_every):
                self.save()

    def stop_if_asked(self) -> None:
        """Raises `Stopped` if any process was asked to end, in all of them after the same step."""
        if self._agreement.reached(self.signals.requested, last=self.step == self.num_steps):
            self.signals.raise_now()

    def stop(self) -> None:
        """Saves what the run goes on from; what can be done again was broken off and will be."""
        if self.step > 0 and self._saved != self.step:
            self.save()
        self.reporter.close()

    def batches(self) -> Iterator[DomainBatch]:
        """Gives this process's share of every step's batch, to the end of the run."""
        dataset = self._training_data()
        # Cached features need no decoding, and a worker would only hand them on.
        num_workers = 0 if self.config.train.heads_only else self.config.data.num_workers
        loader: WorkerLoader[DomainBatch] = WorkerLoader(
            dataset,
            batch_size=None,
            sampler=self.sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self._clock = time.perf_counter()
        # One pass over the loader is one interval of the sampler: the weights change between two passes.
        while self.step < self.num_steps:
            yield from self._data_wait.over(loader)

    def train_step(self, batch: DomainBatch) -> torch.Tensor:
        """Takes one optimiser step on one domain.

        Returns:
            The total loss and its terms of this process's share of the batch, then what `StepGuard.judge` gives, of
            shape `(1 + num_terms + 2,)`.
        """
        config, step = self.config, self.step
        # Dropout, where a backbone has it, depends on seed, step and process alone.
        torch.manual_seed((config.seed * 1_000_003 + step) * 8191 + self.accelerator.process_index)
        self.idle_heads.catch_up(batch.domain, step)
        ramp = config.loss.distillation_ramp_steps
        self.model.distillation_share = min(1.0, (step + 1) / ramp) if ramp else 1.0
        set_learning_rates(self._optimizer, learning_rates(config.optim, step, self.num_steps))
        pixels = batch.pixels.to(self.accelerator.device, non_blocking=True)
        if not self.model.takes_features:
            pixels = normalize(pixels, self.mean, self.std)
        labels = batch.labels.to(self.accelerator.device, non_blocking=True)
        parts = config.train.accumulation_steps
        pixel_parts, label_parts = pixels.chunk(parts), labels.chunk(parts)
        banks = self._relational_banks(pixel_parts, batch.domain)
        self.sampled_classes.take(batch.domain, labels, step)
        losses = torch.zeros(1 + len(self.model.terms), device=pixels.device)
        for number, (part, part_labels, bank) in enumerate(zip(pixel_parts, label_parts, banks, strict=True)):
            last = number == parts - 1
            with nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                output = self._wrapped(part, part_labels, batch.domain, bank)
                self.accelerator.backward(output.loss / parts)
            losses += torch.stack([output.loss, *output.losses.values()]).detach().float() / parts
        faulty = 1 - losses.isfinite().all().float()
        if self.accelerator.num_processes > 1:
            ours = (*self._shared_heads, *self.model.domain_parameters(batch.domain).values())
            faulty = average_gradients(ours, self.accelerator.num_processes, faulty)
        norm = None
        if config.optim.max_grad_norm is not None:
            norm = self._clip_gradients(config.optim.max_grad_norm)
        verdict = self._guard.judge(batch.domain, faulty, norm)
        self._wrapped_optimizer.step()
        self._wrapped_optimizer.zero_grad(set_to_none=True)
        self.sampled_classes.put_back(step)
        return torch.cat([losses, verdict])

    def count_step(self, batch: DomainBatch, losses: torch.Tensor) -> None:
        """Moves sampler and progress on by one step."""
        self._pending.append((self.step, batch.domain, losses))
        self.broken.collect(batch, self.step + 1)
        if self.sampler.ends_interval:
            self._flush_losses()
        new_interval = self.sampler.advance()
        self.reporter.count_step()
        if new_interval:
            self.reporter.record(
                self.step, next_weights=self.sampler.weights, steps_by_domain=self.sampler.steps_by_domain
            )

    def log(self) -> None:
        """Tells the mean losses since the last time."""
        self._flush_losses()
        self._count_broken()
        now = time.perf_counter()
        num_images = sum(self._window.counts.values()) * self.config.train.batch_size
        values = self._window.means(self.model.terms) | {
            "learning_rates": learning_rates(self.config.optim, self.step - 1, self.num_steps),
            "weights": self.sampler.weights,
            "images_per_second": num_images / (now - self._clock),
            "data_wait_share": min(1.0, self._data_wait.take() / (now - self._clock)),
        }
        if self.broken.counts:
            values["broken_images"] = dict(self.broken.counts)
        self._window, self._clock = LossWindow(), now
        self.reporter.record(self.step, **values)
        self.reporter.show_progress(self.step, values)

    def validate(self) -> None:
        """Scores the validation split and keeps the student if it is the best so far."""
        # If the validation is broken off, no other process may be needed for what is saved then.
        self._flush_losses()
        if self._incidents.in_a_row and self.step < self.num_steps:
            return
        started = time.perf_counter()
        with self.idle_heads.caught_up_for_reading(self.step):
            scores = self.assessment.validate(self.step)
            if scores is not None:
                recall = self.assessment.quality(scores)
                better = self.best is None or recall > self.best["R@1"]
                self.reporter.say(format_validation(self.step, scores, better))
                self.reporter.record(self.step, validation=scores.as_dict())
            else:
                recall, better = math.nan, self.step == self.num_steps
            if better:
                self.best = {"step": self.step, "R@1": recall}
                self.assessment.keep_best()
        self._validated = self.step
        self._clock += time.perf_counter() - started

    def save(self) -> None:
        """Writes a checkpoint, unless the losses have just ceased to be finite: the last one is worth more."""
        started = time.perf_counter()
        self._flush_losses()
        self._count_broken()
        if self._incidents.in_a_row and self.step < self.num_steps:
            return
        if self.accelerator.is_main_process:
            self.reporter.sync()
        best_weights = self.folder.best_weights if self.best else None
        keep, main = self.config.train.keep_checkpoints, self.accelerator.is_main_process
        save_checkpoint(
            self.folder.checkpoints, self.model, self._optimizer, self._state(), keep, best_weights, write=main
        )
        self._saved = self.step
        self.accelerator.wait_for_everyone()
        self._clock += time.perf_counter() - started

    def finish(self) -> dict[str, Any] | None:
        """Tests the best student and its teachers, tells the results and publishes the student if that is wanted."""
        results = self.assessment.test(self.step)
        assert self.best is not None, "the last step is always validated"
        self.reporter.say(f"\nbest student, of step {self.best['step']}: {self.folder.best}")
        self.assessment.push()
        self.reporter.close()
        return results

    def _training_data(self) -> MultiDomainDataset | FeatureDataset:
        """The training images, or the features of a frozen backbone."""
        config, transform = self.config, training_transform(self.config.data)
        replace_broken = config.data.max_broken_share > 0
        if not config.train.heads_only:
            return MultiDomainDataset(self.domains, transform, config.seed, replace_broken)
        plain = EvalTransform(config.data.image_size, config.data.eval_antialias)
        cache = make_feature_cache(config, transform, plain, self.mean, self.std)
        names, workers = self.sampler.names, config.data.num_workers
        with self.signals.interruptible():
            features = cache.open(self.domains, names, self.model.udon, self.accelerator, workers, self.reporter.say)
        return FeatureDataset(self.domains, features, config.seed, replace_broken)

    def _prepare_processes(self) -> None:
        sharded = self.config.train.shard_backbone and self.accelerator.num_processes > 1
        # Heads and prototypes of one domain get gradients in a step; DDP would wait for all the others.
        ours = [name for domain in self.model.num_classes for name in self.model.domain_parameters(domain)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.model, ours)
        if self.config.train.compile:
            self.model.udon.backbone.compile()
        # In shards, the backbone reduces its own gradients; around it there is nothing for DDP.
        self._wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=sharded)
        self._shared_heads: list[torch.nn.Parameter] = []
        if sharded:
            shard_backbone(self.model.udon, self.accelerator.device.type, self.accelerator.num_processes)
            self._shared_heads = self.model.shared_head_parameters()
        self._optimizer = make_optimizer(self.model, self.config.optim)
        self._wrapped_optimizer = self.accelerator.prepare_optimizer(self._optimizer)
        self.model.move_frozen(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            self.model.gather, self.model.rank = self.accelerator.gather, self.accelerator.process_index
            domains = self.model.num_classes
            owned = [parameter for domain in domains for parameter in self.model.domain_parameters(domain).values()]
            for parameter in (*self._shared_heads, *owned):
                torch.distributed.broadcast(parameter.data, src=0)

    @property
    def _owes_validation(self) -> bool:
        """Whether the run was stopped before the validation that its step asks for."""
        return self.step > 0 and self.is_due(self.config.eval.every) and self._validated != self.step

    def _on_main(self, work: Callable[[], Answer]) -> Answer:
        """Has the main process do something to the run's folder, and all of them know how it went."""
        answer: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                answer[0] = work()
            except (ConfigError, CheckpointError, FolderInUseError, OSError) as error:
                answer[1] = error
        found, fault = broadcast_object_list(answer)
        if fault is not None:
            raise fault
        return found

    def _state(self) -> TrainState:
        extra: dict[str, Any] = {
            "window": vars(self._window),
            "validated": self._validated,
            "heads": self.idle_heads.steps_done,
            "gradient_norms": self._guard.state_dict(),
            "processes": self.accelerator.num_processes,
            "broken": self.broken.counts,
        }
        if self.accelerator.scaler is not None:
            extra["scaler"] = self.accelerator.scaler.state_dict()
        return TrainState(self.step, self.sampler.state_dict(), self.best, extra)

    def _restore(self, checkpoint: Path, allow: Collection[str]) -> TrainState:
        processes = self.accelerator.num_processes
        self._on_main(lambda: self.folder.check_unchanged(self.domains, checkpoint, processes, allow))
        check_weights(checkpoint, self.model)
        state = load_checkpoint(checkpoint, self.model, self._optimizer)
        if state.step > self.num_steps:
            raise ConfigError(
                f"`train.num_steps` must be at least the steps taken, {state.step}. Got {self.num_steps}; raise it."
            )
        self.sampler.load_state_dict(state.sampler)
        self.best = state.best
        self._saved = state.step
        self._validated = state.extra["validated"]
        self._window = LossWindow(**state.extra["window"])
        self._guard.load_state_dict(state.extra["gradient_norms"])
        heads = state.extra["heads"]
        self.idle_heads = IdleHeads(self.model, self._optimizer, self.config.optim, self.num_steps, heads)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.extra["scaler"])
        return state

    def _restore_best(self, checkpoint: Path) -> None:
        """Takes back a best student that is of a later step than the checkpoint."""
        trained = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        load_weights(self.model, load_file(checkpoint / BEST_FILE))
        self.assessment.keep_best()
        self.model.load_state_dict(trained)

    def _start_trackers(self) -> None:
        if self.config.log.trackers:
            values = {
                key: value
                for key, value in leaves(dump_config(self.config)).items()
                if isinstance(value, int | float | str)
            }
            self.accelerator.init_trackers(self.config.log.project, config=values)

    def _relational_banks(self, pixel_parts: tuple[torch.Tensor, ...], domain: str) -> list[RelationalBank | None]:
        """Embeddings of the global batch for each accumulated part, by a forward pass of its own."""
        if len(pixel_parts) == 1 or self.config.loss.relational_distillation == 0:
            return [None] * len(pixel_parts)
        with torch.no_grad(), self.accelerator.autocast():
            embeds = [self.model.embed(part, domain) for part in pixel_parts]
        student = self.accelerator.gather(torch.cat([part.student for part in embeds]))
        teacher = self.accelerator.gather(torch.cat([part.teacher for part in embeds if part.teacher is not None]))
        size = len(pixel_parts[0])
        start = self.accelerator.process_index * size * len(pixel_parts)
        return [RelationalBank(student, teacher, start + number * size) for number in range(len(pixel_parts))]

    def _clip_gradients(self, max_norm: float) -> torch.Tensor:
        parameters = with_gradients(self._optimizer)
        if self._shared_heads:
            return clip_gradients(parameters, max_norm)
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    def _count_broken(self) -> None:
        size = self.config.train.batch_size
        for line in self.broken.count({name: steps * size for name, steps in self.sampler.steps_by_domain.items()}):
            self.reporter.say(line)

    def _flush_losses(self) -> None:
        """Brings the losses of the steps since the last time from the device, averaged over processes."""
        if not self._pending:
            return
        stacked = torch.stack([losses for _, _, losses in self._pending])
        rows = self.accelerator.reduce(stacked, reduction="mean").tolist()
        # Where no teacher learns, the weights of the domains do not go by its loss.
        signal = f"{self.config.sampling.signal}_classification"
        column = 1 + self.model.terms.index(signal) if signal in self.model.terms else 1
        pending, self._pending = self._pending, []
        for (step, name, _), (*losses, verdict, norm) in zip(pending, rows, strict=True):
            self._incidents.count(Verdict(int(verdict)))
            if verdict == Verdict.APPLIED:
                self._window.add(name, losses)
                self.sampler.observe(name, losses[column])
            else:
                self._window.skipped += 1
                self._tell_incident(step, Verdict(int(verdict)), losses, norm)

    def _tell_incident(self, step: int, verdict: Verdict, losses: list[float], norm: float) -> None:
        values = {
            "losses": dict(zip(("loss", *self.model.terms), losses, strict=True)),
            "gradient_norm": norm,
            "learning_rates": learning_rates(self.config.optim, step, self.num_steps),
        }
        draw = self.sampler.draw_at(step)
        self._incidents.write(step, verdict, draw, values)
        if self._incidents.in_a_row == self.config.train.max_nonfinite:
            raise TrainingError(
                f"The loss must be finite. Got {self._incidents.in_a_row} steps in a row where it or its gradient was "
                f"not, the last for domain {draw.domain!r} at step {step}; their batches are in "
                f"{self._incidents.folder}. Mend the data, or lower optim.lr or set optim.max_grad_norm and go on with "
                "--resume --resume-allow lr,max_grad_norm."
            )


def _as_it_is(batch: Any) -> Any:
    return batch
