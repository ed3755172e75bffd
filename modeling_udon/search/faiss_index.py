"""FAISS indexes: the kinds that `udon index` builds, and how each is searched."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

from modeling_udon.search.coarse import LISTS_FOR_GRAPH, points_per_list

KINDS = ("flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary")
# Up to here exact search answers in a few milliseconds on one core; beyond the next one, vectors are compressed.
FLAT_UP_TO = 200_000
IVF_UP_TO = 10_000_000
# So many rows of a filter are compared one by one: that takes no longer than finding the best lists among them.
_FEW_ROWS = 2_000
# A byte tells so many codewords from each other.
LEAST_FOR_PQ = 256
_SEED = 0
# Up to here added rows are compared one by one.
_FEW_ADDED = 20_000
# What it takes to begin with a list of an index, in rows.
_LIST_COST = 150
# Up to this share of an index, the rows of a filter are copied: scattered over their lists they are slow to look at.
_COPIED_SHARE = 0.3


def choose_kind(num_images: int) -> str:
    """The kind for a number of images: exact while that is quick, compressed only when memory may be short."""
    if num_images <= FLAT_UP_TO:
        return "flat"
    return "ivf" if num_images <= IVF_UP_TO else "ivfpq"


def empty_index(kind: str, dim: int, num_images: int) -> Any:
    """Makes an index to be trained and filled.

    Args:
        kind: One of `KINDS`.
        dim: Size of an embedding.
        num_images: How many embeddings it will hold.

    Raises:
        ValueError: If these are too few for the kind.
    """
    if kind in ("pq", "ivfpq") and num_images < LEAST_FOR_PQ:
        raise ValueError(
            f"`kind` {kind!r} needs at least {LEAST_FOR_PQ} images. Got {num_images}; use kind 'flat' or 'sq8'."
        )
    num_bytes = max(size for size in range(1, max(dim // 2, 1) + 1) if dim % size == 0)
    num_lists = max(min(int(4 * num_images**0.5), num_images // 39), 1)
    graph = "_HNSW32" if num_lists >= LISTS_FOR_GRAPH else ""
    factory = {
        "flat": "Flat",
        "sq8": "SQ8",
        "hnsw": "HNSW32,Flat",
        # Bare PQ takes no filter; with one list it is the same and takes one. "np" spares FAISS the ordering of codes
        # for a search by Hamming distance, which is slow to train and not used here.
        "pq": f"IVF1,PQ{num_bytes}x8np",
        "ivf": f"IVF{num_lists}{graph},Flat",
        "ivfpq": f"IVF{num_lists}{graph},PQ{num_bytes}x8np",
        # One bit per dimension, by its sign after centring, with two correction factors (arXiv 2405.12497).
        "binary": "RaBitQ",
    }[kind]
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVF):
        index.cp.min_points_per_centroid = 1  # small indexes are fine; the recall says how good they are
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.min_points_per_centroid = 1
    return index


def empty_like(index: Any, num_images: int) -> Any:
    """An index for rows that are added to another: exact where they are few, else with its lists or a graph."""
    if num_images > _FEW_ADDED:
        if isinstance(index, faiss.IndexIVF):
            return _empty_part(index)
        if isinstance(index, faiss.IndexHNSW):
            return empty_index("hnsw", index.d, num_images)
    return faiss.IndexFlat(index.d, faiss.METRIC_INNER_PRODUCT)


def num_training_rows(index: Any) -> int:
    """As many as FAISS uses, 256 for each list; fewer where there are many lists."""
    if not isinstance(index, faiss.IndexIVF):
        return 2**16
    return max(points_per_list(index.nlist, index.d) * index.nlist, 2**16)


def search_faiss(
    index: Any, queries: np.ndarray, k: int, effort: int | None, selector: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Searches with an effort, or with `None` exhaustively, in what the selector lets through."""
    selected = {} if selector is None else {"sel": selector}
    parameters: Any
    if isinstance(index, faiss.IndexHNSW):
        if effort is None:
            return search_faiss(faiss.downcast_index(index.storage), queries, k, None, selector)
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k), **selected)  # type: ignore[attr-defined]
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=effort or index.nlist, **selected)  # type: ignore[call-arg]
    elif isinstance(index, faiss.IndexRaBitQ):
        parameters = faiss.RaBitQSearchParameters(**selected)
    else:
        parameters = faiss.SearchParameters(**selected)
    return index.search(queries, k, params=parameters)


