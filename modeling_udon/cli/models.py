"""Models that a verb opens: one for most, two side by side for the page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modeling_udon.cli.options import Commit, Folder, Pooling
from modeling_udon.cli.terminal import hide_bars_in_logs


@dataclass(frozen=True)
class Side:
    """A model with the index that was made with it."""

    model: str
    index: str
    revision: str | None
    pooling: str | None

    def open(self, index: Any, trust_remote_code: bool) -> Callable[[], Any]:
        """What opens the model of an index, as `open_index` gave it, when it is needed."""
        return lambda: open_for_index(index, self.model, self.revision, trust_remote_code, self.pooling)


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    sides: Sequence[Side]
    examples: Sequence[Path]
    trust_remote_code: bool


def open_model(
    model: str, revision: str | None, trust_remote_code: bool, dim: int | None = None, pooling: Any = None
) -> Any:
    """Opens a model without a progress bar in a log."""
    from modeling_udon.encoder import Encoder

    hide_bars_in_logs()
    return Encoder.open(model, revision=revision, trust_remote_code=trust_remote_code, dim=dim, pooling=pooling)


def open_for_index(index: Any, model: str, revision: str | None, trust_remote_code: bool, pooling: Any = None) -> Any:
    """Opens the model of an index, pooled as its images were unless told otherwise."""
    from modeling_udon.search.index_folder import read_manifest
    from modeling_udon.storage import standing_folder

    about = read_manifest(standing_folder(Path(index))).about if isinstance(index, str) else index.about
    pooling = pooling or about.pooling
    return open_model(model, revision, trust_remote_code, pooling=pooling)


def need_gradio() -> None:
    """Refuses to go on without what the page of `udon app` is made with.

    Raises:
        ImportError: If Gradio is missing.
    """
    if find_spec("gradio") is None:
        raise ImportError('the page needs gradio, which is missing: pip install "modeling-udon[demo]"')


def open_index(index: str) -> Any:
    """Opens an index in a Lance table; the name of a folder is given back as it is."""
    from modeling_udon.engines.lance_address import is_lance

    if not is_lance(index):
        return index
    from modeling_udon.engines.lance_index import LanceIndex

    return LanceIndex(index)


def page(
    *,
    index: Folder,
    model: str,
    revision: Commit | None = None,
    trust_remote_code: bool = False,
    examples: Folder | None = None,
    model2: str | None = None,
    index2: Folder | None = None,
    revision2: Commit | None = None,
    pooling: Pooling | None = None,
    pooling2: Pooling | None = None,
) -> Page:
    """Finds what the page shows.

    Args:
        index: Folder that `udon index` wrote, lancedb://FOLDER, or hf://datasets/OWNER/NAME.
        model: Folder of a model, or its id on the Hub.
        revision: Commit, tag or branch of the model on the Hub.
        trust_remote_code: Run the code beside a model that is not a UDON model.
        examples: Pictures to click on, at most 12.
        model2: Folder or Hub id of a second model, to compare two side by side.
        index2: Index of the second model.
        revision2: Commit, tag or branch of the second model on the Hub.
        pooling: Feature of a model that is not a UDON model; by default the one that the index was made with.
        pooling2: The same of the second model.

    Raises:
        ValueError: If the second side is incomplete, or an example cannot be read.
    """
    if (model2 is None) != (index2 is None):
        raise ValueError("--model2 and --index2 must be given together, a model with the index that was made with it")
    if revision2 is not None and model2 is None:
        raise ValueError("--revision2 must be of --model2, which is not given")
    if pooling2 is not None and model2 is None:
        raise ValueError("--pooling2 must be of --model2, which is not given")
    sides = [Side(model, index, revision, pooling)]
    if model2 is not None and index2 is not None:
        sides.append(Side(model2, index2, revision2, pooling2))
    from modeling_udon.search.examples import find_examples

    return Page(sides, [] if examples is None else find_examples(examples), trust_remote_code)
