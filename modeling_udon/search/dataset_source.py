"""Data sets as a source of images: opened with `datasets`, memory-mapped, with the columns that are kept."""

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Image, concatenate_datasets, load_from_disk

from modeling_udon.data.arrays import check_image_type
from modeling_udon.data.demo import build_demo_domain
from modeling_udon.data.image_paths import is_path_type, paths_from
from modeling_udon.data.label_columns import as_files_say
from modeling_udon.data.opening import DEMO_PREFIX, OpenedData, open_data, why_not_opened
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.search.file_source import read_image_file
from modeling_udon.search.source_spec import Box, Read, ReadImage, SourceSpec, with_domain

# Columns that `udon embed` writes itself. A column `id` of the data set takes the place of ours.
OWN_COLUMNS = ("path", "row", "sha256", "num_bytes", "mtime", "embedding", "thumbnail")
# Up to here all images are hashed to see whether they are the same; beyond, their sizes and a sample of them.
_HASHED_BYTES = 2**28
_NUM_HASHED = 256


@dataclass(frozen=True)
class DatasetSource:
    """Rows of a data set, which is memory-mapped.

    Attributes:
        images: The data set with its column of undecoded images alone.
        kept: The data set with the columns to keep.
        title: What a row is called by that has no path, with its number.
        domain: Domain of all images.
        named: The data set with the columns of ids and boxes alone, where there are such.
        id_column: The column of ids.
        box_column: The column of boxes.
    """

    images: Dataset
    kept: Dataset
    title: str
    domain: str | None
    named: Dataset | None = None
    id_column: str | None = None
    box_column: str | None = None
    root: str = ""

    @property
    def num_images(self) -> int:
        """See `ImageSource`."""
        return len(self.images)

    def describe(self, start: int, stop: int) -> pa.Table:
        """See `ImageSource`."""
        column = self.images.with_format("arrow")[start:stop].column(0)  # no image becomes a Python object
        known = pc.struct_field(column, "path").to_pylist()
        inside = pc.is_valid(pc.struct_field(column, "bytes")).to_pylist()
        # A path without bytes is relative to the current folder, which may be another later.
        paths = [
            f"{self.title}#{row}" if not path else path if is_inside else os.path.abspath(path)
            for row, (path, is_inside) in enumerate(zip(known, inside, strict=True), start)
        ]
        table = pa.table({"path": pa.array(paths, pa.string()), "row": pa.array(range(start, stop), pa.int64())})
        if self.kept.column_names:
            kept = self.kept.with_format("arrow")[start:stop]
            for name in kept.column_names:
                table = table.append_column(name, _kept_column(name, kept[name], self.kept.features[name]))
        if self.id_column is not None:
            ids = _kept_column("id", self._named(self.id_column, start, stop), None)
            table = table.append_column("id", ids.cast(pa.string()))
        if self.box_column is not None and "box" not in table.column_names:
            boxes = [None if box is None else list(box) for box in self.boxes(start, stop)]
            table = table.append_column("box", pa.array(boxes, pa.list_(pa.float64())))
        return with_domain(table, self.domain)

    def boxes(self, start: int, stop: int) -> list[Box | None]:
        """See `ImageSource`."""
        if self.box_column is None:
            return [None] * (stop - start)
        return [_box(value, self.box_column) for value in self._named(self.box_column, start, stop).to_pylist()]

    def _named(self, column: str, start: int, stop: int) -> pa.ChunkedArray:
        assert self.named is not None, "a column of ids or boxes is kept"
        return self.named.with_format("arrow")[start:stop][column]

    def readers(self, start: int, stop: int) -> list[Read]:
        """See `ImageSource`."""
        return [_DatasetImage(image).read for image in self.images[start:stop][self.images.column_names[0]]]


@dataclass(frozen=True)
class _DatasetImage:
    image: dict[str, Any] | None

    def read(self) -> ReadImage:
        if self.image is None or (self.image["bytes"] is None and not self.image["path"]):
            raise ValueError("the row has no image")
        data = self.image["bytes"]
        return ReadImage(data, None) if data is not None else read_image_file(self.image["path"])


