"""An opened index: neighbours of embeddings, and what is known of the images."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_udon.search.faiss_index import RowFilter, make_filter, search_faiss, search_filtered
from modeling_udon.search.index_folder import open_index

# Columns of an index that are not the user's.
OWN_COLUMNS = ("path", "row", "id", "sha256", "num_bytes", "mtime", "domain", "thumbnail")
# Of domains that were searched last; each may hold a copy of its rows.
_MOST_FILTERS = 4


class ImageIndex:
    """An opened index.

    Args:
        folder: Folder that `build_index` wrote.

    Raises:
        ValueError: If it is none, or a file of it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.about, self._faiss, self._metadata = open_index(self.folder)
        self._filters: dict[str, RowFilter] = {}

    def search(self, queries: np.ndarray, k: int, domain: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the largest inner product with each query.

        With a domain, as many of its images are looked at as of all without one, and all of a small one.

        Args:
            queries: Of shape `(num_queries, dim)`, unit norm.
            k: Neighbours a query.
            domain: Search among its images only.

        Returns:
            Scores, float32, and rows, int64, of shape `(num_queries, k)`; -inf and -1 where there are no more. The
            scores of kinds that compress are approximate.

        Raises:
            ValueError: If the dimension is another, or there is no such domain.
        """
        if queries.shape[1] != self.about.dim:
            raise ValueError(
                f"queries must have the dimension of the index, {self.about.dim}. Got {queries.shape[1]}; embed them "
                f"with {self.about.model}."
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        num_found = min(k, self.about.num_images)
        if domain is not None:
            chosen = self._filter(domain)
            num_found = min(k, len(chosen.rows))
            scores, rows = search_filtered(self._faiss, queries, num_found, self.about.effort, chosen)
        else:
            scores, rows = search_faiss(self._faiss, queries, num_found, effort=self.about.effort or None)
            short = np.flatnonzero(rows[:, -1] < 0)
            if len(short):  # the lists that were looked at hold fewer
                scores[short], rows[short] = search_faiss(self._faiss, queries[short], num_found, effort=None)
        padding = ((0, 0), (0, k - num_found))
        return np.pad(scores, padding, constant_values=-np.inf), np.pad(rows, padding, constant_values=-1)

    def describe(self, row: int, thumbnail: bool = True) -> dict[str, Any]:
        """What is known of the image of a row.

        Args:
            row: The row.
            thumbnail: Whether its thumbnail is read, if one was kept.

        Returns:
            Those of `OWN_COLUMNS` that were kept; `file`, where the image lies, `None` where that is not known; and
            `columns`, the others that are not empty. A time that Python cannot hold is given as text.
        """
        line = self._metadata.slice(row, 1)
        values = {name: _value(line[name]) for name in line.column_names if thumbnail or name != "thumbnail"}
        source = next(source for source in reversed(self.about.sources) if source["start"] <= row)
        # Bytes in a data set have no time of change, and their path names no file, whatever may lie there.
        is_file = values.get("mtime", 0) is not None and (source["root"] or os.path.isabs(values["path"]))
        own = {name: value for name, value in values.items() if name in OWN_COLUMNS}
        others = {name: value for name, value in values.items() if name not in OWN_COLUMNS and value is not None}
        file = os.path.join(source["root"], values["path"]) if is_file else None
        return own | {"file": file, "columns": others}

    def domains(self) -> list[str]:
        """The domains of its images."""
        if "domain" not in self._metadata.column_names:
            return []
        return sorted(filter(None, self._metadata["domain"].unique().to_pylist()))

    def _filter(self, domain: str) -> RowFilter:
        if domain not in self._filters:
            while len(self._filters) >= _MOST_FILTERS:
                del self._filters[next(iter(self._filters))]
            self._filters[domain] = make_filter(self._faiss, self._rows_of(domain))
        return self._filters[domain]

    def _rows_of(self, domain: str) -> np.ndarray:
        if domain not in self.domains():
            known = ", ".join(self.domains()) or "none, since they were embedded without"
            raise ValueError(f"`domain` must be one of the index: {known}. Got {domain!r}.")
        return np.asarray(pc.equal(self._metadata["domain"], domain).fill_null(False))


def _value(column: pa.ChunkedArray) -> Any:
    try:
        return column.to_pylist()[0]
    except (ValueError, OverflowError):
        return str(column.cast(pa.string())[0]) if column.type != pa.null() else None
