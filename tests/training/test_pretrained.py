"""Runs that start from a trained backbone, as people do it: a folder with a checkpoint of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from modeling_udon.config import TrainConfig
from modeling_udon.config_file import load_config

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with dropout."""
    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=32, initializer_range=0.3, hidden_dropout_prob=0.1)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def values_of(make_values: Values, backbone: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    values = make_values(folder, **changes)
    del values["model"]["backbone_config"]
    values["model"]["backbone"] = str(backbone)
    return values


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / "model.safetensors")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_trained_backbone_with_dropout_goes_on_bit_for_bit(
    make_values: Values, run_train: Run, backbone: Path, tmp_path: Path, checkpointing: bool, evaluated: bool
) -> None:
    def values(name: str) -> dict[str, Any]:
        made = values_of(make_values, backbone, tmp_path, model__gradient_checkpointing=checkpointing, name=name)
        if not evaluated:
            for spec in made["domains"].values():
                spec |= {"validation_split": None, "test_split": None}
        return made

    whole, part = run_train(values("whole")), run_train(values("part"))
    for folder in sorted((part / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    again = run_train(values("part"), resume=True)
    assert all(torch.equal(weight, last_weights(again)[name]) for name, weight in last_weights(whole).items())


@pytest.mark.parametrize("evaluated", [False, True])
def test_every_part_of_a_trained_backbone_trains(
    make_values: Values, open_trainer: Any, backbone: Path, tmp_path: Path, evaluated: bool
) -> None:
    values = values_of(make_values, backbone, tmp_path, model__gradient_checkpointing=True)
    if not evaluated:
        for spec in values["domains"].values():
            spec |= {"validation_split": None, "test_split": None}
    trainer = open_trainer(TrainConfig.model_validate(values))
    trainer.catch_up()
    modules = list(trainer.run.model.modules())
    assert all(module.training for module in modules)
    assert any(getattr(module, "gradient_checkpointing", False) for module in modules)


def test_a_run_in_half_precision_is_tested_as_its_student_is_evaluated(
    make_values: Values, run_train: Run, udon: Any, tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, train__mixed_precision="bf16"))
    results = json.loads((run / "results.json").read_text())
    AcceleratorState._reset_state()
    PartialState._reset_state()
    answer = udon("evaluate", "--run", run, "--output", tmp_path / "again")
    assert answer.code == 0, answer.err
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["splits"]["test"] == results["splits"]["test"]


@pytest.mark.parametrize("size", [16, 24])
def test_a_frozen_teacher_sees_images_with_its_own_statistics_and_size(
    make_values: Values, run_train: Run, open_trainer: Any, tiny_config: Any, tmp_path: Path, size: int
) -> None:
    own = {"data__image_mean": [0.2, 0.3, 0.4], "data__image_std": [0.1, 0.2, 0.3], "train__num_steps": 2}
    teacher = run_train(make_values(tmp_path, **own, system="shared_teacher", name="teacher"))
    sizes = {"data__image_size": size, "model__backbone_config__image_size": size}
    config = load_config(tiny_config(**sizes, system="separate_teachers", teachers=str(teacher)))
    run = open_trainer(config).run
    model = run.model.frozen_teachers._teachers["blobs"].model
    colours = torch.tensor([[30, 120, 220], [200, 90, 10]], dtype=torch.uint8)
    pixels = colours[:, None, None, :].expand(2, size, size, 3)  # Of one colour, so that no filter matters.
    mean, std = torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.1, 0.2, 0.3])
    expected = ((colours / 255 - mean) / std)[:, :, None, None].expand(2, 3, 16, 16)
    with torch.no_grad():
        right = model(expected, domain="blobs").teacher_embeds
    found = run.model.frozen_teachers(run.statistics.normalize(pixels), "blobs")
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
