"""Calibration of a model: the score from which a neighbour counts as a match."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers.utils import cached_file

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """The score from which an image counts as one of the index.

    Attributes:
        threshold: The least score that is accepted where a neighbour's domain is not known.
        false_accept_rate: Share of foreign images that were accepted at this threshold, on the validation split.
        domains: The least accepted score by domain of the neighbour.
    """

    threshold: float
    false_accept_rate: float
    domains: Mapping[str, float] = field(default_factory=dict)

    def threshold_of(self, domain: str | None) -> float:
        """The least score at which a neighbour of a domain is accepted; the one for all where it has none."""
        return self.threshold if domain is None else self.domains.get(domain, self.threshold)


def read_calibration(model: str, revision: str | None) -> Calibration | None:
    """Reads the calibration of a model.

    Args:
        model: Folder or Hub id.
        revision: Commit, tag or branch on the Hub.

    Returns:
        `None` for a model without one.

    Raises:
        ValueError: If its file is damaged.
    """
    path = cached_file(
        model,
        CALIBRATION_FILE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
        by_domain = {name: float(of["threshold"]) for name, of in values.get("domains", {}).items()}
        return Calibration(float(values["threshold"]), float(values["false_accept_rate"]), by_domain)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CALIBRATION_FILE} of `model` must hold the numbers `threshold` and `false_accept_rate`. "
            f"Got {path}: {' '.join(str(error).split())}; write it again with `udon evaluate --calibrate`."
        ) from error
