"""Exact search over embeddings, with FAISS or with torch.

Both backends give the same ids and the same scores, whatever the chunk size, the number of threads and the precision
that the process allows for matrix products:

1. The backend proposes a few more candidates than asked for. The last bits of its scores depend on the library, so
2. each candidate is scored again in float64 and rounded to float32, and candidates are ordered by score, then by row.
   On processors with bfloat16 arithmetic, candidates for the "faiss" backend come from products in bfloat16, a fifth of
   the time, with more of them to spare; a query that the rounding of its values could touch goes to FAISS.
3. A query whose last neighbour scores too close to its last candidate, so that a row which was not proposed could tie
   (many duplicates, a collapsed model), is searched again in float64 with this order built into the comparison.
"""

from typing import Literal

import faiss
import numpy as np
import torch

# Candidates beyond those asked for: that many rows may tie at the last place before a second search is needed.
NUM_SPARE_CANDIDATES = 8
# The same for candidates by products in bfloat16, whose rounding moves scores by about 0.003, and how many neighbours
# asked for bring one more: those farther down lie closer together.
NUM_SPARE_HALVES, ASKED_PER_SPARE = 16, 5
# Rows of the index and queries whose bfloat16 products are held at a time, rows that stay in the processor's cache, and
# how many are compared by their best first, twice over.
HALF_BLOCK, HALF_QUERIES, HALF_CACHED, HALF_GROUP = 2**17, 128, 2**13, 8
# Products that the torch backend and the second search hold at a time: 128 MiB in float64.
BLOCK_SIZE = 2**24


