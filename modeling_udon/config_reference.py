"""Reference of the configuration: a Markdown table for each section, made from the descriptions of its keys.

`make docs` puts it on the page `docs/reference/configuration.md`; `python -m modeling_udon.config_reference` prints it.
"""

import json
import sys
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modeling_udon.config import TrainConfig
from modeling_udon.config_sections import section_of
from modeling_udon.domain_spec import DomainSpec

# Bounds as pydantic keeps them, and how a table says them.
_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def describe_configuration() -> str:
    """Returns a table of keys for the run, for each section and for a domain, as Markdown."""
    run = "Keys at the top of the file."
    tables = [
        *_tables("The run", run, TrainConfig, ""),
        *_tables("A domain", DomainSpec.__doc__, DomainSpec, "domains.NAME."),
    ]
    return "\n".join(tables)


def _tables(title: str, summary: str | None, model: type[BaseModel], prefix: str) -> Iterator[str]:
    """The table of a section's own keys, then those of the sections in it."""
    sections = {name: inner for name, field in model.model_fields.items() if (inner := section_of(field)) is not None}
    own = {name: field for name, field in model.model_fields.items() if name not in sections}
    yield _table(title, summary, own, prefix)
    for name, inner in sections.items():
        yield from _tables(f"`{prefix}{name}`", inner.__doc__, inner, f"{prefix}{name}.")


def _table(title: str, summary: str | None, fields: dict[str, FieldInfo], prefix: str) -> str:
    lines = [f"## {title}", "", summary or "", "", "| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(_plain(field.get_default()), default=str)}`"
        meaning = " ".join((field.description or "").split())
        cells = (f"`{prefix}{name}`", default, _values(field), meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def _values(field: FieldInfo) -> str:
    bounds = [
        words.format(f"{getattr(bound, name):,}")
        for bound in field.metadata
        for name, words in _BOUNDS.items()
        if hasattr(bound, name)
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _kind(annotation: Any) -> str:
    """Names a type as a user of YAML would."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "`null`"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is dict:
        return f"mapping of {_kind(inner[0])} to {_kind(inner[1])}"
    if origin in (tuple, list):
        values = dict.fromkeys(_kind(kind) for kind in inner if kind is not Ellipsis)
        return f"list of {', '.join(values)}"
    if origin in (types.UnionType, Union):
        return " or ".join(map(_kind, inner))
    if origin is not None:
        return _kind(inner[0])
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "any"}
    return "domain (last table)" if annotation is DomainSpec else names.get(annotation, "path")


if __name__ == "__main__":
    sys.stdout.write(describe_configuration())
