"""Images of sharded Parquet, on a disk or on the Hub, read by the row group as they are drawn.

Only footers and the column of labels are read when a domain opens. A row group that is drawn from goes once into a
small store on this machine's disk, where all workers and processes map it: images cross the network once per epoch
and machine, not once per worker, and no process holds them in its own memory.
"""

import fcntl
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, load_dataset_builder
from datasets import config as datasets_config
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfFileSystem

from modeling_udon.data.arrays import check_image_type, image_storage, is_array_type

# Bytes of images in one row group, beyond which reading one image would cost too much.
MAX_GROUP_BYTES = 256 * 2**20

_HUB = "hf://"
_NUM_THREADS = 16
_STORE = "udon-row-groups"


class RowGroupError(ValueError):
    """Row groups that single images cannot be read from; its message says what they must be."""


@dataclass(frozen=True, eq=False)
class ParquetSplit:
    """Parquet files of one split and where their row groups lie; no image is read for it.

    Attributes:
        files: Paths, or addresses on the Hub.
        features: Columns as `datasets` knows them.
        group_files: Position in `files` of each row group, int32.
        group_numbers: Its number in its file, int32.
        group_sizes: Its number of rows, int64.
        group_bytes: Bytes of each column in it, by the column's name, int64.
    """

    files: tuple[str, ...]
    features: Features
    group_files: np.ndarray
    group_numbers: np.ndarray
    group_sizes: np.ndarray
    group_bytes: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return int(self.group_sizes.sum())

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        return list(self.features)

    def read_column(self, name: str) -> pa.ChunkedArray:
        """Reads one column of all rows."""
        tables = of_all(lambda file: read_parquet(file, lambda parquet: parquet.read(columns=[name])), self.files)
        return pa.concat_tables(tables)[name]


@dataclass(frozen=True, eq=False)
class _Footer:
    """What a file says of itself: columns, rows of each row group, and bytes of each column in it."""

    schema: pa.Schema
    sizes: np.ndarray
    bytes: Mapping[str, np.ndarray]


class ParquetImages:
    """Undecoded images by row, as a `Dataset` with the column `image` gives them.

    Args:
        split: Where they lie.
        column: Column of the images.
        window: Rows that are drawn from at a time; the store keeps those of two windows.

    Raises:
        RowGroupError: If a row group is too large to be read for one image.
        ValueError: If the column holds no images.
    """

    def __init__(self, split: ParquetSplit, column: str, window: int) -> None:
        kind = split.features.arrow_schema.field(column).type
        if not is_array_type(kind):
            check_image_type(kind)
            Image().cast_storage(pa.array([], kind))
        self.group_sizes = split.group_sizes
        self._split, self._column = split, column
        self._check_group_bytes()
        self._ends = np.cumsum(split.group_sizes)
        self._num_kept = 2 + int(np.ceil(2 * window / split.group_sizes.mean()))
        self._folder = Path(datasets_config.HF_DATASETS_CACHE) / _STORE / self.digest(with_times=True)
        self._open: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._rows: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> "ParquetImages":
        """Takes some images, as `Dataset.select` does."""
        chosen = copy(self)
        chosen._rows = np.arange(len(self))[rows] if self._rows is None else self._rows[rows]
        return chosen

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._rows is None else len(self._rows)

    def __getitem__(self, key: int | slice | Sequence[int]) -> dict[str, Any]:
        if isinstance(key, int):
            return {"image": self[[key]]["image"][0]}
        rows = np.arange(len(self))[key] if self._rows is None else self._rows[key]
        groups = np.searchsorted(self._ends, rows, side="right")
        places = rows - (self._ends - self.group_sizes)[groups]
        images: list[Any] = [None] * len(rows)
        # Workers begin at different groups, so that they fetch those of a new window side by side.
        for group in np.roll(np.unique(groups), -os.getpid()):
            column = self._group(int(group))
            for position in np.flatnonzero(groups == group):
                images[position] = column[int(places[position])].as_py()
        return {"image": images}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def digest(self, with_times: bool = False) -> str:
        """Tells these images from others by the sizes of their row groups, and by when local files were written."""
        digest = hashlib.sha256(self._split.group_bytes[self._column].tobytes() + self.group_sizes.tobytes())
        if with_times:
            times = [0 if file.startswith(_HUB) else Path(file).stat().st_mtime_ns for file in self._split.files]
            digest.update(repr((self._split.files, times, self._column)).encode())
        return digest.hexdigest()[:32]

    def _check_group_bytes(self) -> None:
        sizes = self._split.group_bytes[self._column]
        largest = int(np.argmax(sizes))
        if sizes[largest] > MAX_GROUP_BYTES:
            raise RowGroupError(
                f"row groups of at most {MAX_GROUP_BYTES // 2**20} MiB of images. Got "
                f"{sizes[largest] / 2**20:.0f} MiB in {self._split.files[self._split.group_files[largest]]}; write the "
                "files again with row groups of about 100 images, as `udon prepare` does, or leave `streaming` out."
            )

    def _group(self, group: int) -> pa.ChunkedArray:
        """A row group's images, mapped from the store."""
        path = self._folder / f"{group:08d}.arrow"
        while group not in self._open:
            try:
                self._open[group] = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]
            except FileNotFoundError:
                self._store(group, path)
        self._open.move_to_end(group)
        if len(self._open) > self._num_kept:
            self._open.popitem(last=False)
        return self._open[group]

    def _store(self, group: int, path: Path) -> None:
        """Reads a row group into the store, once for all processes and atomically."""
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".part")
        with open(draft, "r+b", opener=_create) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # While we waited, another process may have stored it: then this file is no longer the draft.
            if not _is_at(file, draft):
                return
            # Or between our look for it and our draft: then the draft is a new one, and nobody else's.
            if path.exists():
                draft.unlink()
                return
            file.truncate(0)
            source = self._split.files[self._split.group_files[group]]
            number = int(self._split.group_numbers[group])
            table = read_parquet(source, lambda parquet: parquet.read_row_group(number, columns=[self._column]))
            images = image_storage(table[self._column].combine_chunks())
            with pa.ipc.new_file(file, pa.schema({"image": images.type})) as writer:
                writer.write_table(pa.table({"image": images}))
            file.flush()
            draft.rename(path)
        self._make_room()

    def _make_room(self) -> None:
        """Removes the oldest row groups; who has mapped them keeps them."""
        ages = []
        for path in self._folder.glob("*.arrow"):
            with suppress(FileNotFoundError):
                ages.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(ages)[: -self._num_kept]:
            path.unlink(missing_ok=True)


