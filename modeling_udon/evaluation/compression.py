"""Quality per byte: the same retrieval with fewer dimensions, and with the codes of each kind that `udon index` builds.

Principal components and codebooks are learned on the vectors of the index itself, as an index is built in practice:
no label is looked at. Queries are projected, and each kind compares them with its codes as a search does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from modeling_udon.evaluation.protocol import METRICS, EmbeddedDomain, Neighbours, score, search_merged
from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.faiss_index import LEAST_FOR_PQ, empty_index, num_training_rows, sample_rows, search_others

# Kinds of index by their codes; the others have the same codes in lists or in a graph.
CODES = ("flat", "sq8", "binary", "pq")


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
        raise ValueError(f"dim must be between 1 and {full_dim}, the dimension of the embeddings. Got {dim}.")
    mean, components = fit_pca(_index_vectors(domains))
    return {
        name: replace(
            domain,
            query_embeds=project(domain.query_embeds, mean, components, dim),
            index_embeds=None if domain.index_embeds is None else project(domain.index_embeds, mean, components, dim),
        )
        for name, domain in domains.items()
    }


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

    Raises:
        ValueError: If a code is unknown.
    """
    if unknown := [code for code in codes if code not in CODES]:
        raise ValueError(f"`codes` must be among {', '.join(CODES)}. Got {unknown[0]!r}.")
    full_dim = next(iter(domains.values())).query_embeds.shape[1]
    wanted = _halved(full_dim) if dims is None else sorted({dim for dim in dims if dim <= full_dim}, reverse=True)
    neighbours = search_merged(domains, metrics, **search)
    rows = []
    for dim, pca in [(full_dim, False), *((dim, True) for dim in wanted)]:
        reduced = reduce_domains(domains, dim) if pca else domains
        for code in codes:
            if code == "pq" and len(_index_vectors(domains)) < LEAST_FOR_PQ:
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
    """The neighbours' labels stay as they are, so only ids are looked for again."""
    vectors, found = np.ascontiguousarray(_index_vectors(domains)), {}
    index = _filled_index(code, vectors)
    for (name, domain), start in zip(domains.items(), _starts(neighbours), strict=True):
        queries = np.ascontiguousarray(domain.query_embeds)
        own_rows = np.arange(len(queries)) + start if domain.index_embeds is None else np.full(len(queries), -1)
        depth = neighbours[name].ids.shape[1]
        if code == "flat":  # which is exact search, and that has one order of equal scores
            scores, ids = exact_search(queries, vectors, depth, exclude=own_rows, **search)
        else:
            scores, ids = search_others(index, queries, own_rows, depth, None)
            padding = ((0, 0), (0, depth - ids.shape[1]))
            scores, ids = np.pad(scores, padding, constant_values=-np.inf), np.pad(ids, padding, constant_values=-1)
        found[name] = replace(neighbours[name], ids=ids, scores=scores)
    return float(index.code_size), score(found, metrics)["mean"]


def _filled_index(kind: str, vectors: np.ndarray) -> Any:
    """The index that `udon index` builds over vectors."""
    index = empty_index(kind, vectors.shape[1], len(vectors))
    if not index.is_trained:
        index.train(vectors[sample_rows(len(vectors), num_training_rows(index))])
    index.add(vectors)
    return index


def _index_vectors(domains: Mapping[str, EmbeddedDomain]) -> np.ndarray:
    """The rows of the merged index, in the order of `search_merged`."""
    return np.concatenate(
        [domain.query_embeds if domain.index_embeds is None else domain.index_embeds for domain in domains.values()]
    )


def _starts(neighbours: Mapping[str, Neighbours]) -> np.ndarray:
    return next(iter(neighbours.values())).index_starts


def _halved(dim: int) -> list[int]:
    return [dim >> shift for shift in range(dim.bit_length()) if dim >> shift >= 8] or [dim]


def _unit_norm(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, np.finfo(np.float32).tiny)).astype(np.float32)