def sample_rows(num_images: int, size: int) -> np.ndarray:
    """Rows of a random sample, ascending, the same each time; all rows, where there are no more."""
    generator = np.random.default_rng(_SEED)
    return np.sort(generator.choice(num_images, size=min(size, num_images), replace=False))


def search_others(
    index: Any, queries: np.ndarray, own_rows: np.ndarray, k: int, effort: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Searches for the neighbours of images of the index, themselves left out.

    Args:
        index: The index.
        queries: Of shape `(num_queries, dim)`, float32.
        own_rows: Of shape `(num_queries,)`: the row that is the query itself, -1 for none.
        k: Neighbours of each query.
        effort: See `search_faiss`.

    Returns:
        Scores and rows, of shape `(num_queries, min(k, num_images - 1))`.
    """
    scores, rows = search_faiss(index, queries, min(k + 1, index.ntotal), effort)
    left_out = rows == own_rows[:, None]
    # Where a query was not found itself, its last neighbour gives way, so that all keep as many.
    left_out[~left_out.any(axis=1), -1] = True
    shape = len(queries), rows.shape[1] - 1
    return scores[~left_out].reshape(shape), rows[~left_out].reshape(shape)


def efforts_of(index: Any) -> tuple[list[int], str]:
    """The efforts to try in turn, and what the most is."""
    if isinstance(index, faiss.IndexHNSW):
        return [2**power for power in range(4, 11)], "1024 candidates"
    if isinstance(index, faiss.IndexIVF) and index.nlist > 1:
        return [2**power for power in range(index.nlist.bit_length()) if 2**power < index.nlist] + [index.nlist], (
            f"{index.nlist} lists"
        )
    return [0], ""


@dataclass(frozen=True)
class RowFilter:
    """Rows that a search may find.

    Attributes:
        rows: Them, ascending, int64.
        selector: The same as FAISS takes it.
        lists: The inverted lists that hold some of them, for an index with lists.
        vectors: Their vectors, of shape `(num_rows, dim)`, for an index that holds these, without lists or with so much
            effort that all would be looked at; `None` where they are too many to copy.
    """

    rows: np.ndarray
    selector: Any
    lists: "_FilteredLists | None" = None
    vectors: np.ndarray | None = None


@dataclass(frozen=True)
class _FilteredLists:
    """The inverted lists of a filter.

    Attributes:
        numbers: Those that hold rows of the filter.
        counts: How many each holds.
        centroids: Their centroids, of shape `(num_lists, dim)`.
        index: An index of the filter's rows alone under the same list numbers, `None` where they are too many to copy.
    """

    numbers: np.ndarray
    counts: np.ndarray
    centroids: np.ndarray
    index: Any


def make_filter(index: Any, allowed: np.ndarray, effort: int) -> RowFilter:
    """Makes a filter of an index.

    Args:
        index: The index.
        allowed: Of shape `(num_images,)`: whether a search may find a row.
        effort: That of the searches to come; 0 for an exhaustive one.
    """
    selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))  # type: ignore[arg-type, call-arg]
    rows = np.flatnonzero(allowed)
    is_copied = len(rows) <= _COPIED_SHARE * index.ntotal
    if not isinstance(index, faiss.IndexIVF):
        # A graph leads to what is near, and where that is of other domains, never to rows of this one.
        flat = faiss.downcast_index(index.storage) if isinstance(index, faiss.IndexHNSW) else index
        is_copied = is_copied and isinstance(flat, faiss.IndexFlat)
        return RowFilter(rows, selector, vectors=flat.reconstruct_batch(rows) if is_copied else None)
    if is_copied and isinstance(index, faiss.IndexIVFFlat) and _cost(index, effort) >= len(rows):
        vectors = np.empty((len(rows), index.d), np.float32)
        for _, ids, codes in _filtered_lists(index, allowed):
            vectors[np.searchsorted(rows, ids)] = codes.view(np.float32)
        return RowFilter(rows, selector, vectors=vectors)
    part = _empty_part(index) if is_copied else None
    counts = np.zeros(index.nlist, dtype=np.int64)
    for number, ids, codes in _filtered_lists(index, allowed):
        counts[number] = len(ids)
        if part is not None:
            part.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    numbers = np.flatnonzero(counts)
    centroids = index.quantizer.reconstruct_n(0, index.nlist)[numbers]
    return RowFilter(rows, selector, _FilteredLists(numbers, counts[numbers], centroids, part))


def _filtered_lists(index: Any, allowed: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, allowed rows and their codes of each inverted list that holds any."""
    lists: Any = index.invlists
    for number in range(index.nlist):
        size = lists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            kept = np.flatnonzero(allowed[ids])
            if len(kept):
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size).reshape(size, -1)
                yield number, np.ascontiguousarray(ids[kept]), np.ascontiguousarray(codes[kept])


