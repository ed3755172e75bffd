"""An index of 300 made-up embeddings, with columns whose names and values do their best to break out."""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_embeddings import ABOUT, unit_vectors, write_embeddings

from modeling_udon.search.image_index import ImageIndex
from modeling_udon.search.index import build_index

NUM = 300
HOSTILE = 'x"; DROP TABLE images; --'
BRANDS = ("O'Neil", 'say "hi"', "鞋", "a;b")
COLUMNS = {
    "id": [f"id-{number}" for number in range(NUM)],
    "price": [number / 2 if number % 7 else None for number in range(NUM)],
    "brand": [BRANDS[number % 4] for number in range(NUM)],
    "a.b": list(range(NUM)),
    "we`ird": [f"w{number % 3}" for number in range(NUM)],
    HOSTILE: [number % 2 == 0 for number in range(NUM)],
    "day": [datetime.date(2024, 1, 1 + number % 28) for number in range(NUM)],
    "seen": pa.array([datetime.datetime(2024, 1, 2, 3, 4, 5, number) for number in range(NUM)], pa.timestamp("us")),
    "tags": [["a", f"t{number % 5}"] for number in range(NUM)],
    "mtime": [number for number in range(NUM)],
    "thumbnail": [b"jpeg" for _ in range(NUM)],
}


@pytest.fixture(scope="session")
def vectors() -> np.ndarray:
    return unit_vectors(0, NUM)


@pytest.fixture(scope="session")
def shop(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the index, made of two folders of embeddings."""
    folder = tmp_path_factory.mktemp("shop")
    first = {name: values[:200] for name, values in COLUMNS.items()}
    rest = {name: values[200:] for name, values in COLUMNS.items()}
    embedded = [write_embeddings(folder / "first", vectors[:200], **first)]
    embedded += [write_embeddings(folder / "rest", vectors[200:], ABOUT | {"root": "/other"}, **rest)]
    build_index(embedded, folder / "index")
    return folder / "index"


@pytest.fixture(scope="session")
def index(shop: Path) -> ImageIndex:
    return ImageIndex(shop)


def exact_rows(index: ImageIndex, query: np.ndarray, allowed: np.ndarray, k: int) -> list[int]:
    """The nearest rows among those allowed, by a plain sort."""
    scores = index.vectors(allowed) @ query
    return [int(row) for row in allowed[np.argsort(-scores, kind="stable")[:k]]]