def open_dataset(spec: SourceSpec, path: Path) -> tuple[DatasetSource, dict[str, Any]]:
    """Opens a data set; returns it with what must be the same for a later start to go on with it.

    Raises:
        ValueError: If it cannot be opened, or has no such split or column.
    """
    if spec.domain_from_folder:
        raise ValueError(f"`source` must be a folder of images where folders name the domains. Got {spec.source!r}.")
    dataset, opened = _load(spec, path)
    image_column = _image_column(spec, dataset)
    for column in spec.columns:
        if column not in dataset.column_names or column in (image_column, *OWN_COLUMNS):
            others = [name for name in dataset.column_names if name not in (image_column, *OWN_COLUMNS)]
            raise ValueError(f"`columns` must be among {', '.join(others) or 'none'} of the data set. Got {column!r}.")
    if spec.domain is not None and "domain" in spec.columns:
        raise ValueError(f"`domain` must be left out where `columns` has the domain. Got {spec.domain!r}.")
    files = () if opened is None else opened.files.get(spec.split or next(iter(opened.splits)), ())
    images = _undecoded(dataset, image_column, files)
    title = "/".join(part for part in (spec.source, spec.name, spec.split) if part)
    named = _named_columns(spec, dataset, image_column)
    kept = _columns_to_keep(spec, dataset, opened, image_column, files)
    source = DatasetSource(images, kept, title, spec.domain, named, spec.id_column, spec.box_column)
    _check_types(source.describe(0, min(len(images), 1)))
    identity = {
        "kind": "data set",
        "source": str(path.resolve()) if path.exists() else spec.source,
        **{field: getattr(spec, field) for field in ("name", "split", "data_revision", "domain")},
        "image_column": image_column,
        "columns": list(spec.columns),
        "content": _digest(source),
    }
    for key in ("id_column", "box_column"):
        if getattr(spec, key) is not None:
            identity[key] = getattr(spec, key)
    return source, identity


def _named_columns(spec: SourceSpec, dataset: Dataset, image_column: str) -> Dataset | None:
    names = [name for name in (spec.id_column, spec.box_column) if name is not None]
    for option, name in (("id_column", spec.id_column), ("box_column", spec.box_column)):
        others = [column for column in dataset.column_names if column != image_column]
        if name is not None and name not in others:
            raise ValueError(f"`{option}` must be among {', '.join(others) or 'none'} of the data set. Got {name!r}.")
    if spec.id_column is not None and "id" in spec.columns:
        raise ValueError(f"`id_column` must be left out where `columns` has the id. Got {spec.id_column!r}.")
    if spec.box_column not in (None, "box") and "box" in spec.columns:
        raise ValueError("`columns` must not have 'box', as which the column of boxes is kept. Got it; leave it out.")
    return dataset.select_columns(list(dict.fromkeys(names))) if names else None


def _box(value: Any, column: str) -> Box | None:
    """One box of a row: left, top, width, height."""
    if value is None:
        return None
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(
            f"`box_column` must hold four numbers in each row: left, top, width, height. Got {value!r} in {column!r}."
        )
    left, top, width, height = map(float, numbers)
    return left, top, width, height


def _undecoded(dataset: Dataset, column: str, files: Sequence[str]) -> Dataset:
    """The column of images alone, as undecoded ones."""
    images = dataset.select_columns([column])
    if is_path_type(images.features.arrow_schema.field(column).type):
        images = paths_from(images, files)
    return images.cast_column(column, Image(decode=False))


def _columns_to_keep(
    spec: SourceSpec, dataset: Dataset, opened: OpenedData | None, image_column: str, files: Sequence[str]
) -> Dataset:
    """The columns that were asked for, with classes as each file names them."""
    kept = dataset.select_columns(list(spec.columns))
    if opened is None:
        return kept
    for column in spec.columns:
        of_column = DomainSpec(path=spec.source, image_column=image_column, label_column=column)
        values = as_files_say(of_column, dataset, files, opened.metadata_tables)
        if values is not None:
            named = values if isinstance(values, list) else values.to_pylist()
            written = Dataset.from_dict({column: named})
            others = kept.remove_columns(column)
            kept = concatenate_datasets([others, written], axis=1) if others.column_names else written
    return kept


