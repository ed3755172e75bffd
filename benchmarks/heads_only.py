"""Cost of a step on cached features beside a step with the same frozen backbone live, interleaved in one run.

Both train the same heads on the same draws through the trainer's own loop, loading included. The live one decodes and
augments the images and runs the backbone for each step; it keeps no activations of the backbone, so that nothing is
spent on a backward pass that is not needed. A full step, in which the backbone learns too, and the time that filling
the cache takes are told as well. Run by hand: `python benchmarks/heads_only.py [--json FILE]`.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value, disable_progress_bars
from PIL import Image as PILImage

from modeling_udon.config import TrainConfig
from modeling_udon.data.dataset import DomainBatch
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer

IMAGE_SIZE, STORED_SIZE, BATCH_SIZE = 64, 128, 64
NUM_IMAGES, NUM_CLASSES = 256, 64
STEPS = 2


def write_domain(folder: Path, seed: int) -> None:
    """Writes a domain of smooth random JPEGs of 128 x 128 pixels."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(NUM_IMAGES):
        coarse = PILImage.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((STORED_SIZE, STORED_SIZE), PILImage.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        images.append({"bytes": buffer.getvalue(), "path": None})
    labels = [number % NUM_CLASSES for number in range(NUM_IMAGES)]
    folder.mkdir(parents=True)
    features = Features({"image": Image(), "label": Value("int64")})
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "train.parquet")


def make_trainer(folder: Path, name: str, heads_only: bool, num_workers: int) -> Trainer:
    """Makes the trainer of a ViT-Ti (192 wide, 12 layers, 3 heads) with UDON's heads on both domains."""
    no_evaluation = {"validation_split": None, "test_split": None}
    backbone = {"model_type": "vit", "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
    backbone |= {"intermediate_size": 768, "image_size": IMAGE_SIZE, "patch_size": 8}
    values = {
        "name": name,
        "output_dir": folder / "runs",
        "domains": {domain: {"path": str(folder / domain), **no_evaluation} for domain in ("one", "two")},
        "model": {"backbone_config": backbone},
        "data": {"image_size": IMAGE_SIZE, "num_workers": num_workers},
        "optim": {"frozen_fraction": 0.0},
        "train": {"num_steps": 10_000, "batch_size": BATCH_SIZE, "heads_only": heads_only},
    }
    config = TrainConfig.model_validate(values)
    return Trainer(build_run(config, RunFolder(config), StopSignals()))


class Loop:
    """The trainer's loop, to be run some steps at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches: Iterator[DomainBatch] = trainer.batches()
        started = time.perf_counter()
        self.take(1)
        self.seconds_to_first_step = time.perf_counter() - started
        self.take(1)

    def take(self, steps: int) -> float:
        """Takes some steps and returns the seconds that one took."""
        started = time.perf_counter()
        for _ in range(steps):
            batch = next(self._batches)
            losses = self._trainer.train_step(batch)
            self._trainer.count_step(batch, losses)
        if self._trainer.run.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps


def main() -> None:
    """Measures, prints the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the median counts")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images for the live steps")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, domain in enumerate(("one", "two")):
            write_domain(folder / domain, seed)
        cached = Loop(make_trainer(folder, "cached", True, arguments.num_workers))
        frozen = make_trainer(folder, "live", False, arguments.num_workers)
        # What a user without the cache would do: a backbone that needs no gradient builds no graph.
        frozen.run.model.udon.backbone.requires_grad_(False)
        live = Loop(frozen)
        full = Loop(make_trainer(folder, "full", False, arguments.num_workers))
        times = [(cached.take(20 * STEPS), live.take(STEPS), full.take(STEPS)) for _ in range(arguments.rounds)]
    ours, theirs, learning = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(one / other for one, other, _ in times)
    filling = cached.seconds_to_first_step / (2 * NUM_IMAGES)
    print(f"on cached features: {BATCH_SIZE / ours:.0f} images/s")
    print(f"frozen backbone, live: {BATCH_SIZE / theirs:.0f} images/s")
    print(f"learning backbone: {BATCH_SIZE / learning:.0f} images/s")
    epochs = filling * BATCH_SIZE / (theirs - ours)
    print(f"filling the cache: {1 / filling:.0f} images/s, once; paid back after {epochs:.1f} epochs of live steps")
    if arguments.json:
        figures = {"cached": ours, "live": theirs, "learning": learning, "filling_per_image": filling, "ratio": ratio}
        arguments.json.write_text(json.dumps(figures))
    print(f"ratio: {ratio:.3f}")


if __name__ == "__main__":
    main()
