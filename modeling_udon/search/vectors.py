"""Embeddings as columns of Parquet files: written with what they are of, read as arrays that can be searched."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_udon.storage import DamagedFileError, damage_of

METADATA_KEY = b"udon"
# Of float16, whose rounding is far smaller.
_NORM_TOLERANCE = 0.02


def embedding_table(table: pa.Table, embeds: np.ndarray, about: Mapping[str, Any]) -> pa.Table:
    """Puts embeddings of shape `(num_rows, dim)` beside the other columns, and `about` into the schema."""
    values = pa.array(np.ascontiguousarray(embeds).reshape(-1))
    table = table.append_column("embedding", pa.FixedSizeListArray.from_arrays(values, about["dim"]))
    return table.replace_schema_metadata({METADATA_KEY: json.dumps(about).encode()})


def check_finite(embeds: np.ndarray, paths: Sequence[str]) -> None:
    """Refuses embeddings of shape `(num_images, dim)` that are NaN or infinity, as float16 makes of large numbers.

    Raises:
        ValueError: If there are any; the message names an image.
    """
    broken = np.flatnonzero(~np.isfinite(embeds).all(axis=1))
    if len(broken):
        raise ValueError(
            f"embeddings must be finite. Got NaN or infinity for {len(broken)} images, such as {paths[broken[0]]}; "
            "take --mixed-precision no or bf16."
        )


def read_vectors(column: pa.Array, part: Path) -> np.ndarray:
    """Embeddings of unit norm, as `udon embed` writes them, of shape `(num_rows, dim)`; see `read_numbers`.

    Those of black images as raw pixels are zero.

    Raises:
        ValueError: If some have another norm.
    """
    vectors = read_numbers(column, part)
    norms = np.linalg.norm(vectors.astype(np.float32, copy=False), axis=1)
    if not (np.abs(norms - np.where(norms < 0.5, 0, 1)) < _NORM_TOLERANCE).all():
        raise ValueError("its embeddings are not of unit norm")
    return vectors


def read_numbers(column: pa.Array, part: Path) -> np.ndarray:
    """Vectors of a column of lists as an array of shape `(num_rows, dim)`.

    Args:
        column: Lists of numbers.
        part: The file that it was read from.

    Raises:
        ValueError: If some are missing or of different lengths.
        DamagedFileError: If some are not finite.
    """
    numbers, lengths = column.flatten(), pc.unique(pc.list_value_length(column))
    if column.null_count or numbers.null_count or len(lengths) > 1:
        raise ValueError("some of its embeddings or their numbers are missing")
    vectors: np.ndarray = numbers.to_numpy().reshape(len(column), lengths[0].as_py() if len(lengths) else 0)
    if not np.isfinite(vectors).all():
        raise DamagedFileError(
            f"`embeddings` must be finite. Got NaN or infinity in {str(part)!r}; embed the images again with --force, "
            "in float32 or bf16."
        )
    return vectors


def damage_of_embeddings(file: Path) -> AbstractContextManager[None]:
    """Turns what libraries raise of a damaged file of embeddings into one line with its name."""
    # An update numbers its listing. Shards that it named, and a listing that is lost, only another one makes again.
    is_updated = any(path for folder in file.parents[:3] for path in folder.glob(".embed/listing-*.arrow"))
    way_out = "delete it and run its udon embed again"
    way_out += " with --update" if is_updated or file.name.startswith("listing") else ""
    return damage_of(file, pa.ArrowException, OSError, LookupError, argument="embeddings", way_out=way_out)
