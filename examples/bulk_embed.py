"""Embed any number of images on object storage with several workers; killed at any moment, a second start goes on.

    python examples/bulk_embed.py s3://shop/images s3://shop/embedded --model runs/demo/best --workers 2

Daft (`pip install "modeling-udon[bulk]"`) keeps the workers: processes of this machine, or with `--ray` actors of a Ray
cluster. Each opens the model once and embeds one shard after the other: it reads the shard's images and writes ONE
object. A store shows an object whole or not at all, so a shard is done or it is not, and no row is lost or doubled.
`udon index` takes the result once it is copied to a disk: `aws s3 sync s3://shop/embedded embedded`.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import daft
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs

from modeling_udon import Encoder
from modeling_udon.data.folders import is_image_name
from modeling_udon.data.images import decode_image
from modeling_udon.search.shards import (
    LISTING_FILE,
    MANIFEST_FILE,
    SCHEMA,
    SKIPPED_FILE,
    WORK_FOLDER,
    embedding_table,
)
from modeling_udon.text import printable, table_cell

# A store answers after some milliseconds, whatever it is asked for.
READERS = 16


class Store:
    """A folder on object storage, or on a disk, as Arrow reads and writes it: s3://, gs://, abfs://, file://."""

    def __init__(self, address: str) -> None:
        self.files, self.root = fs.FileSystem.from_uri(address if "://" in address else os.path.abspath(address))

    def read(self, name: str) -> bytes:
        """Reads a whole file."""
        with self.files.open_input_stream(f"{self.root}/{name}") as stream:
            return bytes(stream.read())

    def write(self, name: str, data: bytes) -> None:
        """Writes a file, which then is there as a whole."""
        if isinstance(self.files, fs.LocalFileSystem):  # a store makes no folders, and shows no half object
            self.files.create_dir(os.path.dirname(f"{self.root}/{name}"), recursive=True)
            with self.files.open_output_stream(f"{self.root}/{name}.tmp") as stream:
                stream.write(data)
            self.files.move(f"{self.root}/{name}.tmp", f"{self.root}/{name}")
            return
        with self.files.open_output_stream(f"{self.root}/{name}") as stream:
            stream.write(data)

    def names(self) -> list[str]:
        """All files, relative to the root, in order."""
        found = self.files.get_file_info(fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        files = [info.path for info in found if info.type == fs.FileType.File]
        return sorted(path.removeprefix(self.root).lstrip("/") for path in files)


def part(shard: int) -> str:
    """File of a shard."""
    return f"part-{shard:05d}.parquet"


def skipped(shard: int) -> str:
    """File of the images that a shard leaves out."""
    return f"{WORK_FOLDER}/skipped-{shard:05d}.tsv"


@daft.udf(return_dtype=daft.DataType.int64(), batch_size=1, use_process=True)
class Embedder:
    """A worker: one model, one shard at a time."""

    def __init__(self, source: str, out: str, model: str, workers: int) -> None:
        self.source, self.out = Store(source), Store(out)
        self.manifest = json.loads(self.out.read(f"{WORK_FOLDER}/{MANIFEST_FILE}"))
        # Read once: of a billion images, a list of 30 GB would be cut in shards of its own.
        self.paths = pq.read_table(io.BytesIO(self.out.read(f"{WORK_FOLDER}/{LISTING_FILE}")))["path"]
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
        self.encoder = Encoder.open(model, device="cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, shards: Any) -> list[int]:
        """Embeds shards by their numbers; returns how many rows each has."""
        return [self.embed(shard) for shard in shards.to_pylist()]

    def embed(self, shard: int) -> int:
        """Embeds and writes a shard; returns its rows."""
        size = self.manifest["shard_size"]
        paths = self.paths.slice(shard * size, size).to_pylist()
        with ThreadPoolExecutor(READERS) as pool:
            read = list(pool.map(self.open, paths))
        good = [row for row, (_, image, _) in enumerate(read) if image is not None]
        embeds = self.encoder.encode([read[row][1] for row in good], batch_size=64).embeddings
        digests = [hashlib.sha256(read[row][0]).hexdigest() for row in good]
        table = pa.table(
            {
                "path": pa.array([paths[row] for row in good], pa.string()),
                "row": pa.array([shard * size + row for row in good], pa.int64()),
                "id": pa.array([digest[:32] for digest in digests], pa.string()),
                "sha256": pa.array(digests, pa.string()),
                "num_bytes": pa.array([len(read[row][0]) for row in good], pa.int64()),
                "mtime": pa.nulls(len(good), pa.int64()),
            }
        )
        about = {
            "model": self.encoder.name,
            "fingerprint": self.encoder.fingerprint,
            "dim": self.encoder.dim,
            "root": "",
        }
        lines = [f"{table_cell(paths[row])}\t{printable(why)}\n" for row, (_, _, why) in enumerate(read) if why]
        file = io.BytesIO()
        pq.write_table(embedding_table(table, embeds, about), file, write_page_checksum=True)
        # The shard itself comes last: where it is, all of it is.
        self.out.write(skipped(shard), "".join(lines).encode())
        self.out.write(part(shard), file.getvalue())
        return len(good)

    def open(self, path: str) -> tuple[bytes, Any, str]:
        """Bytes, pixels, and why there are none."""
        try:
            data = self.source.read(path)
            return data, decode_image(data), ""
        except (OSError, ValueError) as error:
            return b"", None, str(error) or type(error).__name__


def prepare(arguments: argparse.Namespace, out: Store) -> dict[str, Any]:
    """Lists the images once, so that every start means the same shards; returns the manifest."""
    identity = {"kind": "bulk", "source": arguments.source, "model": Encoder.open(arguments.model).fingerprint}
    names = out.names()
    if f"{WORK_FOLDER}/{MANIFEST_FILE}" in names:
        manifest: dict[str, Any] = json.loads(out.read(f"{WORK_FOLDER}/{MANIFEST_FILE}"))
        if manifest["identity"] != identity:
            sys.exit(f"{arguments.out} holds other embeddings: {manifest['identity']}; give another folder")
        return manifest
    paths = [name for name in Store(arguments.source).names() if is_image_name(name)]
    if not paths:
        sys.exit(f"no images in {arguments.source}")
    file = io.BytesIO()
    pq.write_table(pa.table({"path": paths}), file)
    out.write(f"{WORK_FOLDER}/{LISTING_FILE}", file.getvalue())
    manifest = {"schema": SCHEMA, "identity": identity, "num_images": len(paths), "shard_size": arguments.shard_size}
    out.write(f"{WORK_FOLDER}/{MANIFEST_FILE}", json.dumps(manifest).encode())
    return manifest


def finish(out: Store, manifest: dict[str, Any]) -> None:
    """Counts what is there: every image once, embedded or skipped."""
    paths = pq.read_table(io.BytesIO(out.read(f"{WORK_FOLDER}/{LISTING_FILE}")))["path"].to_pylist()
    rows, lines = [], []
    for shard in range(-(-manifest["num_images"] // manifest["shard_size"])):
        rows += pq.read_table(io.BytesIO(out.read(part(shard))), columns=["row"])["row"].to_pylist()
        lines += out.read(skipped(shard)).decode().splitlines()
    if len(set(rows)) != len(rows) or len(rows) + len(lines) != len(paths):
        sys.exit(f"{len(rows)} rows, {len(set(rows))} of them different, and {len(lines)} skipped of {len(paths)}")
    if lines:
        out.write(SKIPPED_FILE, "".join(f"{line}\n" for line in lines).encode())
    print(f"{len(paths):,} images: {len(rows):,} embedded once each, {len(lines):,} skipped")


def main() -> None:
    """Embeds what is not there yet, and counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("source", help="folder of images, such as s3://shop/images")
    parser.add_argument("out", help="folder of the embeddings, such as s3://shop/embedded")
    parser.add_argument("--model", required=True, help="folder or Hub id of the model, which every worker can open")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=10_000)
    parser.add_argument("--ray", metavar="ADDRESS", help="address of a Ray cluster")
    arguments = parser.parse_args()
    if arguments.ray:
        daft.set_runner_ray(arguments.ray)
    out = Store(arguments.out)
    manifest = prepare(arguments, out)
    there = set(out.names())
    shards = range(-(-manifest["num_images"] // manifest["shard_size"]))
    missing = [shard for shard in shards if part(shard) not in there]
    print(f"{manifest['num_images']:,} images in {len(shards)} shards, {len(missing)} to do", flush=True)
    if missing:
        worker = Embedder.with_concurrency(arguments.workers).with_init_args(
            arguments.source, arguments.out, arguments.model, arguments.workers
        )
        frame = daft.from_pydict({"shard": missing}).into_batches(1)
        frame.with_column("rows", worker(daft.col("shard"))).collect()
    finish(out, manifest)


if __name__ == "__main__":
    main()
