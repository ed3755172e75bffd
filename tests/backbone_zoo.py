"""Tiny backbones of every model type, as `benchmarks/backbone_table.py` has them."""

import importlib.util
import sys
from pathlib import Path

_PATH = Path(__file__).parent.parent / "benchmarks" / "backbone_table.py"
_spec = importlib.util.spec_from_file_location("backbone_table", _PATH)
assert _spec is not None and _spec.loader is not None
table = importlib.util.module_from_spec(_spec)
sys.modules["backbone_table"] = table  # Its dataclass looks for the module by name.
_spec.loader.exec_module(table)

KINDS = {kind.name: kind for kind in table.KINDS}
