"""`udon export-index`: ids, vectors and columns arrive in each engine, which finds what exact search finds."""

import datetime
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_embeddings import write_embeddings

from modeling_udon.engines.columns import Columns, fit_names, roots_of
from modeling_udon.engines.export import STORES, export_index
from modeling_udon.engines.milvus import fit_name as fit_for_milvus
from modeling_udon.engines.parity import check_ids, exact_answers
from modeling_udon.engines.postgres import fit_name as fit_for_postgres
from modeling_udon.engines.store import EngineError, Place
from modeling_udon.search.catalogue import Catalogue
from modeling_udon.search.index import build_index

ROOT = Path(__file__).parents[2]
# Engine: the libraries that it needs, and where in a folder it writes to.
EMBEDDED = {
    "lancedb": (("lancedb",), "lance"),
    "qdrant": (("qdrant_client",), "qdrant"),
    "milvus": (("pymilvus", "milvus_lite"), "milvus.db"),
    "parquet": ((), "parquet"),
}


@pytest.fixture(params=EMBEDDED)
def engine(request: pytest.FixtureRequest) -> str:
    for library in EMBEDDED[request.param][0]:
        pytest.importorskip(library, reason=f"{request.param} is an extra")
    return request.param


def test_what_an_engine_holds_is_what_the_index_holds(engine, shop, index, tmp_path, udon) -> None:
    out = tmp_path / EMBEDDED[engine][1]
    done = udon("export-index", "--index", shop, "--to", engine, "--out", out)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"300 rows of 16 dimensions by m to {engine}: {out}",
        "recall@10 against exact FAISS: 100.0 % (200 images as queries)",
        "ids: all 300 came back as they were",
    ]
    again = udon("export-index", "--index", shop, "--to", engine, "--out", out)
    assert again.code == 2 and "must be" in again.err and "--force" in again.err and again.err.count("\n") == 1
    assert udon("export-index", "--index", shop, "--to", engine, "--out", out, "--force").code == 0


def test_a_parquet_folder_has_the_columns_with_their_types(shop, tmp_path) -> None:
    export_index(shop, "parquet", out=str(tmp_path / "out"), thumbnails=True, paths=False)
    table = pq.read_table(tmp_path / "out")
    assert "path" not in table.column_names and "mtime" not in table.column_names
    assert table["thumbnail"][3].as_py() == b"jpeg" and table["day"][1].as_py() == datetime.date(2024, 1, 2)
    assert json.loads(table.schema.metadata[b"udon"])["fingerprint"] == "f"


def test_rows_that_were_removed_do_not_go_along(vectors, tmp_path) -> None:
    build_index([write_embeddings(tmp_path / "e", vectors[:50], id=[f"i{n}" for n in range(50)])], tmp_path / "index")
    Catalogue(tmp_path / "index").remove(rows=[3, 17])
    done = export_index(tmp_path / "index", "parquet", out=str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out")
    assert done.num_rows == len(table) == 48 and done.recall == 1.0
    assert table["row"].to_pylist() == [n for n in range(50) if n not in (3, 17)]
    assert table["id"].to_pylist() == [f"i{row}" for row in table["row"].to_pylist()]


def test_qdrant_finds_by_column(shop, index, vectors, tmp_path) -> None:
    library = pytest.importorskip("qdrant_client", reason="qdrant is an extra")
    export_index(shop, "qdrant", out=str(tmp_path / "q"))
    client, models = library.QdrantClient(path=str(tmp_path / "q")), library.models
    is_brand = models.FieldCondition(key="brand", match=models.MatchValue(value="O'Neil"))
    found = client.query_points(
        "images", query=vectors[5].tolist(), limit=7, query_filter=models.Filter(must=[is_brand])
    )
    brands = np.flatnonzero(np.arange(300) % 4 == 0)
    assert [point.id for point in found.points] == brands[np.argsort(-(vectors[brands] @ vectors[5]))[:7]].tolist()
    assert found.points[0].payload["day"].startswith("2024-01-") and found.points[0].payload["tags"][0] == "a"
    client.close()


def test_milvus_finds_by_typed_field(shop, vectors, tmp_path) -> None:
    library = pytest.importorskip("pymilvus", reason="milvus is an extra")
    pytest.importorskip("milvus_lite", reason="Milvus Lite is an extra")
    export_index(shop, "milvus", out=str(tmp_path / "m.db"))
    client = library.MilvusClient(str(tmp_path / "m.db"))
    found = client.search(
        "images",
        data=vectors[5:6],
        limit=7,
        filter='price < 20 and brand == "鞋"',
        output_fields=["a_b", "price"],
        # Milvus filters while it follows the graph, and ends with fewer rows where it looks at few.
        search_params={"params": {"ef": 300}},
    )[0]
    allowed = np.array([n for n in range(300) if n % 7 and n / 2 < 20 and n % 4 == 2])
    assert [hit["row"] for hit in found] == allowed[np.argsort(-(vectors[allowed] @ vectors[5]))[:7]].tolist()
    assert all(hit["entity"]["a_b"] == hit["row"] for hit in found)
    client.close()


@pytest.mark.parametrize(
    ("place", "engine", "words"),
    [
        (Place(None, None, "t", False), "lancedb", "`out` or `url` must be given for lancedb"),
        (Place("a", "b", "t", False), "qdrant", "Got both"),
        (Place(None, "http://x", "t", False), "parquet", "`out` must be given for parquet"),
        (Place("folder", None, "t", False), "milvus", "`out` must end in .db"),
        (Place("m.db", None, "t; drop", False), "milvus", "`table` must be letters, digits and underscores"),
        (Place("folder", None, "t", False), "pgvector", "`url` must be given for pgvector"),
        (Place(None, "postgresql://x", "t" * 64, False), "pgvector", "`table` must be a name of 1 to 63 bytes"),
    ],
)
def test_a_place_that_does_not_fit_the_engine_is_one_line(place, engine, words) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        STORES[engine](place)


@pytest.mark.parametrize("engine", ["lancedb", "qdrant", "milvus"])
def test_a_missing_library_names_its_extra(engine, shop, tmp_path, monkeypatch, udon) -> None:
    def missing(name: str, *rest: object) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=rf'pip install "modeling-udon\[{engine}\]"'):
        STORES[engine](Place(str(tmp_path / EMBEDDED[engine][1]), None, "images", False))


