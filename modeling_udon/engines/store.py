"""Interface of the engines that an index is exported to, and how their faults become lines."""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from modeling_udon.engines.columns import Columns
from modeling_udon.faults import OneLineError, first_line
from modeling_udon.storage import locked


class EngineError(OneLineError, OSError):
    """An engine that refused or failed; its message is one line for the user."""


@dataclass(frozen=True)
class Place:
    """Where an index is exported to.

    Attributes:
        out: A folder or file, for engines that live in the process.
        url: Address of a server.
        table: Name of the table or collection.
        force: Whether a table that is there is replaced.
    """

    out: str | None
    url: str | None
    table: str
    force: bool

    @property
    def shown(self) -> str:
        """The place without what may be a secret in its address."""
        if self.url is None:
            return str(self.out)
        return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", self.url.partition("?")[0])


class Store(Protocol):
    """An engine with a table for the index."""

    def exists(self) -> bool:
        """Whether the table is there."""

    def write(self, columns: Columns, about: Mapping[str, Any]) -> None:
        """Writes a new table, or replaces the one that is there, and makes it searchable."""

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Numbers of the nearest rows, of shape `(num_queries, k)`, -1 where there are no more."""

    def ids(self) -> Iterator[tuple[int, str | None]]:
        """Number and id of every row."""

    def close(self) -> None:
        """Ends the connection."""


def only_out(place: Place, engine: str) -> str:
    """The folder of an engine that has no server.

    Raises:
        ValueError: If none is given, or an address.
    """
    if place.out is None or place.url is not None:
        raise ValueError(f"`out` must be given for {engine}, and no `url`. Got out {place.out!r}, url {place.shown!r}.")
    return place.out


def held_alone(out: str | None) -> ExitStack:
    """Keeps other exports out of a folder, which is made if need be, until what is given is closed.

    Raises:
        InUseError: If another one is at work there.
    """
    held = ExitStack()
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(Path(out)))
    return held


def one_of_both(place: Place, engine: str) -> str:
    """The folder or the address.

    Raises:
        ValueError: If none or both are given.
    """
    if (place.out is None) == (place.url is None):
        raise ValueError(
            f"`out` or `url` must be given for {engine}: a place on this machine, or the address of a server. Got "
            f"{'both' if place.out else 'none'}."
        )
    return str(place.out or place.url)


def draft_name(table: str) -> str:
    """A new name to fill a table under until it is whole: what a killed export leaves is not taken for it."""
    return f"{table}__draft_{secrets.token_hex(4)}"


def is_draft(name: str, table: str) -> bool:
    """Whether a table was begun by an export to `table`."""
    return re.fullmatch(re.escape(table) + "__draft_[0-9a-f]{8}", name) is not None


def padded(rows: list[list[int]], k: int) -> np.ndarray:
    """Lists of rows as an array of shape `(num_queries, k)`, -1 where there are no more."""
    return np.array([line[:k] + [-1] * (k - len(line)) for line in rows], dtype=np.int64).reshape(len(rows), k)


def fitted(change: Mapping[str, str], table: pa.Table) -> pa.Table:
    """The table under the names of an engine."""
    return table.rename_columns([change.get(name, name) for name in table.column_names])


@contextmanager
def said_in_one_line(place: Place, engine: str, is_ours: Callable[[BaseException], bool]) -> Iterator[None]:
    """Turns what an engine's library raises into an `EngineError`.

    Args:
        place: Where it was going to.
        engine: Name of the engine.
        is_ours: Whether an error comes from the engine.

    Raises:
        EngineError: If the block fails so.
    """
    try:
        yield
    except (ValueError, ImportError, OneLineError, KeyboardInterrupt) as error:
        if isinstance(error, OneLineError | ImportError | KeyboardInterrupt) or not is_ours(error):
            raise
        raise _engine_error(place, engine, error) from error
    except Exception as error:
        if not is_ours(error):
            raise
        raise _engine_error(place, engine, error) from error


def _engine_error(place: Place, engine: str, error: BaseException) -> EngineError:
    reason = first_line(str(error)) or type(error).__name__
    return EngineError(f"{engine} at {place.shown} refused or failed: {reason}; see to it and run the command again")
