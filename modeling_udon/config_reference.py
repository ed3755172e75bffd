"""Reference of the configuration: a Markdown table for each section, made from the descriptions of its keys."""

import json
import types
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from modeling_udon.config import TrainConfig
from modeling_udon.domain_spec import DomainSpec

_INTRODUCTION = """# Configuration

Every key of a run's YAML file, made from the code. On the command line, `--section.key value` overrides a key.
"""


def describe_configuration() -> str:
    """Returns the page `docs/reference/configuration.md`."""
    fields = TrainConfig.model_fields
    sections = {name: model for name, field in fields.items() if (model := _section_of(field)) is not None}
    run = {name: field for name, field in fields.items() if name not in sections}
    parts = [_INTRODUCTION, _table("The run", TrainConfig.__doc__, run, "")]
    parts += [_table(f"`{name}`", model.__doc__, model.model_fields, f"{name}.") for name, model in sections.items()]
    parts.append(_table("A domain", DomainSpec.__doc__, DomainSpec.model_fields, "domains.NAME."))
    return "\n".join(parts)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind if kind is not DomainSpec else None
    return None


def _table(title: str, summary: str | None, fields: dict[str, FieldInfo], prefix: str) -> str:
    lines = [f"## {title}", "", summary or "", "", "| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(), default=str)}`"
        meaning = " ".join((field.description or "").split())
        cells = (f"`{prefix}{name}`", default, _kind(field.annotation), meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _kind(annotation: Any) -> str:
    """Names a type as a user of YAML would."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "`null`"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (dict, tuple, list):
        values = dict.fromkeys(_kind(kind) for kind in inner if kind is not Ellipsis)
        return f"{'mapping' if origin is dict else 'list'} of {', '.join(values)}"
    if origin is types.UnionType:
        return " or ".join(map(_kind, inner))
    if origin is not None:
        return _kind(inner[0])
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Any: "any"}
    return "domain, see below" if annotation is DomainSpec else names.get(annotation, "path")
