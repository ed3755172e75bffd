"""The last layers of a backbone learn from cached tokens as they do behind the frozen ones, and go out in one piece."""

import inspect
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from backbone_zoo import KINDS, UNKNOWN
from conftest import write_config
from safetensors.torch import load_file
from torch import nn

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.config import ConfigError, TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.data.dataset import EvaluationDataset
from modeling_udon.data.domains import open_domain
from modeling_udon.data.preprocessing import IMAGENET_STANDARD
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.evaluation.evaluate import evaluate
from modeling_udon.storage import locked
from modeling_udon.training import feature_file
from modeling_udon.training.backbone import probe_images
from modeling_udon.training.feature_embedder import FeatureEmbedder
from modeling_udon.training.feature_file import FeatureFile, lost_rows
from modeling_udon.training.inputs import TokenInputs

Values = Callable[..., dict[str, Any]]
Run = Callable[..., Path]

pytestmark = pytest.mark.usefixtures("small_blocks")
LAST = {"train__trained_layers": 2, "model__backbone_config__num_hidden_layers": 3}
SHORT = {"train__num_steps": 2, "eval__baselines": False}
STEADY = {"model__backbone_config__hidden_dropout_prob": 0.0, "log__every": 1}
# What else learns beside whole weights, and what is measured in their place.
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora": {"model__lora": {"r": 2, "lora_alpha": 4}},
    "all": {
        "model__gradient_checkpointing": True,
        "model__centre_features": True,
        "model__pooling": "cls+mean",
        "train__ema_decay": 0.7,
        "train__accumulation_steps": 2,
        "optim__layer_decay": 0.5,
        "loss__retention": 0.1,
        "frozen_teachers": [{"model": "average"}, {"model": "start"}],
    },
}


def last_weights(run: Path, file: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "step-00000011" / f"{file}.safetensors")


