"""Fewer images of a split, for a validation that costs less."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from modeling_udon.data.domains import Domain, EvaluationSplit, ImageSplit
from modeling_udon.data.labels import Label

# Keeps this generator apart from those of the sampler, the augmentation and the sampled classes.
_LIMIT = 11
# A split with one class has nothing to confuse.
_MIN_CLASSES = 2


def with_fewer_images(domains: Mapping[str, Domain], split: str, most: int, seed: int) -> dict[str, Domain]:
    """Returns domains with whole classes drawn from a split, until the next would bring more than `most` queries.

    Args:
        domains: Domains that have the split.
        split: `"validation"` or `"test"`.
        most: Number of queries of each domain; two classes are kept even if they have more.
        seed: The same seed draws the same classes.
    """
    return {
        name: replace(
            domain, evaluation={**domain.evaluation, split: _with_fewer(domain.evaluation[split], most, seed)}
        )
        for name, domain in domains.items()
    }


def _with_fewer(images: EvaluationSplit, most: int, seed: int) -> EvaluationSplit:
    if len(images.query) <= most:
        return images
    first = images.query.labels.first_of_each()
    counts = np.bincount(first, minlength=len(images.query.labels.names))
    chosen: set[Label] = set()
    num_images = 0
    for code in np.random.default_rng((seed, _LIMIT)).permutation(np.flatnonzero(counts)):
        if len(chosen) >= _MIN_CLASSES and num_images + counts[code] > most:
            break
        chosen.add(images.query.labels.names[code])
        num_images += counts[code]
    return EvaluationSplit(_of(images.query, chosen), None if images.index is None else _of(images.index, chosen))


def _of(images: ImageSplit, classes: set[Label]) -> ImageSplit:
    labels = images.labels
    wanted = np.asarray([name in classes for name in labels.names], dtype=bool)
    rows = np.flatnonzero(wanted[labels.first_of_each()])
    return ImageSplit(images.images.select(rows), labels.select(rows))
