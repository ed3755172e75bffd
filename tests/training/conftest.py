"""A domain with images that cannot be read; files of features in small blocks."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modeling_udon.training import feature_file


class Spoiled(NamedTuple):
    """A copy of the domain `blobs`, and its rows by split that no image can be read from."""

    folder: Path
    rows: dict[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def spoiled(tiny_domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Spoiled:
    """In each split: a page for an image, one that is cut short, none, and the path of a file that is not there."""
    rows = {"train": (2, 3, 11, 25), "validation": (0, 4, 9, 20), "test": (1, 5, 30, 39)}
    folder = tmp_path_factory.mktemp("spoiled") / "blobs"
    shutil.copytree(tiny_domains / "blobs", folder)
    for split, of_split in rows.items():
        _spoil(folder / f"{split}.parquet", of_split)
    return Spoiled(folder, rows)


def _spoil(path: Path, rows: tuple[int, ...]) -> None:
    table = pq.read_table(path)
    images = table["image"].to_pylist()
    images[rows[0]] = {"bytes": b"no image", "path": "page.html"}
    images[rows[1]]["bytes"] = images[rows[1]]["bytes"][:60]
    images[rows[2]] = None
    images[rows[3]] = {"bytes": None, "path": "/nowhere/gone.png"}
    column = pa.array(images, table.schema.field("image").type)
    pq.write_table(table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), column), path)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of features in blocks of 12 rows, so that tiny domains have several."""
    monkeypatch.setattr(feature_file, "BLOCK", 12)
