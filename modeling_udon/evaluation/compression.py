"""Quality a byte: the same retrieval with fewer dimensions and shorter codes.

Principal components and codebooks are learned on the vectors of the index itself, as an index is built in practice:
no label is looked at. Queries are projected, but stay float32, except for binary codes, where both sides are signs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import faiss
import numpy as np

from modeling_udon.evaluation.protocol import METRICS, EmbeddedDomain, Neighbours, score, search_merged
from modeling_udon.search.exact_search import exact_search

CODES = ("float32", "int8", "binary", "pq")
# Each codeword of product quantisation is a byte that stands for so many dimensions.
PQ_DIMS = 4
PQ_CENTROIDS = 256


def fit_pca(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Principal components in the order of their variance.

    Args:
        vectors: Of shape `(num_vectors, dim)`.

    Returns:
        The mean, of shape `(dim,)`, and the components as columns, of shape `(dim, dim)`.
    """
    # In float64 and without a centred copy of the vectors: E[x x^T] - m m^T, blockwise.
    mean = vectors.mean(axis=0, dtype=np.float64)
    moment = np.zeros((vectors.shape[1],) * 2)
    for start in range(0, len(vectors), 65536):
        block = vectors[start : start + 65536] - mean
        moment += block.T @ block
    _, components = np.linalg.eigh(moment)
    return mean, components[:, ::-1]


