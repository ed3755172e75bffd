"""The index behind the service: searched in threads beside the encoder, changed in whole commits."""

import asyncio
import base64
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from modeling_udon.encoder import Encoder
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.catalogue import Catalogue, Changed
from modeling_udon.search.commits import MANY_ROWS, way_to_be_quick
from modeling_udon.search.followed import FollowedIndex
from modeling_udon.search.found import FoundImage, QueryResult
from modeling_udon.search.image_index import OWN_COLUMNS
from modeling_udon.search.letterbox import is_letterboxed
from modeling_udon.search.query import neighbours_of
from modeling_udon.search.thumbnails import find_thumbnail
from modeling_udon.serving.images import ReadImage
from modeling_udon.serving.limits import Limits, ServiceError, refusal
from modeling_udon.serving.metrics import Metrics
from modeling_udon.serving.schemas import AddBody, RemoveBody, SearchBody
from modeling_udon.storage import InUseError

_NUM_SEARCHERS = 2
_WAIT_FOR_WRITERS = 10.0
# Unit norm, as far as float32 and a client's rounding to a few digits allow.
_NORM_TOLERANCE = 1e-2
# As `udon embed` names rows.
_ID_DIGITS = 32
# Facts of an image have their types also where the index lacks the column or holds nothing in it.
_TYPES = {"num_bytes": pa.int64(), "mtime": pa.int64(), "thumbnail": pa.binary()}

Answer = TypeVar("Answer")

_log = logging.getLogger(__name__)


class IndexService:
    """An index that is searched and changed on request.

    Other commands may change it too: each search sees the newest commit.

    Args:
        index: Folder that `udon index` wrote, or an opened index, which is only read.
        encoder: The model that the index was made with, or one whose first dimensions it holds.
        limits: What requests may ask for.
        metrics: Where searches are counted.

    Raises:
        ValueError: If the folder is no index, or of another model.
    """

    def __init__(
        self, index: str | os.PathLike[str] | AnyIndex, encoder: Encoder, limits: Limits, metrics: Metrics
    ) -> None:
        opened: AnyIndex
        self._catalogue: Catalogue | None = None
        # Of a place, clients learn the last name alone.
        if isinstance(index, str | os.PathLike):
            self._catalogue = Catalogue(index, wait=_WAIT_FOR_WRITERS)
            self.name, opened = Path(index).resolve().name, self._catalogue.index
        else:
            self.name, opened = str(index).rstrip("/").rpartition("/")[2], index
        self._followed = FollowedIndex(opened, encoder)
        self._encoder = self._followed.model
        self._limits = limits
        self._metrics = metrics
        self._version_seen, self._has_advised = -1, False
        self._snapshot()
        self._searchers = ThreadPoolExecutor(_NUM_SEARCHERS, "searcher")
        # One, since a commit locks the index.
        self._writer = ThreadPoolExecutor(1, "writer")

    @property
    def is_letterboxed(self) -> bool:
        """Whether the images of the index were padded to squares."""
        return is_letterboxed(self._encoder)

    async def describe(self) -> dict[str, Any]:
        """What the index is."""
        return await _called(self._searchers, self._describe)

    def _describe(self) -> dict[str, Any]:
        index = self._snapshot()
        about = index.about
        return {
            "index": self.name,
            "version": index.version,
            "kind": about.kind,
            "dim": about.dim,
            "num_images": about.num_images,
            "recall": about.recall,
            "domains": index.domains(),
            "columns": index.user_columns,
        }

    async def search(self, query: np.ndarray | None, body: SearchBody) -> dict[str, Any]:
        """Searches for the images most like a query.

        Args:
            query: Its embedding, `(dim,)`; `None` for an image of the index.
            body: What is asked for.

        Raises:
            ServiceError: 400 for a query or a filter that does not fit the index.
        """
        if body.k > self._limits.max_neighbours:
            raise refusal(f"`k` must be at most {self._limits.max_neighbours}. Got {body.k}; ask for fewer.", "k")
        return await _called(self._searchers, lambda: self._search(query, body))

    async def add(self, images: Sequence[ReadImage], body: AddBody) -> dict[str, Any]:
        """Adds images in one commit.

        Args:
            images: The images of `body`, read.
            body: What is asked for.

        Raises:
            ServiceError: 400 for columns that do not fit the index, 409 where another process holds it.
        """
        catalogue = self.writable()
        dim = self._encoder.dim
        vectors = np.stack([image.embedding for image in images])[:, :dim]
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        def commit() -> dict[str, Any]:
            table = _table(images, body, catalogue.index.schema)
            changed = catalogue.add(vectors, table, replace=body.replace)
            return self._told(changed) | {"ids": table["id"].to_pylist(), "rows": changed.rows.tolist()}

        return await _called(self._writer, commit)

    async def remove(self, body: RemoveBody) -> dict[str, Any]:
        """Removes images in one commit.

        Raises:
            ServiceError: 400 for what is not in the index, 409 where another process holds it.
        """
        catalogue = self.writable()
        named = {"ids": body.ids, "rows": body.rows, "where": body.where, "missing_ok": body.missing_ok}
        return await _called(self._writer, lambda: self._told(catalogue.remove(**named)))  # type: ignore[arg-type]

    def writable(self) -> Catalogue:
        """The index as what changes are made to.

        Raises:
            ServiceError: 403 where it is only read.
        """
        if self._catalogue is None:
            raise ServiceError(
                403,
                f"the index must be a folder of udon index to be changed. Got {self.name!r}, a table that is only read "
                "here; change the index that it was exported from.",
                code="read_only_index",
            )
        return self._catalogue

    def close(self) -> None:
        """Ends the threads; commits that have begun are ended first."""
        self._searchers.shutdown()
        self._writer.shutdown()

    def _snapshot(self) -> AnyIndex:
        index = self._followed.newest()
        self._metrics.index_images.set(index.about.num_images)
        if index.version != self._version_seen and not self._has_advised:
            self._version_seen = index.version
            if advice := way_to_be_quick(index, MANY_ROWS):
                self._has_advised = True
                _log.warning("%s: %s", self.name, advice)
        return index

    def _search(self, query: np.ndarray | None, body: SearchBody) -> dict[str, Any]:
        began = time.monotonic()
        index, own = self._snapshot(), np.empty(0, np.int64)
        if query is None:
            own = np.array([body.row]) if body.row is not None else index.rows_of([str(body.id)])
            if not len(own):
                raise refusal(f"`id` must be of the index. Got {body.id!r}, which is not there.", "id")
            query = index.vectors(own[:1])[0]
        vector = self._fitting(query)
        filters = {"where": body.where, "group_by": body.group_by, "exclude": [own.tolist()]}
        found = neighbours_of(index, self._encoder, vector[None], body.k, body.domain, body.thumbnails, **filters)[0]
        self._metrics.search_seconds.observe(time.monotonic() - began)
        calibration = self._encoder.calibration
        return {
            "index": self.name,
            "version": index.version,
            "num_images": index.about.num_images,
            "threshold": None if calibration is None else calibration.threshold,
            "in_index": None if calibration is None else QueryResult("", found).is_known,
            "neighbours": [_shown(image, rank, body.thumbnails) for rank, image in enumerate(found, 1)],
        }

    def _fitting(self, query: np.ndarray) -> np.ndarray:
        dim = self._encoder.dim
        if len(query) > dim and dim in self._encoder.nested_dims:
            query = query[:dim] / np.linalg.norm(query[:dim])
        if len(query) != dim:
            raise refusal(f"`vector` must have {dim} numbers. Got {len(query)}; embed it with this service.", "vector")
        norm = float(np.linalg.norm(query.astype(np.float64)))
        if abs(norm - 1) > _NORM_TOLERANCE:
            raise refusal(f"`vector` must have unit norm. Got {norm:.3g}; divide it by its norm.", "vector")
        return query

    def _told(self, changed: Changed) -> dict[str, Any]:
        index = self._snapshot()
        told = {"num_added": changed.num_added, "num_removed": changed.num_removed}
        return told | {"num_images": index.about.num_images, "version": index.version}


