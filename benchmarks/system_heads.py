"""Training of heads on cached features in this process, and what a frozen start gives without training."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from modeling_udon.config_file import load_config
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.neighbours import domains_with, evaluate_baselines, search_model
from modeling_udon.training.feature_embedder import make_embedder
from modeling_udon.training.run import Run, build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer


def train_heads(words: Sequence[str], folder: Path) -> None:
    """Trains heads by the trainer's own steps and scores the last student; writes `results.json` and `cost.json`.

    A run is over in seconds: there are no checkpoints, and no validation on the way to choose among.

    Args:
        words: Command line of the run, its config first.
        folder: The run's folder.
    """

    def train(run: Run) -> None:
        trainer = Trainer(run)
        batches = trainer.batches()
        first = next(batches)
        # Opening the features is the same for all; the steps are what a system costs.
        wall, processor = time.perf_counter(), time.process_time()
        trainer.count_step(first, trainer.train_step(first))
        if run.step < run.num_steps:
            for batch in batches:
                trainer.count_step(batch, trainer.train_step(batch))
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - processor
        size = run.config.train.batch_size
        cost = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "images_per_second": run.num_steps * size / max(cpu_seconds, 1e-9),
            "trained": sum(weight.numel() for weight in run.model.parameters() if weight.requires_grad),
            "shipped": sum(weight.numel() for weight in run.model.udon.student().parameters()),
        }
        # What a run gives out is the average of the weights, where it keeps one.
        with run.average.shown():
            embedder, encoder = make_embedder(run, lambda line: None), _encoder(run)
            splits = {
                split: search_model(encoder, domains_with(run.domains, split), split, embedder).scores().as_dict()
                for split in ("validation", "test")
                if domains_with(run.domains, split)
            }
        steps = run.sampler.steps_by_domain
        (folder / "cost.json").write_text(json.dumps(cost), encoding="utf-8")
        results = json.dumps({"splits": splits, "steps_by_domain": steps})
        (folder / "results.json").write_text(results, encoding="utf-8")

    _with_run(words, train)


def measure_baselines(words: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Scores the frozen start at its full width, and raw pixels, on the test split of all domains.

    Args:
        words: Command line of any run on all domains.
        say: Takes lines for the user.
    """
    found: dict[str, Any] = {}

    def measure(run: Run) -> None:
        embedder = make_embedder(run, say)
        scores, _ = evaluate_baselines(_encoder(run), domains_with(run.domains, "test"), "test", embedder)
        for name, of in scores.items():
            found[name] = {
                metric: {
                    "mean": of["mean"][metric],
                    **{domain: of["domains"][domain][metric] for domain in of["domains"]},
                }
                for metric in of["mean"]
            }

    _with_run(words, measure)
    return found


def _with_run(words: Sequence[str], use: Callable[[Run], None]) -> None:
    config = load_config(words[1], words[2:])
    AcceleratorState._reset_state()  # One run after the other, and each may have its own precision.
    with StopSignals() as signals, RunFolder(config) as folder:
        use(build_run(config, folder, signals, overwrite=True))


def _encoder(run: Run) -> Encoder:
    transform = EvalTransform(run.config.data.image_size)
    return Encoder.of_student(run.model.udon, run.statistics, transform, run.config.name)
