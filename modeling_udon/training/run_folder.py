"""A run's folder: what lies where in it, when it may be used, and whether a run may go on from it."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from modeling_udon.data.domains import Domain, check_label_maps, label_maps
from modeling_udon.retrieval.protocol import versions
from modeling_udon.training.checkpoint import find_checkpoint, list_checkpoints, read_state, recover_checkpoints
from modeling_udon.training.config import ConfigError, TrainConfig
from modeling_udon.training.config_file import dump_config
from modeling_udon.training.files import recover_folder, write_text
from modeling_udon.training.resuming import FREE, Changes, check_allowances, check_changes, differences
from modeling_udon.training.run_lock import LOCK_FILE, RunLock


class RunFolder:
    """The folder of one run, which it has for itself until it leaves it as a context.

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
        incidents: Steps that were not applied.
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
        self.incidents = self.path / "incidents"
        self.results = self.path / "results.json"
        self._lock = RunLock(self.path)
        self._changes: Changes = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def find_checkpoint(self, resume: bool, overwrite: bool) -> tuple[Path | None, list[str]]:
        """Takes the folder for this run alone, if it is there, and finds what to go on from.

        Returns:
            The newest whole checkpoint, if any, and a line for each damaged one after it.

        Raises:
            ConfigError: If the folder holds a run and is to be neither resumed nor overwritten.
            FolderInUseError: If another run is using it.
            CheckpointError: If all checkpoints are damaged.
        """
        if not (resume or overwrite) and self.metrics.exists():
            raise ConfigError(
                f"`output_dir`/`name` must be a new folder. Got {self.path}, which holds a run; go on with --resume, "
                "start anew with --overwrite, or choose another --name."
            )
        if self.path.is_dir():
            self._lock.acquire()
        if not resume:
            return None, []
        recover_checkpoints(self.checkpoints)
        return find_checkpoint(self.checkpoints) if list_checkpoints(self.checkpoints) else (None, [])

    def check_unchanged(
        self, domains: Mapping[str, Domain], checkpoint: Path, processes: int, allow: Collection[str]
    ) -> None:
        """Compares data, config, processes and versions with those the run was started with.

        Args:
            domains: The opened domains.
            checkpoint: What the run goes on from.
            processes: Number of processes.
            allow: What may have changed.

        Raises:
            ConfigError: If something else has changed that decides the result.
        """
        check_allowances(allow, dump_config(self._config))
        maps = self.path / "domains.json"
        saved_maps = json.loads(maps.read_text(encoding="utf-8"))
        try:
            if "data" in allow:
                check_label_maps(domains, maps, ("num_classes", "classes"))
            else:
                check_label_maps(domains, maps)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        before = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        before["processes"] = read_state(checkpoint).extra["processes"]
        changes = differences(before, self._described() | {"processes": processes})
        check_changes(changes, allow)
        for name, now in label_maps(domains).items():
            for what in ("num_images", "fingerprint"):
                if saved_maps[name][what] != now[what]:
                    changes[f"data.{name}.{what}"] = saved_maps[name][what], now[what]
        self._changes = {key: values for key, values in changes.items() if key not in FREE}

    def prepare(self, domains: Mapping[str, Domain], overwrite: bool, step: int) -> None:
        """Makes the folder with config and label maps; an old run goes only now that the new one is found right.

        Args:
            domains: The opened domains.
            overwrite: Whether an old run goes.
            step: Step that the run goes on from, 0 at its start.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._lock.sign()
        if overwrite:
            self._clear()
        recover_folder(self.best)
        recover_folder(self.checkpoints / "best")
        self._record_changes(step)
        write_text(self.path / "config.yaml", yaml.safe_dump(self._described(), sort_keys=False))
        write_text(self.path / "domains.json", json.dumps(label_maps(domains), indent=1))

    def _described(self) -> dict[str, Any]:
        return dump_config(self._config) | {"versions": versions()}

    def _clear(self) -> None:
        """Empties the folder; the lock stays, or another run could take a new one of the same name."""
        for path in self.path.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()

    def _record_changes(self, step: int) -> None:
        if not self._changes:
            return
        path = self.path / "changes.json"
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        changed = {key: {"before": before, "now": now} for key, (before, now) in self._changes.items()}
        write_text(path, json.dumps([*recorded, {"step": step, "changes": changed}], indent=1))
