"""Columns of pixel arrays, such as `List(List(uint8))` or `Array2D`, as columns of encoded images."""

from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Image

from modeling_udon.data.images import encode_array


def is_array_type(kind: pa.DataType) -> bool:
    """Whether a column holds lists of numbers, nested or as an extension type, and no files."""
    return isinstance(kind, pa.ExtensionType) or _is_list(kind)


def check_image_type(kind: pa.DataType) -> None:
    """Refuses a struct that is no image: `datasets` would make images of it that hold nothing.

    Raises:
        ValueError: If it has neither `bytes` nor `path`.
    """
    if pa.types.is_struct(kind) and not {"bytes", "path"} & {kind.field(place).name for place in range(len(kind))}:
        raise ValueError(f"data must be images, structs of `bytes` and `path`. Got {kind}.")


def encode_arrays(rows: Dataset) -> Dataset:
    """The one column of arrays as a column `image` of undecoded images.

    Raises:
        ValueError: If the first array holds no pixels.
    """
    column = rows.column_names[0]
    first = rows[:1][column]
    encode_array(np.asarray(first[0]))
    return rows.map(
        lambda batch: {"image": [_encode(values) for values in batch[column]]},
        batched=True,
        batch_size=256,
        remove_columns=[column] if column != "image" else None,
        features=Features({"image": Image(decode=False)}),
        desc="encoding arrays",
    )


def image_storage(column: pa.Array) -> pa.Array:
    """Undecoded images, a struct of `bytes` and `path`, from a column of images or of arrays.

    Raises:
        ValueError: If it holds neither.
    """
    if not is_array_type(column.type):
        check_image_type(column.type)
        return Image().cast_storage(column)
    storage = column.storage if isinstance(column, pa.ExtensionArray) else column
    return pa.array([_encode(values) for values in storage.to_pylist()], type=Image().pa_type)


def _encode(values: Any) -> dict[str, Any] | None:
    if values is None:
        return None
    try:
        return {"bytes": encode_array(np.asarray(values)), "path": None}
    except ValueError:  # Empty bytes are named as a broken image where they are read.
        return {"bytes": b"", "path": None}


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
