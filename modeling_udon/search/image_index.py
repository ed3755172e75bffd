"""Snapshot of an index: neighbours of embeddings, and what is known of the images."""

import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_udon.search.any_index import check_dimension
from modeling_udon.search.columns import group_numbers, places_of, plain_value
from modeling_udon.search.index_folder import ABOUT_FILE, OpenedIndex, damage_of_index, open_index, read_manifest
from modeling_udon.search.ranking import merge, pick, ranked, rescored
from modeling_udon.search.segments import INTERNALS, PART, ROW, Chosen
from modeling_udon.search.where import Conditions
from modeling_udon.storage import standing_folder

# Columns of an index that are not the user's.
OWN_COLUMNS = ("path", "row", "id", "sha256", "num_bytes", "mtime", "domain", "thumbnail")
# Of filters that were used last; each may hold a copy of its rows.
_MOST_FILTERS = 4
# Candidates of an exact index beyond those asked for, whose last bits depend on how FAISS adds up.
_NUM_SPARE = 8
_ROUNDING = 1e-5
_GROWTH = 4


class IndexBlock(NamedTuple):
    """Some rows: their numbers, their vectors of shape `(num_rows, dim)`, float32, and their columns."""

    rows: np.ndarray
    vectors: np.ndarray
    table: pa.Table


