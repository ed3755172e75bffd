"""`udon index`: a FAISS index over embeddings, with the images' metadata beside it.

An approximate index is compared with exact search when it is built, and its effort is set by that.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.faiss_index import (
    choose_kind,
    efforts_of,
    empty_index,
    num_training_rows,
    sample_rows,
    search_others,
)
from modeling_udon.search.index_folder import ABOUT_FILE, INDEX_FILE, IndexAbout, write_about, write_metadata
from modeling_udon.search.shards import Embeddings, open_embeddings
from modeling_udon.storage import check_out, locked, replaced_folder

RECALL_AT = 10
_NUM_RECALL_QUERIES = 500
# Rows that tie with the last exact neighbour, so that either may be found.
_NUM_TIES = 50
_TIE = 1e-6
_LEAST_GAIN = 0.002


def build_index(
    embeddings: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    kind: str = "auto",
    target_recall: float = 0.95,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> IndexAbout:
    """Builds an index over embeddings, measures its recall, and writes it with the metadata.

    Args:
        embeddings: Folders that `udon embed` wrote, all with the same model.
        out: Folder of the index, written atomically.
        kind: One of `KINDS`, or `"auto"`.
        target_recall: Recall@10 that `ivf`, `ivfpq` and `hnsw` aim at: their effort is doubled until it is reached. An
            index of any kind that misses it is told of.
        force: Whether to replace an index in `out`.
        say: Called with lines for the user.

    Raises:
        ValueError: If folders do not hold embeddings of one model, there are too few images for the kind, or `out`
            exists.
    """
    check_out(Path(out), ABOUT_FILE, "that udon index wrote", "an index", force)
    with ExitStack() as held:
        opened = [open_embeddings(Path(folder)) for folder in embeddings]
        for part in opened:
            held.enter_context(locked(part.folder, shared=True, argument="embeddings"))
        # Once more, now that no `udon embed` can replace a shard between its vectors and its other columns.
        opened = [open_embeddings(part.folder) for part in opened]
        with replaced_folder(Path(out), replace=force) as draft:
            result = _build(opened, draft, kind, target_recall, say)
    if result.recall is not None and result.recall < target_recall:
        better = "build it with --kind ivf, hnsw or flat, or ask for less"
        say(f"WARNING: recall {100 * result.recall:.1f} % misses the {100 * target_recall:g} % of --recall; {better}")
    say(f"{result.bytes_per_image:,.1f} bytes per image, index in {out}")
    return result


def _build(
    opened: Sequence[Embeddings], draft: Path, kind: str, target_recall: float, say: Callable[[str], None]
) -> IndexAbout:
    about = _same_model(opened)
    num_images, dim = sum(part.num_rows for part in opened), about["dim"]
    chosen = choose_kind(num_images) if kind == "auto" else kind
    say(f"{num_images:,} embeddings of {dim} dimensions by {about['model']}, kind {chosen}")
    index = empty_index(chosen, dim, num_images)
    if not index.is_trained:
        index.train(read_rows(opened, sample_rows(num_images, num_training_rows(index))))
    for vectors in _vectors(opened):
        index.add(vectors)
    write_metadata(draft, opened)
    faiss.write_index(index, str(draft / INDEX_FILE))
    effort, recall = _measure(index, opened, num_images, target_recall, say)
    result = IndexAbout(
        kind=chosen,
        dim=dim,
        num_images=num_images,
        model=about["model"],
        fingerprint=about["fingerprint"],
        effort=effort,
        recall=recall,
        sources=_sources(opened),
        bytes_per_image=(draft / INDEX_FILE).stat().st_size / num_images,
    )
    write_about(draft, result)
    return result


def read_rows(opened: Sequence[Embeddings], rows: np.ndarray) -> np.ndarray:
    """The embeddings of some rows, which are in ascending order, of shape `(num_rows, dim)`; one shard at a time."""
    found, start = [], 0
    for vectors in _vectors(opened):
        first, last = np.searchsorted(rows, [start, start + len(vectors)])
        found.append(vectors[rows[first:last] - start])
        start += len(vectors)
    return np.concatenate(found)


def exact_neighbours(opened: Sequence[Embeddings], rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the `k` exact neighbours of some rows, themselves left out; one shard at a time."""
    queries, start = read_rows(opened, rows), 0
    scores, ids = np.empty((len(rows), 0), dtype=np.float32), np.empty((len(rows), 0), dtype=np.int64)
    for vectors in _vectors(opened):
        own = np.where((rows >= start) & (rows < start + len(vectors)), rows - start, -1)
        more_scores, more_ids = exact_search(queries, vectors, k, exclude=own)
        scores = np.concatenate([scores, more_scores], axis=1)
        ids = np.concatenate([ids, np.where(more_ids < 0, -1, more_ids + start)], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
        start += len(vectors)
    return scores, ids


def _vectors(opened: Sequence[Embeddings]) -> Iterator[np.ndarray]:
    for part in opened:
        for vectors, _ in part.blocks(columns=False):
            yield vectors


def _same_model(opened: Sequence[Embeddings]) -> Mapping[str, Any]:
    first = opened[0].about
    for part in opened[1:]:
        if part.about["fingerprint"] != first["fingerprint"]:
            raise ValueError(
                f"`embeddings` must all be by one model. Got {str(opened[0].folder)!r} by {first['model']} "
                f"({first['fingerprint']}) and {str(part.folder)!r} by {part.about['model']} "
                f"({part.about['fingerprint']})."
            )
    return first


def _measure(
    index: Any, opened: Sequence[Embeddings], num_images: int, target: float, say: Callable[[str], None]
) -> tuple[int, float | None]:
    """Doubles the effort until the target is reached or it no longer helps; returns effort and recall."""
    k = min(RECALL_AT, num_images - 1)
    if k < 1:
        return 0, None
    rows = sample_rows(num_images, _NUM_RECALL_QUERIES)
    queries = read_rows(opened, rows)
    exact_scores, exact_rows = exact_neighbours(opened, rows, min(k + _NUM_TIES, num_images - 1))
    right = np.where(exact_scores >= exact_scores[:, k - 1 : k] - _TIE, exact_rows, -2)
    efforts, most = efforts_of(index)
    best_effort, best_recall = 0, -1.0
    for effort in efforts:
        found = search_others(index, queries, rows, k, effort or None)[1]
        recall = float(np.mean([np.isin(line, good).sum() / k for line, good in zip(found, right, strict=True)]))
        what = f" looking at {effort} of {most}" if effort else ""
        say(f"recall@{k} against exact search{what}: {100 * recall:.1f} % ({len(rows)} images as queries)")
        if recall < best_recall + _LEAST_GAIN:
            break
        best_effort, best_recall = effort, recall
        if recall >= target:
            break
    return best_effort, best_recall


def _sources(opened: Sequence[Embeddings]) -> list[dict[str, Any]]:
    starts = np.cumsum([0, *(part.num_rows for part in opened)]).tolist()
    return [
        {"folder": str(part.folder), "root": part.about["root"], "start": start}
        for part, start in zip(opened, starts, strict=False)
    ]
