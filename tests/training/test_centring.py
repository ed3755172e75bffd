"""A head on centred features takes the steps of `W (x - m) + c`, and is kept, resumed and published as any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modeling_udon import UdonConfig
from modeling_udon.config import ConfigError
from modeling_udon.config_file import load_config
from modeling_udon.training.centring import CentredStep, add_centre, first_layer, set_centre
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
CENTRED = {"model__centre_features": True}


@pytest.mark.parametrize("hidden", [[], [12]])
def test_steps_are_those_of_a_layer_that_gets_the_features_less_their_mean(hidden: list[int]) -> None:
    torch.manual_seed(0)
    backbone = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    backbone |= {"intermediate_size": 8, "image_size": 8, "patch_size": 8}
    config = UdonConfig(backbone_config=backbone, embedding_dim=4, head_hidden_dims=hidden, domains={})
    model = UdonForDistillation(config, num_classes={"one": 3})
    layer, centre = first_layer(model.udon.student_head), torch.randn(8)
    plain = nn.Linear(8, layer.out_features)
    plain.load_state_dict(layer.state_dict())
    add_centre(model)
    set_centre(model, centre, trained=False)
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.1, weight_decay=0.0) for one in (layer, plain)]
    for _ in range(5):
        features, directions = torch.randn(6, 8) + centre, torch.randn(6, layer.out_features)
        for module, inputs in ((layer, features), (plain, features - centre)):
            (module(inputs).tanh() * directions).sum().backward()
        step = CentredStep(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step.finish()
        torch.testing.assert_close(layer(features), plain(features - centre), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"train__heads_only": True}])
def test_a_run_starts_from_the_mean_and_goes_on_bit_for_bit(
    make_values: Values, run_train: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run_train(make_values(tmp_path / "whole", **CENTRED, **changes))
    values = make_values(tmp_path / "part", **CENTRED, **changes)
    part = run_train(values)
    for folder in sorted((part / "checkpoints").glob("step-*"))[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    run_train(values, resume=True)
    name = Path("checkpoints") / "step-00000011" / "model.safetensors"
    ours, theirs = load_file(part / name), load_file(whole / name)
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert theirs["feature_centre"].norm() > 0.1
    # The centre is a matter of training alone.
    assert "feature_centre" not in load_file(whole / "best" / "model.safetensors")


def test_the_centre_is_the_mean_over_domains_of_their_mean_feature(
    tiny_config: Callable[..., Path], open_trainer: Callable[..., Trainer]
) -> None:
    trainer = open_trainer(load_config(tiny_config(**CENTRED)))
    model = trainer.run.model
    next(iter(trainer.batches()))
    model.eval()
    means = []
    for domain in trainer.run.domains.values():
        total = torch.zeros(16)
        for row in range(len(domain.images)):
            encoder = trainer.assessment._encoder.backbone()
            chosen = domain.images.select([row])
            found = trainer.assessment._exact(chosen, encoder, domain.name)
            total += torch.from_numpy(found.embeddings["backbone"][0])
        means.append(total / len(domain.images))
    torch.testing.assert_close(model.get_buffer("feature_centre"), torch.stack(means).mean(0))


def test_a_run_that_starts_from_a_student_keeps_what_its_head_maps(
    make_values: Values, run_train: Run, open_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    old = run_train(make_values(tmp_path / "old", **CENTRED))
    config = load_config(None, ["--name", "new", "--output_dir", str(tmp_path)], (), old)
    trainer = open_trainer(config)
    before = {name: value.clone() for name, value in trainer.run.model.udon.student_head.state_dict().items()}
    next(iter(trainer.batches()))
    assert config.model.centre_features and trainer.run.model.get_buffer("feature_centre").norm() > 0.1
    for name, value in trainer.run.model.udon.student_head.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_head_without_bias_cannot_take_the_mean_up(tiny_config: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="`centre_features` must go with `head_bias`"):
        load_config(tiny_config(**CENTRED, model__head_bias=False))
