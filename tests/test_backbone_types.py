"""Trained backbones of every model type, from folders with image processors of their own, to students elsewhere."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_zoo import KINDS, UNKNOWN, kinds, table
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, Dinov2Model, ViTModel
from transformers import logging as transformers_logging

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.backbones import POOLINGS
from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_sections import ModelConfig
from modeling_udon.data.processor_statistics import statistics_of_values
from modeling_udon.encoder import Encoder
from modeling_udon.training.backbone import build_udon, channel_statistics, check_backbone

Run = Callable[..., Path]

# Of each way to have tokens, norms, poolers and feature maps one; the others are `long`.
COMMON = (
    "vit",
    "dinov2_with_registers",
    "dinov3_vit",
    "clip, whole",
    "metaclip_2_vision_model",
    "siglip, whole (SigLIP 2 of fixed size too)",
    "mlcd_vision_model",
    "aimv2_vision_model",
    "data2vec-vision",
    "convnext",
    "efficientnet",
    "swin",
)
IN_TWO = ("dinov2_with_registers", "clip, whole", "resnet")
REFUSED = {
    "vit_mae": "hides random patches",
    "siglip2_vision_model": "NaFlex",
    "siglip2, whole (NaFlex)": "NaFlex",
}
# What a batch is normalised by depends on the share of it that a process sees.
BATCH_NORM = ("resnet", "regnet", "efficientnet", "mobile", "levit", "swiftformer", "cvt")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    table.write_data(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(data: Path) -> list[Path]:
    return sorted(data.rglob("*.png"))[::6]


@pytest.fixture
def open_kind(tmp_path: Path) -> Callable[..., UdonModel]:
    """Writes a tiny backbone and opens it as a run does."""

    def open_it(name: str, image_size: int | None = None, **model: Any) -> UdonModel:
        kinds.write_backbone(KINDS[name], tmp_path / "backbone")
        named = ModelConfig(backbone=str(tmp_path / "backbone"), **model)
        size = image_size or KINDS[name].image_size
        return build_udon(named, {"embedding_dim": 8, "pooling": named.pooling}, size).eval()

    return open_it


@pytest.fixture(scope="module")
def trained(data: Path, pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Of each common backbone: the run, and what a process without this package embeds by its student."""
    runs, root = {}, tmp_path_factory.mktemp("trained")
    for number, name in enumerate(name for name in (*COMMON, *POOLINGS) if name not in UNKNOWN):
        kind, backbone = KINDS[name if name in KINDS else "vit"], root / f"{number}" / "backbone"
        kinds.write_backbone(kind, backbone)
        pooling = {"pooling": name} if name in POOLINGS else {}
        runs[name] = table.train_here(table.values_of(kind, backbone, data, root / f"{number}", **pooling))
    elsewhere = table.open_elsewhere([run / "best" for run in runs.values()], pictures)
    return {name: (run, embeds) for (name, run), embeds in zip(runs.items(), elsewhere, strict=True)}


@pytest.mark.parametrize("name", COMMON)
def test_a_trained_backbone_gives_a_student_that_embeds_elsewhere_as_here(
    name: str, trained: dict[str, tuple[Path, Any]], pictures: list[Path]
) -> None:
    if name in UNKNOWN:
        pytest.skip("this transformers does not know it by its name")
    run, elsewhere = trained[name]
    assert len(table.losses_of(run)) == 3
    here = table.embed_here(run / "best", pictures)
    assert np.abs(here - elsewhere).max() < 2e-6
    assert np.abs(here[0] - here[1]).max() > 1e-4
    processor = json.loads((run / "best" / "preprocessor_config.json").read_text())
    twice = [value**2 for value in kinds.STD] if name == "efficientnet" else kinds.STD
    assert processor["image_mean"] == kinds.MEAN and processor["image_std"] == pytest.approx(twice)


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes_train_a_trained_backbone_as_one_does(name: str, data: Path, tmp_path: Path) -> None:
    kinds.write_backbone(KINDS[name], tmp_path / "backbone")
    folders = {what: tmp_path / what for what in ("one", "two")}
    values = {what: table.values_of(KINDS[name], tmp_path / "backbone", data, path) for what, path in folders.items()}
    one, two = table.losses_of(table.train_here(values["one"])), table.losses_of(table.train_in_two(values["two"]))
    assert len(two) == 3
    if not name.startswith(BATCH_NORM):
        assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_backbone_without_features_of_images_is_refused_in_one_line(name: str, data: Path, tmp_path: Path) -> None:
    if name in UNKNOWN:
        pytest.skip("this version of transformers does not know it")
    kinds.write_backbone(KINDS[name], tmp_path / "backbone")
    with pytest.raises(ConfigError, match=REFUSED[name]) as refusal:
        table.train_here(table.values_of(KINDS[name], tmp_path / "backbone", data, tmp_path / "run"))
    assert "\n" not in str(refusal.value)


