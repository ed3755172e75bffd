"""Sampling: the domain of each step, and the images of its batch.

Everything drawn depends on the seed and on positions alone: not on workers, processes, or how often anything is
logged. The state is the little that the past decides: steps taken, steps owed to each domain, weights, and the losses
since the last update.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from modeling_udon.data.class_draws import ClassDraws
from modeling_udon.data.weights import DynamicWeights, allocate_steps, start_weights
from modeling_udon.data.windows import ORDER_OF_DOMAINS, ORDER_OF_IMAGES, RowGroups, WindowShuffle, generator_for

# Those whose weights change: they go round-robin before the first update.
ADAPTIVE = ("dynamic", "loss_over_log_c", "excess_loss", "learning_progress", "validation_gain")
STRATEGIES = (*ADAPTIVE, "round_robin", "balanced", "dataset_size", "fixed")


@dataclass(frozen=True)
class BatchDraw:
    """The images that one process takes in one step.

    Attributes:
        domain: Name of the domain.
        rows: Rows in the domain's data, of shape `(batch_size,)`, int64.
        positions: For each row, how many images had been drawn from the domain before it, of the same shape.
        source: Images of a labelled domain that go with them, as many, where batches come in pairs.
    """

    domain: str
    rows: np.ndarray
    positions: np.ndarray
    source: "BatchDraw | None" = None


class DomainBatchSampler(Sampler[BatchDraw]):
    """Draws the batches of one interval between two updates of the weights.

    Iterating gives the draws from the current step to the end of the interval, or of the run, and changes nothing, so
    workers may run ahead of training; `advance` is called once for each step that was trained.

    Intervals are always planned whole, also the one that the run ends in: what is drawn does not depend on `num_steps`,
    and a finished run that is extended goes on as if it had been longer from the start. A domain with fewer images than
    a batch fills it from its next epochs, so that no image is drawn again before all others were.

    Args:
        sizes: Number of training images of each domain.
        num_steps: Number of steps of the whole run.
        batch_size: Images of one step over all processes.
        strategy: One of `ADAPTIVE` (by what is given to `observe` and `observe_score`; round-robin before the first
            update), `"round_robin"`, `"balanced"` (equal weights, shuffled), `"dataset_size"` or `"fixed"`.
        update_every: Steps of an interval.
        seed: Seed of all draws.
        weights: Weight of each domain for strategy `"fixed"`.
        rank: This process's number.
        world_size: Number of processes, which share each batch equally.
        row_groups: Of the domains that are streamed, how their rows lie; the others are shuffled as a whole.
        adaptive: Sets the weights of an adaptive strategy; left out for `"dynamic"`.
        class_draws: Of domains whose images are drawn by class, their order; the others give each image once an epoch.

    Raises:
        ValueError: If the batch cannot be shared equally, or weights are missing, not positive, or given for a strategy
            that has its own.
    """

    _sources: "DomainBatchSampler | None" = None

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
        adaptive: DynamicWeights | None = None,
        class_draws: Mapping[str, ClassDraws] | None = None,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"`train.batch_size` must be a multiple of the number of processes. Got {batch_size} with {world_size}."
            )
        self.names = tuple(sizes)
        self.num_steps, self.step = num_steps, 0
        self._sizes = np.asarray([sizes[name] for name in self.names], dtype=np.int64)
        self._batch_size, self._seed = batch_size, seed
        self._strategy, self._update_every = strategy, update_every
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._dynamic = (adaptive or DynamicWeights(len(self.names))).at(start_weights(sizes, strategy, weights))
        self._owed, self._batches_drawn = np.zeros(len(self.names)), np.zeros(len(self.names), dtype=np.int64)
        self._row_groups, self._class_draws = row_groups or {}, class_draws or {}
        self._orders: dict[int, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {}
        self._plan_interval()

    def paired_with(self, sources: "DomainBatchSampler") -> "DomainBatchSampler":
        """Lets every batch come with one of labelled domains, which take turns, and returns itself.

        Which one depends on the step alone, so there is nothing more to save.

        Args:
            sources: Sampler of the labelled domains, of another seed: equal orders of domains of equal size could pair
                images of the same class.
        """
        self._sources = sources
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Current weight of each domain."""
        return dict(zip(self.names, self._dynamic.weights.tolist(), strict=True))

    @property
    def steps_by_domain(self) -> dict[str, int]:
        """Steps that each domain has had, a paired one's and those of its labelled partner."""
        taken = self._batches_drawn + np.bincount(self._order[: self._interval_step], minlength=len(self.names))
        steps = dict(zip(self.names, taken.tolist(), strict=True))
        if self._sources is not None:
            steps |= self._sources.turns_until(self.step)
        return steps

    def turns_until(self, step: int) -> dict[str, int]:
        """Steps that each domain has had before a step, where they take turns."""
        return {name: len(range(number, step, len(self.names))) for number, name in enumerate(self.names)}

    def draw_in_turn(self, step: int, part: slice) -> BatchDraw:
        """Draws a part of the batch of a step, where the domains take turns, whatever the strategy is."""
        batches_before, domain = divmod(step, len(self.names))
        return self._draw(domain, batches_before, part)

    def __iter__(self) -> Iterator[BatchDraw]:
        # A copy: training moves on to the next interval while a worker may still hold this iterator.
        order, start, drawn, step = self._order, self._interval_step, self._batches_drawn.copy(), self.step
        drawn += np.bincount(order[:start], minlength=len(self.names))
        for number, domain in enumerate(order[start : start + len(self)]):
            draw = self._draw(int(domain), int(drawn[domain]), self._slice)
            yield self._with_source(draw, step + number, self._slice)
            drawn[domain] += 1

    def __len__(self) -> int:
        return min(len(self._order) - self._interval_step, self.num_steps - self.step)

    def draw_at(self, step: int) -> BatchDraw:
        """Returns the whole batch, of all processes, of a step of this interval."""
        position = step - (self.step - self._interval_step)
        domain = int(self._order[position])
        drawn = self._batches_drawn[domain] + np.count_nonzero(self._order[:position] == domain)
        whole = slice(0, self._batch_size)
        return self._with_source(self._draw(domain, int(drawn), whole), step, whole)

    @property
    def ends_interval(self) -> bool:
        """Whether the step that `advance` counts next is the last of its interval, or of the run."""
        return len(self) <= 1

    def observe(self, domain: str, loss: float) -> None:
        """Adds the mean loss of a batch to those that decide the next dynamic weights."""
        self._dynamic.observe(self.names.index(domain), loss)

    def observe_score(self, domain: str, score: float) -> None:
        """Takes a domain's score on the validation split; domains that are not trained on do not count."""
        if domain in self.names:
            self._dynamic.observe_score(self.names.index(domain), score)

    @property
    def last_losses(self) -> dict[str, float]:
        """Mean of the observed losses of each domain over the last interval, of those that had steps in it."""
        means = zip(self.names, self._dynamic.last_means.tolist(), strict=True)
        return {name: mean for name, mean in means if mean == mean}

    def advance(self) -> bool:
        """Counts one trained step; all losses up to it must have been observed where `ends_interval`.

        Returns:
            Whether an interval ended and the next one was planned.
        """
        self.step += 1
        self._interval_step += 1
        if self._interval_step < len(self._order) or self.step >= self.num_steps:
            return False
        self._begin_interval()
        return True

    def _begin_interval(self) -> None:
        if self._strategy in ADAPTIVE:
            self._dynamic.update()
        else:
            self._dynamic.forget()
        self._batches_drawn += np.bincount(self._order, minlength=len(self.names))
        self._owed = self._owed_next
        self._plan_interval()

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
        # A run that ended with its interval, and is longer now, has yet to begin the next one.
        if self._interval_step == len(self._order) and self.step < self.num_steps:
            self._begin_interval()

    def _plan_interval(self) -> None:
        """Sets the order of domains of the interval that begins at the current step."""
        interval, num_steps = self.step // self._update_every, self._update_every
        self._interval_step = 0
        if self._strategy == "round_robin" or (self._strategy in ADAPTIVE and interval == 0):
            self._order = (self.step + np.arange(num_steps)) % len(self.names)
            self._owed_next = self._owed
            return
        counts, self._owed_next = allocate_steps(self._dynamic.weights, num_steps, self._owed)
        generator = generator_for(ORDER_OF_DOMAINS, self._seed, interval)
        self._order = generator.permutation(np.repeat(np.arange(len(self.names)), counts))

    def _with_source(self, draw: BatchDraw, step: int, part: slice) -> BatchDraw:
        return draw if self._sources is None else replace(draw, source=self._sources.draw_in_turn(step, part))

    def _draw(self, domain: int, batches_before: int, part: slice) -> BatchDraw:
        start = batches_before * self._batch_size
        positions = np.arange(start + part.start, start + part.stop)
        by_class = self._class_draws.get(self.names[domain])
        if by_class is not None:
            return BatchDraw(self.names[domain], by_class.rows(positions), positions)
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
                generator = generator_for(ORDER_OF_IMAGES, self._seed, domain, epoch)
                self._orders[domain] = (epoch, generator.permutation(self._sizes[domain]).__getitem__)
        return self._orders[domain][1]