async def _called(threads: Executor, call: Callable[[], Answer]) -> Answer:
    """Calls a function in a thread; what is wrong with its values is an answer."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
    except InUseError as error:
        raise ServiceError(409, str(error), code="index_in_use", retry_after=1) from error
    except ValueError as error:
        raise refusal(str(error)) from error


def _table(images: Sequence[ReadImage], body: AddBody, schema: pa.Schema) -> pa.Table:
    """The rows of new images, with the types that the index has.

    They have no time of change: the path that a client gives is a name, and no file of this machine is looked for.
    """
    known = {column.name: column.type for column in schema}
    names = list(dict.fromkeys(name for image in body.images for name in image.columns))
    if taken := set(names) & {*OWN_COLUMNS, "file"}:
        raise refusal(
            f"`columns` must not name {min(taken)!r}, which is the index's own. Got it; rename it.", "columns"
        )
    ids = [image.id or read.sha256[:_ID_DIGITS] for image, read in zip(body.images, images, strict=True)]
    own: dict[str, list[Any]] = {
        "path": [image.path or own_id for image, own_id in zip(body.images, ids, strict=True)],
        "id": ids,
        "sha256": [read.sha256 for read in images],
        "num_bytes": [read.num_bytes for read in images],
        "mtime": [None] * len(images),
        "domain": [image.domain for image in body.images],
        "thumbnail": [read.thumbnail for read in images],
    }
    wanted = {name for name in own if name in known or name in ("path", "id", "mtime")}
    wanted |= {"domain"} if any(image.domain for image in body.images) else set()
    values = {name: of for name, of in own.items() if name in wanted}
    values |= {name: [image.columns.get(name) for image in body.images] for name in names}
    types = {**_TYPES, **known}
    return pa.table({name: _column(name, of, types.get(name)) for name, of in values.items()})


def _column(name: str, values: list[Any], kind: pa.DataType | None) -> pa.Array:
    try:
        found = pa.array(values)
        return found if kind is None or found.type == kind else found.cast(kind)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise refusal(
            f"`columns` must hold values of one type, for {name!r} {kind or 'any'}. Got others ({reason}); "
            "change them.",
            "columns",
        ) from error


def _shown(image: FoundImage, rank: int, thumbnail: bool) -> dict[str, Any]:
    # Where the image lies on this machine is nothing that a client should know.
    shown = {name: value for name, value in image.to_json(rank).items() if name != "file"}
    if thumbnail:
        jpeg = find_thumbnail(image.thumbnail, image.file, image.sha256)
        shown["thumbnail"] = None if jpeg is None else base64.b64encode(jpeg).decode()
    return shown
