"""Models that a verb opens: one for most, two side by side for the page."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from modeling_udon.cli.terminal import hide_bars_in_logs


@dataclass(frozen=True)
class Side:
    """A model with the index that was made with it."""

    model: str
    index: str
    revision: str | None

    def open(self, trust_remote_code: bool) -> Callable[[], Any]:
        """What opens the model when it is needed."""
        return lambda: open_model(self.model, self.revision, trust_remote_code)


def open_model(model: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Opens a model without a progress bar in a log."""
    from modeling_udon.encoder import Encoder

    hide_bars_in_logs()
    return Encoder.open(model, revision=revision, trust_remote_code=trust_remote_code)


def make_sides(first: Side, model2: str | None, index2: str | None, revision2: str | None) -> list[Side]:
    """The one or two sides of the page.

    Raises:
        ValueError: If the second one is incomplete.
        ImportError: If Gradio is missing.
    """
    if (model2 is None) != (index2 is None):
        raise ValueError("--model2 and --index2 must be given together, a model with the index that was made with it")
    if revision2 is not None and model2 is None:
        raise ValueError("--revision2 must be of --model2, which is not given")
    if find_spec("gradio") is None:
        raise ImportError('the page needs gradio, which is missing: pip install "modeling-udon[demo]"')
    if model2 is None or index2 is None:
        return [first]
    return [first, Side(model2, index2, revision2)]
