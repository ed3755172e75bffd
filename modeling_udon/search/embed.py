"""`udon embed`: the images of a source through a model, into shards that a second start goes on with."""

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from accelerate import InitProcessGroupKwargs

from modeling_udon.data.doubts import doubts_of_images, rows_to_look_at
from modeling_udon.data.folders import describe_passed_over
from modeling_udon.encoder import Encoder
from modeling_udon.search.embed_loop import Work, about_embeddings, embed_missing
from modeling_udon.search.file_source import FileSource, read_listing, what_changed, write_listing
from modeling_udon.search.processes import check_launcher, start_accelerator
from modeling_udon.search.runtimes import as_begun, asked_for, choose_runtime
from modeling_udon.search.shards import (
    LISTING_FILE,
    SKIPPED_FILE,
    WORK_FOLDER,
    ShardFolder,
    make_folder,
    open_embeddings,
    opened_parts,
    read_identity,
    read_manifest,
    start_or_resume,
    write_manifest,
    write_skipped,
)
from modeling_udon.search.source_spec import ImageSource, Read, SourceSpec
from modeling_udon.search.sources import OpenedSource, open_source, passed_over
from modeling_udon.search.update import Changes, commit, find_changes, unreadable_as_before
from modeling_udon.search.update_plan import SelectedRows, planned_rows, read_plan, start_plan, write_plan
from modeling_udon.storage import locked

# Processes finish at different times, and one alone lists the files.
_PATIENCE = timedelta(days=7)
_NUM_SHOWN = 5


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


