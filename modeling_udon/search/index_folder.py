"""The folder of an index: a FAISS index, the images' metadata, and what the index says of itself."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import faiss
import pyarrow as pa

from modeling_udon.search.shards import Embeddings
from modeling_udon.storage import DamagedFileError, damage_of, standing_folder, write_json

INDEX_FILE = "index.faiss"
METADATA_FILE = "metadata.arrow"
ABOUT_FILE = "index.json"
# Of the folder: 1 had neither this number nor checksums.
SCHEMA = 2
# Up to here a file is read whole when it is opened, which takes a second or two.
_HASHED_BYTES = 2**30
_END_BYTES = 2**20


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


def open_index(folder: Path) -> tuple[IndexAbout, Any, pa.Table]:
    """Opens an index: what it says of itself, the FAISS index and the images' columns, both memory-mapped.

    Raises:
        ValueError: If the folder holds none, one of another schema, or one of whose files is damaged.
    """
    folder = standing_folder(folder)
    while True:
        content = _read_manifest(folder)
        try:
            opened = _open_files(folder, content)
        except DamagedFileError:
            if content == _read_manifest(folder):
                raise
            continue
        # Another process may have replaced the folder between two of its files.
        if content == _read_manifest(folder):
            return opened


def write_about(folder: Path, about: IndexAbout) -> None:
    """Writes what an index says of itself, with the checksums of its other files, which are written before."""
    files = {name: _checksums(folder / name) for name in (INDEX_FILE, METADATA_FILE)}
    write_json(folder / ABOUT_FILE, {"schema": SCHEMA, **asdict(about), "files": files})


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT_FILE
    if not file.is_file():
        raise ValueError(f"`index` must be a folder that udon index wrote. Got {str(folder)!r}.")
    with _damage_of(file):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = content.get("schema", 1)
        if schema == SCHEMA:
            # A later version may have added keys under the same number; these are passed over.
            content["about"] = IndexAbout(**{field.name: content[field.name] for field in fields(IndexAbout)})
    if schema != SCHEMA:
        raise ValueError(
            f"`index` must be of this version of udon, schema {SCHEMA}. Got {str(folder)!r} of schema {schema}; build "
            "it again with udon index --force."
        )
    return content


def _open_files(folder: Path, content: Mapping[str, Any]) -> tuple[IndexAbout, Any, pa.Table]:
    for name in (INDEX_FILE, METADATA_FILE):
        with _damage_of(folder / name):
            written, found = content["files"][name], _checksums(folder / name)
            if wrong := next((what for what in found if found[what] != written[what]), None):
                raise ValueError(f"its {wrong} is {found[wrong]} and was {written[wrong]}")
    with _damage_of(folder / INDEX_FILE):
        index = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
    with _damage_of(folder / METADATA_FILE):
        metadata = open_metadata(folder)
    about: IndexAbout = content["about"]
    with _damage_of(folder / ABOUT_FILE):
        if not about.num_images == index.ntotal == len(metadata) or about.dim != index.d:
            raise ValueError(
                f"it tells of {about.num_images} rows, the other files hold {index.ntotal} and {len(metadata)}"
            )
    return about, index, metadata


def _damage_of(file: Path) -> AbstractContextManager[None]:
    kinds = pa.ArrowException, OSError, LookupError, RuntimeError
    return damage_of(file, *kinds, argument="index", way_out="build it again with udon index --force")


def _checksums(file: Path) -> dict[str, Any]:
    """Size of a file, and its SHA-256; of a large one, whose pages only a search should read, that of both ends."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _HASHED_BYTES:
            return {"bytes": size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        digest = hashlib.sha256(opened.read(_END_BYTES))
        opened.seek(-_END_BYTES, os.SEEK_END)
        digest.update(opened.read())
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


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
