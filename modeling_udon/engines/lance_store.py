"""LanceDB: a table in a folder or on object storage, with an index over its vectors where they are many."""

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.engines.columns import ID, ROW, VECTOR, Columns, fit_names
from modeling_udon.engines.lance_address import LanceAddress, fit_name, table_names
from modeling_udon.engines.parity import exact_answers
from modeling_udon.engines.store import Place, fitted, held_alone, one_of_both, padded, said_in_one_line
from modeling_udon.faults import require

METADATA_KEY = b"udon"
EFFORT_KEY = b"udon:nprobes"
# Up to here all vectors are compared, which takes milliseconds.
INDEX_FROM = 100_000
_ROWS_PER_LIST = 1_000
TARGET_RECALL = 0.95
_BATCH = 8_192
_PATIENCE = timedelta(hours=24)
_MOST_EFFORT = 1_024


class LanceStore:
    """A Lance table that `lance_index.LanceIndex` searches."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._address = LanceAddress(one_of_both(place, "lancedb"), place.table, {})
        self._held = held_alone(place.out)
        with self._guarded():
            self._database = self._address.connect("the export to LanceDB needs")
        self._table: Any = None
        self._effort = 0

    def exists(self) -> bool:
        """Whether the table is there; LanceDB also lists a folder that a killed export has left, without a version."""
        with self._guarded():
            if self._place.table not in table_names(self._database):
                return False
            try:
                self._database.open_table(self._place.table)
            except ValueError as error:
                if "not found" in str(error):
                    return False
                raise
            return True

    def write(self, columns: Columns, about: Mapping[str, Any]) -> None:
        """Writes the table in one commit, and then its index.

        A reader of a table that is replaced sees the old version until the new one is whole.
        """
        names = fit_names(columns.schema.names, fit_name)
        changed = {fitted_name: name for name, fitted_name in names.items() if fitted_name != name}
        told = {METADATA_KEY: json.dumps({**about, "names": changed}).encode()}
        schema = pa.schema([field.with_name(names[field.name]) for field in columns.schema], metadata=told)

        def batches() -> Iterator[pa.RecordBatch]:
            for block in columns.blocks(_BATCH):
                yield from fitted(names, block).replace_schema_metadata(told).to_batches()

        mode = "overwrite" if self._place.force and self.exists() else "create"
        with self._guarded():
            data = pa.RecordBatchReader.from_batches(schema, batches())
            self._table = self._database.create_table(self._place.table, data=data, schema=schema, mode=mode)
            if about["num_images"] >= INDEX_FROM:
                self._make_index(columns, about["num_images"])

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Compares all vectors, or those of the lists that an index looks at."""
        return self._search(queries, k, self._effort)

    def ids(self) -> Iterator[tuple[int, str | None]]:
        """Number and id of every row."""
        wanted = [name for name in (ROW, ID) if name in self._table.schema.names]
        with self._guarded():
            for batch in self._table.search().select(wanted).to_batches(65_536):
                ids = batch[ID].to_pylist() if ID in wanted else [None] * batch.num_rows
                yield from zip(batch[ROW].to_pylist(), ids, strict=True)

    def close(self) -> None:
        """Lets others write to the folder."""
        self._held.close()

    def _make_index(self, columns: Columns, num_rows: int) -> None:
        """Builds lists over the vectors; as many of them are searched as reach the target on a sample."""
        kinds = require("lancedb.index", "lancedb", "the export to LanceDB needs")
        lists = kinds.IvfFlat(distance_type="dot", num_partitions=num_rows // _ROWS_PER_LIST)
        self._table.create_index(VECTOR, config=lists, wait_timeout=_PATIENCE)
        for name in (ROW, ID):
            if name in self._table.schema.names:
                self._table.create_index(name, config=kinds.BTree(), wait_timeout=_PATIENCE)
        answers = exact_answers(columns.index)
        assert answers is not None, "an index is made of many images"
        recall, self._effort = 0.0, 2
        while recall < TARGET_RECALL and self._effort < _MOST_EFFORT:
            self._effort *= 2
            recall = answers.recall_of(self._search(answers.queries, answers.k + 1, self._effort), columns.index)
        self._table.update_field_metadata({"path": VECTOR, "metadata": {EFFORT_KEY.decode(): str(self._effort)}})

    def _search(self, queries: np.ndarray, k: int, effort: int) -> np.ndarray:
        found = []
        with self._guarded():
            for query in queries:
                request = self._table.search(query, vector_column_name=VECTOR).distance_type("dot")
                request = request.nprobes(effort) if effort else request
                found.append(request.select([ROW, "_distance"]).limit(k).to_arrow()[ROW].to_pylist())
        return padded(found, k)

    def _guarded(self) -> Any:
        # What LanceDB itself raises are plain RuntimeErrors, OSErrors and ValueErrors of its native part.
        return said_in_one_line(
            self._place, "LanceDB", lambda error: "lance" in str(error).lower() or isinstance(error, OSError)
        )
