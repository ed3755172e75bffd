"""Peak memory and time of a step of heads and prototypes: all cosines at once, over chunks, on sampled classes.

One domain, student and teacher, the four terms; the backbone's features are given. Peaks are what torch's allocator
holds beyond weights and moments, by torch's profiler on a CPU. Ways are interleaved in one run. Run by hand:
`python benchmarks/many_classes.py [--classes 100000] [--json FILE]`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from modeling_udon.config import LossConfig, OptimConfig
from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.inputs import FEATURES
from modeling_udon.training.memory import estimate_prototypes
from modeling_udon.training.optimization import IdleHeads, learning_rates, make_optimizer, set_learning_rates
from modeling_udon.training.sampled_classes import SampledClasses

BATCH_SIZE, WIDTH, NUM_STEPS = 128, 192, 1000
WAYS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "chunks of 8192": {"chunk_size": 8192},
    "a tenth sampled": {"sampled_classes": 0.1},
    "a tenth sampled, chunks of 8192": {"sampled_classes": 0.1, "chunk_size": 8192},
}


class Step:
    """A step of heads and prototypes on random features.

    Args:
        num_classes: Classes of the one domain.
        objective: Values of the loss.
    """

    def __init__(self, num_classes: int, objective: dict[str, Any]) -> None:
        torch.manual_seed(0)
        backbone = {"model_type": "vit", "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 3}
        config = UdonConfig(backbone, domains={"many": num_classes})
        loss, optim = LossConfig(**objective), OptimConfig()
        self._model = UdonForDistillation(config, loss, inputs=FEATURES)
        self._model.udon.backbone.requires_grad_(False)
        self._optim = optim
        self._optimizer = make_optimizer(self._model, optim)
        idle_heads = IdleHeads(self._model, self._optimizer, optim, NUM_STEPS, hold=True)
        self._sampled = SampledClasses(self._model, self._optimizer, idle_heads, loss.sampled_classes, seed=0)
        self._step = 0
        estimate = estimate_prototypes(config.domains, 64, 256, BATCH_SIZE, loss, coasting=False)
        self.estimate = estimate.gradients + estimate.cosines

    def __call__(self) -> None:
        """Takes one step."""
        features = torch.nn.functional.normalize(torch.randn(BATCH_SIZE, WIDTH), dim=1)
        labels = torch.randint(0, self._model.num_classes["many"], (BATCH_SIZE,))
        set_learning_rates(self._optimizer, learning_rates(self._optim, self._step, NUM_STEPS))
        classes = self._sampled.take("many", labels, self._step)
        self._model(features, labels, "many", sampled_classes=classes).loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._sampled.put_back(self._step)
        self._step += 1


def peak_bytes(work: Callable[[], None]) -> int:
    """Most bytes that torch holds at a time while something runs, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def seconds(work: Callable[[], None]) -> float:
    """Times one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measures, prints the ratio last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=100_000, help="classes of the domain")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each; the median counts")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    steps = {name: Step(arguments.classes, objective) for name, objective in WAYS.items()}
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            times[name].append(seconds(step))
    figures = {}
    for name, step in steps.items():
        figures[name] = {
            "seconds": statistics.median(times[name]),
            "peak_bytes": peak_bytes(step),
            "estimated_bytes": step.estimate,
        }
        peak, estimate = (figures[name][key] / 2**20 for key in ("peak_bytes", "estimated_bytes"))
        print(f"{name}: {figures[name]['seconds']:.2f} s a step, peak {peak:.0f} MiB, estimate {estimate:.0f} MiB")
    ratio = figures["chunks of 8192"]["peak_bytes"] / figures["all at once"]["peak_bytes"]
    if arguments.json:
        arguments.json.write_text(json.dumps({"classes": arguments.classes, "ways": figures, "ratio": ratio}))
    print(f"ratio: {ratio:.2f}")


if __name__ == "__main__":
    main()
