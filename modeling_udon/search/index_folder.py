"""The folder of an index: a FAISS index, the images' metadata, and what the index says of itself."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from modeling_udon.search.shards import Embeddings

INDEX_FILE = "index.faiss"
METADATA_FILE = "metadata.arrow"
ABOUT_FILE = "index.json"


@dataclass(frozen=True)
class IndexAbout:
    """What an index says of itself.

    Attributes:
        kind: One of `KINDS`.
        dim: Size of an embedding.
        num_images: Rows of the index.
        model: Name of the model of the embeddings.
        fingerprint: Its fingerprint.
        effort: Lists or candidates that a search looks at (`ivf`, `ivfpq`, `hnsw`), 0 for the other kinds.
        recall: Share of the exact 10 nearest neighbours that a search finds, on a sample; `None` with one image.
        sources: For each embedding folder its `folder`, the `root` of its paths, and its first row, `start`.
        bytes_per_image: Size of the FAISS file by image.
    """

    kind: str
    dim: int
    num_images: int
    model: str
    fingerprint: str
    effort: int
    recall: float | None
    sources: list[dict[str, Any]]
    bytes_per_image: float


def read_about(folder: Path) -> IndexAbout:
    """Reads what an index says of itself.

    Raises:
        ValueError: If the folder holds none.
    """
    if not (folder / ABOUT_FILE).is_file():
        raise ValueError(f"`index` must be a folder that udon index wrote. Got {str(folder)!r}.")
    return IndexAbout(**json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8")))


def write_about(folder: Path, about: IndexAbout) -> None:
    """Writes what an index says of itself."""
    (folder / ABOUT_FILE).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")


def write_metadata(folder: Path, opened: Sequence[Embeddings]) -> None:
    """Writes the columns beside the embeddings, a row for each of the index.

    Raises:
        ValueError: If the folders of embeddings do not agree in the types of their columns.
    """
    try:
        schema = pa.unify_schemas([part.schema for part in opened])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"`embeddings` must agree in the types of their columns: {error}") from error
    with pa.ipc.new_file(str(folder / METADATA_FILE), schema) as writer:
        for part in opened:
            for _, table in part.blocks():
                columns = [
                    table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
                    for field in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))


def open_metadata(folder: Path) -> pa.Table:
    """Opens the columns beside the embeddings, memory-mapped."""
    return pa.ipc.open_file(pa.memory_map(str(folder / METADATA_FILE))).read_all()
