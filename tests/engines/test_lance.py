"""An index in LanceDB answers as the folder that it was made of."""

import json
from pathlib import Path

import numpy as np
import pytest
from shop_index import HOSTILE, exact_rows

from modeling_udon.engines.export import export_index
from modeling_udon.engines.lance_address import LanceAddress, check_condition
from modeling_udon.engines.lance_index import LanceIndex

pytest.importorskip("lancedb", reason="LanceDB is an extra")


@pytest.fixture(scope="module")
def lance(shop, tmp_path_factory) -> LanceIndex:
    folder = tmp_path_factory.mktemp("lance")
    export_index(shop, "lancedb", out=str(folder), thumbnails=True)
    return LanceIndex(f"lancedb://{folder}")


def test_scores_rows_and_descriptions_are_those_of_the_folder(lance, index, vectors) -> None:
    for options in ({}, {"domain": "cats"}, {"group_by": "brand"}, {"exclude": [{3, 4}, {5}, set()]}):
        expected = index.search(vectors[3:6], 8, **options)
        found = lance.search(vectors[3:6], 8, **options)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])
    for row in (0, 7, 250):
        assert lance.describe(row) == index.describe(row)
        assert "thumbnail" not in lance.describe(row, thumbnail=False)
    assert lance.domains() == index.domains() and lance.user_columns == index.user_columns
    assert lance.rows_of(["id-4", "id-9", "o'none"]).tolist() == [4, 9]
    np.testing.assert_array_equal(lance.vectors(np.array([9, 2])), index.vectors(np.array([9, 2])))
    assert lance.about.num_images == 300 and lance.about.fingerprint == "f"


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        ("price < 20", lambda n: n % 7 and n / 2 < 20),
        ("price < 20 AND brand = 'O''Neil'", lambda n: n % 7 and n / 2 < 20 and n % 4 == 0),
        ("brand IN ('鞋', 'a;b') -- all".removesuffix(" -- all"), lambda n: n % 4 in (2, 3)),
        ("(price IS NULL)", lambda n: n % 7 == 0),
        ("a_b BETWEEN 10 AND 12 OR `a_b` = 99", lambda n: n in (10, 11, 12, 99)),
        ("price < 0", lambda n: False),
    ],
)
def test_a_condition_is_applied_before_the_search(where, allowed, lance, index, vectors) -> None:
    rows = np.array([n for n in range(300) if allowed(n)], np.int64)
    expected = exact_rows(index, vectors[8], rows, 50) if len(rows) else []
    scores, found = lance.search(vectors[8:9], 50, where=where)
    assert found[0].tolist() == expected + [-1] * (50 - len(expected))
    assert lance.select(where=where).tolist() == rows.tolist()
    assert np.isneginf(scores[0, len(expected) :]).all()


@pytest.mark.parametrize(
    "where",
    [
        *("price <", "nope = 1", "price < (SELECT 1)", "1 = 1; DROP TABLE images", "1 = 1) OR (1 = 1", "", "  "),
        *("price < 1 -- more", "price < 1 /* more */", "brand = 'open", "`price < 1", "(price < 1", "1 = 1)"),
    ],
)
def test_what_is_no_single_condition_is_one_line(where, lance, vectors) -> None:
    with pytest.raises(ValueError, match="`where` must be") as caught:
        lance.search(vectors[:1], 3, domain="cats", where=where)
    assert "\n" not in str(caught.value)


def test_a_quoted_bracket_or_semicolon_is_text() -> None:
    for where in ("brand = 'a;b'", "brand = ') OR (' AND (price < 1)", 'brand = "--"', "brand = 'it''s ;'"):
        assert check_condition(where) == where


def test_names_that_lance_does_not_take_are_given_back_as_they_were(lance, index) -> None:
    columns = lance.describe(12)["columns"]
    assert columns["a.b"] == 12 and columns["we`ird"] == "w0" and columns[HOSTILE] is True
    assert set(columns) == set(index.describe(12)["columns"])


def test_a_condition_or_group_by_names_the_columns_that_there_are(lance, vectors) -> None:
    with pytest.raises(ValueError, match="`group_by` must be a column of the index: .*brand"):
        lance.search(vectors[:1], 3, group_by="nope")
    with pytest.raises(ValueError, match='`domain` must be one of the index: art, cars, cats. Got "x\' OR 1=1"'):
        lance.search(vectors[:1], 3, domain="x' OR 1=1")
    with pytest.raises(ValueError, match="`rows` must be of the index. Got 999"):
        lance.describe(999)
    with pytest.raises(ValueError, match="must have the dimension of the index, 16"):
        lance.search(np.ones((1, 3), np.float32), 3)


