"""A run's folder: what lies where in it, when it may be used, and whether a run may go on from it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from modeling_udon.data.domains import Domain, check_label_maps, label_maps
from modeling_udon.retrieval.protocol import versions
from modeling_udon.training.checkpoint import find_checkpoint, list_checkpoints, recover_folder
from modeling_udon.training.config import ConfigError, PushConfig, TrainConfig
from modeling_udon.training.config_file import dump_config

# What may differ when a run goes on: where it is told of, and how fast data comes.
_FREE_ON_RESUME = {
    "output_dir",
    "train.shard_backbone",
    "log.every",
    "log.trackers",
    "log.project",
    "data.num_workers",
    "data.max_broken_share",
    "eval.batch_size",
}
_FREE_ON_RESUME |= {f"push.{name}" for name in PushConfig.model_fields}


class RunFolder:
    """The folder of one run.

    Args:
        config: The run.

    Attributes:
        path: `config.run_dir`.
        best: The best student, ready for the Hub.
        checkpoints: What a run goes on from.
        best_weights: The best weights with teachers and prototypes.
        baseline: Scores before training.
        metrics: Progress, a row of JSON each.
        broken: Images that could not be read, a row of JSON each.
        results: Scores of the test.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self.path = config.run_dir
        self.best = self.path / "best"
        self.checkpoints = self.path / "checkpoints"
        self.best_weights = self.checkpoints / "best" / "model.safetensors"
        self.baseline = self.path / "baseline.json"
        self.metrics = self.path / "metrics.jsonl"
        self.broken = self.path / "broken.jsonl"
        self.results = self.path / "results.json"

    def find_checkpoint(self, resume: bool, overwrite: bool) -> tuple[Path | None, list[str]]:
        """Finds what to go on from.

        Returns:
            The newest whole checkpoint, if any, and a line for each damaged one after it.

        Raises:
            ConfigError: If the folder holds a run and is to be neither resumed nor overwritten.
        """
        if not (resume or overwrite) and self.metrics.exists():
            raise ConfigError(
                f"`output_dir`/`name` must be a new folder. Got {self.path}, which holds a run; go on with --resume, "
                "start anew with --overwrite, or choose another --name."
            )
        return find_checkpoint(self.checkpoints) if resume and list_checkpoints(self.checkpoints) else (None, [])

    def check_unchanged(self, domains: Mapping[str, Domain]) -> None:
        """Compares data and config with those the run was started with.

        Raises:
            ConfigError: If they differ in what decides the result.
        """
        try:
            check_label_maps(domains, self.path / "domains.json")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        saved.pop("versions")
        before, now = leaves(saved), leaves(dump_config(self._config))
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        changed = [key for key in changed if key not in _FREE_ON_RESUME]
        if changed:
            details = ", ".join(f"{key} from {before.get(key)!r} to {now.get(key)!r}" for key in changed)
            raise ConfigError(
                f"`--resume` must go on with the run's own config. Got {details}; start a new run for it."
            )

    def prepare(self, domains: Mapping[str, Domain], overwrite: bool) -> None:
        """Makes the folder with config and label maps; an old run goes only now that the new one is found right."""
        if overwrite and self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        recover_folder(self.best)
        recover_folder(self.checkpoints / "best")
        config = dump_config(self._config) | {"versions": versions()}
        (self.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        (self.path / "domains.json").write_text(json.dumps(label_maps(domains), indent=1), encoding="utf-8")


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested sections under names such as `optim.lr`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
