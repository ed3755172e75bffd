"""Columns of labels as files have them: class names of each file, text that a CSV reader took for numbers."""

import csv
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image

from modeling_udon.data.class_folders import class_name
from modeling_udon.data.labels import Label, Labels
from modeling_udon.data.opening import is_plain_number
from modeling_udon.data.streaming import ParquetSplit, of_all, read_parquet
from modeling_udon.domain_spec import DomainSpec


def read_labels(
    name: str, spec: DomainSpec, rows: Dataset | ParquetSplit, files: Sequence[str] = (), tables: Sequence[str] = ()
) -> Labels:
    """Reads the classes of a split.

    Args:
        name: The domain's name.
        spec: Its specification.
        rows: The split.
        files: The files that its rows come from, in their order; each may number its class names in its own way.
        tables: Files `metadata.csv` of all splits of the data set.

    Raises:
        ValueError: If a class is missing, unknown to its ClassLabel, or of no supported type.
    """
    return _read_labels(name, spec, rows, files, tables).renamed(_composed)


def as_files_say(
    spec: DomainSpec, rows: Dataset, files: Sequence[str], tables: Sequence[str]
) -> pa.ChunkedArray | list[str] | None:
    """A column of classes where its files say something else than `datasets` made of it; `None` where they agree.

    Args:
        spec: Names the image column and, as `label_column`, the column.
        rows: The split.
        files: As in `read_labels`.
        tables: As in `read_labels`.

    Raises:
        ValueError: If files number their classes differently, and some do not name them.
    """
    text = _text_labels(spec, tables, rows)
    if text is not None and "" not in text:
        return text
    feature = rows.features[spec.label_column]
    feature = getattr(feature, "feature", feature)
    if not isinstance(feature, ClassLabel):
        return None
    column = _plain(rows.select_columns([spec.label_column]).with_format("arrow")[:][spec.label_column])
    return _named_by_file("SOURCE", spec, column, files, feature.names)


def _composed(label: Label) -> Label:
    return class_name(label) if isinstance(label, str) else label


