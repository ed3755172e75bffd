"""`udon search`: query images through the model, their neighbours in an index, as a table or as JSON."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from modeling_udon.calibration import Calibration
from modeling_udon.encoder import Encoder, fastest_device
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.commits import MANY_ROWS, way_to_be_quick
from modeling_udon.search.found import FoundImage, QueryResult, SearchResults
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.letterbox import letterboxed
from modeling_udon.search.queries import QueryBatch, QueryReader
from modeling_udon.search.source_spec import Box


@dataclass(frozen=True)
class Combination:
    """How several pictures are one query: by the mean of their embeddings, or by the best score of any."""

    name: Literal["mean", "max"]

    def search(
        self, index: AnyIndex, vectors: np.ndarray, k: int, excluded: Sequence[Collection[int]], **filters: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the nearest, of shape `(1, num_found)`; what any of the pictures excludes is excluded."""
        gone = [sorted(set().union(*map(set, excluded)))]
        if self.name == "mean":
            mean = vectors.mean(axis=0, keepdims=True, dtype=np.float64)
            mean /= max(float(np.linalg.norm(mean)), 1e-12)
            return index.search(mean.astype(np.float32), k, exclude=gone, **filters)
        scores, rows = (found.ravel() for found in index.search(vectors, k, exclude=gone * len(vectors), **filters))
        # The best of all are among the best of each, row by row as group by group.
        kept: dict[Any, int] = {}
        for place in np.lexsort((rows, -scores)):
            if rows[place] >= 0 and len(kept) < k:
                kept.setdefault(_group(index, int(rows[place]), filters["group_by"]), int(place))
        places = list(kept.values())
        return scores[None, places], rows[None, places]


def _group(index: AnyIndex, row: int, column: str | None) -> Any:
    if column is None:
        return "row", row
    values = index.describe(row, thumbnail=False)
    value = values.get(column, values["columns"].get(column))
    return ("row", row) if value is None else value


@dataclass(frozen=True)
class SearchOptions:
    """What is searched for, and where.

    Attributes:
        k: Neighbours of each query.
        domain: Search among the images of this domain only.
        where: Search among the images for which this SQL condition on the columns is true.
        group_by: A column of whose values each is found once.
        rerank: See `ImageIndex.search`.
        exclude_self: Whether images of the index with the bytes of the query are left out.
        combine: `"mean"` or `"max"`: all queries are one; `None`: each is its own.
        thumbnails: Whether neighbours come with the thumbnails that were kept.
    """

    k: int = 5
    domain: str | None = None
    where: str | None = None
    group_by: str | None = None
    rerank: int = 0
    exclude_self: bool = False
    combine: Literal["mean", "max"] | None = None
    thumbnails: bool = False

    @property
    def filters(self) -> dict[str, Any]:
        """What `ImageIndex.search` takes of it."""
        return {key: getattr(self, key) for key in ("domain", "where", "group_by", "rerank")}


