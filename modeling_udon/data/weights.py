"""Weights of domains, and how many steps of an interval each domain gets by them."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np


def allocate_steps(weights: np.ndarray, num_steps: int, owed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares out steps by weight, exactly, by largest remainder.

    What a domain did not get of its share is owed to it in the next interval, so that a domain of any weight gets
    its turn. The original floors and gives the rest to the last domain; the counts differ by less than the number
    of domains.

    Args:
        weights: Weights of shape `(num_domains,)` that sum to 1.
        num_steps: Number of steps to share out.
        owed: What each domain is owed from earlier intervals, in steps, of shape `(num_domains,)`, summing to 0.

    Returns:
        Steps of each domain, int64, summing to `num_steps`, and what is owed after them.
    """
    shares = weights * num_steps + owed
    counts = np.floor(shares + 1e-9).clip(min=0).astype(np.int64)
    remainders = shares - counts
    # A domain that is far in debt can hold `counts` above `num_steps`; then the smallest remainders pay it back.
    missing = num_steps - int(counts.sum())
    while missing < 0:
        payable = np.where(counts > 0, remainders, np.inf)
        counts[np.argmin(payable)] -= 1
        remainders = shares - counts
        missing += 1
    counts[np.argsort(-remainders, kind="stable")[:missing]] += 1
    return counts, shares - counts


class DynamicWeights:
    """Sampling weights in proportion to each domain's mean loss since the last update.

    A domain that was not seen since then keeps its old weight, and all are renormalised (numbers of the original).

    Args:
        num_domains: Number of domains.
        uniform_share: Share of the steps that all domains get equally, whatever their losses.

    Attributes:
        weights: Current weights of shape `(num_domains,)`, summing to 1.
        last_means: Mean loss of each domain between the last two updates, NaN where it was not seen.
    """

    def __init__(self, num_domains: int, uniform_share: float = 0.0) -> None:
        self.weights = np.full(num_domains, 1 / num_domains)
        self.last_means = np.full(num_domains, np.nan)
        self._uniform_share = uniform_share
        self._loss_sums = np.zeros(num_domains)
        self._loss_counts = np.zeros(num_domains, dtype=np.int64)

    def at(self, weights: np.ndarray) -> Self:
        """Sets the weights that it begins with, and returns it."""
        self.weights = weights
        return self

    def observe(self, domain: int, loss: float) -> None:
        """Adds the mean loss of one batch of a domain."""
        self._loss_sums[domain] += loss
        self._loss_counts[domain] += 1

    def observe_score(self, domain: int, score: float) -> None:
        """Takes a domain's score on the validation split, for those who go by it."""

    def update(self) -> None:
        """Sets the weights from the losses observed and forgets those."""
        seen = self._loss_counts > 0
        means = self._loss_sums / np.maximum(self._loss_counts, 1)
        worth = self._worth(means, seen)
        if worth[seen].sum() > 0:
            weights = np.where(seen, worth / worth[seen].sum(), self.weights)
            weights = weights / weights.sum()
            self.weights = (1 - self._uniform_share) * weights + self._uniform_share / len(weights)
        self.forget()

    def forget(self) -> None:
        """Keeps the mean losses for reading, and begins anew."""
        self.last_means = np.where(self._loss_counts > 0, self._loss_sums / np.maximum(self._loss_counts, 1), np.nan)
        self._loss_sums[:] = 0
        self._loss_counts[:] = 0

    def _worth(self, means: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """What the weights are in proportion to; nothing changes where all of it is 0.

        Args:
            means: Mean loss of each domain since the last update, of shape `(num_domains,)`.
            seen: Whether it had any.
        """
        return means

    def state_dict(self) -> dict[str, Any]:
        """Returns weights and losses as JSON takes them; floats survive it exactly."""
        return {
            "weights": self.weights.tolist(),
            "loss_sums": self._loss_sums.tolist(),
            "loss_counts": self._loss_counts.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.weights = np.asarray(state["weights"], dtype=np.float64)
        self._loss_sums = np.asarray(state["loss_sums"], dtype=np.float64)
        self._loss_counts = np.asarray(state["loss_counts"], dtype=np.int64)


def start_weights(sizes: Mapping[str, int], strategy: str, weights: Mapping[str, float] | None) -> np.ndarray:
    """Weights of shape `(num_domains,)` that a strategy begins with, summing to 1.

    Raises:
        ValueError: If weights are missing, not positive, or given for a strategy that has its own.
    """
    if (weights is not None) != (strategy == "fixed"):
        raise ValueError(
            f"`sampling.weights` must be given for strategy 'fixed' and for no other. "
            f"Got {dict(weights) if weights is not None else None} with {strategy!r}."
        )
    names = tuple(sizes)
    if weights is not None:
        if set(weights) != set(names) or min(weights.values()) <= 0:
            raise ValueError(
                f"`sampling.weights` must give a positive weight to each of {', '.join(names)}. Got {dict(weights)}."
            )
        values = np.asarray([weights[name] for name in names], dtype=np.float64)
    elif strategy == "dataset_size":
        values = np.asarray(list(sizes.values()), dtype=np.float64)
    else:
        values = np.ones(len(names))
    return values / values.sum()
