"""`udon embed`: the images of a source through a model, into shards that a second start goes on with."""

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm import tqdm

from modeling_udon.data.doubts import doubts_of_images, rows_to_look_at
from modeling_udon.data.folders import describe_passed_over
from modeling_udon.encoder import Encoder
from modeling_udon.search.file_source import FileSource, what_changed, write_listing
from modeling_udon.search.loading import Facts, ShardSlices, make_loader
from modeling_udon.search.processes import check_launcher, start_accelerator
from modeling_udon.search.shards import (
    LISTING_FILE,
    SKIPPED_FILE,
    WORK_FOLDER,
    ShardFolder,
    embedding_table,
    make_folder,
    open_embeddings,
    read_manifest,
    start_or_resume,
    write_manifest,
)
from modeling_udon.search.source_spec import ImageSource, Read, SourceSpec
from modeling_udon.search.sources import OpenedSource, open_source, passed_over
from modeling_udon.storage import locked

# Processes finish at different times, and one alone lists the files.
_PATIENCE = timedelta(days=7)
_NUM_SHOWN = 5
# 128 bits of the SHA-256 of an image's bytes; exact copies share an id.
_ID_DIGITS = 32


@dataclass(frozen=True)
class Embedded:
    """Embeddings of a source, with what was done.

    Attributes:
        folder: Their folder, as `build_index` takes it.
        num_images: Images of the source.
        num_embedded: Images that this process embedded now.
        skipped: A line for each image left out, path and reason with a tab between.
        seconds: How long it took.
    """

    folder: Path
    num_images: int
    num_embedded: int
    skipped: Sequence[str]
    seconds: float

    @cached_property
    def embeddings(self) -> np.ndarray:
        """All embeddings in memory, of shape `(num_rows, dim)`, float32, unit norm."""
        return np.concatenate([vectors for vectors, _ in open_embeddings(self.folder).blocks(columns=False)])

    @cached_property
    def table(self) -> pa.Table:
        """The other columns, a row for each embedding; `table.to_pandas()` makes a data frame of it."""
        return pa.concat_tables([table for _, table in open_embeddings(self.folder).blocks()])


@dataclass
class _Shard:
    """What is known of the shard in work; embeddings stay on the device until it is whole."""

    rows: list[int] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


def embed(
    source: str | os.PathLike[str] | SourceSpec,
    encoder: Encoder,
    out: str | os.PathLike[str] | None = None,
    *,
    thumbnails: bool | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    mixed_precision: str = "no",
    shard_size: int = 10_000,
    strict: bool = False,
    force: bool = False,
    progress: bool | None = False,
    say: Callable[[str], None] = lambda text: None,
) -> Embedded:
    """Embeds all images of a source; each process of `accelerate launch` takes its share of the shards.

    Args:
        source: A folder, an image, a list file, a Parquet file or folder, a data set on the Hub or disk, `demo:NAME`; a
            `SourceSpec` also says which split, columns or domain.
        encoder: The model.
        out: Folder of the embeddings. If it holds a part of the same work, that is completed. `None` keeps them only as
            long as the returned object.
        thumbnails: Whether to keep a JPEG of at most 160 pixels a side beside each embedding; `None`: for data sets,
            whose images could not be shown otherwise.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode, for each process with a model; `None`: the cores shared out, less one.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`.
        shard_size: Images per shard.
        strict: Whether an image that cannot be read is an error, once all others are embedded.
        force: Whether to drop embeddings that are there.
        progress: Whether to show a bar; `None` for one on a terminal only.
        say: Called with lines for the user, on the main process.

    Raises:
        ValueError: If the source cannot be opened or holds no image that can be read, the folder holds something else
            or is being written to, or with `strict` an image was skipped.
    """
    spec = source if isinstance(source, SourceSpec) else SourceSpec(str(source))
    check_launcher(mixed_precision)
    accelerator = start_accelerator(
        mixed_precision=mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)]
    )
    is_main = accelerator.is_main_process
    say = say if is_main else lambda text: None
    opened = open_source(spec)
    work = _Work(
        encoder,
        accelerator,
        opened.dataset is not None if thumbnails is None else thumbnails,
        batch_size,
        num_workers,
        progress,
    )
    folder = Path(tempfile.mkdtemp(prefix="udon-embed-") if out is None else out)
    identity = {"model": encoder.fingerprint, **opened.identity}
    identity |= {"thumbnails": work.thumbnails, "mixed_precision": accelerator.mixed_precision}
    with ExitStack() as held:
        if is_main:
            make_folder(folder)
            held.enter_context(locked(folder))
        with accelerator.main_process_first():
            shards = _prepare(folder, opened, identity, shard_size, force and is_main, is_main, say)
        began = time.perf_counter()
        num_missing, num_embedded = _embed_missing(opened, spec, shards, work, say)
        skipped = shards.collect_skipped() if is_main else []
        done = Embedded(shards.folder, shards.num_images, num_embedded, skipped, time.perf_counter() - began)
        if out is None:
            weakref.finalize(done, shutil.rmtree, folder, ignore_errors=True)
        _report(done, num_missing, say)
    if is_main and len(skipped) == shards.num_images:
        raise ValueError(
            f"`source` must hold an image that can be read. Got {spec.source!r}, whose {len(skipped):,} images "
            f"were all skipped, the first for: {skipped[0].partition(chr(9))[2]}"
        )
    if strict and skipped:
        raise ValueError(
            f"`source` must hold only images that can be read. Got {len(skipped):,} skipped; leave them out."
        )
    return done


