"""Names of domains."""

import re

from torch import nn

from modeling_udon.domain_spec import RESERVED_NAMES


def test_every_attribute_of_the_dicts_that_hold_heads_and_prototypes_is_reserved():
    attributes = set(dir(nn.ModuleDict())) | set(dir(nn.ParameterDict()))
    assert {name for name in attributes if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)} <= RESERVED_NAMES
