"""Baseline, validation and test evaluation of a run, and its best student."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.image_processing_utils import BaseImageProcessor

from modeling_udon.config_file import dump_config
from modeling_udon.data.domains import Domain
from modeling_udon.data.limits import with_fewer_images
from modeling_udon.data.preprocessing import image_processor
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.adaptation import format_adaptation
from modeling_udon.evaluation.analysis import analyse
from modeling_udon.evaluation.changes import compare_with_start, format_changes
from modeling_udon.evaluation.neighbours import (
    SplitNeighbours,
    domains_with,
    evaluate_baselines,
    search_model,
)
from modeling_udon.evaluation.protocol import METRICS, Scores, SplitScores
from modeling_udon.evaluation.results import build_results, write_results
from modeling_udon.evaluation.tables import format_table
from modeling_udon.hub.card import render_card
from modeling_udon.hub.sources import derive_license, find_sources
from modeling_udon.hub.student_folder import write_student
from modeling_udon.storage import replaced_folder, write_text
from modeling_udon.training.adaptation import UdonForAdaptation
from modeling_udon.training.adaptation_results import branch_student, measure_adaptation, write_teacher
from modeling_udon.training.broken import BrokenImages
from modeling_udon.training.checkpoint import BEST_FILE
from modeling_udon.training.extension import compare_with_old, format_extension, keep_old_scores, write_extension
from modeling_udon.training.feature_embedder import make_embedder
from modeling_udon.training.logging import Reporter, format_weights
from modeling_udon.training.lora import merged, merged_state, split_state
from modeling_udon.training.processes import on_main
from modeling_udon.training.run import Run
from modeling_udon.training.sharding import gather_shards, load_weights, unsharded


@dataclass(frozen=True)
class TrainingResults:
    """Outcome of a run on the test split.

    Attributes:
        results: What `results.json` holds.
        neighbours: Neighbours of all queries of the test split, for galleries; on the main process, none on the others.
        domains: The domains that were tested.
        folder: The run's folder.
    """

    results: dict[str, Any]
    neighbours: SplitNeighbours
    domains: dict[str, Domain]
    folder: Path


class Assessment:
    """Measures a run's model and keeps its best student.

    Args:
        run: The run.
        reporter: Takes what is told.
        broken: Takes the images that could not be read.
    """

    def __init__(self, run: Run, reporter: Reporter, broken: BrokenImages) -> None:
        config = run.config
        self._run = run
        self._config = config
        self._folder = run.folder
        self._model = run.model
        self._domains = run.domains
        self._reporter = reporter
        self._broken = broken
        transform = EvalTransform(config.data.image_size)
        self._encoder = Encoder.of_student(run.model.udon, run.statistics, transform, config.name)
        self._metrics = tuple(dict.fromkeys((*METRICS, config.eval.metric)))
        self._embedder = make_embedder(run, reporter.say)
        # The test is that of the published student, which others run in float32.
        self._exact = replace(self._embedder, exact=True)

    def measure_start(self) -> None:
        """Scores the baselines on the test split, and the old student where the run starts from another."""
        tested = domains_with(self._domains, "test")
        if not tested:
            return
        measured = (self._encoder, tested, "test", self._exact)
        scores: dict[str, Scores] = {}
        old = None
        with self._run.agreement.interruptible():
            if self._config.eval.baselines:
                scores, broken = evaluate_baselines(*measured)
                self._broken.leave_out(broken, step=0)
            if self._config.init is not None:
                old = search_model(*measured)
        if self._run.is_main:
            write_text(self._folder.baseline, json.dumps(scores, indent=1))
            if old is not None:
                keep_old_scores(self._folder.path, old.scores())

    def validate(self, step: int) -> SplitScores | None:
        """Scores the validation split after a step; `None` if no domain has one."""
        validated = domains_with(self._domains, "validation")
        if not validated:
            return None
        if self._config.eval.max_images is not None:
            validated = with_fewer_images(validated, "validation", self._config.eval.max_images, self._config.seed)
        with self._run.agreement.interruptible():
            found = search_model(self._encoder, validated, "validation", self._embedder, self._metrics)
        self._broken.leave_out(found.broken, step)
        return on_main(self._run.accelerator, lambda: found.scores(self._metrics))

    def quality(self, scores: SplitScores) -> float:
        """What the best is chosen by: the student's mean `eval.metric`, or the teachers' where it learns nothing.

        Where some domains have no labels, those with labels alone choose, each in its own index, since images of a
        target may have the classes of a source; NaN if none of them has a validation split.
        """
        if self._config.adaptation is not None:
            metric, by_domain = self._config.eval.metric, scores.separate["domains"]
            values = [of[metric] for name, of in by_domain.items() if self._domains[name].has_labels]
            return sum(values) / len(values) if values else math.nan
        learned = {term for term, weight in self._config.loss.weights().items() if weight}
        metric = self._config.eval.metric
        if learned == {"teacher_classification"} and scores.teachers is not None:
            return scores.teachers["mean"][metric]
        return scores.merged["mean"][metric]

    def keep_best(self) -> None:
        """Writes the best weights with the teachers, for the test, and the student, for the Hub."""
        weights = gather_shards(merged_state(self._model, self._model.udon), self._run.is_main)
        if self._run.is_main:
            with replaced_folder(self._folder.checkpoints / "best") as folder:
                save_file(weights, folder / self._folder.best_weights.name)
                if isinstance(self._model, UdonForAdaptation):
                    write_teacher(folder, self._model, self._config.data.image_size)
        self._export_best(None)
        self._run.accelerator.wait_for_everyone()

    def restore_best(self, checkpoint: Path) -> None:
        """Takes back the best weights of a checkpoint, since the run had chosen a later best before it was stopped."""
        trained = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        load_weights(self._model, split_state(self._model, load_file(checkpoint / BEST_FILE)))
        self.keep_best()
        self._model.load_state_dict(trained)

    def test(self, step: int) -> TrainingResults | None:
        """Tests the best student and its teachers.

        Args:
            step: The last one, where images that cannot be read are counted.

        Returns:
            The results, or `None` if no domain has a test split.
        """
        load_weights(self._model, split_state(self._model, load_file(self._folder.best_weights)))
        tested = domains_with(self._domains, "test")
        if not tested:
            return None
        with self._run.agreement.interruptible():
            found = search_model(self._encoder, tested, "test", self._exact, self._metrics)
            adapted = self._measure_adaptation(tested)
        self._broken.leave_out(found.broken, step)
        results = on_main(self._run.accelerator, lambda: self._results(found) | adapted())
        return TrainingResults(results, found, tested, self._folder.path)

    def write(self, tested: TrainingResults, report: Callable[[TrainingResults], object] | None) -> None:
        """Writes the student's card, then `results.json`, and tells the results.

        Args:
            tested: What `test` gave.
            report: Called before on the main process, to write what else there is to show.
        """
        results = tested.results
        if self._run.is_main:
            if "extension" in results:
                write_extension(self._folder.path, results["extension"])
            if report is not None:
                report(tested)
        self._export_best(results)
        self._export_branches()
        if self._run.is_main:
            # Last: job scripts wait for this file, to know whether a run has come to its end.
            write_results(self._folder.results, results)
        self._tell(results)

    def _measure_adaptation(self, tested: dict[str, Domain]) -> Callable[[], dict[str, Any]]:
        """Gives what `results.json` has under `adaptation`, where domains share classes."""
        if not isinstance(self._model, UdonForAdaptation):
            return dict
        scores = measure_adaptation(self._model, self._encoder, self._exact, tested, "test")
        return lambda: {"adaptation": {"test": scores()}}

    def _export_branches(self) -> None:
        """Writes every further student of the run, ready for the Hub as the best one is."""
        if not isinstance(self._model, UdonForAdaptation) or not self._run.is_main:
            return
        for number in range(len(self._model.branches)):
            folder = self._folder.path / "branches" / str(number)
            write_student(folder, branch_student(self._model, number), self._processor(), self._card(folder, None))

    def _results(self, found: SplitNeighbours) -> dict[str, Any]:
        scores = found.scores(self._metrics)
        baseline = json.loads(self._folder.baseline.read_text(encoding="utf-8"))
        results = build_results({"test": scores}, baseline=baseline, config=dump_config(self._config))
        results["analysis"] = {"test": analyse(found, self._metrics)}
        if self._config.init is not None:
            results["extension"] = compare_with_old(self._config, scores)
        return results

    def _tell(self, results: dict[str, Any]) -> None:
        say = self._reporter.say
        say("\n" + format_table(results))
        if "adaptation" in results:
            of_test = results["splits"]["test"]["separate"]
            say("\n" + format_adaptation(results["adaptation"]["test"], of_test))
        if changes := compare_with_start(results):
            say("\n" + format_changes(changes))
        if "extension" in results:
            say("\n" + format_extension(results["extension"]))
        if self._run.is_main and (weights := format_weights(self._folder.metrics)):
            say("\n" + weights)

    def _export_best(self, results: dict[str, Any] | None) -> None:
        udon = unsharded(self._model.udon, self._run.is_main)
        if not self._run.is_main:
            return
        udon = merged(udon)
        best = self._folder.best
        card = self._card(best, results)
        write_student(best, udon, self._processor(), card, keep_teachers=self._config.train.keep_teachers)

    def _card(self, folder: Path, results: dict[str, Any] | None) -> ModelCard:
        config = dump_config(self._config)
        sources = find_sources(config)
        license = self._config.push.license or derive_license(config["domains"], sources, {})[0]
        return render_card(self._config.name, str(folder), config, results, sources, license=license)

    def _processor(self) -> BaseImageProcessor:
        return image_processor(self._config.data.image_size, self._run.statistics)
