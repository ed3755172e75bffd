"""Which domain each step takes, and which of its images.

Everything drawn depends on the seed and on positions alone: not on workers, processes, or how often anything is
logged. The state is the little that the past decides: steps taken, steps owed to each domain, weights, and the losses
since the last update.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

STRATEGIES = ("dynamic", "round_robin", "balanced", "dataset_size", "fixed")

# Keeps the generators of what is drawn apart: domains, images, row groups, images inside a window.
_ORDER_OF_DOMAINS, _ORDER_OF_IMAGES, _ORDER_OF_GROUPS, _ORDER_IN_WINDOW = 0, 1, 2, 3


@dataclass(frozen=True)
class BatchDraw:
    """The images that one process takes in one step.

    Attributes:
        domain: Name of the domain.
        rows: Rows in the domain's data, of shape `(batch_size,)`, int64.
        positions: For each row, how many images had been drawn from the domain before it, of the same shape.
    """

    domain: str
    rows: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class RowGroups:
    """How the rows of a streamed domain lie, and among how many of them its images are shuffled.

    Attributes:
        sizes: Rows of each row group, of shape `(num_groups,)`, in the order of the rows.
        window: Least number of rows that are shuffled together.
    """

    sizes: np.ndarray
    window: int


class WindowShuffle:
    """The order of one epoch of a streamed domain: row groups shuffled, then rows inside windows of row groups.

    A row follows from its place in the epoch alone, as in a permutation of all rows, but the rows of neighbouring
    places lie in few row groups.

    Args:
        groups: How the rows lie.
        key: Seed, domain and epoch.
    """

    def __init__(self, groups: RowGroups, key: tuple[int, int, int]) -> None:
        self._key = key
        self._order = _generator(_ORDER_OF_GROUPS, *key).permutation(len(groups.sizes))
        self._sizes = groups.sizes[self._order]
        self._first_rows = (np.cumsum(groups.sizes) - groups.sizes)[self._order]
        starts = np.cumsum(self._sizes) - self._sizes
        # A group belongs to the window that its first row falls into.
        first_groups = np.flatnonzero(np.diff(starts // groups.window, prepend=-1))
        self._group_bounds = np.append(first_groups, len(starts))
        self._starts = starts[first_groups]
        self._window: tuple[int, np.ndarray] = (-1, starts[:0])

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Rows at the given places of the epoch, of the same shape."""
        windows = np.searchsorted(self._starts, places, side="right") - 1
        rows = np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            rows[chosen] = self._rows_of(int(window))[places[chosen] - self._starts[window]]
        return rows

    def _rows_of(self, window: int) -> np.ndarray:
        if self._window[0] != window:
            groups = range(self._group_bounds[window], self._group_bounds[window + 1])
            rows = np.concatenate([self._first_rows[group] + np.arange(self._sizes[group]) for group in groups])
            self._window = (window, _generator(_ORDER_IN_WINDOW, *self._key, window).permutation(rows))
        return self._window[1]


def _generator(purpose: int, seed: int, *position: int) -> np.random.Generator:
    return np.random.default_rng((seed, purpose, *position))


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

    Attributes:
        weights: Current weights of shape `(num_domains,)`, summing to 1.
    """

    def __init__(self, num_domains: int) -> None:
        self.weights = np.full(num_domains, 1 / num_domains)
        self._loss_sums = np.zeros(num_domains)
        self._loss_counts = np.zeros(num_domains, dtype=np.int64)

    def observe(self, domain: int, loss: float) -> None:
        """Adds the mean loss of one batch of a domain."""
        self._loss_sums[domain] += loss
        self._loss_counts[domain] += 1

    def update(self) -> None:
        """Sets the weights from the losses observed and forgets those."""
        seen = self._loss_counts > 0
        means = self._loss_sums / np.maximum(self._loss_counts, 1)
        if means[seen].sum() > 0:
            self.weights = np.where(seen, means / means[seen].sum(), self.weights)
            self.weights = self.weights / self.weights.sum()
        self._loss_sums[:] = 0
        self._loss_counts[:] = 0

    def state_dict(self) -> dict[str, list[float]]:
        """Returns weights and losses as JSON takes them; floats survive it exactly."""
        return {
            "weights": self.weights.tolist(),
            "loss_sums": self._loss_sums.tolist(),
            "loss_counts": self._loss_counts.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restores what `state_dict` gave."""
        self.weights = np.asarray(state["weights"], dtype=np.float64)
        self._loss_sums = np.asarray(state["loss_sums"], dtype=np.float64)
        self._loss_counts = np.asarray(state["loss_counts"], dtype=np.int64)


