"""The UDON image embedding model: a vision backbone with a student head and teacher heads.

This file travels to the Hub beside `configuration_udon.py`, so it uses nothing else of the package it comes from.
Method: Ypsilantis et al., "UDON: Universal Dynamic Online distillatioN", NeurIPS 2024 (arXiv 2406.08332).
"""

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_udon import BACKBONES, TOWER_OPTIONS, TOWERS, UdonConfig, backbone_facts

# Standard deviation of a standard normal cut off at two deviations, by which flax's `lecun_normal` is corrected.
_TRUNCATED_STD = 0.87962566103423978

_CLASS_TOKEN_NAMES = ("cls_token", "class_embedding")


def init_lecun_normal_(weight: torch.Tensor) -> None:
    """Fills a weight of shape `(out, in)` with a truncated normal of variance 1 / `in`.

    The initialisation of the original's heads and classifiers (flax's default); at a learning rate of 1e-3 the
    length of a prototype decides how fast it turns, so it is part of the recipe.
    """
    std = 1 / math.sqrt(weight.shape[-1]) / _TRUNCATED_STD
    nn.init.trunc_normal_(weight, mean=0.0, std=std, a=-2 * std, b=2 * std)


@dataclass
class UdonModelOutput(ModelOutput):
    """Output of `UdonModel`.

    Attributes:
        last_hidden_state: The backbone's tokens, of shape `(batch_size, sequence_length, hidden_size)`.
        pooler_output: The same tensor as `image_embeds`, under the name that pipelines look for.
        image_embeds: Student embeddings of shape `(batch_size, embedding_dim)`, float32, unit norm.
        teacher_embeds: Teacher embeddings of shape `(batch_size, teacher_dim)`, float32, unit norm, of the domain
            that was asked for.
        backbone_embeds: The backbone's features of shape `(batch_size, feature_dim)`, float32, unit norm.
        hidden_states: The backbone's hidden states, if asked for.
        attentions: The backbone's attention maps, if asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    teacher_embeds: torch.Tensor | None = None
    backbone_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class UdonHead(nn.Module):
    """Projection of unit-norm backbone features to unit-norm embeddings.

    Linear, or `Linear -> LayerNorm -> GELU` for each hidden width before the last linear layer.
    """

    def __init__(self, in_dim: int, hidden_dims: list[int], out_dim: int, bias: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden_dims:
            layers += [nn.Linear(in_dim, width), nn.LayerNorm(width, eps=1e-6), nn.GELU(approximate="tanh")]
            in_dim = width
        self.hidden = nn.Sequential(*layers)
        self.projection = nn.Linear(in_dim, out_dim, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps features of shape `(batch_size, in_dim)` to embeddings of shape `(batch_size, out_dim)`."""
        # Half-precision norms are off by 3e-3, so both ends of the head are float32 whatever its weights are; under
        # autocast, which would move neighbours, so is all of it.
        with torch.autocast(features.device.type, enabled=False):
            projected = self.projection(self.hidden(features.to(self.projection.weight.dtype)))
        return F.normalize(projected.float(), dim=-1)


