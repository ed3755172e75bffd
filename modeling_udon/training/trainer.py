"""`train(config)`: the training loop over batches of interleaved domains, with validation, checkpoints and the test."""

import math
import time
from collections.abc import Callable, Collection, Iterator

from modeling_udon.config import TrainConfig
from modeling_udon.config_file import dump_config
from modeling_udon.data.dataset import DomainBatch
from modeling_udon.data.loader import WorkerLoader
from modeling_udon.training.broken import BrokenImages
from modeling_udon.training.checkpoint import CheckpointWriter, TrainState
from modeling_udon.training.collapse import CollapseWatch
from modeling_udon.training.data_wait import DataWait
from modeling_udon.training.errors import TrainingError
from modeling_udon.training.inputs import CachedInputs
from modeling_udon.training.logging import LossWindow, Reporter, format_validation
from modeling_udon.training.optimization import learning_rates
from modeling_udon.training.resuming import check_allowances
from modeling_udon.training.run import Run, as_it_is, build_run, describe_run, start_trackers
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.sharing import share_buffers
from modeling_udon.training.signals import Stopped, StopSignals
from modeling_udon.training.skipped import Incidents, Verdict
from modeling_udon.training.step import StepLosses, StepResult, fetch_losses, take_step
from modeling_udon.training.training_data import training_data
from modeling_udon.training.validation import Assessment, TrainingResults


