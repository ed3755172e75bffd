"""CSV files as other programs write them: what pandas would read otherwise than it is meant is refused."""

import codecs
import csv
import os
import re
from collections.abc import Iterable, Sequence

# As the builders of folders find them.
_PICTURE_COLUMN = re.compile(r"(.*_)?file_names?")


def check_csv(file: str, columns: Sequence[str], names_pictures: bool) -> None:
    """Refuses a CSV of which pandas would take another column, or other cells, than its header names.

    Raises:
        ValueError: If one of the columns is there twice or has blanks around its name, a row has more cells than the
            header or is the header again, or a table of pictures does not name them.
    """
    if file.startswith("hf://") or not os.path.isfile(file):
        return
    with open(file, "rb") as start:
        if start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):  # pandas says that it must be UTF-8
            return
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as opened:
        rows = csv.reader(opened)
        try:
            header, first = next(rows, []), next(rows, [])
        except csv.Error:  # pandas says what
            return
        opened.seek(0)
        if reason := wrong_line(opened):
            raise ValueError(f"{file} must {reason}")
    bare = [name.strip() for name in header]
    for column in (*columns, "file_name"):
        if bare.count(column) > 1:
            raise ValueError(f"{file} must have a column {column!r} once. Got {', '.join(header)}")
        if column in bare and column not in header:
            raise ValueError(
                f"{file} must have no blanks around the name of a column. Got {header[bare.index(column)]!r}; take "
                "them out, around all cells"
            )
    if names_pictures and header and not any(_PICTURE_COLUMN.fullmatch(name) for name in header):
        raise ValueError(
            f"{file} must begin with the names of its columns, file_name and others, and commas between them. Got "
            f"{','.join(header)[:100]!r}; change it, or let `udon prepare csv` read it, which takes other names and "
            "separators"
        )
    if len(first) > len(header):
        raise ValueError(
            f"{file} must have a name for each cell of a row. Got {len(first)} cells below {len(header)} names; "
            "quote cells that hold commas, and leave none at the end"
        )


def wrong_line(lines: Iterable[str]) -> str | None:
    """Why a line of a table is none of its rows: "must" and so on; `None` where all may be."""
    header = None
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            return f"hold no zero bytes, as UTF-16 without a mark does. Got some in line {number}; save it as UTF-8"
        bare = line.strip("\ufeff \t\r\n")
        if bare and bare == header:  # as joined files have it
            return f"have its header once. Got it again in line {number}; take that line out"
        header = bare if header is None else header
    return None
