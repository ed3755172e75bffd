"""A YAML file becomes a typed, checked config.

A file may name a `base` file, whose values it takes over and overrides; `--section.key value` on the command line
overrides both. Unknown keys, wrong types and values out of range are refused by name before any work starts.
"""

import copy
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_sections import Section, section_of
from modeling_udon.domain_spec import DomainSpec
from modeling_udon.run_record import MOVED, REMOVED, OldRunError, RunRecord, read_run
from modeling_udon.strict_yaml import load_strict
from modeling_udon.systems import SYSTEMS, Default

# Characters of a wrong value that a message repeats.
_MAX_SHOWN = 200
# What is a run's own: not where its student goes, nor what it itself started from.
_NOT_TAKEN_OVER = ("init", "push", "teachers")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    domains: Sequence[str] = (),
    init: str | Path | None = None,
    added: Sequence[str] = (),
) -> TrainConfig:
    """Reads a config file.

    Args:
        path: A YAML file, whose `base` key may name another, relative to it; `None` only with `init`.
        overrides: Command line arguments such as `["--optim.lr", "3e-4"]` or `["--optim.lr=3e-4"]`.
        domains: `NAME=SOURCE` of each domain that is to take the place of those in the file.
        init: Folder of a trained run to start from; its settings stand where neither file nor overrides say otherwise.
        added: `NAME=SOURCE` of each domain that comes to those of that run.

    Raises:
        ConfigError: If a file or a value cannot be used; the message is one line.
    """
    if path is None and init is None:
        raise ConfigError("`--config` must name a YAML file, unless `--init` names a run to start from. Got neither.")
    values = {} if path is None else _read(Path(path), ())
    old: dict[str, Any] = {}
    if init is not None:
        taken_over = _take_over(init)
        old = taken_over["domains"]
        values = _merge(taken_over, values)
    if domains:
        values["domains"] = dict(_named("--domain", domain) for domain in domains)
    for key, value in _pairs(overrides):
        _set(values, key, value)
    if init is not None:
        _set(values, "init.run", str(init))
    if added:
        _add_domains(values, init, added)
    if init is not None and not domains and values["init"].get("old_data") == "none":
        values["domains"] = {name: spec for name, spec in _section(values, "domains").items() if name not in old}
    values = _expand_variables(values)
    _apply_system(values)
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, path or Path(str(init)) / "config.yaml")) from None


def dump_config(config: TrainConfig) -> dict[str, Any]:
    """Returns the resolved config as YAML and JSON take it."""
    return config.model_dump(mode="json")


