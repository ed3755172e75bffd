"""Columns of an index on their way into another engine: names that it takes, and where the images lie."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import pyarrow as pa

from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.segments import PART

VECTOR = "embedding"
ROW = "row"
ID = "id"
# Of the index's own columns those that name the place of an image.
_PLACE_COLUMNS = ("path", "mtime")


@dataclass(frozen=True)
class Columns:
    """What of an index is written to another engine.

    Attributes:
        index: The index.
        names: Its columns, in order, without the number of a row.
        shortens_paths: Whether of an absolute path only its last part is kept.
    """

    index: ImageIndex
    names: Sequence[str]
    shortens_paths: bool = False

    @classmethod
    def of(cls, index: ImageIndex, thumbnails: bool, paths: bool, shortens_paths: bool = False) -> "Columns":
        """Chooses columns.

        Args:
            index: The index.
            thumbnails: Whether thumbnails that were kept go along.
            paths: Whether paths and times of change go along.
            shortens_paths: See the class.
        """
        left_out = {ROW, *(() if thumbnails else ("thumbnail",)), *(() if paths else _PLACE_COLUMNS)}
        return cls(index, [name for name in index.schema.names if name not in left_out], shortens_paths)

    @property
    def schema(self) -> pa.Schema:
        """The number of a row, its columns, its embedding."""
        kept = [self.index.schema.field(name) for name in self.names]
        vector = pa.field(VECTOR, pa.list_(pa.float32(), self.index.about.dim))
        return pa.schema([pa.field(ROW, pa.int64()), *kept, vector])

    def blocks(self, size: int) -> Iterator[pa.Table]:
        """Tables of `schema`, of so many rows at most."""
        for rows, vectors, table in self.index.blocks(size, list(self.names)):
            values = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
            columns = {name: table[name] for name in self.names}
            if self.shortens_paths and "path" in columns:
                columns["path"] = pa.array([_shortened(path) for path in columns["path"].to_pylist()], pa.string())
            embeds = pa.FixedSizeListArray.from_arrays(values, self.index.about.dim)
            yield pa.table([pa.array(rows), *columns.values(), embeds], schema=self.schema)

    def ids(self) -> dict[int, str | None]:
        """The id of each row."""
        found: dict[int, str | None] = {}
        columns = [ID] if ID in self.names else []
        for block in self.index.blocks(columns=columns):
            ids = block.table[ID].to_pylist() if columns else [None] * len(block.rows)
            found.update(zip(block.rows.tolist(), ids, strict=True))
        return found


def roots_of(index: ImageIndex) -> list[tuple[int, str]]:
    """The folders that paths start from, each with the number of the first row that it holds for."""
    parts = np.asarray(index.table[PART].combine_chunks())
    known = [index.about.sources[part["source"]]["root"] for part in index.manifest.parts]
    names = ["", *dict.fromkeys(known)]
    numbers = np.array([names.index(root) for root in [*known, ""]])[parts]  # -1, of no part, is the last
    order = np.argsort(index.rows, kind="stable")
    rows, numbers = index.rows[order], numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]]))
    return [(int(rows[start]), names[numbers[start]]) for start in starts]


def fit_names(names: Sequence[str], fit: Callable[[str], str]) -> dict[str, str]:
    """A name for each column that an engine takes: its own where that will do, and no two alike.

    Args:
        names: The columns.
        fit: Turns a name into one that the engine takes.
    """
    found: dict[str, str] = {}
    # Names that can stay do so, whatever the others become. Engines may take `Price` and `price` for one.
    for name in sorted(names, key=lambda name: fit(name) != name):
        fitted, number = fit(name), 1
        while fitted.lower() in {taken.lower() for taken in found.values()}:
            number += 1
            fitted = f"{fit(name)}_{number}"
        found[name] = fitted
    return {name: found[name] for name in names}


def _shortened(path: str | None) -> str | None:
    return PurePath(path).name if path is not None and PurePath(path).is_absolute() else path
