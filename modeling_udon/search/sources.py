"""Where images to embed come from: folders, list files and data sets, listed and read in slices of bounded size."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk

from modeling_udon.data.demo import build_demo_domain
from modeling_udon.data.domains import DEMO_PREFIX, why_not_opened
from modeling_udon.data.files import lies_in, read_file
from modeling_udon.data.folders import is_image_name, walk_images

Read = Callable[[], bytes]


@dataclass(frozen=True)
class SourceSpec:
    """What to embed.

    Attributes:
        source: A folder, an image, a list file, a Parquet file or folder, a data set on the Hub or disk, `demo:NAME`.
        name: Configuration of a data set.
        split: Split of a data set; `None` for the only one.
        data_revision: Commit, tag or branch of a data set on the Hub.
        image_column: Column of the images; `None` for the only one.
        columns: Columns of a data set to keep.
        domain: Domain of all images.
        domain_from_folder: Whether the first folder below the source names an image's domain.
        allow_outside: Whether a list file may name images outside of its folder.
    """

    source: str
    name: str | None = None
    split: str | None = None
    data_revision: str | None = None
    image_column: str | None = None
    columns: Sequence[str] = ()
    domain: str | None = None
    domain_from_folder: bool = False
    allow_outside: bool = False


class ImageSource(Protocol):
    """Images in a fixed order, of which slices can be described and read."""

    @property
    def num_images(self) -> int:
        """How many there are."""

    @property
    def root(self) -> str:
        """The folder that relative paths start from, absolute; empty where there is none."""

    def describe(self, start: int, stop: int) -> pa.Table:
        """Columns `path`, `row` and those asked for, of images `start` to `stop`."""

    def readers(self, start: int, stop: int) -> list[Read]:
        """For each image a function that reads its bytes; it raises OSError or ValueError where it cannot."""


@dataclass(frozen=True)
class FileSource:
    """Image files, named by a listing that has `shard_size` paths in each row group.

    Attributes:
        root: Folder that the paths start from.
        listing: The listing.
        num_images: How many there are.
        shard_size: Paths of a row group.
        domain: Domain of all images.
        domain_from_folder: Whether the first folder of a path names the domain.
        confined: Whether nothing outside of `root` is read, links followed.
    """

    root: str
    listing: Path
    num_images: int
    shard_size: int
    domain: str | None
    domain_from_folder: bool
    confined: bool = False

    def describe(self, start: int, stop: int) -> pa.Table:
        """See `ImageSource`."""
        paths = self._paths(start, stop)
        table = pa.table({"path": pa.array(paths, pa.string()), "row": pa.array(range(start, stop), pa.int64())})
        if self.domain_from_folder:
            folders = [path.split("/", 1)[0] if "/" in path else "" for path in paths]
            return table.append_column("domain", pa.array(folders, pa.string()))
        return _with_domain(table, self.domain)

    def readers(self, start: int, stop: int) -> list[Read]:
        """See `ImageSource`."""
        root = self.root if self.confined else None
        return [partial(read_file, Path(self.root, path), root) for path in self._paths(start, stop)]

    def _paths(self, start: int, stop: int) -> list[str]:
        shard, first = divmod(start, self.shard_size)
        group = pq.ParquetFile(self.listing).read_row_group(shard, use_threads=False)
        return group["path"].slice(first, stop - start).to_pylist()


@dataclass(frozen=True)
class DatasetSource:
    """Rows of a data set, which is memory-mapped.

    Attributes:
        images: The data set with its column of undecoded images alone.
        kept: The data set with the columns to keep.
        title: What a row is called by that has no path, with its number.
        domain: Domain of all images.
    """

    images: Dataset
    kept: Dataset
    title: str
    domain: str | None
    root: str = ""

    @property
    def num_images(self) -> int:
        """See `ImageSource`."""
        return len(self.images)

    def describe(self, start: int, stop: int) -> pa.Table:
        """See `ImageSource`."""
        column = self.images.with_format("arrow")[start:stop].column(0)  # no image becomes a Python object
        known = pc.struct_field(column, "path").to_pylist()
        paths = [path or f"{self.title}#{row}" for row, path in enumerate(known, start)]
        table = pa.table({"path": pa.array(paths, pa.string()), "row": pa.array(range(start, stop), pa.int64())})
        if self.kept.column_names:
            kept = self.kept.with_format("arrow")[start:stop]
            for name in kept.column_names:
                table = table.append_column(name, kept[name])
        return _with_domain(table, self.domain)

    def readers(self, start: int, stop: int) -> list[Read]:
        """See `ImageSource`."""
        return [_DatasetImage(image).read for image in self.images[start:stop][self.images.column_names[0]]]


@dataclass(frozen=True)
class _DatasetImage:
    image: dict[str, Any] | None

    def read(self) -> bytes:
        if self.image is None or (self.image["bytes"] is None and not self.image["path"]):
            raise ValueError("the row has no image")
        data = self.image["bytes"]
        return data if data is not None else read_file(self.image["path"])


@dataclass(frozen=True)
class OpenedSource:
    """A source before it is listed.

    Attributes:
        identity: What must be the same for a later start to go on with this one, as JSON takes it.
        paths: The image files, for one that is made of files.
        dataset: The data set, for one that is a data set.
        root: Folder that the paths start from.
        confined: Whether nothing outside of `root` may be read.
    """

    identity: dict[str, Any]
    paths: Callable[[], Iterator[str]] | None = None
    dataset: DatasetSource | None = None
    root: str = ""
    confined: bool = False


def open_source(spec: SourceSpec) -> OpenedSource:
    """Finds out what the source is and opens it.

    Raises:
        ValueError: If there is no such source, it holds no such split or column, or an option does not fit its kind.
    """
    path = Path(spec.source)
    is_image_folder = path.is_dir() and not _is_dataset_folder(path) and not _wants_dataset(spec)
    is_file = path.is_file() and path.suffix.lower() != ".parquet"
    if not is_image_folder and not is_file:
        return _open_dataset(spec, path)
    if _wants_dataset(spec):
        raise ValueError(
            f"`source` must be a data set where a split, a column or a revision of one is named. Got {spec.source!r}."
        )
    if spec.domain_from_folder and not is_image_folder:
        raise ValueError(f"`source` must be a folder where the folders in it name the domains. Got {spec.source!r}.")
    identity: dict[str, Any] = {"kind": "files", "source": str(path.resolve()), "domain": spec.domain}
    identity["domain_from_folder"] = spec.domain_from_folder
    if is_image_folder:
        return OpenedSource(identity, lambda: walk_images(path), root=str(path.resolve()))
    root = str(path.resolve().parent)
    if is_image_name(path):
        return OpenedSource(identity, lambda: iter([path.name]), root=root)
    with path.open("rb") as file:
        identity["digest"] = hashlib.file_digest(file, "sha256").hexdigest()
    identity["allow_outside"] = spec.allow_outside
    inside = None if spec.allow_outside else root
    return OpenedSource(identity, lambda: read_list(path, inside), root=root, confined=not spec.allow_outside)


def read_list(file: Path, root: str | None = None) -> Iterator[str]:
    """The lines of a text file that are not empty.

    Args:
        file: The file.
        root: Folder that all paths must lie in; `None` for anywhere.

    Raises:
        ValueError: If the file is not text in UTF-8, or a path leads out of `root`.
    """
    with file.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if path := line.rstrip("\r\n"):
                    if root is not None and not lies_in(path, root):
                        raise ValueError(
                            f"`source` must name images in its own folder, {root!r}. Got {path!r} in line {number}; "
                            "give --allow-outside to read it."
                        )
                    yield path
        except UnicodeDecodeError as error:
            raise ValueError(
                f"`source` must be a folder, an image, a Parquet file, or a text file in UTF-8 with a path a line. "
                f"Got {str(file)!r}."
            ) from error


def write_listing(paths: Iterator[str], listing: Path, shard_size: int) -> int:
    """Writes the paths to a Parquet file with `shard_size` of them a row group; returns how many there are.

    A path that is not valid Unicode is kept in an escaped form, under which no file will be found.
    """
    schema, num_paths = pa.schema([("path", pa.string())]), 0
    with pq.ParquetWriter(listing, schema) as writer:
        while block := list(islice(paths, shard_size)):
            readable = [path.encode("utf-8", "backslashreplace").decode() for path in block]
            writer.write_table(pa.table({"path": readable}, schema), row_group_size=shard_size)
            num_paths += len(block)
    return num_paths


def _is_dataset_folder(path: Path) -> bool:
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return saved or next(path.glob("*.parquet"), None) is not None


def _wants_dataset(spec: SourceSpec) -> bool:
    return any((spec.name, spec.split, spec.data_revision, spec.image_column, spec.columns))


def _open_dataset(spec: SourceSpec, path: Path) -> OpenedSource:
    if spec.domain_from_folder:
        raise ValueError(f"`source` must be a folder of images where folders name the domains. Got {spec.source!r}.")
    dataset = _load(spec, path)
    image_column = _image_column(spec, dataset)
    for column in spec.columns:
        if column not in dataset.column_names or column in (image_column, "path", "row", "embedding", "thumbnail"):
            others = [name for name in dataset.column_names if name != image_column]
            raise ValueError(f"`columns` must be among {', '.join(others) or 'none'} of the data set. Got {column!r}.")
    if spec.domain is not None and "domain" in spec.columns:
        raise ValueError(f"`domain` must be left out where `columns` has the domain. Got {spec.domain!r}.")
    images = dataset.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    title = "/".join(part for part in (spec.source, spec.name, spec.split) if part)
    source = DatasetSource(images, dataset.select_columns(list(spec.columns)), title, spec.domain)
    identity = {
        "kind": "data set",
        "source": str(path.resolve()) if path.exists() else spec.source,
        **{field: getattr(spec, field) for field in ("name", "split", "data_revision", "domain")},
        "image_column": image_column,
        "columns": list(spec.columns),
        "digest": _digest(source),
    }
    return OpenedSource(identity, dataset=source)


def _load(spec: SourceSpec, path: Path) -> Dataset:
    looks_like_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.source) is not None
    if not path.exists() and not spec.source.startswith(DEMO_PREFIX) and not looks_like_hub:
        raise ValueError(f"`source` must exist, or be a data set on the Hub, as in owner/name. Got {spec.source!r}.")
    try:
        if spec.source.startswith(DEMO_PREFIX):
            found = build_demo_domain(spec.source.removeprefix(DEMO_PREFIX))
        elif path.is_file():
            found = load_dataset("parquet", data_files=str(path))
        elif any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            found = load_from_disk(str(path))
        else:
            found = load_dataset(spec.source, spec.name, revision=spec.data_revision)
    except Exception as error:  # See `why_not_opened`.
        raise ValueError(
            f"`source` must be files or a data set that opens. Got {spec.source!r}: {why_not_opened(error)}"
        ) from error
    return _split(spec, found)


def _split(spec: SourceSpec, found: Dataset | DatasetDict) -> Dataset:
    if isinstance(found, Dataset):
        if spec.split is not None:
            raise ValueError(f"`split` must be left out for a data set without splits. Got {spec.split!r}.")
        return found
    if spec.split is None and len(found) == 1:
        return next(iter(found.values()))
    if spec.split not in found:
        raise ValueError(f"`split` must be one of {', '.join(found)}. Got {spec.split!r}.")
    return found[spec.split]


def _image_column(spec: SourceSpec, dataset: Dataset) -> str:
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    column = spec.image_column or (images[0] if len(images) == 1 else "image")
    if column not in dataset.column_names:
        raise ValueError(
            f"`image_column` must be a column of the data set: {', '.join(dataset.column_names)}. Got {column!r}."
        )
    with suppress(TypeError, ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        dataset.select(range(min(len(dataset), 1))).cast_column(column, Image(decode=False))
        return column
    raise ValueError(f"`image_column` must hold images. Got {column!r}, which holds {dataset.features[column]}.")


def _digest(source: DatasetSource) -> str:
    """Of the number of rows and a sample of the images: enough to see that the data is another."""
    digest = hashlib.sha256(str(source.num_images).encode())
    for row in np.linspace(0, source.num_images - 1, num=min(source.num_images, 16), dtype=int):
        with suppress(OSError, ValueError):
            digest.update(source.readers(int(row), int(row) + 1)[0]())
    return digest.hexdigest()[:16]


def _with_domain(table: pa.Table, domain: str | None) -> pa.Table:
    if domain is None:
        return table
    return table.append_column("domain", pa.array([domain] * len(table), pa.string()))
