"""Time of a training step with 512 domains beside one with 8, interleaved in one run.

Both trainers take whole steps (`Trainer.train_step`, `Trainer.count_step`) one domain after the other; all domains have
as many classes. Measuring starts when every domain has had its turn, so that a head is caught up over as many steps as
there are domains. The backbone is so small that a step is about as short as one of ViT-B/16 on a GPU: what Python does
for each domain weighs as much here as there. Run by hand:
`python benchmarks/domains.py [--idle-heads hold] [--rounds 20] [--json FILE]`; other options go to both runs.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from modeling_udon.config_file import load_config
from modeling_udon.data.dataset import DomainBatch
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.trainer import Trainer

FEW, MANY = 8, 512
IMAGE_SIZE, BATCH_SIZE, NUM_CLASSES = 32, 128, 200
STEPS_A_ROUND = 16


def write_images(folder: Path) -> Path:
    """Writes one small image a class, the data of every domain here."""
    images = []
    for number in range(NUM_CLASSES):
        buffer = io.BytesIO()
        PILImage.fromarray(np.full((8, 8, 3), number, np.uint8)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    (folder / "images").mkdir()
    features = Features({"image": Image(), "label": Value("int64")})
    rows = {"image": images, "label": list(range(NUM_CLASSES))}
    Dataset.from_dict(rows, features=features).to_parquet(folder / "images" / "train.parquet")
    return folder / "images"


def make_trainer(images: Path, num_domains: int, idle_heads: str, options: Sequence[str]) -> Trainer:
    """Starts a run of many domains that all have the same images, with what the command line says of it."""
    domain = {"path": str(images), "validation_split": None, "test_split": None}
    config = {
        "name": f"{num_domains}-domains",
        "output_dir": str(images.parent / "runs"),
        "domains": {f"d{number}": domain for number in range(num_domains)},
        "model": {
            "backbone_config": {
                "model_type": "vit",
                "image_size": IMAGE_SIZE,
                "patch_size": 8,
                "hidden_size": 96,
                "num_hidden_layers": 4,
                "num_attention_heads": 3,
                "intermediate_size": 384,
            }
        },
        "data": {"image_size": IMAGE_SIZE},
        "optim": {"max_grad_norm": 10.0},
        "ablation": {"idle_heads": idle_heads},
        "train": {"num_steps": 1_000_000, "batch_size": BATCH_SIZE},
    }
    path = images.parent / f"{num_domains}-domains.yaml"
    # JSON is YAML, without the aliases that a dump of equal domains would have.
    path.write_text(json.dumps(config), encoding="utf-8")
    checked = load_config(path, options)
    return Trainer(build_run(checked, RunFolder(checked), StopSignals()))


def take_steps(trainer: Trainer, num_steps: int) -> float:
    """Takes steps, one domain after the other, and returns the seconds of one."""
    names = list(trainer.run.domains)
    batch_size, side = trainer.run.config.train.batch_size, trainer.run.config.data.image_size
    pixels = torch.randint(256, (batch_size, side, side, 3), dtype=torch.uint8)
    labels = torch.randint(NUM_CLASSES, (batch_size,))
    on_gpu = trainer.run.accelerator.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    for _ in range(num_steps):
        batch = DomainBatch(names[trainer.step % len(names)], pixels, labels)
        trainer.count_step(batch, trainer.train_step(batch))
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / num_steps


def main() -> None:
    """Measures, prints the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each; the median counts")
    parser.add_argument("--idle-heads", choices=("coast", "hold"), default="coast", help="heads outside the batch")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder))
        few, many = (make_trainer(images, number, arguments.idle_heads, options) for number in (FEW, MANY))
        take_steps(few, STEPS_A_ROUND)
        take_steps(many, MANY + 1)
        times = []
        for number in range(arguments.rounds):
            # The second of a pair finds other caches than the first, so they take turns.
            pair = {trainer: take_steps(trainer, STEPS_A_ROUND) for trainer in ((few, many), (many, few))[number % 2]}
            times.append((pair[many], pair[few]))
    milliseconds = [1000 * statistics.median(column) for column in zip(*times, strict=True)]
    ratio = statistics.median(ours / other for ours, other in times)
    print(f"a step with {MANY} domains: {milliseconds[0]:.1f} ms, with {FEW} domains: {milliseconds[1]:.1f} ms")
    if arguments.json:
        figures = {"many_ms": milliseconds[0], "few_ms": milliseconds[1], "ratio": ratio}
        arguments.json.write_text(json.dumps(figures))
    print(f"ratio: {ratio:.3f}")


if __name__ == "__main__":
    main()
