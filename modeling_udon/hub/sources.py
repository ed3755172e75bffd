"""Sources: which backbone and data sets of the Hub a run opened, recorded while it does, and the licence they leave.

A path such as `data/shoes` names a folder here and a data set of a stranger elsewhere, so what a path meant is written
down by the run and never guessed from the path later.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

DEFAULT_LICENSE = "apache-2.0"
SOURCES_FILE = "sources.json"
NO_LICENSE = "`--license` must be given where backbone and data do not decide it. Got {}; pass `--license ID`."

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Licences that allow any further licence, as the Hub calls them.
_PERMISSIVE = frozenset(
    {
        *("apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "isc", "mit", "ncsa", "zlib"),
        *("cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "odc-by", "pddl", "unlicense"),
        *("cdla-permissive-1.0", "cdla-permissive-2.0"),
    }
)
_UNDECIDED = ("other", "unknown")
_DEMO_PREFIX = "demo:"


# Frozen teachers that are of the run itself.
_ITSELF = ("start", "average")


@dataclass(frozen=True)
class Sources:
    """What of a run came from the Hub.

    Attributes:
        backbone: Hub id of the backbone, `None` for one from scratch or from a folder.
        backbone_license: Licence that the card in a backbone's folder states.
        from_scratch: Whether the weights started from random numbers.
        domains: Hub id of each domain's data set, `None` for data from elsewhere.
        teachers: Frozen teachers: of those on the Hub their id with `None`, of others what their folder's card states
            as licence, `"unknown"` where it states none.
    """

    backbone: str | None = None
    backbone_license: str | None = None
    from_scratch: bool = False
    domains: Mapping[str, str | None] = field(default_factory=dict)
    teachers: Mapping[str, str | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The values as `sources.json` keeps them."""
        return asdict(self)


def find_sources(config: Mapping[str, Any]) -> Sources:
    """Says what a run opens, called where and when it opens it.

    Args:
        config: The run's resolved config.
    """
    backbone = config["model"]["backbone"]
    if config.get("init"):
        backbone = str(Path(config["init"]["run"]) / "best")
    on_hub = backbone is not None and is_hub_id(backbone)
    return Sources(
        backbone=backbone if on_hub else None,
        backbone_license=None if backbone is None or on_hub else stated_license(Path(backbone)),
        from_scratch=backbone is None,
        domains={name: _hub_id(spec["path"]) for name, spec in config["domains"].items()},
        teachers={
            name: None if is_hub_id(name) else stated_license(Path(name)) or "unknown"
            for name in dict.fromkeys(teacher_name(spec) for spec in config.get("frozen_teachers", ()))
            if name not in _ITSELF
        },
    )


def teacher_name(spec: Mapping[str, Any]) -> str:
    """What a frozen teacher's licence is found by: a model of text has a prefix in the config."""
    return str(spec["model"]).removeprefix("text:")


def is_hub_id(path: str) -> bool:
    """Whether a path that was just opened names something on the Hub: the folder of that name comes first."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def stated_license(folder: Path) -> str | None:
    """The licence that the card in a model's folder states."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        return join_licenses(ModelCard.load(card, ignore_metadata_errors=True).data.get("license"))
    except ValueError:  # A card without metadata, or with damaged metadata.
        return None


def join_licenses(stated: object) -> str | None:
    """The licences that a card's metadata states, `None` if there are none."""
    if not stated:
        return None
    return ", ".join(map(str, stated)) if isinstance(stated, list) else str(stated)


def domain_licenses(specs: Mapping[str, Any], sources: Sources, licences: Mapping[str, str]) -> dict[str, str | None]:
    """Licence of each domain's images: what its spec states, else what its data set's card on the Hub states.

    Args:
        specs: Specs of the domains; the demo domains are left out, their packages allow any use.
        sources: What was opened.
        licences: Licences by Hub id, as far as they are known.
    """
    return {
        name: spec.get("license") or licences.get(sources.domains.get(name) or "")
        for name, spec in specs.items()
        if not spec["path"].startswith(_DEMO_PREFIX)
    }


def derive_license(
    specs: Mapping[str, Any], sources: Sources, licences: Mapping[str, str]
) -> tuple[str | None, list[str]]:
    """Derives a model's licence from those of its backbone and its data.

    Permissive licences leave the backbone's own, or `apache-2.0` for a model from scratch; one that restricts its users
    holds for the model as well, also that of a frozen teacher, of which the model holds no weights. Nothing is derived
    from two of those, or where one is not known.

    Returns:
        The licence, or `None` with what is missing.
    """
    parts = {f"domains.{name}": stated for name, stated in domain_licenses(specs, sources, licences).items()}
    own = None if sources.from_scratch else sources.backbone_license or licences.get(sources.backbone or "")
    if not sources.from_scratch:
        parts["the backbone"] = own
    parts |= {f"the frozen teacher {name}": stated or licences.get(name) for name, stated in sources.teachers.items()}
    missing = [f"no licence of {name}" for name, stated in parts.items() if stated in (None, *_UNDECIDED)]
    restricting = sorted({stated for stated in parts.values() if stated and stated.lower() not in _PERMISSIVE})
    if not missing and len(restricting) > 1:
        missing = [f"{' and '.join(restricting)}, which both restrict it"]
    if missing:
        return None, missing
    return (restricting or [own or DEFAULT_LICENSE])[0], []


def _hub_id(path: str) -> str | None:
    return path if is_hub_id(path) else None
