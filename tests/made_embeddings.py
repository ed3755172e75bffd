"""Embeddings on disk without images or a model."""

import numpy as np
import pyarrow as pa

from modeling_udon.search.shards import ShardFolder, write_manifest
from modeling_udon.search.vectors import embedding_table

ABOUT = {"model": "m", "fingerprint": "f", "dim": 16, "root": "/photos"}
DOMAINS = ("cars", "cats", "art")


def unit_vectors(seed, num, dim=16):
    vectors = np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_embeddings(folder, vectors, about=ABOUT, shard_size=150, **columns):
    """As `udon embed` leaves them; every third image is of the same domain."""
    shards = ShardFolder(folder, len(vectors), shard_size)
    (folder / ".embed").mkdir(parents=True)
    write_manifest(shards, {})
    names = {"path": [f"{n}.png" for n in range(len(vectors))], "domain": [DOMAINS[n % 3] for n in range(len(vectors))]}
    table = pa.table(names | columns)
    for shard in range(shards.num_shards):
        rows = shards.rows(shard)
        part = table.slice(rows.start, len(rows))
        shards.write(shard, embedding_table(part, vectors[rows.start : rows.stop], about), [])
    return folder
