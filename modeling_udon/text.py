"""Names from data, made safe to print and to write into tables."""

import os

# What a spreadsheet takes for the beginning of a formula.
_FORMULA_STARTS = ("=", "+", "-", "@")


def printable(text: str) -> str:
    """The text with every character escaped that would break a line or steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in as_unicode(text))


def as_unicode(name: str) -> str:
    """A file's name as UTF-8 can hold it, whatever the locale made of it; bytes of other encodings are escaped."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no name of a file, but text that the locale cannot write
        return name.encode("utf-8", "backslashreplace").decode()


def table_cell(text: str) -> str:
    """The text as a cell of a table in a text file: one line, no tab, and no formula for a spreadsheet.

    As OWASP advises against CSV injection, an apostrophe comes before what would be a formula.
    """
    cell = printable(text)
    return f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell
