"""Training on what is cached of a frozen start, in this process, and what the start gives without training."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from modeling_udon.config_file import load_config
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.encoder import Encoder
from modeling_udon.evaluation.neighbours import domains_with, evaluate_baselines, search_model
from modeling_udon.training.feature_embedder import make_embedder
from modeling_udon.training.run import Run, build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer

_HEADS = "heads.safetensors"


def train_cached(
    words: Sequence[str], folder: Path, start: Path | None = None, keep: bool = False, beat: float = -1
) -> None:
    """Trains by the trainer's own steps and scores the last student; writes `results.json` and `cost.json`.

    A run is over in seconds: there are no checkpoints, and no validation on the way to choose among.

    Args:
        words: Command line of the run, its config first.
        folder: The run's folder.
        start: Folder of a run whose heads, prototypes and centre this one begins with; it has kept them.
        keep: Whether this one keeps its own.
        beat: R@1 on the validation up to which the test split is not read.
    """

    def train(run: Run) -> None:
        trainer = Trainer(run)
        batches = trainer.batches()
        first = next(batches)
        if start is not None:
            # Not before, since opening the data sets the centre.
            run.model.load_state_dict(load_file(start / _HEADS), strict=False)
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
            splits: dict[str, dict[str, Any]] = {}
            for split in ("validation", "test"):
                if (found := domains_with(run.domains, split)) and _quality(splits) > beat:
                    splits[split] = search_model(encoder, found, split, embedder).scores().as_dict()
        if keep:
            weights = run.model.state_dict().items()
            save_file({name: value for name, value in weights if ".backbone." not in name}, folder / _HEADS)
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


def _quality(splits: Mapping[str, Any]) -> float:
    quality: float = splits["validation"]["merged"]["mean"]["R@1"] if "validation" in splits else math.inf
    return quality


def _with_run(words: Sequence[str], use: Callable[[Run], None]) -> None:
    config = load_config(words[1], words[2:])
    AcceleratorState._reset_state()  # One run after the other, and each may have its own precision.
    with StopSignals() as signals, RunFolder(config) as folder:
        use(build_run(config, folder, signals, overwrite=True))


def _encoder(run: Run) -> Encoder:
    transform = EvalTransform(run.config.data.image_size)
    return Encoder.of_student(run.model.udon, run.statistics, transform, run.config.name)