def with_defaults(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the saved config of a run with keys that came to be after it, whose defaults are what it did.

    Args:
        saved: What `dump_config` gave, and other keys, which stay.
    """
    filled = {key: dict(value) if isinstance(value, dict) else value for key, value in saved.items()}
    for name, field in TrainConfig.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            filled[name] = kind.model_construct().model_dump(mode="json") | filled.get(name, {})
        elif not field.is_required():
            default = field.get_default()
            filled.setdefault(name, list(default) if isinstance(default, tuple) else default)
    filled["domains"] = {
        name: DomainSpec.model_validate(spec).model_dump(mode="json") for name, spec in filled["domains"].items()
    }
    return filled


def read_initial_run(folder: Path) -> RunRecord:
    """Reads the run that another one starts from.

    Raises:
        ConfigError: If the folder holds no run with its best weights.
    """
    try:
        run = read_run(folder)
    except OldRunError as error:
        raise ConfigError(str(error)) from None
    except ValueError:
        raise ConfigError(
            f"`init.run` must be the folder of a run with a best student. Got {folder}; give the folder that holds "
            "its config.yaml and best/."
        ) from None
    if not run.weights.is_file():
        raise ConfigError(
            f"`init.run` must still have its best weights with teachers and prototypes. Got {folder} without "
            "checkpoints/best/model.safetensors; train it again or give another run."
        )
    return run


def _take_over(folder: str | Path) -> dict[str, Any]:
    """Returns the settings of a run that one that starts from it has, unless it is told otherwise.

    Raises:
        ConfigError: If the folder holds no run with its best weights.
    """
    config = read_initial_run(Path(folder)).config
    return {key: value for key, value in config.items() if key not in _NOT_TAKEN_OVER}


def _read(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    try:
        path = path.resolve()
    except ValueError:
        raise ConfigError(f"`config` must be a path. Got {str(path)!r}, with a null character.") from None
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"`config` must be a file that can be read. Got {str(path)!r}: {error}.") from None
    if path in including:
        raise ConfigError(f"`base` must not lead back to its own file. Got {path} again; remove one `base`.")
    try:
        values = load_strict(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"`config` must be a file that can be read. Got {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"`config` must be a UTF-8 text file. Got {path}, which is not.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"`config` must be valid YAML. Got {path}{_fault(error)}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"`config` must hold keys with values. Got {type(values).__name__} in {path}.")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(_read(path.parent / _expand_variables(str(base)), (*including, path)), values)


def _expand_variables(value: Any) -> Any:
    """Puts the environment's values in for `${NAME}`."""
    if isinstance(value, dict):
        return {key: _expand_variables(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand_variables(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if "\0" in value:
        raise ConfigError(f"`config` must hold text without null characters. Got {_short(value)}.")
    for name in _VARIABLE.findall(value):
        if _SECRET.search(name):
            raise ConfigError(
                f"`${{{name}}}` must stay out of a config, which is saved with the run and published. Got {value!r}; "
                "the libraries read it from the environment."
            )
        if name not in os.environ:
            raise ConfigError(f"`${{{name}}}` must be set in the environment. Got {value!r}; export {name}=...")
    return _VARIABLE.sub(lambda match: os.environ[match[1]], value)


def _apply_system(values: dict[str, Any]) -> None:
    """Fills in what makes up the system; a value that contradicts it is refused."""
    system = values.get("system", "udon")
    if not isinstance(system, str):
        return  # As above.
    for section, settings in SYSTEMS.get(system, {}).items():
        if isinstance(settings, list):
            _fill_in(values, section, settings, section, system)
            continue
        given = values[section] = values.get(section) or {}
        if not isinstance(given, dict):
            return  # Its type is refused with the others.
        for key, value in settings.items():
            _fill_in(given, key, value, f"{section}.{key}", system)


def _fill_in(values: dict[str, Any], key: str, value: Any, name: str, system: str) -> None:
    if isinstance(value, Default):
        values.setdefault(key, copy.deepcopy(value.value))
        return
    if values.setdefault(key, copy.deepcopy(value)) != value:
        raise ConfigError(f"`{name}` must be {value!r} for system {system!r}. Got {values[key]!r}; leave one out.")


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both_nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        # Half of one backbone and half of another would be neither.
        merged[key] = _merge(merged[key], value) if both_nested and key != "backbone_config" else value
    return merged


def _named(option: str, domain: str) -> tuple[str, str]:
    name, equals, source = domain.partition("=")
    if not (name and equals and source):
        raise ConfigError(f"`{option}` must look like NAME=SOURCE. Got {domain!r}; write {option} shoes=/data/shoes.")
    return name, source


def _add_domains(values: dict[str, Any], init: str | Path | None, added: Sequence[str]) -> None:
    """Puts new domains beside those of the run that this one starts from."""
    if init is None:
        raise ConfigError("`--add-domain` must go with `--init`, the run that gets the domain. Got no run.")
    new = dict(_named("--add-domain", domain) for domain in added)
    known = _section(values, "domains")
    for name in new:
        if name in known:
            raise ConfigError(
                f"`--add-domain` must name a new domain. Got {name!r}, which {init} has already; choose another name."
            )
    values["domains"] = {**known, **new}


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    section = values.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"`{name}` must hold keys with values. Got {_short(section)}.")
    return section


def _pairs(overrides: Sequence[str]) -> list[tuple[str, Any]]:
    pairs, words = [], list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"An override must look like `--section.key value`. Got {word!r}.")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"An override must have a value. Got `{word}` with none; write `{word} VALUE`.")
            text = words.pop(0)
        try:
            pairs.append((key, load_strict(text)))
        except yaml.YAMLError:
            raise ConfigError(f"`{key}` must have a YAML value. Got {_short(text)}; put it in quotes.") from None
    return pairs


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        nested = values[parent]
        if parents[0] == "domains" and isinstance(nested, str):
            nested = values[parent] = {"path": nested}
        if not isinstance(nested, dict):
            raise ConfigError(f"`{key}` must lead through sections. Got the value {_short(nested)} at `{parent}`.")
        values = nested
    values[last] = value


def _explain(error: ValidationError, path: str | Path) -> str:
    # A typo before what is missing because of it.
    first, *others = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    more = f" ({len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        return f"`{where}` is not a key of {path}; {_hint(first['loc'])}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"`{where}` is missing in {path}.{more}"
    got = "" if isinstance(first["input"], dict | BaseModel) else f" Got {_short(first['input'])}."
    message = message[0].lower() + message[1:] if message[1:2].islower() else message
    return f"`{where}`: {message}.{got}{more}" if where else f"{message}.{more}"


def _fault(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else f": {error}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _hint(location: tuple[str | int, ...]) -> str:
    """Where an unknown key has moved to, or what it may have been meant to be."""
    *parents, key = location
    where = ".".join(map(str, location))
    if where in MOVED:
        return f"it has moved: write `{MOVED[where]}`."
    if where in REMOVED:
        return f"it is gone: {REMOVED[where][1]}; remove it."
    known = _known_keys(location[:-1])
    within = [
        f"{section}.{key}"
        for section, field in TrainConfig.model_fields.items()
        if not parents and key in getattr(field.annotation, "model_fields", {})
    ]
    meant = within or difflib.get_close_matches(str(key), known, n=1)
    return f"did you mean `{'` or `'.join(meant)}`?" if meant else f"known here: {', '.join(known)}."


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    model: type[BaseModel] = TrainConfig
    for part in location:
        if isinstance(part, int):  # a place in a list of sections
            continue
        field = model.model_fields.get(part)
        if field is None:
            return list(DomainSpec.model_fields)
        model = section_of(field) or model
    return list(model.model_fields) if location[:1] != ("domains",) else list(DomainSpec.model_fields)
