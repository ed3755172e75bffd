"""What a search finds: images, their lists per query, as a table for a terminal or as JSON."""

import base64
import math
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from modeling_udon.calibration import Calibration
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

    def to_json(self) -> dict[str, Any]:
        """As plain values that JSON holds, without pictures; what the data says of an image stands in `columns`."""
        judged = any(found.accepted is not None for found in self.neighbours)
        return {
            "path": self.path,
            "in_index": self.is_known if judged else None,
            "neighbours": [found.to_json(rank) for rank, found in enumerate(self.neighbours, 1)],
        }


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
            "queries": [query.to_json() for query in self.queries],
        }


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
