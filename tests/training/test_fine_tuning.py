"""Adapters, learning rates by depth and the average of weights: resumed, in two processes, and published."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from backbone_zoo import KINDS, kinds
from safetensors.torch import load_file
from torch import nn

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.config_sections import LoraConfig, OptimConfig
from modeling_udon.data.domains import open_domain
from modeling_udon.evaluation.embedder import ImageEmbedder
from modeling_udon.evaluation.neighbours import search_model
from modeling_udon.run_models import open_run
from modeling_udon.run_record import read_run
from modeling_udon.training.average import StudentAverage
from modeling_udon.training.distillation import UdonForDistillation
from modeling_udon.training.lora import add_adapters, merged
from modeling_udon.training.optimization import block_depths, learning_rates, make_optimizer, set_learning_rates

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

LORA = {"r": 2, "lora_alpha": 4}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"model__lora": {**LORA, "lora_dropout": 0.1}},
    "layer decay": {"optim__layer_decay": 0.5},
    "average": {"train__ema_decay": 0.7},
}
TOGETHER = {"model__lora": LORA, "optim__layer_decay": 0.5, "train__ema_decay": 0.7}
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "optim__eps": 1e-4, "log__every": 1}


def last_weights(run: Path, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / f"{file}.safetensors")


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    make_values: Values, run_train: Run, tmp_path: Path, way: str
) -> None:
    whole, part = (run_train(make_values(tmp_path, **WAYS[way], name=name)) for name in ("whole", "part"))
    for folder in sorted((part / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(folder)
    for leftover in ("results.json", "best"):
        path = part / leftover
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run_train(make_values(tmp_path, **WAYS[way], name="part"), resume=True)
    for file in ("model", "average") if way == "average" else ("model",):
        ours, theirs = last_weights(again, file), last_weights(whole, file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (load_file(run / "best" / "model.safetensors") for run in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_fine_tune_as_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    changes = TOGETHER | STEADY
    one = run_train(make_values(tmp_path, **changes, name="one"))
    two = run_two_processes(make_values(tmp_path, **changes, name="two"))
    for file in ("model", "average"):
        ours, theirs = last_weights(two, file), last_weights(one, file)
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=1e-4, msg=name)


def test_what_is_published_is_merged_and_averaged(
    make_values: Values, run_train: Run, open_trainer: Any, tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, **TOGETHER | STEADY))
    best = load_file(run / "checkpoints" / "best" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in best)
    results = json.loads((run / "results.json").read_text())
    opened = open_run(read_run(run))
    assert opened.network.teacher_heads.keys() == {"stripes", "blobs", "noise"}
    student = UdonModel.from_pretrained(run / "best").eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(student(pixels).image_embeds, opened.network(pixels).image_embeds)
    assert results["splits"]["test"]["merged"]["mean"]["R@1"] > 0
    again = run_train(make_values(tmp_path, **STEADY, name="next", init={"run": str(run)}, train__num_steps=2))
    assert (again / "best" / "config.json").is_file()


def test_merged_weights_embed_as_the_adapters_do(tmp_path: Path) -> None:
    for kind in ("vit", "clip_vision_model", "swin", "segformer"):
        torch.manual_seed(0)
        values = {"model_type": kind, **KINDS[kind].values}
        values = {key: value for key, value in values.items() if kind != "segformer" or key != "image_size"}
        udon = UdonModel(UdonConfig(values, embedding_dim=4)).eval()
        plain = set(udon.state_dict())
        size = KINDS[kind].image_size
        pixels = torch.randn(2, 3, size, size)
        with torch.no_grad():
            before = udon(pixels).image_embeds
            add_adapters(udon.backbone, LoraConfig(r=2))
            assert torch.equal(udon(pixels).image_embeds, before)
            for name, parameter in udon.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
            adapted = udon(pixels).image_embeds
            sum_of_both = merged(udon)
            assert (adapted - before).abs().max() > 1e-4
            assert (sum_of_both(pixels).image_embeds - adapted).abs().max() < 1e-6
        assert set(sum_of_both.state_dict()) == plain
        trained = {name for name, parameter in udon.backbone.named_parameters() if parameter.requires_grad}
        assert trained and all("lora_" in name for name in trained)


def test_layers_that_cannot_be_adapted_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    udon = UdonModel(UdonConfig({"model_type": "vit", **kinds.VIT}, embedding_dim=4))
    with pytest.raises(ConfigError, match=r"`model.lora.target_modules` must name layers .* Got \['nowhere'\]"):
        add_adapters(udon.backbone, LoraConfig(target_modules=("nowhere",)))
    convolutions = UdonModel(UdonConfig({"model_type": "resnet", **KINDS["resnet"].values}, embedding_dim=4))
    with pytest.raises(ConfigError, match="where it has no query and value projections. Got none"):
        add_adapters(convolutions.backbone, LoraConfig())
    find = importlib.import_module

    def without_peft(name: str, package: str | None = None) -> Any:
        if name == "peft":
            raise ImportError(name)
        return find(name, package)

    monkeypatch.setattr(importlib, "import_module", without_peft)
    with pytest.raises(ConfigError, match=r'pip install "modeling-udon\[lora\]"'):
        add_adapters(udon.backbone, LoraConfig())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train__heads_only": True, "model__lora": LORA}, "`train.heads_only` must go without `model.lora`"),
        ({"train__shard_backbone": True, "model__lora": LORA}, "`train.shard_backbone` must go without"),
        ({"train__shard_backbone": True, "train__ema_decay": 0.9}, "`train.shard_backbone` must go without"),
        ({"model__lora": {"rank": 2}}, "`model.lora.rank` is not a key"),
        ({"train__ema_decay": 1.0}, "`train.ema_decay`"),
        ({"optim__layer_decay": 1.5}, "`optim.layer_decay`"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tiny_config: Any, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(tiny_config(**changes))
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def make_model(kind: str) -> UdonForDistillation:
    values = {"model_type": kind, **KINDS[kind].values}
    return UdonForDistillation(UdonConfig(values, embedding_dim=4, teacher_dim=4, domains={"a": 3}))


def test_each_block_learns_slower_than_the_next() -> None:
    model = make_model("vit")
    optim = OptimConfig(lr=1.0, backbone_lr=0.8, frozen_fraction=0, layer_decay=0.5)
    optimizer = make_optimizer(model, optim)
    set_learning_rates(optimizer, learning_rates(optim, 0, 10))
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    for name, parameter in model.named_parameters():
        expected = 1.0
        if name.startswith("udon.backbone."):
            depth = 3 if "embeddings" not in name else 0
            for number in range(2):
                if f"layers.{number}." in name or f"layer.{number}." in name:
                    depth = 1 + number
            expected = 0.8 * 0.5 ** (3 - depth)
        assert rates[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize(
    ("kind", "blocks"), [("swin", 2), ("convnext", 4), ("pvt_v2", 4), ("clip_vision_model", 2), ("dinov3_vit", 2)]
)
def test_blocks_of_stages_are_counted_through_all_stages(kind: str, blocks: int) -> None:
    names = [name for name, _ in make_model(kind).udon.backbone.named_parameters()]
    depths = block_depths(names)
    assert list(depths) == names
    of_blocks = ("blocks.", "layers.", ".layer.")
    own = {name: depth for name, depth in depths.items() if any(part in f".{name}" for part in of_blocks)}
    assert max(depths.values()) >= blocks + 1 and len(set(own.values())) >= blocks
    inner = any("blocks." in name for name in own)
    ordered = [depth for name, depth in own.items() if ("blocks." in name if inner else "downsampl" not in name)]
    assert ordered == sorted(ordered)


def test_the_average_is_that_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    model = make_model("resnet").train()
    average = StudentAverage(model, 0.6)
    student = {name for name in model.state_dict() if name.startswith(("udon.backbone.", "udon.student_head."))}
    assert average.tensors.keys() == {name for name in student if not name.endswith("num_batches_tracked")}
    expected = {name: model.state_dict()[name].clone() for name in average.tensors}
    for step in range(4):
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn_like(value))
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in expected.items():
            value.copy_(decay * value + (1 - decay) * model.state_dict()[name])
        average.update(step)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), average.shown():
        for name, value in expected.items():
            torch.testing.assert_close(model.state_dict()[name], value)
        assert torch.equal(model.state_dict()["student_prototypes.a"], trained["student_prototypes.a"])
        raise KeyError
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_without_the_average_is_refused(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    run_train(make_values(tmp_path, train__num_steps=3))
    values = make_values(tmp_path, train__num_steps=4, train__ema_decay=0.9)
    with pytest.raises(ValueError, match="must hold an average of the weights for `train.ema_decay`. Got none"):
        run_train(values, resume=True, allow=["ema_decay", "num_steps"])


def test_batch_norm_is_the_same_on_every_process_where_it_is_measured(
    make_values: Values, run_two_processes: Run, tmp_path: Path
) -> None:
    values = make_values(tmp_path, train__num_steps=3, train__mixed_precision="no")
    values["model"]["backbone_config"] = {"model_type": "resnet", **KINDS["resnet"].values, "embedding_size": 8}
    run = run_two_processes(values)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [row["validation"]["merged"]["mean"]["R@1"] for row in rows if "validation" in row][-1]
    opened = open_run(read_run(run))
    record = read_run(run)
    domains = {name: open_domain(name, spec, record.seed) for name, spec in record.domains.items()}
    assert isinstance(opened.network, nn.Module)
    found = search_model(opened, domains, "validation", ImageEmbedder(32, 0, Accelerator(cpu=True)))
    assert found.scores().merged["mean"]["R@1"] == pytest.approx(validated)
    assert TrainConfig.model_validate(record.config).train.num_steps == 3
