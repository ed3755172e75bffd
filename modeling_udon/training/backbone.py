"""The backbone of a run: opened or built, fitted to the image size, with the channel statistics that it knows."""

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from modeling_udon.auto_classes import UdonModel
from modeling_udon.backbones import check_missing, check_remote_code, find_processor
from modeling_udon.config import ConfigError
from modeling_udon.config_sections import DataConfig, ModelConfig
from modeling_udon.configuration_udon import UdonConfig, backbone_facts
from modeling_udon.data.preprocessing import IMAGENET_DEFAULT, IMAGENET_STANDARD, OPENAI_CLIP, ChannelStatistics

_STATISTICS = {"standard": IMAGENET_STANDARD, "imagenet": IMAGENET_DEFAULT, "clip": OPENAI_CLIP}


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
        config.interpolate_pos_encoding = _needs_interpolation(config.backbone_config, image_size)
        return UdonModel(config)
    check_remote_code(model.backbone, model.revision, model.trust_remote_code)
    loaded = AutoModel.from_pretrained(
        model.backbone,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attn_implementation=model.attn_implementation,
        dtype=torch.float32,
        output_loading_info=True,
    )
    backbone, found = loaded
    udon = UdonModel.from_backbone(backbone, **sizes)
    check_missing(model.backbone, found["missing_keys"], udon.config.pooling)
    udon.config.interpolate_pos_encoding = _needs_interpolation(udon.config.backbone_config, image_size)
    return udon


def check_backbone(udon: UdonModel, image_size: int) -> None:
    """Refuses a backbone that does not take the run's images, or whose features differ from pass to pass.

    Raises:
        ConfigError: If the images have another number of channels or a size that is no multiple of the patch, a pass
            fails, or two passes of the same images give different features.
    """
    backbone = udon.config.backbone_config
    if (channels := getattr(backbone, "num_channels", 3)) != 3:
        raise ConfigError(f"`model` must take images of 3 channels, RGB. Got a backbone for {channels}.")
    patch_size = getattr(backbone, "patch_size", 1)
    if isinstance(patch_size, int) and image_size % patch_size:
        raise ConfigError(
            f"`data.image_size` must be a multiple of the backbone's patch size, {patch_size}. Got {image_size}."
        )
    device = next(udon.parameters()).device
    was_training = udon.training
    udon.eval()
    try:
        # A generator of its own: the run's random numbers must not depend on the check.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            pixels = torch.linspace(-1, 1, 3 * image_size**2, device=device).sin().reshape(1, 3, image_size, image_size)
            first, second = (udon(pixels).backbone_embeds for _ in range(2))
    except Exception as error:  # Of a size that does not fit, backbones raise nearly every type there is.
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"`model` must take images of `data.image_size`. Got {image_size} with {backbone.model_type!r}: {reason}"
        ) from error
    finally:
        udon.train(was_training)
    if not torch.equal(first, second):
        raise ConfigError(
            "`model` must have a backbone that gives the same features twice. "
            f"Got {backbone.model_type!r}, whose features are random; take another backbone."
        )


def channel_statistics(data: DataConfig, model: ModelConfig, backbone: PretrainedConfig) -> ChannelStatistics:
    """Mean and standard deviation of each channel: the config's, the backbone's image processor's, or the table's."""
    known = _STATISTICS[backbone_facts(backbone).statistics]
    if model.backbone is not None:
        processor = find_processor(model.backbone, model.revision, model.trust_remote_code)
        if processor is not None:
            known = ChannelStatistics.of_processor(processor)
    return ChannelStatistics(data.image_mean or known.mean, data.image_std or known.std)


def _needs_interpolation(backbone: PretrainedConfig, image_size: int) -> bool:
    """Whether position embeddings must be interpolated on request.

    Raises:
        ValueError: If the images have another size than the backbone's and it cannot interpolate.
    """
    facts, own = backbone_facts(backbone), getattr(backbone, "image_size", None)
    sides = {own} if isinstance(own, int) else set(own or ())
    if facts.sizes == "any" or not sides or sides == {image_size}:
        return False
    if facts.sizes == "request":
        return True
    raise ValueError(f"`data.image_size` must be the backbone's, {max(sides)}. Got {image_size}.")


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
