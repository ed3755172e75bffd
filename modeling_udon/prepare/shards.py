"""Image files become a domain on disk: Parquet shards that `datasets` opens, images kept as encoded bytes.

Every image is decoded once on the way, so that what training cannot read is found and named here. Shards are written
atomically, and one that is there is not written again unless images were left out of it or have changed: a stopped
preparation goes on where it was, and files that were mended meanwhile come in.
"""

import hashlib
import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features, Image, Value
from datasets import Sequence as ListOf

from modeling_udon.data.files import as_on_disk, lies_in, read_file
from modeling_udon.data.images import decode_image, use_one_thread
from modeling_udon.storage import read_json, replaced_file
from modeling_udon.text import as_unicode, printable, table_cell

Label = int | str | Sequence[int | str]
Read = Callable[[str], bytes]

_PLAN_FILE = "prepare.json"
_UNREADABLE, _SHORTER_SIDES, _CONTENTS = b"udon.unreadable", b"udon.shorter_sides", b"udon.contents"
_ROW_GROUP_SIZE = 100
_JPEG_QUALITY = 95
# If none of so many can be read, they are looked for in the wrong place.
_NUM_PROBED = 100
# What a plan's entries are to the user.
_PLAN_ENTRIES = {"pictures": "other pictures", "size": "another --size", "shard_size": "another --shard-size"}


@dataclass(frozen=True)
class Picture:
    """An image file and what it shows.

    Attributes:
        path: Where the file lies below the folder of images, or the row of a data set; kept beside the image.
        label: Its class; several for a query.
        content: Digest of its bytes, or what else changes with them; a shard is written again where it has changed.
    """

    path: str
    label: Label
    content: str = ""


@dataclass(frozen=True)
class FolderReader:
    """Reads pictures below a folder.

    Attributes:
        folder: The folder.
        confined: Whether nothing outside of it is read, links followed.
    """

    folder: Path
    confined: bool = False

    def __call__(self, path: str) -> bytes:
        """Gives a file's bytes."""
        return read_file(path, self.folder) if self.confined else read_file(self.folder / path)

    def stamp(self, path: str) -> str:
        """Size and time of change of a file, which is not read; empty if it is not there."""
        try:
            status = os.stat(as_on_disk(self.folder / path))
        except (OSError, ValueError):
            return ""
        return f"{status.st_size} {status.st_mtime_ns}"


@dataclass(frozen=True)
class SplitSummary:
    """What became of one split.

    Attributes:
        name: The split.
        num_images: Images written.
        class_sizes: Images of each class, largest first.
        shorter_sides: Least, median and greatest shorter side in pixels, before any shrinking.
        unreadable: Path and reason of each image left out.
    """

    name: str
    num_images: int
    class_sizes: list[int]
    shorter_sides: tuple[int, int, int]
    unreadable: list[tuple[str, str]]


def check_paths(pictures: Iterable[Picture], folder: Path) -> None:
    """Refuses a manifest that names pictures outside of their folder.

    Raises:
        ValueError: If a path leads out of it.
    """
    for picture in pictures:
        if not lies_in(picture.path, folder):
            raise ValueError(
                f"SOURCE must name pictures in {folder}. Got {picture.path!r}; give --allow-outside to read it."
            )


def write_domain(
    splits: Mapping[str, Sequence[Picture]],
    read: Read,
    folder: Path,
    *,
    size: int | None = None,
    shard_size: int = 5000,
    num_workers: int = 0,
    advance: Callable[[int], object] = lambda num_images: None,
) -> list[SplitSummary]:
    """Writes a domain, or what is missing of it.

    Args:
        splits: Pictures by split, such as `"train"`, `"validation"`, `"test"`, `"index"`.
        read: Gives the bytes of a picture by its path; processes get copies of it.
        folder: Where the domain goes: `SPLIT-00000.parquet`, ... and a `README.md` that names the splits.
        size: Shorter side in pixels to which larger images are shrunk and encoded again; `None` keeps the files' bytes.
        shard_size: Images of a shard.
        num_workers: Processes that decode; 0 for this one.
        advance: Called with the number of images done since the last call.

    Raises:
        ValueError: If nothing of a split can be read, or `folder` holds something else, or a domain prepared from
            other pictures or in another way.
    """
    for split, pictures in splits.items():
        _probe(split, pictures[:_NUM_PROBED], read)
    _claim(folder, splits, size, shard_size)
    jobs = [
        (folder / f"{split}-{number:05d}.parquet", list(pictures[start : start + shard_size]))
        for split, pictures in splits.items()
        for number, start in enumerate(range(0, len(pictures), shard_size))
    ]
    schema = _schema(any(isinstance(p.label, list) for ps in splits.values() for p in ps), _label_type(splits))
    done = {path for path, pictures in jobs if _is_done(path, pictures)}
    missing = [(path, pictures, read, size, schema) for path, pictures in jobs if path not in done]
    advance(sum(len(pictures) for path, pictures in jobs if path in done))
    for num_images in _run(missing, num_workers):
        advance(num_images)
    _write_readme(folder, list(splits))
    return [_summarise(split, [path for path, _ in jobs if path.stem.rpartition("-")[0] == split]) for split in splits]


