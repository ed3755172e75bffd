"""A verb's parser, made from its function: the signature gives names, types and defaults, the docstring the help."""

import argparse
import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

_SECTION = re.compile(r"^(Args|Example):\n((?:    .*\n?|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^(\w+): (.+(?:\n    .+)*)", re.MULTILINE)


# More processes than any machine decodes with: a slip of the finger must not take the machine down.
_MOST_WORKERS = 1024


def _some_text(text: str) -> str:
    # What a shell makes of a variable that is not set: as a folder it would be the one where one stands.
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty. Got {text!r}.")
    return text


@dataclass(frozen=True)
class Value:
    """How an option is shown in the help, and how its text becomes a value."""

    metavar: str
    parse: Callable[[str], Any] = _some_text


def _whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}. Got {text!r}.")
        if int(text) > most:
            raise argparse.ArgumentTypeError(f"must be a whole number of at most {most:,}. Got {text!r}.")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1. Got {text!r}.")
    return value


def _four_numbers(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, width, height = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be four numbers, left,top,width,height in pixels. Got {text!r}."
        ) from None
    return left, top, width, height


Positive = Annotated[int, Value("N", _whole_number(1))]
Natural = Annotated[int, Value("N", _whole_number(0))]
Workers = Annotated[int, Value("N", _whole_number(0, _MOST_WORKERS))]
Decoders = Annotated[int, Value("N", _whole_number(1, _MOST_WORKERS))]
Port = Annotated[int, Value("N", _whole_number(1, 2**16 - 1))]
Share = Annotated[float, Value("R", _share)]
Box = Annotated[tuple[float, float, float, float], Value("L,T,W,H", _four_numbers)]
Folder = Annotated[str, Value("FOLDER")]
File = Annotated[str, Value("FILE")]
Name = Annotated[str, Value("NAME")]
Column = Annotated[str, Value("COLUMN")]
Commit = Annotated[str, Value("REVISION")]
Pooling = Literal["cls", "mean", "cls+mean", "pooler"]
Repo = Annotated[str, Value("OWNER/NAME")]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_verb(
    verbs: Any,
    name: str,
    *functions: Callable[..., Any],
    one_of: Sequence[str] = (),
    at_most_one_of: Sequence[str] = (),
) -> None:
    """Adds a parser that calls functions one after the other.

    Parameters before the `*` are positional, the others options; those without a default are required.

    Args:
        verbs: What `add_subparsers` gave.
        name: As it is typed.
        functions: Each but the first also takes the answer of the one before, as its first argument. Their docstrings
            need `Args`; the one with an `Example` describes the verb by its summary.
        one_of: Options of which exactly one must be given.
        at_most_one_of: Options of which one may be given.
    """
    docs = [inspect.getdoc(function) or "" for function in functions]
    sections = [{title: inspect.cleandoc(text) for title, text in _SECTION.findall(doc + "\n")} for doc in docs]
    main = next(number for number, found in enumerate(sections) if "Example" in found)
    summary = docs[main].partition("\n")[0].rstrip(".")
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary[0].lower() + summary[1:],
        description=f"{summary}.",
        epilog=f"example: {sections[main]['Example']}",
        allow_abbrev=False,
    )
    groups = {key: parser.add_mutually_exclusive_group(required=True) for key in one_of[:1]}
    groups |= {key: parser.add_mutually_exclusive_group() for key in at_most_one_of[:1]}
    for number, function in enumerate(functions):
        hints = get_type_hints(function, include_extras=True)
        texts = {key: " ".join(text.split()) for key, text in _ENTRY.findall(sections[number]["Args"])}
        for parameter in _own_parameters(function, number):
            key = parameter.name
            group = next((groups[names[0]] for names in (one_of, at_most_one_of) if key in names), parser)
            _add_argument(group, parameter, hints[key], texts[key])
    parser.set_defaults(verb_functions=functions)


def run_verb(arguments: argparse.Namespace) -> None:
    """Calls a verb's functions with the parsed values."""
    answer: tuple[Any, ...] = ()
    for number, function in enumerate(arguments.verb_functions):
        values = {parameter.name: getattr(arguments, parameter.name) for parameter in _own_parameters(function, number)}
        answer = (function(*answer, **values),)


def _own_parameters(function: Callable[..., Any], number: int) -> list[inspect.Parameter]:
    """The parameters that are no answer of the function before."""
    return list(inspect.signature(function).parameters.values())[min(number, 1) :]


def _add_argument(parser: Any, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    positional = parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    name = parameter.name.replace("_", "-")
    flag = parameter.name if positional else f"-{name}" if len(name) == 1 else f"--{name}"
    required: dict[str, Any] = {}
    if not positional and parameter.default is inspect.Parameter.empty:
        required = {"required": True}
    if hint is bool:
        parser.add_argument(flag, action="store_true", help=text.rstrip("."))
        return
    kind, many = _unwrapped(hint)
    settings: dict[str, Any] = {"default": list(default) if isinstance(default, tuple) else default, **required}
    if many:
        settings["nargs"] = "*" if positional and default is not None else "+"
    if get_origin(kind) is Literal:
        settings["choices"] = get_args(kind)
    else:
        value = get_args(kind)[1] if get_origin(kind) is Annotated else Value(parameter.name.upper())
        settings |= {"metavar": value.metavar, "type": value.parse}
    if positional:
        settings["metavar"] = parameter.name.upper()
    shown = default if isinstance(default, int | float | str) else None
    help_text = text if shown is None else f"{text.rstrip('.')}; default: {shown}"
    parser.add_argument(flag, help=help_text.rstrip(".").replace("%", "%%"), **settings)


def _unwrapped(hint: Any) -> tuple[Any, bool]:
    """The type of one value, without `| None` and `Sequence`, and whether there may be several values."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(inner for inner in get_args(hint) if inner is not type(None))
    if get_origin(hint) is Sequence:
        return get_args(hint)[0], True
    return hint, False