def embed(
    source: str | os.PathLike[str] | SourceSpec,
    encoder: Encoder,
    out: str | os.PathLike[str] | None = None,
    *,
    thumbnails: bool | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    backend: str = "auto",
    mixed_precision: str = "auto",
    shard_size: int = 10_000,
    dtype: Literal["float32", "float16"] = "float32",
    strict: bool = False,
    update: bool = False,
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
        backend: What the network runs on: `"torch"`, `"openvino"`, `"onnx"`, or `"auto"`, as `choose_runtime` says.
        mixed_precision: `"no"`, `"fp16"`, `"bf16"`, or `"auto"`.
        shard_size: Images per shard.
        dtype: Number format of the embeddings on disk.
        strict: Whether an image that cannot be read is an error, once all others are embedded.
        update: Whether, where the source has changed, to embed what is new or changed and to remove what has gone.
        force: Whether to drop embeddings that are there.
        progress: Whether to show a bar; `None` for one on a terminal only.
        say: Called with lines for the user, on the main process.

    Raises:
        ValueError: If the source cannot be opened or holds no image that can be read, the folder holds something else
            or is being written to, or with `strict` an image was skipped.
    """
    spec = source if isinstance(source, SourceSpec) else SourceSpec(str(source))
    asked = asked_for(backend, mixed_precision)
    check_launcher(mixed_precision)
    accelerator = start_accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
    is_main = accelerator.is_main_process
    say = say if is_main else lambda text: None
    opened = open_source(spec)
    keeps = opened.dataset is not None if thumbnails is None else thumbnails
    work = Work(encoder, accelerator, keeps, batch_size, num_workers, progress, dtype)
    folder = Path(tempfile.mkdtemp(prefix="udon-embed-") if out is None else out)
    identity = {"model": encoder.fingerprint, **opened.identity}
    identity |= {"thumbnails": work.thumbnails, **asked}
    identity |= {} if dtype == "float32" else {"dtype": dtype}
    left_to_us = {"backend", "mixed_precision"} - asked.keys()
    with ExitStack() as held:
        if is_main:
            make_folder(folder)
            held.enter_context(locked(folder))
        began = time.perf_counter()
        if update and not force and start_or_resume(folder, identity, False, {"content", *left_to_us}):
            shards, num_missing, num_embedded = _update(folder, opened, spec, identity, work, say)
        else:
            with accelerator.main_process_first():
                shards = _prepare(folder, opened, identity, left_to_us, shard_size, force and is_main, work, say)
            began = time.perf_counter()
            num_missing, num_embedded = _embed_all(opened, spec, shards, work, say)
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


def _prepare(
    folder: Path,
    opened: OpenedSource,
    identity: Mapping[str, Any],
    left_to_us: Collection[str],
    shard_size: int,
    force: bool,
    work: Work,
    say: Callable[[str], None],
) -> ShardFolder:
    listing = folder / WORK_FOLDER / LISTING_FILE
    if start_or_resume(folder, identity, force, left_to_us):
        shards = read_manifest(folder)
        listing = folder / WORK_FOLDER / shards.listing
        if work.accelerator.is_main_process:
            opened_parts(shards)  # A damaged one must not count as done.
        if opened.paths is not None and work.accelerator.is_main_process:
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
    _check_any(num_images, opened)
    say(f"{num_images:,} images found")
    shards = ShardFolder(folder, num_images, shard_size)
    runtime = choose_runtime(work.model, identity, work.accelerator.device, num_images, say)
    write_manifest(shards, {**identity, **asdict(runtime)})
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
                "embed all again, or --update to embed these alone."
            )


def _embed_all(
    opened: OpenedSource, spec: SourceSpec, shards: ShardFolder, work: Work, say: Callable[[str], None]
) -> tuple[int, int]:
    """Embeds what is missing; returns how many images were, and how many of them this process embedded."""
    source, num_missing = _source(opened, spec, shards), sum(len(shards.rows(shard)) for shard in shards.missing())
    if num_missing and work.accelerator.is_main_process:
        reads = [read for row in rows_to_look_at(source.num_images) for read in source.readers(row, row + 1)]
        for line in doubts_of_images([partial(_data_of, read) for read in reads]):
            say(f"WARNING: {line}")
    if num_done := shards.num_images - num_missing:
        say(f"{num_done:,} of {shards.num_images:,} images are there already")
    return embed_missing(source, shards, work, as_begun(read_identity(shards.folder)))


def _data_of(read: Read) -> bytes:
    return read().data


def _source(opened: OpenedSource, spec: SourceSpec, shards: ShardFolder) -> ImageSource:
    return opened.dataset or FileSource(
        opened.root,
        shards.folder / WORK_FOLDER / shards.listing,
        shards.num_images,
        shards.shard_size,
        spec.domain,
        spec.domain_from_folder,
        opened.confined,
    )


def _update(
    folder: Path,
    opened: OpenedSource,
    spec: SourceSpec,
    identity: Mapping[str, Any],
    work: Work,
    say: Callable[[str], None],
) -> tuple[ShardFolder, int, int]:
    """Embeds what has changed; returns the folder, how many images that were, and this process's share of them."""
    is_main, before, found = work.accelerator.is_main_process, read_manifest(folder), None
    shards = before.without_lost()
    if num_lost := len(before.parts or ()) - len(shards.parts or ()):
        say(f"{num_lost:,} shards are not there any more; their images are embedded again")
    with work.accelerator.main_process_first():
        if is_main:
            found = _plan(shards, opened, spec, say)
        planned = read_plan(folder)
    now = replace(shards, num_images=planned.num_images, listing=planned.listing)
    source = _source(opened, spec, now)
    rows = planned_rows(planned)
    pending = ShardFolder(planned.folder, len(rows), shards.shard_size)
    runtime = as_begun(read_identity(folder))
    num_missing, num_embedded = embed_missing(SelectedRows(source, rows), pending, work, runtime)
    if found is not None:
        lines = [*found.skipped, *pending.skipped_lines()]
        about = about_embeddings(work.model, source, runtime)
        begun = {**identity, **asdict(runtime)}
        shards = commit(shards, pending, source, found, begun, planned.listing, about)
        write_skipped(folder / SKIPPED_FILE, lines)
    work.accelerator.wait_for_everyone()
    return read_manifest(folder), num_missing, num_embedded


def _plan(shards: ShardFolder, opened: OpenedSource, spec: SourceSpec, say: Callable[[str], None]) -> Changes:
    """Lists the source and writes down which of its images are to be embedded."""
    planned, stats, as_before = start_plan(shards), None, {}
    listing = shards.folder / WORK_FOLDER / planned.listing
    if opened.dataset is not None:
        num_images = opened.dataset.num_images
    else:
        assert opened.paths is not None, "a source has files or is a data set"
        num_images = write_listing(opened.paths(), listing, shards.shard_size, opened.root)
        stats, as_before = read_listing(listing)[1], unreadable_as_before(shards, listing)
    _check_any(num_images, opened)
    source = _source(opened, spec, replace(shards, num_images=num_images, listing=planned.listing))
    found = find_changes(shards, source, stats, as_before)
    write_plan(replace(planned, num_images=num_images), found.to_embed)
    kinds = ("new", "changed", "moved", "removed")
    told = [f"{found.counts[kind]:,} {kind}" for kind in kinds if found.counts[kind]]
    say(f"{num_images:,} images found: {', '.join(told) or 'nothing has changed'}")
    return found


def _check_any(num_images: int, opened: OpenedSource) -> None:
    if num_images == 0:
        raise ValueError(
            f"`source` must hold at least one image. Got {opened.identity['source']!r} with none; for a data set that "
            "is not recognised, name its split."
        )


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
