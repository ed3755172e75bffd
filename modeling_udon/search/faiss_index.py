"""FAISS indexes: the kinds that `udon index` builds, and how each is searched."""

from typing import Any

import faiss
import numpy as np

KINDS = ("flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary")
# Up to here exact search answers in a few milliseconds on one core; beyond the next one, vectors are compressed.
FLAT_UP_TO = 200_000
IVF_UP_TO = 10_000_000


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
    if kind in ("pq", "ivfpq") and num_images < 256:
        raise ValueError(f"`kind` {kind!r} needs at least 256 images. Got {num_images}; use kind 'flat' or 'sq8'.")
    num_bytes = max(size for size in range(1, max(dim // 2, 1) + 1) if dim % size == 0)
    num_lists = max(min(int(4 * num_images**0.5), num_images // 39), 1)
    factory = {
        "flat": "Flat",
        "sq8": "SQ8",
        "hnsw": "HNSW32,Flat",
        # Bare PQ takes no filter; with one list it is the same and takes one. "np" spares FAISS the ordering of codes
        # for a search by Hamming distance, which is slow to train and not used here.
        "pq": f"IVF1,PQ{num_bytes}x8np",
        "ivf": f"IVF{num_lists},Flat",
        "ivfpq": f"IVF{num_lists},PQ{num_bytes}x8np",
        # A bit a dimension, by its sign after centring, with two correction factors (arXiv 2405.12497).
        "binary": "RaBitQ",
    }[kind]
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if isinstance(index, faiss.IndexIVF):
        index.cp.min_points_per_centroid = 1  # small indexes are fine; the recall says how good they are
    if isinstance(index, faiss.IndexIVFPQ):
        index.pq.cp.min_points_per_centroid = 1
    return index


def num_training_rows(index: Any) -> int:
    """As many as FAISS uses: 256 a centroid."""
    return max(256 * index.nlist, 2**16) if isinstance(index, faiss.IndexIVF) else 2**16


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


def efforts_of(index: Any) -> tuple[list[int], str]:
    """The efforts to try in turn, and what the most is."""
    if isinstance(index, faiss.IndexHNSW):
        return [2**power for power in range(4, 11)], "1024 candidates"
    if isinstance(index, faiss.IndexIVF) and index.nlist > 1:
        return [2**power for power in range(index.nlist.bit_length()) if 2**power < index.nlist] + [index.nlist], (
            f"{index.nlist} lists"
        )
    return [0], ""