def train(
    config: TrainConfig,
    resume: bool = False,
    overwrite: bool = False,
    allow: Collection[str] = (),
    report: Callable[[TrainingResults], object] | None = None,
) -> TrainingResults | None:
    """Trains, validates, keeps the best student, and tests it.

    Args:
        config: The run.
        resume: Goes on from the last checkpoint of `config.run_dir`, or starts if there is none.
        overwrite: Removes what is in `config.run_dir` first.
        allow: What may have changed since the run was started: keys of the config, whole or their last part, or
            `"processes"`, `"versions"` or `"data"`.
        report: Called with the results on the main process just before `results.json` is written, which is the sign
            that a run is complete.

    Returns:
        The results of the test, or `None` if no domain has a test split.

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
            trainer = Trainer(build_run(config, folder, signals, resume, overwrite, allow))
        try:
            trainer.describe()
            trainer.catch_up()
            for batch in trainer.batches():
                result = trainer.train_step(batch)
                trainer.count_step(batch, result)
                if trainer.is_due(config.log.every):
                    trainer.log()
                trainer.run.agreement.stop_after_step(last=trainer.step == trainer.run.num_steps)
                if trainer.is_due(config.eval.every):
                    trainer.validate()
                if trainer.is_due(config.train.checkpoint_every) or trainer.out_of_patience:
                    trainer.save()
                if trainer.out_of_patience:
                    break
            return trainer.finish(report)
        except Stopped:
            trainer.stop()
            raise
        finally:
            trainer.writer.join()


class Trainer:
    """The verbs of the training loop and what they count; see `train`."""

    def __init__(self, run: Run) -> None:
        config, state = run.config, run.state
        self.run = run
        self.best = state.best
        self._saved = state.step
        self._validated = state.validated
        self._window = state.window
        self._pending: list[StepResult] = []
        self._data_wait = DataWait(run.accelerator.device)
        self._collapse = CollapseWatch(config.adaptation.max_collapsed) if config.adaptation else None
        self._incidents = Incidents(run.folder.incidents, run.domains, run.is_main)
        self.reporter = Reporter(config.run_dir, run.accelerator, run.num_steps, run.step, self._owes_validation)
        self.broken = BrokenImages(
            run.folder.broken, config.data.max_broken_share, run.accelerator, state.broken, run.step
        )
        self.assessment = Assessment(run, self.reporter, self.broken)
        self.writer = CheckpointWriter(run.folder.checkpoints, config.train.keep_checkpoints, run.is_main)
        if run.checkpoint and self.best:
            self.assessment.restore_best(run.checkpoint)
        start_trackers(run)
        self._clock = time.perf_counter()

    @property
    def step(self) -> int:
        """Optimiser steps taken."""
        return self.run.step

    def is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps happens now; at the end everything does."""
        return self.step % every == 0 or self.step == self.run.num_steps

    @property
    def out_of_patience(self) -> bool:
        """Whether `eval.patience` validations in a row have found no better student."""
        options, best = self.run.config.eval, self.best
        if options.patience is None or best is None or self._validated is None:
            return False
        return self._validated >= best["step"] + options.patience * options.every

    def describe(self) -> None:
        """Prints domains and parameter groups."""
        for line in describe_run(self.run):
            self.reporter.say(line)

    def catch_up(self) -> None:
        """Measures the start, or does what was left out where the run was stopped."""
        if self.step == 0:
            self.assessment.measure_start()
            self.validate()
        elif self._owes_validation:
            self.validate()
            if self.is_due(self.run.config.train.checkpoint_every):
                self.save()

    def stop(self) -> None:
        """Saves what the run goes on from; what can be done again was broken off and will be."""
        if self.step > 0 and self._saved != self.step:
            self.save()
        self._finish_writing()
        self.reporter.close()

    def batches(self) -> Iterator[DomainBatch]:
        """Gives this process's share of every step's batch, to the end of the run."""
        dataset = training_data(self.run, self.reporter.say)
        # What is cached needs no decoding, and a worker would only hand it on.
        num_workers = 0 if isinstance(self.run.model.inputs, CachedInputs) else self.run.config.data.num_workers
        loader: WorkerLoader[DomainBatch] = WorkerLoader(
            dataset,
            batch_size=None,
            sampler=self.run.sampler,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            collate_fn=as_it_is,
            pin_memory=self.run.accelerator.device.type == "cuda",
        )
        self._clock = time.perf_counter()
        # One pass over the loader is one interval of the sampler: the weights change between two passes.
        while self.step < self.run.num_steps and not self.out_of_patience:
            yield from self._data_wait.over(loader)

    def train_step(self, batch: DomainBatch) -> StepResult:
        """Takes one optimiser step on one domain."""
        return take_step(self.run, batch)

    def count_step(self, batch: DomainBatch, result: StepResult) -> None:
        """Moves sampler and progress on by one step."""
        self.writer.check()
        self._pending.append(result)
        self.broken.collect(batch, self.step + 1)
        if self.run.sampler.ends_interval:
            self._flush_losses()
        new_interval = self.run.sampler.advance()
        self.reporter.count_step()
        if new_interval:
            sampler = self.run.sampler
            told = {"next_weights": sampler.weights, "steps_by_domain": sampler.steps_by_domain}
            self.reporter.record(self.step, **told, signal_losses=sampler.last_losses)

    def log(self) -> None:
        """Tells the mean losses since the last time."""
        self._flush_losses()
        self._count_broken()
        now = time.perf_counter()
        num_images = sum(self._window.counts.values()) * self.run.config.train.batch_size
        values = self._window.means() | {
            "learning_rates": learning_rates(self.run.config.optim, self.step - 1, self.run.num_steps),
            "weights": self.run.sampler.weights,
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
        self._flush_losses()
        if self._incidents.in_a_row and self.step < self.run.num_steps:
            return
        started = time.perf_counter()
        with self.run.idle_heads.caught_up_for_reading(self.step), self.run.average.shown():
            share_buffers(self.run.model.udon.backbone, self.run.accelerator.num_processes)
            scores = self.assessment.validate(self.step)
            metric = self.run.config.eval.metric
            if scores is not None:
                quality = self.assessment.quality(scores)
                # Of domains without labels alone nothing may choose: the last step is taken.
                better = self.step == self.run.num_steps if math.isnan(quality) else self._is_better(quality)
                self.reporter.say(format_validation(self.step, scores, metric, better))
                self.reporter.record(self.step, validation=scores.as_dict())
                for name, values in scores.merged["domains"].items():
                    self.run.sampler.observe_score(name, values[metric])
            else:
                quality, better = math.nan, self.step == self.run.num_steps
            if better:
                self.best = {"step": self.step, metric: quality}
                self.assessment.keep_best()
        self._validated = self.step
        self._clock += time.perf_counter() - started

    def _is_better(self, quality: float) -> bool:
        """Whether a student is the best so far; the start is measured, and never chosen."""
        return self.step > 0 and (self.best is None or quality > self.best[self.run.config.eval.metric])

    def save(self) -> None:
        """Begins to write a checkpoint, unless the losses have just ceased to be finite: the last one is worth more."""
        started = time.perf_counter()
        self._flush_losses()
        self._count_broken()
        if self._incidents.in_a_row and self.step < self.run.num_steps:
            return
        run = self.run
        if run.is_main:
            self.reporter.sync()
        best_weights = run.folder.best_weights if self.best else None
        self.writer.save(run.model, run.optimizer, self._state(), best_weights, run.average.tensors)
        self._saved = self.step
        self._clock += time.perf_counter() - started

    def finish(self, report: Callable[[TrainingResults], object] | None = None) -> TrainingResults | None:
        """Tests the best student and its teachers, writes and tells the results."""
        tested = self.assessment.test(self.step)
        if tested is not None:
            self.assessment.write(tested, report)
        if self.out_of_patience:
            patience = self.run.config.eval.patience
            self.reporter.say(f"\nstopped at step {self.step}: no better student in {patience} validations")
        assert self.best is not None, "the last step is always validated"
        self.reporter.say(f"\nbest student, of step {self.best['step']}: {self.run.folder.best}")
        self._finish_writing()
        self.reporter.close()
        return tested

    def _finish_writing(self) -> None:
        """Has every process wait for the last checkpoint: a launcher ends all as soon as one of them ends."""
        self.writer.wait()
        self.run.accelerator.wait_for_everyone()

    @property
    def _owes_validation(self) -> bool:
        """Whether the run was stopped before the validation that its step asks for."""
        return self.step > 0 and self.is_due(self.run.config.eval.every) and self._validated != self.step

    def _state(self) -> TrainState:
        run = self.run
        return TrainState(
            step=self.step,
            sampler=run.sampler.state_dict(),
            best=self.best,
            validated=self._validated,
            window=self._window,
            heads=run.idle_heads.steps_done,
            gradient_norms=run.guard.state_dict(),
            processes=run.accelerator.num_processes,
            broken=self.broken.counts,
            scaler=run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else None,
        )

    def _count_broken(self) -> None:
        size = self.run.config.train.batch_size
        drawn = {name: steps * size for name, steps in self.run.sampler.steps_by_domain.items()}
        for line in self.broken.count(drawn):
            self.reporter.say(line)

    def _flush_losses(self) -> None:
        """Brings the losses of the steps since the last time from the device, to the log and the sampler."""
        pending, self._pending = self._pending, []
        # Where no teacher learns, the weights of the domains go by the student's loss.
        signal = f"{self.run.config.ablation.signal}_classification"
        if signal not in self.run.model.terms:
            signal = "student_classification"
        for step in fetch_losses(pending, self.run.accelerator):
            self._incidents.count(step.verdict)
            if step.verdict == Verdict.APPLIED:
                self._window.add(step.domain, step.loss, step.losses)
                self.run.sampler.observe(step.domain, step.losses[signal])
                if self._collapse is not None:
                    self._collapse.count(step)
            else:
                self._window.skipped += 1
                self._tell_incident(step)

    def _tell_incident(self, step: StepLosses) -> None:
        config = self.run.config
        values = {
            "losses": {"loss": step.loss, **step.losses},
            "gradient_norm": step.gradient_norm,
            "learning_rates": learning_rates(config.optim, step.step, self.run.num_steps),
        }
        draw = self.run.sampler.draw_at(step.step)
        self._incidents.write(step.step, step.verdict, draw, values)
        if self._incidents.in_a_row == config.train.max_nonfinite:
            raise TrainingError(
                f"The loss must be finite. Got {self._incidents.in_a_row} steps in a row where it or its gradient was "
                f"not, the last for domain {draw.domain!r} at step {step.step}; their batches are in "
                f"{self._incidents.folder}. Mend the data, or lower optim.lr or set optim.max_grad_norm and go on with "
                "--resume --resume-allow lr,max_grad_norm."
            )
