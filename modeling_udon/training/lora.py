"""Low-rank adapters in a frozen backbone (LoRA, arXiv 2106.09685), made and merged by PEFT.

The training model holds them beside the weights that they change. What a run gives out holds their sum under the names
of a plain backbone: the best weights, the student, and what another run starts from.
"""

import copy
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from modeling_udon.config import ConfigError
from modeling_udon.config_sections import LoraConfig
from modeling_udon.modeling_udon import UdonModel

# Query and value projections, as the paper adapts them, by the names that encoders give them; or what holds both.
_ATTENTION = (("q_proj", "v_proj"), ("query", "value"), ("qkv",), ("q", "kv"))
_BASE, _DOWN, _UP = ".base_layer.", ".lora_A.", ".lora_B."


def add_adapters(backbone: nn.Module, lora: LoraConfig, part: nn.Module | None = None) -> None:
    """Freezes a backbone and puts adapters into it that change nothing yet, in place.

    Args:
        backbone: The backbone.
        lora: Their shape.
        part: The part of it that they go into; `None` for all.

    Raises:
        ConfigError: If PEFT is missing, or the backbone has no layers of the names.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            '`model.lora` must find PEFT. Got none installed; pip install "modeling-udon[lora]", or leave it out.'
        ) from error
    part = backbone if part is None else part
    linear = {name.rpartition(".")[2] for name, module in part.named_modules() if isinstance(module, nn.Linear)}
    targets = lora.target_modules or next((names for names in _ATTENTION if linear.issuperset(names)), None)
    if targets is None:
        raise ConfigError(
            "`model.lora.target_modules` must name layers of the backbone where it has no query and value projections. "
            f"Got none; name some of {', '.join(sorted(linear)) or 'its convolutions'}."
        )
    config = peft.LoraConfig(
        r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout, target_modules=list(targets)
    )
    backbone.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(config, part)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"`model.lora.target_modules` must name layers of the backbone. Got {list(targets)}: {reason}"
        ) from None


def has_adapters(model: nn.Module) -> bool:
    """Whether a model holds adapters."""
    return any(_UP in name for name, _ in model.named_parameters())


def merged(udon: UdonModel) -> UdonModel:
    """Returns a copy with plain layers, each the sum of a layer and its adapter; the model itself without adapters."""
    if not has_adapters(udon):
        return udon
    plain = copy.deepcopy(udon)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, module.get_base_layer())
    return plain.requires_grad_(False)


def merged_state(model: nn.Module, udon: UdonModel) -> dict[str, Any]:
    """Returns the weights of a training model under the names that it has without adapters.

    Args:
        model: The training model.
        udon: Its part `udon`, which may hold adapters.
    """
    state = model.state_dict()
    if not has_adapters(udon):
        return state
    rest = {name: value for name, value in state.items() if not name.startswith("udon.")}
    return {f"udon.{name}": value for name, value in merged(udon).state_dict().items()} | rest


def split_state(model: nn.Module, merged: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns what a model that may hold adapters loads to embed as merged weights do: adapters that change nothing."""
    return {
        name: torch.zeros_like(value) if _UP in name else value if _DOWN in name else merged[name.replace(_BASE, ".")]
        for name, value in model.state_dict().items()
    }