def is_dataset_folder(path: Path) -> bool:
    """Whether a folder is one of `save_to_disk` or of Parquet files."""
    return _is_saved(path) or next(path.glob("*.parquet"), None) is not None


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _load(spec: SourceSpec, path: Path) -> tuple[Dataset, OpenedData | None]:
    """The split, and the data set as it was opened where that was read from files."""
    looks_like_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec.source) is not None
    if not path.exists() and not spec.source.startswith(DEMO_PREFIX) and not looks_like_hub:
        raise ValueError(f"`source` must exist, or be a data set on the Hub, as in owner/name. Got {spec.source!r}.")
    opened = None
    try:
        if spec.source.startswith(DEMO_PREFIX):
            found = build_demo_domain(spec.source.removeprefix(DEMO_PREFIX))
        elif _is_saved(path):
            found = load_from_disk(str(path))
        else:
            opened = open_data(_where(spec, path), labels=spec.columns)
            found = opened.splits
    except Exception as error:  # See `why_not_opened`.
        raise ValueError(
            f"`source` must be files or a data set that opens. Got {spec.source!r}: {why_not_opened(error)}"
        ) from error
    return _split(spec, found), opened


def _where(spec: SourceSpec, path: Path) -> DomainSpec:
    if path.is_file():
        return DomainSpec(path=str(path))
    return DomainSpec(path=spec.source, name=spec.name, revision=spec.data_revision)


def _split(spec: SourceSpec, found: Any) -> Dataset:
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
        check_image_type(dataset.features.arrow_schema.field(column).type)
        dataset.select(range(min(len(dataset), 1))).cast_column(column, Image(decode=False))
        return column
    raise ValueError(f"`image_column` must hold images. Got {column!r}, which holds {dataset.features[column]}.")


def _kept_column(name: str, column: pa.ChunkedArray, feature: Any) -> pa.ChunkedArray:
    """A column as it is kept: class names for their numbers, plain storage for extension types, domains as text."""
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if _has_classes(feature):
        column = pa.chunked_array([pa.array([_named(value, feature) for value in column.to_pylist()])])
        if pa.types.is_null(column.type):
            column = column.cast(pa.string())
    if name in ("domain", "id") and not pa.types.is_string(column.type):
        try:
            return column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(f"`columns` must hold one text or number in {name!r}. Got {column.type}.") from error
    return column


def _has_classes(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_has_classes, feature.values()))
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return isinstance(feature, ClassLabel) or (inner is not None and _has_classes(inner))


def _named(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, ClassLabel):
        return feature.names[value] if 0 <= value < len(feature.names) else None
    if isinstance(feature, dict):
        return {name: _named(value[name], part) for name, part in feature.items()}
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    return value if inner is None else [_named(part, inner) for part in value]


def _check_types(table: pa.Table) -> None:
    for name in table.column_names:
        try:
            pq.write_table(table.select([name]), pa.BufferOutputStream())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"`columns` must be of types that Parquet holds. Got {name!r} of {table.schema.field(name).type}; "
                "leave it out."
            ) from error


def _digest(source: DatasetSource) -> str:
    """Of the kept columns and the images, all of them or, where they are large, their sizes and a sample."""
    digest, total = hashlib.sha256(str(source.num_images).encode()), 0
    column = source.images.column_names[0]
    for start in range(0, source.num_images, 10_000):
        stop = min(start + 10_000, source.num_images)
        images = source.images.with_format("arrow")[start:stop][column]
        sizes = pc.binary_length(pc.struct_field(images, "bytes"))
        total += pc.sum(sizes).as_py() or 0
        for values in (sizes, pc.struct_field(images, "path")):
            _update(digest, pa.table({"x": values}))
        for others in (source.kept, source.named):
            if others is not None and others.column_names:
                _update(digest, others.with_format("arrow")[start:stop])
    num_hashed = source.num_images if total <= _HASHED_BYTES else min(source.num_images, _NUM_HASHED)
    for row in np.linspace(0, source.num_images - 1, num=num_hashed, dtype=int):
        with suppress(OSError, ValueError):
            digest.update(source.readers(int(row), int(row) + 1)[0]().data)
    return digest.hexdigest()[:16]


def _update(digest: Any, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.combine_chunks().replace_schema_metadata(None))
    digest.update(sink.getvalue())
