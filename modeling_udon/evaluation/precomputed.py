"""Embeddings that lie in Parquet files, such as `udon embed` writes, in place of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modeling_udon.data.domains import Domain, ImageSplit
from modeling_udon.evaluation.neighbours import EmbeddedSplit, domains_with, integer_labels
from modeling_udon.evaluation.rules import embedded_domain
from modeling_udon.storage import damage_of

KIND = "precomputed"
# Paths compared with those of the data, to notice embeddings of other images.
NUM_CHECKED = 32


@dataclass(frozen=True)
class EmbeddingFolder:
    """A folder of ready-made embeddings, to be evaluated in place of a model; see `read_split`."""

    path: Path


def read_split(folder: str | Path, domains: Mapping[str, Domain], split: str) -> EmbeddedSplit:
    """Reads the embeddings of every domain that has the split.

    They are looked for in `folder/DOMAIN/SPLIT`, a folder of Parquet files, or `folder/DOMAIN/SPLIT.parquet`; those of
    an index set of its own in `SPLIT-index`. Column `embedding` holds a list of numbers, scaled to unit norm here;
    column `row` the image's row in the data, without it the order of the file counts; column `path` is compared with
    the data's where both have one.

    Args:
        folder: Folder of the embeddings.
        domains: The opened domains.
        split: `"validation"` or `"test"`.

    Raises:
        ValueError: If embeddings are missing, too many, of other images, or of different dimensions.
    """
    embedded: EmbeddedSplit = {}
    for name, domain in domains_with(domains, split).items():
        images = domain.evaluation[split]
        query = _read_images(Path(folder) / name / split, images.query)
        index = None if images.index is None else _read_images(Path(folder) / name / f"{split}-index", images.index)
        query_labels, index_labels = integer_labels(images)
        embedded[name] = {KIND: embedded_domain(name, images, query_labels, index_labels, query, index)}
    return embedded


def _read_images(place: Path, images: ImageSplit) -> np.ndarray:
    """`(num_images, dim)`, float32, unit norm, in the order of the images."""
    table = _read_table(place)
    rows = table["row"].to_numpy() if "row" in table.column_names else np.arange(len(table))
    if rows.dtype.kind not in "iu":
        raise ValueError(f"--embeddings must have whole numbers in column 'row'. Got {table['row'].type} in {place}.")
    if not np.array_equal(np.sort(rows), np.arange(len(images))):
        raise ValueError(
            f"--embeddings must hold one for each of the {len(images)} images of {place}. Got {len(table)} with "
            f"{len(np.unique(rows[rows < len(images)]))} of their rows; embed the same data again"
        )
    if "path" in table.column_names:
        _check_paths(place, table["path"], rows, images)
    vectors = _vectors(table["embedding"], place)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(norms) & (norms > 0)).all():
        raise ValueError(f"--embeddings must be finite and not zero. Got another in {place}.")
    ordered = np.empty_like(vectors)
    ordered[rows] = vectors / norms
    return ordered


def _vectors(column: pa.ChunkedArray, place: Path) -> np.ndarray:
    """`(num_rows, dim)`, float32."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    values = kind.value_type if is_list else None
    if values is None or not (pa.types.is_floating(values) or pa.types.is_integer(values)):
        raise ValueError(f"--embeddings must be lists of numbers in column 'embedding'. Got {kind} in {place}.")
    lengths = set(pc.list_value_length(column).to_pylist())
    if len(lengths) != 1 or None in lengths or 0 in lengths:
        shown = ", ".join("none" if length is None else str(length) for length in sorted(lengths, key=str)[:5])
        raise ValueError(f"--embeddings must all have the same number of dimensions. Got {shown} in {place}.")
    return np.stack(column.to_numpy()).astype(np.float32)


def _read_table(place: Path) -> pa.Table:
    single = place.with_name(f"{place.name}.parquet")
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [single] if single.is_file() else []
    if not files:
        raise ValueError(f"--embeddings must hold {place}/*.parquet or {single}. Got neither; make it with udon embed.")
    with damage_of(files[0], pa.ArrowException):
        names = pq.read_schema(files[0]).names
    if "embedding" not in names:
        raise ValueError(f"--embeddings must have a column 'embedding'. Got {', '.join(names)} in {files[0]}.")
    columns = [name for name in ("path", "row", "embedding") if name in names]
    tables = []
    for file in files:
        with damage_of(file, pa.ArrowException):
            tables.append(pq.read_table(file, columns=columns))
    return pa.concat_tables(tables)


def _check_paths(place: Path, paths: pa.ChunkedArray, rows: np.ndarray, images: ImageSplit) -> None:
    """Compares file names alone: folders may have moved."""
    for position in np.linspace(0, len(rows) - 1, num=min(len(rows), NUM_CHECKED), dtype=int):
        path, row = paths[int(position)].as_py(), int(rows[position])
        wanted = images.images[row]["image"]["path"]
        if wanted and path and Path(wanted).name != Path(path).name:
            raise ValueError(
                f"--embeddings must be of the data's images. Got {path} where {place} has {wanted}, in row {row}"
            )
