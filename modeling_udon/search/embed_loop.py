"""Loop of `udon embed`: images of a source through a model, a shard at a time, by each process its own shards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from tqdm import tqdm

from modeling_udon.encoder import Encoder
from modeling_udon.search.letterbox import is_letterboxed
from modeling_udon.search.loading import Facts, ShardSlices, make_loader
from modeling_udon.search.runtimes import Runtime, open_runner
from modeling_udon.search.shards import ShardFolder
from modeling_udon.search.source_spec import ImageSource
from modeling_udon.search.vectors import check_finite, embedding_table

# 128 bits of the SHA-256 of an image's bytes; exact copies share an id.
_ID_DIGITS = 32


@dataclass(frozen=True)
class Work:
    """How to embed: see `embed`."""

    model: Encoder
    accelerator: Accelerator
    thumbnails: bool
    batch_size: int
    num_workers: int | None
    progress: bool | None
    dtype: str


@dataclass
class _Shard:
    """What is known of the shard in work; embeddings stay on the device until it is whole."""

    rows: list[int] = field(default_factory=list)
    embeds: list[torch.Tensor] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


def embed_missing(source: ImageSource, shards: ShardFolder, work: Work, runtime: Runtime) -> tuple[int, int]:
    """Embeds this process's share of the missing shards; returns how many images were missing, and its own share."""
    accelerator, missing = work.accelerator, shards.missing()
    accelerator.wait_for_everyone()  # before a shard appears that another process would not find missing
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    num_embedded = _embed_shards(source, shards, mine, work, runtime) if mine else 0
    accelerator.wait_for_everyone()
    return sum(len(shards.rows(shard)) for shard in missing), num_embedded


def with_facts(table: pa.Table, facts: Sequence[Facts]) -> pa.Table:
    """The columns of a source's rows with what is known of their bytes: `sha256`, `num_bytes`, `mtime` and `id`."""
    digests = pa.array([digest for digest, _, _ in facts], pa.string())
    ids = pc.utf8_slice_codeunits(digests, 0, _ID_DIGITS)
    if "id" in table.column_names:
        named = pc.coalesce(table["id"], pa.chunked_array([ids]))
        table = table.set_column(table.column_names.index("id"), "id", named)
    else:
        table = table.append_column("id", ids)
    table = table.append_column("sha256", digests)
    table = table.append_column("num_bytes", pa.array([size for _, size, _ in facts], pa.int64()))
    return table.append_column("mtime", pa.array([mtime for _, _, mtime in facts], pa.int64()))


def about_embeddings(model: Encoder, source: ImageSource, runtime: Runtime) -> dict[str, Any]:
    """What a shard says of itself."""
    about: dict[str, Any] = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "dim": model.dim,
        "root": source.root,
    }
    about |= {"pooling": model.pooling, **asdict(runtime)}
    return about | ({"letterbox": True} if is_letterboxed(model) else {})


@torch.inference_mode()
def _embed_shards(source: ImageSource, shards: ShardFolder, mine: Sequence[int], work: Work, runtime: Runtime) -> int:
    """Embeds and writes some shards, one after the other; returns the number of images."""
    model, accelerator = work.model, work.accelerator
    about = about_embeddings(model, source, runtime)
    slices = ShardSlices(shards, mine, work.batch_size)
    # Its processes start before the threads of a graph do, and decode while that is compiled.
    batches = iter(make_loader(source, model.transform, slices, accelerator, work.num_workers, work.thumbnails))
    run = open_runner(model, runtime, accelerator.device, work.batch_size)
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
        for images in batches:
            if images.pixels is not None:
                shard.embeds.append(run(images.pixels))
            shard.rows += images.rows
            shard.facts += images.facts
            shard.thumbnails += images.thumbnails
            shard.errors |= images.errors
            bar.update(len(images.rows) + len(images.errors))
            if images.stop == shards.rows(number).stop:
                _write(source, shards, number, shard, work, about)
                num_embedded += len(shard.rows)
                shard, number = _Shard(), next(remaining, -1)
    return num_embedded


def _write(
    source: ImageSource, shards: ShardFolder, number: int, shard: _Shard, work: Work, about: Mapping[str, Any]
) -> None:
    rows = shards.rows(number)
    table = source.describe(rows.start, rows.stop)
    paths = table["path"]
    skipped = [(paths[row - rows.start].as_py(), reason) for row, reason in shard.errors.items()]
    table = with_facts(table.take(pa.array([row - rows.start for row in shard.rows], pa.int64())), shard.facts)
    if work.thumbnails:
        table = table.append_column("thumbnail", pa.array(shard.thumbnails, pa.binary()))
    embeds = np.empty((0, work.model.dim), np.float32)
    if shard.embeds:
        embeds = torch.cat(shard.embeds).cpu().numpy()
    check_finite(embeds, table["path"].to_pylist())
    shards.write(number, embedding_table(table, embeds.astype(work.dtype), about), skipped)
