"""`udon embed --update`: only what changed is embedded; rows that went are tombstones.

An image is known by the digest of its bytes, so one that moved, or whose time alone changed, is not embedded again, nor
one that an update embedded that was killed. Nothing that the manifest names changes before the manifest is replaced.
"""

import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_udon.search.embed_loop import with_facts
from modeling_udon.search.file_source import read_listing
from modeling_udon.search.loading import Facts
from modeling_udon.search.shards import (
    SKIPPED_FILE,
    WORK_FOLDER,
    Part,
    ShardFolder,
    opened_parts,
    write_manifest,
    write_part,
    write_removed,
)
from modeling_udon.search.source_spec import ImageSource, box_key
from modeling_udon.search.update_plan import PENDING_FOLDER, SelectedRows
from modeling_udon.search.vectors import damage_of_embeddings, embedding_table
from modeling_udon.storage import sync
from modeling_udon.text import table_cell

_BLOCK = 20_000
_NUM_READERS = 8
# Columns that do not tell whether a row is the same: where it stands in its source, and what follows from the others.
_NOT_COMPARED = ("row", "embedding", "thumbnail")
# A shard with more removed rows than this share is written again.
_MOST_REMOVED = 0.5

Place = tuple[Path, int]


@dataclass
class Changes:
    """What an update finds.

    Attributes:
        to_embed: Images of the source that are to be embedded.
        reused: Images whose embedding is known, with their facts and where it is.
        removed: For each shard's name the places of rows that have gone.
        counts: How many images are new, changed, moved, touched and removed.
        skipped: Lines of the log of unreadable images that are as they were.
        kinds: For each of the reused images why it is there.
    """

    to_embed: list[int] = field(default_factory=list)
    reused: list[tuple[int, Facts, Place]] = field(default_factory=list)
    removed: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)


@dataclass
class _Known:
    """What the shards hold: rows that are there by their content, and where the embedding of each image is."""

    live: dict[bytes, list[Place]] = field(default_factory=lambda: defaultdict(list))
    facts: dict[str, Facts] = field(default_factory=dict)
    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)
    rewritten: set[str] = field(default_factory=set)


def find_changes(
    shards: ShardFolder, source: ImageSource, stats: Sequence[tuple[int, int]] | None, as_before: Mapping[str, str]
) -> Changes:
    """Compares a source with what is embedded of it.

    Args:
        shards: The folder.
        source: The source as it is now.
        stats: For each image the size and time of its file; `None` for a data set, whose images are all read.
        as_before: Paths of unreadable images whose files are as they were, with their lines of the log.
    """
    parts, _, _ = opened_parts(shards)
    known, found = _read_known(shards, parts), Changes()
    for start in range(0, source.num_images, _BLOCK):
        stop = min(start + _BLOCK, source.num_images)
        table = source.describe(start, stop)
        paths = table["path"].to_pylist()
        read = _Reading(source, start, paths, None if stats is None else stats[start:stop], known, as_before)
        with ThreadPoolExecutor(_NUM_READERS) as pool:
            facts = list(pool.map(read, range(stop - start)))
        boxes = [box_key(box) for box in source.boxes(start, stop)]
        keys = _keys(with_facts(table, [fact or ("", 0, 0) for fact in facts]))
        for row, (path, fact, box, key) in enumerate(zip(paths, facts, boxes, keys, strict=True), start):
            if path in as_before:
                found.skipped.append(as_before[path])
            elif fact is not None and known.live.get(key):
                known.live[key].pop()
            elif fact is not None and (fact[0], box) in known.places:
                place = known.places[fact[0], box]
                found.reused.append((row, fact, place))
                found.kinds.append(_kind(path, fact, known))
            else:
                found.to_embed.append(row)
                found.counts["changed" if path in known.facts else "new"] += 1
    _remove(known, found)
    return found


