"""Columns of tables of rows: groups of equal values, places of values, values as Python has them, one schema of all."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def group_numbers(table: pa.Table, column: str, names: Sequence[str]) -> np.ndarray:
    """For each row the number of the group that the value of a column makes; without a value each its own.

    Args:
        table: The table.
        column: The column.
        names: Columns that may be named.

    Raises:
        ValueError: If there is no such column, or its values cannot be compared.
    """
    if column not in names:
        raise ValueError(f"`group_by` must be a column of the index: {', '.join(names)}. Got {column!r}.")
    try:
        codes = table[column].dictionary_encode().unify_dictionaries().combine_chunks()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid, AttributeError) as error:
        kind = table.schema.field(column).type
        raise ValueError(f"`group_by` must be a column of texts or numbers. Got {column!r} of {kind}.") from error
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    numbers = np.asarray(codes.indices.fill_null(-1)).astype(np.int64)
    return np.where(numbers < 0, -1 - np.arange(len(numbers)), numbers)


def places_of(table: pa.Table, column: str, values: Sequence[str | None]) -> dict[str, np.ndarray]:
    """The places of the rows with each of some values of a column of texts; nothing for a column that is not there."""
    wanted = sorted({value for value in values if value is not None})
    if column not in table.column_names or not wanted:
        return {}
    found = np.flatnonzero(pc.is_in(table[column], value_set=pa.array(wanted, pa.string())))
    names = np.array(table[column].take(pa.array(found)).to_pylist(), dtype=object)
    return {value: found[names == value] for value in wanted}


def plain_value(column: pa.ChunkedArray) -> Any:
    """The first value of a column; a time that Python cannot hold is given as text."""
    try:
        return column.to_pylist()[0]
    except (ValueError, OverflowError):
        return str(column.cast(pa.string())[0]) if column.type != pa.null() else None


def unified(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """One schema with the columns of all.

    Raises:
        ValueError: If they do not agree in the types of their columns.
    """
    try:
        return pa.unify_schemas(list(schemas))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"`embeddings` must agree in the types of their columns: {error}") from error
