"""UDON's config and model, registered with transformers: a UDON folder then loads as any other, without remote code."""

from transformers import AutoConfig, AutoModel

from modeling_udon.configuration_udon import UdonConfig
from modeling_udon.modeling_udon import UdonModel, UdonModelOutput

__all__ = ["UdonConfig", "UdonModel", "UdonModelOutput"]

AutoConfig.register(UdonConfig.model_type, UdonConfig, exist_ok=True)
AutoModel.register(UdonConfig, UdonModel, exist_ok=True)
