"""The backbone of a run: opened or built, fitted to the image size, with the channel statistics that it knows."""

import json
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from modeling_udon.auto_classes import UdonModel
from modeling_udon.backbones import (
    TIMM_PREFIX,
    check_remote_code,
    cut_layers,
    find_processing,
    open_backbone,
    open_timm,
    own_statistics,
)
from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_sections import ModelConfig
from modeling_udon.configuration_udon import UdonConfig, backbone_facts
from modeling_udon.data.preprocessing import (
    IMAGENET_DEFAULT,
    IMAGENET_STANDARD,
    OPENAI_CLIP,
    UNIT_RANGE,
    ChannelStatistics,
)
from modeling_udon.data.processor_statistics import statistics_of_values

_STATISTICS = {
    "standard": IMAGENET_STANDARD,
    "imagenet": IMAGENET_DEFAULT,
    "clip": OPENAI_CLIP,
    "unit": UNIT_RANGE,
}


def build_udon(model: ModelConfig, sizes: dict[str, object], image_size: int) -> UdonModel:
    """Opens or builds a backbone and puts fresh heads on it.

    Args:
        model: Names the backbone.
        sizes: Values of `UdonConfig` other than the backbone.
        image_size: Side of the run's images in pixels.

    Raises:
        ValueError: If the backbone cannot be built, lacks weights, or takes no images of that size.
    """
    if model.backbone is None:
        assert model.backbone_config is not None, "checked by the config"
        values = _known_values(model.backbone_config)
        config = UdonConfig(backbone_config=values, attn_implementation=model.attn_implementation, **sizes)  # type: ignore[arg-type]
        config.interpolate_pos_encoding = needs_interpolation(config.backbone_config, image_size)
        return UdonModel(config)
    backbone, flipped = open_trained(model, image_size)
    udon = UdonModel.from_backbone(backbone, **sizes)
    if flipped:
        _flip_first_convolution(udon.backbone)
    udon.config.interpolate_pos_encoding = needs_interpolation(udon.config.backbone_config, image_size)
    return udon


def open_trained(model: ModelConfig, image_size: int) -> tuple[PreTrainedModel, bool]:
    """Opens the trained backbone that a config names.

    Args:
        model: Names the backbone.
        image_size: Side of the run's images in pixels.

    Returns:
        The backbone, and whether it takes blue, green and red in place of red, green and blue.

    Raises:
        ValueError: If it cannot be opened or lacks weights.
    """
    assert model.backbone is not None
    if model.backbone.startswith(TIMM_PREFIX):
        return open_timm(model.backbone, image_size), False
    check_remote_code(model.backbone, model.revision, model.trust_remote_code)
    source = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config = cut_layers(AutoConfig.from_pretrained(model.backbone, **source), model.keep_layers)
    tower = getattr(config, "backbone_config", getattr(config, "vision_config", config))
    own: Any = config.pooling if isinstance(config, UdonConfig) else backbone_facts(tower).pooling
    opened = open_backbone(
        model.backbone, config, model.pooling or own, attn_implementation=model.attn_implementation, **source
    )
    values = find_processing(model.backbone, model.revision, model.trust_remote_code) or {}
    return opened, bool(values.get("do_flip_channel_order"))


def check_backbone(
    udon: UdonModel, image_size: int, key: str = "data.image_size", interpolate: bool | None = None
) -> None:
    """Refuses a backbone that does not take the run's images, or whose features differ from pass to pass.

    Args:
        udon: The model.
        image_size: Side of the images in pixels.
        key: Key of the config that it is the value of.
        interpolate: Whether the backbone is told to interpolate its positions; `None`: as its configuration says.

    Raises:
        ConfigError: If the images have another number of channels or a size that is no multiple of the patch, a pass
            fails, or two passes of the same images give different features.
    """
    backbone = udon.config.backbone_config
    if (channels := getattr(backbone, "num_channels", 3)) != 3:
        raise ConfigError(f"`model` must take images of 3 channels, RGB. Got a backbone for {channels}.")
    own = getattr(backbone, "patch_size", 1)
    # Hiera's patches overlap; its pairs are no sides that an image must be a multiple of.
    patch_size = own if isinstance(own, int) else 1 if backbone.model_type == "hiera" else max(own)
    if image_size % patch_size:
        raise ConfigError(f"`{key}` must be a multiple of the backbone's patch size, {patch_size}. Got {image_size}.")
    device = next(udon.parameters()).device
    was_training = udon.training
    udon.eval()
    try:
        # A generator of its own: the run's random numbers must not depend on the check.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            pixels = probe_images(1, image_size, device)
            options = {"interpolate_pos_encoding": interpolate}
            first, second = (udon(pixels, **options).backbone_embeds for _ in range(2))
    except Exception as error:  # Of a size that does not fit, backbones raise nearly every type there is.
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"`model` must take images of `{key}`. Got {image_size} with {backbone.model_type!r}: {reason}"
        ) from error
    finally:
        udon.train(was_training)
    if not torch.isfinite(first).all():
        raise ConfigError(
            "`model` must have a backbone whose features are finite. "
            f"Got {backbone.model_type!r} with NaN or infinity; take other weights of it."
        )
    if not torch.equal(first, second):
        raise ConfigError(
            "`model` must have a backbone that gives the same features twice. "
            f"Got {backbone.model_type!r}, whose features are random; take another backbone."
        )


