"""Images of a source read, decoded and hashed in worker processes, in order and in slices of a batch."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from modeling_udon.data.images import decode_image, num_cores, use_one_thread
from modeling_udon.data.transforms import ImageTransform, cut_box
from modeling_udon.search.shards import ShardFolder
from modeling_udon.search.source_spec import ImageSource
from modeling_udon.search.thumbnails import make_thumbnail

Slice = tuple[int, int]
# The SHA-256 of an image's bytes, their number, and when its file was changed.
Facts = tuple[str, int, int | None]


@dataclass(frozen=True)
class DecodedImages:
    """A slice of the source, decoded.

    Attributes:
        rows: Rows of the images that could be decoded.
        pixels: Those, of shape `(num_rows, height, width, 3)`, uint8.
        facts: For each of those the SHA-256 of its bytes, their number, and when the file was changed.
        thumbnails: JPEGs of those, or empty.
        errors: For each other row the reason.
        stop: End of the slice.
    """

    rows: list[int]
    pixels: torch.Tensor | None
    facts: list[Facts]
    thumbnails: list[bytes]
    errors: dict[int, str]
    stop: int

    def pin_memory(self) -> "DecodedImages":
        """Returns the slice in page-locked memory; the DataLoader calls it where a GPU is used."""
        pixels = None if self.pixels is None else self.pixels.pin_memory()
        return replace(self, pixels=pixels)


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
        good, pixels, facts, thumbnails, errors = [], [], [], [], {}
        reads = zip(self._source.readers(start, stop), self._source.boxes(start, stop), strict=True)
        for row, (read, box) in enumerate(reads, start):
            try:
                data, mtime = read()
                image = decode_image(data) if box is None else cut_box(decode_image(data), box)
                pixels.append(torch.from_numpy(self._transform(image)))
            except (ValueError, OSError) as error:
                errors[row] = str(error)
                continue
            good.append(row)
            facts.append((hashlib.sha256(data).hexdigest(), len(data), mtime))
            if self._thumbnails:
                thumbnails.append(make_thumbnail(image))
        return DecodedImages(good, torch.stack(pixels) if pixels else None, facts, thumbnails, errors, stop)


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


def make_loader(
    source: ImageSource,
    transform: ImageTransform,
    slices: Sampler[Slice] | Sequence[Slice],
    accelerator: Accelerator,
    num_workers: int | None = None,
    thumbnails: bool = False,
) -> DataLoader[DecodedImages]:
    """Decodes slices of the source in worker processes, in order; see `embed` for `num_workers`."""
    if num_workers is None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        num_workers = max(num_cores() // local - 1, 1)
    return DataLoader(
        DecodedSlices(source, transform, thumbnails),
        batch_size=None,
        sampler=slices,
        num_workers=num_workers,
        worker_init_fn=use_one_thread,
        pin_memory=accelerator.device.type == "cuda",
        prefetch_factor=4 if num_workers else None,
    )
