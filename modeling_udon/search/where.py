"""Conditions on the columns of an index, as SQL, answered by DuckDB without access to files or the network."""

import threading
from typing import Any

import numpy as np
import pyarrow as pa

from modeling_udon.faults import first_line, require

MOST_SECONDS = 30.0
_SETTINGS = {
    "enable_external_access": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "memory_limit": "2GB",
    "lock_configuration": "true",
}


class Conditions:
    """Answers conditions on a table.

    Args:
        table: The table.
        number: Its column of whole numbers, by which rows are named.
        hidden: Columns that conditions cannot name.

    Raises:
        ImportError: If DuckDB is missing.
    """

    def __init__(self, table: pa.Table, number: str, hidden: tuple[str, ...] = ()) -> None:
        self._duckdb = require("duckdb", "filters", "`where` needs")
        self._connection = self._duckdb.connect(":memory:", config=_SETTINGS)
        self._number = number
        self._lock = threading.Lock()
        shown = [name for name in table.column_names if name not in hidden and self._takes(table.schema.field(name))]
        self.columns = [name for name in shown if name != number]
        self._relation = self._connection.from_arrow(table.select(shown))

    def rows(self, where: str) -> np.ndarray:
        """The numbers of the rows for which a condition is true, int64, ascending.

        Args:
            where: A condition in DuckDB's SQL, such as `price < 20 and brand = 'x'`.

        Raises:
            ValueError: If it is no condition on the columns of the table, or takes longer than `MOST_SECONDS`.
        """
        with self._lock:
            timer = threading.Timer(MOST_SECONDS, self._connection.interrupt)
            timer.start()
            try:
                found = self._relation.filter(where).project(f'"{self._number}"').to_arrow_table()
            except self._duckdb.InterruptException as error:
                raise ValueError(f"`where` must take at most {MOST_SECONDS:g} seconds. Got {where!r}.") from error
            except self._duckdb.Error as error:
                reason = first_line(str(error)).rstrip("!.")
                raise ValueError(
                    f"`where` must be a condition on columns of the index: {', '.join(self.columns)}. Got {where!r} "
                    f"({reason})."
                ) from error
            finally:
                timer.cancel()
        return np.sort(found.column(0).to_numpy())

    def _takes(self, column: Any) -> bool:
        try:
            self._connection.from_arrow(pa.table({column.name: pa.nulls(0, column.type)})).fetchall()
        except (self._duckdb.Error, pa.ArrowException):
            return False
        return True