class ImageIndex:
    """A snapshot of an index, which stays as it is while others write to the folder.

    Reading from several threads is safe.

    Args:
        folder: Folder that `build_index` wrote.
        known: A snapshot of the same folder, whose parts are not opened again where they are the same.

    Raises:
        ValueError: If it is none, or a file of it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str], known: "ImageIndex | None" = None) -> None:
        self.folder = Path(folder)
        self.opened: OpenedIndex = open_index(self.folder, None if known is None else known.opened)
        self.manifest = self.opened.manifest
        self.about = self.manifest.about
        self.segments = self.opened.segments
        tables = [segment.metadata for segment in self.segments]
        self.table = pa.concat_tables(tables, promote_options="default")
        self.rows = np.concatenate([segment.rows for segment in self.segments])
        self._starts = np.cumsum([0, *(segment.num_rows for segment in self.segments)])
        self._order = np.argsort(self.rows, kind="stable")
        self.is_live = ~np.isin(self.rows, self.opened.deleted)
        self._filters: dict[tuple[str | None, str | None], list[Chosen]] = {}
        self._groups: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()

    @property
    def version(self) -> int:
        """Number of the commit."""
        return self.manifest.version

    @property
    def unsettled_share(self) -> float:
        """Share of the rows on the disk that were added or removed since the index was built or compacted."""
        num_added = len(self.rows) - self.segments[0].num_rows
        return (num_added + int((~self.is_live[: self.segments[0].num_rows]).sum())) / len(self.rows)

    def is_current(self) -> bool:
        """Whether the folder holds nothing newer."""
        return read_manifest(standing_folder(self.folder)) == self.manifest

    def newest(self) -> "ImageIndex":
        """The newest snapshot of the folder; itself, where nothing has changed."""
        return self if self.is_current() else ImageIndex(self.folder, known=self)

    @property
    def schema(self) -> pa.Schema:
        """All columns, own and the user's."""
        return pa.schema([column for column in self.table.schema if column.name not in INTERNALS])

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
        """The rows with the largest inner product with each query.

        With a filter, as many of its rows are looked at as of all without one, and all of a small one.

        Args:
            queries: Of shape `(num_queries, dim)`, unit norm.
            k: Neighbours of each query.
            domain: Search among the images of this domain only.
            where: Search among the rows for which this SQL condition on the columns is true.
            group_by: A column of whose values each is found once; rows without a value stand for themselves.
            exclude: For each query the numbers of rows that are left out.
            rerank: So many candidates get their exact scores, in kinds that compress; 0 for none.

        Returns:
            Scores, float32, and numbers of rows, int64, of shape `(num_queries, k)`, best first, equal scores by
            place; -inf and -1 where there are no more. The scores of kinds that compress are approximate.

        Raises:
            ValueError: If the dimension is another, there is no such domain or column, the condition is none, or
                there are no exact vectors to rerank with.
        """
        check_dimension(queries, self.about)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        self._check_rerank(rerank)
        chosen = self._choose(domain, where)
        groups = None if group_by is None else self.groups(group_by)
        excluded = None if exclude is None else [self.places(np.array(list(rows), np.int64)) for rows in exclude]
        most_excluded = max(map(len, excluded), default=0) if excluded is not None else 0
        number = (k + most_excluded) * (1 if groups is None else _GROWTH)
        num_chosen = sum(part.num_rows for part in chosen)
        scores, places = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        short = np.arange(len(queries))
        while len(short):
            found = self._nearest(queries[short], min(number, num_chosen), chosen, rerank)
            without = None if excluded is None else [excluded[query] for query in short]
            scores[short], places[short] = pick(*found, k, without, groups)
            if groups is None or number >= num_chosen:
                break
            short, number = short[places[short, -1] < 0], number * _GROWTH
        return scores, np.where(places < 0, -1, self.rows[places])

    def select(self, domain: str | None = None, where: str | None = None) -> np.ndarray:
        """The numbers of the rows of a filter, int64, ascending."""
        allowed = self._allowed(domain, where)
        return np.sort(self.rows[self.is_live if allowed is None else self.is_live & allowed])

    def describe(self, row: int, thumbnail: bool = True) -> dict[str, Any]:
        """What is known of the image of a row.

        Args:
            row: The row's number.
            thumbnail: Whether its thumbnail is read, if one was kept.

        Returns:
            Those of `OWN_COLUMNS` that were kept; `file`, where the image lies, `None` where that is not known; and
            `columns`, the others that are not empty. A time that Python cannot hold is given as text.

        Raises:
            ValueError: If there is no such row.
        """
        line = self.table.slice(int(self.places(np.array([row]))[0]), 1)
        values = {
            name: plain_value(line[name])
            for name in line.column_names
            if name not in INTERNALS and (thumbnail or name != "thumbnail")
        }
        part = line[PART][0].as_py()
        with damage_of_index(self.folder / ABOUT_FILE):
            root = "" if part < 0 else self.about.sources[self.manifest.parts[part]["source"]]["root"]
        return located(values, root)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The numbers of all rows with one of some ids, int64, ascending."""
        return np.unique(np.concatenate([np.empty(0, np.int64), *self.rows_with("id", ids).values()]))

    def rows_with(self, column: str, values: Sequence[str | None]) -> dict[str, np.ndarray]:
        """The numbers of the rows with each of some values of a column of texts, ascending."""
        found = places_of(self.table, column, values)
        return {value: np.sort(self.rows[places[self.is_live[places]]]) for value, places in found.items()}

    def ids_of(self, rows: np.ndarray) -> set[str]:
        """The ids of some rows."""
        return set(self.table["id"].take(pa.array(self.places(rows))).to_pylist()) if len(rows) else set()

    def check_rows(self, rows: np.ndarray) -> None:
        """Refuses numbers of rows that are not there; raises ValueError."""
        self.places(rows)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of some rows, of shape `(num_rows, dim)`, float32; approximate where the index keeps none exactly.

        Raises:
            ValueError: If there is no such row.
        """
        return self.vectors_at(self.places(rows))

    def blocks(self, size: int = 65_536, columns: Sequence[str] | None = None) -> Iterator[IndexBlock]:
        """All rows that a search can find, so many at a time.

        Args:
            size: Most rows of a block.
            columns: Columns to give; `None` for all.
        """
        shown = self.table.select(self.schema.names if columns is None else list(columns))
        places = np.flatnonzero(self.is_live)
        for start in range(0, len(places), size):
            some = places[start : start + size]
            yield IndexBlock(self.rows[some], self.vectors_at(some), shown.take(pa.array(some)))

    def domains(self) -> list[str]:
        """The domains of its images."""
        if "domain" not in self.table.column_names:
            return []
        found = self.table["domain"]
        found = found if self.is_live.all() else found.filter(pa.array(self.is_live))
        return sorted(filter(None, found.unique().to_pylist()))

    def groups(self, column: str) -> np.ndarray:
        """For each place the number of the group that the value of a column makes; without a value each its own."""
        with self._lock:
            if column not in self._groups:
                self._groups[column] = group_numbers(self.table, column, self.schema.names)
            return self._groups[column]

    @cached_property
    def _conditions(self) -> Conditions:
        return Conditions(self.table, ROW, hidden=("thumbnail", PART, INTERNALS[-1]))

    def _check_rerank(self, rerank: int) -> None:
        if rerank and not all(segment.has_exact_vectors for segment in self.segments):
            raise ValueError(
                f"`rerank` must be left out for an index without exact vectors. Got {rerank}; build it again with "
                "udon index --force, without --no-vectors."
            )

    def _nearest(
        self, queries: np.ndarray, number: int, chosen: Sequence[Chosen], rerank: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and places of the nearest chosen rows, of shape `(num_queries, number)`."""
        if not number:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        # An exact index answers the same, bit for bit, however its rows lie in segments.
        is_exact = self.about.kind == "flat"
        wanted = max(number + _NUM_SPARE if is_exact else number, rerank)
        scores, places = self._candidates(queries, wanted, chosen)
        if not (is_exact or rerank):
            return scores[:, :number], places[:, :number]
        last = scores[:, -1].copy()
        there = places >= 0
        vectors = self.vectors_at(np.where(there, places, 0).ravel()).reshape(*places.shape, -1)
        scores, places = ranked(np.where(there, rescored(queries, vectors), -np.inf), places, wanted)
        scores, places = scores[:, :number], places[:, :number]
        # Where more rows tie with the last neighbour than were looked at, more are looked at.
        unsure = np.flatnonzero(scores[:, -1] <= last + _ROUNDING) if is_exact else np.empty(0, np.int64)
        if len(unsure) and wanted < sum(part.num_rows for part in chosen):
            again = self._nearest(queries[unsure], _GROWTH * wanted, chosen, rerank)
            scores[unsure], places[unsure] = again[0][:, :number], again[1][:, :number]
        return scores, places

    def _candidates(self, queries: np.ndarray, number: int, chosen: Sequence[Chosen]) -> tuple[np.ndarray, np.ndarray]:
        scores, places = [], []
        for segment, start, part in zip(self.segments, self._starts, chosen, strict=False):
            found = segment.search(queries, number, self.about.effort, part)
            scores.append(found[0])
            places.append(np.where(found[1] < 0, -1, found[1] + start))
        return merge(scores, places, number)

    def _choose(self, domain: str | None, where: str | None) -> list[Chosen]:
        """For each segment the rows that a search may find."""
        with self._lock:
            key = domain, where
            if key not in self._filters:
                while len(self._filters) >= _MOST_FILTERS:
                    del self._filters[next(iter(self._filters))]
                allowed = self._allowed(domain, where)
                self._filters[key] = [
                    segment.choose(
                        None if allowed is None else allowed[start : start + segment.num_rows],
                        np.flatnonzero(~self.is_live[start : start + segment.num_rows]),
                        allowed is not None,
                        self.about.effort,
                    )
                    for segment, start in zip(self.segments, self._starts, strict=False)
                ]
            return self._filters[key]

    def _allowed(self, domain: str | None, where: str | None) -> np.ndarray | None:
        """For each place whether the filter lets it through; `None` without a filter."""
        allowed = None
        if domain is not None:
            if domain not in self.domains():
                known = ", ".join(self.domains()) or "none, since its images were embedded without"
                raise ValueError(f"`domain` must be one of the index: {known}. Got {domain!r}.")
            allowed = np.asarray(pc.equal(self.table["domain"], domain).fill_null(False))
        if where is not None:
            with self._lock:
                matching = np.isin(self.rows, self._conditions.rows(where))
            allowed = matching if allowed is None else allowed & matching
        return allowed

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Where rows stand in the table.

        Raises:
            ValueError: If a row is not there, or was removed.
        """
        rows = np.asarray(rows)
        found = np.searchsorted(self.rows, rows, sorter=self._order)
        places = self._order[np.minimum(found, len(self.rows) - 1)]
        # FAISS would read what lies beside its memory, so no number may pass that is none of a row.
        wrong = (self.rows[places] != rows) | ~self.is_live[places]
        if wrong.any():
            first = int(rows[wrong][0])
            raise ValueError(f"`rows` must be of the index. Got {first}, which is not there or was removed.")
        return places

    def vectors_at(self, places: np.ndarray) -> np.ndarray:
        """Vectors of the rows at some places of `table`."""
        found = np.empty((len(places), self.about.dim), np.float32)
        owners = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(owners):
            mine = owners == number
            found[mine] = self.segments[number].vectors(places[mine] - self._starts[number])
        return found


def located(values: Mapping[str, Any], root: str) -> dict[str, Any]:
    """What is known of an image, as `describe` gives it, from the columns of its row and the folder of its source."""
    path = values.get("path") or ""
    # Bytes in a data set have no time of change, and their path names no file, whatever may lie there.
    is_file = path and values.get("mtime", 0) is not None and (root or os.path.isabs(path))
    own = {name: value for name, value in values.items() if name in OWN_COLUMNS}
    others = {name: value for name, value in values.items() if name not in OWN_COLUMNS and value is not None}
    return {"path": path, **own, "file": os.path.join(root, path) if is_file else None, "columns": others}
