"""Resume checks: changes since a run was started, and which of them are allowed."""

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from modeling_udon.config import ConfigError, PushConfig

# What may differ when a run goes on: where it is told of, and how fast data comes.
FREE = {"output_dir", "train.shard_backbone", "data.num_workers", "data.max_broken_share", "eval.batch_size"}
FREE |= {"eval.patience"}
FREE |= {"log.every", "log.trackers", "log.project"} | {f"push.{name}" for name in PushConfig.model_fields}
# The sampler stands in the middle of a plan that it made of these, and the best so far was chosen by the metric.
_FIXED = ("sampling.", "ablation.signal", "eval.metric")
# Names that are no key of the config.
ALLOWANCES = ("processes", "versions", "data")

Changes = dict[str, tuple[Any, Any]]


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested sections under names such as `optim.lr`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """Returns the nested values that differ: before and now, by name."""
    old, new = leaves(before), leaves(now)
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def check_allowances(allow: Collection[str], config: Mapping[str, Any]) -> None:
    """Checks the names of `--resume-allow`.

    Raises:
        ConfigError: If a name is neither a key of the config, whole or its last part, nor one of `ALLOWANCES`.
    """
    keys = leaves(config)
    known = {*keys, *(_short(key) for key in keys), *ALLOWANCES}
    for name in allow:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"further names are {', '.join(ALLOWANCES)}."
            raise ConfigError(f"`--resume-allow` must name keys of the config. Got {name!r}; {hint}")


def check_changes(changes: Changes, allow: Collection[str]) -> None:
    """Decides whether a run may go on.

    Args:
        changes: Keys of the config, `processes`, and `versions.torch` and the like, before and now.
        allow: What may change: keys, whole or their last part, or one of `ALLOWANCES`.

    Raises:
        ConfigError: If something has changed that may not.
    """
    refused = {key: values for key, values in changes.items() if not _is_free(key, values)}
    fixed = [key for key in refused if key.startswith(_FIXED)]
    if fixed:
        raise ConfigError(
            f"`--resume` must go on with the run's own sampling and metric. Got {_told(changes, fixed)}; start a new "
            "run for it."
        )
    refused = {key: values for key, values in refused.items() if allow_name(key) not in allow and key not in allow}
    refused = {key: values for key, values in refused.items() if _short(key) not in allow}
    if refused:
        names = ",".join(dict.fromkeys(allow_name(key) for key in refused))
        raise ConfigError(
            f"`--resume` must go on with what the run was started with. Got {_told(changes, list(refused))}; take it "
            f"back, or allow it with --resume-allow {names}."
        )


def allow_name(key: str) -> str:
    """The name that allows a change of `key`: itself, but one for all versions."""
    return "versions" if key.startswith("versions.") else key


def _is_free(key: str, values: tuple[Any, Any]) -> bool:
    """Python and the third number of a version decide nothing that we have seen, and are only recorded."""
    if key == "versions.python" or key in FREE:
        return True
    return key.startswith("versions.") and len({_series(value) for value in values}) == 1


def _series(version: str | None) -> str | None:
    return version and ".".join(version.partition("+")[0].split(".")[:2])


def _short(key: str) -> str:
    return key.rpartition(".")[2]


def _told(changes: Changes, keys: list[str]) -> str:
    return ", ".join(f"{key} from {changes[key][0]!r} to {changes[key][1]!r}" for key in keys)
