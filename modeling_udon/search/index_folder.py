"""Index folder: segments of FAISS index and metadata, tombstones, and the manifest that each commit replaces.

A file that a manifest names is never changed: a commit writes new files and then the manifest, in one step.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.backbones import Pooling
from modeling_udon.search.segments import ROW, Segment, SegmentFiles, open_metadata, open_segment
from modeling_udon.storage import (
    DamagedFileError,
    check_shape,
    damage_of,
    replaced_file,
    standing_folder,
    write_json,
)

INDEX_FILE = "index.faiss"
METADATA_FILE = "metadata.arrow"
VECTORS_FILE = "vectors.npy"
ABOUT_FILE = "index.json"
# Of the folder: 1 had neither this number nor checksums, 2 could not be changed.
SCHEMA = 3
# Up to here a file is read whole when it is opened, which takes a second or two.
# Of `index.json`, as the other files cannot tell it.
_SHAPE = {
    "kind": str,
    "model": str,
    "fingerprint": str,
    "sources": [{"folder": str, "root": str}],
    "version": int,
    "next_row": int,
    "parts": [{"source": int, "digest": str}],
    "segments": [{"faiss": str, "metadata": str, "vectors": str | None, "num_rows": int}],
    "deleted": str | None,
    "files": {str: dict},
}
_HASHED_BYTES = 2**30
_END_BYTES = 2**20


@dataclass(frozen=True)
class IndexAbout:
    """What an index says of itself.

    Attributes:
        kind: One of `KINDS`.
        dim: Size of an embedding.
        num_images: Images that a search can find.
        model: Name of the model of the embeddings.
        fingerprint: Its fingerprint.
        effort: Lists or candidates that a search looks at (`ivf`, `ivfpq`, `hnsw`), 0 for the other kinds.
        recall: Share of the exact 10 nearest neighbours that a search finds, on a sample, when the index was built or
            compacted; `None` with one image.
        sources: For each embedding folder its `folder` and the `root` of its paths.
        bytes_per_image: Size of the FAISS files by image.
        letterbox: Whether images were padded to squares before they were embedded.
        pooling: How the features of the model's backbone were pooled; `None` for the model's own way.
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
    letterbox: bool = False
    pooling: Pooling | None = None


@dataclass(frozen=True)
class Manifest:
    """What the folder of an index holds.

    Attributes:
        about: What the index says of itself.
        version: Grows with each commit.
        next_row: The number that the next row gets; none is given twice.
        parts: For each shard that rows came from the number of its source, and the digest of its content.
        segments: The base, then what was added to it.
        deleted: File of the numbers of rows that were removed, ascending; `None` for none.
        files: Size and checksum of each file.
    """

    about: IndexAbout
    version: int
    next_row: int
    parts: list[dict[str, Any]]
    segments: list[SegmentFiles]
    deleted: str | None = None
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The files of the folder, the manifest itself left out."""
        return [name for files in self.segments for name in files.names()] + ([self.deleted] if self.deleted else [])


@dataclass(frozen=True)
class OpenedIndex:
    """A manifest with its files opened: segments, and the numbers of the removed rows, ascending."""

    manifest: Manifest
    segments: list[Segment]
    deleted: np.ndarray


def open_index(folder: Path, known: OpenedIndex | None = None) -> OpenedIndex:
    """Opens an index memory-mapped.

    Args:
        folder: The folder.
        known: The same index opened earlier: its segments are not opened again where they are the same.

    Raises:
        ValueError: If the folder holds none, one of another schema, or one of whose files is damaged.
    """
    folder = standing_folder(folder)
    while True:
        manifest = read_manifest(folder)
        try:
            opened = _open_files(folder, manifest, known)
        except (DamagedFileError, FileNotFoundError):
            if manifest == read_manifest(folder):
                raise
            continue
        # Another process may have replaced the folder between two of its files.
        if manifest == read_manifest(folder):
            return opened


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an index.

    Raises:
        ValueError: If there is none, or it is damaged or of another schema.
    """
    file = folder / ABOUT_FILE
    if not file.is_file():
        raise ValueError(f"`index` must be a folder that udon index wrote. Got {str(folder)!r}.")
    with damage_of_index(file):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        check_shape(content, dict)
        schema = content.get("schema", 1)
    if schema != SCHEMA:
        raise ValueError(
            f"`index` must be of this version of udon, schema {SCHEMA}. Got {str(folder)!r} of schema {schema}; build "
            "it again with udon index --force."
        )
    with damage_of_index(file):
        check_shape(content, _SHAPE)
        # A later version may have added keys under the same number; these are passed over.
        about = IndexAbout(**{key.name: content[key.name] for key in fields(IndexAbout) if key.name in content})
        others = {key.name: content[key.name] for key in fields(Manifest) if key.name not in ("about", "segments")}
        known = [key.name for key in fields(SegmentFiles)]
        segments = [SegmentFiles(**{key: files[key] for key in known}) for files in content["segments"]]
        return Manifest(about=about, segments=segments, **others)


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, Any] | None = None) -> None:
    """Commits what the folder holds from now on; all files must be there.

    Args:
        folder: The folder.
        manifest: What it holds; its checksums are computed here.
        known: Checksums of files that were there before.
    """
    files = {name: (known or {}).get(name) or checksums(folder / name) for name in manifest.names()}
    content = {key.name: getattr(manifest, key.name) for key in fields(Manifest) if key.name != "about"}
    content |= {"files": files, "segments": [asdict(segment) for segment in manifest.segments]}
    write_json(folder / ABOUT_FILE, {"schema": SCHEMA, **asdict(manifest.about), **content})