def _read_labels(
    name: str, spec: DomainSpec, rows: Dataset | ParquetSplit, files: Sequence[str], tables: Sequence[str]
) -> Labels:
    column: pa.ChunkedArray
    text = _text_labels(spec, tables, rows)
    if text is not None:
        column = pa.chunked_array([pa.array(text, pa.string())])
    elif isinstance(rows, ParquetSplit):
        column = rows.read_column(spec.label_column)
    else:
        column = rows.select_columns([spec.label_column]).with_format("arrow")[:][spec.label_column]
    column = _plain(column)
    value_type = column.type.value_type if pa.types.is_list(column.type) else column.type
    if not (pa.types.is_integer(value_type) or pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
        raise ValueError(
            f"`domains.{name}.label_column` must hold integers, ClassLabel or strings. "
            f"Got {value_type} in {spec.label_column!r}; name another column, or write the classes as text."
        )
    missing = _rows_without(column)
    if len(missing):
        rows_named = ", ".join(map(str, missing[:5].tolist())) + (" ..." if len(missing) > 5 else "")
        raise ValueError(
            f"`domains.{name}.label_column` must hold a label for every image. "
            f"Got {len(missing)} empty ones in {spec.label_column!r}, rows {rows_named}."
        )
    feature: Any = None if text is not None else rows.features[spec.label_column]
    if feature is not None and pa.types.is_list(column.type):
        feature = feature.feature
    named = _named_by_file(name, spec, column, files, feature.names) if isinstance(feature, ClassLabel) else None
    if named is not None:
        return Labels.from_arrow(named)

    def name_of(number: int) -> str:
        if not 0 <= number < feature.num_classes:
            raise ValueError(
                f"`domains.{name}.label_column` must hold classes of its ClassLabel, 0 to {feature.num_classes - 1}. "
                f"Got {number} in {spec.label_column!r}."
            )
        return str(feature.int2str(number))

    labels = Labels.from_arrow(column, name_of if isinstance(feature, ClassLabel) else None)
    del column
    pa.default_memory_pool().release_unused()  # Arrow would keep what the column took.
    return labels


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column without dictionary encoding, as pandas writes categories, and with lists of one kind."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _plain(column.cast(kind.value_type))
    if pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return column.cast(pa.list_(kind.value_type))
    return column


def _rows_without(column: pa.ChunkedArray) -> np.ndarray:
    """Rows without a label: null, an empty text or list, a text of blanks, or a list with one of these in it."""
    empty = np.asarray(column.is_null())
    if _is_text(column.type):
        empty = empty | np.asarray(pc.fill_null(pc.equal(pc.utf8_trim_whitespace(column), ""), False))
    if pa.types.is_list(column.type):
        empty = empty | (pc.fill_null(pc.list_value_length(column), 0).to_numpy() == 0)
        parts = [chunk.flatten() for chunk in column.chunks]
        blank = any(
            _is_text(part.type) and pc.any(pc.equal(pc.utf8_trim_whitespace(part), "")).as_py() for part in parts
        )
        if blank or any(part.null_count for part in parts):
            empty = empty | np.array([not all(map(_is_label, labels or ())) for labels in column.to_pylist()])
    return np.flatnonzero(empty)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_label(value: Label | None) -> bool:
    return value is not None and str(value).strip() != ""


def _named_by_file(
    name: str, spec: DomainSpec, column: pa.ChunkedArray, files: Sequence[str], names_known: Sequence[str]
) -> pa.ChunkedArray | None:
    """The class names of all rows where Parquet or Arrow files number them differently; `None` where all agree.

    `datasets` takes the names of the first file, even of another split, for those of all.
    """
    if files and all(file.endswith(".parquet") for file in files):
        found = of_all(lambda file: read_parquet(file, lambda parquet: _class_names(parquet, spec.label_column)), files)
    elif files and all(file.endswith(".arrow") and os.path.isfile(file) for file in files):
        found = [_class_names_of_arrow(file, spec.label_column) for file in files]
    else:
        return None
    if {names for names, _ in found} in ({None}, {tuple(names_known)}):
        return None
    parts, start = [], 0
    for file, (names, num_rows) in zip(files, found, strict=True):
        part = column.slice(start, num_rows).combine_chunks()
        start += num_rows
        numbers = part.flatten() if pa.types.is_list(part.type) else part
        if names is None:
            raise ValueError(
                f"`domains.{name}.label_column` must be named alike in all files. Got {file} without names in "
                f"{spec.label_column!r}; write its classes as text."
            )
        if len(numbers) and not 0 <= pc.min(numbers).as_py() <= pc.max(numbers).as_py() < len(names):
            raise ValueError(
                f"`domains.{name}.label_column` must hold classes of its ClassLabel, 0 to {len(names) - 1}. Got "
                f"{pc.min(numbers).as_py()} to {pc.max(numbers).as_py()} in {file}; leave out rows without a class."
            )
        taken = pa.array(names, pa.string()).take(numbers)
        parts.append(pa.ListArray.from_arrays(part.offsets, taken) if pa.types.is_list(part.type) else taken)
    if start != len(column):
        raise ValueError(f"`domains.{name}` must hold the {start:,} rows of its files. Got {len(column):,}.")
    return pa.chunked_array(parts)


def _class_names(parquet: pq.ParquetFile, column: str) -> tuple[tuple[str, ...] | None, int]:
    return _names_in(parquet.schema_arrow, column), parquet.metadata.num_rows


def _class_names_of_arrow(file: str, column: str) -> tuple[tuple[str, ...] | None, int]:
    with pa.memory_map(file) as source:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_file(source).read_all()
    return _names_in(table.schema, column), len(table)


def _names_in(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    feature = Features.from_arrow_schema(schema).get(column)
    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def _text_labels(spec: DomainSpec, tables: Sequence[str], rows: Dataset | ParquetSplit) -> list[str] | None:
    """Labels of `metadata.csv` as they are written, where reading them as numbers would change them.

    pandas makes 7 of 007 and nothing of NA. `None` where the files are others, or all labels are plain numbers.
    """
    if not tables or isinstance(rows, ParquetSplit):
        return None
    texts: dict[str, str] = {}
    for table in tables:
        with open(table, encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                if "file_name" in row and row.get(spec.label_column) is not None:
                    path = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(table)), row["file_name"]))
                    if texts.setdefault(path, row[spec.label_column]) != row[spec.label_column]:
                        raise ValueError(
                            f"`{spec.label_column}` must be one for each picture. Got {texts[path]!r} and "
                            f"{row[spec.label_column]!r} for {row['file_name']} in {table}; leave one of them out."
                        )
    if all(map(is_plain_number, texts.values())):
        return None
    images = rows.cast_column(spec.image_column, Image(decode=False))[spec.image_column]
    found = [texts.get(os.path.normpath(image["path"] or "")) for image in images]
    return None if None in found else [text for text in found if text is not None]
