"""Collapse of a student: all images of a domain without labels taken for one class, step after step."""

from modeling_udon.training.adaptation import LARGEST_CLASS
from modeling_udon.training.errors import TrainingError
from modeling_udon.training.step import StepLosses

# Shares of several processes are averaged.
_ALL = 1 - 1e-6


class CollapseWatch:
    """Counts steps in a row whose target images were all taken for one class, and ends the run at too many.

    Args:
        most: How many end it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0

    def count(self, step: StepLosses) -> None:
        """Counts a step that was applied.

        Raises:
            TrainingError: If it is the last of too many.
        """
        collapsed = step.losses.get(LARGEST_CLASS, 0.0) > _ALL
        self._in_a_row = self._in_a_row + 1 if collapsed else 0
        if self._in_a_row >= self._most:
            raise TrainingError(
                f"The student must tell the images of a target apart. Got {self._in_a_row} steps in a row up to step "
                f"{step.step} in which all of a batch, the last of {step.domain!r}, were taken for one class: it has "
                "collapsed. Lower the weights of confusion in `adaptation` or optim.lr, and start a new run."
            )