@pytest.fixture(scope="module")
def run(make_values: Values, run_train: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_train(make_values(tmp_path_factory.mktemp("run"), **LAST))


def is_frozen(name: str) -> bool:
    """Whether a weight of the tiny ViT of three layers, as a checkpoint names it, is before the last two."""
    parts = name.removeprefix("udon.backbone.")
    return name.startswith("udon.backbone.") and (parts.startswith("embeddings.") or ".0." in f".{parts}")


def test_the_last_layers_and_the_norm_move_and_nothing_before(run: Path) -> None:
    early, late = load_file(run / "checkpoints" / "step-00000003" / "model.safetensors"), last_weights(run)
    assert {name for name in early if torch.equal(early[name], late[name])} == set(filter(is_frozen, early))
    with_moments = load_file(run / "checkpoints" / "step-00000011" / "optimizer.safetensors")
    of_backbone = {name for name in with_moments if name.startswith("udon.backbone.")}
    assert of_backbone and not any(map(is_frozen, of_backbone))


@pytest.mark.parametrize("way", [pytest.param("whole", marks=pytest.mark.long), "lora", "all"])
def test_cached_tokens_train_as_the_frozen_layers_do_in_every_step(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    changes = LAST | STEADY | WAYS[way]
    cached = run_train(make_values(tmp_path / "cached", **changes))
    plain = EvalTransform(16)
    monkeypatch.setattr(
        "modeling_udon.training.training_data.training_transform", lambda data: lambda image, rng: plain(image)
    )

    def live(config: TrainConfig) -> Any:
        """Images come in, and the same weights learn."""
        return LiveInputs(2, config.data.image_size)

    monkeypatch.setattr("modeling_udon.training.setup.inputs_of", live)
    beside = run_train(make_values(tmp_path / "live", **changes))
    ours, theirs = last_weights(cached), last_weights(beside)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-5, rtol=1e-5, msg=name)
    results = [json.loads((run / "results.json").read_text())["splits"] for run in (cached, beside)]
    assert results[0] == results[1]


class LiveInputs:
    """Images, and the weights that `TokenInputs` freezes at rest."""

    def __init__(self, num_layers: int, image_size: int) -> None:
        self._tokens = TokenInputs(num_layers, image_size)
        self.freeze, self.adapted = self._tokens.freeze, self._tokens.adapted

    def __call__(self, udon: UdonModel, images: torch.Tensor, *others: Any) -> Any:
        return super(TokenInputs, self._tokens).__call__(udon, images, *others)


def test_steps_and_validations_run_the_last_layers_alone(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = make_values(tmp_path, **LAST, **SHORT, train__feature_cache=str(tmp_path / "shared"))
    run_train(values | {"name": "first"})
    seen: dict[str, set[int]] = {"0": set(), "2": set()}
    forward = nn.Module.__call__

    def watched(self: nn.Module, *inputs: Any, **options: Any) -> Any:
        number = names.get(id(self))
        if number in seen:
            seen[number].add(len(inputs[0]))
        return forward(self, *inputs, **options)

    names: dict[int, str] = {}
    freeze = TokenInputs.freeze

    def watched_freeze(self: TokenInputs, udon: UdonModel) -> None:
        freeze(self, udon)
        for name, module in udon.backbone.named_modules():
            *_, parent, number = ("", *name.split("."))
            if parent in ("layer", "layers"):
                names[id(module)] = number

    monkeypatch.setattr(TokenInputs, "freeze", watched_freeze)
    monkeypatch.setattr(nn.Module, "__call__", watched)
    run_train(values)
    assert seen["0"] == {1}, "the shape of the tokens is asked of one image"
    assert {16, 30} <= seen["2"]


def test_a_run_on_tokens_goes_on_bit_for_bit_and_finds_them(
    make_values: Values, run_train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = make_values(tmp_path, **LAST, **WAYS["all"], eval__baselines=False)
    whole, part = run_train(values | {"name": "whole"}), run_train(values)
    for old in sorted((part / "checkpoints").glob("step-*"))[2:]:
        shutil.rmtree(old)
    capsys.readouterr()
    run_train(values, resume=True)
    assert capsys.readouterr().out.count("rows of 5 x 16 in ") == 3
    for file in ("model", "average"):
        ours, theirs = last_weights(part, file), last_weights(whole, file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_processes_train_the_last_layers_as_one_does(
    make_values: Values, run_train: Run, run_two_processes: Run, tmp_path: Path
) -> None:
    changes = LAST | STEADY | {"train__ema_decay": 0.7, "optim__eps": 1e-4}
    one = run_train(make_values(tmp_path, **changes, name="one"))
    two = run_two_processes(make_values(tmp_path, **changes, name="two"))
    for file in ("model", "average"):
        ours, theirs = last_weights(two, file), last_weights(one, file)
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=2e-5, rtol=1e-4, msg=name)
    first, second = (sorted((run / "features").glob("*.npy")) for run in (one, two))
    assert [path.name for path in first] == [path.name for path in second]
    results = [json.loads((run / "results.json").read_text())["splits"] for run in (one, two)]
    assert results[0] == results[1]


_FRESH = """
import sys, numpy as np, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).image_embeds.numpy())
"""


def test_what_goes_out_is_the_whole_student_and_embeds_as_the_run_has_measured(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, embedded = FeatureEmbedder.__call__, {}

    def noting(self: FeatureEmbedder, images: Any, encoder: Any, name: str, split: str = "") -> Any:
        found = embed(self, images, encoder, name, split)
        embedded[name, split, encoder.kind] = found.embeddings
        return found

    monkeypatch.setattr(FeatureEmbedder, "__call__", noting)
    changes = {"model__lora": {"r": 2}, "train__ema_decay": 0.7, "train__mixed_precision": "bf16"}
    values = make_values(tmp_path, **LAST, **changes, **SHORT)
    run = run_train(values)
    results = json.loads((run / "results.json").read_text())["splits"]["test"]
    AcceleratorState._reset_state()
    measured = evaluate(run).results["splits"]["test"]
    for index in ("merged", "separate"):
        for name, scores in results[index]["domains"].items():
            assert scores == pytest.approx(measured[index]["domains"][name], abs=1e-6)
    images = open_domain("blobs", load_config(write_config(values)).domains["blobs"]).evaluation["test"].query.images
    dataset = EvaluationDataset(images, EvalTransform(16), "blobs")
    pixels = torch.stack([image for image, _ in dataset.__getitems__(list(range(len(dataset))))])
    np.save(tmp_path / "pixels.npy", IMAGENET_STANDARD.normalize(pixels).numpy())
    words = [str(run / "best"), str(tmp_path / "pixels.npy"), str(tmp_path / "embeds.npy")]
    subprocess.run([sys.executable, "-c", _FRESH, *words], check=True, cwd=tmp_path)
    ours = embedded["blobs", "test query", "student"]["student"]
    np.testing.assert_allclose(np.load(tmp_path / "embeds.npy"), ours, atol=1e-5)


def test_tokens_of_half_precision_take_half_the_room(
    run: Path, make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    half = run_train(make_values(tmp_path, **LAST, train__mixed_precision="bf16", **SHORT))
    for folder, dtype in ((half, np.float16), (run, np.float32)):
        (file,) = (folder / "features").glob("blobs-????????????????.npy")
        tokens = np.load(file)
        assert tokens.shape == (30, 5, 16) and tokens.dtype == dtype and np.isfinite(tokens).all()


def test_what_half_precision_cannot_hold_is_its_largest_number(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "x.npy", (2, 2, 2), np.float16)
    file.make()
    values = np.array([[[1e6, -1e6], [0, 1]], [[np.nan] * 2] * 2], np.float32)
    file.write(0, values)
    assert file.missing_blocks() == []
    found = file.read()
    assert found[0].tolist() == [[65504, -65504], [0, 1]] and np.isnan(found[1]).all()
    assert lost_rows(found).tolist() == [1]


def test_a_cache_is_not_begun_where_it_has_no_room(
    make_values: Values, run_train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9000))
    with pytest.raises(
        ConfigError, match=r"`train.feature_cache` must be on a disk with room for 0\.0 GB of "
    ) as refusal:
        run_train(make_values(tmp_path, **LAST, **SHORT))
    assert "name a folder on another disk" in str(refusal.value) and "\n" not in str(refusal.value)


def _killed_in_the_middle(values: dict[str, Any], run_train: Run) -> None:
    """Dies between the tokens of the third block and their checksum."""
    written: list[int] = []
    sums = feature_file._sum

    def dying(kept: np.ndarray) -> int:
        if len(kept) and inspect.currentframe().f_back.f_code.co_name == "write":  # type: ignore[union-attr]
            written.append(len(kept))
            if len(written) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        return sums(kept)

    feature_file._sum = dying
    run_train(values)


def test_a_run_that_is_killed_while_it_writes_tokens_goes_on(
    make_values: Values, run_train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = make_values(tmp_path, **LAST, **SHORT, train__feature_cache=str(tmp_path / "shared"))
    process = multiprocessing.get_context("fork").Process(target=_killed_in_the_middle, args=(values, run_train))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    capsys.readouterr()
    again = run_train(values, overwrite=True)
    undisturbed = run_train(make_values(tmp_path / "other", **LAST, **SHORT))
    ours, theirs = (load_file(run / "best" / "model.safetensors") for run in (again, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not _differing(tmp_path / "shared", undisturbed / "features")


def test_two_programs_fill_one_cache_at_once(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    shared = {**LAST, **SHORT, "train__feature_cache": str(tmp_path / "shared")}
    context = multiprocessing.get_context("fork")
    both = [
        context.Process(target=run_train, args=(make_values(tmp_path / name, **shared),)) for name in ("one", "two")
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    ours, theirs = (load_file(tmp_path / name / "run" / "best" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_making_a_file_never_empties_what_another_program_has_made(tmp_path: Path) -> None:
    first, second = (FeatureFile(tmp_path / "x.npy", (30, 4)) for _ in range(2))
    with locked(tmp_path):
        late = threading.Thread(target=second.make)
        late.start()
        time.sleep(0.1)
        assert late.is_alive() and not second.path.exists(), "it waits for who makes the file"
    late.join()
    first.make()
    first.write(0, np.ones((12, 4), np.float32))
    second.make()
    assert second.missing_blocks() == [1, 2]


def _differing(one: Path, other: Path) -> list[str]:
    names = sorted(path.name for path in one.glob("*.npy"))
    assert names == sorted(path.name for path in other.glob("*.npy"))
    return [name for name in names if (one / name).read_bytes() != (other / name).read_bytes()]


def make_udon(kind: str) -> UdonModel:
    torch.manual_seed(0)
    return UdonModel(UdonConfig({"model_type": kind, **KINDS[kind].values}, embedding_dim=4))


STACKS = {
    *("aimv2_vision_model", "altclip_vision_model", "beit", "blip_vision_model", "chinese_clip_vision_model"),
    *("clip_vision_model", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa"),
    *("metaclip_2_vision_model", "mlcd_vision_model", "siglip_vision_model", "vit", "vit_msn"),
}


@pytest.mark.parametrize("kind", sorted((STACKS | {"convnext", "efficientnet", "levit", "swin"}) - UNKNOWN))
def test_stacks_of_layers_are_cut_and_others_refused_in_one_line(kind: str) -> None:
    udon, inputs = make_udon(kind), TokenInputs(1, KINDS[kind].image_size)
    if kind not in STACKS:
        with pytest.raises(ConfigError) as refusal:
            inputs.freeze(udon)
        assert str(refusal.value).startswith("`train.trained_layers` must ") and "\n" not in str(refusal.value)
        return
    inputs.freeze(udon)
    udon.train()
    images = probe_images(3, KINDS[kind].image_size, torch.device("cpu"))
    tokens = inputs.made_of(udon, images)
    assert not tokens.requires_grad
    inputs(udon, tokens).student.sum().backward()
    moved = {name for name, weight in udon.backbone.named_parameters() if weight.grad is not None}
    frozen = {name for name, weight in udon.backbone.named_parameters() if not weight.requires_grad}
    assert moved and frozen and not moved & frozen
    udon.eval()
    with torch.no_grad():
        expected = udon(images).image_embeds
        torch.testing.assert_close(inputs(udon, tokens).student, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train__heads_only": True}, "`trained_layers` must go without `heads_only`"),
        ({"train__shard_backbone": True}, "`trained_layers` must go without `shard_backbone`"),
        ({"train__compile": True}, "`trained_layers` must go without `compile`"),
        ({"system": "separate_teachers", "teachers": "runs/x"}, "`train.trained_layers` must go without `teachers`"),
        ({"frozen_teachers": [{"sees": "crop"}]}, "must be 'image' with `train.trained_layers`, which sees no crops"),
        ({"data__teacher_image_size": 24}, "`data.teacher_image_size` must go without `train.trained_layers`"),
        ({"train__trained_layers": 0}, "`train.trained_layers`"),
    ],
)
def test_what_needs_images_or_the_whole_backbone_is_refused(tiny_config: Any, changes: Any, line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(tiny_config(**LAST | changes))
    assert line in str(refusal.value) and "\n" not in str(refusal.value)


def test_more_layers_than_there_are_are_refused(make_values: Values, run_train: Run, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="`train.trained_layers` must be from 1 to the backbone's number of layers. Got 4"
    ):
        run_train(make_values(tmp_path, **LAST | {"train__trained_layers": 4}))


def test_a_weight_that_learns_and_makes_tokens_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    udon = make_udon("vit")
    monkeypatch.setattr(TokenInputs, "frozen_names", lambda self, backbone: [])
    with pytest.raises(ConfigError, match="of one list of layers, each fed by the one before it alone. Got 'vit'"):
        TokenInputs(1, KINDS["vit"].image_size).freeze(udon)


def test_last_layers_go_on_from_a_run_and_are_held_to_its_student(
    make_values: Values, run_train: Run, tmp_path: Path
) -> None:
    run = run_train(make_values(tmp_path, **LAST, **SHORT, **STEADY))
    values = make_values(tmp_path, **LAST, **SHORT, **STEADY, name="next", init={"run": str(run), "retain": 1.0})
    values["optim"]["frozen_fraction"] = 0
    again = run_train(values)
    (first, *_) = (json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines() if "loss" in line)
    assert first["losses"]["retention"] == pytest.approx(0, abs=1e-6), "the old student sees the same tokens"
    ours, theirs = (load_file(folder / "checkpoints" / "best" / "model.safetensors") for folder in (again, run))
    assert {name for name in ours if "backbone" in name and torch.equal(ours[name], theirs[name])} == {
        name for name in ours if is_frozen(name)
    }