class UdonPreTrainedModel(PreTrainedModel):
    """Initialisation and loading for UDON models."""

    config: UdonConfig
    config_class = UdonConfig
    base_model_prefix = "udon"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    # Swin's table of positions follows from its sizes; transformers 4 saves it, 5 does not.
    _keys_to_ignore_on_load_missing = [r"relative_position_index"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init_lecun_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class UdonModel(UdonPreTrainedModel):
    """One embedding for many domains.

    Every image goes through the backbone and the student head. While training, the head of the image's domain is
    its teacher; a published student has no teacher heads.

    Raises:
        ValueError: If `pooling` is `"cls"` and the backbone has no class token.
    """

    def __init__(self, config: UdonConfig) -> None:
        super().__init__(config)
        self.backbone = _drop_unused_pooler(make_tower(config.backbone_config), config)
        _check_class_token(self.backbone, config)
        if config.feature_dim is None:
            config.feature_dim = _measure_width(self.backbone, config)
        self.student_head = self._make_head(config.embedding_dim)
        self.teacher_heads = nn.ModuleDict({name: self._make_head(config.teacher_dim) for name in config.domains})
        self.post_init()

    @classmethod
    def from_backbone(cls, backbone: PreTrainedModel, **config_values: Any) -> "UdonModel":
        """Puts fresh heads on a trained vision encoder.

        Args:
            backbone: A model from `AutoModel.from_pretrained`, or the vision tower of one. A model of images and
                texts stands for its vision tower. A `UdonModel` stands for its backbone.
            config_values: Values for `UdonConfig` other than `backbone_config`.
        """
        backbone = backbone.backbone if isinstance(backbone, UdonModel) else vision_tower(backbone)
        model = cls(UdonConfig(backbone_config=backbone.config, **config_values))
        model.backbone = _drop_unused_pooler(backbone, model.config)
        return model

    @property
    def feature_dim(self) -> int:
        """Width of the backbone's features."""
        assert self.config.feature_dim is not None, "measured when the model was made"
        return self.config.feature_dim

    def student(self) -> "UdonModel":
        """Returns a model that shares backbone and student head with this one and has no teacher heads."""
        with torch.device("meta"):
            student = UdonModel(UdonConfig(**self.config.shape() | {"domains": {}}))
        student.backbone = self.backbone
        student.student_head = self.student_head
        return student

    def forward(
        self,
        pixel_values: torch.Tensor,
        domain: str | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> UdonModelOutput | tuple[torch.Tensor, ...]:
        """Embeds a batch of images.

        Args:
            pixel_values: Normalised images of shape `(batch_size, num_channels, height, width)`.
            domain: Domain whose teacher embeds the images as well.
            interpolate_pos_encoding: Whether to interpolate the position embeddings to the images' size, for a
                backbone that leaves this to its caller; default: as the configuration says.
            output_attentions: Whether to return the backbone's attention maps.
            output_hidden_states: Whether to return the backbone's hidden states.
            return_dict: Whether to return a `UdonModelOutput` (default) or a tuple of what it holds.

        Raises:
            ValueError: If the model has no teacher head for `domain`, or the backbone cannot interpolate.
        """
        if domain is not None and domain not in self.teacher_heads:
            raise ValueError(
                f"`domain` must be one with a teacher head: {', '.join(self.teacher_heads) or 'this model has none'}. "
                f"Got {domain!r}."
            )
        outputs = self.backbone(
            pixel_values,
            **self.interpolation(interpolate_pos_encoding),
            **_asked(output_attentions=output_attentions, output_hidden_states=output_hidden_states),
            return_dict=True,
        )
        backbone_embeds = F.normalize(pool_features(self.backbone, outputs, self.config).float(), dim=-1)
        image_embeds = self.student_head(backbone_embeds)
        result = UdonModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=image_embeds,
            image_embeds=image_embeds,
            teacher_embeds=None if domain is None else self.teacher_heads[domain](backbone_embeds),
            backbone_embeds=backbone_embeds,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )
        return result.to_tuple() if return_dict is False else result

    def get_input_embeddings(self) -> nn.Module:
        """Returns the backbone's patch embedding."""
        return self.backbone.get_input_embeddings()

    def _make_head(self, out_dim: int) -> UdonHead:
        config = self.config
        return UdonHead(self.feature_dim, config.head_hidden_dims, out_dim, config.head_bias)

    def interpolation(self, wanted: bool | None = None) -> dict[str, bool]:
        """What the backbone has to be told so that it interpolates; `None` is as the configuration says."""
        if not (self.config.interpolate_pos_encoding if wanted is None else wanted):
            return {}
        if "interpolate_pos_encoding" not in inspect.signature(type(self.backbone).forward).parameters:
            raise ValueError(
                "`interpolate_pos_encoding` must be False for a backbone that takes no such argument. "
                f"Got True with {type(self.backbone).__name__}."
            )
        return {"interpolate_pos_encoding": True}


def pool_features(backbone: nn.Module, outputs: Any, config: UdonConfig) -> torch.Tensor:
    """Pools a backbone's output to one feature an image.

    Args:
        backbone: The backbone, whose norm `config.token_norm` names.
        outputs: What it gave: `last_hidden_state`, tokens of shape `(B, N, D)` or a map of shape `(B, D, H, W)`, and
            `pooler_output` where `pooling` is `"pooler"`.
        config: Says how to pool.

    Returns:
        Shape `(batch_size, feature_dim)`, not of unit norm.

    Raises:
        ValueError: If the output does not have what the pooling reads.
    """
    if config.pooling == "pooler":
        pooled = outputs.get("pooler_output")
        if pooled is None:
            raise ValueError(
                "`pooling` 'pooler' must go with a backbone that has a pooler. "
                f"Got {config.backbone_config.model_type!r}; use cls or mean."
            )
        return pooled.flatten(1)  # (B, D, 1, 1) of convolutional backbones -> (B, D)
    tokens = outputs.last_hidden_state
    if tokens.ndim == 4:
        # Of timm, Swin and its kin.
        if str(getattr(getattr(backbone, "timm_model", None), "output_fmt", "")).endswith("NHWC"):
            tokens = tokens.permute(0, 3, 1, 2)  # (B, H, W, D) -> (B, D, H, W)
        tokens = tokens.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, H * W, D)
    if config.token_norm is not None:
        tokens = backbone.get_submodule(_norm_name(backbone, config.token_norm))(tokens)
    if config.pooling == "cls":
        return tokens[:, 0]
    mean = tokens[:, num_prefix_tokens(backbone) :].mean(dim=1)
    if config.pooling == "mean":
        return mean
    return torch.cat([F.normalize(tokens[:, 0].float(), dim=-1), F.normalize(mean.float(), dim=-1)], dim=-1)