def format_summary(name: str, summaries: Sequence[SplitSummary]) -> str:
    """A line for each split, and a few of the files that could not be read."""
    lines = [
        f"{name}: {'split':<12}{'images':>9}{'classes':>9}{'images per class':>20}{'with one':>10}{'shorter side':>18}"
    ]
    for summary in summaries:
        sizes = summary.class_sizes
        span = f"{sizes[-1]} / {statistics.median(sizes):g} / {sizes[0]}" if sizes else "-"
        sides = " / ".join(map(str, summary.shorter_sides))
        lines.append(
            " " * (len(name) + 2)
            + f"{summary.name:<12}{summary.num_images:>9,}{len(sizes):>9,}{span:>20}{sizes.count(1):>10,}{sides:>18}"
        )
    unreadable = [(summary.name, *found) for summary in summaries for found in summary.unreadable]
    for split, path, reason in unreadable[:5]:
        lines.append(f"  left out of {split}: {printable(path)}: {printable(reason)}")
    if len(unreadable) > 5:
        lines.append(f"  and {len(unreadable) - 5} more, see unreadable.txt")
    return "\n".join(lines)


def write_unreadable(folder: Path, summaries: Iterable[SplitSummary]) -> Path | None:
    """Lists what was left out in `unreadable.txt`, a line each: split, path, reason."""
    lines = [f"{s.name}\t{table_cell(path)}\t{printable(reason)}\n" for s in summaries for path, reason in s.unreadable]
    path = folder / "unreadable.txt"
    if not lines:
        path.unlink(missing_ok=True)
        return None
    path.write_text("".join(lines), encoding="utf-8")
    return path


def domain_spec(splits: Sequence[str], folder: Path) -> dict[str, Any]:
    """What a config says of a prepared domain with these splits."""
    spec: dict[str, Any] = {"path": str(folder)}
    for split in ("validation", "test"):
        if split not in splits:
            spec[f"{split}_split"] = None
    # The original searches the Met's validation in its small index, the training images of fewer exhibits.
    for split, index in (("validation", "small_index"), ("test", "index")):
        if split in splits and index in splits:
            spec[f"{split}_index_split"] = index
    return spec


def _probe(split: str, pictures: Sequence[Picture], read: Read) -> None:
    reasons = []
    for picture in pictures:
        try:
            read(picture.path)
            return
        except (OSError, ValueError) as error:
            reasons.append(f"{printable(picture.path)}: {' '.join(str(error).split())}")
    if reasons:
        raise ValueError(
            f"--images must be the folder that the pictures' paths start from. Got one with none of the first "
            f"{len(reasons)} of {split}, such as {reasons[0]}."
        )


