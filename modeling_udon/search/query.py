"""`udon search`: query images through the model, their neighbours in an index, as a table or as JSON."""

import base64
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import numpy as np

from modeling_udon.calibration import Calibration
from modeling_udon.data.folders import describe_passed_over, walk_images
from modeling_udon.data.images import num_cores
from modeling_udon.encoder import Encoder, fastest_device
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.text import printable

# Of the JSON: 1 had the columns of the data beside our own, which they could replace.
SCHEMA = 2


@dataclass(frozen=True)
class FoundImage:
    """A neighbour.

    Attributes:
        row: Its row in the index.
        id: A digest of its bytes, or what the data set calls it; `None` in an index that knows none.
        sha256: Digest of its bytes, by which a file that is another now is known.
        score: Inner product with the query, a cosine; approximate in an index that compresses.
        path: As it was embedded.
        file: Where it lies, if that is known.
        domain: Its domain, if the index knows it.
        columns: Other columns that were kept and are not empty.
        thumbnail: A JPEG, if one was kept and is to be shown.
        accepted: Whether the score reaches the model's threshold; `None` for a model without one.
    """

    row: int
    id: str | None
    sha256: str | None
    score: float
    path: str
    file: str | None
    domain: str | None
    columns: dict[str, Any]
    thumbnail: bytes | None
    accepted: bool | None

    def to_json(self, rank: int) -> dict[str, Any]:
        """As plain values that JSON holds, without its picture; what the data says of the image stands in `columns`."""
        return {
            "rank": rank,
            "score": self.score,
            "row": self.row,
            "id": self.id,
            "path": self.path,
            "file": self.file,
            "domain": self.domain,
            "match": self.accepted,
            "columns": {name: json_value(value) for name, value in self.columns.items()},
        }


@dataclass(frozen=True)
class QueryResult:
    """A query image and its neighbours, best first."""

    path: str
    neighbours: list[FoundImage]

    @property
    def is_known(self) -> bool:
        """Whether a neighbour counts as the same: all but those below the model's threshold do."""
        return any(found.accepted is not False for found in self.neighbours)


@dataclass(frozen=True)
class SearchResults:
    """The results of all queries, and what was searched."""

    queries: list[QueryResult]
    index: str
    kind: str
    num_images: int
    model: str
    domain: str | None
    calibration: Calibration | None

    def to_json(self) -> dict[str, Any]:
        """As plain values that JSON holds, without pictures; what the data says of an image stands in `columns`."""
        return {
            "schema": SCHEMA,
            "index": self.index,
            "model": self.model,
            "domain": self.domain,
            "threshold": None if self.calibration is None else self.calibration.threshold,
            "queries": [
                {
                    "path": query.path,
                    "in_index": query.is_known if self.calibration is not None else None,
                    "neighbours": [found.to_json(rank) for rank, found in enumerate(query.neighbours, 1)],
                }
                for query in self.queries
            ],
        }


