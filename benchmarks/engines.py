"""LanceDB beside exact FAISS: recall, latency and size, without and with filters.

    python benchmarks/engines.py --rows 1000000 --json engines.json

Vectors are made up: 64 dimensions around 2,000 centres, so that neighbours mean something; prices are uniform, so that
a condition keeps the share that it names. Both engines answer the same queries one at a time, in turns, with all cores
that the process may use. The last line is the median latency of Lance over that of exact FAISS, without a filter.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.engines.export import export_index
from modeling_udon.engines.lance_index import LanceIndex
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.search.shards import ShardFolder, write_manifest
from modeling_udon.search.vectors import embedding_table

DIM = 64
CENTRES = 2_000
NOISE = 0.6
SHARD = 50_000
K = 10
SHARES = (1.0, 0.1, 0.01)


def vectors_of(generator: np.random.Generator, centres: np.ndarray, number: int) -> np.ndarray:
    """Unit vectors around random centres."""
    noise = generator.standard_normal((number, DIM), dtype=np.float32) / DIM**0.5
    found = centres[generator.integers(len(centres), size=number)] + NOISE * noise
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def write_embeddings(folder: Path, number: int, centres: np.ndarray) -> None:
    """Writes made-up embeddings as `udon embed` does, a shard at a time."""
    shards = ShardFolder(folder, number, SHARD)
    (folder / ".embed").mkdir(parents=True)
    write_manifest(shards, {})
    about = {"model": "made-up", "fingerprint": "made-up", "dim": DIM, "root": ""}
    for shard in range(shards.num_shards):
        rows, generator = shards.rows(shard), np.random.default_rng((1, shard))
        table = pa.table(
            {
                "path": [f"{row}.jpg" for row in rows],
                "id": [f"{row:032x}" for row in rows],
                "price": 100 * generator.random(len(rows)),
                "brand": [f"brand {number}" for number in generator.integers(200, size=len(rows))],
            }
        )
        shards.write(shard, embedding_table(table, vectors_of(generator, centres, len(rows)), about), [])


def timed(call: Callable[[np.ndarray], np.ndarray], query: np.ndarray) -> tuple[np.ndarray, float]:
    """Rows that were found, and milliseconds."""
    began = time.perf_counter()
    found = call(query[None])
    return found[0], 1000 * (time.perf_counter() - began)


def compare(flat: ImageIndex, lance: LanceIndex, queries: np.ndarray, where: str | None) -> dict[str, float]:
    """Recall@10 of Lance against exact search, and percentiles of both latencies."""
    hits, ours, theirs = [], [], []
    for number, query in enumerate(queries):
        exact, exact_time = timed(lambda q: flat.search(q, K, where=where)[1], query)
        found, lance_time = timed(lambda q: lance.search(q, K, where=where)[1], query)
        hits.append(np.isin(exact, found).mean())
        if number:  # the first pays for reading what the others find in memory
            ours.append(lance_time)
            theirs.append(exact_time)
    return {
        "recall@10": float(np.mean(hits)),
        "lance_p50_ms": float(np.percentile(ours, 50)),
        "lance_p95_ms": float(np.percentile(ours, 95)),
        "faiss_flat_p50_ms": float(np.percentile(theirs, 50)),
    }


def main() -> None:
    """Builds both, compares them, prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    centres = np.random.default_rng(0).standard_normal((CENTRES, DIM)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    queries = vectors_of(np.random.default_rng(2), centres, arguments.queries)
    with tempfile.TemporaryDirectory(prefix="udon-engines-") as place:
        folder = Path(place)
        write_embeddings(folder / "embedded", arguments.rows, centres)
        build_index([folder / "embedded"], folder / "index", kind="flat")
        began = time.perf_counter()
        done = export_index(folder / "index", "lancedb", out=str(folder / "lance"), say=print)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in (folder / "lance").rglob("*") if path.is_file())
        flat, lance = ImageIndex(folder / "index"), LanceIndex(f"lancedb://{folder / 'lance'}")
        results: dict[str, Any] = {
            "rows": arguments.rows,
            "export_seconds": seconds,
            "bytes_per_row": size / arguments.rows,
            "effort": lance.about.effort,
            "recall_of_export": done.recall,
        }
        per_row, lists = results["bytes_per_row"], lance.about.effort
        print(f"exported in {seconds:.0f} s, {per_row:.0f} bytes per row, {lists} lists looked at")
        for share in SHARES:
            where = None if share == 1 else f"price < {100 * share:g}"
            line = compare(flat, lance, queries, where)
            results[where or "no filter"] = line
            print(f"{where or 'no filter':14}", "  ".join(f"{name} {value:.3f}" for name, value in line.items()))
    plain = results["no filter"]
    results["ratio"] = plain["lance_p50_ms"] / plain["faiss_flat_p50_ms"]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    print(f"ratio: {results['ratio']:.2f}")


if __name__ == "__main__":
    main()
