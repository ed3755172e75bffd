"""Share of time that the trainer waits for data, by the number of workers that decode.

The trainer's own loop on the JPEGs of `benchmarks/loader.py`; the first steps of each run, in which workers start, are
left out. Run by hand, on a GPU: `python benchmarks/workers.py --workers 1 2 4 8 12 [--json FILE]`; elsewhere a small
ViT shows that it works.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import disable_progress_bars
from loader import SIZES, write_jpegs

from modeling_udon.config import TrainConfig
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer

FIRST_STEPS = 10


def make_trainer(folder: Path, images: Path, num_workers: int, num_steps: int) -> Trainer:
    """Makes the trainer of a ViT-B/16 in bf16 with 128 images a step, or of a small ViT where there is no GPU."""
    on_gpu = torch.cuda.is_available()
    width, layers, heads = (768, 12, 12) if on_gpu else (64, 2, 2)
    backbone = {"model_type": "vit", "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    backbone |= {"intermediate_size": 4 * width, "image_size": 224, "patch_size": 16 if on_gpu else 56}
    values = {
        "name": f"workers-{num_workers}",
        "output_dir": folder / "runs" / images.name,
        "domains": {"photos": {"path": str(images), "validation_split": None, "test_split": None}},
        "model": {"backbone_config": backbone},
        "data": {"num_workers": num_workers},
        "optim": {"frozen_fraction": 0.0},
        "train": {"num_steps": num_steps, "batch_size": 128, "mixed_precision": "bf16" if on_gpu else "no"},
    }
    config = TrainConfig.model_validate(values)
    return Trainer(build_run(config, RunFolder(config), StopSignals()))


def measure(trainer: Trainer) -> dict[str, float]:
    """Trains, and gives what the trainer logged of all steps but the first."""
    for batch in trainer.batches():
        trainer.count_step(batch, trainer.train_step(batch))
        if trainer.step in (FIRST_STEPS, trainer.run.num_steps):
            trainer.log()
    lines = (trainer.run.config.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    return {name: last[name] for name in ("images_per_second", "data_wait_share")}


def main() -> None:
    """Measures each size of image with each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes that decode")
    parser.add_argument(
        "--steps", type=int, default=100, help=f"steps of each run, the first {FIRST_STEPS} not counted"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    disable_progress_bars()
    figures: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (size, (width, height)) in enumerate(SIZES.items()):
            images = folder / str(number)
            write_jpegs(images, width, height)
            figures[size] = {}
            for workers in arguments.workers:
                found = measure(make_trainer(folder, images, workers, arguments.steps))
                figures[size][workers] = found
                rate, share = found["images_per_second"], found["data_wait_share"]
                print(f"{size}, {workers} workers: {rate:.0f} images/s, {share:.1%} waiting for data")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
