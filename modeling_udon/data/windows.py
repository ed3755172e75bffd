"""The order of a streamed domain: row groups shuffled, then rows inside windows of row groups."""

from dataclasses import dataclass

import numpy as np

# Purposes that keep generators apart: domains, images, row groups, images inside a window, classes, images of a class.
ORDER_OF_DOMAINS, ORDER_OF_IMAGES, ORDER_OF_GROUPS, ORDER_IN_WINDOW, ORDER_OF_CLASSES, ORDER_IN_CLASS = range(6)


def generator_for(purpose: int, seed: int, *position: int) -> np.random.Generator:
    """A generator that depends on the purpose, the seed and a position alone."""
    return np.random.default_rng((seed, purpose, *position))


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
        self._order = generator_for(ORDER_OF_GROUPS, *key).permutation(len(groups.sizes))
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
            self._window = (window, generator_for(ORDER_IN_WINDOW, *self._key, window).permutation(rows))
        return self._window[1]
