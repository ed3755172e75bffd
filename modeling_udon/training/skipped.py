"""Skipped steps: a loss or gradient that is not finite, or a gradient far above the usual.

The judgement is made on the device and AdamW obeys it there, so that a GPU is not stopped at every step to ask. The
host learns of it where it brings the losses over, and then writes down which batch it was.
"""

import json
import math
from collections.abc import Iterable, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from modeling_udon.config import OptimConfig
from modeling_udon.data.domains import Domain
from modeling_udon.data.sampling import BatchDraw
from modeling_udon.storage import write_text
from modeling_udon.training.optimization import with_gradients
from modeling_udon.training.sharding import total_norm

# Gradient norms of about the last hundred steps of a domain make up its running norm, and ten have to be known.
_DECAY = 0.99
# Half a step less, for rounding in float32.
_KNOWN = 1 - _DECAY**9.5


class Verdict(IntEnum):
    """Whether a step was applied, and if not, why."""

    APPLIED = 0
    NOT_FINITE = 1
    SPIKE = 2


class Judgement(NamedTuple):
    """What `StepGuard` says of a step, as scalars on the device and the same on every process.

    Attributes:
        verdict: The value of a `Verdict`, int64.
        norm: Norm of the gradient over all parameters, float32; NaN where a gradient scaler decides.
    """

    verdict: torch.Tensor
    norm: torch.Tensor


class StepGuard:
    """Judges every step after its backward pass; `optimizer.step()` then changes nothing where it must not.

    Domains differ in the size of their gradients, so each has a running norm of its own. A spike enters it cut down
    to the threshold: the norm follows a lasting change, instead of refusing it for ever.

    Args:
        optim: With `skip_spikes` or without.
        optimizer: Fused AdamW, which reads `found_inf`.
        domains: Names of the domains.
        scaled: Whether a gradient scaler multiplies the gradients, and skips by itself those that overflow.
    """

    def __init__(
        self, optim: OptimConfig, optimizer: torch.optim.Optimizer, domains: Iterable[str], scaled: bool
    ) -> None:
        self._factor = optim.skip_spikes
        self._optimizer = optimizer
        self._scaled = scaled
        device = optimizer.param_groups[0]["params"][0].device
        # Of each domain: the sum of its norms, each step's share decayed, and the sum of the shares.
        self._running = {name: torch.zeros(2, device=device, dtype=torch.float32) for name in domains}

    @torch.no_grad()
    def judge(self, domain: str, faulty: torch.Tensor, norm: torch.Tensor | None = None) -> Judgement:
        """Judges the step whose gradients stand.

        Args:
            domain: Domain of the batch.
            faulty: On how many processes a loss is not finite, a scalar.
            norm: Norm of the gradient over all parameters, if it is known already.
        """
        if self._scaled:
            return Judgement((faulty > 0).long(), torch.full_like(faulty, math.nan))
        if norm is None:
            norm = total_norm(with_gradients(self._optimizer))
        finite = (faulty == 0) & norm.isfinite()
        spike = self._is_spike(domain, norm, finite)
        verdict = torch.where(finite, spike.long() * Verdict.SPIKE, int(Verdict.NOT_FINITE))
        self._optimizer.found_inf = (verdict > 0).float()  # type: ignore[attr-defined]
        return Judgement(verdict, norm.float())

    def state_dict(self) -> dict[str, list[float]]:
        """Returns the running norms as JSON takes them."""
        return {name: values.tolist() for name, values in self._running.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restores what `state_dict` gave."""
        for name, values in state.items():
            self._running[name].copy_(torch.tensor(values, dtype=torch.float32))

    def _is_spike(self, domain: str, norm: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
        if self._factor is None:
            return torch.zeros_like(finite)
        total, share = self._running[domain]
        threshold = self._factor * total / share.clamp(min=1 - _DECAY)
        known = share >= _KNOWN
        spike = finite & known & (norm > threshold)
        counted = torch.where(spike, threshold, norm.float())
        following = _DECAY * self._running[domain] + (1 - _DECAY) * torch.stack([counted, torch.ones_like(counted)])
        self._running[domain] = torch.where(finite, following, self._running[domain])
        return spike


class Incidents:
    """Counts steps that were not applied and writes them down, on the main process.

    Args:
        folder: Where they are written, a file of JSON each.
        domains: The opened domains.
        writes: Whether this is the main process.

    Attributes:
        in_a_row: Steps up to the last one whose loss or gradient was not finite.
    """

    def __init__(self, folder: Path, domains: Mapping[str, Domain], writes: bool) -> None:
        self.folder = folder
        self.in_a_row = 0
        self._domains = domains
        self._writes = writes

    def count(self, verdict: Verdict) -> None:
        """Counts a step."""
        self.in_a_row = self.in_a_row + 1 if verdict == Verdict.NOT_FINITE else 0

    def write(self, step: int, verdict: Verdict, draw: BatchDraw, values: Mapping[str, Any]) -> None:
        """Writes which batch it was.

        Args:
            step: Number of the step, from 0.
            verdict: Why it was not applied.
            draw: The images of the step, over all processes.
            values: What else is known of it.
        """
        if not self._writes:
            return
        images = self._domains[draw.domain].images[draw.rows.tolist()]["image"]
        content = {
            "step": step,
            "kind": verdict.name.lower(),
            "domain": draw.domain,
            "rows": draw.rows.tolist(),
            "paths": [image["path"] for image in images],
            **values,
        }
        self.folder.mkdir(exist_ok=True)
        write_text(self.folder / f"step-{step:08d}.json", json.dumps(_in_words(content), indent=1))


def _in_words(value: Any) -> Any:
    """Makes of numbers that JSON does not know what Python calls them, such as `"nan"`."""
    if isinstance(value, dict):
        return {key: _in_words(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
