"""Configuration of the UDON image embedding model.

This file travels to the Hub beside `modeling_udon.py`, so it uses nothing of the package it comes from.
"""

import inspect
from typing import Any

from transformers import AutoConfig, PretrainedConfig

POOLINGS = ("cls", "pooler")

# The only known backbone whose final layer norm is applied to the class token in the pooler alone.
_NORMALISED_IN_POOLER = ("clip_vision_model",)


class UdonConfig(PretrainedConfig):
    """Shape of a UDON model: one backbone, one student head, and a teacher head for each domain.

    Args:
        backbone_config: Configuration of the vision encoder, as an object or as a dict with its `model_type`. A
            full CLIP configuration stands for its vision tower. Default: ViT-B/16 at 224 pixels with layer norm
            eps 1e-6 and tanh-GELU, as the AugReg ViTs have it (arXiv 2106.10270).
        embedding_dim: Size of the student embedding, the one that is published.
        teacher_dim: Size of the teacher embeddings.
        head_hidden_dims: Widths of the hidden layers of every head; empty for linear heads.
        head_bias: Whether the last layer of every head has a bias.
        domains: Number of training classes for each domain that has a teacher head; empty for a published student.
        pooling: `"cls"`, the first token of the last hidden state, or `"pooler"`, the backbone's own pooler
            output. `None` chooses what gives the class token after the final layer norm: the pooler for CLIP,
            the first token elsewhere.

    Raises:
        ValueError: If a size is not positive, `pooling` is unknown, or the backbone has no `model_type`.
    """

    model_type = "udon"
    sub_configs = {"backbone_config": AutoConfig}
    # Libraries that ask a vision model for the width of its output ask for `projection_dim`.
    attribute_map = {"projection_dim": "embedding_dim"}

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        embedding_dim: int = 64,
        teacher_dim: int = 256,
        head_hidden_dims: tuple[int, ...] | list[int] = (),
        head_bias: bool = True,
        domains: dict[str, int] | None = None,
        pooling: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _resolve_backbone(backbone_config)
        self.embedding_dim = _positive("embedding_dim", embedding_dim)
        self.teacher_dim = _positive("teacher_dim", teacher_dim)
        self.head_hidden_dims = [_positive("head_hidden_dims", width) for width in head_hidden_dims]
        self.head_bias = head_bias
        self.domains = {name: _positive(f"domains[{name!r}]", count) for name, count in (domains or {}).items()}
        if pooling is None:
            pooling = "pooler" if self.backbone_config.model_type in _NORMALISED_IN_POOLER else "cls"
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)} or None. Got {pooling!r}.")
        self.pooling = pooling
        super().__init__(**kwargs)

    def shape(self) -> dict[str, Any]:
        """Returns the values that make a model of the same shape, teacher heads included."""
        values = {name: getattr(self, name) for name in _SHAPE}
        return values | {"head_hidden_dims": list(self.head_hidden_dims), "domains": dict(self.domains)}


_SHAPE = tuple(inspect.signature(UdonConfig.__init__).parameters)[1:-1]


def _resolve_backbone(backbone_config: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if backbone_config is None:
        backbone_config = {"model_type": "vit", "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
    if isinstance(backbone_config, dict):
        if "model_type" not in backbone_config:
            raise ValueError(
                "`backbone_config` must name its `model_type`, such as 'vit' or 'clip_vision_model'. "
                f"Got the keys {sorted(backbone_config)}."
            )
        values = dict(backbone_config)
        backbone_config = AutoConfig.for_model(values.pop("model_type"), **values)
    return getattr(backbone_config, "vision_config", backbone_config)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Got {value!r}.")
    return value


UdonConfig.register_for_auto_class()
