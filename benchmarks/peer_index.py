"""Index build and queries beside bare FAISS, hnswlib, usearch and LanceDB, each at the least effort for the recall."""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import pyarrow as pa
from peer_runs import Row, Sizes, Skipped, clustered, needs, take_turns

from modeling_udon.search.exact_search import exact_search
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.search.shards import ShardFolder, write_manifest
from modeling_udon.search.vectors import embedding_table

DIM, K, LEAST_RECALL = 64, 10, 0.95
EFFORTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Queries that efforts are found with.
TUNED_ON = 200
# Every tenth row is of the domain that is searched for.
DOMAINS = 10

Search = Callable[[np.ndarray, int, bool], np.ndarray]


class Built(NamedTuple):
    """An index: how long it took, what searches it, with an effort and a filter, and the efforts there are."""

    seconds: float
    search: Search
    efforts: Sequence[int] = EFFORTS
    filters: bool = True


def embedded(vectors: np.ndarray, folder: Path) -> Path:
    """A folder as `udon embed` writes it."""
    if not folder.exists():
        shards = ShardFolder(folder, len(vectors), 50_000)
        (folder / ".embed").mkdir(parents=True)
        write_manifest(shards, {})
        names = [f"{row}.jpg" for row in range(len(vectors))]
        table = pa.table({"path": names, "domain": [f"d{row % DOMAINS}" for row in range(len(vectors))]})
        about = {"model": "m", "fingerprint": "f", "dim": DIM, "root": "/"}
        for shard in range(shards.num_shards):
            rows = shards.rows(shard)
            part = embedding_table(table.slice(rows.start, len(rows)), vectors[rows.start : rows.stop], about)
            shards.write(shard, part, [])
    return folder


def udon(vectors: np.ndarray, some: np.ndarray, place: Path, kind: str) -> Built:
    """`udon index`, which sets the effort itself by some queries; with metadata, checksums and that measurement."""
    rows, asked = embedded(vectors, place / "embedded"), embedded(some, place / "asked")
    began = time.perf_counter()
    build_index([rows], place / kind, kind, LEAST_RECALL, force=True, recall_queries=asked)
    took = time.perf_counter() - began
    index = ImageIndex(place / kind)
    return Built(took, lambda q, _, only: index.search(q, K, domain="d0" if only else None)[1], (0,))


