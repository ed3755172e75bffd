"""Run folder: layout, lock and resume checks."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import dump_config, with_defaults
from modeling_udon.data.domains import Domain
from modeling_udon.data.label_maps import check_label_maps, label_maps
from modeling_udon.evaluation.results import versions
from modeling_udon.hub.sources import SOURCES_FILE, find_sources
from modeling_udon.run_record import migrate
from modeling_udon.storage import recover_folder, write_text
from modeling_udon.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    read_state,
    recover_checkpoints,
)
from modeling_udon.training.extension import OLD_SCORES_FILE
from modeling_udon.training.resuming import FREE, Changes, check_allowances, check_changes, differences
from modeling_udon.training.run_lock import LOCK_FILE, RunLock

# What of a domain may change where `data` is allowed.
_IMAGES = ("num_images", "fingerprint")
_NOT_AS_WRITTEN = (
    "`--resume` must find {} as the run wrote it. Got {}, which {}; bring it back, or start over with --overwrite."
)


class RunFolder:
    """The folder of one run, locked for it until the context ends.

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
        # Checkpoints of a run that is being overwritten.
        self._cleared = self.path / ".cleared"
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
            ConfigError: If the folder holds a run and is to be neither resumed nor overwritten, holds something else
                and is to be overwritten, or is a file.
            FolderInUseError: If another run is using it.
            CheckpointError: If all checkpoints are damaged.
        """
        if not (resume or overwrite) and self.metrics.exists():
            raise ConfigError(
                f"`output_dir`/`name` must be a new folder. Got {self.path}, which holds a run; go on with --resume, "
                "start over with --overwrite, or choose another --name."
            )
        if overwrite:
            self._check_overwritten()
        if self.path.is_dir():
            self._lock.acquire()
        elif os.path.lexists(self.path):
            raise ConfigError(
                f"`output_dir`/`name` must be a new folder. Got {self.path}, which is a file; choose another --name."
            )
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
            CheckpointError: If a file that the run needs is missing or damaged.
        """
        check_allowances(allow, dump_config(self._config))
        maps, path = self._read("domains.json", json.loads), self.path / "domains.json"
        before = self._read("config.yaml", yaml.safe_load)
        try:
            before = with_defaults(migrate(before, self.path / "config.yaml"))
            check_label_maps(domains, path, ("num_classes", "classes"))
            if "data" not in allow:
                check_label_maps(domains, path, _IMAGES, "allow it with --resume-allow data")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if any("test" in domain.evaluation for domain in domains.values()):
            # Else they would be missed when all steps are done.
            for name in (self.baseline.name, *([OLD_SCORES_FILE] if self._config.init else [])):
                self._read(name, json.loads)
        before["processes"] = read_state(checkpoint).processes
        changes = differences(before, self._described() | {"processes": processes})
        check_changes(changes, allow)
        for name, now in label_maps(domains).items():
            for what in _IMAGES:
                if maps[name][what] != now[what]:
                    changes[f"data.{name}.{what}"] = maps[name][what], now[what]
        self._changes = {key: values for key, values in changes.items() if key not in FREE}

    def prepare(self, domains: Mapping[str, Domain], overwrite: bool, step: int, launched: Mapping[str, Any]) -> None:
        """Makes the folder with config and label maps; an old run goes only now that the new one is found right.

        Args:
            domains: The opened domains.
            overwrite: Whether an old run goes.
            step: Step that the run goes on from, 0 at its start.
            launched: How its processes were started, which `launches.json` tells of each start.

        Raises:
            ConfigError: If there can be no folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, FileExistsError) as error:
            # A link that leads nowhere, such as to a disk that is not mounted, or a place of the system's own.
            raise ConfigError(
                f"`output_dir` must lead to where folders can be made. Got {self.path}, where {error.filename} cannot "
                f"be one ({error.strerror}); mount what it leads to, or choose another --output_dir."
            ) from None
        self._lock.acquire()
        self._lock.sign()
        if overwrite or self._cleared.exists():
            self._clear()
        recover_folder(self.best)
        recover_folder(self.checkpoints / "best")
        self._record_changes(step)
        self._add_to("launches.json", {"step": step, **launched})
        write_text(self.path / "config.yaml", yaml.safe_dump(self._described(), sort_keys=False))
        write_text(self.path / "domains.json", json.dumps(label_maps(domains), indent=1))
        # Now, since the same paths may mean something else where and when the student is published.
        sources = find_sources(dump_config(self._config)).to_json()
        write_text(self.path / SOURCES_FILE, json.dumps(sources, indent=1))

    def _described(self) -> dict[str, Any]:
        return dump_config(self._config) | {"versions": versions()}

    def _clear(self) -> None:
        """Empties the folder; the lock stays, or another run could take a new one of the same name.

        The checkpoints go at once, by their name: if this is killed, `--resume` goes on with none of them, but here.
        """
        if not self._cleared.exists():
            self.checkpoints.mkdir(exist_ok=True)
            self.checkpoints.rename(self._cleared)
        for path in sorted(self.path.iterdir(), key=lambda path: path == self._cleared):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK_FILE:
                path.unlink()

    def _check_overwritten(self) -> None:
        ours = (self.path / "config.yaml", self.metrics, self._cleared)
        found = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()
        # A run that was killed before it had written its config leaves no more than these.
        others = {name for name in found if name != LOCK_FILE and not name.startswith(".config.yaml.")}
        if others and not any(path.exists() for path in ours):
            raise ConfigError(
                f"`--overwrite` must find a run. Got {self.path}, which holds other things, such as "
                f"{min(others)}; move them away, or choose another --name."
            )

    def _read(self, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
        """Reads values that the run has written beside its checkpoints."""
        path = self.path / name
        try:
            values = parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(_NOT_AS_WRITTEN.format(name, path, "is missing")) from None
        except (ValueError, yaml.YAMLError):
            values = None
        if (
            not isinstance(values, dict)
            or not isinstance(values.get("domains", {}), dict)
            or (name == "config.yaml" and "domains" not in values)
        ):
            raise CheckpointError(_NOT_AS_WRITTEN.format(name, path, "is damaged"))
        return values

    def _record_changes(self, step: int) -> None:
        if not self._changes:
            return
        changed = {key: {"before": before, "now": now} for key, (before, now) in self._changes.items()}
        self._add_to("changes.json", {"step": step, "changes": changed})

    def _add_to(self, name: str, entry: dict[str, Any]) -> None:
        path = self.path / name
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        write_text(path, json.dumps([*recorded, entry], indent=1))
