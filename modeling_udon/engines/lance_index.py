"""Index in a Lance table, searched where it lies: in a folder, on object storage, on the Hub."""

import json
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.engines.columns import ID, ROW, VECTOR
from modeling_udon.engines.lance_address import (
    LanceAddress,
    check_condition,
    condition_error,
    fit_name,
    identifier,
    literal,
)
from modeling_udon.engines.lance_store import EFFORT_KEY, METADATA_KEY
from modeling_udon.faults import first_line
from modeling_udon.search.any_index import check_dimension
from modeling_udon.search.image_index import OWN_COLUMNS, located
from modeling_udon.search.index_folder import IndexAbout
from modeling_udon.search.ranking import rescored

KIND = "lancedb"
THUMBNAIL = "thumbnail"
# Lines of rows that were found last, which are described without being read again.
_MOST_KEPT = 50_000
_GROWTH = 4
# The nearest of a few rows are farther away than the nearest of all: so many times more lists are looked at.
_MORE_WITH_FILTER = 4
_MOST_IN_LIST = 1_000
# Of looks for a newer version: on object storage and the Hub each is a request.
_SECONDS_BETWEEN_LOOKS = 10.0


class LanceIndex:
    """A snapshot of an index in a Lance table; it is searched as an `ImageIndex` is.

    Args:
        address: As `LanceAddress.parse` takes it.

    Raises:
        ValueError: If there is no such table, or it is none that `udon export-index` wrote.
        ImportError: If LanceDB is missing.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._table, num_rows, values = _open(address)
        self._names: dict[str, str] = values["names"]
        self._roots = [(int(start), str(root)) for start, root in values["roots"]]
        self._effort = int((self._table.schema.field(VECTOR).metadata or {}).get(EFFORT_KEY, 0))
        self._lines: OrderedDict[int, dict[str, Any]] = OrderedDict()
        self._lock = Lock()
        self._looked = time.monotonic()
        self.about = IndexAbout(
            kind=KIND,
            dim=values["dim"],
            num_images=num_rows,
            model=values["model"],
            fingerprint=values["fingerprint"],
            effort=self._effort,
            recall=None,
            sources=[],
            bytes_per_image=4.0 * values["dim"],
            letterbox=values["letterbox"],
            pooling=values["pooling"],
        )

    def __str__(self) -> str:
        return self._address

    @property
    def version(self) -> int:
        """Version of the table."""
        return int(self._table.version)

    def newest(self) -> "LanceIndex":
        """The newest version of the table; itself, where it was looked for just now or cannot be had."""
        with self._lock:
            if time.monotonic() - self._looked < _SECONDS_BETWEEN_LOOKS:
                return self
            self._looked = time.monotonic()
        try:
            found = LanceIndex(self._address)
        except ValueError:  # A storage that does not answer for a moment takes nothing from what is open.
            return self
        return self if found.version == self.version else found

    @property
    def schema(self) -> pa.Schema:
        """All columns, own and the user's, under their own names."""
        kept = [field for field in self._table.schema if field.name not in (VECTOR, ROW)]
        return pa.schema([field.with_name(self._names.get(field.name, field.name)) for field in kept])

    @property
    def user_columns(self) -> list[str]:
        """Columns that came with the data."""
        return [name for name in self.schema.names if name not in OWN_COLUMNS]

    def search(
        self,
        queries: np.ndarray,
        k: int,
        domain: str | None = None,
        *,
        where: str | None = None,
        group_by: str | None = None,
        exclude: Sequence[Collection[int]] | None = None,
        rerank: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the largest inner product with each query; see `ImageIndex.search`.

        The condition is one of Lance's own SQL, and applied before the search. All scores are exact, so there is
        nothing to rerank.

        Raises:
            ValueError: If the dimension is another, there is no such domain or column, or the condition is none.
        """
        check_dimension(queries, self.about)
        condition = self._condition(domain, where)
        group = None if group_by is None else self._column(group_by)
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        for number, query in enumerate(queries):
            excluded = set() if exclude is None else set(exclude[number])
            wanted = (k + len(excluded)) * (1 if group is None else _GROWTH)
            while True:
                table = self._nearest(query, wanted, condition)
                found = _best(query, table, k, excluded, group)
                if len(found) == k or len(table) < wanted:
                    break
                wanted *= _GROWTH
            for place, (score, row) in enumerate(found):
                scores[number, place], rows[number, place] = score, row
        return scores, rows

    def select(self, domain: str | None = None, where: str | None = None) -> np.ndarray:
        """The numbers of the rows of a filter, int64, ascending."""
        return np.sort(np.asarray(self._read([ROW], self._condition(domain, where))[ROW], np.int64))

    def describe(self, row: int, thumbnail: bool = True) -> dict[str, Any]:
        """What is known of the image of a row; see `ImageIndex.describe`.

        Raises:
            ValueError: If there is no such row.
        """
        with self._lock:
            values = self._lines.get(row)
        if values is None:
            self._keep(self._read(self._shown, _in(ROW, [row])))
            values = self._lines.get(row)
        if values is None:
            raise ValueError(f"`rows` must be of the index. Got {row}, which is not there or was removed.")
        values = {self._names.get(name, name): value for name, value in values.items()}
        if thumbnail and THUMBNAIL in self._table.schema.names:
            values[THUMBNAIL] = self._read([THUMBNAIL], _in(ROW, [row]))[THUMBNAIL].to_pylist()[0]
        root = self._roots[bisect_right(self._roots, row, key=lambda start: start[0]) - 1][1] if self._roots else ""
        return located(values, root)

    def domains(self) -> list[str]:
        """The domains of its images."""
        return self._domains

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers of all rows with one of some ids, int64, ascending."""
        if ID not in self._table.schema.names or not len(ids):
            return np.empty(0, np.int64)
        return np.sort(np.concatenate([np.asarray(table[ROW], np.int64) for table in self._looked_up([ROW], ID, ids)]))

    def check_rows(self, rows: np.ndarray) -> None:
        """Refuses numbers of rows that are not there.

        Raises:
            ValueError: If there is one.
        """
        self.vectors(rows)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, of shape `(num_rows, dim)`, float32.

        Raises:
            ValueError: If there is no such row.
        """
        found: dict[int, np.ndarray] = {}
        for table in self._looked_up([ROW, VECTOR], ROW, [int(row) for row in rows]):
            found.update(zip(table[ROW].to_pylist(), _matrix(table, self.about.dim), strict=True))
        missing = [int(row) for row in rows if int(row) not in found]
        if missing:
            raise ValueError(f"`rows` must be of the index. Got {missing[0]}, which is not there or was removed.")
        return np.array([found[int(row)] for row in rows], np.float32).reshape(len(rows), self.about.dim)

    @cached_property
    def _domains(self) -> list[str]:
        if "domain" not in self._table.schema.names:
            return []
        return sorted(filter(None, self._read(["domain"])["domain"].unique().to_pylist()))

    @cached_property
    def _shown(self) -> list[str]:
        """What is read of each row that is found."""
        return [name for name in self._table.schema.names if name not in (VECTOR, THUMBNAIL)]

    def _nearest(self, query: np.ndarray, number: int, condition: str | None) -> pa.Table:
        request = self._table.search(query.astype(np.float32), vector_column_name=VECTOR).distance_type("dot")
        if condition is not None:
            request = request.where(condition, prefilter=True)
        if self._effort and condition is None:
            request = request.nprobes(self._effort)
        elif self._effort:
            # More lists are looked at where these hold fewer rows of the filter than were asked for.
            request = request.minimum_nprobes(_MORE_WITH_FILTER * self._effort).maximum_nprobes(0)
        table = self._run(request.select([*self._shown, VECTOR, "_distance"]).limit(number), condition)
        self._keep(table.drop_columns([VECTOR, "_distance"]))
        return table

    def _read(self, columns: list[str], condition: str | None = None) -> pa.Table:
        request = self._table.search().select(columns)
        return self._run(request if condition is None else request.where(condition), condition)

    def _looked_up(self, columns: list[str], by: str, values: Sequence[Any]) -> Iterable[pa.Table]:
        for start in range(0, len(values), _MOST_IN_LIST):
            yield self._read(columns, _in(by, values[start : start + _MOST_IN_LIST]))

    def _run(self, request: Any, condition: str | None) -> pa.Table:
        try:
            return request.to_arrow()
        except (ValueError, RuntimeError) as error:
            if condition is None:
                raise
            raise condition_error(condition, [name for name in self._shown if name != ROW], error) from error

    def _condition(self, domain: str | None, where: str | None) -> str | None:
        parts = [] if where is None else [f"({check_condition(where)})"]
        if domain is not None:
            if domain not in self.domains():
                known = ", ".join(self.domains()) or "none, since its images were embedded without"
                raise ValueError(f"`domain` must be one of the index: {known}. Got {domain!r}.")
            parts.append(f"{identifier('domain')} = {literal(domain)}")
        return " AND ".join(parts) or None

    def _column(self, name: str) -> str:
        if name not in self.schema.names:
            raise ValueError(f"`group_by` must be a column of the index: {', '.join(self.schema.names)}. Got {name!r}.")
        return next((fitted for fitted, own in self._names.items() if own == name), fit_name(name))

    def _keep(self, table: pa.Table) -> None:
        with self._lock:
            for line in table.to_pylist():
                self._lines[line.pop(ROW)] = line
            while len(self._lines) > _MOST_KEPT:
                self._lines.popitem(last=False)


def _open(address: str) -> tuple[Any, int, dict[str, Any]]:
    """Opens a table as it is now; returns it with the number of its rows, and what it says of itself."""
    place = LanceAddress.parse(address)
    database = place.connect("an index in LanceDB needs")
    try:
        table = database.open_table(place.table)
        table.checkout(table.version)  # what others write meanwhile is not seen
        told = (table.schema.metadata or {}).get(METADATA_KEY)
        num_rows = table.count_rows()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"`index` must be a table that udon export-index wrote. Got {address!r}: {first_line(str(error))}"
        ) from error
    if told is None:
        raise ValueError(f"`index` must be a table that udon export-index wrote. Got {address!r}, of another origin.")
    return table, num_rows, json.loads(told)


def _best(
    query: np.ndarray, table: pa.Table, k: int, excluded: Collection[int], group: str | None
) -> list[tuple[float, int]]:
    """Scores and numbers of the best rows of a table, equal scores by number, without those that are left out."""
    numbers = table[ROW].to_pylist()
    scores = rescored(query[None], _matrix(table, len(query))[None])[0]
    groups = [None] * len(numbers) if group is None else table[group].to_pylist()
    seen, found = set(), []
    for score, row, value in sorted(zip(scores.tolist(), numbers, groups, strict=True), key=lambda x: (-x[0], x[1])):
        key = repr(value)
        if row in excluded or (value is not None and key in seen):
            continue
        seen.add(key)
        found.append((score, row))
    return found[:k]


def _matrix(table: pa.Table, dim: int) -> np.ndarray:
    values: np.ndarray = table[VECTOR].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    return values


def _in(column: str, values: Sequence[Any]) -> str:
    texts = [literal(value) if isinstance(value, str) else str(int(value)) for value in values]
    return f"{identifier(column)} IN ({', '.join(texts)})"
