"""Cost of a full UDON step beside a bare step of the same backbone, interleaved in one run.

The bare step is the backbone alone with a mean-square loss and the same optimiser. Run by hand:
`python benchmarks/step.py [--json FILE]`, on a GPU for example with
`--backbone vit-b --image-size 224 --patch-size 16 --batch-size 128 --precision bf16 [--compile]`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from modeling_udon.config import OptimConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.optimization import IdleHeads, learning_rates, make_optimizer, set_learning_rates

CLASSES = {"d100": 100, "d1000": 1000, "d5000": 5000, "d20000": 20000}
NUM_STEPS = 1000
# Width, layers, attention heads.
BACKBONES = {"vit-ti": (192, 12, 3), "vit-s": (384, 12, 6), "vit-b": (768, 12, 12), "vit-l": (1024, 24, 16)}


@dataclass(frozen=True)
class Setting:
    """What both steps have in common.

    Attributes:
        backbone: One of `BACKBONES`.
        image_size: Side of the images in pixels.
        patch_size: Side of a patch in pixels.
        batch_size: Images of a step.
        precision: `"no"` (float32) or `"bf16"`.
        compiled: Whether the backbone is compiled by torch, as by `train.compile`.
        device: Where both run.
    """

    backbone: str
    image_size: int
    patch_size: int
    batch_size: int
    precision: str
    compiled: bool
    device: torch.device

    def config(self) -> dict[str, object]:
        """The backbone's configuration."""
        width, layers, heads = BACKBONES[self.backbone]
        return {
            "model_type": "vit",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
        }

    def pixels(self) -> torch.Tensor:
        """A batch of noise."""
        return torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=self.device)

    def autocast(self) -> torch.autocast:
        """The precision of both forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def udon_step(setting: Setting) -> Callable[[], None]:
    """Returns a function that takes one full training step, one domain after the other."""
    model = UdonForDistillation(UdonConfig(backbone_config=setting.config(), domains=CLASSES)).to(setting.device)
    if setting.compiled:
        model.udon.backbone.compile()
    optim = OptimConfig(frozen_fraction=0)
    optimizer = make_optimizer(model, optim)
    idle_heads = IdleHeads(model, optimizer, optim, NUM_STEPS)
    step = 0

    def take() -> None:
        nonlocal step
        domain = list(CLASSES)[step % len(CLASSES)]
        idle_heads.catch_up(domain, step)
        set_learning_rates(optimizer, learning_rates(optim, step, NUM_STEPS))
        labels = torch.randint(CLASSES[domain], (setting.batch_size,), device=setting.device)
        with setting.autocast():
            loss = model(setting.pixels(), labels, domain).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

    return take


def bare_step(setting: Setting) -> Callable[[], None]:
    """Returns a function that takes one step of the backbone alone."""
    backbone: nn.Module = UdonModel(UdonConfig(backbone_config=setting.config())).backbone.to(setting.device)
    if setting.compiled:
        backbone.compile()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-5, weight_decay=1e-6, fused=True)

    def take() -> None:
        with setting.autocast():
            features = backbone(setting.pixels()).last_hidden_state[:, 0]
        features.float().square().mean().backward()
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


def read_arguments() -> tuple[Setting, int, Path | None]:
    """Parses the command line: the setting, rounds, and where figures go."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each; the median counts")
    parser.add_argument("--backbone", choices=list(BACKBONES), default="vit-ti")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--compile", action="store_true", help="compile the backbone")
    parser.add_argument("--json", type=Path, help="file for the figures")
    found = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (found.image_size, found.patch_size, found.batch_size)
    return Setting(found.backbone, *sizes, found.precision, found.compile, device), found.rounds, found.json


def main() -> None:
    """Measures, prints the ratio last."""
    setting, rounds, file = read_arguments()
    torch.manual_seed(0)
    udon, bare = udon_step(setting), bare_step(setting)
    seconds(udon, setting.device), seconds(bare, setting.device)
    times = [(seconds(udon, setting.device), seconds(bare, setting.device)) for _ in range(rounds)]
    udon_speed, bare_speed = (setting.batch_size / statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(ours / other for ours, other in times)
    print(f"UDON step: {udon_speed:.1f} images/s, bare step: {bare_speed:.1f} images/s")
    if setting.device.type == "cuda":
        print(f"peak memory of both: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if file:
        figures = {"udon_images_per_second": udon_speed, "bare_images_per_second": bare_speed, "ratio": ratio}
        file.write_text(json.dumps(figures))
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