def _claim(folder: Path, splits: Mapping[str, Sequence[Picture]], size: int | None, shard_size: int) -> None:
    """Writes down what is being prepared, or compares with what was."""
    digest = hashlib.sha256()
    for split, pictures in splits.items():
        digest.update(json.dumps([split, [(p.path, p.label) for p in pictures]]).encode())
    plan = {"pictures": digest.hexdigest(), "size": size, "shard_size": shard_size}
    path = folder / _PLAN_FILE
    if path.is_file():
        before = read_json(path)
        changed = [_PLAN_ENTRIES[key] for key in plan if before.get(key) != plan[key]]
        if changed:
            raise ValueError(
                f"--out must be new or hold what is being prepared. Got {folder}, prepared with "
                f"{' and '.join(changed)}; give another --out, or remove it."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out must be a new folder for each domain. Got {folder}, which holds other files.")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan), encoding="utf-8")


def _is_done(shard: Path, pictures: Sequence[Picture]) -> bool:
    """Whether a shard is there, whole, of the same bytes as now, and without images that were left out of it."""
    try:
        found = pq.read_metadata(shard).metadata or {}
    except (OSError, pa.ArrowException):
        return False
    return found.get(_CONTENTS) == _contents(pictures) and found.get(_UNREADABLE) == b"[]"


def _contents(pictures: Sequence[Picture]) -> bytes:
    return hashlib.sha256("\n".join(picture.content for picture in pictures).encode()).hexdigest().encode()


def _label_type(splits: Mapping[str, Sequence[Picture]]) -> str:
    for pictures in splits.values():
        for picture in pictures:
            label = picture.label[0] if isinstance(picture.label, list) and picture.label else picture.label
            if isinstance(label, str):
                return "string"
    return "int64"


def _schema(lists: bool, label_type: str) -> pa.Schema:
    label = Value(label_type)
    # One type for all splits of a data set: where a query has several classes, every label is a list.
    return Features(
        {"image": Image(), "label": ListOf(label) if lists else label, "path": Value("string")}
    ).arrow_schema


def _run(jobs: Sequence[tuple[Any, ...]], num_workers: int) -> Iterator[int]:
    if num_workers == 0:
        yield from (_write_shard(job) for job in jobs)
        return
    with ProcessPoolExecutor(num_workers, initializer=use_one_thread) as pool:
        yield from pool.map(_write_shard, jobs)


def _write_shard(job: tuple[Path, list[Picture], Read, int | None, pa.Schema]) -> int:
    path, pictures, read, size, schema = job
    rows: list[dict[str, Any]] = []
    unreadable: list[tuple[str, str]] = []
    sides: list[int] = []
    lists = pa.types.is_list(schema.field("label").type)
    with replaced_file(path) as draft, pq.ParquetWriter(draft, schema) as writer:
        for picture in pictures:
            try:
                data, side = _shrink(read(picture.path), size)
            except (OSError, ValueError) as error:
                unreadable.append((picture.path, " ".join(str(error).split())))
                continue
            label = [picture.label] if lists and not isinstance(picture.label, list) else picture.label
            shown = as_unicode(picture.path)
            rows.append({"image": {"bytes": data, "path": Path(shown).name}, "label": label, "path": shown})
            sides.append(side)
            # Small row groups, so that neither a writer nor a reader of a few rows holds a shard of photographs.
            if len(rows) == _ROW_GROUP_SIZE:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        facts = {_UNREADABLE: json.dumps(unreadable), _SHORTER_SIDES: json.dumps(sides), _CONTENTS: _contents(pictures)}
        writer.add_key_value_metadata(facts)
    return len(pictures)


def _shrink(data: bytes, size: int | None) -> tuple[bytes, int]:
    """The image's bytes, shrunk if asked for, and its shorter side before."""
    pixels = decode_image(data)
    side = min(pixels.shape[:2])
    if size is None or side <= size:
        return data, side
    factor = size / side
    shape = (max(size, round(pixels.shape[1] * factor)), max(size, round(pixels.shape[0] * factor)))
    shrunk = cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA)
    form, flags = (".jpg", [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]) if data[:2] == b"\xff\xd8" else (".png", [])
    return cv2.imencode(form, cv2.cvtColor(shrunk, cv2.COLOR_RGB2BGR), flags)[1].tobytes(), side


def _found_by(shard: Path, what: bytes) -> list[Any]:
    found: list[Any] = json.loads(pq.read_metadata(shard).metadata[what])
    return found


def _write_readme(folder: Path, splits: Sequence[str]) -> None:
    files = [{"split": split, "path": f"{split}-*.parquet"} for split in splits]
    header = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]}, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{header}---\n", encoding="utf-8")


def _summarise(split: str, shards: Sequence[Path]) -> SplitSummary:
    counts: Counter[int | str] = Counter()
    unreadable: list[tuple[str, str]] = []
    sides: list[int] = []
    num_images = 0
    for shard in shards:
        labels = pq.read_table(shard, columns=["label"])["label"].to_pylist()
        num_images += len(labels)
        for label in labels:
            counts.update(label if isinstance(label, list) else [label])
        unreadable += [(path, reason) for path, reason in _found_by(shard, _UNREADABLE)]
        sides += _found_by(shard, _SHORTER_SIDES)
    span = (min(sides), round(statistics.median(sides)), max(sides)) if sides else (0, 0, 0)
    return SplitSummary(split, num_images, sorted(counts.values(), reverse=True), span, unreadable)
