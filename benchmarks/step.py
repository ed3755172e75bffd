"""Cost of a full UDON step beside a bare step of the same backbone, interleaved in one run.

The bare step is the backbone alone with a mean-square loss and the same optimiser. Run by hand:
`python benchmarks/step.py [--json FILE]`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.config import OptimConfig
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.optimization import IdleHeads, learning_rates, make_optimizer, set_learning_rates

IMAGE_SIZE, PATCH_SIZE, BATCH_SIZE = 64, 8, 64
CLASSES = {"d100": 100, "d1000": 1000, "d5000": 5000, "d20000": 20000}
NUM_STEPS = 1000


def vit_tiny() -> dict[str, object]:
    """Returns the configuration of ViT-Ti (192 wide, 12 layers, 3 heads)."""
    return {
        "model_type": "vit",
        "hidden_size": 192,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    }


def udon_step(device: torch.device) -> Callable[[], None]:
    """Returns a function that takes one full training step, one domain after the other."""
    model = UdonForDistillation(UdonConfig(backbone_config=vit_tiny(), domains=CLASSES)).to(device)
    optim = OptimConfig(frozen_fraction=0)
    optimizer = make_optimizer(model, optim)
    idle_heads = IdleHeads(model, optimizer, optim, NUM_STEPS)
    step = 0

    def take() -> None:
        nonlocal step
        domain = list(CLASSES)[step % len(CLASSES)]
        idle_heads.catch_up(domain, step)
        set_learning_rates(optimizer, learning_rates(optim, step, NUM_STEPS))
        pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        labels = torch.randint(CLASSES[domain], (BATCH_SIZE,), device=device)
        model(pixels, labels, domain).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

    return take


def bare_step(device: torch.device) -> Callable[[], None]:
    """Returns a function that takes one step of the backbone alone."""
    backbone: nn.Module = UdonModel(UdonConfig(backbone_config=vit_tiny())).backbone.to(device)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-5, weight_decay=1e-6, fused=True)

    def take() -> None:
        pixels = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, device=device)
        backbone(pixels).last_hidden_state[:, 0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return take


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Times one call per domain."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in CLASSES:
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(CLASSES)


def main() -> None:
    """Measures, prints the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each; the median counts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    udon, bare = udon_step(device), bare_step(device)
    seconds(udon, device), seconds(bare, device)
    times = [(seconds(udon, device), seconds(bare, device)) for _ in range(arguments.rounds)]
    udon_median, bare_median = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(ours / other for ours, other in times)
    print(f"UDON step: {BATCH_SIZE / udon_median:.1f} images/s, bare step: {BATCH_SIZE / bare_median:.1f} images/s")
    if arguments.json:
        figures = {"udon_images_per_second": BATCH_SIZE / udon_median, "ratio": ratio}
        arguments.json.write_text(json.dumps(figures | {"bare_images_per_second": BATCH_SIZE / bare_median}))
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
