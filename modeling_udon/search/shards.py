"""Embeddings on disk: a folder of Parquet shards that can be continued and updated, read a shard at a time."""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_udon.search.columns import unified
from modeling_udon.search.vectors import METADATA_KEY, damage_of_embeddings, read_vectors
from modeling_udon.storage import check_shape, damage_of, replaced_file, write_json, write_text
from modeling_udon.text import printable, table_cell

# What readers of Parquet folders take for data does not begin with a dot.
WORK_FOLDER = ".embed"
MANIFEST_FILE = "manifest.json"
# No Parquet, which readers of `**/*.parquet` would take for embeddings.
LISTING_FILE = "listing.arrow"
SKIPPED_FILE = "_skipped.log"
# Digest of a shard's content, by which an index knows it.
DIGEST_KEY = b"udon_digest"
# 2 had no updates; it is read as it is.
SCHEMA = 3
_READ_SCHEMAS = (2, SCHEMA)
_MANIFEST = {"schema": object, "identity": dict, "num_images": int, "shard_size": int}


@dataclass(frozen=True)
class ShardFolder:
    """Folder of the embeddings of `num_images` images, a shard for each `shard_size` of them.

    Attributes:
        folder: The folder.
        num_images: Images of the first listing.
        shard_size: Images per shard.
        parts: The names of the shards, once the folder was updated; before, they follow from the numbers above.
        deleted: File of the rows that updates have removed.
        listing: File of the listing that the folder answers to.
    """

    folder: Path
    num_images: int
    shard_size: int
    parts: Sequence[str] | None = None
    deleted: str | None = None
    listing: str = LISTING_FILE

    @property
    def num_shards(self) -> int:
        """How many shards there will be."""
        return -(-self.num_images // self.shard_size)

    def rows(self, shard: int) -> range:
        """The images of a shard, those that are skipped included."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))

    def part(self, shard: int) -> Path:
        """The shard's file."""
        return self.folder / f"part-{shard:05d}.parquet"

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        if self.parts is not None:
            return []
        return [shard for shard in range(self.num_shards) if not self.part(shard).is_file()]

    def without_lost(self) -> "ShardFolder":
        """The folder without what was deleted by hand since its last update, the next of which makes that again."""
        if self.parts is None:
            return self
        deleted = self.deleted if self.deleted and (self.folder / WORK_FOLDER / self.deleted).is_file() else None
        return replace(self, parts=[name for name in self.parts if (self.folder / name).is_file()], deleted=deleted)

    def write(self, shard: int, table: pa.Table, skipped: Sequence[tuple[str, str]]) -> None:
        """Writes a shard atomically, and before it the paths it skips, with the reasons."""
        log = "".join(f"{table_cell(path)}\t{printable(reason)}\n" for path, reason in skipped)
        write_text(self._skipped(shard), log)
        write_part(self.part(shard), table, self.shard_size)

    def collect_skipped(self) -> list[str]:
        """Writes the log of skipped paths, if there are any; returns its lines."""
        log = self.folder / SKIPPED_FILE
        if self.parts is not None:
            return log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        lines = self.skipped_lines()
        write_skipped(log, lines)
        return lines

    def skipped_lines(self) -> list[str]:
        """The paths that the shards skip, with the reasons."""
        shards = range(self.num_shards)
        return [line for shard in shards for line in self._skipped(shard).read_text(encoding="utf-8").splitlines()]

    def _skipped(self, shard: int) -> Path:
        return self.folder / WORK_FOLDER / f"skipped-{shard:05d}.tsv"


def write_skipped(log: Path, lines: Sequence[str]) -> None:
    """Writes the log of images that were left out, or removes it where there are none."""
    if lines:
        write_text(log, "\n".join(lines) + "\n")
    else:
        log.unlink(missing_ok=True)


@dataclass(frozen=True)
class Part:
    """A shard: its file, its rows, the digest of its content, and the places of rows that an update has removed."""

    path: Path
    num_rows: int
    digest: str
    deleted: np.ndarray

    @property
    def num_live(self) -> int:
        """Rows that were not removed."""
        return self.num_rows - len(self.deleted)


@dataclass(frozen=True)
class Embeddings:
    """Finished embeddings.

    Attributes:
        folder: Their folder.
        parts: The shards.
        about: What each shard says of itself: `model`, `fingerprint`, `dim`, `root`.
        num_rows: How many embeddings there are.
        schema: Columns other than `embedding`.
    """

    folder: Path
    parts: Sequence[Part]
    about: Mapping[str, Any]
    num_rows: int
    schema: pa.Schema

    def blocks(self, columns: bool = True) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Reads a shard at a time: embeddings of shape `(num_rows, dim)`, float32, and a table of the other columns."""
        for part in self.parts:
            for _, vectors, table in self.blocks_of(part, columns):
                yield vectors, table

    def blocks_of(self, part: Part, columns: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray, pa.Table]]:
        """Reads a shard: places of rows in it, their embeddings, and a table of their other columns."""
        with damage_of_embeddings(part.path):
            start, file = 0, pq.ParquetFile(part.path, page_checksum_verification=True)
            for batch in file.iter_batches(batch_size=65_536, columns=None if columns else ["embedding"]):
                places = np.setdiff1d(np.arange(start, start + len(batch)), part.deleted, assume_unique=True)
                table = pa.Table.from_batches([batch])
                vectors = read_vectors(batch.column("embedding"), part.path)
                if len(places) < len(batch):
                    table, vectors = table.take(pa.array(places - start)), vectors[places - start]
                start += len(batch)
                kept = table.drop_columns(["embedding"]).replace_schema_metadata(None)
                yield places, vectors.astype(np.float32, copy=False), kept


def make_folder(folder: Path) -> None:
    """Makes the folder, if it is not there; raises ValueError if it is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` must be a folder. Got the file {str(folder)!r}.")
    folder.mkdir(parents=True, exist_ok=True)


def start_or_resume(folder: Path, identity: Mapping[str, Any], force: bool, may_differ: Collection[str] = ()) -> bool:
    """Makes the folder ready; returns whether it already holds the beginning of the same work.

    Args:
        folder: Folder of the embeddings.
        identity: What must be the same to go on: model, source, columns.
        force: Whether to drop embeddings that are there.
        may_differ: What of it need not be the same.

    Raises:
        ValueError: If the folder holds embeddings of another model or source, or other files.
    """
    manifest = folder / WORK_FOLDER / MANIFEST_FILE
    if not manifest.is_file():
        leftovers = [path for path in folder.iterdir() if path.name != WORK_FOLDER] if folder.exists() else []
        if leftovers:
            raise ValueError(
                f"`out` must be a new folder or one that udon embed wrote. Got {str(folder)!r} with other files in it."
            )
    elif force:
        for path in (*folder.glob("part-*.parquet"), folder / SKIPPED_FILE):
            path.unlink(missing_ok=True)
        # First: without its listing, a manifest would promise what can no longer be completed.
        manifest.unlink()
        shutil.rmtree(folder / WORK_FOLDER)
    else:
        _check_identity(folder, _read_manifest(folder)["identity"], identity, may_differ)
        return True
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    return False


def write_manifest(shards: ShardFolder, identity: Mapping[str, Any]) -> None:
    """Writes down what the folder will hold; from here on the work can be continued."""
    content = {"schema": SCHEMA, "identity": identity, "num_images": shards.num_images, "shard_size": shards.shard_size}
    content |= {"parts": shards.parts, "deleted": shards.deleted, "listing": shards.listing}
    write_json(shards.folder / WORK_FOLDER / MANIFEST_FILE, content)


def read_manifest(folder: Path) -> ShardFolder:
    """The shards that the folder will hold; raises ValueError if its manifest is damaged, or of another version."""
    content = _read_manifest(folder)
    updates = {key: content[key] for key in ("parts", "deleted", "listing") if content.get(key) is not None}
    return ShardFolder(folder, content["num_images"], content["shard_size"], **updates)


def read_identity(folder: Path) -> dict[str, Any]:
    """What the folder's embeddings were begun with: model, source, columns, runtime."""
    identity: dict[str, Any] = _read_manifest(folder)["identity"]
    return identity


def is_embedding_folder(folder: Path) -> bool:
    """Whether `udon embed` wrote a folder."""
    return (folder / WORK_FOLDER / MANIFEST_FILE).is_file()


def open_embeddings(folder: Path, argument: str = "embeddings") -> Embeddings:
    """Opens what `udon embed` wrote.

    Args:
        folder: The folder.
        argument: What the user calls it.

    Raises:
        ValueError: If the folder is none of its, is not finished, or holds no embedding.
    """
    if not is_embedding_folder(folder):
        raise ValueError(f"`{argument}` must be folders that udon embed wrote. Got {str(folder)!r}.")
    shards = read_manifest(folder)
    if missing := shards.missing():
        raise ValueError(
            f"`{argument}` must be finished. Got {str(folder)!r}, which lacks {len(missing)} of {shards.num_shards} "
            "shards; run its udon embed again to go on."
        )
    parts, schemas, about = opened_parts(shards)
    num_rows = sum(part.num_live for part in parts)
    if num_rows == 0:
        raise ValueError(f"`{argument}` must hold at least one. Got {str(folder)!r} with none.")
    plain = [schema.remove_metadata().remove(schema.get_field_index("embedding")) for schema in schemas]
    return Embeddings(folder, parts, about, num_rows, unified(plain))


def opened_parts(shards: ShardFolder) -> tuple[list[Part], list[pa.Schema], dict[str, Any]]:
    """The shards that are there, their schemas, and what they say of themselves."""
    names = shards.parts
    if names is None:
        names = [shards.part(shard).name for shard in range(shards.num_shards) if shards.part(shard).is_file()]
    removed = _read_deleted(shards)
    parts, schemas, about = [], [], {}
    for name in names:
        path = shards.folder / name
        with damage_of_embeddings(path):
            file = pq.ParquetFile(path)
            schemas.append(file.schema_arrow)
            about = json.loads(schemas[-1].metadata[METADATA_KEY])
            kind = schemas[-1].field("embedding").type
            if kind not in [pa.list_(pa.float32(), about["dim"]), pa.list_(pa.float16(), about["dim"])]:
                raise ValueError(f"its embeddings are {kind} and should be {about['dim']} numbers each")
            digest = schemas[-1].metadata.get(DIGEST_KEY)
            named = _digest_of_file(path) if digest is None else digest.decode()
            parts.append(Part(path, file.metadata.num_rows, named, removed.get(name, np.empty(0, np.int64))))
    return parts, schemas, about


def write_part(path: Path, table: pa.Table, row_group_size: int) -> None:
    """Writes a shard atomically, with the digest of its content."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    digest = hashlib.sha256(sink.getvalue()).hexdigest()[:32]
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), DIGEST_KEY: digest.encode()})
    with replaced_file(path) as draft:
        pq.write_table(table, draft, row_group_size=row_group_size, write_page_checksum=True)


def write_removed(file: Path, removed: Mapping[str, np.ndarray]) -> None:
    """Writes which rows of which shards were removed."""
    names = [name for name, places in removed.items() for _ in places]
    places = np.concatenate([np.empty(0, np.int64), *removed.values()])
    table = pa.table({"part": pa.array(names, pa.string()), "place": pa.array(places, pa.int64())})
    with replaced_file(file) as draft, pa.ipc.new_file(str(draft), table.schema) as writer:
        writer.write_table(table)


def _check_identity(
    folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], may_differ: Collection[str]
) -> None:
    # Not recorded where it was so, or before it was recorded.
    unsaid = {"dtype": "float32", "backend": "torch"}
    saved, wanted = unsaid | dict(saved), unsaid | dict(wanted)
    for key in [*wanted, *(key for key in saved if key not in wanted)]:
        if saved.get(key) != wanted.get(key) and key not in may_differ:
            raise ValueError(
                f"`out` must hold embeddings of the same {key}, {saved.get(key)!r}. Got {wanted.get(key)!r} for "
                f"{str(folder)!r}; give another --out, or --force to drop what is there."
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / WORK_FOLDER / MANIFEST_FILE
    # Deleted, it would leave a folder that nobody knows any more.
    with damage_of(file, OSError, argument="embeddings", way_out="embed the images again with --force"):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        check_shape(content, _MANIFEST)
        schema = content["schema"]
    if schema not in _READ_SCHEMAS:
        raise ValueError(
            f"`embeddings` must be of this version of udon, schema {SCHEMA}. Got {str(folder)!r} of schema {schema}; "
            "embed the images again with --force."
        )
    return content


def _read_deleted(shards: ShardFolder) -> dict[str, np.ndarray]:
    if shards.deleted is None:
        return {}
    file = shards.folder / WORK_FOLDER / shards.deleted
    with damage_of_embeddings(file), pa.memory_map(str(file)) as opened:
        table = pa.ipc.open_file(opened).read_all()
        table.validate(full=True)
        names, places = np.array(table["part"].to_pylist(), dtype=object), table["place"].to_numpy()
        return {name: np.sort(places[names == name]) for name in set(names.tolist())}


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