def open_parquet_splits(
    path: str, name: str | None, revision: str | None, data_dir: str | None, data_files: Any
) -> dict[str, ParquetSplit]:
    """Finds the Parquet files of a data set as `datasets` does and reads their footers.

    Raises:
        ValueError: If it is not a data set of Parquet files.
    """
    builder = load_dataset_builder(path, name=name, revision=revision, data_dir=data_dir, data_files=data_files)
    if not isinstance(builder, Parquet):
        raise ValueError(f"a data set that is streamed must consist of Parquet files, not of {builder.name}")
    return {
        str(split): _open_split([str(file) for file in files]) for split, files in builder.config.data_files.items()
    }


def _open_split(files: Sequence[str]) -> ParquetSplit:
    footers = of_all(lambda file: read_parquet(file, _read_footer), files)
    schema, features = footers[0].schema, Features.from_arrow_schema(footers[0].schema)
    for file, footer in zip(files, footers, strict=True):
        _check_columns(file, footer.schema, files[0], schema)
    sizes = np.concatenate([footer.sizes for footer in footers])
    if not sizes.sum():
        raise ValueError(f"{files[0]} and its like hold no rows")
    return ParquetSplit(
        files=tuple(files),
        features=features,
        group_files=np.repeat(np.arange(len(files), dtype=np.int32), [len(footer.sizes) for footer in footers]),
        group_numbers=np.concatenate([np.arange(len(footer.sizes), dtype=np.int32) for footer in footers]),
        group_sizes=sizes,
        group_bytes={column: np.concatenate([footer.bytes[column] for footer in footers]) for column in features},
    )


def _check_columns(file: str, schema: pa.Schema, first: str, expected: pa.Schema) -> None:
    """Refuses a file that has a column twice, or others or of other types than the first."""
    if len(set(schema.names)) < len(schema.names):
        raise ValueError(f"{file} must have each column once. Got {', '.join(schema.names)}")
    for name in (*expected.names, *schema.names):
        kinds = [one.field(name).type if name in one.names else None for one in (expected, schema)]
        # Parts of an image may be of no type where a file has none of them.
        if None in kinds or (kinds[0] != kinds[1] and not any(map(pa.types.is_nested, kinds))):
            found, wanted = (kind or "none" for kind in kinds[::-1])
            raise ValueError(f"{file} must have the columns of {first}: {wanted} in {name!r}. Got {found}")


def _read_footer(parquet: pq.ParquetFile) -> _Footer:
    schema, metadata = parquet.schema_arrow, parquet.metadata
    sizes = np.zeros(metadata.num_row_groups, dtype=np.int64)
    num_bytes = {column: np.zeros_like(sizes) for column in schema.names}
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        sizes[number] = group.num_rows
        for leaf in range(group.num_columns):
            column = group.column(leaf)
            # A struct has a leaf for each of its fields; a name may hold dots itself.
            name = column.path_in_schema
            name = name if name in num_bytes else name.partition(".")[0]
            if name in num_bytes:
                num_bytes[name][number] += column.total_uncompressed_size
    return _Footer(schema, sizes, num_bytes)


def read_parquet(file: str, read: Callable[[pq.ParquetFile], Any]) -> Any:
    """Opens a Parquet file, local or on the Hub, for one reading."""
    if not file.startswith(_HUB):
        with pq.ParquetFile(file) as parquet:
            return read(parquet)
    # Ranges exactly as asked for: read ahead, a label would bring five megabytes of images with it.
    with HfFileSystem().open(file, "rb", cache_type="none") as remote, pq.ParquetFile(remote) as parquet:
        return read(parquet)


def of_all(function: Callable[[str], Any], files: Sequence[str]) -> list[Any]:
    """Applies it to all files; side by side where each waits for the network, which takes memory for each."""
    if not files[0].startswith(_HUB):
        return [function(file) for file in files]
    with ThreadPoolExecutor(min(_NUM_THREADS, len(files))) as pool:
        return list(pool.map(function, files))


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o644)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