def commit(
    shards: ShardFolder,
    pending: ShardFolder,
    source: ImageSource,
    found: Changes,
    identity: Mapping[str, Any],
    listing: str,
    about: Mapping[str, Any],
) -> ShardFolder:
    """Puts new shards beside the old ones and replaces the manifest; returns the folder as it is now.

    Args:
        shards: The folder.
        pending: What was embedded now.
        source: The source as it is now.
        found: The changes.
        identity: See `write_manifest`.
        listing: File of the source's listing.
        about: What new shards say of themselves.
    """
    parts = opened_parts(shards)[0]
    removed = {part.path.name: np.union1d(part.deleted, found.removed.get(part.path.name, [])) for part in parts}
    kept = [part for part in parts if len(removed[part.path.name]) < part.num_rows]
    names, number = [part.path.name for part in kept], _next_number(shards)
    found.reused.sort()
    for start in range(0, len(found.reused), shards.shard_size):
        table = _reused_table(source, found.reused[start : start + shards.shard_size])
        embeds = table.column("embedding").combine_chunks().flatten().to_numpy().reshape(-1, about["dim"])
        file = shards.folder / f"part-{number:05d}.parquet"
        write_part(file, embedding_table(table.drop_columns(["embedding"]), embeds, about), shards.shard_size)
        names.append(file.name)
        number += 1
    for shard in range(pending.num_shards):
        if pq.read_metadata(pending.part(shard)).num_rows:
            file = shards.folder / f"part-{number:05d}.parquet"
            pending.part(shard).rename(file)
            names.append(file.name)
            number += 1
    left = {part.path.name: removed[part.path.name].astype(np.int64) for part in kept}
    deleted = f"deleted-{listing.removeprefix('listing-').removesuffix('.arrow')}.arrow"
    write_removed(shards.folder / WORK_FOLDER / deleted, left)
    sync(shards.folder)
    updated = replace(shards, num_images=source.num_images, parts=names, deleted=deleted, listing=listing)
    write_manifest(updated, identity)
    _clean(updated)
    return updated


def unreadable_as_before(shards: ShardFolder, listing: Path) -> dict[str, str]:
    """Lines of the log for images whose files are as they were, by their paths.

    Args:
        shards: The folder.
        listing: The listing of the files as they are now.
    """
    log, before = shards.folder / SKIPPED_FILE, shards.folder / WORK_FOLDER / shards.listing
    if not log.is_file() or not before.is_file():
        return {}
    lines = {line.partition("\t")[0]: line for line in log.read_text(encoding="utf-8").splitlines()}
    then = dict(zip(*read_listing(before), strict=True))
    return {
        path: lines[table_cell(path)]
        for path, stat in zip(*read_listing(listing), strict=True)
        if table_cell(path) in lines and then.get(path) == stat
    }


def _read_known(shards: ShardFolder, parts: Sequence[Part]) -> _Known:
    known = _Known()
    work = shards.folder / WORK_FOLDER
    removed = {part.path: set(part.deleted.tolist()) for part in parts}
    # What an update that was killed has embedded, is known too.
    others = [*work.glob(f"{PENDING_FOLDER}-*/part-*.parquet"), *shards.folder.glob("part-*.parquet")]
    for path in [part.path for part in parts] + [path for path in others if path not in removed]:
        gone, start = removed.get(path), 0
        rewritten = gone is not None and len(gone) > _MOST_REMOVED * pq.read_metadata(path).num_rows
        with damage_of_embeddings(path):
            columns = [name for name in pq.read_schema(path).names if name not in _NOT_COMPARED]
            for batch in pq.ParquetFile(path).iter_batches(batch_size=_BLOCK, columns=columns):
                _learn(known, path, pa.Table.from_batches([batch]), start, gone, rewritten)
                start += len(batch)
    return known


def _learn(known: _Known, path: Path, table: pa.Table, start: int, gone: set[int] | None, rewritten: bool) -> None:
    """Learns the rows of a shard, of which those in `gone` were removed; `None` for a shard that no manifest names."""
    columns = table.select(["path", "sha256", "num_bytes", "mtime"]).to_pylist()
    boxes = table["box"].to_pylist() if "box" in table.column_names else [None] * len(table)
    for place, (row, box, key) in enumerate(zip(columns, boxes, _keys(table), strict=True), start):
        facts = row["sha256"], row["num_bytes"], row["mtime"]
        known.sizes.add(row["num_bytes"])
        is_live, image = gone is not None and place not in gone, (row["sha256"], box_key(box))
        if is_live or image not in known.places:
            known.places[image] = path, place
        if is_live:
            known.live[b"rewritten" + key if rewritten else key].append((path, place))
            known.facts[row["path"]] = facts
            if rewritten:
                known.rewritten.add(row["path"])


