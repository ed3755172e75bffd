"""Cost of each part of a training step beside the backbone, in processor time of one thread.

ViT-B/16 at 224 pixels forward and backward, the student's and teacher's terms over some numbers of classes, AdamW, and
catching an idle head up. Processor time does not count other work on the machine. Run by hand:
`python benchmarks/step_costs.py [--json FILE]`; `benchmarks/plan.py` plans with its figures.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_udon.config import OptimConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.optimization import IdleHeads, make_optimizer

BATCH_SIZE = 128
IMAGES = 2  # of the backbone's measurement
IMAGE_SIZE = 16  # where the heads alone are measured, behind no layer
CLASSES = {"d1000": 1000, "d10000": 10_000, "d40000": 40_000}


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    """Least processor time of a call."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times[1:])


def backbone_seconds(rounds: int) -> float:
    """Forward and backward pass of ViT-B/16, of one image."""
    backbone = UdonForDistillation(UdonConfig(backbone_config={"model_type": "vit"})).udon.backbone
    pixels = torch.randn(IMAGES, 3, 224, 224)
    return best_seconds(lambda: backbone(pixels).last_hidden_state[:, 0].sum().backward(), rounds) / IMAGES


def head_seconds(model: UdonForDistillation, name: str, rounds: int) -> dict[str, float]:
    """The terms of one domain with their gradients over a batch, AdamW, and catching up 100 steps."""
    optim = OptimConfig(frozen_fraction=0)
    optimizer = make_optimizer(model, optim)
    optimizer.param_groups[0]["params"], own = [], list(model.domain_parameters(name).values())
    optimizer.param_groups[1]["params"] = own
    idle_heads = IdleHeads(model, optimizer, optim, 100_000)
    pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    labels = torch.randint(CLASSES[name], (BATCH_SIZE,))
    steps = iter(range(100, 100_000, 100))
    return {
        "terms": best_seconds(lambda: model(pixels, labels, name).loss.backward(), rounds),
        "adamw": best_seconds(optimizer.step, rounds),
        "catch_up": best_seconds(lambda: idle_heads.catch_up(name, next(steps)), rounds),
    }


def main() -> None:
    """Measures and prints a row for each number of classes; the share of the largest comes last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the least counts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backbone = backbone_seconds(arguments.rounds)
    narrow = {"model_type": "vit", "image_size": IMAGE_SIZE, "patch_size": IMAGE_SIZE, "num_hidden_layers": 0}
    model = UdonForDistillation(UdonConfig(backbone_config=narrow, domains=CLASSES))
    heads = {str(number): head_seconds(model, name, arguments.rounds) for name, number in CLASSES.items()}
    print(f"backbone: {backbone * 1000:.0f} ms an image, {backbone * BATCH_SIZE:.1f} s for {BATCH_SIZE}")
    for num_classes, seconds in heads.items():
        parts = ", ".join(f"{part} {value * 1000:.0f} ms" for part, value in seconds.items())
        print(f"{int(num_classes):,} classes, {BATCH_SIZE} images: {parts}")
    share = 1 + sum(heads[str(max(CLASSES.values()))].values()) / (backbone * BATCH_SIZE)
    if arguments.json:
        arguments.json.write_text(json.dumps({"backbone": backbone, "heads": heads, "ratio": share}))
    print(f"ratio: {share:.3f}")


if __name__ == "__main__":
    main()
