"""Indexes on disk: FAISS indexes over embeddings, with the images' metadata beside them, opened memory-mapped.

An approximate index is compared with exact search when it is built, and its effort is set by that.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.shards import Embeddings, open_embeddings
from modeling_udon.storage import replaced_folder

INDEX_FILE = "index.faiss"
METADATA_FILE = "metadata.arrow"
ABOUT_FILE = "index.json"

KINDS = ("flat", "ivf", "hnsw", "pq", "ivfpq", "sq8", "binary")
# Up to here exact search answers in a few milliseconds on one core; beyond the next one, vectors are compressed.
FLAT_UP_TO = 200_000
IVF_UP_TO = 10_000_000

RECALL_AT = 10
_NUM_RECALL_QUERIES = 500
# Rows that tie with the last exact neighbour, so that either may be found.
_NUM_TIES = 50
_TIE = 1e-6
_LEAST_GAIN = 0.002
_SEED = 0


@dataclass(frozen=True)
class IndexAbout:
    """What an index says of itself.

    Attributes:
        kind: One of `KINDS`.
        dim: Size of an embedding.
        num_images: Rows of the index.
        model: Name of the model of the embeddings.
        fingerprint: Its fingerprint.
        effort: Lists or candidates that a search looks at (`ivf`, `ivfpq`, `hnsw`), 0 for the other kinds.
        recall: Share of the exact 10 nearest neighbours that a search finds, on a sample; `None` with one image.
        sources: For each embedding folder its `folder`, the `root` of its paths, and its first row, `start`.
        bytes_per_image: Size of the FAISS file by image.
    """

    kind: str
    dim: int
    num_images: int
    model: str
    fingerprint: str
    effort: int
    recall: float | None
    sources: list[dict[str, Any]]
    bytes_per_image: float


class ImageIndex:
    """An opened index.

    Args:
        folder: Folder that `build_index` wrote.

    Raises:
        ValueError: If it is none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / ABOUT_FILE).is_file():
            raise ValueError(f"`index` must be a folder that udon index wrote. Got {str(folder)!r}.")
        self.about = IndexAbout(**json.loads((self.folder / ABOUT_FILE).read_text(encoding="utf-8")))
        self._faiss = faiss.read_index(str(self.folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
        self._metadata = pa.ipc.open_file(pa.memory_map(str(self.folder / METADATA_FILE))).read_all()

    def search(self, queries: np.ndarray, k: int, domain: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The rows with the largest inner product with each query.

        With a domain, all of its images are looked at, whatever the kind of the index.

        Args:
            queries: Of shape `(num_queries, dim)`, unit norm.
            k: Neighbours a query.
            domain: Search among its images only.

        Returns:
            Scores, float32, and rows, int64, of shape `(num_queries, k)`; -inf and -1 where there are no more. The
            scores of kinds that compress are approximate.

        Raises:
            ValueError: If the dimension is another, or there is no such domain.
        """
        if queries.shape[1] != self.about.dim:
            raise ValueError(
                f"queries must have the dimension of the index, {self.about.dim}. Got {queries.shape[1]}; embed them "
                f"with {self.about.model}."
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        num_found = min(k, self.about.num_images)
        if domain is not None:
            allowed = self._rows_of(domain)
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))  # type: ignore[arg-type, call-arg]
            num_found = min(k, int(allowed.sum()))
            scores, rows = _search(self._faiss, queries, num_found, effort=None, selector=selector)
        else:
            scores, rows = _search(self._faiss, queries, num_found, effort=self.about.effort or None)
            short = np.flatnonzero(rows[:, -1] < 0)
            if len(short):  # the lists that were looked at hold fewer
                scores[short], rows[short] = _search(self._faiss, queries[short], num_found, effort=None)
        padding = ((0, 0), (0, k - num_found))
        return np.pad(scores, padding, constant_values=-np.inf), np.pad(rows, padding, constant_values=-1)

    def describe(self, row: int) -> dict[str, Any]:
        """The columns of a row, and `file`: where the image lies, `None` where that is not known."""
        values = self.columns_of(row)
        source = next(source for source in reversed(self.about.sources) if source["start"] <= row)
        # Bytes in a data set have no time of change, and their path names no file, whatever may lie there.
        is_file = values.get("mtime", 0) is not None and (source["root"] or os.path.isabs(values["path"]))
        return values | {"file": os.path.join(source["root"], values["path"]) if is_file else None}

    def columns_of(self, row: int) -> dict[str, Any]:
        """The columns of a row as they were kept; a time that Python cannot hold is given as text."""
        line, values = self._metadata.slice(row, 1), {}
        for name in line.column_names:
            try:
                values[name] = line[name].to_pylist()[0]
            except (ValueError, OverflowError):
                values[name] = str(line[name].cast(pa.string())[0]) if line[name].type != pa.null() else None
        return values

    def domains(self) -> list[str]:
        """The domains of its images."""
        if "domain" not in self._metadata.column_names:
            return []
        return sorted(filter(None, self._metadata["domain"].unique().to_pylist()))

    def _rows_of(self, domain: str) -> np.ndarray:
        if domain not in self.domains():
            known = ", ".join(self.domains()) or "none, since they were embedded without"
            raise ValueError(f"`domain` must be one of the index: {known}. Got {domain!r}.")
        return np.asarray(pc.equal(self._metadata["domain"], domain).fill_null(False))


def choose_kind(num_images: int) -> str:
    """The kind for a number of images: exact while that is quick, compressed only when memory may be short."""
    if num_images <= FLAT_UP_TO:
        return "flat"
    return "ivf" if num_images <= IVF_UP_TO else "ivfpq"


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
        out: Folder of the index; it appears whole or not at all.
        kind: One of `KINDS`, or `"auto"`.
        target_recall: Recall@10 that `ivf`, `ivfpq` and `hnsw` aim at: their effort is doubled until it is reached.
        force: Whether to replace an index in `out`.
        say: Called with lines for the user.

    Raises:
        ValueError: If folders do not hold embeddings of one model, there are too few images for the kind, or `out`
            exists.
    """
    opened = [open_embeddings(Path(folder)) for folder in embeddings]
    about = _same_model(opened)
    num_images, dim = sum(part.num_rows for part in opened), about["dim"]
    chosen = choose_kind(num_images) if kind == "auto" else kind
    check_out(Path(out), force)
    say(f"{num_images:,} embeddings of {dim} dimensions by {about['model']}, kind {chosen}")
    with replaced_folder(Path(out)) as draft:
        index = _empty_index(chosen, dim, num_images)
        if not index.is_trained:
            index.train(read_rows(opened, _sample(num_images, _num_training_rows(index))))
        for vectors in _vectors(opened):
            index.add(vectors)
        _write_metadata(opened, draft / METADATA_FILE)
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
        (draft / ABOUT_FILE).write_text(json.dumps(vars(result), indent=2) + "\n", encoding="utf-8")
    say(f"{result.bytes_per_image:,.1f} bytes an image, index in {out}")
    return result


def check_out(folder: Path, force: bool) -> None:
    """Refuses a folder that must not be written.

    Raises:
        ValueError: If it exists and is no index, or is one and `force` is not given.
    """
    if not folder.exists():
        return
    if not (folder / ABOUT_FILE).is_file():
        raise ValueError(f"`out` must be a new folder, or one that udon index wrote. Got {str(folder)!r}.")
    if not force:
        raise ValueError(f"`out` must be a new folder. Got {str(folder)!r}, an index; give --force to replace it.")


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


def _empty_index(kind: str, dim: int, num_images: int) -> Any:
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


def _num_training_rows(index: Any) -> int:
    """As many as FAISS uses: 256 a centroid."""
    return max(256 * index.nlist, 2**16) if isinstance(index, faiss.IndexIVF) else 2**16


def _sample(num_images: int, size: int) -> np.ndarray:
    generator = np.random.default_rng(_SEED)
    return np.sort(generator.choice(num_images, size=min(size, num_images), replace=False))


def _search(
    index: Any, queries: np.ndarray, k: int, effort: int | None, selector: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Searches with an effort, or with `None` exhaustively, in what the selector lets through."""
    selected = {} if selector is None else {"sel": selector}
    parameters: Any
    if isinstance(index, faiss.IndexHNSW):
        if effort is None:
            return _search(faiss.downcast_index(index.storage), queries, k, None, selector)
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k), **selected)  # type: ignore[attr-defined]
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(nprobe=effort or index.nlist, **selected)  # type: ignore[call-arg]
    elif isinstance(index, faiss.IndexRaBitQ):
        parameters = faiss.RaBitQSearchParameters(**selected)
    else:
        parameters = faiss.SearchParameters(**selected)
    return index.search(queries, k, params=parameters)


def _measure(
    index: Any, opened: Sequence[Embeddings], num_images: int, target: float, say: Callable[[str], None]
) -> tuple[int, float | None]:
    """Doubles the effort until the target is reached or it no longer helps; returns effort and recall."""
    k = min(RECALL_AT, num_images - 1)
    if k < 1:
        return 0, None
    rows = _sample(num_images, _NUM_RECALL_QUERIES)
    queries = read_rows(opened, rows)
    exact_scores, exact_rows = exact_neighbours(opened, rows, min(k + _NUM_TIES, num_images - 1))
    right = np.where(exact_scores >= exact_scores[:, k - 1 : k] - _TIE, exact_rows, -2)
    efforts, most = _efforts(index)
    best_effort, best_recall = 0, -1.0
    for effort in efforts:
        found = _search(index, queries, k + 1, effort or None)[1]
        found = np.stack([line[line != row][:k] for line, row in zip(_own_last(found, rows), rows, strict=True)])
        recall = float(np.mean([np.isin(line, good).sum() / k for line, good in zip(found, right, strict=True)]))
        what = f" looking at {effort} of {most}" if effort else ""
        say(f"recall@{k} against exact search{what}: {100 * recall:.1f} % ({len(rows)} images as queries)")
        if recall < best_recall + _LEAST_GAIN:
            break
        best_effort, best_recall = effort, recall
        if recall >= target:
            break
    return best_effort, best_recall


def _own_last(found: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where a query was not found itself, its last neighbour gives way, so that all keep as many."""
    found = found.copy()
    missing = ~(found == rows[:, None]).any(axis=1)
    found[missing, -1] = rows[missing]
    return found


def _efforts(index: Any) -> tuple[list[int], str]:
    """The efforts to try in turn, and what the most is."""
    if isinstance(index, faiss.IndexHNSW):
        return [2**power for power in range(4, 11)], "1024 candidates"
    if isinstance(index, faiss.IndexIVF) and index.nlist > 1:
        return [2**power for power in range(index.nlist.bit_length()) if 2**power < index.nlist] + [index.nlist], (
            f"{index.nlist} lists"
        )
    return [0], ""


def _write_metadata(opened: Sequence[Embeddings], file: Path) -> None:
    try:
        schema = pa.unify_schemas([part.schema for part in opened])
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"`embeddings` must agree in the types of their columns: {error}") from error
    with pa.ipc.new_file(str(file), schema) as writer:
        for part in opened:
            for _, table in part.blocks():
                columns = [
                    table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
                    for field in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))


def _sources(opened: Sequence[Embeddings]) -> list[dict[str, Any]]:
    starts = np.cumsum([0, *(part.num_rows for part in opened)]).tolist()
    return [
        {"folder": str(part.folder), "root": part.about["root"], "start": start}
        for part, start in zip(opened, starts, strict=False)
    ]
