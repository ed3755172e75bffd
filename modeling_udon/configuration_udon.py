"""Configuration of the UDON image embedding model.

This file travels to the Hub beside `modeling_udon.py`, so it uses nothing of the package it comes from.
"""

import inspect
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, PretrainedConfig

POOLINGS = ("cls", "mean", "cls+mean", "pooler")


class BackboneFacts(NamedTuple):
    """Facts about the vision encoders of one model type.

    Attributes:
        prefix: Tokens before the patches, the class token first; 0 for none, and for feature maps.
        pooling: The pooling that is read where none is named: the feature that the backbone was trained to give.
        norm: Submodule with the final norm of the tokens, where the encoder applies it in its pooler alone.
        sizes: `"any"`, takes images of any size by itself; `"request"`, by `interpolate_pos_encoding`; `"own"`.
        statistics: Channel statistics of its usual checkpoints: `"standard"` (0.5), `"imagenet"`, `"clip"`, or
            `"unit"`, pixels from 0 to 1 as they are.
        refusal: Why it cannot be used, empty if it can.
    """

    prefix: int
    pooling: str
    norm: str | None = None
    sizes: str = "own"
    statistics: str = "imagenet"
    refusal: str = ""


_NAFLEX = "it takes patches, masks and shapes in place of images (NaFlex); take a SigLIP2 checkpoint of fixed size"
_MASKED = (
    "it hides random patches of each image, so that its features are not deterministic; save its encoder as a ViT, "
    "ViTModel.from_pretrained(NAME).save_pretrained(FOLDER), and name that folder"
)

# By model type. `tests/test_backbone_types.py` trains, publishes and loads a tiny one of each.
BACKBONES = {
    "vit": BackboneFacts(1, "cls", None, "request", "standard"),
    "deit": BackboneFacts(2, "cls", None, "request", "imagenet"),
    "vit_msn": BackboneFacts(1, "cls", None, "request", "imagenet"),
    "vit_mae": BackboneFacts(1, "cls", refusal=_MASKED),
    "ijepa": BackboneFacts(0, "mean", None, "request", "imagenet"),
    "dinov2": BackboneFacts(1, "cls", None, "any", "imagenet"),
    "dinov2_with_registers": BackboneFacts(1, "cls", None, "any", "imagenet"),
    "dinov3_vit": BackboneFacts(1, "cls", None, "any", "imagenet"),
    "dinov3_convnext": BackboneFacts(1, "cls", None, "any", "imagenet"),
    "clip_vision_model": BackboneFacts(1, "pooler", "post_layernorm", "request", "clip"),
    "chinese_clip_vision_model": BackboneFacts(1, "pooler", "post_layernorm", "request", "clip"),
    "metaclip_2_vision_model": BackboneFacts(1, "pooler", "post_layernorm", "request", "clip"),
    "altclip_vision_model": BackboneFacts(1, "pooler", "post_layernorm", "request", "clip"),
    "blip_vision_model": BackboneFacts(1, "cls", None, "request", "clip"),
    "mlcd_vision_model": BackboneFacts(1, "cls", "post_layernorm", "own", "clip"),
    "mlcd": BackboneFacts(1, "cls", "post_layernorm", "own", "clip"),
    "siglip_vision_model": BackboneFacts(0, "pooler", None, "request", "standard"),
    "siglip2_vision_model": BackboneFacts(0, "pooler", refusal=_NAFLEX),
    "aimv2_vision_model": BackboneFacts(0, "mean", None, "own", "clip"),
    "beit": BackboneFacts(1, "pooler", "pooler.layernorm", "request", "standard"),
    "data2vec-vision": BackboneFacts(1, "pooler", "pooler.layernorm", "request", "standard"),
    "convnext": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "convnextv2": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "resnet": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "regnet": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "bit": BackboneFacts(0, "pooler", None, "any", "standard"),
    "efficientnet": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "mobilenet_v1": BackboneFacts(0, "pooler", None, "any", "standard"),
    "mobilenet_v2": BackboneFacts(0, "pooler", None, "any", "standard"),
    "mobilevit": BackboneFacts(0, "pooler", None, "any", "unit"),
    "mobilevitv2": BackboneFacts(0, "pooler", None, "any", "unit"),
    "levit": BackboneFacts(0, "pooler", None, "own", "imagenet"),
    "segformer": BackboneFacts(0, "mean", None, "any", "imagenet"),
    "swiftformer": BackboneFacts(0, "mean", None, "any", "imagenet"),
    "dinat": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "swin": BackboneFacts(0, "pooler", None, "request", "imagenet"),
    "swinv2": BackboneFacts(0, "pooler", None, "request", "imagenet"),
    "focalnet": BackboneFacts(0, "pooler", None, "any", "imagenet"),
    "poolformer": BackboneFacts(0, "mean", None, "any", "imagenet"),
    "cvt": BackboneFacts(0, "mean", None, "any", "imagenet"),
    "pvt": BackboneFacts(1, "cls", None, "own", "imagenet"),
    "pvt_v2": BackboneFacts(0, "mean", None, "any", "imagenet"),
    "hiera": BackboneFacts(0, "pooler", None, "request", "imagenet"),
    "timm_wrapper": BackboneFacts(0, "pooler", None, "any", "imagenet"),
}


