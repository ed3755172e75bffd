"""A catalogue that changes: recall after churn, time to add, time of filters, time to train.

    python benchmarks/catalogue.py [churn] [add] [filter] [train] [--rows N] [--json FILE]

- churn:  30 % of the rows of an `ivf` index are removed and as many others added; its recall@10 beside that of one
          built of the same rows from nothing: within 1 point. Without compacting.
- add:    1 % of the rows added to an index, beside building it anew with them: under a tenth of the time.
- filter: 10 neighbours in the 10 % of the rows of one domain, beside all rows: at most 3 times the time of a query.
- train:  lists of an index of so many rows, beside FAISS's own k-means (`--plain` runs it too): at most 150 s, the same
          recall@10 at the same effort.

Vectors are made: 64 dimensions, unit norm, in 20,000 clusters. `--rows` is 1,000,000 for churn and add, 2,000,000 for
filter and train, unless it says otherwise. The last line is `ratio: x`, of the last section that was run; lower is
better, and what is promised is beside each.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.coarse import train_lists
from modeling_udon.search.faiss_index import empty_index, num_training_rows, sample_rows, search_faiss
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index
from modeling_udon.search.shards import ShardFolder, write_manifest
from modeling_udon.search.vectors import embedding_table

DIM, NUM_CLUSTERS, NUM_QUERIES, K = 64, 20_000, 500, 10
ABOUT = {"model": "made", "fingerprint": "made", "dim": DIM, "root": ""}
SHARD_SIZE = 100_000
Figures = dict[str, Any]


def made_vectors(seed: int, num: int) -> np.ndarray:
    """Unit vectors around common centres."""
    centres = np.random.default_rng(7).standard_normal((NUM_CLUSTERS, DIM), dtype=np.float32)
    generator = np.random.default_rng(seed)
    vectors = centres[generator.integers(0, NUM_CLUSTERS, num)]
    vectors += np.float32(0.6) * generator.standard_normal((num, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def made_table(first: int, num: int) -> pa.Table:
    """Columns of rows: a tenth of them is of one domain."""
    ids = pa.array([f"{number:08d}" for number in range(first, first + num)])
    domains = pa.array(["tenth" if number % 10 == 3 else "rest" for number in range(num)])
    return pa.table({"path": ids, "id": ids, "domain": domains, "price": np.arange(first, first + num) % 1000})


def write_embeddings(folder: Path, vectors: np.ndarray, first: int = 0) -> Path:
    """As `udon embed` leaves them."""
    shards = ShardFolder(folder, len(vectors), SHARD_SIZE)
    (folder / ".embed").mkdir(parents=True)
    write_manifest(shards, {})
    table = made_table(first, len(vectors))
    for shard in range(shards.num_shards):
        rows = shards.rows(shard)
        part = table.slice(rows.start, len(rows))
        shards.write(shard, embedding_table(part, vectors[rows.start : rows.stop], ABOUT), [])
    return folder


def seconds(run: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def recall(found: np.ndarray, vectors: np.ndarray, queries: np.ndarray) -> float:
    """Share of the exact neighbours in what was found, as rows of `vectors`."""
    exact = faiss.knn(queries, vectors, K, faiss.METRIC_INNER_PRODUCT)[1]
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)]))


def measure_churn(num_rows: int, folder: Path) -> Figures:
    """A third of a catalogue is exchanged, in ten commits each way."""
    vectors, others = made_vectors(1, num_rows), made_vectors(2, int(0.3 * num_rows))
    build_index([write_embeddings(folder / "e", vectors)], folder / "i", kind="ivf")
    catalogue = Catalogue(folder / "i")
    gone = np.random.default_rng(3).choice(num_rows, len(others), replace=False)
    for removed, added in zip(np.array_split(gone, 10), np.array_split(np.arange(len(others)), 10), strict=True):
        catalogue.remove(rows=removed)
        catalogue.add(others[added], made_table(num_rows + int(added[0]), len(added)))
    kept = np.setdiff1d(np.arange(num_rows), gone)
    now, queries = np.concatenate([vectors[kept], others]), made_vectors(4, NUM_QUERIES)
    places = np.full(num_rows + len(others), -1)
    places[np.concatenate([kept, np.arange(num_rows, num_rows + len(others))])] = np.arange(len(now))
    index = catalogue.index
    churned = recall(places[index.search(queries, K)[1]], now, queries)
    build_index([write_embeddings(folder / "fresh-e", now)], folder / "fresh", kind="ivf")
    fresh_index = ImageIndex(folder / "fresh")
    fresh = recall(fresh_index.search(queries, K)[1], now, queries)
    took = [
        min(seconds(lambda of=of: of.search(queries, K)) for _ in range(3))  # type: ignore[misc]
        for of in (index, fresh_index)
    ]
    return {
        "rows": num_rows,
        "segments": len(index.segments),
        "recall_after_churn": churned,
        "recall_of_fresh_build": fresh,
        "points_lost (at most 1)": 100 * (fresh - churned),
        "ms_per_query_after_churn": 1e3 * took[0] / NUM_QUERIES,
        "ms_per_query_of_fresh_build": 1e3 * took[1] / NUM_QUERIES,
        "ratio": took[0] / took[1],
    }


def measure_add(num_rows: int, folder: Path) -> Figures:
    """One in a hundred is added."""
    vectors, more = made_vectors(1, num_rows), made_vectors(2, num_rows // 100)
    first, second = write_embeddings(folder / "e", vectors), write_embeddings(folder / "more", more, num_rows)
    build_index([first], folder / "i")
    add_s = seconds(lambda: Catalogue(folder / "i").add_embeddings([second]))
    build_s = seconds(lambda: build_index([first, second], folder / "anew"))
    kind = ImageIndex(folder / "i").about.kind
    return {
        "rows": num_rows,
        "kind": kind,
        "add_s": add_s,
        "rebuild_s": build_s,
        "ratio (at most 0.1)": add_s / build_s,
    }


def measure_filter(num_rows: int, folder: Path) -> Figures:
    """A tenth of the rows, chosen by domain and by a condition."""
    vectors, queries = made_vectors(1, num_rows), made_vectors(4, NUM_QUERIES)
    build_index([write_embeddings(folder / "e", vectors)], folder / "i", kind="ivf")
    index, figures = ImageIndex(folder / "i"), {}
    ways: dict[str, dict[str, str]] = {"all": {}, "domain": {"domain": "tenth"}, "where": {"where": "price < 100"}}
    for name, chosen in ways.items():
        figures[f"{name}_first_query_s"] = seconds(lambda chosen=chosen: index.search(queries[:1], K, **chosen))
    turns = [
        {
            name: seconds(lambda chosen=chosen: [index.search(query[None], K, **chosen) for query in queries[:100]])
            for name, chosen in ways.items()
        }
        for _ in range(3)
    ]
    for name in ways:
        figures[f"{name}_ms"] = 10 * min(turn[name] for turn in turns)
    tenth = np.flatnonzero(np.arange(num_rows) % 10 == 3)
    places = np.full(num_rows, -1)
    places[tenth] = np.arange(len(tenth))
    figures["recall_all"] = recall(index.search(queries, K)[1], vectors, queries)
    figures["recall_domain"] = recall(places[index.search(queries, K, "tenth")[1]], vectors[tenth], queries)
    return {"rows": num_rows, **figures, "ratio (at most 3)": figures["domain_ms"] / figures["all_ms"]}


def measure_train(num_rows: int, folder: Path, plain: bool = False) -> Figures:
    """Lists trained by us, and as FAISS does; recall at the same efforts."""
    vectors, queries = made_vectors(1, num_rows), made_vectors(4, NUM_QUERIES)
    figures: Figures = {"rows": num_rows}
    exact = faiss.knn(queries, vectors, K, faiss.METRIC_INNER_PRODUCT)[1]
    for name in ("ours", *(("plain",) if plain else ())):
        index = empty_index("ivf", DIM, num_rows)
        figures["lists"] = index.nlist
        number = num_training_rows(index) if name == "ours" else 256 * index.nlist
        sample = vectors[sample_rows(num_rows, number)]
        figures[f"{name}_train_s"] = seconds(
            lambda index=index, sample=sample, name=name: (  # type: ignore[misc]
                train_lists(index, sample) if name == "ours" else index.train(sample)
            )
        )
        figures[f"{name}_add_s"] = seconds(lambda index=index: index.add(vectors))  # type: ignore[misc]
        for effort in (16, 64, 128, 256):
            found = search_faiss(index, queries, K, effort)[1]
            hits = [len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist(), strict=True)]
            figures[f"{name}_recall_at_{effort}"] = float(np.mean(hits))
    return {**figures, "ratio (of 150 s)": figures["ours_train_s"] / 150}


SECTIONS: dict[str, tuple[Callable[..., Figures], int]] = {
    "churn": (measure_churn, 1_000_000),
    "add": (measure_add, 1_000_000),
    "filter": (measure_filter, 2_000_000),
    "train": (measure_train, 2_000_000),
}


def lines(figures: Figures) -> Iterator[str]:
    """One line for each figure."""
    for what, value in figures.items():
        yield f"  {what}: {value:.4g}" if isinstance(value, float) else f"  {what}: {value}"


def main() -> None:
    """Runs the sections and prints their figures."""
    parser = argparse.ArgumentParser(description="A catalogue that changes.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: all")
    parser.add_argument("--rows", type=int, help="rows of the catalogue")
    parser.add_argument("--plain", action="store_true", help="also train as FAISS does by itself")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()
    if unknown := set(arguments.sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}")
    figures: dict[str, Figures] = {}
    for name in arguments.sections or SECTIONS:
        measure, num_rows = SECTIONS[name]
        more = {"plain": True} if name == "train" and arguments.plain else {}
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = measure(arguments.rows or num_rows, Path(folder), **more)
        print(name, *lines(figures[name]), sep="\n", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"ratio: {list(figures[name].values())[-1]:.3f}")


if __name__ == "__main__":
    main()
