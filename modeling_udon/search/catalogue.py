"""Catalogue: an index that lives. Rows come and go in atomic commits, while readers keep their snapshots."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from modeling_udon.search.commits import PlacedRows, TableRows, clean, write_delta
from modeling_udon.search.faiss_index import choose_kind
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import (
    EmbeddedRows,
    NumberedSource,
    numbered,
    open_locked,
    read_asked,
    same_model,
    write_base,
)
from modeling_udon.search.index_folder import (
    IndexAbout,
    Manifest,
    read_manifest,
    write_about,
    write_deleted,
    write_manifest,
)
from modeling_udon.search.segments import INTERNAL_FIELDS, PART, PART_ROW
from modeling_udon.search.shards import Embeddings
from modeling_udon.storage import locked, replaced_folder

# A delta takes the last one into itself, and so on, while that is at most so many times its size by then: each of those
# that stay is more than so many times the next, so that their number grows with the logarithm.
_TAKEN_IN = 2
# Off the unit sphere by more than float16 rounds, a score would be no cosine.
_NORM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Changed:
    """What a commit did.

    Attributes:
        num_added: Rows added.
        num_removed: Rows removed.
        rows: Numbers of the added rows, int64.
        seconds: How long it took.
    """

    num_added: int
    num_removed: int
    rows: np.ndarray
    seconds: float


class Catalogue:
    """An index that is changed.

    Args:
        folder: Folder of the index.
        wait: Seconds to wait for another process that is changing it.
        say: Called with lines for the user.

    Raises:
        ValueError: If the folder holds no index, or a file of it is damaged.
    """

    def __init__(
        self, folder: str | os.PathLike[str], wait: float = 0, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder = Path(folder)
        self._wait = wait
        self._say = say
        self._index = ImageIndex(folder)

    @property
    def index(self) -> ImageIndex:
        """The newest snapshot; what did not change is not opened again."""
        self._index = index = self._index.newest()
        return index

    def add(self, vectors: np.ndarray, table: pa.Table, replace: bool = False) -> Changed:
        """Adds rows.

        Args:
            vectors: Of shape `(num_rows, dim)`, unit norm.
            table: Their columns, `path` or `id` among them. Columns that the index does not know are added to it.
            replace: Whether rows of the index with the same `id` are removed in the same commit.

        Raises:
            ValueError: If shapes, norms or types of columns do not fit.
            InUseError: If another process is changing the index.
        """
        began = time.perf_counter()
        with self._changing() as index:
            vectors = _checked(vectors, len(table), index.about)
            table = _named(table)
            gone = np.empty(0, np.int64)
            if replace:
                gone = index.rows_of([name for name in table["id"].to_pylist() if name is not None])
            first = index.manifest.next_row
            rows = TableRows(vectors, numbered(table, first, -1, np.full(len(table), -1)))
            self._commit(index, [rows], gone, index.manifest.parts, index.about.sources)
        return Changed(len(table), len(gone), np.arange(first, first + len(table)), time.perf_counter() - began)

    def remove(
        self,
        ids: Sequence[str] | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        where: str | None = None,
        missing_ok: bool = False,
    ) -> Changed:
        """Removes rows, named in one of three ways.

        Args:
            ids: All rows with one of these ids.
            rows: Rows by their numbers.
            where: All rows for which this SQL condition is true.
            missing_ok: Whether an id that is not there is no error.

        Raises:
            ValueError: If an id or a row is not there, or the condition is none; then nothing is removed.
            InUseError: If another process is changing the index.
        """
        began = time.perf_counter()
        with self._changing() as index:
            if ids is not None:
                gone = index.rows_of(ids)
                if not missing_ok and (unknown := set(ids) - index.ids_of(gone)):
                    raise ValueError(
                        f"`ids` must be of the index. Got {len(unknown):,} that are not there, such as "
                        f"{min(unknown)!r}; nothing was removed."
                    )
            elif rows is not None:
                index.check_rows(np.array(rows))
                gone = np.unique(np.array(rows, np.int64))
            else:
                gone = index.select(where=where)
            if len(gone):
                self._commit(index, [], gone, index.manifest.parts, index.about.sources)
        return Changed(0, len(gone), np.empty(0, np.int64), time.perf_counter() - began)

    def add_embeddings(self, embeddings: Sequence[str | os.PathLike[str]]) -> Changed:
        """Adds all rows of further folders of embeddings.

        Args:
            embeddings: Folders that `udon embed` wrote, with the model of the index.

        Raises:
            ValueError: If a folder holds none, is of another model, or is in the index already.
            InUseError: If another process is changing the index or the embeddings.
        """
        return self._take_over(embeddings, new=True)

    def update(self, embeddings: Sequence[str | os.PathLike[str]] | None = None) -> Changed:
        """Takes over what `udon embed --update` changed.

        Rows that were removed from the index alone stay removed.

        Args:
            embeddings: Folders that the index was built of or that were added to it; `None` for all.

        Raises:
            ValueError: If a folder holds none, is of another model, or is not in the index.
            InUseError: If another process is changing the index or the embeddings.
        """
        if embeddings is None:
            embeddings = [source["folder"] for source in self.index.about.sources]
        return self._take_over(embeddings, new=False)

    def compact(
        self,
        kind: str | None = None,
        target_recall: float = 0.95,
        recall_queries: str | os.PathLike[str] | None = None,
    ) -> IndexAbout:
        """Builds the base anew of the rows that are left; they keep their numbers.

        Args:
            kind: One of `KINDS`, or `"auto"`; `None` for the same.
            target_recall: See `build_index`.
            recall_queries: See `build_index`.

        Raises:
            ValueError: If there are too few rows for the kind, none at all, or no exact vectors.
            InUseError: If another process is changing the index.
        """
        with self._changing() as index:
            if not index.about.num_images:
                raise ValueError(f"`index` must hold at least one image. Got {str(self.folder)!r} with none.")
            if not all(segment.has_exact_vectors for segment in index.segments):
                raise ValueError(
                    f"`index` must have its exact vectors. Got {str(self.folder)!r}, built with --no-vectors; build it "
                    "again with udon index --force."
                )
            about, asked = index.about, None
            if recall_queries is not None:
                asked = read_asked(recall_queries, str(self.folder), vars(about))
            kept = kind is None or kind == about.kind
            chosen = about.kind if kept else choose_kind(about.num_images) if kind == "auto" else str(kind)
            rows = PlacedRows(index, np.flatnonzero(index.is_live))
            manifest = index.manifest
            with replaced_folder(self.folder) as draft:
                result = write_base(draft, [rows], replace(about, kind=chosen), target_recall, True, self._say, asked)
                write_about(draft, result, manifest.parts, manifest.next_row, manifest.version + 1)
        return result

    def _take_over(self, embeddings: Sequence[str | os.PathLike[str]], new: bool) -> Changed:
        began = time.perf_counter()
        with self._changing() as index, ExitStack() as held:
            opened = open_locked(embeddings, held)
            same_model([(str(self.folder), vars(index.about)), *((str(part.folder), part.about) for part in opened)])
            sources, parts = list(index.about.sources), list(index.manifest.parts)
            rows: list[EmbeddedRows] = []
            gone, first = [np.empty(0, np.int64)], index.manifest.next_row
            for found in opened:
                number = _source(sources, found, self.folder, new)
                fresh, old = _difference(index, parts, number, found)
                rows.append(EmbeddedRows(found, fresh, first, len(parts)))
                gone.append(old)
                first += rows[-1].num_rows
                parts += [{"source": number, "digest": part.digest} for part in fresh]
            removed, added = np.unique(np.concatenate(gone)), first - index.manifest.next_row
            if added or len(removed) or new:
                self._commit(index, [part for part in rows if part.num_rows], removed, parts, sources)
        numbers = np.arange(index.manifest.next_row, first)
        return Changed(added, len(removed), numbers, time.perf_counter() - began)

    @contextmanager
    def _changing(self) -> Iterator[ImageIndex]:
        """Keeps other writers out; gives the newest snapshot. What a commit that fails has written is removed."""
        read_manifest(self.folder)
        with locked(self.folder, argument="index", wait=self._wait):
            try:
                yield self.index
            except Exception:
                with suppress(OSError, ValueError):
                    clean(self.folder, read_manifest(self.folder))
                raise

    def _commit(
        self,
        index: ImageIndex,
        added: Sequence[NumberedSource],
        removed: np.ndarray,
        parts: list[dict[str, object]],
        sources: list[dict[str, object]],
    ) -> None:
        """Writes a delta and the tombstones, then the manifest."""
        version = index.version + 1
        num_added = sum(rows.num_rows for rows in added)
        deleted = np.union1d(index.opened.deleted, removed)
        segments, size = list(index.segments), num_added
        while size and len(segments) > 1 and segments[-1].num_rows <= _TAKEN_IN * size:
            size += segments.pop().num_rows
        kept = sum(segment.num_rows for segment in segments)
        places = kept + np.flatnonzero(~np.isin(index.rows[kept:], deleted))
        rows = [*([PlacedRows(index, places)] if len(places) else []), *added]
        deleted = np.intersect1d(deleted, index.rows[:kept] if num_added else index.rows)
        files = [segment.files for segment in segments]
        if num_added:
            files.append(write_delta(self.folder, version, rows, index))
        name = None
        if len(deleted):
            name = f"deleted-{version:05d}.npy"
            write_deleted(self.folder, name, deleted)
        num_images = sum(each.num_rows for each in files) - len(deleted)
        num_bytes = sum((self.folder / each.faiss).stat().st_size for each in files)
        per_image = num_bytes / max(num_images, 1)
        about = replace(index.about, num_images=num_images, sources=sources, bytes_per_image=per_image)
        manifest = Manifest(about, version, index.manifest.next_row + num_added, parts, files, name)
        write_manifest(self.folder, manifest, index.manifest.files)
        clean(self.folder, manifest)


def _source(sources: list[dict[str, object]], found: Embeddings, index: Path, new: bool) -> int:
    """The number of a folder of embeddings among the sources of an index, to which a new one is appended."""
    folders = [os.path.realpath(str(source["folder"])) for source in sources]
    folder = os.path.realpath(found.folder)
    if (folder in folders) is new:
        rule, way = ("must not be in the index", "--update") if new else ("must be in the index", "--add")
        raise ValueError(f"`embeddings` {rule}. Got {str(found.folder)!r} for {str(index)!r}; use {way} for it.")
    if new:
        sources.append({"folder": str(found.folder), "root": found.about["root"]})
        return len(sources) - 1
    sources[folders.index(folder)] = {"folder": str(found.folder), "root": found.about["root"]}
    return folders.index(folder)


def _difference(
    index: ImageIndex, parts: Sequence[dict[str, object]], source: int, found: Embeddings
) -> tuple[list, np.ndarray]:
    """The shards of a source that an index does not know, and the numbers of the rows that have gone."""
    known = {part["digest"]: number for number, part in enumerate(parts) if part["source"] == source}
    there = {known[part.digest]: part for part in found.parts if part.digest in known}
    numbers, places = index.table[PART].to_numpy(), index.table[PART_ROW].to_numpy()
    gone = np.isin(numbers, [number for number in known.values() if number not in there])
    for number, part in there.items():
        if len(part.deleted):
            gone |= (numbers == number) & np.isin(places, part.deleted)
    return [part for part in found.parts if part.digest not in known], index.rows[gone & index.is_live]


def _checked(vectors: np.ndarray, num_rows: int, about: IndexAbout) -> np.ndarray:
    found = np.ascontiguousarray(vectors, dtype=np.float32)
    if found.shape != (num_rows, about.dim):
        raise ValueError(
            f"`vectors` must be one of {about.dim} dimensions for each of {num_rows:,} rows. Got shape {found.shape}; "
            f"embed them with {about.model}."
        )
    norms = np.linalg.norm(found, axis=1)
    if not np.all(np.abs(norms - 1) <= _NORM_TOLERANCE):
        wrong = norms[~(np.abs(norms - 1) <= _NORM_TOLERANCE)][0]
        raise ValueError(f"`vectors` must be of unit norm. Got one of norm {wrong:g}; normalise them.")
    return found


def _named(table: pa.Table) -> pa.Table:
    """The table with columns `path` and `id`, and none that an index keeps for itself."""
    names = set(table.column_names)
    if not names & {"path", "id"}:
        raise ValueError(f"`table` must have a column `path` or `id`. Got {', '.join(table.column_names) or 'none'}.")
    if hidden := names & {column.name for column in INTERNAL_FIELDS} | names & {"embedding"}:
        raise ValueError(
            f"`table` must have no column {min(hidden)!r}, which an index keeps for itself. Got one; leave it out."
        )
    for name, other in (("path", "id"), ("id", "path")):
        if name not in names:
            table = table.append_column(name, table[other].cast(pa.string()))
    return table.replace_schema_metadata(None)
