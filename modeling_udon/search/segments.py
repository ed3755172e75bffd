"""Segments of an index: a FAISS index by position, the metadata of its rows, and their numbers."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from modeling_udon.search.faiss_index import RowFilter, make_filter, search_faiss, search_filtered

# Columns of the metadata that nobody sees: a row's number, which shard it came from, and its place there.
ROW, PART, PART_ROW = "__row", "__part", "__part_row"
INTERNALS = (ROW, PART, PART_ROW)
INTERNAL_FIELDS = [pa.field(ROW, pa.int64()), pa.field(PART, pa.int32()), pa.field(PART_ROW, pa.int64())]
# With more rows removed than this share, the others are looked for as those of a filter are.
_MOST_REMOVED = 0.5


@dataclass(frozen=True)
class SegmentFiles:
    """Files of a segment: FAISS index, metadata, exact vectors if they are kept, and how many rows they hold."""

    faiss: str
    metadata: str
    vectors: str | None
    num_rows: int

    def names(self) -> list[str]:
        """The names of its files."""
        return [name for name in (self.faiss, self.metadata, self.vectors) if name is not None]


@dataclass(frozen=True)
class Chosen:
    """Rows of a segment that a search may find.

    Attributes:
        num_rows: How many there are.
        selector: Them as FAISS takes it; `None` for all.
        filtered: Them as `search_filtered` takes it, `None` where they are nearly all.
    """

    num_rows: int
    selector: Any = None
    filtered: RowFilter | None = None


@dataclass(frozen=True)
class Segment:
    """An opened segment.

    Attributes:
        files: Its files.
        index: The FAISS index.
        metadata: Columns of its rows, internal ones included.
        rows: Numbers of its rows, ascending, int64.
        kept_vectors: Exact vectors by position, if they are kept beside the index.
    """

    files: SegmentFiles
    index: Any
    metadata: pa.Table
    rows: np.ndarray
    kept_vectors: np.ndarray | None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def num_rows(self) -> int:
        """Rows of the segment, removed ones included."""
        return self.files.num_rows

    @property
    def has_exact_vectors(self) -> bool:
        """Whether the vectors can be had as they were embedded."""
        return self.kept_vectors is not None or is_exact(self.index)

    def choose(self, allowed: np.ndarray | None, removed: np.ndarray, is_filter: bool, effort: int) -> Chosen:
        """Makes a filter.

        Args:
            allowed: Of shape `(num_rows,)`: which rows may be found; `None` for all.
            removed: Positions of removed rows.
            is_filter: Whether the allowed rows were chosen, and are not only what removals have left.
            effort: That of the searches to come.
        """
        if allowed is None and not len(removed):
            return Chosen(self.num_rows)
        mask = np.ones(self.num_rows, dtype=bool) if allowed is None else allowed.copy()
        mask[removed] = False
        num_rows = int(mask.sum())
        if num_rows == 0:
            return Chosen(0)
        if is_filter or num_rows < (1 - _MOST_REMOVED) * self.num_rows:
            made = make_filter(self.index, mask, effort)
            return Chosen(num_rows, made.selector, made)
        bits = np.packbits(mask, bitorder="little")
        return Chosen(num_rows, faiss.IDSelectorBitmap(bits))  # type: ignore[arg-type, call-arg]

    def search(self, queries: np.ndarray, k: int, effort: int, chosen: Chosen) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions of the nearest chosen rows, of shape `(num_queries, min(k, chosen.num_rows))`."""
        k = min(k, chosen.num_rows)
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if chosen.filtered is not None:
            return search_filtered(self.index, queries, k, effort, chosen.filtered)
        scores, places = search_faiss(self.index, queries, k, effort or None, chosen.selector)
        short = np.flatnonzero(places[:, -1] < 0)
        if len(short):  # the lists that were looked at hold fewer
            scores[short], places[short] = search_faiss(self.index, queries[short], k, None, chosen.selector)
        return scores, places

    def vectors(self, positions: np.ndarray) -> np.ndarray:
        """Vectors of some rows, of shape `(num_positions, dim)`, float32; approximate if none are kept exactly."""
        if self.kept_vectors is not None:
            return self.kept_vectors[positions].astype(np.float32)
        index: Any = self.index
        if isinstance(index, faiss.IndexHNSW):
            index = faiss.downcast_index(index.storage)
        if isinstance(index, faiss.IndexIVF):
            with self._lock:
                if index.direct_map.no():
                    index.make_direct_map()
        found: np.ndarray = index.reconstruct_batch(np.ascontiguousarray(positions, dtype=np.int64))
        return found


def is_exact(index: Any) -> bool:
    """Whether a FAISS index holds its vectors as they were added."""
    flat = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
    return isinstance(flat, faiss.IndexFlat | faiss.IndexIVFFlat)


def write_faiss(index: Any, file: Path) -> None:
    """Writes a FAISS index. Of a full disk, FAISS itself prints a line, and raises no OSError."""
    with file.open("wb") as opened:
        faiss.write_index(index, faiss.PyCallbackIOWriter(opened.write))  # type: ignore[attr-defined]


def open_segment(folder: Path, files: SegmentFiles, metadata: pa.Table) -> Segment:
    """Opens a segment whose files are whole, memory-mapped."""
    index = faiss.read_index(str(folder / files.faiss), faiss.IO_FLAG_MMAP_IFC)
    vectors = None if files.vectors is None else np.load(folder / files.vectors, mmap_mode="r")
    return Segment(files, index, metadata, np.asarray(metadata[ROW].combine_chunks()), vectors)


def open_metadata(file: Path) -> pa.Table:
    """Opens the columns beside the embeddings, memory-mapped, internal ones included."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