def project(vectors: np.ndarray, mean: np.ndarray, components: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` principal components of unit norm: `(num_vectors, full_dim) -> (num_vectors, dim)`, float32."""
    reduced = (vectors - mean.astype(np.float32)) @ components[:, :dim].astype(np.float32)
    return _unit_norm(reduced)


def reduce_domains(domains: Mapping[str, EmbeddedDomain], dim: int) -> dict[str, EmbeddedDomain]:
    """All embeddings after principal component analysis, cut to `dim` dimensions and scaled to unit norm.

    Args:
        domains: By name, embedded by one model; the components are learned on their index sets together.
        dim: Dimensions to keep.

    Raises:
        ValueError: If `dim` is not between 1 and the embeddings' dimension.
    """
    full_dim = next(iter(domains.values())).query_embeds.shape[1]
    if not 1 <= dim <= full_dim:
        raise ValueError(f"dim must be between 1 and {full_dim}, the dimension of the embeddings, got {dim}")
    mean, components = fit_pca(_index_vectors(domains))
    return {
        name: replace(
            domain,
            query_embeds=project(domain.query_embeds, mean, components, dim),
            index_embeds=None if domain.index_embeds is None else project(domain.index_embeds, mean, components, dim),
        )
        for name, domain in domains.items()
    }


def encode(queries: np.ndarray, index: np.ndarray, code: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Stores the index in a code and reads it back.

    Args:
        queries: Of shape `(num_queries, dim)`.
        index: Of shape `(num_index, dim)`.
        code: `"float32"`; `"int8"`, a byte a dimension, scaled by the largest absolute value of the dimension;
            `"binary"`, the signs; `"pq"`, product quantisation (Jegou et al., TPAMI 2011), a byte for 4 dimensions.

    Returns:
        Queries and index as they are compared, and the bytes of one stored vector.

    Raises:
        ValueError: If the code is unknown, or product quantisation lacks vectors or dimensions.
    """
    dim = index.shape[1]
    if code == "float32":
        return queries, index, 4.0 * dim
    if code == "int8":
        scale = np.maximum(np.abs(index).max(axis=0), np.finfo(np.float32).tiny) / 127
        return queries, np.rint(index / scale).astype(np.int8) * scale.astype(np.float32), float(dim)
    if code == "binary":
        return _signs(queries), _signs(index), dim / 8
    if code == "pq":
        return queries, _quantise_products(index), dim / PQ_DIMS
    raise ValueError(f"code must be one of {', '.join(CODES)}, got {code!r}")


def quality_per_byte(
    domains: Mapping[str, EmbeddedDomain],
    dims: Sequence[int] | None = None,
    codes: Sequence[str] = CODES,
    metrics: Sequence[str] = METRICS,
    **search: Any,
) -> list[dict[str, Any]]:
    """Scores of the merged index by dimension and code, the dearest first.

    Args:
        domains: By name, embedded by one model.
        dims: Dimensions to cut to after principal component analysis; those above the embeddings' are left out. By
            default halved from the embeddings' own down to 8.
        codes: Of `CODES`; "pq" is left out where it cannot be learned.
        metrics: Names such as "R@1".
        search: Options of `exact_search`.

    Returns:
        For each combination `"dim"`, `"pca"`, `"code"`, `"bytes"` of a vector, and the mean of each metric over the
        domains. The embeddings as they are come first, with `"pca"` false.
    """
    full_dim = next(iter(domains.values())).query_embeds.shape[1]
    wanted = _halved(full_dim) if dims is None else sorted({dim for dim in dims if dim <= full_dim}, reverse=True)
    neighbours = search_merged(domains, metrics, **search)
    rows = []
    for dim, pca in [(full_dim, False), *((dim, True) for dim in wanted)]:
        reduced = reduce_domains(domains, dim) if pca else domains
        for code in codes:
            if code == "pq" and (dim % PQ_DIMS or len(_index_vectors(domains)) < PQ_CENTROIDS):
                continue
            bytes_a_vector, means = _score_encoded(reduced, neighbours, code, metrics, search)
            rows.append({"dim": dim, "pca": pca, "code": code, "bytes": bytes_a_vector} | means)
    return rows


def _score_encoded(
    domains: Mapping[str, EmbeddedDomain],
    neighbours: Mapping[str, Neighbours],
    code: str,
    metrics: Sequence[str],
    search: Mapping[str, Any],
) -> tuple[float, dict[str, float]]:
    """The neighbours' labels stay as they are, so only ids are looked for anew."""
    vectors, found, bytes_a_vector = _index_vectors(domains), {}, 0.0
    for (name, domain), start in zip(domains.items(), _starts(neighbours), strict=True):
        queries, index, bytes_a_vector = encode(domain.query_embeds, vectors, code)
        own_rows = start + np.arange(len(queries)) if domain.index_embeds is None else None
        depth = neighbours[name].ids.shape[1]
        scores, ids = exact_search(queries, index, depth, exclude=own_rows, **search)
        found[name] = replace(neighbours[name], ids=ids, scores=scores)
    return bytes_a_vector, score(found, metrics)["mean"]


def _index_vectors(domains: Mapping[str, EmbeddedDomain]) -> np.ndarray:
    """The rows of the merged index, in the order of `search_merged`."""
    return np.concatenate(
        [domain.query_embeds if domain.index_embeds is None else domain.index_embeds for domain in domains.values()]
    )


def _starts(neighbours: Mapping[str, Neighbours]) -> np.ndarray:
    return next(iter(neighbours.values())).index_starts


def _halved(dim: int) -> list[int]:
    return [dim >> shift for shift in range(dim.bit_length()) if dim >> shift >= 8] or [dim]


def _signs(vectors: np.ndarray) -> np.ndarray:
    return np.where(vectors >= 0, np.float32(1), np.float32(-1)) / np.float32(vectors.shape[1] ** 0.5)


def _quantise_products(index: np.ndarray) -> np.ndarray:
    num_vectors, dim = index.shape
    if dim % PQ_DIMS or num_vectors < PQ_CENTROIDS:
        raise ValueError(
            f"code 'pq' must have a multiple of {PQ_DIMS} dimensions and at least {PQ_CENTROIDS} vectors, "
            f"got {num_vectors} of {dim}; use 'int8'"
        )
    quantised = faiss.IndexPQ(dim, dim // PQ_DIMS, 8)
    quantised.pq.cp.min_points_per_centroid = 1  # silences a warning; how good the codes are is what is measured here
    vectors = np.ascontiguousarray(index, dtype=np.float32)
    quantised.train(vectors)
    quantised.add(vectors)
    return quantised.reconstruct_n(0, num_vectors)


def _unit_norm(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
