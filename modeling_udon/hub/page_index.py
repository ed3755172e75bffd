"""The index of a page: int8 codes, and shards of names and thumbnails in which neighbours lie together.

A browser loads all codes, and of the shards those that hold the neighbours of a query. Rows are ordered by similarity,
so that these are few.
"""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from modeling_udon.hub.shown_rows import ShownRow, shown_rows, tell_missing
from modeling_udon.search.image_index import ImageIndex
from modeling_udon.text import printable

ROWS_OF_A_SHARD = 32
FOLDER = "index"
_LARGEST_CODE = 127
_MOST_DOMAINS = 2**16 - 2


def write_page_index(index: ImageIndex, page: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes codes, domains of the rows, and shards into a page.

    Args:
        index: The index.
        page: Folder of the page.
        say: Called with a line if images have no picture.

    Returns:
        What the page must know of them, as JSON takes it.

    Raises:
        ValueError: If the index has more domains than a page tells from each other.
    """
    folder = page / FOLDER
    folder.mkdir()
    all_rows, domains = index.select(), index.domains()
    vectors = index.vectors(all_rows)
    if len(domains) > _MOST_DOMAINS:
        raise ValueError(f"`index` must have at most {_MOST_DOMAINS:,} domains. Got {len(domains):,}.")
    order = order_by_similarity(vectors, ROWS_OF_A_SHARD)
    codes, scales = to_codes(vectors[order])
    (folder / "codes.bin").write_bytes(codes.tobytes())
    numbers = {domain: number for number, domain in enumerate(domains, 1)}
    of_rows = np.zeros(len(order), "<u2")
    num_missing = picture_bytes = 0
    for start in tqdm(range(0, len(order), ROWS_OF_A_SHARD), desc="pictures", unit="shard", disable=None):
        rows = list(shown_rows(index, all_rows[order[start : start + ROWS_OF_A_SHARD]].tolist()))
        of_rows[start : start + len(rows)] = [numbers.get(row.domain or "", 0) for row in rows]
        num_missing += sum(row.thumbnail is None for row in rows)
        picture_bytes += _write_shard(page, start // ROWS_OF_A_SHARD, rows)
    if domains:
        (folder / "domains.bin").write_bytes(of_rows.tobytes())
    if num_missing:
        say(tell_missing(index, num_missing))
    return {
        "numImages": len(order),
        "dim": vectors.shape[1],
        "scales": scales.tolist(),
        "codes": {"path": f"{FOLDER}/codes.bin", "bytes": codes.nbytes},
        "domains": [printable(domain) for domain in domains],
        "rowDomains": {"path": f"{FOLDER}/domains.bin", "bytes": of_rows.nbytes} if domains else None,
        "shardRows": ROWS_OF_A_SHARD,
        "pictureBytes": picture_bytes,
    }


def to_codes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds embeddings to int8, with a scale for each dimension.

    Args:
        vectors: Of shape `(num_images, dim)`.

    Returns:
        Codes, int8, of the same shape, and scales, float64, of shape `(dim,)`: a vector is about their product.
    """
    scales = np.maximum(np.abs(vectors).max(axis=0).astype(np.float64), 1e-12) / _LARGEST_CODE
    return np.rint(vectors / scales).astype(np.int8), scales


def order_by_similarity(vectors: np.ndarray, size: int) -> np.ndarray:
    """Rows in an order in which each block of `size` holds similar ones.

    The rows are cut in two along the direction in which they vary most, and each half again, down to blocks: a
    principal axis tree (McNames, IEEE TPAMI 2001).

    Args:
        vectors: Of shape `(num_images, dim)`.
        size: Rows of a block; the last one may hold fewer.
    """
    waiting, blocks = [np.arange(len(vectors))], []
    while waiting:
        rows = waiting.pop()
        if len(rows) <= size:
            blocks.append(rows)
            continue
        centred = vectors[rows] - vectors[rows].mean(axis=0)
        axis = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        rows = rows[np.argsort(centred @ axis, kind="stable")]
        # Whole blocks go left, so that only the very last one is short.
        half = size * max(len(rows) // size // 2, 1)
        waiting += [rows[half:], rows[:half]]
    return np.concatenate([np.sort(rows) for rows in blocks])


def shard_file(page: Path, number: int) -> Path:
    """Where a shard lies: a thousand in a folder, since the Hub and file systems dislike more."""
    return page / FOLDER / f"{number // 1000:03d}" / f"{number % 1000:03d}.bin"


def _write_shard(page: Path, number: int, rows: list[ShownRow]) -> int:
    """Writes length of the JSON (uint32, little-endian), JSON, thumbnails; returns the size."""
    said = [
        {
            "name": printable(row.path),
            "domain": None if row.domain is None else printable(row.domain),
            "columns": [[printable(name), printable(str(value))] for name, value in row.columns.items()],
            "bytes": 0 if row.thumbnail is None else len(row.thumbnail),
        }
        for row in rows
    ]
    head = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    content = b"".join([struct.pack("<I", len(head)), head, *(row.thumbnail or b"" for row in rows)])
    file = shard_file(page, number)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return len(content)
