"""Every vision encoder of the table gives its features, and the published student gives them again."""

from pathlib import Path

import pytest
import torch
from backbone_zoo import KINDS, UNKNOWN
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    PretrainedConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.config import TrainConfig
from modeling_udon.config_sections import ModelConfig
from modeling_udon.configuration_udon import BACKBONES, TOWERS, backbone_facts
from modeling_udon.data.preprocessing import IMAGENET_DEFAULT, ChannelStatistics, image_processor
from modeling_udon.encoder import Encoder
from modeling_udon.training.backbone import build_udon, channel_statistics, check_backbone

VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
# Of whole models their tower is enough; dinat and timm need libraries that are not installed here, and `mlcd` is
# another name of `mlcd_vision_model`.
TINY = {kind.model_type: kind for kind in KINDS.values() if not kind.text}
ABSENT = {"timm_wrapper", "mlcd", "dinat"} | (UNKNOWN - set(TOWERS))
REFUSED = {name for name, facts in BACKBONES.items() if facts.refusal}


def tiny_config(kind: str) -> dict[str, object]:
    if kind in TOWERS:
        return {"model_type": kind, **TINY[kind].values}
    known = AutoConfig.for_model(kind).to_dict()
    return {"model_type": kind, **{name: value for name, value in TINY[kind].values.items() if name in known}}


@pytest.mark.parametrize("kind", sorted(set(BACKBONES) - ABSENT - REFUSED))
def test_a_published_student_gives_the_features_of_its_backbone_again(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(kind)
    model = UdonModel(UdonConfig(backbone_config=config, embedding_dim=4)).eval()
    size = TINY[kind].image_size
    check_backbone(model, size)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(pixels)
        model.save_pretrained(tmp_path)
        again = UdonModel.from_pretrained(tmp_path).eval()(pixels)
    assert expected.backbone_embeds.shape == (2, model.feature_dim)
    assert not torch.equal(expected.backbone_embeds[0], expected.backbone_embeds[1])
    torch.testing.assert_close(again.image_embeds, expected.image_embeds, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_backbone_without_features_is_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(ValueError, match=f"`backbone_config` must not be of {kind}: it (hides|takes)"):
        UdonConfig(backbone_config={"model_type": kind})


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls+mean", "pooler"])
def test_poolings_are_those_of_a_plain_formula(pooling: str) -> None:
    torch.manual_seed(0)
    model = UdonModel(UdonConfig(backbone_config=tiny_config("vit"), embedding_dim=4, pooling=pooling)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs, found = model.backbone(pixels), model(pixels).backbone_embeds
    tokens = outputs.last_hidden_state
    first, mean = tokens[:, 0], tokens[:, 1:].sum(dim=1) / 16
    both = torch.cat([F.normalize(first, dim=1), F.normalize(mean, dim=1)], dim=1)
    expected = {"cls": first, "mean": mean, "cls+mean": both, "pooler": outputs.pooler_output}[pooling]
    torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind", sorted({"mlcd_vision_model", "chinese_clip_vision_model", "clip_vision_model"} - ABSENT)
)
def test_the_class_token_is_the_one_after_the_last_norm(kind: str) -> None:
    model = UdonModel(UdonConfig(backbone_config=tiny_config(kind), embedding_dim=4, pooling="cls")).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled = model.backbone(pixels).pooler_output
        torch.testing.assert_close(model(pixels).backbone_embeds, F.normalize(pooled, dim=1))


def test_registers_are_no_patches() -> None:
    assert backbone_facts(AutoConfig.for_model("dinov2_with_registers", num_register_tokens=4)).prefix == 5
    assert backbone_facts(AutoConfig.for_model("dinov2")).prefix == 1


def test_aimv2_has_no_class_token() -> None:
    with pytest.raises(ValueError, match="`pooling` 'cls' must go with a backbone that has a class token"):
        UdonModel(UdonConfig(backbone_config=tiny_config("aimv2_vision_model"), pooling="cls"))


def statistics_of(backbone: PretrainedConfig, model: dict[str, object], **data: object) -> ChannelStatistics:
    values = {"name": "run", "domains": {"d": "x"}, "model": model, "data": data, "train": {"num_steps": 1}}
    return channel_statistics(TrainConfig.model_validate(values), backbone)[0]


def test_statistics_are_those_of_the_backbones_own_processor(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    model = {"backbone": str(tmp_path)}
    backbone = AutoConfig.from_pretrained(tmp_path)
    assert statistics_of(backbone, model).mean == (0.5, 0.5, 0.5)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    found = statistics_of(backbone, model)
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert statistics_of(backbone, model, image_mean=(0.0, 0.0, 0.0)).mean == (0.0, 0.0, 0.0)
    dinov2 = {"backbone_config": {"model_type": "dinov2"}}
    assert statistics_of(AutoConfig.for_model("dinov2"), dinov2) == IMAGENET_DEFAULT


def test_dinov2_and_vit_take_images_of_another_size_than_their_own(tmp_path: Path) -> None:
    for kind, name in (
        (Dinov2Model(Dinov2Config(**VIT, image_size=32, patch_size=8)), "dinov2"),
        (ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8)), "vit"),
    ):
        kind.save_pretrained(tmp_path / name)
        udon = build_udon(ModelConfig(backbone=str(tmp_path / name)), {"embedding_dim": 4}, 48)
        check_backbone(udon, 48)
        udon.eval().student().save_pretrained(tmp_path / f"{name}-student")
        image_processor(48, IMAGENET_DEFAULT).save_pretrained(tmp_path / f"{name}-student")
        pixels = torch.randn(1, 3, 48, 48)
        with torch.no_grad():
            again = UdonModel.from_pretrained(tmp_path / f"{name}-student").eval()(pixels).image_embeds
            torch.testing.assert_close(again, udon(pixels).image_embeds)
        assert Encoder.open(tmp_path / f"{name}-student").image_size == 48


def test_random_weights_in_the_place_of_missing_ones_are_refused(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8), add_pooling_layer=False).save_pretrained(tmp_path)
    image_processor(32, IMAGENET_DEFAULT).save_pretrained(tmp_path)
    assert "pooler.dense.weight" not in AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).state_dict()
    with pytest.raises(ValueError, match="`model` must have all its weights. Got .* without 2 of them, such as pooler"):
        Encoder.open(tmp_path, pooling="pooler")
    assert Encoder.open(tmp_path, pooling="cls").dim == 16