@dataclass(frozen=True)
class _Work:
    """How to embed: see `embed`."""

    model: Encoder
    accelerator: Accelerator
    thumbnails: bool
    batch_size: int
    num_workers: int | None
    progress: bool | None


def _prepare(
    folder: Path,
    opened: OpenedSource,
    identity: Mapping[str, Any],
    shard_size: int,
    force: bool,
    is_main: bool,
    say: Callable[[str], None],
) -> ShardFolder:
    listing = folder / WORK_FOLDER / LISTING_FILE
    if start_or_resume(folder, identity, force):
        shards = read_manifest(folder)
        if opened.paths is not None and is_main:
            _check_files(opened, shards, listing)
        if shards.shard_size != shard_size:
            say(f"going on with shards of {shards.shard_size:,} images, as begun")
        return shards
    if opened.dataset is not None:
        num_images = opened.dataset.num_images
    else:
        assert opened.paths is not None, "a source has files or is a data set"
        paths = opened.paths()
        num_images = write_listing(paths, listing, shard_size, opened.root)
        if counts := passed_over(paths):
            say(f"passed over: {describe_passed_over(counts)}")
    if num_images == 0:
        raise ValueError(
            f"`source` must hold at least one image. Got {opened.identity['source']!r} with none; for a data set that "
            "is not recognised, name its split."
        )
    say(f"{num_images:,} images found")
    shards = ShardFolder(folder, num_images, shard_size)
    write_manifest(shards, identity)
    return shards


def _check_files(opened: OpenedSource, shards: ShardFolder, listing: Path) -> None:
    """Refuses to go on where files came, went or changed since they were listed."""
    assert opened.paths is not None, "only files are listed"
    with tempfile.TemporaryDirectory(prefix="udon-listing-") as place:
        now = Path(place, LISTING_FILE)
        write_listing(opened.paths(), now, shards.shard_size, opened.root)
        if changes := what_changed(listing, now):
            raise ValueError(
                f"`out` must hold embeddings of the images that are there now. Got {str(shards.folder)!r}, since when "
                f"the files changed in {opened.identity['source']!r}: {changes}; give another --out, or --force to "
                "embed all again."
            )


def _embed_missing(
    opened: OpenedSource, spec: SourceSpec, shards: ShardFolder, work: _Work, say: Callable[[str], None]
) -> tuple[int, int]:
    """Embeds this process's share of the missing shards; returns how many images were missing, and its own share."""
    source = opened.dataset or FileSource(
        opened.root,
        shards.folder / WORK_FOLDER / LISTING_FILE,
        shards.num_images,
        shards.shard_size,
        spec.domain,
        spec.domain_from_folder,
        opened.confined,
    )
    accelerator, missing = work.accelerator, shards.missing()
    accelerator.wait_for_everyone()  # before a shard appears that another process would not find missing
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    num_missing = sum(len(shards.rows(shard)) for shard in missing)
    if num_missing and accelerator.is_main_process:
        reads = [read for row in rows_to_look_at(source.num_images) for read in source.readers(row, row + 1)]
        for line in doubts_of_images([partial(_data_of, read) for read in reads]):
            say(f"WARNING: {line}")
    if num_done := shards.num_images - num_missing:
        say(f"{num_done:,} of {shards.num_images:,} images are there already")
    num_embedded = _embed_shards(source, shards, mine, work)
    accelerator.wait_for_everyone()
    return num_missing, num_embedded