def _keys(table: pa.Table) -> list[bytes]:
    """For each row a digest of its columns."""
    names = sorted(name for name in table.column_names if name not in _NOT_COMPARED)
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    return [hashlib.blake2b(repr((names, row)).encode(), digest_size=16).digest() for row in rows]


@dataclass(frozen=True)
class _Reading:
    """Finds out what is known of the bytes of some images.

    `None` stands for those that are new by their size, cannot be read, or are as unreadable as before.
    """

    source: ImageSource
    start: int
    paths: Sequence[str]
    stats: Sequence[tuple[int, int]] | None
    known: _Known
    as_before: Mapping[str, str]

    def __call__(self, number: int) -> Facts | None:
        path, row = self.paths[number], self.start + number
        if path in self.as_before:
            return None
        if self.stats is not None:
            size, mtime = self.stats[number]
            before = self.known.facts.get(path)
            if before is not None and before[1:] == (size, mtime):
                return before
            if size not in self.known.sizes:
                return None
        try:
            data, mtime_now = self.source.readers(row, row + 1)[0]()
        except (OSError, ValueError):
            return None
        return hashlib.sha256(data).hexdigest(), len(data), mtime_now


def _kind(path: str, facts: Facts, known: _Known) -> str:
    before = known.facts.get(path)
    if before is None:
        return "copied"
    if path in known.rewritten:
        return "rewritten"
    return "touched" if before[0] == facts[0] else "changed"


def _remove(known: _Known, found: Changes) -> None:
    """Counts the rows that are left as removed, but for those that came to be elsewhere."""
    gone = {place for places in known.live.values() for place in places}
    for path, number in gone:
        found.removed[path.name].append(number)
    for (_, _, place), kind in zip(found.reused, found.kinds, strict=True):
        is_moved = kind == "copied" and place in gone
        gone.discard(place)
        found.counts["moved" if is_moved else "new" if kind == "copied" else kind] += 1
    num_gone = sum(map(len, found.removed.values()))
    elsewhere = sum(found.counts[kind] for kind in ("changed", "touched", "moved", "rewritten"))
    found.counts["removed"] = max(num_gone - elsewhere, 0)


def _reused_table(source: ImageSource, reused: Sequence[tuple[int, Facts, Place]]) -> pa.Table:
    """Rows whose embeddings and thumbnails are taken from where they are."""
    chosen = SelectedRows(source, np.array([row for row, _, _ in reused]))
    table = with_facts(chosen.describe(0, len(reused)), [facts for _, facts, _ in reused])
    by_file: dict[Path, list[int]] = defaultdict(list)
    for number, (_, _, (path, _)) in enumerate(reused):
        by_file[path].append(number)
    pieces, order = [], []
    for path, numbers in by_file.items():
        with damage_of_embeddings(path):
            names = [name for name in ("embedding", "thumbnail") if name in pq.read_schema(path).names]
            whole = pq.read_table(path, columns=names)
        pieces.append(whole.take(pa.array([reused[number][2][1] for number in numbers])).replace_schema_metadata(None))
        order += numbers
    kept = pa.concat_tables(pieces).take(pa.array(np.argsort(order)))
    for name in reversed(kept.column_names):
        table = table.append_column(name, kept[name])
    return table


def _next_number(shards: ShardFolder) -> int:
    """The first number that no shard has, nor one that a first start has still to write."""
    least = shards.num_shards if shards.parts is None else 0
    return max([least, *(int(path.stem.removeprefix("part-")) + 1 for path in shards.folder.glob("part-*.parquet"))])


def _clean(shards: ShardFolder) -> None:
    """Removes what no manifest names any more."""
    assert shards.parts is not None, "an update names its shards"
    named = set(shards.parts)
    for path in shards.folder.glob("part-*.parquet"):
        if path.name not in named:
            path.unlink()
    work = shards.folder / WORK_FOLDER
    for path in [*work.glob("listing*.arrow"), *work.glob("deleted-*.arrow"), *work.glob("skipped-*.tsv")]:
        if path.name not in (shards.listing, shards.deleted):
            path.unlink()
    for path in work.glob(f"{PENDING_FOLDER}-*"):
        shutil.rmtree(path)
