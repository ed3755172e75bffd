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
        accept_rate: Share of the queries with an answer in the index that got one, mean over the domains; `None` where
            the file does not say.
    """

    threshold: float
    false_accept_rate: float
    domains: Mapping[str, float] = field(default_factory=dict)
    accept_rate: float | None = None

    def threshold_of(self, domain: str | None) -> float:
        """The least score at which a neighbour of a domain is accepted; the one for all where it has none."""
        return self.threshold if domain is None else self.domains.get(domain, self.threshold)

    def describe(self) -> str:
        """Says what the threshold is and does, with a warning if most answers lie below it."""
        least, most = min(self.domains.values(), default=0.0), max(self.domains.values(), default=0.0)
        by_domain = f", by domain {least:.3f} to {most:.3f}" if self.domains else ""
        accepted = "" if self.accept_rate is None else f", accepted answers: {100 * self.accept_rate:.1f} %"
        text = (
            f"below {self.threshold:.3f}{by_domain} a neighbour is no match "
            f"(false accepts: {100 * self.false_accept_rate:.1f} %{accepted})"
        )
        if self.accept_rate is not None and self.accept_rate < 0.5:
            text += "; WARNING: most right answers lie below it: calibrate with a higher --false-accept-rate"
        return text


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
        # Those of a calibration by an older version have no rates at the domains' own thresholds.
        found = [of["own_thresholds"] for of in values.get("domains", {}).values() if "own_thresholds" in of]
        accept_rate = sum(float(rates["accept_rate"]) for rates in found) / len(found) if found else None
        return Calibration(float(values["threshold"]), float(values["false_accept_rate"]), by_domain, accept_rate)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{CALIBRATION_FILE} of `model` must hold the numbers `threshold` and `false_accept_rate`. "
            f"Got {path}: {' '.join(str(error).split())}; write it again with `udon evaluate --calibrate`."
        ) from error
