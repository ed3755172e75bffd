"""Warnings about data that is allowed and mostly a mistake: flat or dark images, classes that cannot be found."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from modeling_udon.data.domains import Domain, EvaluationSplit, encoded_bytes
from modeling_udon.data.folders import describe_passed_over
from modeling_udon.data.images import decode_image, undeclared_largest
from modeling_udon.data.levels import assumed_bits

# Images that are looked at for a warning, and grey levels between darkest and brightest of one that shows nothing.
NUM_LOOKED_AT, _FLAT = 16, 4
# The largest of 14 bits: a set whose values all stay below may be of 10, 12 or 14 bits.
_LARGEST_14_BIT = 16383


def find_doubts(domain: Domain, only: str | None = None) -> list[str]:
    """Lines for the user on what is allowed and mostly a mistake.

    A split that asks for classes which are trained on does not measure new classes; images of nearly one value were
    mostly stored in another range than their type says.

    Args:
        domain: The domain.
        only: The one split to look at; by default all.
    """
    trained = set(domain.classes)
    lines = [] if domain.doubt is None else [domain.doubt]
    lines += doubts_of_images(_some_readers(domain))
    if only is not None and domain.passed_over:
        lines.append(f"passed over {describe_passed_over(domain.passed_over)}")
    lines = [f"`domains.{domain.name}`: {line}" for line in lines]
    for split, images in domain.evaluation.items():
        if only not in (None, split):
            continue
        queries = images.query.labels
        classes = set(queries.names)
        known = classes & trained
        if known:
            num_queries = sum(not known.isdisjoint(query if isinstance(query, list) else [query]) for query in queries)
            lines.append(
                f"`domains.{domain.name}`: {len(known):,} of {len(classes):,} classes of {split} are trained on as "
                f"well ({num_queries:,} of {len(queries):,} queries); its scores are not those of new classes"
            )
        lines += _find_lone_queries(domain.name, split, images)
    return lines


def rows_to_look_at(num_images: int) -> list[int]:
    """Rows of the few images that stand for all, spread over them."""
    return np.linspace(0, num_images - 1, num=min(num_images, NUM_LOOKED_AT), dtype=int).tolist()


def doubts_of_images(readers: Sequence[Callable[[], bytes]]) -> list[str]:
    """Lines on a few images of a set: broken ones, ones of nearly one value, and ones whose range had to be assumed.

    Args:
        readers: For each image what gives its encoded bytes.
    """
    broken: list[str] = []
    spans: list[int] = []
    wide: list[int] = []
    for read in readers:
        try:
            data = read()
            spans.append(int(np.ptp(decode_image(data))))
            largest = undeclared_largest(data)
        except (ValueError, OSError) as error:
            broken.append(" ".join(str(error).split())[:200])
            continue
        if largest is not None:
            wide.append(largest)
    lines = []
    if len(broken) * 2 >= len(readers) > 0:
        lines.append(f"{len(broken)} of {len(readers)} images that were looked at cannot be read, such as: {broken[0]}")
    flat = sum(span <= _FLAT for span in spans)
    if flat and flat * 10 >= len(spans) * 9:
        lines.append(
            f"{flat} of {len(spans)} images that were looked at are of nearly one value; look at how their values are "
            "stored"
        )
    if wide and (max(wide) <= _LARGEST_14_BIT or min(map(assumed_bits, wide)) < 16):
        bits = Counter(map(assumed_bits, wide))
        read_as = ", ".join(f"{count} as {of} bits" for of, count in sorted(bits.items()))
        lines.append(
            f"{len(wide)} of {len(spans)} images that were looked at store integers in 16 bits and do not say how many "
            f"bits count; the largest value is {max(wide):,}, and they are read by their own largest ({read_as}); if "
            "that is wrong, scale them to 16 bits, or write sBIT into the PNG or MaxSampleValue into the TIFF"
        )
    return lines


def _some_readers(domain: Domain) -> list[Callable[[], bytes]]:
    """Those of a few training images; of a streamed domain those of its first row group."""
    num_rows = len(domain.images) if domain.row_groups is None else int(domain.row_groups.sizes[0])
    images = domain.images[rows_to_look_at(num_rows)]["image"]
    return [partial(encoded_bytes, image) for image in images]


def _find_lone_queries(name: str, split: str, images: EvaluationSplit) -> list[str]:
    """Half of the queries without an image of their class are mostly a fault of names: 7 and "07", two spellings."""
    if images.index is None:
        return []
    there, queries = set(images.index.labels.names), images.query.labels
    lone = sum(there.isdisjoint(query if isinstance(query, list) else [query]) for query in queries)
    if lone * 2 < len(queries):
        return []
    return [
        f"`domains.{name}`: {lone:,} of {len(queries):,} queries of {split} have no image of their class in the index, "
        f"such as {queries[0]!r} among {next(iter(images.index.labels.names))!r}; compare how both name their classes"
    ]