def test_the_way_out_for_a_masked_autoencoder_is_true(tmp_path: Path) -> None:
    kinds.write_backbone(KINDS["vit_mae"], tmp_path / "mae")
    transformers_logging.set_verbosity_error()
    ViTModel.from_pretrained(tmp_path / "mae", add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    transformers_logging.set_verbosity_warning()
    udon = build_udon(ModelConfig(backbone=str(tmp_path / "vit")), {"embedding_dim": 8}, 32)
    mae = AutoModel.from_pretrained(tmp_path / "mae").state_dict()
    ours = udon.backbone.state_dict()
    assert torch.equal(ours["embeddings.cls_token"], mae["embeddings.cls_token"])
    assert torch.equal(ours["layernorm.weight"], mae["layernorm.weight"])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in KINDS if name not in REFUSED])
def test_every_backbone_of_the_table_trains_in_one_process_and_two(
    name: str, data: Path, pictures: list[Path], tmp_path: Path
) -> None:
    row = table.try_kind(KINDS[name], data, tmp_path)
    if "refusal" in row:
        pytest.skip(row["refusal"])
    assert row["two"] < 1e-5 or name.startswith(BATCH_NORM)
    (elsewhere,) = table.open_elsewhere([row["best"]], pictures)
    assert np.abs(table.embed_here(row["best"], pictures) - elsewhere).max() < 2e-6


@pytest.mark.parametrize("name", ["vit", "efficientnet", "mobilevit", "levit"])
def test_training_sees_images_as_the_backbones_own_processor_makes_them(
    name: str, open_kind: Any, tmp_path: Path
) -> None:
    udon, size = open_kind(name), KINDS[name].image_size
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "backbone")
    settings = {"do_center_crop": False}
    expected = processor(image, return_tensors="pt", input_data_format="channels_last", **settings)["pixel_values"]
    values = {
        "name": "run",
        "domains": {"d": "x"},
        "model": {"backbone": str(tmp_path / "backbone")},
        "train": {"num_steps": 1},
    }
    statistics, source = channel_statistics(TrainConfig.model_validate(values), udon.config.backbone_config)
    assert source == "the backbone's image processor"
    original = AutoModel.from_pretrained(tmp_path / "backbone").eval()
    with torch.no_grad():
        theirs = original(pixel_values=expected)
        ours = udon.backbone(pixel_values=statistics.normalize(torch.from_numpy(image)[None]))
    torch.testing.assert_close(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-4, rtol=1e-4)
    encoder = Encoder.open(tmp_path / "backbone", pooling="mean")
    embeds = encoder.encode([image]).embeddings[0]
    tokens = theirs.last_hidden_state
    mean = tokens[:, 1:].mean(1) if name == "vit" else tokens.mean(dim=(2, 3)) if tokens.ndim == 4 else tokens.mean(1)
    assert np.abs(embeds - torch.nn.functional.normalize(mean)[0].numpy()).max() < 1e-4


def test_a_processor_that_scales_otherwise_has_the_statistics_of_its_arithmetic() -> None:
    values = {"image_mean": [0.1] * 3, "image_std": [0.5] * 3, "do_rescale": True, "rescale_factor": 1 / 127.5}
    pixels = torch.full((1, 1, 1, 3), 51, dtype=torch.uint8)
    for more, expected in (({}, (51 / 127.5 - 0.1) / 0.5), ({"rescale_offset": True}, (51 / 127.5 - 1 - 0.1) / 0.5)):
        found = statistics_of_values(values | more).normalize(pixels)
        torch.testing.assert_close(found.flatten(), torch.full((3,), expected))


def test_a_processor_in_a_file_of_a_processor_of_texts_and_images_is_found(tmp_path: Path, data: Path) -> None:
    kinds.write_backbone(KINDS["clip, whole"], tmp_path / "backbone")
    path = tmp_path / "backbone" / "preprocessor_config.json"
    (tmp_path / "backbone" / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads(path.read_text())})
    )
    path.unlink()
    run = table.train_here(table.values_of(KINDS["clip, whole"], tmp_path / "backbone", data, tmp_path))
    assert json.loads((run / "best" / "preprocessor_config.json").read_text())["image_mean"] == kinds.MEAN