class Search:
    """An opened index with the model of its queries, which is opened when a picture is to be embedded.

    Args:
        index: Folder that `udon index` wrote, or an opened index.
        model: The model that the index was made with, or what loads it; `None` for queries that need none. It goes to
            the GPU, if there is one.
        options: What is searched for.
    """

    def __init__(
        self,
        index: str | os.PathLike[str] | AnyIndex,
        model: Callable[[], Encoder] | Encoder | None,
        options: SearchOptions,
    ) -> None:
        self.index = ImageIndex(index) if isinstance(index, str | os.PathLike) else index
        self.options = options
        self._given = model
        known = self.index.domains()
        if options.domain is not None and options.domain not in known:
            listed = ", ".join(known) or "none, since its images were embedded without"
            raise ValueError(f"`domain` must be one of the index: {listed}. Got {options.domain!r}.")

    @cached_property
    def model(self) -> Encoder:
        """The model, fitted to the index."""
        if self._given is None:
            raise ValueError("`model` must be given where queries are pictures. Got none; give --model.")
        loaded = self._given if isinstance(self._given, Encoder) else self._given()
        return fitted_model(self.index, loaded).to(fastest_device())

    def results(self, batches: Iterable[QueryBatch]) -> Iterator[QueryResult]:
        """Answers queries as they come."""
        if self.options.combine is not None:
            yield from self._combined(list(batches))
            return
        for batch in batches:
            found = self.index.search(
                batch.vectors, self.options.k, exclude=self._own_rows(batch), **self.options.filters
            )
            yield from self._named(batch.names, *found)

    def _combined(self, batches: Sequence[QueryBatch]) -> Iterator[QueryResult]:
        names = [name for batch in batches for name in batch.names]
        if not names or self.options.combine is None:
            return
        vectors = np.concatenate([batch.vectors for batch in batches])
        own = [rows for batch in batches for rows in self._own_rows(batch)]
        way = Combination(self.options.combine)
        found = way.search(self.index, vectors, self.options.k, own, **self.options.filters)
        title = names[0] if len(names) == 1 else f"{self.options.combine} of {len(names):,}: {', '.join(names[:3])}"
        yield from self._named([title + (", ..." if len(names) > 3 else "")], *found)

    def _own_rows(self, batch: QueryBatch) -> list[Collection[int]]:
        """For each query the rows that are left out: itself by its number, or what has its bytes."""
        return [
            [row] if row >= 0 else self._with_digest(digest)
            for row, digest in zip(batch.rows, batch.digests, strict=True)
        ]

    def _with_digest(self, digest: str | None) -> list[int]:
        if not self.options.exclude_self or digest is None:
            return []
        if isinstance(self.index, ImageIndex):
            return self.index.rows_with("sha256", [digest]).get(digest, np.empty(0, np.int64)).tolist()
        return self.index.select(where=f"sha256 = '{digest}'").tolist() if digest.isalnum() else []

    def _named(self, names: Sequence[str], scores: np.ndarray, rows: np.ndarray) -> Iterator[QueryResult]:
        # Without a picture to embed, no model is opened for its threshold alone.
        calibration = self.model.calibration if self._given is not None else None
        for name, line_scores, line in zip(names, scores, rows, strict=True):
            neighbours = [
                _found(self.index, calibration, int(row), float(score), self.options.thumbnails)
                for score, row in zip(line_scores, line, strict=True)
                if row >= 0
            ]
            yield QueryResult(name, neighbours)


