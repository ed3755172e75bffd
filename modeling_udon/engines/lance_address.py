"""Addresses of Lance tables: in a folder, on object storage, on the Hub."""

import re
from dataclasses import dataclass
from typing import Any

from modeling_udon.faults import first_line, require

TABLE = "images"
LANCE_SCHEME = "lancedb://"
HUB_SCHEME = "hf://"
_HUB = re.compile(r"hf://(?P<kind>datasets|models)/(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/#]+))?(?P<path>/.*)?")


@dataclass(frozen=True)
class LanceAddress:
    """Where a Lance table lies.

    Attributes:
        database: Folder or address of the database, as LanceDB takes it.
        table: Name of the table.
        options: What LanceDB is told of the storage.
    """

    database: str
    table: str
    options: dict[str, str]

    @classmethod
    def parse(cls, address: str) -> "LanceAddress":
        """Reads an address: `lancedb://PATH`, `lancedb://s3://BUCKET/PATH`, `hf://datasets/OWNER/NAME@REVISION`.

        The name of a table may follow after a `#`; it is `images` by default.

        Raises:
            ValueError: If it is none of these.
        """
        place, _, table = address.partition("#")
        options: dict[str, str] = {}
        if place.startswith(HUB_SCHEME):
            match = _HUB.fullmatch(place)
            if match is None:
                raise ValueError(f"`index` must be as hf://datasets/OWNER/NAME on the Hub. Got {address!r}.")
            if match["revision"]:
                options["hf_revision"] = match["revision"]
            place = f"hf://{match['kind']}/{match['repo']}{match['path'] or ''}"
        else:
            place = place.removeprefix(LANCE_SCHEME)
        if not place:
            raise ValueError(f"`index` must name a folder after lancedb://. Got {address!r}.")
        return cls(place, table or TABLE, options)

    def connect(self, who_needs: str) -> Any:
        """Opens the database.

        Raises:
            ImportError: If LanceDB is missing.
        """
        lancedb = require("lancedb", "lancedb", who_needs)
        return lancedb.connect(self.database, storage_options=self.options)


def is_lance(address: str) -> bool:
    """Whether an index is named that lies in a Lance table."""
    return address.startswith((LANCE_SCHEME, HUB_SCHEME))


def table_names(database: Any) -> list[str]:
    """The tables of a database."""
    names: list[str] = []
    token = None
    while True:
        page = database.list_tables(page_token=token)
        names += page.tables
        token = page.page_token
        if not token:
            return names


def literal(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """The name of a column as Lance's SQL writes it; `fit_name` has left no backtick in it."""
    return f"`{name}`"


def fit_name(name: str) -> str:
    """A name that Lance takes for a column: it splits names at dots, and knows no escape for a backtick."""
    fitted = re.sub(r"[.`\x00]", "_", name)
    return fitted if fitted and not fitted.startswith("_") else f"column{fitted}"


def check_condition(where: str) -> str:
    """Refuses what is no single condition: Lance's parser passes over whatever follows the first expression.

    Raises:
        ValueError: If a bracket closes that was not opened, a quote stays open, or there is a semicolon or comment.
    """
    bare = re.sub(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`", "x", where)
    depth, least = 0, 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        least = min(least, depth)
    wrong = next((part for part in (";", "--", "/*", "'", '"', "`") if part in bare), None)
    if wrong is not None or least < 0 or depth != 0 or not where.strip():
        reason = f"{wrong!r} outside of a quoted text or name" if wrong else "brackets that do not match"
        raise ValueError(
            f"`where` must be one condition. Got {where!r}, with {reason if where.strip() else 'nothing'}."
        )
    return where


def condition_error(where: str, names: list[str], error: BaseException) -> ValueError:
    """What is said of a condition that Lance does not take."""
    reason = first_line(str(error)).removeprefix("Invalid input, ").rstrip(".")
    return ValueError(
        f"`where` must be a condition on columns of the index: {', '.join(names)}. Got {where!r} ({reason})."
    )