@pytest.mark.parametrize("name", ["vit", "clip, whole", "dinov2"])
def test_the_first_layers_alone_are_kept(name: str, open_kind: Any, tmp_path: Path) -> None:
    whole, cut = open_kind(name), open_kind(name, keep_layers=1)
    assert cut.config.backbone_config.num_hidden_layers == 1
    ours, theirs = cut.backbone.state_dict(), whole.backbone.state_dict()
    assert 0 < len(ours) < len(theirs) and all(torch.equal(value, theirs[key]) for key, value in ours.items())
    cut.save_pretrained(tmp_path / "cut")
    assert UdonConfig.from_pretrained(tmp_path / "cut").backbone_config.num_hidden_layers == 1
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        again = UdonModel.from_pretrained(tmp_path / "cut").eval()(pixels).image_embeds
        torch.testing.assert_close(again, cut(pixels).image_embeds)


@pytest.mark.parametrize(("name", "keep"), [("vit", 3), ("convnext", 1), ("swin", 1)])
def test_layers_that_are_not_there_cannot_be_kept(name: str, keep: int, open_kind: Any) -> None:
    with pytest.raises(ValueError, match="`model.keep_layers` must be from 1 to the backbone's number of layers. Got"):
        open_kind(name, keep_layers=keep)


def test_image_sizes_in_a_list_are_sizes(open_kind: Any) -> None:
    for name in ("vit", "hiera"):
        udon = open_kind(name)
        size = KINDS[name].image_size
        udon.config.backbone_config.image_size = [size, size]
        check_backbone(udon, size)
    values = {"model_type": "vit", **kinds.VIT, "image_size": [32, 32]}
    named = ModelConfig(backbone_config=values)
    for size in (32, 48):
        udon = build_udon(named, {"embedding_dim": 8}, size)
        check_backbone(udon, size)
        assert udon.config.interpolate_pos_encoding == (size != 32)


