"""`udon index`: a FAISS index over embeddings, with the images' metadata beside it.

An approximate index is compared with exact search when it is built, and its effort is set by that.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from modeling_udon.search.coarse import train_lists
from modeling_udon.search.columns import unified
from modeling_udon.search.faiss_index import (
    choose_kind,
    empty_index,
    num_training_rows,
    sample_rows,
)
from modeling_udon.search.index_folder import (
    ABOUT_FILE,
    INDEX_FILE,
    METADATA_FILE,
    VECTORS_FILE,
    IndexAbout,
    write_about,
    write_metadata,
)
from modeling_udon.search.recall import NUM_RECALL_QUERIES, RowSource, measure_recall, read_rows, vectors_of
from modeling_udon.search.segments import INTERNAL_FIELDS, PART, PART_ROW, ROW, is_exact, write_faiss
from modeling_udon.search.shards import Embeddings, Part, open_embeddings
from modeling_udon.storage import check_out, locked, replaced_folder, sync

# What a build waits for others that change the index which it replaces.
_PATIENCE_SECONDS = 600.0


class NumberedSource(RowSource, Protocol):
    """Rows whose columns begin with the internal ones of an index."""

    @property
    def schema(self) -> pa.Schema:
        """The columns of their tables."""


@dataclass(frozen=True)
class EmbeddedRows:
    """Rows of shards with the numbers that they have in an index.

    Attributes:
        embeddings: Embeddings that the shards are of.
        parts: The shards.
        first_row: Number of the first row.
        first_part: Number of the first shard.
    """

    embeddings: Embeddings
    parts: Sequence[Part]
    first_row: int
    first_part: int

    @property
    def num_rows(self) -> int:
        """See `RowSource`."""
        return sum(part.num_live for part in self.parts)

    @property
    def schema(self) -> pa.Schema:
        """See `NumberedSource`."""
        return pa.schema([*self.embeddings.schema, *INTERNAL_FIELDS])

    def blocks(self, columns: bool = True) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """See `RowSource`."""
        row = self.first_row
        for number, part in enumerate(self.parts, self.first_part):
            for places, vectors, table in self.embeddings.blocks_of(part, columns):
                yield vectors, table if not columns else numbered(table, row, number, places)
                row += len(places)


def numbered(table: pa.Table, first_row: int, part: int, places: np.ndarray) -> pa.Table:
    """The table with the internal columns of an index: rows from `first_row` on, of one shard, from places in it."""
    rows = np.arange(first_row, first_row + len(table))
    for name, values in ((ROW, rows), (PART, np.full(len(table), part, np.int32)), (PART_ROW, places)):
        table = table.append_column(name, pa.array(values))
    return table


def build_index(
    embeddings: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    kind: str = "auto",
    target_recall: float = 0.95,
    force: bool = False,
    keep_vectors: bool = True,
    say: Callable[[str], None] = lambda text: None,
    recall_queries: str | os.PathLike[str] | None = None,
) -> IndexAbout:
    """Builds an index over embeddings, measures its recall, and writes it with the metadata.

    Args:
        embeddings: Folders that `udon embed` wrote, all with the same model.
        out: Folder of the index, written atomically.
        kind: One of `KINDS`, or `"auto"`.
        target_recall: Recall@10 that `ivf`, `ivfpq` and `hnsw` aim at: their effort is doubled until it is reached. An
            index of any kind that misses it is told of.
        force: Whether to replace an index in `out`.
        keep_vectors: Whether kinds that compress keep the exact vectors beside them on the disk, to rerank with and to
            compact from.
        say: Called with lines for the user.
        recall_queries: Folder that `udon embed` wrote, of pictures such as users will ask with; the index's own images
            by default. Pictures unlike those of the index need more effort.

    Raises:
        ValueError: If folders do not hold embeddings of one model, there are too few images for the kind, or `out`
            exists.
    """
    check_out(Path(out), ABOUT_FILE, "that udon index wrote", "an index", force)
    with ExitStack() as held:
        opened = open_locked(embeddings, held)
        asked = None if recall_queries is None else read_asked(recall_queries, str(opened[0].folder), opened[0].about)
        with replaced_folder(Path(out), replace=force, guard=lambda: _writers_kept_out(Path(out))) as draft:
            result = _build(opened, draft, kind, target_recall, keep_vectors, say, asked)
    tell(result, out, target_recall, say)
    return result


def open_locked(embeddings: Sequence[str | os.PathLike[str]], held: ExitStack) -> list[Embeddings]:
    """Opens embeddings of one model, and keeps writers out of them as long as `held` is open.

    Raises:
        ValueError: If a folder holds none, is being written to, or they are of several models.
    """
    for folder in [open_embeddings(Path(folder)).folder for folder in embeddings]:
        held.enter_context(locked(folder, shared=True, argument="embeddings"))
    # Once more, now that no `udon embed` can replace a shard between its vectors and its other columns.
    opened = [open_embeddings(Path(folder)) for folder in embeddings]
    same_model([(str(part.folder), part.about) for part in opened])
    return opened


def read_asked(folder: str | os.PathLike[str], indexed: str, about: Mapping[str, Any]) -> np.ndarray:
    """Up to 500 queries that recall is measured with, of shape `(num_queries, dim)`, float32.

    Args:
        folder: Folder that `udon embed` wrote.
        indexed: What the index is built of.
        about: What that says of itself.

    Raises:
        ValueError: If the folder holds no embeddings of the index's model.
    """
    asked = open_embeddings(Path(folder), argument="recall_queries")
    same_model([(indexed, about), (str(asked.folder), asked.about)], argument="recall_queries")
    return read_rows([asked], sample_rows(asked.num_rows, NUM_RECALL_QUERIES))


def tell(about: IndexAbout, out: str | os.PathLike[str], target_recall: float, say: Callable[[str], None]) -> None:
    """Says how good an index is that was built."""
    if about.recall is not None and about.recall < target_recall:
        better = "build it with --kind ivf, hnsw or flat, or ask for less"
        say(f"WARNING: recall {100 * about.recall:.1f} % misses the {100 * target_recall:g} % of --recall; {better}")
    say(f"{about.bytes_per_image:,.1f} bytes per image, index in {out}")


def _build(
    opened: Sequence[Embeddings],
    draft: Path,
    kind: str,
    target_recall: float,
    keep_vectors: bool,
    say: Callable[[str], None],
    asked: np.ndarray | None,
) -> IndexAbout:
    rows: list[EmbeddedRows] = []
    parts: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    for number, part in enumerate(opened):
        first_row = sum(before.num_rows for before in opened[:number])
        rows.append(EmbeddedRows(part, part.parts, first_row, len(parts)))
        parts += [{"source": number, "digest": shard.digest} for shard in part.parts]
        sources.append({"folder": str(part.folder), "root": part.about["root"]})
    about = opened[0].about
    say(
        f"{sum(part.num_rows for part in rows):,} embeddings of {about['dim']} dimensions by {about['model']}, kind "
        f"{_kind(kind, rows)}"
    )
    made = IndexAbout(
        kind=_kind(kind, rows),
        dim=about["dim"],
        num_images=sum(part.num_rows for part in rows),
        model=about["model"],
        fingerprint=about["fingerprint"],
        effort=0,
        recall=None,
        sources=sources,
        bytes_per_image=0.0,
        letterbox=about.get("letterbox", False),
        pooling=about.get("pooling"),
    )
    result = write_base(draft, rows, made, target_recall, keep_vectors, say, asked)
    write_about(draft, result, parts)
    return result


def _kind(kind: str, rows: Sequence[RowSource]) -> str:
    return choose_kind(sum(part.num_rows for part in rows)) if kind == "auto" else kind


def write_base(
    draft: Path,
    rows: Sequence[NumberedSource],
    about: IndexAbout,
    target_recall: float,
    keep_vectors: bool,
    say: Callable[[str], None],
    asked: np.ndarray | None = None,
) -> IndexAbout:
    """Trains and writes the base of an index, all but its manifest; returns what it says of itself, as measured.

    `asked` are the queries that recall is measured with, of shape `(num_queries, dim)`; without, the rows themselves.
    """
    num_images = about.num_images
    index = empty_index(about.kind, about.dim, num_images)
    if not index.is_trained:
        train_lists(index, read_rows(rows, sample_rows(num_images, num_training_rows(index))))
    for vectors in vectors_of(rows):
        index.add(vectors)
    write_metadata(
        draft,
        METADATA_FILE,
        (table for part in rows for _, table in part.blocks()),
        unified([part.schema for part in rows]),
    )
    if keep_vectors and not is_exact(index):
        write_vectors(draft / VECTORS_FILE, rows, about)
    write_faiss(index, draft / INDEX_FILE)
    effort, recall = measure_recall(index, rows, num_images, target_recall, say, asked)
    size = (draft / INDEX_FILE).stat().st_size
    return _with(about, effort=effort, recall=recall, bytes_per_image=size / num_images)


def _with(about: IndexAbout, **changes: Any) -> IndexAbout:
    return IndexAbout(**{**vars(about), **changes})


def write_vectors(file: Path, rows: Sequence[RowSource], about: IndexAbout) -> None:
    """Writes vectors as they were embedded, a block at a time."""
    shape = sum(part.num_rows for part in rows), about.dim
    written = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for vectors in vectors_of(rows):
        written[start : start + len(vectors)] = vectors
        start += len(vectors)
    written.flush()
    del written
    sync(file)


def same_model(found: Sequence[tuple[str, Mapping[str, Any]]], argument: str = "embeddings") -> None:
    """Refuses embeddings of several models.

    Args:
        found: For each folder its name and what it says of itself.
        argument: What the user calls them.

    Raises:
        ValueError: If they are not of one model.
    """
    folder, first = found[0]
    for other, about in found[1:]:
        if about["fingerprint"] != first["fingerprint"]:
            raise ValueError(
                f"`{argument}` must all be by one model. Got {folder!r} by {first['model']} "
                f"({first['fingerprint']}) and {other!r} by {about['model']} ({about['fingerprint']})."
            )


def _writers_kept_out(folder: Path) -> AbstractContextManager[None]:
    """Keeps those that change an index from writing into one that is just being replaced."""
    return locked(folder, wait=_PATIENCE_SECONDS) if folder.is_dir() else nullcontext()