def search_images(
    queries: Sequence[str | os.PathLike[str]],
    index: str | os.PathLike[str] | AnyIndex,
    model: Callable[[], Encoder] | Encoder,
    k: int = 5,
    domain: str | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    thumbnails: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> SearchResults:
    """Searches an index for the images most like each query.

    Args:
        queries: Image files, or folders of them.
        index: Folder that `udon index` wrote, or an opened index.
        model: The model that the index was made with, or what loads it once the rest is known to be right. It goes to
            the GPU, if there is one.
        k: Neighbours a query.
        domain: Search among the images of this domain only.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode; `None`: the cores but one, and no more than there are batches.
        thumbnails: Whether neighbours come with the thumbnails that were kept.
        warn: Called with a line for each query that cannot be read, and for each folder with what was passed over.

    Raises:
        ValueError: If a query or the domain does not exist, the index is of another model, or no query can be read.
    """
    opened = ImageIndex(index) if isinstance(index, str | os.PathLike) else index
    if domain is not None and domain not in opened.domains():
        known = ", ".join(opened.domains()) or "none, since its images were embedded without"
        raise ValueError(f"`domain` must be one of the index: {known}. Got {domain!r}.")
    files = list(_query_files(queries, warn))
    loaded = model if isinstance(model, Encoder) else model()
    if opened.about.dim in loaded.nested_dims:
        loaded = loaded.cut(opened.about.dim)
    check_model(opened, loaded)
    if num_workers is None:
        num_workers = min(num_cores() - 1, len(files) // batch_size)
    encoded = loaded.to(fastest_device()).encode(files, batch_size=batch_size, num_workers=num_workers)
    for image in encoded.unreadable:
        warn(f"skipped {printable(image.path)}: {printable(image.reason)}")
    rows = sorted(set(range(len(files))) - {image.row for image in encoded.unreadable})
    if not rows:
        raise ValueError(f"`queries` must hold an image that can be read. Got none in {len(files)} file(s).")
    results: list[QueryResult] = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        found = neighbours_of(opened, loaded, encoded.embeddings[batch], k, domain, thumbnails)
        results += [QueryResult(str(files[row]), of) for row, of in zip(batch, found, strict=True)]
    about = opened.about
    return SearchResults(results, str(index), about.kind, about.num_images, loaded.name, domain, loaded.calibration)


def check_model(index: AnyIndex, model: Encoder) -> None:
    """Refuses a model that the index was not made with.

    Raises:
        ValueError: If the dimension or the fingerprint differs.
    """
    about = index.about
    for what, expected, got in (
        ("dimension", about.dim, model.dim),
        ("fingerprint", about.fingerprint, model.fingerprint),
    ):
        if expected != got:
            raise ValueError(
                f"`model` must be the one that the index was made with: {about.model}, {what} {expected}. "
                f"Got {model.name}, {what} {got}; use that model, or embed and index the images with this one."
            )


def format_results(results: SearchResults) -> str:
    """The results as a table for a terminal."""
    lines: list[str] = []
    for query in results.queries:
        lines.append(printable(query.path) + ("" if query.is_known else "  (not in the index)"))
        cells = [_cells(rank, found) for rank, found in enumerate(query.neighbours, 1)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        lines.append("")
    if results.calibration is not None:
        lines.append(results.calibration.describe())
    return "\n".join(lines).rstrip()


def _query_files(queries: Sequence[str | os.PathLike[str]], warn: Callable[[str], None]) -> Iterator[Path]:
    for query in queries:
        path = Path(query)
        if path.is_dir():
            walk = walk_images(path)
            files = [path / name for name in walk]
            if walk.passed_over:
                warn(f"passed over: {describe_passed_over(walk.passed_over)}")
            if not files:
                raise ValueError(f"`queries` must be images or folders that hold some. Got {str(query)!r} with none.")
            yield from files
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"`queries` must be images or folders of images. Got {str(query)!r}, which is not there.")


def neighbours_of(
    index: AnyIndex,
    model: Encoder,
    embeddings: np.ndarray,
    k: int,
    domain: str | None,
    thumbnails: bool,
    **filters: Any,
) -> list[list[FoundImage]]:
    """Searches an opened index for the images most like each query, best first.

    Args:
        index: The index.
        model: The model that it was made with; see `check_model`.
        embeddings: Those of the queries, of shape `(num_queries, dim)`.
        k: Neighbours of each query.
        domain: Search among the images of this domain of the index only.
        thumbnails: Whether neighbours come with the thumbnails that were kept.
        filters: Further options of `ImageIndex.search`.
    """
    scores, rows = index.search(embeddings, k, domain, **filters)
    return [
        [
            _found(index, model, int(row), float(score), thumbnails)
            for score, row in zip(*found, strict=True)
            if row >= 0
        ]
        for found in zip(scores, rows, strict=True)
    ]


def _found(index: AnyIndex, model: Encoder, row: int, score: float, thumbnail: bool) -> FoundImage:
    values = index.describe(row, thumbnail)
    return FoundImage(
        row,
        values.get("id"),
        values.get("sha256"),
        score,
        path=values["path"],
        file=values["file"],
        domain=values.get("domain"),
        columns=values["columns"],
        thumbnail=values.get("thumbnail"),
        accepted=None if model.calibration is None else score >= model.calibration.threshold_of(values.get("domain")),
    )


def _cells(rank: int, found: FoundImage) -> list[str]:
    others = "  ".join(f"{name}={value}" for name, value in found.columns.items())
    mark = "no match" if found.accepted is False else ""
    return [printable(cell) for cell in (f"{rank}", f"{found.score:.3f}", found.domain or "", found.path, others, mark)]


def json_value(value: Any) -> Any:
    """A value of any Arrow type as JSON holds it: NaN as null, times in ISO 8601, bytes in base64."""
    if isinstance(value, dict):
        return {str(name): json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time):
        return value.isoformat()
    return value if isinstance(value, str | int | None) else str(value)
