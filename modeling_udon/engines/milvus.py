"""Milvus: a collection on a server, or in a file of this machine by Milvus Lite."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.engines.columns import ID, ROW, VECTOR, Columns, fit_names
from modeling_udon.engines.store import (
    Place,
    draft_name,
    fitted,
    held_alone,
    is_draft,
    one_of_both,
    padded,
    said_in_one_line,
)
from modeling_udon.faults import require
from modeling_udon.search.found import json_value

_ROWS = 1_024
_EFFORT = 128
# What a VARCHAR holds, in bytes.
_MOST_BYTES = 65_535
# Names of fields that Milvus keeps for itself.
_RESERVED = {"rowid", "timestamp", "distance", "score"}


class MilvusStore:
    """A collection with a typed field for each column; what Milvus has no type for is kept as JSON.

    The token of a server is read from `MILVUS_TOKEN`.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._name = place, place.table
        where = one_of_both(place, "milvus")
        if place.out is not None and not place.out.endswith(".db"):
            raise ValueError(f"`out` must end in .db, by which Milvus Lite knows its file. Got {place.out!r}.")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", place.table):
            raise ValueError(f"`table` must be letters, digits and underscores for Milvus. Got {place.table!r}.")
        self._end = 0  # of the numbers of rows that were written
        self._library = require("pymilvus", "milvus", "the export to Milvus needs")
        if place.out is not None:
            require("milvus_lite", "milvus", "the export to a file needs")
        self._held = held_alone(place.out)
        with self._guarded():
            self._client = self._library.MilvusClient(where, token=os.environ.get("MILVUS_TOKEN", ""))

    def exists(self) -> bool:
        """Whether the collection is there."""
        with self._guarded():
            return bool(self._client.has_collection(self._name))

    def write(self, columns: Columns, about: Mapping[str, Any]) -> None:
        """Fills a new collection with a graph over its vectors, then gives it the name."""
        types, schema = self._library.DataType, columns.schema
        names = fit_names(schema.names, fit_name)
        made = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        kinds = {name: self._kind_of(schema.field(name).type) for name in schema.names}
        for name, kind in kinds.items():
            if name == ROW:
                made.add_field(names[name], types.INT64, is_primary=True)
            elif name == VECTOR:
                made.add_field(names[name], types.FLOAT_VECTOR, dim=about["dim"])
            else:
                size = {"max_length": _MOST_BYTES} if kind == types.VARCHAR else {}
                made.add_field(names[name], kind, nullable=True, **size)
        graph = self._client.prepare_index_params()
        graph.add_index(VECTOR, index_type="HNSW", metric_type="IP", params={"M": 16, "efConstruction": 200})
        with self._guarded():
            draft = self._new_draft()
            self._client.create_collection(draft, schema=made, index_params=graph)
            for block in columns.blocks(_ROWS):
                _check_lengths(block)
                self._end = max(self._end, *(row + 1 for row in block[ROW].to_pylist()))
                self._client.insert(draft, [json_value(line) for line in fitted(names, block).to_pylist()])
            self._client.flush(draft)
            if self._client.has_collection(self._name):
                self._client.drop_collection(self._name)
            self._client.rename_collection(draft, self._name)
            self._client.load_collection(self._name)  # Milvus Lite releases what it renames

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Searches with 128 candidates in the graph."""
        parameters = {"metric_type": "IP", "params": {"ef": max(_EFFORT, k)}}
        with self._guarded():
            answers = self._client.search(
                self._name, data=queries, limit=k, anns_field=VECTOR, search_params=parameters
            )
        return padded([[int(hit[ROW]) for hit in answer] for answer in answers], k)

    def ids(self) -> Iterator[tuple[int, str | None]]:
        """Number and id of every row."""
        with self._guarded():
            fields = [field["name"] for field in self._client.describe_collection(self._name)["fields"]]
            wanted = [name for name in (ROW, ID) if name in fields]
            for start in range(0, self._end, _ROWS):
                condition = f"{ROW} >= {start} and {ROW} < {start + _ROWS}"
                page = self._client.query(self._name, filter=condition, output_fields=wanted, limit=_ROWS)
                yield from ((int(line[ROW]), line.get(ID)) for line in page)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()
        self._held.close()

    def _new_draft(self) -> str:
        """A name for a collection that is being filled; drops what killed exports have left."""
        for name in self._client.list_collections():
            if is_draft(name, self._name):
                self._client.drop_collection(name)
        return draft_name(self._name)

    def _kind_of(self, kind: pa.DataType) -> Any:
        types = self._library.DataType
        if pa.types.is_boolean(kind):
            return types.BOOL
        if pa.types.is_integer(kind) and kind != pa.uint64():
            return types.INT64
        if pa.types.is_floating(kind):
            return types.DOUBLE
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_temporal(kind)
        return types.VARCHAR if is_text or pa.types.is_binary(kind) else types.JSON

    def _guarded(self) -> Any:
        modules = "pymilvus", "grpc", "milvus_lite"
        return said_in_one_line(
            self._place, "Milvus", lambda error: type(error).__module__.partition(".")[0] in modules
        )


def fit_name(name: str) -> str:
    """A name that Milvus takes for a field."""
    fitted = re.sub(r"[^A-Za-z0-9_]", "_", name)[:200]
    return f"_{fitted}" if not fitted or fitted[0].isdigit() or fitted.lower() in _RESERVED else fitted


def _check_lengths(block: pa.Table) -> None:
    for name in block.column_names:
        if pa.types.is_string(block.schema.field(name).type):
            for row, text in zip(block[ROW].to_pylist(), block[name].to_pylist(), strict=True):
                if text is not None and len(text.encode()) > _MOST_BYTES:
                    raise ValueError(
                        f"`index` must hold texts of at most {_MOST_BYTES:,} bytes for Milvus. Got a longer one in "
                        f"the column {name!r} of row {row}; index without that column."
                    )
