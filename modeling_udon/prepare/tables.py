"""Tables of pictures, CSV or Parquet, as other systems write them: paths, classes and splits by row."""

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modeling_udon.data.class_folders import class_name
from modeling_udon.data.table_checks import wrong_line

_DELIMITERS = (",", ";", "\t", "|")


@dataclass(frozen=True)
class Table:
    """The columns of a table that were asked for.

    Attributes:
        path: The file.
        columns: Names of all columns.
        values: Cells of the columns that were asked for, by the name; text of a CSV, typed values of Parquet.
        num_rows: Number of rows.
    """

    path: Path
    columns: Sequence[str]
    values: Mapping[str, list[Any]]
    num_rows: int

    def labels(self, column: str) -> list[Any]:
        """Classes by row: text, whole numbers or lists of them; `None` where there is none.

        Raises:
            ValueError: If a value is of another type, which would only become a class by the way it is printed.
        """
        return [self._label(value, column, row) for row, value in enumerate(self.values[column], 1)]

    def _label(self, value: Any, column: str, row: int) -> Any:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if isinstance(value, list):
            several = [self._label(one, column, row) for one in value]
            if None in several or any(isinstance(one, list) for one in several):
                raise self._wrong_label(value, column, row)
            return several[0] if len(several) == 1 else several
        if isinstance(value, float) and value.is_integer():  # pandas makes floats of integers where one is missing
            return int(value)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "backslashreplace")
        if isinstance(value, str):
            return class_name(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong_label(value, column, row)
        return value

    def _wrong_label(self, value: Any, column: str, row: int) -> ValueError:
        return ValueError(
            f"--label-column must hold text, whole numbers, or lists of them. Got {value!r:.100} in row {row} of "
            f"{column!r} in {self.path}; name another column, or write the classes as text."
        )


def open_table(path: Path, wanted: Sequence[str]) -> Table:
    """Reads a table: Parquet where the name ends so, anything else as CSV with a header.

    A CSV may be UTF-8 or, with a byte-order mark, UTF-16; separated by commas, semicolons, tabs or bars.

    Args:
        path: The file.
        wanted: Columns to read, where they are there.

    Raises:
        ValueError: If it is no such table.
    """
    try:
        if path.suffix.lower() == ".parquet":
            columns = list(pq.read_schema(path).names)
            read = pq.read_table(path, columns=[name for name in columns if name in wanted])
            values = {name: read[name].to_pylist() for name in read.column_names}
            return Table(path, columns, values, len(read))
        return _read_csv(path, wanted)
    except (UnicodeError, csv.Error, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"SOURCE must be a table, CSV in UTF-8 or Parquet. Got {path}: {reason}.") from None


def _read_csv(path: Path, wanted: Sequence[str]) -> Table:
    data = path.read_bytes()
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    if "\0" in text:
        raise csv.Error("it holds zero bytes, as UTF-16 without a mark and spreadsheets do; save it as UTF-8")
    header, _, rest = text.partition("\n")
    if header.lower().startswith("sep="):  # a line by which Excel tells itself the delimiter
        text, header = rest, rest.partition("\n")[0]
    if reason := wrong_line(text.splitlines()):
        raise ValueError(f"SOURCE must {reason}. It is {path}.")
    found = [sum(name.strip(' \r"') in wanted for name in header.split(delimiter)) for delimiter in _DELIMITERS]
    # Strict, since a quote that is never closed would make one class of all rows after it.
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[found.index(max(found))], strict=True)
    columns = [name.strip() for name in next(rows, [])]
    if doubled := next((name for name in wanted if columns.count(name) > 1), None):
        raise ValueError(f"SOURCE must have a column {doubled!r} once. Got {', '.join(columns)} in {path}.")
    places = {name: place for place, name in enumerate(columns) if name in wanted}
    values: dict[str, list[Any]] = {name: [] for name in places}
    num_rows = 0
    for row in _read_all(rows):
        if not row:
            continue
        num_rows += 1
        if any(row[len(columns) :]):
            raise ValueError(
                f"SOURCE must have a name for each cell. Got {len(row)} cells below {len(columns)} names in row "
                f"{num_rows} of {path}; quote cells that hold the separator."
            )
        for name, place in places.items():
            values[name].append(row[place] if place < len(row) else None)
    return Table(path, columns, values, num_rows)


def _read_all(rows: Any) -> Iterator[list[str]]:
    try:
        yield from rows
    except csv.Error as error:
        raise csv.Error(f"{error}, in line {rows.line_num}; close every quote") from None