def _cost(index: Any, effort: int) -> int:
    """What a search among the rows of a filter may cost, in rows."""
    return 3 * (effort or index.nlist) * (index.ntotal // index.nlist + _LIST_COST)


def search_filtered(
    index: Any, queries: np.ndarray, k: int, effort: int, chosen: RowFilter
) -> tuple[np.ndarray, np.ndarray]:
    """Searches among the rows of a filter, which are looked for and not picked out of what was found.

    Of an index with lists, more of them are looked at than an unfiltered search looks at rows: the nearest of a tenth
    of all rows are farther away than the nearest of all, and harder to find. Of the other kinds, all are.

    Args:
        index: The index.
        queries: Of shape `(num_queries, dim)`, float32.
        k: Neighbours of each query, at most as many as the filter has rows.
        effort: The index's own.
        chosen: The filter.
    """
    if chosen.lists is not None:
        return _search_lists(index, queries, k, _cost(index, effort), chosen, chosen.lists)
    if chosen.vectors is not None:
        scores, places = faiss.knn(queries, chosen.vectors, k, faiss.METRIC_INNER_PRODUCT)
        return scores, chosen.rows[places]
    return search_faiss(index, queries, k, None, chosen.selector)


def _empty_part(index: Any) -> Any:
    """An empty index with the lists and codes of another."""
    shape = index.quantizer, index.d, index.nlist
    if isinstance(index, faiss.IndexIVFPQ):
        part: Any = faiss.IndexIVFPQ(*shape, index.pq.M, index.pq.nbits, index.metric_type)
        part.pq, part.by_residual = index.pq, index.by_residual
    else:
        part = faiss.IndexIVFFlat(*shape, index.metric_type)
    part.is_trained = True
    return part


def _search_lists(
    index: Any, queries: np.ndarray, k: int, cost: int, chosen: RowFilter, held: _FilteredLists
) -> tuple[np.ndarray, np.ndarray]:
    """Searches the lists nearest to each query that hold rows of the filter, as many as the cost allows.

    The cost is counted in rows; a list costs `_LIST_COST` of them besides its own.
    """
    num_rows, num_lists = len(chosen.rows), len(held.numbers)
    least = min(max(_FEW_ROWS, k), num_rows)
    products = queries @ held.centroids.T  # (num_queries, num_lists)
    # The nearest few are told from the others before they are ordered; twice the mean is nearly always enough.
    mean = num_rows / num_lists
    few = int(2 * max(cost / (mean + _LIST_COST), least / mean)) + 16
    for number in (min(few, num_lists), num_lists):
        order = _nearest(products, number)
        rows_so_far = np.cumsum(held.counts[order], axis=1)
        paid = rows_so_far + _LIST_COST * np.arange(1, number + 1) >= cost
        enough = (paid & (rows_so_far >= least)) | (rows_so_far == num_rows)
        if enough[:, -1].all():
            break
    last = enough.argmax(axis=1)
    order = order[:, : last.max() + 1]
    unused = np.arange(order.shape[1]) > last[:, None]
    lists = np.where(unused, -1, held.numbers[order])
    distances = np.take_along_axis(products, order, axis=1)
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    selected = {} if held.index is not None else {"sel": chosen.selector}
    parameters = faiss.SearchParametersIVF(nprobe=order.shape[1], **selected)  # type: ignore[call-arg]
    # The wrapper of FAISS takes no parameters.
    arrays = [np.ascontiguousarray(array) for array in (lists, distances)]
    pointers = [faiss.swig_ptr(array) for array in (*arrays, scores, rows)]
    searched = index if held.index is None else held.index
    searched.search_preassigned_c(len(queries), faiss.swig_ptr(queries), k, *pointers, False, parameters)
    return scores, rows


def _nearest(products: np.ndarray, number: int) -> np.ndarray:
    """Columns of the largest products of each row, largest first: `(num_queries, number)`."""
    if number < products.shape[1]:
        columns = np.argpartition(-products, number - 1, axis=1)[:, :number]
        order = np.argsort(-np.take_along_axis(products, columns, axis=1), axis=1, kind="stable")
        return np.take_along_axis(columns, order, axis=1)
    return np.argsort(-products, axis=1, kind="stable")