def num_prefix_tokens(backbone: nn.Module) -> int:
    """Number of tokens before the patches, the class token first; 0 for none, and for feature maps."""
    config: Any = backbone.config
    if config.model_type == "timm_wrapper":
        return int(getattr(backbone.timm_model, "num_prefix_tokens", 0))
    if config.model_type in BACKBONES:
        return backbone_facts(config).prefix
    return int(any(name.endswith(_CLASS_TOKEN_NAMES) for name, _ in backbone.named_parameters()))


def tower_class(config: PretrainedConfig) -> Any:
    """The class that opens a model: `AutoModel`, or its own where `AutoModel` does not know it."""
    kind = TOWERS.get(config.model_type)
    return AutoModel if kind is None else getattr(transformers, f"{kind}Model")


def make_tower(config: PretrainedConfig) -> PreTrainedModel:
    """Makes a vision encoder with fresh weights."""
    maker, options = tower_class(config), TOWER_OPTIONS.get(config.model_type, {})
    tower: PreTrainedModel = (maker.from_config if maker is AutoModel else maker)(config, **options)
    return tower


def vision_tower(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the part of a model of images and texts that sees, any other model itself."""
    vision_config = getattr(model.config, "vision_config", None)
    if vision_config is None:
        return model
    # In transformers 4 `CLIPModel.vision_model` is the bare transformer inside a `CLIPVisionModel`.
    tower = make_tower(vision_config)
    inner = getattr(tower, "vision_model", tower)
    inner.load_state_dict(model.get_submodule("vision_model").state_dict())
    return tower.train(model.training)


def _norm_name(backbone: nn.Module, name: str) -> str:
    # In transformers 4 a tower's parts lie one level deeper.
    inner = getattr(backbone, "vision_model", None)
    return f"vision_model.{name}" if isinstance(inner, nn.Module) else name


def _asked(**values: Any) -> dict[str, Any]:
    # Convolutional backbones know no attention maps; what was not asked for need not be said.
    return {name: value for name, value in values.items() if value is not None}


@torch.no_grad()
def _measure_width(backbone: PreTrainedModel, config: UdonConfig) -> int:
    """Width of a backbone's features: as its configuration says, or of one forward pass."""
    hidden_size = getattr(config.backbone_config, "hidden_size", None)
    if hidden_size is not None and config.backbone_config.model_type not in ("pvt", "hiera", "swinv2"):
        return 2 * hidden_size if config.pooling == "cls+mean" else hidden_size
    size = getattr(config.backbone_config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    was_training = backbone.training
    pixels = torch.zeros(1, 3, height, width, device=next(backbone.parameters()).device)
    outputs = backbone.eval()(pixel_values=pixels, return_dict=True)
    backbone.train(was_training)
    return pool_features(backbone, outputs, config).shape[-1]


def _drop_unused_pooler(backbone: PreTrainedModel, config: UdonConfig) -> PreTrainedModel:
    # A pooler that is not read would be trained, counted and published for nothing.
    unread = config.pooling != "pooler" and not (config.token_norm or "").startswith("pooler")
    pooler = getattr(backbone, "pooler", None)
    # One without weights, as convolutional backbones have it, is called in any case.
    if unread and isinstance(pooler, nn.Module) and any(True for _ in pooler.parameters()):
        backbone.pooler = None  # type: ignore[assignment]
    return backbone


def _check_class_token(backbone: PreTrainedModel, config: UdonConfig) -> None:
    if config.pooling not in ("cls", "cls+mean"):
        return
    if not num_prefix_tokens(backbone):
        raise ValueError(
            f"`pooling` {config.pooling!r} must go with a backbone that has a class token. "
            f"Got {config.backbone_config.model_type!r}; use pooling 'pooler' or 'mean', or another backbone."
        )


UdonModel.register_for_auto_class("AutoModel")
