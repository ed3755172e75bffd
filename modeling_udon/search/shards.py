"""Embeddings on disk: a folder of Parquet shards that can be continued, written and read a shard at a time."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_udon.storage import DamagedFileError, damage_of, replaced_file, write_json, write_text
from modeling_udon.text import printable, table_cell

# What readers of Parquet folders take for data does not begin with a dot.
WORK_FOLDER = ".embed"
MANIFEST_FILE = "manifest.json"
# No Parquet, which readers of `**/*.parquet` would take for embeddings.
LISTING_FILE = "listing.arrow"
SKIPPED_FILE = "_skipped.log"
METADATA_KEY = b"udon"
SCHEMA = 2


@dataclass(frozen=True)
class ShardFolder:
    """Folder of the embeddings of `num_images` images, a shard for each `shard_size` of them."""

    folder: Path
    num_images: int
    shard_size: int

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
        return [shard for shard in range(self.num_shards) if not self.part(shard).is_file()]

    def write(self, shard: int, table: pa.Table, skipped: Sequence[tuple[str, str]]) -> None:
        """Writes a shard atomically, and before it the paths it skips, with the reasons."""
        log = "".join(f"{table_cell(path)}\t{printable(reason)}\n" for path, reason in skipped)
        write_text(self._skipped(shard), log)
        with replaced_file(self.part(shard)) as draft:
            pq.write_table(table, draft, row_group_size=self.shard_size, write_page_checksum=True)

    def collect_skipped(self) -> list[str]:
        """Writes the log of skipped paths, if there are any; returns its lines."""
        lines = [
            line
            for shard in range(self.num_shards)
            for line in self._skipped(shard).read_text(encoding="utf-8").splitlines()
        ]
        log = self.folder / SKIPPED_FILE
        log.unlink(missing_ok=True)
        if lines:
            write_text(log, "\n".join(lines) + "\n")
        return lines

    def _skipped(self, shard: int) -> Path:
        return self.folder / WORK_FOLDER / f"skipped-{shard:05d}.tsv"


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
    parts: Sequence[Path]
    about: Mapping[str, Any]
    num_rows: int
    schema: pa.Schema

    def blocks(self, columns: bool = True) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Reads a shard at a time: embeddings of shape `(num_rows, dim)` and a table of the other columns."""
        for part in self.parts:
            with damage_of_embeddings(part):
                file = pq.ParquetFile(part, page_checksum_verification=True)
                for batch in file.iter_batches(batch_size=65_536, columns=None if columns else ["embedding"]):
                    table = pa.Table.from_batches([batch])
                    vectors = batch.column("embedding").flatten().to_numpy().reshape(-1, self.about["dim"])
                    _check_vectors(vectors, part)
                    yield vectors, table.drop_columns(["embedding"]).replace_schema_metadata(None)


def make_folder(folder: Path) -> None:
    """Makes the folder, if it is not there.

    Raises:
        ValueError: If it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` must be a folder. Got the file {str(folder)!r}.")
    folder.mkdir(parents=True, exist_ok=True)


def start_or_resume(folder: Path, identity: Mapping[str, Any], force: bool) -> bool:
    """Makes the folder ready; returns whether it already holds the beginning of the same work.

    Args:
        folder: Folder of the embeddings.
        identity: What must be the same to go on: model, source, columns.
        force: Whether to drop embeddings that are there.

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
        _check_identity(folder, _read_manifest(folder)["identity"], identity)
        return True
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    return False


def write_manifest(shards: ShardFolder, identity: Mapping[str, Any]) -> None:
    """Writes down what the folder will hold; from here on the work can be continued."""
    content = {"schema": SCHEMA, "identity": identity, "num_images": shards.num_images, "shard_size": shards.shard_size}
    write_json(shards.folder / WORK_FOLDER / MANIFEST_FILE, content)


def read_manifest(folder: Path) -> ShardFolder:
    """The shards that the folder will hold.

    Raises:
        ValueError: If its manifest is damaged, or of another version.
    """
    content = _read_manifest(folder)
    return ShardFolder(folder, content["num_images"], content["shard_size"])


def open_embeddings(folder: Path) -> Embeddings:
    """Opens what `udon embed` wrote.

    Raises:
        ValueError: If the folder is none of its, is not finished, or holds no embedding.
    """
    if not (folder / WORK_FOLDER / MANIFEST_FILE).is_file():
        raise ValueError(f"`embeddings` must be folders that udon embed wrote. Got {str(folder)!r}.")
    shards = read_manifest(folder)
    if missing := shards.missing():
        raise ValueError(
            f"`embeddings` must be finished. Got {str(folder)!r}, which lacks {len(missing)} of {shards.num_shards} "
            "shards; run its udon embed again to go on."
        )
    parts = [shards.part(shard) for shard in range(shards.num_shards)]
    num_rows, schemas = 0, []
    for part in parts:
        with damage_of_embeddings(part):
            file = pq.ParquetFile(part)
            num_rows += file.metadata.num_rows
            schemas.append(file.schema_arrow)
            about = json.loads(schemas[-1].metadata[METADATA_KEY])
    if num_rows == 0:
        raise ValueError(f"`embeddings` must hold at least one. Got {str(folder)!r} with none.")
    schema = schemas[0]
    return Embeddings(
        folder, parts, about, num_rows, schema.remove_metadata().remove(schema.get_field_index("embedding"))
    )


def embedding_table(table: pa.Table, embeds: np.ndarray, about: Mapping[str, Any]) -> pa.Table:
    """Puts embeddings of shape `(num_rows, dim)` beside the other columns, and `about` into the schema."""
    values = pa.array(np.ascontiguousarray(embeds, dtype=np.float32).reshape(-1))
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, about["dim"]))
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(about).encode()})


def _check_identity(folder: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key in wanted:
        if saved.get(key) != wanted[key]:
            raise ValueError(
                f"`out` must hold embeddings of the same {key}, {saved.get(key)!r}. Got {wanted[key]!r} for "
                f"{str(folder)!r}; give another --out, or --force to drop what is there."
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / WORK_FOLDER / MANIFEST_FILE
    with damage_of_embeddings(file):
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = content["schema"]
    if schema != SCHEMA:
        raise ValueError(
            f"`embeddings` must be of this version of udon, schema {SCHEMA}. Got {str(folder)!r} of schema {schema}; "
            "embed the images again with --force."
        )
    return content


def damage_of_embeddings(file: Path) -> AbstractContextManager[None]:
    """Turns what libraries raise of a damaged file of embeddings into one line with its name."""
    way_out = "delete it and run its udon embed again"
    return damage_of(file, pa.ArrowException, OSError, LookupError, argument="embeddings", way_out=way_out)


def _check_vectors(vectors: np.ndarray, part: Path) -> None:
    if not np.isfinite(vectors).all():
        raise DamagedFileError(
            f"`embeddings` must be finite. Got NaN or infinity in {str(part)!r}; embed the images again with --force, "
            "in float32 or bf16."
        )