def search_images(
    queries: Sequence[str | os.PathLike[str]],
    index: str | os.PathLike[str] | AnyIndex,
    model: Callable[[], Encoder] | Encoder | None = None,
    k: int = 5,
    domain: str | None = None,
    batch_size: int = 32,
    num_workers: int | None = None,
    thumbnails: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    *,
    where: str | None = None,
    group_by: str | None = None,
    rerank: int = 0,
    exclude_self: bool = False,
    combine: Literal["mean", "max"] | None = None,
    like: Sequence[str] = (),
    box: Box | None = None,
    on_result: Callable[[QueryResult], None] | None = None,
) -> SearchResults:
    """Searches an index for the images most like each query.

    Args:
        queries: Image files, folders or lists of them, `-` for a list on the standard input; folders or Parquet files
            of embeddings by the same model.
        index: Folder that `udon index` wrote, or an opened index.
        model: The model that the index was made with, or what loads it once the rest is known to be right. It goes to
            the GPU, if there is one. `None` where no query is a picture.
        k: Neighbours a query.
        domain: Search among the images of this domain only.
        batch_size: Images of one forward pass.
        num_workers: Processes that decode; `None`: the cores but one, and no more than there are batches.
        thumbnails: Whether neighbours come with the thumbnails that were kept.
        warn: Called with a line for each query that cannot be read, for each folder with what was passed over, and
            for an index that changes have made slow.
        where: Search among the images for which this SQL condition on the columns is true.
        group_by: A column of whose values each is found once.
        rerank: So many candidates get their exact scores, in kinds that compress; 0 for none.
        exclude_self: Whether images of the index with the bytes of the query are left out.
        combine: `"mean"` or `"max"`: all queries are one, by the mean of their embeddings or the best score of any.
        like: Ids of images of the index, or `row:N`, that are queries too; they themselves are left out.
        box: Left, top, width and height in pixels of the part of each picture that is the query.
        on_result: Called with each result as it comes; none are then kept.

    Raises:
        ValueError: If a query, the domain or a column does not exist, the index is of another model, or no query can
            be read.
    """
    options = SearchOptions(k, domain, where, group_by, rerank, exclude_self, combine, thumbnails)
    search = Search(index, model, options)
    reader = QueryReader(search.index, lambda: search.model, batch_size, num_workers, box, exclude_self, warn)
    names = [os.fspath(query) for query in queries]
    reader.check(names)
    results: list[QueryResult] = []
    num_results = 0
    for result in search.results(reader.batches(names, like)):
        num_results += 1
        (results.append if on_result is None else on_result)(result)
    if not num_results:
        raise ValueError(f"`queries` must hold an image that can be read. Got none in {len(names)} file(s).")
    if advice := way_to_be_quick(search.index, MANY_ROWS):
        warn(f"{index}: {advice}")
    about, title = search.index.about, search.index.about.model if model is None else search.model.name
    calibration = None if model is None else search.model.calibration
    return SearchResults(results, str(index), about.kind, about.num_images, title, domain, calibration)


def fitted_model(index: AnyIndex, model: Encoder) -> Encoder:
    """The model as the index was made with it: cut to its dimension, padding images where they were padded.

    Raises:
        ValueError: If it is another model.
    """
    if index.about.dim in model.nested_dims:
        model = model.cut(index.about.dim)
    if index.about.letterbox:
        model = letterboxed(model)
    check_model(index, model)
    return model


def check_model(index: AnyIndex, model: Encoder) -> None:
    """Refuses a model that the index was not made with.

    Raises:
        ValueError: If the dimension or the fingerprint differs.
    """
    about = index.about
    for what, expected, got in (
        ("dimension", about.dim, model.dim),
        ("fingerprint", about.fingerprint, model.fingerprint),
    ):
        if expected != got:
            raise ValueError(
                f"`model` must be the one that the index was made with: {about.model}, {what} {expected}. "
                f"Got {model.name}, {what} {got}; use that model, or embed and index the images with this one."
            )


def neighbours_of(
    index: AnyIndex,
    model: Encoder,
    embeddings: np.ndarray,
    k: int,
    domain: str | None,
    thumbnails: bool,
    **filters: Any,
) -> list[list[FoundImage]]:
    """Searches an opened index for the images most like each query, best first.

    Args:
        index: The index.
        model: The model that it was made with; see `check_model`.
        embeddings: Those of the queries, of shape `(num_queries, dim)`.
        k: Neighbours of each query.
        domain: Search among the images of this domain of the index only.
        thumbnails: Whether neighbours come with the thumbnails that were kept.
        filters: Further options of `ImageIndex.search`.
    """
    scores, rows = index.search(embeddings, k, domain, **filters)
    return [
        [
            _found(index, model.calibration, int(row), float(score), thumbnails)
            for score, row in zip(*found, strict=True)
            if row >= 0
        ]
        for found in zip(scores, rows, strict=True)
    ]


def _found(index: AnyIndex, calibration: Calibration | None, row: int, score: float, thumbnail: bool) -> FoundImage:
    values = index.describe(row, thumbnail)
    return FoundImage(
        row,
        values.get("id"),
        values.get("sha256"),
        score,
        path=values["path"],
        file=values["file"],
        domain=values.get("domain"),
        columns=values["columns"],
        thumbnail=values.get("thumbnail"),
        accepted=None if calibration is None else score >= calibration.threshold_of(values.get("domain")),
    )