def test_many_rows_get_lists_and_are_found_all_the_same(shop, index, vectors, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("modeling_udon.engines.lance_store.INDEX_FROM", 100)
    monkeypatch.setattr("modeling_udon.engines.lance_store._ROWS_PER_LIST", 20)
    said: list[str] = []
    done = export_index(shop, "lancedb", out=str(tmp_path / "db"), say=said.append)
    assert done.recall >= 0.95
    lance = LanceIndex(f"lancedb://{tmp_path / 'db'}")
    assert lance.about.effort >= 4
    # A condition that few rows meet still finds as many as there are.
    rows = np.array([n for n in range(300) if n % 7 and n / 2 > 140], np.int64)
    assert sorted(lance.search(vectors[:1], 50, where="price > 140")[1][0, : len(rows)]) == rows.tolist()


def test_a_reader_keeps_what_it_opened_while_the_table_is_replaced(shop, vectors, tmp_path) -> None:
    import lancedb

    export_index(shop, "lancedb", out=str(tmp_path))
    opened = LanceIndex(f"lancedb://{tmp_path}#images")
    before = opened.search(vectors[:2], 4)
    lancedb.connect(str(tmp_path)).open_table("images").delete("row < 290")
    np.testing.assert_array_equal(opened.search(vectors[:2], 4)[1], before[1])
    assert LanceIndex(f"lancedb://{tmp_path}").about.num_images == 10


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("lancedb://shop", ("shop", "images", {})),
        ("lancedb:///data/shop#t", ("/data/shop", "t", {})),
        ("lancedb://s3://bucket/shop", ("s3://bucket/shop", "images", {})),
        ("hf://datasets/o/n", ("hf://datasets/o/n", "images", {})),
        ("hf://datasets/o/n@v1/sub#t", ("hf://datasets/o/n/sub", "t", {"hf_revision": "v1"})),
    ],
)
def test_an_address_names_database_table_and_revision(address, parsed) -> None:
    found = LanceAddress.parse(address)
    assert (found.database, found.table, found.options) == parsed


@pytest.mark.parametrize("address", ["lancedb://", "hf://o", "hf://datasets/o", "lancedb:///nowhere/at/all"])
def test_an_address_without_a_table_is_one_line(address) -> None:
    with pytest.raises(ValueError, match="`index` must"):
        LanceIndex(address)


def test_a_table_of_others_is_refused(tmp_path) -> None:
    import lancedb

    lancedb.connect(str(tmp_path)).create_table("images", [{"vector": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="must be a table that udon export-index wrote"):
        LanceIndex(f"lancedb://{tmp_path}")


def test_udon_search_prints_the_same_of_a_folder_and_of_lancedb(searchable, tmp_path, udon) -> None:
    assert udon("export-index", "--index", searchable.index, "--to", "lancedb", "--out", tmp_path / "db").code == 0
    common = [next(searchable.pictures.rglob("*.png")), "--model", searchable.model, "-k", 4]
    folder, lance = (
        udon("search", *common, "--index", place) for place in (searchable.index, f"lancedb://{tmp_path / 'db'}")
    )
    assert folder.code == lance.code == 0, lance.err
    assert folder.out == lance.out
    as_json = [
        json.loads(udon("search", *common, "--json", "--index", place).out)
        for place in (searchable.index, f"lancedb://{tmp_path / 'db'}")
    ]
    assert as_json[1].pop("index") == f"lancedb://{tmp_path / 'db'}" and as_json[0].pop("index")
    assert as_json[0] == as_json[1]
    wrong = udon("search", *common, "--index", "lancedb:///nowhere")
    assert wrong.code == 2 and wrong.err.count("\n") == 1


def test_the_encoder_is_in_the_registry_of_lancedb(searchable, tmp_path) -> None:
    import lancedb
    from lancedb.embeddings import get_registry
    from lancedb.pydantic import LanceModel, Vector

    import modeling_udon.engines.lance_function  # noqa: F401
    from modeling_udon import Encoder

    function = get_registry().get("udon").create(name=str(searchable.model))
    pictures = sorted(map(str, searchable.pictures.rglob("*.png")))

    class Photo(LanceModel):
        file: str = function.SourceField()
        vector: Vector(function.ndims()) = function.VectorField()

    table = lancedb.connect(str(tmp_path)).create_table("photos", schema=Photo)
    table.add([{"file": picture} for picture in pictures])
    expected = Encoder.open(searchable.model).encode(pictures).embeddings
    np.testing.assert_allclose(np.array(table.to_arrow()["vector"].to_pylist()), expected, atol=1e-6)
    assert table.search(pictures[3]).limit(1).to_list()[0]["file"] == pictures[3]
    embeds = function.compute_source_embeddings([Path(pictures[0]).read_bytes(), b"no image"])
    np.testing.assert_allclose(embeds[0], expected[0], atol=1e-6)
    assert embeds[1] is None
    with pytest.raises(ValueError, match="`query` must be an image"):
        function.compute_query_embeddings("nowhere.jpg")
