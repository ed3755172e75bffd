"""Run record: reads back what a run's folder says about its configuration and domains; loads no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_udon.domain_spec import DomainSpec

# Keys of the configuration that were elsewhere in version 0.1.0, and where they are now.
MOVED = {
    "optim.idle_heads": "ablation.idle_heads",
    "loss.distill_through_backbone": "ablation.distill_through_backbone",
    "loss.distillation_ramp_steps": "ablation.distillation_ramp_steps",
    "sampling.signal": "ablation.signal",
}
# Keys of version 0.1.0 that are gone: the value that is now the only one, and what it means.
REMOVED: dict[str, tuple[Any, str]] = {
    "data.eval_antialias": (True, "evaluation images are resized with antialias, as the published processor does"),
    "data.resize_size": (None, "training images are resized to 8/7 of `data.image_size`"),
}


class OldRunError(ValueError):
    """A run that an older version has written and this one cannot go on with; its message is one line."""


@dataclass(frozen=True)
class RunRecord:
    """A run on disk, read back from its folder.

    Attributes:
        folder: The run's folder.
        config: The resolved config, without versions.
        domains: The domains it was trained on.
        seed: Seed of its data.
    """

    folder: Path
    config: dict[str, Any]
    domains: dict[str, DomainSpec]
    seed: int

    @property
    def weights(self) -> Path:
        """The best weights with teachers and prototypes, while the run keeps its checkpoints."""
        return self.folder / "checkpoints" / "best" / "model.safetensors"


def migrate(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns the saved configuration of a run with all keys where they are now.

    Args:
        config: What a run of this or an older version has saved.
        path: Where it was saved, for the message.

    Raises:
        OldRunError: If the run depends on a value that can no longer be given.
    """
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    for old, (only, meaning) in REMOVED.items():
        section, key = old.split(".")
        if key in _section(config, section) and config[section].pop(key) != only:
            raise OldRunError(
                f"`{old}` must be {yaml.safe_dump(only).split()[0]} in {path}, since {meaning}. Got another value; go "
                "on with modeling-udon 0.1.0, which wrote it, or train again."
            )
    for old, new in MOVED.items():
        section, key = old.split(".")
        if key in _section(config, section):
            config.setdefault(new.split(".")[0], {})[key] = config[section].pop(key)
    return config


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def read_run(folder: str | Path) -> RunRecord:
    """Reads the saved configuration and domains of a run.

    Raises:
        ValueError: If the folder holds no run with a best student, or one that this version cannot go on with.
    """
    folder = Path(folder)
    for needed in ("config.yaml", "best/config.json"):
        if not (folder / needed).is_file():
            raise ValueError(f"--run must be the folder of a run with a best student. Got {folder} without {needed}.")
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        saved.pop("versions")  # written last: without them, the end is missing
        domains = {name: DomainSpec.model_validate(spec) for name, spec in saved["domains"].items()}
        seed = saved["seed"]
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(
            f"--run must be the folder of a run as it was written. Got {folder} with a damaged config.yaml"
        ) from None
    return RunRecord(folder, migrate(saved, folder / "config.yaml"), domains, seed)
