"""`udon embed`: the images of a source through a model, into shards that a second start goes on with."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from modeling_udon.data.images import decode_image, use_one_thread
from modeling_udon.data.transforms import ImageTransform
from modeling_udon.encoder import Encoder
from modeling_udon.search.shards import (
    LISTING_FILE,
    SKIPPED_FILE,
    WORK_FOLDER,
    ShardFolder,
    embedding_table,
    read_manifest,
    start_or_resume,
    write_manifest,
)
from modeling_udon.search.sources import (
    FileSource,
    ImageSource,
    OpenedSource,
    SourceSpec,
    open_source,
    write_listing,
)
from modeling_udon.search.thumbnails import make_thumbnail

# Processes finish at different times, and one alone lists the files.
_PATIENCE = timedelta(days=7)
_NUM_SHOWN = 5

Slice = tuple[int, int]


@dataclass(frozen=True)
class EmbedOptions:
    """How to embed.

    Attributes:
        thumbnails: Whether to keep a JPEG of at most 160 pixels a side beside each embedding.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode, for each process with a model; `None`: the cores shared out, less one.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`.
        shard_size: Images a shard.
    """

    thumbnails: bool = False
    batch_size: int = 64
    num_workers: int | None = None
    mixed_precision: str = "no"
    shard_size: int = 10_000


@dataclass(frozen=True)
class EmbedSummary:
    """What was done.

    Attributes:
        num_images: Images of the source.
        num_embedded: Images that this process embedded now.
        skipped: A line for each image left out, path and reason with a tab between.
        seconds: How long it took.
    """

    num_images: int
    num_embedded: int
    skipped: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class DecodedImages:
    """A slice of the source, decoded.

    Attributes:
        rows: Rows of the images that could be decoded.
        pixels: Those, of shape `(num_rows, height, width, 3)`, uint8.
        thumbnails: JPEGs of those, or empty.
        errors: For each other row the reason.
        stop: End of the slice.
    """

    rows: list[int]
    pixels: torch.Tensor | None
    thumbnails: list[bytes]
    errors: dict[int, str]
    stop: int

    def pin_memory(self) -> "DecodedImages":
        """Returns the slice in page-locked memory; the DataLoader calls it where a GPU is used."""
        pixels = None if self.pixels is None else self.pixels.pin_memory()
        return DecodedImages(self.rows, pixels, self.thumbnails, self.errors, self.stop)


class DecodedSlices(TorchDataset[DecodedImages]):
    """Slices of a source, decoded in the workers.

    Args:
        source: The images.
        transform: Turns a decoded image into one of the model's size.
        thumbnails: Whether to make them.
    """

    def __init__(self, source: ImageSource, transform: ImageTransform, thumbnails: bool = False) -> None:
        self._source = source
        self._transform = transform
        self._thumbnails = thumbnails

    def __getitem__(self, rows: Slice) -> DecodedImages:
        start, stop = rows
        good, pixels, thumbnails, errors = [], [], [], {}
        for row, read in enumerate(self._source.readers(start, stop), start):
            try:
                image = decode_image(read())
                pixels.append(torch.from_numpy(self._transform(image)))
            except (ValueError, OSError) as error:
                errors[row] = str(error)
                continue
            good.append(row)
            if self._thumbnails:
                thumbnails.append(make_thumbnail(image))
        return DecodedImages(good, torch.stack(pixels) if pixels else None, thumbnails, errors, stop)


class ShardSlices(Sampler[Slice]):
    """The rows of some shards in slices of a batch; no slice reaches into the next shard."""

    def __init__(self, shards: ShardFolder, chosen: Sequence[int], batch_size: int) -> None:
        self._shards = shards
        self._chosen = chosen
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Slice]:
        for shard in self._chosen:
            rows = self._shards.rows(shard)
            for start in range(rows.start, rows.stop, self._batch_size):
                yield start, min(start + self._batch_size, rows.stop)

    def __len__(self) -> int:
        return sum(-(-len(self._shards.rows(shard)) // self._batch_size) for shard in self._chosen)


@dataclass
class _Shard:
    """What is known of the shard in work; embeddings stay on the device until it is whole."""

    rows: list[int] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


def embed_source(
    spec: SourceSpec,
    model: Encoder,
    out: str | os.PathLike[str],
    options: EmbedOptions,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> EmbedSummary:
    """Embeds all images of a source; each process of `accelerate launch` takes its share of the shards.

    Args:
        spec: What to embed.
        model: The model.
        out: Folder of the embeddings. If it holds a part of the same work, that is completed.
        options: How to embed.
        force: Whether to drop embeddings that are there and start anew.
        say: Called with lines for the user, on the main process.

    Raises:
        ValueError: If the source cannot be opened or holds no image, or the folder holds something else.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)]
    )
    say = say if accelerator.is_main_process else lambda text: None
    opened = open_source(spec)
    with accelerator.main_process_first():
        shards = _prepare(Path(out), opened, model, options, force and accelerator.is_main_process, say)
    source = opened.dataset or FileSource(
        opened.root,
        shards.folder / WORK_FOLDER / LISTING_FILE,
        shards.num_images,
        shards.shard_size,
        spec.domain,
        spec.domain_from_folder,
        opened.confined,
    )
    missing = shards.missing()
    accelerator.wait_for_everyone()  # before a shard appears that another process would not find missing
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    num_done = shards.num_images - sum(len(shards.rows(shard)) for shard in missing)
    if num_done:
        say(f"{num_done:,} of {shards.num_images:,} images are there already")
    began = time.perf_counter()
    num_embedded = _embed_shards(source, model, shards, mine, options, accelerator)
    accelerator.wait_for_everyone()
    skipped = shards.collect_skipped() if accelerator.is_main_process else []
    summary = EmbedSummary(shards.num_images, num_embedded, skipped, time.perf_counter() - began)
    _report(summary, sum(len(shards.rows(shard)) for shard in missing), shards.folder, say)
    return summary


def _prepare(
    folder: Path,
    opened: OpenedSource,
    model: Encoder,
    options: EmbedOptions,
    force: bool,
    say: Callable[[str], None],
) -> ShardFolder:
    identity = {"model": model.fingerprint, **opened.identity, "thumbnails": options.thumbnails}
    if start_or_resume(folder, identity, force):
        return read_manifest(folder)
    if opened.dataset is not None:
        num_images = opened.dataset.num_images
    else:
        assert opened.paths is not None, "a source has files or is a data set"
        num_images = write_listing(opened.paths(), folder / WORK_FOLDER / LISTING_FILE, options.shard_size)
    if num_images == 0:
        raise ValueError(
            f"`source` must hold at least one image. Got {opened.identity['source']!r} with none; for a data set that "
            "is not recognised, name its split."
        )
    say(f"{num_images:,} images found")
    shards = ShardFolder(folder, num_images, options.shard_size)
    write_manifest(shards, identity)
    return shards


@torch.inference_mode()
def _embed_shards(
    source: ImageSource,
    model: Encoder,
    shards: ShardFolder,
    mine: Sequence[int],
    options: EmbedOptions,
    accelerator: Accelerator,
) -> int:
    """Embeds and writes some shards, one after the other; returns the number of images."""
    model.network.to(accelerator.device)
    about = {"model": model.name, "fingerprint": model.fingerprint, "dim": model.dim, "root": source.root}
    loader = make_loader(source, model.transform, ShardSlices(shards, mine, options.batch_size), options, accelerator)
    remaining, shard, num_embedded = iter(mine), _Shard(), 0
    number = next(remaining, -1)
    with tqdm(
        total=sum(len(shards.rows(shard)) for shard in mine),
        unit=" images",
        unit_scale=accelerator.num_processes,
        disable=None if accelerator.is_main_process else True,
        smoothing=0.1,
    ) as bar:
        for images in loader:
            if images.pixels is not None:
                with accelerator.autocast():
                    shard.embeds.append(model(images.pixels.to(accelerator.device, non_blocking=True)))
            shard.rows += images.rows
            shard.thumbnails += images.thumbnails
            shard.errors |= images.errors
            bar.update(len(images.rows) + len(images.errors))
            if images.stop == shards.rows(number).stop:
                _write(source, shards, number, shard, about, options.thumbnails)
                num_embedded += len(shard.rows)
                shard, number = _Shard(), next(remaining, -1)
    return num_embedded


def make_loader(
    source: ImageSource,
    transform: ImageTransform,
    slices: Sampler[Slice],
    options: EmbedOptions,
    accelerator: Accelerator,
) -> DataLoader[DecodedImages]:
    """Decodes slices of the source in worker processes, in order."""
    num_workers = options.num_workers
    if num_workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_workers = max(len(os.sched_getaffinity(0)) // local - 1, 1)
    return DataLoader(
        DecodedSlices(source, transform, options.thumbnails),
        batch_size=None,
        sampler=slices,
        num_workers=num_workers,
        worker_init_fn=use_one_thread,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )


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
    if thumbnails:
        table = table.append_column("thumbnail", pa.array(shard.thumbnails, pa.binary()))
    embeds = torch.cat(shard.embeds).cpu().numpy() if shard.embeds else np.empty((0, about["dim"]), dtype=np.float32)
    shards.write(number, embedding_table(table, embeds, about), skipped)


def _report(summary: EmbedSummary, num_new: int, folder: Path, say: Callable[[str], None]) -> None:
    if num_new:
        rate = num_new / summary.seconds
        say(f"{num_new:,} images in {summary.seconds:.1f} s ({rate:,.0f} images/s), embeddings in {folder}")
    else:
        say(f"nothing left to do, embeddings in {folder}")
    if summary.skipped:
        say(f"{len(summary.skipped):,} images skipped, named in {folder / SKIPPED_FILE}:")
        for line in summary.skipped[:_NUM_SHOWN]:
            say("  " + line.replace("\t", ": "))
        if len(summary.skipped) > _NUM_SHOWN:
            say(f"  and {len(summary.skipped) - _NUM_SHOWN:,} more")
