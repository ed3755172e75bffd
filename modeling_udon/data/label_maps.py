"""The classes of a run's domains as `domains.json` keeps them, and their comparison when a run goes on."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from modeling_udon.data.domains import Domain
from modeling_udon.data.labels import Label
from modeling_udon.storage import read_json

# Of `domains.json`.
LABEL_MAPS = {str: {"num_classes": int}}


def label_maps(domains: Mapping[str, Domain]) -> dict[str, Any]:
    """Describes the domains as `domains.json` keeps them: classes, number of images and fingerprint."""
    return {
        name: {
            "num_classes": len(domain.classes),
            "num_images": len(domain.images),
            "fingerprint": domain.fingerprint,
            "classes": list(domain.classes),
        }
        for name, domain in domains.items()
    }


def check_label_maps(
    domains: Mapping[str, Domain],
    path: Path,
    compared: Sequence[str] = ("num_classes", "num_images", "classes", "fingerprint"),
    way_out: str = "start a new run",
) -> None:
    """Compares opened domains with those a run was started with.

    Args:
        domains: The domains as they are now.
        path: The run's `domains.json`.
        compared: What of each domain must be the same.
        way_out: What else to do than to bring the old data back.

    Raises:
        ValueError: If a domain came, went, or has other classes or images.
    """
    saved, current = read_json(path, LABEL_MAPS), label_maps(domains)
    if list(saved) != list(current):
        raise ValueError(
            f"`domains` must be those the run was started with, {', '.join(saved)}. Got {', '.join(current)}; "
            "start a new run for other domains."
        )
    for name, now in current.items():
        for what in compared:
            then = saved[name].get(what)
            if then != now[what]:
                before, after = _first_difference(then, now[what]) if what == "classes" else (then, now[what])
                raise ValueError(
                    f"`domains.{name}` must hold the data the run was started with. Its {what} changed: {before} then, "
                    f"{after} now; bring the old data back or {way_out}."
                )


def _first_difference(then: Sequence[Label] | None, now: Sequence[Label]) -> tuple[str, str]:
    before, after = next(pair for pair in zip_longest(then or (), now) if pair[0] != pair[1])
    return repr(before), repr(after)
