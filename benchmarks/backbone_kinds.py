"""Tiny backbones of every model type: what they are, and how one is written as a folder such as users have."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel

from modeling_udon.configuration_udon import TOWERS

# Odd ones, so that a guess would show.
MEAN, STD = [0.31, 0.42, 0.53], [0.21, 0.32, 0.43]

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.3,
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
PYRAMID = STAGES | {"num_attention_heads": [1, 2, 2, 2], "image_size": 64}
WINDOWS = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
    "initializer_range": 0.3,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 99,
}


@dataclass(frozen=True)
class Kind:
    """A tiny backbone.

    Attributes:
        name: Its row in the table.
        model_type: As transformers calls it.
        values: Values of its configuration; only those that it knows are taken.
        text: Whether it is a checkpoint of images and texts, whole.
        image_size: Side of its images.
        processor: Name of its image processor.
    """

    name: str
    model_type: str
    values: dict[str, Any]
    text: bool = False
    image_size: int = 32
    processor: str = "ViTImageProcessor"


def _of(model_type: str, values: dict[str, Any], name: str | None = None, **others: Any) -> Kind:
    return Kind(name or model_type, model_type, values, **others)


BIT, CLIP, CONVNEXT = ({"processor": f"{name}ImageProcessor"} for name in ("Bit", "CLIP", "ConvNext"))
KINDS = [
    _of("vit", VIT),
    _of("deit", VIT, processor="DeiTImageProcessor"),
    _of("vit_msn", VIT),
    _of("vit_mae", VIT),
    _of("ijepa", VIT),
    _of("dinov2", VIT | {"mlp_ratio": 2}, **BIT),
    _of("dinov2_with_registers", VIT | {"mlp_ratio": 2}, **BIT),
    _of("dinov3_vit", VIT | {"pos_embed_rescale": None}, processor="DINOv3ViTImageProcessorFast"),
    _of("dinov3_convnext", STAGES, image_size=64, processor="DINOv3ViTImageProcessorFast"),
    _of("clip_vision_model", VIT, **CLIP),
    _of("clip", VIT, "clip, whole", text=True, **CLIP),
    _of("chinese_clip_vision_model", VIT, processor="ChineseCLIPImageProcessor"),
    _of("chinese_clip", VIT, "chinese_clip, whole", text=True, processor="ChineseCLIPImageProcessor"),
    _of("metaclip_2_vision_model", VIT, **CLIP),
    _of("metaclip_2", VIT, "metaclip_2, whole", text=True, **CLIP),
    _of("altclip_vision_model", VIT, **CLIP),
    _of("altclip", VIT, "altclip, whole", text=True, **CLIP),
    _of("blip_vision_model", VIT, processor="BlipImageProcessor"),
    _of("siglip_vision_model", VIT, processor="SiglipImageProcessor"),
    _of("siglip", VIT, "siglip, whole (SigLIP 2 of fixed size too)", text=True, processor="SiglipImageProcessor"),
    _of("siglip2_vision_model", VIT, processor="SiglipImageProcessor"),
    _of("siglip2", VIT, "siglip2, whole (NaFlex)", text=True, processor="Siglip2ImageProcessor"),
    _of("mlcd_vision_model", VIT, **CLIP),
    _of("aimv2_vision_model", VIT, **CLIP),
    _of("aimv2", VIT, "aimv2, whole", text=True, **CLIP),
    _of("beit", VIT, processor="BeitImageProcessor"),
    _of("data2vec-vision", VIT, processor="BeitImageProcessor"),
    _of("convnext", STAGES, image_size=64, **CONVNEXT),
    _of("convnextv2", STAGES, image_size=64, **CONVNEXT),
    _of("resnet", STAGES | {"embedding_size": 8}, image_size=64, **CONVNEXT),
    _of("regnet", STAGES | {"embedding_size": 8, "groups_width": 8}, image_size=64, **CONVNEXT),
    _of(
        "bit",
        {"hidden_sizes": [32, 32, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 32, "num_groups": 2},
        image_size=64,
        **BIT,
    ),
    _of(
        "efficientnet",
        {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128, "initializer_range": 0.5},
        image_size=64,
        processor="EfficientNetImageProcessor",
    ),
    _of("mobilenet_v1", {"depth_multiplier": 0.25}, image_size=64, processor="MobileNetV1ImageProcessor"),
    _of("mobilenet_v2", {"depth_multiplier": 0.1}, image_size=64, processor="MobileNetV2ImageProcessor"),
    _of("mobilevit", {"image_size": 64}, image_size=64, processor="MobileViTImageProcessor"),
    _of(
        "mobilevitv2",
        {"image_size": 64, "base_attn_unit_dims": [16, 16, 16], "width_multiplier": 0.25, "initializer_range": 0.5},
        image_size=64,
        processor="MobileViTImageProcessor",
    ),
    _of(
        "levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 2, 2],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        image_size=64,
        processor="LevitImageProcessor",
    ),
    _of("segformer", PYRAMID, image_size=64, processor="SegformerImageProcessor"),
    _of("swiftformer", {"embed_dims": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, image_size=64),
    _of("swin", WINDOWS),
    _of("swinv2", WINDOWS),
    _of(
        "hiera",
        {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
        image_size=64,
        **BIT,
    ),
    _of("focalnet", {"image_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1]}, **BIT),
    _of("poolformer", STAGES, image_size=64, processor="PoolFormerImageProcessor"),
    _of("cvt", {"embed_dim": [8, 16, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, image_size=64, **CONVNEXT),
    _of("pvt", PYRAMID, image_size=64, processor="PvtImageProcessor"),
    _of("pvt_v2", PYRAMID, image_size=64, processor="PvtImageProcessor"),
    _of("dinat", {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}, image_size=64),
    _of("timm_wrapper", {"architecture": "test_vit"}, "timm_wrapper, a ViT", image_size=160),
    _of("timm_wrapper", {"architecture": "test_convnext"}, "timm_wrapper, a ConvNeXt", image_size=64),
]


def write_backbone(kind: Kind, folder: Path) -> None:
    """Writes a backbone of random weights with its image processor.

    Raises:
        ImportError: If a library that it needs is missing.
    """
    torch.manual_seed(0)
    if kind.model_type in TOWERS:
        stem = TOWERS[kind.model_type]
        config = getattr(transformers, f"{stem}Config")(**kind.values)
        model = getattr(transformers, f"{stem}Model")(config)
    else:
        model = AutoModel.from_config(_tiny_config(kind))
    model.save_pretrained(folder)
    size = {"height": kind.image_size, "width": kind.image_size}
    values = {"do_resize": True, "size": size, "do_center_crop": False, "do_rescale": True, "rescale_factor": 1 / 255}
    values |= {"do_normalize": True, "image_mean": MEAN, "image_std": STD, "resample": 2, "do_convert_rgb": True}
    if "EfficientNet" in kind.processor:
        values["include_top"] = True
    if "MobileViT" in kind.processor:
        # Its class neither has statistics nor keeps the order of the channels.
        values = {"do_resize": True, "size": {"shortest_edge": kind.image_size}, "do_flip_channel_order": True}
    text = json.dumps({"image_processor_type": kind.processor, **values}, indent=1)
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")


def _tiny_config(kind: Kind) -> Any:
    plain = AutoConfig.for_model(kind.model_type)
    if kind.text:
        known = {part: getattr(plain, f"{part}_config").to_dict() for part in ("vision", "text")}
        tiny = {"vision": kind.values, "text": TEXT}
        parts = {
            f"{part}_config": {key: value for key, value in tiny[part].items() if key in known[part]} for part in tiny
        }
        return AutoConfig.for_model(kind.model_type, **parts, projection_dim=16)
    known = plain.to_dict()
    # Dropped paths and activations are drawn for each process, so their losses would be others.
    still = {
        key: [0.0] * len(value) if isinstance(value, list) else type(value)()
        for key, value in known.items()
        if "drop" in key and value
    }
    tiny = {key: value for key, value in kind.values.items() if key in known or key == "architecture"}
    return AutoConfig.for_model(kind.model_type, **still, **tiny)