def probe_images(number: int, image_size: int, device: torch.device) -> torch.Tensor:
    """Makes images to try a backbone with, of shape `(number, 3, image_size, image_size)`; nothing is drawn."""
    values = torch.linspace(-1, 1, number * 3 * image_size**2, device=device).sin()
    return values.reshape(number, 3, image_size, image_size)


def channel_statistics(config: TrainConfig, backbone: PretrainedConfig) -> tuple[ChannelStatistics, str]:
    """Mean and standard deviation of each channel, and where they come from.

    Those of the run to start from, if any; else the config's, the backbone's image processor's, those in the
    backbone's configuration, or the table's, in this order.

    Raises:
        ConfigError: If the config names other values than the run to start from was trained with.
    """
    data, model = config.data, config.model
    if config.init is not None:
        path = config.init.run / "best" / "preprocessor_config.json"
        old = statistics_of_values(json.loads(path.read_text(encoding="utf-8")))
        for name, wanted, own in (("mean", data.image_mean, old.mean), ("std", data.image_std, old.std)):
            if wanted is not None and wanted != own:
                raise ConfigError(
                    f"`data.image_{name}` must be that of the run in `init.run`, {list(own)}. Got {list(wanted)}; "
                    "leave it out."
                )
        return old, "the run that this one starts from"
    known, source = known_statistics(model, backbone)
    if data.image_mean is not None and data.image_std is not None:
        source = "the config"
    return ChannelStatistics(data.image_mean or known.mean, data.image_std or known.std), source


def known_statistics(model: ModelConfig, backbone: PretrainedConfig) -> tuple[ChannelStatistics, str]:
    """Channel statistics that a backbone was trained with, and where they are known from."""
    if model.backbone is not None and not model.backbone.startswith(TIMM_PREFIX):
        values = find_processing(model.backbone, model.revision, model.trust_remote_code)
        if values is not None:
            return statistics_of_values(values), "the backbone's image processor"
    own = own_statistics(backbone)
    if own is not None:
        return own, "the backbone's configuration"
    return _STATISTICS[backbone_facts(backbone).statistics], f"what {backbone.model_type} is usually trained with"


@torch.no_grad()
def _flip_first_convolution(backbone: PreTrainedModel) -> None:
    """Lets a backbone that was trained on blue, green and red take red, green and blue."""
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 3)
    first.weight.copy_(first.weight.flip(1))


def needs_interpolation(backbone: PretrainedConfig, image_size: int, key: str = "data.image_size") -> bool:
    """Whether position embeddings must be interpolated on request.

    Args:
        backbone: Configuration of the backbone.
        image_size: Side of the images in pixels.
        key: Key of the config that it is the value of.

    Raises:
        ValueError: If the images have another size than the backbone's and it cannot interpolate.
    """
    facts, own = backbone_facts(backbone), getattr(backbone, "image_size", None)
    sides = {own} if isinstance(own, int) else set(own or ())
    if facts.sizes == "any" or not sides or sides == {image_size}:
        return False
    if facts.sizes == "request":
        return True
    raise ValueError(f"`{key}` must be the backbone's, {max(sides)}. Got {image_size}.")


def _known_values(values: dict[str, object]) -> dict[str, object]:
    """Refuses unknown keys and sizes below 1: transformers would take them in silence."""
    if "model_type" in values:
        known = AutoConfig.for_model(str(values["model_type"])).to_dict()
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"Got the unknown key `{key}` for model_type {values['model_type']!r}.")
            is_size = type(known[key]) is int and known[key] > 0
            if is_size and isinstance(value, int) and value < 1:
                raise ValueError(f"`{key}` must be at least 1. Got {value}.")
    return values
