"""The index behind the service: searched in threads, beside the encoder."""

import asyncio
import base64
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from modeling_udon.encoder import Encoder
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.query import FoundImage, QueryResult, check_model, neighbours_of
from modeling_udon.search.thumbnails import find_thumbnail
from modeling_udon.serving.limits import Limits, refusal
from modeling_udon.serving.metrics import Metrics
from modeling_udon.serving.schemas import SearchBody

_NUM_SEARCHERS = 2
# Unit norm, as far as float32 and a client's rounding to a few digits allow.
_NORM_TOLERANCE = 1e-2


class IndexService:
    """An index that is searched on request.

    Args:
        folder: Folder that `udon index` wrote.
        encoder: The model that the index was made with, or one whose first dimensions it holds.
        limits: What requests may ask for.
        metrics: Where searches are counted.

    Raises:
        ValueError: If the folder is no index, or of another model.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: Encoder, limits: Limits, metrics: Metrics) -> None:
        self._index = ImageIndex(folder)
        dim = self._index.about.dim
        self._encoder = encoder.cut(dim) if dim in encoder.nested_dims else encoder
        check_model(self._index, self._encoder)
        self.name = Path(folder).resolve().name
        self._limits = limits
        self._metrics = metrics
        self._searchers = ThreadPoolExecutor(_NUM_SEARCHERS, "searcher")
        metrics.index_images.set(self._index.about.num_images)

    def describe(self) -> dict[str, Any]:
        """What the index is."""
        about = self._index.about
        return {
            "index": self.name,
            "kind": about.kind,
            "dim": about.dim,
            "num_images": about.num_images,
            "recall": about.recall,
            "domains": self._index.domains(),
        }

    async def search(self, query: np.ndarray, body: SearchBody) -> dict[str, Any]:
        """Searches for the images most like a query.

        Args:
            query: Its embedding, `(dim,)`.
            body: What is asked for.

        Raises:
            ServiceError: If the index has no such domain, or the query another dimension.
        """
        if body.k > self._limits.max_neighbours:
            raise refusal(f"`k` must be at most {self._limits.max_neighbours}. Got {body.k}; ask for fewer.", "k")
        vector = self._checked(query)
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._searchers, self._search, vector, body)
        except ValueError as error:
            raise refusal(str(error)) from error

    def close(self) -> None:
        """Ends the threads."""
        self._searchers.shutdown()

    def _checked(self, query: np.ndarray) -> np.ndarray:
        dim = self._index.about.dim
        if len(query) > dim and dim in self._encoder.nested_dims:
            query = query[:dim] / np.linalg.norm(query[:dim])
        if len(query) != dim:
            raise refusal(f"`vector` must have {dim} numbers. Got {len(query)}; embed it with this service.", "vector")
        norm = float(np.linalg.norm(query))
        if abs(norm - 1) > _NORM_TOLERANCE:
            raise refusal(f"`vector` must have unit norm. Got {norm:.3g}; divide it by its norm.", "vector")
        return query

    def _search(self, query: np.ndarray, body: SearchBody) -> dict[str, Any]:
        began = time.monotonic()
        found = neighbours_of(self._index, self._encoder, query[None], body.k, body.domain, body.thumbnails)[0]
        self._metrics.search_seconds.observe(time.monotonic() - began)
        calibration = self._encoder.calibration
        return {
            **{key: value for key, value in self.describe().items() if key in ("index", "num_images")},
            "threshold": None if calibration is None else calibration.threshold,
            "in_index": None if calibration is None else QueryResult("", found).is_known,
            "neighbours": [_shown(image, rank, body.thumbnails) for rank, image in enumerate(found, 1)],
        }


def _shown(image: FoundImage, rank: int, thumbnail: bool) -> dict[str, Any]:
    # Where the image lies on this machine is nothing that a client should know.
    shown = {name: value for name, value in image.to_json(rank).items() if name != "file"}
    if thumbnail:
        jpeg = find_thumbnail(image.thumbnail, image.file, image.sha256)
        shown["thumbnail"] = None if jpeg is None else base64.b64encode(jpeg).decode()
    return shown
