"""`results.json`: what it holds, how a new measurement joins an older one, how it is written."""

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from modeling_udon.evaluation.protocol import Scores, SplitScores
from modeling_udon.storage import DamagedFileError, read_json, write_json
from modeling_udon.version import __version__

RESULTS_FILE = "results.json"
# What is read back of it.
RESULTS = {"splits": {str: dict}, "config": dict}
LIBRARIES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "faiss-cpu", "faiss-gpu", "numpy")
# Scores of one model that were measured twice may differ by the noise of another batch size.
_SAME_SCORE = 0.005


def build_results(
    splits: Mapping[str, SplitScores], *, baseline: Mapping[str, Scores], config: Mapping[str, Any]
) -> dict[str, Any]:
    """What `results.json` holds.

    Args:
        splits: By name: "test", "val".
        baseline: "untrained" and "raw_pixels", scored on the merged index of the test split.
        config: Plain values, as JSON takes them.
    """
    return {
        "schema": 1,
        "splits": {
            name: {
                "merged": split.merged,
                "separate": split.separate,
                "teachers": split.teachers["domains"] if split.teachers else {},
                **({"left_out": dict(split.left_out)} if split.left_out else {}),
                **({"copies": dict(split.copies)} if split.copies else {}),
            }
            for name, split in splits.items()
        },
        "baseline": {name: {**scores["mean"], "domains": scores["domains"]} for name, scores in baseline.items()},
        "versions": versions(),
        "config": dict(config),
    }


def write_results(path: str | os.PathLike[str], results: Mapping[str, Any]) -> None:
    """Write `results.json`; a file that is there is replaced in one step, never left half written."""
    write_json(Path(path), results)


def versions() -> dict[str, str]:
    """The versions of Python, of this package and of the libraries that shape its numbers."""
    found = {"python": platform.python_version(), "modeling_udon": __version__}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def read_results(folder: Path) -> dict[str, Any] | None:
    """Reads `results.json` of a folder; `None` if there is none.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / RESULTS_FILE
    if not path.is_file():
        return None
    try:
        results: dict[str, Any] = read_json(path, RESULTS)
    except DamagedFileError:
        raise ValueError(f"`output` must hold no damaged {RESULTS_FILE}. Got {path}; remove it.") from None
    return results


def kept_metrics(old: Mapping[str, Any] | None, split: str) -> list[str]:
    """Metrics that earlier results have of a split, so that a new measurement can have them too."""
    return [] if old is None else list(old["splits"].get(split, {}).get("merged", {}).get("mean", {}))


def merge_results(old: Mapping[str, Any] | None, results: dict[str, Any]) -> dict[str, Any]:
    """Joins a new measurement with an older one of the same model and domains.

    The new values count. What only the older one has stays: other splits, other metrics, sections such as `leaks`. Of
    another model nothing stays; neither does anything of a split whose scores are others now, since the weights are.

    Args:
        old: What `results.json` held, `None` if there was none.
        results: The new results.
    """
    if old is None or (old["config"] and old["config"] != results["config"]):
        return results
    splits = {name: split for name, split in results["splits"].items() if not _same_scores(old, name, split)}
    kept = {
        key: {name: value for name, value in old.get(key, {}).items() if name not in splits}
        for key in ("splits", "analysis", "adaptation")
    }
    merged = {**old, **results, "baseline": {**old.get("baseline", {}), **results["baseline"]}}
    # The scores of teachers and branches are measured as a whole, or not at all where a run's checkpoints are gone.
    parts_of = {"splits": ("merged", "separate", "teachers"), "analysis": ("pca",), "adaptation": ()}
    for key, parts in ((key, parts) for key, parts in parts_of.items() if key in merged):
        merged[key] = {**kept[key], **results.get(key, {})}
        for name, new in results.get(key, {}).items():
            before = kept[key].get(name, {})
            merged[key][name] = {**before, **new}
            for part in parts:
                if part in before and part in new:
                    merged[key][name][part] = _joined(before[part], new[part])
    return merged


def _same_scores(old: Mapping[str, Any], name: str, split: Mapping[str, Any]) -> bool:
    before, now = old["splits"].get(name, {}).get("merged", {}).get("domains", {}), split["merged"]["domains"]
    return set(before) == set(now) and all(
        abs(before[domain].get(metric, value) - value) <= _SAME_SCORE
        for domain, values in now.items()
        for metric, value in values.items()
    )


def _joined(old: Any, new: Any) -> Any:
    """Joins two trees of dictionaries; where both have a value that is no dictionary, the new one counts."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {**old, **{key: _joined(old[key], value) if key in old else value for key, value in new.items()}}
