"""Names of domains."""

import re
import subprocess
import sys

from modeling_udon.domain_spec import RESERVED_NAMES


def test_every_attribute_of_the_dicts_that_hold_heads_and_prototypes_is_reserved():
    # In a process of its own: libraries that other tests load add attributes to every module.
    program = "from torch import nn; print(*dir(nn.ModuleDict()), *dir(nn.ParameterDict()))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name for name in run.stdout.split() if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)}
    assert "state_dict" in names and names <= RESERVED_NAMES