def _data_of(read: Read) -> bytes:
    return read().data


@torch.inference_mode()
def _embed_shards(source: ImageSource, shards: ShardFolder, mine: Sequence[int], work: _Work) -> int:
    """Embeds and writes some shards, one after the other; returns the number of images."""
    model, accelerator = work.model, work.accelerator
    model.network.to(accelerator.device)
    about = {"model": model.name, "fingerprint": model.fingerprint, "dim": model.dim, "root": source.root}
    about["pooling"] = model.pooling
    slices = ShardSlices(shards, mine, work.batch_size)
    loader = make_loader(source, model.transform, slices, accelerator, work.num_workers, work.thumbnails)
    remaining, shard, num_embedded = iter(mine), _Shard(), 0
    number = next(remaining, -1)
    hides_bar = not work.progress if isinstance(work.progress, bool) else None
    with tqdm(
        total=sum(len(shards.rows(shard)) for shard in mine),
        unit=" images",
        unit_scale=accelerator.num_processes,
        disable=hides_bar if accelerator.is_main_process else True,
        smoothing=0.1,
    ) as bar:
        for images in loader:
            if images.pixels is not None:
                with accelerator.autocast():
                    shard.embeds.append(model(images.pixels.to(accelerator.device, non_blocking=True)))
            shard.rows += images.rows
            shard.facts += images.facts
            shard.thumbnails += images.thumbnails
            shard.errors |= images.errors
            bar.update(len(images.rows) + len(images.errors))
            if images.stop == shards.rows(number).stop:
                _write(source, shards, number, shard, about, work.thumbnails)
                num_embedded += len(shard.rows)
                shard, number = _Shard(), next(remaining, -1)
    return num_embedded


def _write(
    source: ImageSource,
    shards: ShardFolder,
    number: int,
    shard: _Shard,
    about: dict[str, Any],
    thumbnails: bool,
) -> None:
    rows = shards.rows(number)
    table = source.describe(rows.start, rows.stop)
    paths = table["path"]
    skipped = [(paths[row - rows.start].as_py(), reason) for row, reason in shard.errors.items()]
    table = table.take(pa.array([row - rows.start for row in shard.rows], pa.int64()))
    digests = [digest for digest, _, _ in shard.facts]
    sizes, times = [size for _, size, _ in shard.facts], [mtime for _, _, mtime in shard.facts]
    if "id" not in table.column_names:
        table = table.append_column("id", pa.array([digest[:_ID_DIGITS] for digest in digests], pa.string()))
    for name, values, kind in (
        ("sha256", digests, pa.string()),
        ("num_bytes", sizes, pa.int64()),
        ("mtime", times, pa.int64()),
    ):
        table = table.append_column(name, pa.array(values, kind))
    if thumbnails:
        table = table.append_column("thumbnail", pa.array(shard.thumbnails, pa.binary()))
    embeds = torch.cat(shard.embeds).cpu().numpy() if shard.embeds else np.empty((0, about["dim"]), dtype=np.float32)
    shards.write(number, embedding_table(table, embeds, about), skipped)


def _report(done: Embedded, num_new: int, say: Callable[[str], None]) -> None:
    if num_new:
        rate = num_new / done.seconds
        say(f"{num_new:,} images in {done.seconds:.1f} s ({rate:,.0f} images/s), embeddings in {done.folder}")
    else:
        say(f"nothing left to do, embeddings in {done.folder}")
    if done.skipped:
        say(f"{len(done.skipped):,} images skipped, named in {done.folder / SKIPPED_FILE}:")
        for line in done.skipped[:_NUM_SHOWN]:
            say("  " + line.replace("\t", ": "))
        if len(done.skipped) > _NUM_SHOWN:
            say(f"  and {len(done.skipped) - _NUM_SHOWN:,} more")