def bare_faiss(vectors: np.ndarray, some: np.ndarray, place: Path, kind: str) -> Built:
    """FAISS by its factory."""
    began = time.perf_counter()
    lists = int(4 * len(vectors) ** 0.5)
    name = f"IVF{lists},Flat" if kind == "ivf" else "HNSW32,Flat"
    index = faiss.index_factory(DIM, name, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        index.cp.niter = 10
    index.train(vectors)
    index.add(vectors)
    took = time.perf_counter() - began
    chosen = faiss.IDSelectorBatch(np.arange(0, len(vectors), DOMAINS))
    make = faiss.SearchParametersIVF if kind == "ivf" else faiss.SearchParametersHNSW

    def search(queries: np.ndarray, effort: int, only: bool) -> np.ndarray:
        options = {"nprobe": effort} if kind == "ivf" else {"efSearch": effort}
        return index.search(queries, K, params=make(**options, **({"sel": chosen} if only else {})))[1]

    return Built(took, search)


def hnswlib_index(vectors: np.ndarray, some: np.ndarray, place: Path, kind: str) -> Built:
    """hnswlib; its filter is a Python function, which needs one thread."""
    import hnswlib

    began = time.perf_counter()
    index = hnswlib.Index("ip", DIM)
    index.init_index(len(vectors), M=16, ef_construction=200)
    index.add_items(vectors)
    took = time.perf_counter() - began

    def search(queries: np.ndarray, effort: int, only: bool) -> np.ndarray:
        index.set_ef(max(effort, K))
        if only:
            return index.knn_query(queries, K, num_threads=1, filter=lambda row: row % DOMAINS == 0)[0].astype(np.int64)
        return index.knn_query(queries, K)[0].astype(np.int64)

    return Built(took, search)


def usearch_index(vectors: np.ndarray, some: np.ndarray, place: Path, kind: str) -> Built:
    """usearch, whose Python interface has no filter."""
    from usearch.index import Index

    began = time.perf_counter()
    index = Index(ndim=DIM, metric="ip", dtype="f32")
    index.add(np.arange(len(vectors)), vectors)
    took = time.perf_counter() - began

    def search(queries: np.ndarray, effort: int, only: bool) -> np.ndarray:
        index.expansion_search = max(effort, K)
        return np.asarray(index.search(queries, K).keys).astype(np.int64)

    return Built(took, search, filters=False)


def lancedb_index(vectors: np.ndarray, some: np.ndarray, place: Path, kind: str) -> Built:
    """LanceDB on disk, a query at a time: its Python interface takes one vector."""
    import lancedb

    began = time.perf_counter()
    rows = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM)
    data = pa.table({"row": np.arange(len(vectors)), "domain": np.arange(len(vectors)) % DOMAINS, "vector": rows})
    table = lancedb.connect(place / "lance").create_table("t", data, mode="overwrite")
    lists = max(len(vectors) // 4096, 8)
    table.create_index(metric="dot", num_partitions=lists, index_type="IVF_HNSW_SQ", vector_column_name="vector")
    took = time.perf_counter() - began

    def search(queries: np.ndarray, effort: int, only: bool) -> np.ndarray:
        found = np.full((len(queries), K), -1, np.int64)
        for number, query in enumerate(queries):
            request = table.search(query).distance_type("dot").limit(K).nprobes(min(effort, lists)).ef(4 * effort)
            if only:
                request = request.where("domain = 0", prefilter=True)
            ids = request.select(["row"]).to_arrow()["row"].to_numpy()
            found[number, : len(ids)] = ids
        return found

    return Built(took, search)


WAYS = {
    "udon index, ivf": (udon, "ivf", "faiss", "faiss-cpu"),
    "udon index, hnsw": (udon, "hnsw", "faiss", "faiss-cpu"),
    "bare FAISS, IVF": (bare_faiss, "ivf", "faiss", "faiss-cpu"),
    "bare FAISS, HNSW32": (bare_faiss, "hnsw", "faiss", "faiss-cpu"),
    "hnswlib, M 16": (hnswlib_index, "hnsw", "hnswlib", "hnswlib"),
    "usearch": (usearch_index, "hnsw", "usearch.index", "usearch"),
    "LanceDB, IVF_HNSW_SQ": (lancedb_index, "hnsw", "lancedb", "lancedb"),
}


def measure(sizes: Sizes) -> tuple[list[Row], list[Skipped]]:
    """Builds each index once, finds its effort, and runs the queries in turns."""
    vectors, _ = clustered(sizes.indexed)
    rng = np.random.default_rng(1)
    near = vectors[rng.choice(len(vectors), sizes.queries)]
    queries = near + 0.08 * rng.standard_normal(near.shape, dtype=np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = {
        False: exact_search(queries, vectors, K)[1],
        True: exact_search(queries, np.ascontiguousarray(vectors[::DOMAINS]), K)[1] * DOMAINS,
    }
    skipped, built = [], {}
    work = f"{sizes.queries:,} queries of {sizes.indexed:,} x {DIM}"
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, kind, module, package) in WAYS.items():
            if missing := needs(work, name, module, package):
                skipped.append(missing)
            else:
                built[name] = make(vectors, queries[:TUNED_ON], Path(folder), kind)
                # At a million rows the next one takes minutes.
                print(f"{work}, {name}: built in {built[name].seconds:.1f} s", flush=True)
        rows = []
        for only in (False, True):
            title = f"{work}, a tenth of the rows allowed" if only else work
            efforts = {name: _effort(found, queries, exact[only], only) for name, found in built.items()}
            print(f"{title}: efforts and recall {efforts}", flush=True)
            ways = {
                name: lambda name=name, only=only, efforts=efforts: built[name].search(queries, efforts[name][0], only)  # type: ignore[misc]
                for name in built
                if built[name].filters or not only
            }
            found_rows = take_turns(title, ways, sizes.rounds)
            for row in found_rows:
                rate = sizes.queries / sorted(row.seconds)[len(row.seconds) // 2]
                effort, recall = efforts[row.way]
                row.beside = f"recall@10 {recall:.3f}, {rate:,.0f} queries/s, built in {built[row.way].seconds:.1f} s"
                row.beside += f", effort {effort}" if effort else ""
            rows += found_rows
            if only:
                skipped += [
                    Skipped(title, name, "its Python interface has no filter")
                    for name, found in built.items()
                    if not found.filters
                ]
    return rows, skipped


def _effort(built: Built, queries: np.ndarray, exact: np.ndarray, only: bool) -> tuple[int, float]:
    """The least effort that reaches the recall, on the first queries, and the recall."""
    if only and not built.filters:
        return 0, 0.0
    some, wanted = queries[:TUNED_ON], exact[:TUNED_ON]
    for effort in built.efforts:
        found = built.search(some, effort, only)
        recall = float(np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, wanted, strict=True)]))
        if recall >= LEAST_RECALL:
            break
    return effort, recall


os.environ.setdefault("LANCE_LOG", "error")