def exact_search(
    queries: np.ndarray,
    index: np.ndarray,
    k: int,
    *,
    exclude: np.ndarray | None = None,
    backend: Literal["faiss", "torch"] = "faiss",
    device: str | torch.device | None = None,
    chunk_size: int = 8192,
) -> tuple[np.ndarray, np.ndarray]:
    """The `k` rows of the index with the largest inner product, for each query.

    Memory beyond inputs and result is bounded by `chunk_size`. Contiguous float32 inputs are not copied, except that
    the torch backend holds the index on its device.

    Call it in the main process or a spawned one: OpenMP's threads do not outlive a fork, and a forked child would wait
    for them for ever.

    Args:
        queries: Of shape `(num_queries, dim)`; of unit norm, scores are cosines.
        index: Of shape `(num_index, dim)`.
        k: Neighbours a query; may be larger than the index.
        exclude: Of shape `(num_queries,)`: the row of the index that is the query itself, -1 for none. It is left out
            by identity, so that its exact duplicates stay.
        backend: "faiss" runs on the CPU, "torch" on `device`.
        device: For the torch backend; by default CUDA where there is one, else the CPU.
        chunk_size: Queries at a time.

    Returns:
        `scores`, float32, and `ids`, int64 rows of the index, both of shape `(num_queries, k)`: best first, equal
        scores by row; score -inf and id -1 where the index has no more rows.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, `k` or `chunk_size` is below 1, `exclude` names a row
            that does not exist, or backend and device do not fit.
    """
    queries, index = _matrix("queries", queries), _matrix("index", index)
    if queries.shape[1] != index.shape[1]:
        raise ValueError(
            f"queries and index must have the same dimension. Got {queries.shape[1]} and {index.shape[1]}; "
            "embed both with the same model"
        )
    for name, value in (("k", k), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1. Got {value}.")
    own_rows = _own_rows(exclude, len(queries), len(index))
    chosen = _device(backend, device)
    resident = torch.tensor(index, device=chosen) if backend == "torch" else None
    # Some ten times the usual float32 rounding of a product of `dim` terms.
    rounding = 4 * 2.0**-24 * index.shape[1] ** 0.5 * _largest_norm("queries", queries) * _largest_norm("index", index)

    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    waiting = np.arange(len(queries))
    if backend == "faiss" and _is_quick_in_halves(len(queries), len(index), k):
        waiting = _search_in_halves(queries, index, own_rows, scores, ids)
    num_candidates = min(k + (exclude is not None) + NUM_SPARE_CANDIDATES, len(index))
    for start in range(0, len(waiting) if num_candidates else 0, chunk_size):
        chunk: slice | np.ndarray = slice(start, start + chunk_size)
        if len(waiting) < len(queries):
            chunk = waiting[chunk]
        if resident is None:
            proposed_scores, candidates = faiss.knn(queries[chunk], index, num_candidates, faiss.METRIC_INNER_PRODUCT)
        else:
            proposed_scores, candidates = _torch_candidates(queries[chunk], resident, num_candidates)
        exact_scores = _score(queries[chunk], index, candidates)
        # Where the process allows low-precision products (TF32, bfloat16), the scores themselves tell.
        tolerance = max(rounding, 4 * float(np.abs(proposed_scores - exact_scores).max()))
        scores[chunk], ids[chunk] = _rank(exact_scores, candidates, own_rows[chunk], k)
        if num_candidates == len(index):
            continue
        unsure = waiting[start : start + chunk_size][scores[chunk, -1] <= proposed_scores.min(axis=1) + tolerance]
        if len(unsure):
            candidates = _search_again(queries[unsure], index, own_rows[unsure], scores[unsure, -1], k, chosen)
            exact_scores = _score(queries[unsure], index, candidates)
            scores[unsure], ids[unsure] = _rank(exact_scores, candidates, own_rows[unsure], k)
    return scores, ids


def _is_quick_in_halves(num_queries: int, num_index: int, k: int) -> bool:
    """Whether the processor multiplies in bfloat16, and there is enough to search."""
    groups = min(num_index, HALF_BLOCK) // HALF_GROUP**2
    return (
        num_queries >= HALF_QUERIES and groups >= 4 * _num_half_candidates(k) and torch.cpu._is_avx512_bf16_supported()
    )


def _num_half_candidates(k: int) -> int:
    """How many are proposed for `k` neighbours, the query itself among them."""
    return k + 1 + NUM_SPARE_HALVES + k // ASKED_PER_SPARE


@torch.inference_mode()
def _search_in_halves(
    queries: np.ndarray, index: np.ndarray, own_rows: np.ndarray, scores: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    """Fills in `scores` and `ids` where products in bfloat16 can decide who is among the neighbours.

    What is rounded away is known: of a product of q and x no more than |q - q'| |x| + |q'| |x - x'|, by Cauchy and
    Schwarz, and in the product itself 2^-8 of it. A row that was not proposed cannot score more than the last candidate
    by more than that.

    Returns:
        The other queries, ascending.
    """
    k = ids.shape[1]
    half = torch.empty(index.shape, dtype=torch.bfloat16)
    largest = lost = 0.0
    for begin in range(0, len(index), HALF_BLOCK):
        # Copied, since an index that lies on the disk may be read alone, of which PyTorch warns.
        block, place = torch.from_numpy(np.array(index[begin : begin + HALF_BLOCK])), half[begin : begin + HALF_BLOCK]
        place.copy_(block)
        largest = max(largest, float(block.norm(dim=1).max()))
        lost = max(lost, float((block - place).norm(dim=1).max()))
    decided = np.zeros(len(queries), bool)
    num_rows = -(-min(len(index), HALF_BLOCK) // HALF_GROUP**2) * HALF_GROUP**2
    products = torch.empty(num_rows * HALF_QUERIES, dtype=torch.bfloat16)
    for start in range(0, len(queries), HALF_QUERIES):
        chunk = slice(start, start + HALF_QUERIES)
        exact = torch.from_numpy(np.array(queries[chunk]))
        rounded = exact.bfloat16()
        found = _half_candidates(rounded, half, _num_half_candidates(k), products)
        proposed, candidates = (values.numpy() for values in found)
        exact_scores = _score(queries[chunk], index, candidates)
        scores[chunk], ids[chunk] = _rank(exact_scores, candidates, own_rows[chunk], k)
        slack = (exact - rounded).norm(dim=1) * largest + rounded.float().norm(dim=1) * lost
        last = proposed.min(axis=1)
        # Below zero the order of the groups is not that of their scores.
        decided[chunk] = (last > 0) & (scores[chunk, -1] > last * (1 + 2.0**-8) + 1.01 * slack.numpy() + 1e-6)
    return np.flatnonzero(~decided)


def _half_candidates(
    queries: torch.Tensor, index: torch.Tensor, k: int, products: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` rows with the largest products in bfloat16, if those are above zero, and the products.

    A sort of all products would take longer than the products. So groups of `HALF_GROUP` rows are compared by their
    best first, as integers, which have the order of positive floats, and groups of such groups before: the best `k`
    lie in the best `k` groups. `products` is memory for those of a block, made once.
    """
    num, each = len(queries), torch.arange(len(queries))[:, None]
    best, best_ids = torch.empty(num, 0), torch.empty(num, 0, dtype=torch.int64)
    for start in range(0, len(index), HALF_BLOCK):
        block = index[start : start + HALF_BLOCK]
        num_wide = -(-len(block) // HALF_GROUP**2)
        of_rows = products[: num_wide * HALF_GROUP**2 * num].view(-1, num)
        of_rows[len(block) :] = 0
        of_groups = torch.empty(num_wide * HALF_GROUP, num, dtype=torch.int16)
        for row in range(0, len(block), HALF_CACHED):
            cached = block[row : row + HALF_CACHED]
            torch.mm(cached, queries.T, out=of_rows[row : row + len(cached)])  # (rows, dim) -> (rows, num)
            held = of_rows[row : row + HALF_CACHED].view(torch.int16).unflatten(0, (-1, HALF_GROUP))
            torch.amax(held, dim=1, out=of_groups[row // HALF_GROUP :][: len(held)])
        wide = of_groups.unflatten(0, (-1, HALF_GROUP)).amax(1)  # (groups, num) -> (num_wide, num)
        found = wide.T.contiguous().topk(min(k, num_wide), sorted=False).indices
        for values in (of_groups, of_rows.view(torch.int16)):
            inside = (found[:, :, None] * HALF_GROUP + torch.arange(HALF_GROUP)).flatten(1)
            largest, places = values[inside, each].topk(min(k, inside.shape[1]), sorted=False)
            found = inside.gather(1, places)
        best = torch.cat([best, largest.view(torch.bfloat16).float()], dim=1)
        best_ids = torch.cat([best_ids, start + found], dim=1)
        best, order = best.topk(min(k, best.shape[1]))
        best_ids = best_ids.gather(1, order)
    return best, best_ids.clamp(max=len(index) - 1)


def _device(backend: str, device: str | torch.device | None) -> torch.device:
    if backend not in ("faiss", "torch"):
        raise ValueError(f'backend must be "faiss" or "torch". Got {backend!r}.')
    if backend == "torch":
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device is not None:
        raise ValueError(f'device must be left out with backend="faiss". Got {device}; use backend="torch"')
    return torch.device("cpu")


@torch.inference_mode()
def _torch_candidates(queries: np.ndarray, index: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    on_device = torch.tensor(queries, device=index.device)
    best_scores = torch.empty(len(queries), 0, device=index.device)
    best_ids = torch.empty(len(queries), 0, dtype=torch.int64, device=index.device)
    block_size = max(BLOCK_SIZE // len(queries), 1)
    for start in range(0, len(index), block_size):
        products = on_device @ index[start : start + block_size].T  # (num_queries, dim) -> (num_queries, block_size)
        block_scores, block_ids = products.float().topk(min(k, products.shape[1]))
        best_scores = torch.cat([best_scores, block_scores], dim=1)
        best_ids = torch.cat([best_ids, block_ids + start], dim=1)
        best_scores, order = best_scores.topk(min(k, best_scores.shape[1]))
        best_ids = best_ids.gather(1, order)
    return best_scores.cpu().numpy(), best_ids.cpu().numpy()


def _score(queries: np.ndarray, index: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """The products of each query and its candidates in float64, rounded to float32: the scores that count."""
    scores = np.empty(candidates.shape, dtype=np.float32)
    step = max(2**16 // (candidates.shape[1] * index.shape[1]), 1)  # what the processor's cache holds
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        found = index[candidates[rows]].astype(np.float64)  # (step, num_candidates, dim)
        scores[rows] = np.einsum("qd,qcd->qc", queries[rows].astype(np.float64), found)
    return scores


def _rank(scores: np.ndarray, candidates: np.ndarray, own_rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `k` candidates by score, equal scores by row, without the query itself; padded with -inf and -1."""
    is_self = candidates == own_rows[:, None]
    scores = np.where(is_self, -np.inf, scores)
    candidates = np.where(is_self, -1, candidates)
    order = np.lexsort((candidates, -scores))[:, :k]
    padding = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(scores, order, axis=1), padding, constant_values=-np.inf),
        np.pad(np.take_along_axis(candidates, order, axis=1), padding, constant_values=-1),
    )


@torch.inference_mode()
def _search_again(
    queries: np.ndarray,
    index: np.ndarray,
    own_rows: np.ndarray,
    last_scores: np.ndarray,
    k: int,
    device: torch.device,
) -> np.ndarray:
    """The first `k` rows of the index by float32 score, equal scores by row, of shape `(num_queries, k)`.

    `last_scores`, of shape `(num_queries,)`, are the k-th scores found so far: a row must reach them. Blocks come in
    the order of the rows, so once `k` rows are held, only a higher score gets in.
    """
    device = device if device.type == "cuda" else torch.device("cpu")  # other accelerators may lack float64
    on_device = torch.tensor(queries, dtype=torch.float64, device=device)
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    ids = np.full((len(queries), k), -1, dtype=np.int64)
    # A matrix product may round its float64 otherwise than `_score`, hence a step below.
    floor = np.nextafter(np.nextafter(last_scores, np.float32(-np.inf)), np.float32(-np.inf))
    block_size = max(BLOCK_SIZE // max(queries.shape), 1)
    for start in range(0, len(index), block_size):
        block = torch.tensor(index[start : start + block_size], dtype=torch.float64, device=device)
        products = (on_device @ block.T).float()  # (num_queries, dim) -> (num_queries, block_size)
        above = products > torch.tensor(floor, device=device)[:, None]
        rows, columns = above.nonzero().cpu().numpy().T
        counts = np.bincount(rows, minlength=len(queries))
        slots = k + np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        padding = ((0, 0), (0, counts.max()))
        scores, ids = np.pad(scores, padding, constant_values=-np.inf), np.pad(ids, padding, constant_values=-1)
        scores[rows, slots], ids[rows, slots] = products[above].cpu().numpy(), start + columns
        scores, ids = _rank(scores, ids, own_rows, k)
        floor = np.where(ids[:, -1] >= 0, scores[:, -1], floor)
    return ids


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(values, dtype=np.float32)
    if np.ndim(values) != 2:
        raise ValueError(f"{name} must be a matrix with one embedding per row. Got shape {np.shape(values)}.")
    return array


def _own_rows(exclude: np.ndarray | None, num_queries: int, num_index: int) -> np.ndarray:
    if exclude is None:
        return np.full(num_queries, -1)
    own_rows = np.asarray(exclude)
    if own_rows.shape != (num_queries,):
        raise ValueError(
            f"exclude must have one row for each of the {num_queries} queries. Got shape {own_rows.shape}."
        )
    low, high = own_rows.min(initial=-1), own_rows.max(initial=-1)
    if low < -1 or high >= num_index:
        wrong = low if low < -1 else high
        raise ValueError(f"exclude must hold rows of the index, 0 to {num_index - 1}, or -1 for none. Got {wrong}.")
    return own_rows


def _largest_norm(name: str, embeds: np.ndarray) -> float:
    squares = np.einsum("nd,nd->n", embeds, embeds)
    finite = np.isfinite(squares)
    if not finite.all():
        raise ValueError(f"{name} must be finite. Got NaN or infinity in row {finite.argmin()}; did training diverge?")
    return float(squares.max(initial=0)) ** 0.5
