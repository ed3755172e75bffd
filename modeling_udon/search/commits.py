"""Commits to an index: its rows by place or in memory, the delta that holds added ones, and what is left behind."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.columns import unified
from modeling_udon.search.faiss_index import empty_like
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import NumberedSource
from modeling_udon.search.index_folder import Manifest, write_metadata
from modeling_udon.search.segments import SegmentFiles, is_exact, write_faiss
from modeling_udon.storage import replaced_file

# From here on a compacted index is noticeably quicker, and one of so many rows is searched in no time either way.
_MOST_UNSETTLED = 0.3
MANY_ROWS = 50_000


@dataclass(frozen=True)
class TableRows:
    """Rows in memory, with the internal columns of an index."""

    vectors: np.ndarray
    table: pa.Table

    @property
    def num_rows(self) -> int:
        """See `RowSource`."""
        return len(self.table)

    @property
    def schema(self) -> pa.Schema:
        """See `NumberedSource`."""
        return self.table.schema

    def blocks(self, columns: bool = True) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """See `RowSource`."""
        yield self.vectors, self.table


@dataclass(frozen=True)
class PlacedRows:
    """Rows of an index by their places in it, with its internal columns."""

    index: ImageIndex
    places: np.ndarray

    @property
    def num_rows(self) -> int:
        """See `RowSource`."""
        return len(self.places)

    @property
    def schema(self) -> pa.Schema:
        """See `NumberedSource`."""
        return self.index.table.schema

    def blocks(self, columns: bool = True) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """See `RowSource`."""
        for start in range(0, len(self.places), 65_536):
            some = self.places[start : start + 65_536]
            yield self.index.vectors_at(some), self.index.table.take(pa.array(some)) if columns else self.index.table


def way_to_be_quick(index: AnyIndex, least: int = 0) -> str | None:
    """A line on an index that changes have made slower than a new one, with what helps; `None` for another.

    Args:
        index: The index.
        least: Rows from which it is told of.
    """
    if not isinstance(index, ImageIndex) or len(index.rows) < least or index.unsettled_share <= _MOST_UNSETTLED:
        return None
    how = f"udon index --compact --out {index.folder} makes"
    if not all(segment.has_exact_vectors for segment in index.segments):
        how = "udon index --force, of its embeddings, makes"
    share = f"{100 * index.unsettled_share:.0f} % of its rows were added or removed since it was built"
    return f"{share}; {how} it as quick as a new one"


def write_delta(folder: Path, version: int, rows: Sequence[NumberedSource], index: ImageIndex) -> SegmentFiles:
    """Writes rows as a segment: exact where they are few, else as the base is."""
    num_rows = sum(part.num_rows for part in rows)
    delta = empty_like(index.segments[0].index, num_rows)
    stem = f"delta-{version:05d}"
    vectors = np.concatenate([block for part in rows for block, _ in part.blocks(columns=False)])
    delta.add(vectors)
    with replaced_file(folder / f"{stem}.faiss") as draft:
        write_faiss(delta, draft)
    kept = None
    if not is_exact(delta) and index.segments[0].kept_vectors is not None:
        kept = f"{stem}.npy"
        with replaced_file(folder / kept) as draft, draft.open("wb") as file:
            np.save(file, vectors)
    schema = unified([index.table.schema, *(part.schema for part in rows)])
    write_metadata(folder, f"{stem}.arrow", (table for part in rows for _, table in part.blocks()), schema)
    return SegmentFiles(f"{stem}.faiss", f"{stem}.arrow", kept, num_rows)


def clean(folder: Path, manifest: Manifest) -> None:
    """Removes what earlier commits, also such as were killed, have left."""
    named = set(manifest.names())
    for pattern in ("delta-*", "deleted-*", ".*.tmp"):
        for path in folder.glob(pattern):
            if path.name not in named:
                path.unlink(missing_ok=True)


def check_compact(index: ImageIndex) -> None:
    """Refuses an index that is more than its base.

    Raises:
        ValueError: If rows were added to it or removed since it was built or compacted.
    """
    if len(index.segments) > 1 or index.manifest.deleted is not None:
        raise ValueError(
            f"`index` must be compact. Got {str(index.folder)!r}, to which rows were added or of which some were "
            f"removed; run udon index --compact --out {index.folder}"
        )
