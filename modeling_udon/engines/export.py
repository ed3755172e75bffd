"""`udon export-index`: an index into another engine, compared with exact search once it is there."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modeling_udon.engines.columns import Columns, roots_of
from modeling_udon.engines.lance_store import LanceStore
from modeling_udon.engines.milvus import MilvusStore
from modeling_udon.engines.parity import check_ids, exact_answers
from modeling_udon.engines.parquet import ParquetStore
from modeling_udon.engines.postgres import PostgresStore
from modeling_udon.engines.qdrant import QdrantStore
from modeling_udon.engines.store import Place, Store
from modeling_udon.search.image_index import ImageIndex

Engine = Literal["lancedb", "qdrant", "pgvector", "milvus", "parquet"]
STORES: Mapping[str, Callable[[Place], Store]] = {
    "lancedb": LanceStore,
    "qdrant": QdrantStore,
    "pgvector": PostgresStore,
    "milvus": MilvusStore,
    "parquet": ParquetStore,
}


@dataclass(frozen=True)
class ExportedIndex:
    """What was exported.

    Attributes:
        num_rows: Rows of the table; all their ids were read back.
        recall: Share of the exact 10 nearest neighbours that the engine finds, on a sample; `None` with one image.
    """

    num_rows: int
    recall: float | None


def export_index(
    index: str | os.PathLike[str],
    to: Engine,
    out: str | None = None,
    url: str | None = None,
    table: str = "images",
    thumbnails: bool = False,
    paths: bool = True,
    is_public: bool = False,
    model: str | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> ExportedIndex:
    """Writes ids, vectors and columns of an index to another engine, and compares its answers with exact search.

    Args:
        index: Folder that `udon index` wrote.
        to: The engine.
        out: Folder or file, for an engine that lives in the process.
        url: Address of a server.
        table: Name of the table or collection.
        thumbnails: Whether thumbnails that were kept go along.
        paths: Whether paths and times of change go along.
        is_public: Whether nothing may go along that tells of this machine: folders that paths start from.
        model: What the table calls the model; `None`: what the index calls it.
        force: Whether a table that is there is replaced.
        say: Called with lines for the user.

    Raises:
        ValueError: If the index is none, the place does not fit the engine, or the table is there.
        ImportError: If the engine's library is missing.
        EngineError: If the engine refuses or fails, or does not give back what was written.
    """
    opened = ImageIndex(index)
    place = Place(out, url, table, force)
    columns = Columns.of(opened, thumbnails, paths, shortens_paths=is_public)
    store = STORES[to](place)
    try:
        if store.exists() and not force:
            raise ValueError(
                f"`table` must be new. Got {table!r}, which is in {place.shown}; name another one, or give --force to "
                "replace it."
            )
        about = _about(opened, hides_folders=is_public or not paths)
        about["model"] = model or about["model"]
        say(f"{about['num_images']:,} rows of {about['dim']} dimensions by {about['model']} to {to}: {place.shown}")
        store.write(columns, about)
        num_rows, recall = check_ids(store, columns), None
        answers = exact_answers(opened)
        if answers is not None:
            recall = answers.recall_of(store.search(answers.queries, answers.k + 1), opened)
            say(f"recall@{answers.k} against exact FAISS: {100 * recall:.1f} % ({len(answers.rows)} images as queries)")
        say(f"ids: all {num_rows:,} came back as they were")
    finally:
        store.close()
    return ExportedIndex(num_rows, recall)


def _about(index: ImageIndex, hides_folders: bool) -> dict[str, Any]:
    about = index.about
    return {
        "schema": 1,
        "model": os.path.basename(about.model) if hides_folders and os.path.isdir(about.model) else about.model,
        "fingerprint": about.fingerprint,
        "dim": about.dim,
        "num_images": about.num_images,
        "letterbox": about.letterbox,
        "pooling": about.pooling,
        "roots": [] if hides_folders else roots_of(index),
    }