def write_about(
    folder: Path,
    about: IndexAbout,
    parts: Sequence[Mapping[str, Any]] = (),
    next_row: int | None = None,
    version: int = 1,
) -> None:
    """Commits an index of a base alone, whose files are there.

    Args:
        folder: The folder.
        about: What the index says of itself.
        parts: See `Manifest`.
        next_row: The number of the next row; `None` where rows are numbered from 0.
        version: Of the commit.
    """
    vectors = VECTORS_FILE if (folder / VECTORS_FILE).is_file() else None
    base = SegmentFiles(INDEX_FILE, METADATA_FILE, vectors, about.num_images)
    after = about.num_images if next_row is None else next_row
    write_manifest(folder, Manifest(about, version, after, [dict(part) for part in parts], [base]))


def write_deleted(folder: Path, name: str, rows: np.ndarray) -> None:
    """Writes the numbers of removed rows, ascending, int64."""
    with replaced_file(folder / name) as draft, draft.open("wb") as file:
        np.save(file, rows)


def write_metadata(folder: Path, name: str, tables: Any, schema: pa.Schema) -> None:
    """Writes the columns beside the embeddings, a row for each of the index; missing columns are empty."""
    with replaced_file(folder / name) as draft, pa.ipc.new_file(str(draft), schema) as writer:
        for table in tables:
            writer.write_table(fitted(table, schema))


def fitted(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of a schema; those that it lacks are empty."""
    columns = [
        table[column.name] if column.name in table.column_names else pa.nulls(len(table), column.type)
        for column in schema
    ]
    return pa.table(columns, schema=schema)


def damage_of_index(file: Path) -> AbstractContextManager[None]:
    """Turns what libraries raise of a damaged file of an index into one line with its name."""
    kinds = pa.ArrowException, OSError, LookupError, RuntimeError
    return damage_of(file, *kinds, argument="index", way_out="build it again with udon index --force")


def checksums(file: Path) -> dict[str, Any]:
    """Size of a file, and its SHA-256; of a large one, whose pages only a search should read, that of both ends."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _HASHED_BYTES:
            return {"bytes": size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
        digest = hashlib.sha256(opened.read(_END_BYTES))
        opened.seek(-_END_BYTES, os.SEEK_END)
        digest.update(opened.read())
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


def _open_files(folder: Path, manifest: Manifest, known: OpenedIndex | None) -> OpenedIndex:
    before = {} if known is None else dict(zip(_keys(known.manifest), known.segments, strict=True))
    segments = []
    for files, key in zip(manifest.segments, _keys(manifest), strict=True):
        if key not in before:
            for name in files.names():
                _check(folder, name, manifest.files)
        segments.append(before.get(key) or _open_segment(folder, files, manifest.about))
    deleted = np.empty(0, np.int64)
    if manifest.deleted is not None:
        _check(folder, manifest.deleted, manifest.files)
        with damage_of_index(folder / manifest.deleted):
            deleted = np.load(folder / manifest.deleted)
    num_rows = sum(segment.num_rows for segment in segments) - len(deleted)
    with damage_of_index(folder / ABOUT_FILE):
        if manifest.about.num_images != num_rows:
            raise ValueError(f"it tells of {manifest.about.num_images} rows, the other files hold {num_rows}")
    return OpenedIndex(manifest, segments, deleted)


def _keys(manifest: Manifest) -> list[str]:
    """For each segment what it is known by: its files with their checksums."""
    return [json.dumps([[name, manifest.files[name]] for name in files.names()]) for files in manifest.segments]


def _check(folder: Path, name: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    with damage_of_index(folder / name):
        written, found = files[name], checksums(folder / name)
        if wrong := next((what for what in found if found[what] != written[what]), None):
            raise ValueError(f"its {wrong} is {found[wrong]} and was {written[wrong]}")


def _open_segment(folder: Path, files: SegmentFiles, about: IndexAbout) -> Segment:
    with damage_of_index(folder / files.metadata):
        metadata = open_metadata(folder / files.metadata)
        metadata.schema.field(ROW)
    with damage_of_index(folder / files.faiss):
        segment = open_segment(folder, files, metadata)
    with damage_of_index(folder / ABOUT_FILE):
        if not files.num_rows == segment.index.ntotal == len(metadata) or about.dim != segment.index.d:
            raise ValueError(
                f"it tells of {files.num_rows} rows, the other files hold {segment.index.ntotal} and {len(metadata)}"
            )
    return segment