# Towers of models of images and texts that no version of `AutoModel` makes by their model type: how their classes in
# transformers begin.
TOWERS = {
    "altclip_vision_model": "AltCLIPVision",
    "blip_vision_model": "BlipVision",
    "metaclip_2_vision_model": "MetaClip2Vision",
}
# What their classes have to be told so that they are made whole: a final norm lies in a pooler that is left out else.
TOWER_OPTIONS = {"data2vec-vision": {"add_pooling_layer": True}}


def backbone_facts(config: PretrainedConfig) -> BackboneFacts:
    """Returns the facts about a backbone; of a model type that was not tried, those of a plain ViT."""
    facts = BACKBONES.get(config.model_type, BackboneFacts(1, "cls", None, "own", "standard"))
    if facts.norm == "pooler.layernorm" and not config.use_mean_pooling:
        # BEiT and data2vec normalise either their tokens or, in the pooler, the mean of these.
        facts = facts._replace(pooling="cls", norm=None)
    registers = getattr(config, "num_register_tokens", 0) or 0
    return facts._replace(prefix=facts.prefix + registers) if facts.prefix else facts


def check_gives_features(model_type: str) -> None:
    """Refuses a model type that gives no features of images, also where transformers does not know it.

    Raises:
        ValueError: If it is one of these.
    """
    facts = BACKBONES.get(model_type)
    if facts is not None and facts.refusal:
        raise ValueError(f"`backbone_config` must not be of {model_type}: {facts.refusal}.")


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
        pooling: Feature of the backbone: `"cls"`, the class token; `"mean"`, the mean of the patch tokens or of a
            feature map; `"cls+mean"`, both, each of unit norm, side by side; `"pooler"`, the backbone's own output.
            `None` takes the feature that the backbone was trained to give, the class token after the final norm in
            most; see `BACKBONES`.
        token_norm: Submodule of the backbone that normalises its tokens before they are pooled, for a backbone that
            does so in its pooler alone. `"auto"`: the one in `BACKBONES`; `None`: none.
        interpolate_pos_encoding: Whether the backbone is told to interpolate its position embeddings to the images'
            size, for images of another size than its own.
        feature_dim: Width of the backbone's features; `None`: `hidden_size` of the backbone, or measured.
        matryoshka_dims: Numbers of first dimensions of the student embedding that are, divided by their norm,
            embeddings by themselves.

    Raises:
        ValueError: If a size is not positive, `pooling` is unknown, the backbone has no `model_type`, or it gives no
            features.
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
        token_norm: str | None = "auto",
        interpolate_pos_encoding: bool = False,
        feature_dim: int | None = None,
        matryoshka_dims: tuple[int, ...] | list[int] = (),
        **kwargs: Any,
    ) -> None:
        self.backbone_config = _resolve_backbone(backbone_config)
        self.embedding_dim = _positive("embedding_dim", embedding_dim)
        self.teacher_dim = _positive("teacher_dim", teacher_dim)
        self.head_hidden_dims = [_positive("head_hidden_dims", width) for width in head_hidden_dims]
        self.head_bias = head_bias
        self.domains = {name: _positive(f"domains[{name!r}]", count) for name, count in (domains or {}).items()}
        # A model that was saved before `token_norm` existed read its tokens as they came.
        is_old = "transformers_version" in kwargs and token_norm == "auto"
        self.pooling, self.token_norm = _feature(self.backbone_config, pooling, None if is_old else token_norm)
        self.interpolate_pos_encoding = interpolate_pos_encoding
        self.feature_dim = feature_dim
        self.matryoshka_dims = [_positive("matryoshka_dims", dim) for dim in matryoshka_dims]
        super().__init__(**kwargs)

    def shape(self) -> dict[str, Any]:
        """Returns the values that make a model of the same shape, teacher heads included."""
        values = {name: getattr(self, name) for name in _SHAPE}
        copies = {"head_hidden_dims": list(self.head_hidden_dims), "matryoshka_dims": list(self.matryoshka_dims)}
        return values | copies | {"domains": dict(self.domains)}


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
        backbone_config = _make_config(values.pop("model_type"), values)
    return getattr(backbone_config, "vision_config", backbone_config)


def _feature(backbone_config: PretrainedConfig, pooling: str | None, token_norm: str | None) -> tuple[str, str | None]:
    """Returns the pooling and the norm of the tokens before it, filled in from the facts about the backbone."""
    check_gives_features(backbone_config.model_type)
    facts = backbone_facts(backbone_config)
    pooling = facts.pooling if pooling is None else pooling
    if pooling not in POOLINGS:
        raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)} or None. Got {pooling!r}.")
    if token_norm == "auto":
        token_norm = None if pooling == "pooler" else facts.norm
    return pooling, token_norm


def _make_config(model_type: str, values: dict[str, Any]) -> PretrainedConfig:
    check_gives_features(model_type)
    if model_type in TOWERS:
        config: PretrainedConfig = getattr(transformers, f"{TOWERS[model_type]}Config")(**values)
        return config
    return AutoConfig.for_model(model_type, **values)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer. Got {value!r}.")
    return value


UdonConfig.register_for_auto_class()
