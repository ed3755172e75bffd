"""Parquet folder of an index: what every other engine reads."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from modeling_udon.engines.columns import ID, ROW, VECTOR, Columns
from modeling_udon.engines.store import Place, only_out
from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.ranking import merge
from modeling_udon.storage import check_out, replaced_folder

_ROWS = 65_536
_FIRST = "part-00000.parquet"


class ParquetStore:
    """A folder of Parquet files, each of at most 65,536 rows."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._folder = Path(only_out(place, "parquet"))

    def exists(self) -> bool:
        """Whether there is one already; a folder with anything else in it is refused."""
        check_out(self._folder, _FIRST, "that udon export-index wrote", "an export", self._place.force)
        return (self._folder / _FIRST).is_file()

    def write(self, columns: Columns, about: Mapping[str, Any]) -> None:
        """Writes the folder atomically."""
        schema = columns.schema.with_metadata({"udon": json.dumps(about)})
        with replaced_folder(self._folder, replace=self._place.force) as draft:
            for number, block in enumerate(columns.blocks(_ROWS)):
                pq.write_table(block.cast(schema), draft / f"part-{number:05d}.parquet", write_page_checksum=True)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Compares all vectors of the files."""
        scores, found = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        for part in sorted(self._folder.glob("part-*.parquet")):
            table = pq.read_table(part, columns=[ROW, VECTOR])
            rows = np.asarray(table[ROW])
            vectors = table[VECTOR].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
            more, places = exact_search(queries, vectors, k)
            scores, found = merge([scores, more], [found, np.where(places < 0, -1, rows[places])], k)
        return found

    def ids(self) -> Iterator[tuple[int, str | None]]:
        """Number and id of every row."""
        for part in sorted(self._folder.glob("part-*.parquet")):
            file = pq.ParquetFile(part)
            table = file.read([name for name in (ROW, ID) if name in file.schema_arrow.names])
            ids = table[ID].to_pylist() if ID in table.column_names else [None] * len(table)
            yield from zip(table[ROW].to_pylist(), ids, strict=True)

    def close(self) -> None:
        """There is nothing to end."""
