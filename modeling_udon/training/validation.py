"""What a run's model is worth: at its start, on the way, and at its end."""

import json
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from modeling_udon.config import TrainConfig
from modeling_udon.config_file import dump_config
from modeling_udon.data.domains import Domain
from modeling_udon.data.transforms import EvalTransform, image_processor
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.gallery import GALLERY_FOLDER, make_gallery, write_sheets
from modeling_udon.evaluation.measure import analyse
from modeling_udon.evaluation.neighbours import (
    Channels,
    SplitNeighbours,
    domains_with,
    evaluate_baselines,
    evaluate_model,
    search_model,
)
from modeling_udon.evaluation.protocol import SplitScores, build_results, write_results
from modeling_udon.evaluation.report import write_report
from modeling_udon.evaluation.tables import format_table
from modeling_udon.hub.card import render_card
from modeling_udon.hub.push import PushError, PushOptions, push
from modeling_udon.hub.student_folder import export_student
from modeling_udon.storage import replaced_folder, write_text
from modeling_udon.training.broken import BrokenImages
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.extension import compare_with_old, format_extension, keep_old_scores, write_extension
from modeling_udon.training.logging import Reporter, format_changes, format_weights
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.sharding import gather_shards, load_weights, unsharded
from modeling_udon.training.signals import StopSignals


class Assessment:
    """Measures a run's model, keeps its best student and publishes it.

    Args:
        config: The run.
        folder: Where the run lies.
        model: The training model.
        domains: The opened domains.
        channels: Mean and standard deviation of each channel that the model is trained with.
        accelerator: The run's processes.
        signals: What may break a measurement off.
        reporter: Where it is told.
        broken: Takes the images that could not be read.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: UdonForDistillation,
        domains: dict[str, Domain],
        channels: tuple[Channels, Channels],
        accelerator: Accelerator,
        signals: StopSignals,
        reporter: Reporter,
        broken: BrokenImages,
    ) -> None:
        self._config = config
        self._folder = folder
        self._model = model
        self._domains = domains
        self._mean, self._std = channels
        self._accelerator = accelerator
        self._signals = signals
        self._reporter = reporter
        self._broken = broken
        transform = EvalTransform(config.data.image_size, config.data.eval_antialias)
        self._embedder = ImageEmbedder(transform, config.eval.batch_size, config.data.num_workers, accelerator)

    def measure_start(self) -> None:
        """Scores the baselines on the test split, and the old student where the run starts from another."""
        tested = domains_with(self._domains, "test")
        if not tested:
            return
        measured = (self._model.udon, tested, "test", self._embedder, self._mean, self._std)
        with self._signals.interruptible():
            scores = evaluate_baselines(*measured)
            old = evaluate_model(*measured) if self._config.init is not None else None
        if self._accelerator.is_main_process:
            write_text(self._folder.baseline, json.dumps(scores, indent=1))
            if old is not None:
                keep_old_scores(self._folder.path, old)

    def validate(self, step: int) -> SplitScores | None:
        """Scores the validation split after a step; `None` if no domain has one."""
        validated = domains_with(self._domains, "validation")
        if not validated:
            return None
        with self._signals.interruptible():
            scores = evaluate_model(self._model.udon, validated, "validation", self._embedder, self._mean, self._std)
        self._broken.leave_out(self._embedder.broken, step)
        return scores

    def quality(self, scores: SplitScores) -> float:
        """What the best is chosen by: the student's mean R@1, or the teachers' where the student learns nothing."""
        learned = {term for term, weight in self._config.loss.weights().items() if weight}
        if learned == {"teacher_classification"} and scores.teachers is not None:
            return scores.teachers["mean"]["R@1"]
        return scores.merged["mean"]["R@1"]

    def keep_best(self) -> None:
        """Writes the best weights with the teachers, for the test, and the student, for the Hub."""
        weights = gather_shards(self._model.state_dict(), self._accelerator.is_main_process)
        if self._accelerator.is_main_process:
            with replaced_folder(self._folder.checkpoints / "best") as folder:
                save_file(weights, folder / self._folder.best_weights.name)
        self._export_best(None)
        self._accelerator.wait_for_everyone()

    def test(self, step: int) -> dict[str, Any] | None:
        """Tests the best student and its teachers, and writes `results.json`, `report.html` and the student's card.

        Args:
            step: The last one, where images that cannot be read are counted.

        Returns:
            What `results.json` holds, or `None` if no domain has a test split.
        """
        load_weights(self._model, load_file(self._folder.best_weights))
        tested = domains_with(self._domains, "test")
        if not tested:
            return None
        with self._signals.interruptible():
            found = search_model(self._model.udon, tested, "test", self._embedder, self._mean, self._std)
        self._broken.leave_out(self._embedder.broken, step)
        scores = found.scores()
        baseline = json.loads(self._folder.baseline.read_text(encoding="utf-8"))
        results = build_results({"test": scores}, baseline=baseline, config=dump_config(self._config))
        results["analysis"] = {"test": analyse(found)}
        if self._config.init is not None:
            results["extension"] = compare_with_old(self._config, scores)
        if self._accelerator.is_main_process:
            self._write(results, found, tested)
        self._export_best(results)
        if self._accelerator.is_main_process:
            # Last: job scripts ask for this file, to know whether a run has come to its end.
            write_results(self._folder.results, results)
        self._tell(results, baseline, scores)
        return results

    def push(self) -> None:
        """Publishes the student if the config says so; what goes wrong there takes nothing from the run."""
        self._accelerator.wait_for_everyone()
        if self._config.push.repo is None or not self._accelerator.is_main_process:
            return
        try:
            with self._signals.interruptible():
                push(self._folder.path, PushOptions(**self._config.push.model_dump()), say=self._reporter.say)
        except (PushError, ValueError) as error:
            self._reporter.say(f"WARNING: the run has ended well, but its student is not on the Hub: {error}")

    def _write(self, results: dict[str, Any], found: SplitNeighbours, tested: dict[str, Domain]) -> None:
        if "extension" in results:
            write_extension(self._folder.path, results["extension"])
        gallery = make_gallery(found.merged, tested, "test")
        write_report(self._folder.path, results, {"test": gallery})
        write_sheets(self._folder.path / GALLERY_FOLDER, gallery)

    def _tell(self, results: dict[str, Any], baseline: dict[str, Any], scores: SplitScores) -> None:
        say = self._reporter.say
        say("\n" + format_table(results))
        say("\n" + format_changes(baseline["untrained"], scores.merged))
        if "extension" in results:
            say("\n" + format_extension(results["extension"]))
        if self._accelerator.is_main_process and (weights := format_weights(self._folder.metrics)):
            say("\n" + weights)

    def _export_best(self, results: dict[str, Any] | None) -> None:
        udon = unsharded(self._model.udon, self._accelerator.is_main_process)
        if not self._accelerator.is_main_process:
            return
        best = self._folder.best
        with replaced_folder(best) as folder:
            export_student(
                udon,
                image_processor(self._config.data.image_size, self._mean, self._std),
                render_card(self._config.name, str(best), dump_config(self._config), results),
                folder,
                self._config.train.keep_teachers,
            )
