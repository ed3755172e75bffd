"""Qdrant: a collection on a server, or in a folder of this machine."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from modeling_udon.engines.columns import ID, ROW, VECTOR, Columns
from modeling_udon.engines.store import Place, draft_name, is_draft, one_of_both, padded, said_in_one_line
from modeling_udon.faults import require
from modeling_udon.search.found import json_value

_ROWS = 1_024
# Candidates that a search keeps in the graph of a server; its own default is that of the build, 100.
_EFFORT = 128


class QdrantStore:
    """A collection whose points have the rows' numbers as ids, and the columns as payload.

    Its name is an alias, which is given to the collection in one step when all points are in it. The key of a server is
    read from `QDRANT_API_KEY`.
    """

    def __init__(self, place: Place) -> None:
        self._place, self._name = place, place.table
        where = one_of_both(place, "qdrant")
        self._library = require("qdrant_client", "qdrant", "the export to Qdrant needs")
        with self._guarded():
            if place.url is not None:
                self._client = self._library.QdrantClient(url=where, api_key=os.environ.get("QDRANT_API_KEY"))
            else:
                self._client = self._library.QdrantClient(path=where)

    def exists(self) -> bool:
        """Whether the collection is there."""
        with self._guarded():
            return self._name in self._aliases() or bool(self._client.collection_exists(self._name))

    def write(self, columns: Columns, about: Mapping[str, Any]) -> None:
        """Fills a new collection, then gives it the name, and drops the one that had it."""
        models, draft = self._library.models, draft_name(self._name)
        with self._guarded():
            self._drop_drafts(kept=self._aliases().get(self._name))
            vectors = models.VectorParams(size=about["dim"], distance=models.Distance.DOT)
            self._client.create_collection(draft, vectors_config=vectors)
            for block in columns.blocks(_ROWS):
                payloads = block.drop_columns([ROW, VECTOR]).to_pylist()
                points = models.Batch(
                    ids=block[ROW].to_pylist(),
                    vectors=block[VECTOR].to_pylist(),
                    payloads=[json_value(payload) for payload in payloads],
                )
                self._client.upsert(draft, points=points, wait=True)
            self._publish(draft)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Searches with 128 candidates in the graph."""
        models = self._library.models
        # In a folder all vectors are compared, and parameters only warned of.
        parameters = None if self._place.url is None else models.SearchParams(hnsw_ef=_EFFORT)
        requests = [models.QueryRequest(query=query.tolist(), limit=k, params=parameters) for query in queries]
        with self._guarded():
            answers = self._client.query_batch_points(self._name, requests=requests)
        return padded([[int(point.id) for point in answer.points] for answer in answers], k)

    def ids(self) -> Iterator[tuple[int, str | None]]:
        """Number and id of every row."""
        place: Any = 0
        with self._guarded():
            while place is not None:
                points, place = self._client.scroll(self._name, limit=_ROWS, offset=place, with_payload=[ID])
                yield from ((int(point.id), point.payload.get(ID)) for point in points)

    def close(self) -> None:
        """Ends the connection."""
        self._client.close()

    def _aliases(self) -> dict[str, str]:
        return {alias.alias_name: alias.collection_name for alias in self._client.get_aliases().aliases}

    def _publish(self, draft: str) -> None:
        models = self._library.models
        change: list[Any] = []
        if self._name in self._aliases():
            change.append(models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self._name)))
        elif self._client.collection_exists(self._name):
            self._client.delete_collection(self._name)
        alias = models.CreateAlias(collection_name=draft, alias_name=self._name)
        self._client.update_collection_aliases([*change, models.CreateAliasOperation(create_alias=alias)])
        self._drop_drafts(kept=draft)

    def _drop_drafts(self, kept: str | None) -> None:
        """Drops what killed exports have left, and the collection that was replaced."""
        for collection in self._client.get_collections().collections:
            if is_draft(collection.name, self._name) and collection.name != kept:
                self._client.delete_collection(collection.name)

    def _guarded(self) -> Any:
        modules = "qdrant_client", "httpx", "grpc", "portalocker", "sqlite3"
        return said_in_one_line(
            self._place,
            "Qdrant",
            lambda error: type(error).__module__.partition(".")[0] in modules or isinstance(error, RuntimeError),
        )
