"""Postgres with the extension pgvector: a table, written in one transaction."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.engines.columns import ID, ROW, VECTOR, Columns, fit_names
from modeling_udon.engines.store import Place, fitted, padded, said_in_one_line
from modeling_udon.faults import require
from modeling_udon.search.found import json_value

_ROWS = 8_192
_EFFORT = 128
# What HNSW of pgvector takes.
_MOST_DIMENSIONS = 2_000
# Postgres cuts longer names off without a word.
_MOST_NAME_BYTES = 63
# From this version of pgvector on, a filtered search goes on until it has as many rows as were asked for.
_ITERATIVE = (0, 8)


class PostgresStore:
    """A table with a typed column for each of the index; what Postgres has no type for is kept as jsonb.

    The password may stand in the address, or in `PGPASSWORD`.
    """

    def __init__(self, place: Place) -> None:
        if place.url is None or place.out is not None:
            raise ValueError(
                "`url` must be given for pgvector, such as postgresql://me@localhost/shop, and no `out`. Got "
                f"{place.shown!r}."
            )
        if not 0 < len(place.table.encode()) <= _MOST_NAME_BYTES or "\0" in place.table:
            raise ValueError(f"`table` must be a name of 1 to {_MOST_NAME_BYTES} bytes. Got {place.table!r}.")
        self._place, self._about = place, {"dim": 0}
        self._library = require("psycopg", "pgvector", "the export to pgvector needs")
        self._sql: Any = require("psycopg.sql", "pgvector", "the export to pgvector needs")
        with self._guarded():
            self._connection = self._library.connect(place.url, autocommit=True, connect_timeout=30)

    def exists(self) -> bool:
        """Whether the table is there."""
        with self._guarded():
            found = self._connection.execute("SELECT to_regclass(%s)", [self._table.as_string(self._connection)])
            return found.fetchone()[0] is not None

    def write(self, columns: Columns, about: Mapping[str, Any]) -> None:
        """Makes extension, table and index, all or nothing."""
        names = fit_names(columns.schema.names, fit_name)
        kinds = {name: _type_of(columns.schema.field(name).type) for name in columns.schema.names}
        kinds[ROW], kinds[VECTOR] = "bigint PRIMARY KEY", f"vector({about['dim']}) NOT NULL"
        sql = self._sql
        fields = [sql.SQL("{} " + kinds[name]).format(sql.Identifier(names[name])) for name in kinds]  # noqa: S608
        with self._guarded(), self._connection.transaction():
            run = self._connection.execute
            run("CREATE EXTENSION IF NOT EXISTS vector")
            run(sql.SQL("DROP TABLE IF EXISTS {}").format(self._table))
            run(sql.SQL("CREATE TABLE {} ({})").format(self._table, sql.SQL(", ").join(fields)))
            copy = sql.SQL("COPY {} FROM STDIN").format(self._table)
            with self._connection.cursor() as cursor, cursor.copy(copy) as lines:
                for block in columns.blocks(_ROWS):
                    for line in fitted(names, block).to_pylist():
                        lines.write_row([_value(value, kinds[name]) for name, value in zip(kinds, line.values())])  # noqa: B905
            told = sql.Literal(json.dumps({"udon": dict(about)}))
            run(sql.SQL("COMMENT ON TABLE {} IS {}").format(self._table, told))
            if about["dim"] <= _MOST_DIMENSIONS:
                run(sql.SQL("CREATE INDEX ON {} USING hnsw ({} vector_ip_ops)").format(self._table, self._vector))
        self._connection.execute(sql.SQL("ANALYZE {}").format(self._table))

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Searches in the graph with 128 candidates, which is what a large table does."""
        statement = self._sql.SQL("SELECT {} FROM {} ORDER BY {} <#> %s::vector LIMIT %s").format(
            self._sql.Identifier(ROW), self._table, self._vector
        )
        found = []
        with self._guarded(), self._connection.transaction():
            # A small table would be read as a whole, and say nothing about the graph.
            self._connection.execute("SET LOCAL enable_seqscan = off")
            self._connection.execute(f"SET LOCAL hnsw.ef_search = {max(_EFFORT, k)}")
            if self.version() >= _ITERATIVE:
                self._connection.execute("SET LOCAL hnsw.iterative_scan = strict_order")
            for query in queries:
                rows = self._connection.execute(statement, [_vector_text(query.tolist()), k]).fetchall()
                found.append([int(row) for (row,) in rows])
        return padded(found, k)

    def ids(self) -> Iterator[tuple[int, str | None]]:
        """Number and id of every row."""
        with self._guarded(), self._connection.transaction():
            columns = self._connection.execute(self._sql.SQL("SELECT * FROM {} LIMIT 0").format(self._table))
            has_ids = any(column.name == ID for column in columns.description)
            second = self._sql.Identifier(ID) if has_ids else self._sql.SQL("NULL")
            statement = self._sql.SQL("SELECT {}, {} FROM {}").format(self._sql.Identifier(ROW), second, self._table)
            with self._connection.cursor(name="udon_ids") as cursor:
                cursor.itersize = _ROWS
                yield from cursor.execute(statement)

    def version(self) -> tuple[int, ...]:
        """Version of pgvector in this database."""
        found = self._connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        return tuple(int(part) for part in found[0].split(".")[:2])

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    @property
    def _table(self) -> Any:
        return self._sql.Identifier(self._place.table)

    @property
    def _vector(self) -> Any:
        return self._sql.Identifier(VECTOR)

    def _guarded(self) -> Any:
        return said_in_one_line(
            self._place, "Postgres", lambda error: type(error).__module__.partition(".")[0] == "psycopg"
        )


def fit_name(name: str) -> str:
    """A name that Postgres takes for a column."""
    fitted = name.replace("\0", "_") or "_"
    if len(fitted.encode()) <= _MOST_NAME_BYTES:
        return fitted
    return fitted.encode()[: _MOST_NAME_BYTES - 5].decode(errors="ignore")


def _type_of(kind: pa.DataType) -> str:
    types = pa.types
    for is_such, name in (
        (types.is_boolean, "boolean"),
        (types.is_uint64, "numeric"),
        (types.is_integer, "bigint"),
        (types.is_decimal, "numeric"),
        (types.is_floating, "double precision"),
        (types.is_date, "date"),
        (types.is_binary, "bytea"),
        (types.is_large_binary, "bytea"),
        (types.is_string, "text"),
        (types.is_large_string, "text"),
        (types.is_null, "text"),
    ):
        if is_such(kind):
            return name
    if types.is_timestamp(kind):
        return "timestamp" if kind.tz is None else "timestamptz"
    if types.is_dictionary(kind):
        return _type_of(kind.value_type)
    return "jsonb"


def _value(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind.startswith("vector"):
        return _vector_text(value)
    if kind == "jsonb":
        return json.dumps(json_value(value)).replace("\\u0000", "")
    # Neither a text nor a json of Postgres holds this character.
    return value.replace("\0", "") if isinstance(value, str) else value


def _vector_text(values: list[float]) -> str:
    return "[" + ",".join(f"{value:.9g}" for value in values) + "]"
