"""Tiny backbones of every model type, as `benchmarks/backbone_table.py` has them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

_FOLDER = Path(__file__).parent.parent / "benchmarks"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # The other one imports it by this name.
    spec.loader.exec_module(module)
    return module


kinds = _load("backbone_kinds")
table = _load("backbone_table")
# What the oldest supported transformers does not know by name: it calls the first one `mlcd`, without its own towers.
UNKNOWN = {"mlcd_vision_model", "metaclip_2_vision_model", "siglip2_vision_model"} - set(CONFIG_MAPPING_NAMES)
KINDS = {kind.name: kind for kind in kinds.KINDS}
