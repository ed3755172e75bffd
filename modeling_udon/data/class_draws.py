"""Draws within a domain by its classes: each class as often as any other, some images of a class side by side."""

import numpy as np

from modeling_udon.data.windows import ORDER_IN_CLASS, ORDER_OF_CLASSES, generator_for


class ClassDraws:
    """An endless order of a domain's images in which every class comes equally often.

    All classes come once, in random order, before any comes again; a class that comes gives its next images, in an
    order in which none is given again before all others of the class were. All depends on key and position alone.

    Args:
        labels: Class of each image, of shape `(num_images,)`.
        images_per_class: Images that a class gives when it comes: 1 for class-balanced draws, more for batches with
            several images of a class. A class with fewer images gives some of them more than once.
        key: Seed of the run and number of the domain.
    """

    def __init__(self, labels: np.ndarray, images_per_class: int, key: tuple[int, ...]) -> None:
        self._rows = np.argsort(labels, kind="stable")
        counts = np.bincount(labels)
        self._starts = np.cumsum(counts) - counts
        self._counts, self._classes = counts, np.flatnonzero(counts)
        self._images_per_class = images_per_class
        self._key = key

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Gives the rows of images by their places in the order, of the same shape, int64."""
        turns, within = np.divmod(positions, self._images_per_class)
        passes, places = np.divmod(turns, len(self._classes))
        classes = np.empty_like(positions)
        for number in np.unique(passes):
            chosen = passes == number
            order = generator_for(ORDER_OF_CLASSES, *self._key, int(number)).permutation(self._classes)
            classes[chosen] = order[places[chosen]]
        # How many images the class had given before.
        given = passes * self._images_per_class + within
        epochs, nth = np.divmod(given, self._counts[classes])
        rows = np.empty_like(positions)
        for place, (label, epoch) in enumerate(zip(classes.tolist(), epochs.tolist(), strict=True)):
            order = generator_for(ORDER_IN_CLASS, *self._key, label, epoch).permutation(int(self._counts[label]))
            rows[place] = self._rows[self._starts[label] + order[nth[place]]]
        return rows