class DomainBatchSampler(Sampler[BatchDraw]):
    """Draws the batches of one interval between two updates of the weights.

    Iterating gives the draws from the current step to the end of the interval and changes nothing, so workers may run
    ahead of training; `advance` is called once for each step that was trained.

    Args:
        sizes: Number of training images of each domain.
        num_steps: Number of steps of the whole run.
        batch_size: Images of one step over all processes.
        strategy: `"dynamic"` (by the losses given to `observe`; round-robin before the first update),
            `"round_robin"`, `"balanced"` (equal weights, shuffled), `"dataset_size"` or `"fixed"`.
        update_every: Steps of an interval.
        seed: Seed of all draws.
        weights: Weight of each domain for strategy `"fixed"`.
        rank: This process's number.
        world_size: Number of processes, which share each batch equally.
        row_groups: Of the domains that are streamed, how their rows lie; the others are shuffled as a whole.

    Raises:
        ValueError: If a domain has fewer images than a batch, the batch cannot be shared equally, or weights are
            missing, not positive, or given for a strategy that has its own.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        num_steps: int,
        batch_size: int,
        strategy: str = "dynamic",
        update_every: int = 1000,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        row_groups: Mapping[str, RowGroups] | None = None,
    ) -> None:
        for name, size in sizes.items():
            if size < batch_size:
                raise ValueError(
                    f"`train.batch_size` must be at most the number of training images of every domain. "
                    f"Got {batch_size} with {size} images in {name!r}."
                )
        if batch_size % world_size:
            raise ValueError(
                f"`train.batch_size` must be a multiple of the number of processes. Got {batch_size} with {world_size}."
            )
        self.names = tuple(sizes)
        self.num_steps = num_steps
        self.step = 0
        self._sizes = np.asarray([sizes[name] for name in self.names], dtype=np.int64)
        self._batch_size = batch_size
        self._strategy = strategy
        self._update_every = update_every
        self._seed = seed
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._dynamic = DynamicWeights(len(self.names))
        self._dynamic.weights = self._start_weights(weights)
        self._owed = np.zeros(len(self.names))
        self._batches_drawn = np.zeros(len(self.names), dtype=np.int64)
        self._row_groups = row_groups or {}
        self._orders: dict[int, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {}
        self._plan_interval()

    @property
    def weights(self) -> dict[str, float]:
        """Current weight of each domain."""
        return dict(zip(self.names, self._dynamic.weights.tolist(), strict=True))

    @property
    def steps_by_domain(self) -> dict[str, int]:
        """Steps that each domain has had."""
        taken = self._batches_drawn + np.bincount(self._order[: self._interval_step], minlength=len(self.names))
        return dict(zip(self.names, taken.tolist(), strict=True))

    def __iter__(self) -> Iterator[BatchDraw]:
        # A copy: training moves on to the next interval while a worker may still hold this iterator.
        order, start, drawn = self._order, self._interval_step, self._batches_drawn.copy()
        drawn += np.bincount(order[:start], minlength=len(self.names))
        for domain in order[start:]:
            yield self._draw(int(domain), int(drawn[domain]), self._slice)
            drawn[domain] += 1

    def __len__(self) -> int:
        return len(self._order) - self._interval_step

    def draw_at(self, step: int) -> BatchDraw:
        """Returns the whole batch, of all processes, of a step of this interval."""
        position = step - (self.step - self._interval_step)
        domain = int(self._order[position])
        drawn = self._batches_drawn[domain] + np.count_nonzero(self._order[:position] == domain)
        return self._draw(domain, int(drawn), slice(0, self._batch_size))

    @property
    def ends_interval(self) -> bool:
        """Whether the step that `advance` counts next is the last of its interval."""
        return self._interval_step + 1 >= len(self._order)

    def observe(self, domain: str, loss: float) -> None:
        """Adds the mean loss of a batch to those that decide the next dynamic weights."""
        self._dynamic.observe(self.names.index(domain), loss)

    def advance(self) -> bool:
        """Counts one trained step; all losses up to it must have been observed where `ends_interval`.

        Returns:
            Whether an interval ended and the next one was planned.
        """
        self.step += 1
        self._interval_step += 1
        if self._interval_step < len(self._order) or self.step >= self.num_steps:
            return False
        if self._strategy == "dynamic":
            self._dynamic.update()
        self._batches_drawn += np.bincount(self._order, minlength=len(self.names))
        self._owed = self._owed_next
        self._plan_interval()
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the state at the current step as JSON takes it."""
        return {
            "step": self.step,
            "interval_step": self._interval_step,
            "batches_drawn": self._batches_drawn.tolist(),
            "owed": self._owed.tolist(),
            "dynamic": self._dynamic.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, in a sampler made with the same arguments."""
        self._batches_drawn = np.asarray(state["batches_drawn"], dtype=np.int64)
        self._owed = np.asarray(state["owed"], dtype=np.float64)
        self._dynamic.load_state_dict(state["dynamic"])
        self.step = state["step"] - state["interval_step"]
        self._plan_interval()
        self.step = state["step"]
        self._interval_step = state["interval_step"]

    def _start_weights(self, weights: Mapping[str, float] | None) -> np.ndarray:
        if (weights is not None) != (self._strategy == "fixed"):
            raise ValueError(
                f"`sampling.weights` must be given for strategy 'fixed' and for no other. "
                f"Got {dict(weights) if weights is not None else None} with {self._strategy!r}."
            )
        if weights is not None:
            if set(weights) != set(self.names) or min(weights.values()) <= 0:
                raise ValueError(
                    f"`sampling.weights` must give a positive weight to each of {', '.join(self.names)}. "
                    f"Got {dict(weights)}."
                )
            values = np.asarray([weights[name] for name in self.names], dtype=np.float64)
        elif self._strategy == "dataset_size":
            values = self._sizes.astype(np.float64)
        else:
            values = np.ones(len(self.names))
        return values / values.sum()

    def _plan_interval(self) -> None:
        """Sets the order of domains from the current step to the end of its interval."""
        interval = self.step // self._update_every
        num_steps = min(self._update_every, self.num_steps - self.step)
        self._interval_step = 0
        if self._strategy == "round_robin" or (self._strategy == "dynamic" and interval == 0):
            self._order = (self.step + np.arange(num_steps)) % len(self.names)
            self._owed_next = self._owed
            return
        counts, self._owed_next = allocate_steps(self._dynamic.weights, num_steps, self._owed)
        generator = _generator(_ORDER_OF_DOMAINS, self._seed, interval)
        self._order = generator.permutation(np.repeat(np.arange(len(self.names)), counts))

    def _draw(self, domain: int, batches_before: int, part: slice) -> BatchDraw:
        start = batches_before * self._batch_size
        positions = np.arange(start + part.start, start + part.stop)
        epochs, offsets = np.divmod(positions, self._sizes[domain])
        rows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            rows[chosen] = self._order_of_epoch(domain, int(epoch))(offsets[chosen])
        return BatchDraw(self.names[domain], rows, positions)

    def _order_of_epoch(self, domain: int, epoch: int) -> Callable[[np.ndarray], np.ndarray]:
        """Gives rows by their places in an epoch; one epoch of each domain is kept."""
        if self._orders.get(domain, (-1,))[0] != epoch:
            groups = self._row_groups.get(self.names[domain])
            if groups is not None:
                self._orders[domain] = (epoch, WindowShuffle(groups, (self._seed, domain, epoch)).rows)
            else:
                generator = _generator(_ORDER_OF_IMAGES, self._seed, domain, epoch)
                self._orders[domain] = (epoch, generator.permutation(self._sizes[domain]).__getitem__)
        return self._orders[domain][1]