def test_an_address_is_shown_without_its_password() -> None:
    assert Place(None, "postgresql://me:secret@host/db?sslkey=x", "t", False).shown == "postgresql://me:***@host/db"


def test_ids_that_do_not_come_back_are_an_error(index) -> None:
    columns = Columns.of(index, thumbnails=False, paths=True)

    class Forgetful:
        def __init__(self, lines: list) -> None:
            self.ids = lambda: iter(lines)

    good = list(columns.ids().items())
    assert check_ids(Forgetful(good), columns) == 300
    for lines in (good[1:], [(0, "other"), *good[1:]], [*good, (999, "id-1")], [*good, good[0]]):
        with pytest.raises(EngineError, match="gave back"):
            check_ids(Forgetful(lines), columns)


def test_recall_counts_what_is_among_the_exact_neighbours(index, vectors) -> None:
    answers = exact_answers(index)
    scores = answers.queries @ vectors.T
    order = np.argsort(-scores, axis=1)
    assert answers.recall_of(order[:, :11], index) == 1.0
    assert answers.recall_of(order[:, :6], index) == pytest.approx(0.5)
    assert answers.recall_of(np.repeat(order[:, 1:2], 11, axis=1), index) == pytest.approx(0.1)
    assert answers.recall_of(order[:, 100:111], index) == 0.0


def test_roots_are_told_by_row(index) -> None:
    assert roots_of(index) == [(0, "/photos"), (200, "/other")]


def test_names_stay_where_they_can_and_never_meet() -> None:
    assert fit_names(["a_b", "a.b", "A_b"], fit_for_milvus) == {"a_b": "a_b", "a.b": "a_b_3", "A_b": "A_b_2"}
    assert fit_for_milvus("1; drop") == "_1__drop" and fit_for_milvus("") == "_" and fit_for_milvus("RowID") == "_RowID"
    long = {name: fitted for name, fitted in fit_names(["ä" * 40, "ä" * 41], fit_for_postgres).items()}
    assert len(set(long.values())) == 2 and all(len(name.encode()) <= 63 for name in long.values())


def test_a_text_that_milvus_cannot_hold_is_named(tmp_path, vectors) -> None:
    pytest.importorskip("milvus_lite", reason="Milvus Lite is an extra")
    texts = ["x" * 70_000, *["y"] * 9]
    folder = write_embeddings(tmp_path / "e", vectors[:10], caption=texts)
    build_index([folder], tmp_path / "index")
    with pytest.raises(ValueError, match=r"at most 65,535 bytes for Milvus. Got a longer one in the column 'caption'"):
        export_index(tmp_path / "index", "milvus", out=str(tmp_path / "m.db"))


def test_a_folder_with_other_files_is_left_alone(shop, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="`out` must be a new folder"):
        export_index(shop, "parquet", out=str(tmp_path), force=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_second_export_to_one_folder_at_once_is_refused_and_the_first_is_whole(
    engine, shop, index, tmp_path, monkeypatch
) -> None:
    out, whole, refused = str(tmp_path / EMBEDDED[engine][1]), Columns.blocks, []

    def meeting(self: Columns, size: int):
        for block in whole(self, 100):
            if not refused:
                refused.append(subprocess.run(second, env=environment, capture_output=True, text=True))
            yield block

    second = [sys.executable, "-m", "modeling_udon.cli", "export-index", "--index", str(shop), "--to", engine]
    second += ["--out", out, "--force"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    monkeypatch.setattr(Columns, "blocks", meeting)
    done = export_index(shop, engine, out=out, force=True)
    assert done.num_rows == 300 and done.recall == 1.0
    if engine == "parquet":  # each has a draft of its own, and the last one stays
        assert refused[0].returncode == 0, refused[0].stderr
    else:
        assert refused[0].returncode in (1, 2) and refused[0].stderr.count("\n") == 1, refused[0].stderr
        assert "another" in refused[0].stderr or "in use" in refused[0].stderr, refused[0].stderr
