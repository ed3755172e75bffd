"""Run record: reads back what a run's folder says about its configuration and domains; loads no model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from modeling_udon.domain_spec import DomainSpec


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


def read_run(folder: str | Path) -> RunRecord:
    """Reads what a run was told.

    Raises:
        ValueError: If the folder holds no run with a best student.
    """
    folder = Path(folder)
    for needed in ("config.yaml", "best/config.json"):
        if not (folder / needed).is_file():
            raise ValueError(f"--run must be the folder of a run with a best student, got {folder} without {needed}")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        config.pop("versions", None)
        domains = {name: DomainSpec.model_validate(spec) for name, spec in config["domains"].items()}
        return RunRecord(folder, config, domains, config["seed"])
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(
            f"--run must be the folder of a run as it was written, got {folder} with a damaged config.yaml"
        ) from None