def test_features_that_differ_from_pass_to_pass_are_refused(open_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    udon = open_kind("dinov2")
    forward = Dinov2Model.forward

    def noisy(self: Dinov2Model, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state + torch.rand(1)
        return outputs

    check_backbone(udon, 32)
    monkeypatch.setattr(Dinov2Model, "forward", noisy)
    with pytest.raises(ConfigError, match="must have a backbone that gives the same features twice. Got 'dinov2'"):
        check_backbone(udon, 32)


@pytest.mark.parametrize("name", ["beit", "data2vec-vision"])
@pytest.mark.parametrize("use_mean", [False, True])
def test_beit_is_pooled_after_its_norm(name: str, use_mean: bool, tmp_path: Path) -> None:
    values = {"model_type": name, **kinds.VIT, "use_mean_pooling": use_mean}
    udon = UdonModel(UdonConfig(values, embedding_dim=4)).eval()
    with torch.no_grad():
        for parameter in udon.parameters():
            parameter.normal_(0, 0.3)
        pixels = torch.randn(2, 3, 32, 32)
        outputs = udon.backbone(pixels)
        tokens = outputs.last_hidden_state
        if use_mean:
            norm = udon.backbone.pooler.layernorm
            expected = norm(tokens[:, 1:].mean(1))
        else:
            assert isinstance(udon.backbone.layernorm, torch.nn.LayerNorm)
            expected = tokens[:, 0]
        torch.testing.assert_close(udon(pixels).backbone_embeds, torch.nn.functional.normalize(expected))
        udon.save_pretrained(tmp_path)
        again = UdonModel.from_pretrained(tmp_path).eval()(pixels).image_embeds
        torch.testing.assert_close(again, udon(pixels).image_embeds)


def test_a_data2vec_student_of_before_embeds_as_before(tmp_path: Path) -> None:
    values = {"model_type": "data2vec-vision", **kinds.VIT}
    old = UdonModel(UdonConfig(values, embedding_dim=4, pooling="mean", token_norm=None)).eval()
    assert old.backbone.pooler is None
    old.save_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = old.backbone(pixels).last_hidden_state[:, 1:].mean(1)
        expected = old.student_head(torch.nn.functional.normalize(plain))
        again = UdonModel.from_pretrained(tmp_path).eval()(pixels).image_embeds
    torch.testing.assert_close(again, expected)


def test_a_run_that_starts_from_another_keeps_its_statistics(data: Path, tmp_path: Path) -> None:
    kind = KINDS["vit"]
    kinds.write_backbone(kind, tmp_path / "backbone")
    old = table.train_here(table.values_of(kind, tmp_path / "backbone", data, tmp_path / "old"))
    path = tmp_path / "backbone" / "preprocessor_config.json"
    path.write_text(path.read_text().replace("0.31", "0.77"))
    values = table.values_of(kind, tmp_path / "backbone", data, tmp_path / "new") | {"init": {"run": str(old)}}
    new = table.train_here(values)
    assert json.loads((new / "best" / "preprocessor_config.json").read_text())["image_mean"] == kinds.MEAN
    values |= {"name": "other", "data": values["data"] | {"image_mean": [0.5, 0.5, 0.5]}}
    with pytest.raises(ConfigError, match=r"`data.image_mean` must be that of the run in `init.run`, \[0.31"):
        table.train_here(values)
    values |= {"name": "third", "data": table.values_of(kind, path, data, path)["data"]}
    values["model"] = values["model"] | {"pooling": "mean"}
    with pytest.raises(ConfigError, match="`model.pooling` must be that of the run in `init.run`, cls. Got mean"):
        table.train_here(values)


def test_batch_norm_does_not_count_images_of_noise(data: Path, tmp_path: Path) -> None:
    kind = KINDS["resnet"]
    kinds.write_backbone(kind, tmp_path / "backbone")
    values = table.values_of(kind, tmp_path / "backbone", data, tmp_path)
    counted = {}
    for what, train in (("one", table.train_here), ("two", table.train_in_two)):
        run = train(values | {"name": what})
        state = load_file(run / "checkpoints" / "step-00000003" / "model.safetensors")
        counted[what] = {int(value) for key, value in state.items() if key.endswith("num_batches_tracked")}
    assert counted == {"one": {3}, "two": {3}}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_poolings_are_the_same_for_training_and_for_reading(
    pooling: Any, trained: dict[str, tuple[Path, Any]], pictures: list[Path]
) -> None:
    run, elsewhere = trained[pooling]
    assert np.abs(Encoder.open(run / "best").encode(pictures).embeddings - elsewhere).max() < 2e-6
    features = Encoder.open(run / "best", pooling=pooling)
    assert features.dim == (32 if pooling == "cls+mean" else 16)
    assert Encoder.open(run.parent / "backbone", pooling=pooling).dim == features.dim


def test_a_model_of_timm_is_published_as_its_wrapper(data: Path, pictures: list[Path], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source = tmp_path / "source"
    source.mkdir()
    model = timm.create_model("test_vit", num_classes=7)
    cfg = {"input_size": [3, 160, 160], "mean": kinds.MEAN, "std": kinds.STD}
    config = {"architecture": "test_vit", "num_classes": 7, "pretrained_cfg": cfg}
    (source / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), source / "model.safetensors")
    name = f"timm:local-dir:{source}"
    kind = kinds.Kind("timm", "timm_wrapper", {}, image_size=80)
    for pooling in ("pooler", "cls", "cls+mean"):
        values = table.values_of(kind, Path(name), data, tmp_path / pooling, pooling=pooling)
        values["model"]["backbone"] = name
        run = table.train_here(values)
        published = UdonConfig.from_pretrained(run / "best").backbone_config
        assert (published.model_type, published.architecture) == ("timm_wrapper", "test_vit")
        assert json.loads((run / "best" / "preprocessor_config.json").read_text())["image_mean"] == kinds.MEAN
        (elsewhere,) = table.open_elsewhere([run / "best"], pictures)
        assert np.abs(table.embed_here(run / "best", pictures) - elsewhere).max() < 2e-6
    mean = Encoder.open(name, pooling="mean", image_size=160)
    plain = timm.create_model(f"local-dir:{source}", pretrained=True, num_classes=0).eval()
    grey = torch.full((1, 160, 160, 3), 99, dtype=torch.uint8)
    with torch.no_grad():
        tokens = plain.forward_features(mean.statistics.normalize(grey))
    expected = torch.nn.functional.normalize(tokens[:, plain.num_prefix_tokens :].mean(1))
    torch.testing.assert_close(mean(grey), expected)


def test_transformers_4_loads_what_5_has_written(data: Path, pictures: list[Path], tmp_path: Path) -> None:
    python = os.environ.get("UDON_OLDEST_PYTHON")
    if python is None:
        pytest.skip("UDON_OLDEST_PYTHON does not name a Python with the oldest supported transformers")
    assert python != sys.executable
    runs = []
    for number, name in enumerate(("altclip, whole", "metaclip_2_vision_model", "swin")):
        folder = tmp_path / f"{number}"
        kinds.write_backbone(KINDS[name], folder / "backbone")
        runs.append(table.train_here(table.values_of(KINDS[name], folder / "backbone", data, folder)))
    elsewhere = table.open_elsewhere([run / "best" for run in runs], pictures, python)
    for run, embeds in zip(runs, elsewhere, strict=True):
        assert np.abs(table.embed_here(run / "best", pictures) - embeds).max() < 2e-6
