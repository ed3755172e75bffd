"""Weights of domains by what they CAN still learn: loss over its ceiling, excess over a reference, progress, gain.

A domain whose loss is high because it has many classes, or because its labels are noise, need not get more steps. Each
of these is a `DynamicWeights` with another measure in the place of the mean loss, and keeps a few numbers more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from modeling_udon.data.weights import DynamicWeights

# Points of a domain's curve of losses that are kept; beyond, neighbours are averaged.
MOST_POINTS = 32
# Asymptotes of a power law that are tried, as shares of the lowest loss.
_ASYMPTOTES = 1 - np.geomspace(1, 0.001, 60)
# Fewer points say nothing about a curve of three numbers.
_MIN_POINTS = 3
# How far the largest gain moves a domain's log weight at an update.
_GAIN_RATE = 1.0


class LossOverLogClasses(DynamicWeights):
    """By the mean loss over log C, that of a guess among the domain's C classes.

    Args:
        num_classes: Classes that each domain's loss tells apart.
        uniform_share: Share of the steps that all domains get equally.
    """

    def __init__(self, num_classes: Sequence[int], uniform_share: float) -> None:
        super().__init__(len(num_classes), uniform_share)
        self._ceilings = np.log(np.asarray(num_classes, dtype=np.float64))

    def _worth(self, means: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return means / self._ceilings


class ExcessLoss(DynamicWeights):
    """By the mean loss above that of a reference run (DoReMi, arXiv 2305.10429), not below 0.

    Args:
        reference: Loss of each domain in the reference run.
        uniform_share: Share of the steps that all domains get equally.
    """

    def __init__(self, reference: Sequence[float], uniform_share: float) -> None:
        super().__init__(len(reference), uniform_share)
        self._reference = np.asarray(reference, dtype=np.float64)

    def _worth(self, means: np.ndarray, seen: np.ndarray) -> np.ndarray:
        return (means - self._reference).clip(min=0)


class LearningProgress(DynamicWeights):
    """By how far a domain's loss would fall with an equal share of the next interval's steps (ADO, arXiv 2410.11820).

    A power law `eps + beta n^-alpha` is fitted to each domain's mean losses over the batches `n` it has had. Until
    every domain has three of them, the weights stay.

    Args:
        num_domains: Number of domains.
        uniform_share: Share of the steps that all domains get equally.
    """

    def __init__(self, num_domains: int, uniform_share: float) -> None:
        super().__init__(num_domains, uniform_share)
        self._batches = np.zeros(num_domains)
        self._curves: list[list[list[float]]] = [[] for _ in range(num_domains)]

    def _worth(self, means: np.ndarray, seen: np.ndarray) -> np.ndarray:
        counts = self._loss_counts.astype(np.float64)
        for domain in np.flatnonzero(seen):
            # The middle of the interval stands for its batches.
            point = [float(self._batches[domain] + (counts[domain] + 1) / 2), float(means[domain])]
            self._curves[domain] = _thinned([*self._curves[domain], point])
        self._batches += counts
        if min(map(len, self._curves)) < _MIN_POINTS:
            return np.zeros(len(means))
        share = counts.sum() / len(means)
        falls = [
            expected_fall(np.asarray(curve)[:, 0], np.asarray(curve)[:, 1], now, share)
            for curve, now in zip(self._curves, self._batches.tolist(), strict=True)
        ]
        return np.asarray(falls)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON takes it."""
        return {**super().state_dict(), "batches": self._batches.tolist(), "curves": self._curves}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self._batches = np.asarray(state["batches"], dtype=np.float64)
        self._curves = [[list(point) for point in curve] for curve in state["curves"]]


class ValidationGain(DynamicWeights):
    """By the gain of the domain's validation score: EXP3 over domains, with gains rescaled by the largest so far.

    Each domain's log weight moves by what its score gained since the last update over the steps it had for that, in
    units of the largest such gain or loss of any domain so far (Graves et al., arXiv 1704.03003).

    Args:
        num_domains: Number of domains.
        uniform_share: Share of the steps that all domains get equally.
    """

    def __init__(self, num_domains: int, uniform_share: float) -> None:
        super().__init__(num_domains, uniform_share)
        self._log_weights = np.zeros(num_domains)
        self._before = np.full(num_domains, np.nan)
        self._now = np.full(num_domains, np.nan)
        self._largest = 0.0

    def observe_score(self, domain: int, score: float) -> None:
        """Takes a domain's score on the validation split."""
        self._now[domain] = score

    def _worth(self, means: np.ndarray, seen: np.ndarray) -> np.ndarray:
        gains = self._now - self._before
        self._before = np.where(np.isnan(self._now), self._before, self._now)
        shares = self._loss_counts / max(1, self._loss_counts.sum()) * len(means)
        gains = np.where(np.isnan(gains) | ~seen, 0, gains) / np.maximum(shares, 1 / len(means))
        self._largest = max(self._largest, float(np.abs(gains).max()))
        if self._largest > 0:
            self._log_weights += _GAIN_RATE * gains / self._largest
            # Only differences count; the highest stays at 0.
            self._log_weights -= self._log_weights.max()
        return np.exp(self._log_weights)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON takes it."""
        scores = [[None if np.isnan(score) else float(score) for score in of] for of in (self._before, self._now)]
        gains = {"log_weights": self._log_weights.tolist(), "scores": scores, "largest": self._largest}
        return {**super().state_dict(), **gains}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        super().load_state_dict(state)
        self._log_weights = np.asarray(state["log_weights"], dtype=np.float64)
        self._before, self._now = (np.asarray(scores, dtype=np.float64) for scores in state["scores"])
        self._largest = state["largest"]


def expected_fall(batches: np.ndarray, losses: np.ndarray, now: float, share: float) -> float:
    """How far a loss is expected to fall, by the power law `eps + beta n^-alpha` that fits best.

    For each asymptote `eps` below the lowest loss, the rest is a line in logarithms; of these lines, the one with the
    least squared error in the losses themselves counts.

    Args:
        batches: Batches `n` that the domain had had, ascending, of shape `(num_points,)`.
        losses: Its mean losses then.
        now: Batches that it has had.
        share: Batches that it would get.
    """
    logs = np.log(batches)
    best = (np.inf, 0.0)
    for asymptote in _ASYMPTOTES * losses.min():
        rest = np.log(np.maximum(losses - asymptote, 1e-12))
        spread = ((logs - logs.mean()) ** 2).sum()
        slope = ((logs - logs.mean()) * (rest - rest.mean())).sum() / spread if spread > 0 else 0.0
        level = rest.mean() - slope * logs.mean()
        error = float(((asymptote + np.exp(level + slope * logs) - losses) ** 2).sum())
        ahead = np.exp(level + slope * np.log([max(now, 1.0), max(now, 1.0) + share]))
        # A loss that rises has nothing to gain.
        if error < best[0]:
            best = (error, max(0.0, float(ahead[0] - ahead[1])))
    return best[1]


def _thinned(curve: list[list[float]]) -> list[list[float]]:
    if len(curve) <= MOST_POINTS:
        return curve
    pairs = zip(curve[:-1:2], curve[1:-1:2], strict=True)
    return [*([(one[0] + other[0]) / 2, (one[1] + other[1]) / 2] for one, other in pairs), curve[-1]]
