"""Checkpoints are written as a whole or not at all, and read only if they are what was written."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_udon.storage import recover_folder, replaced_folder
from modeling_udon.training.checkpoint import (
    CheckpointError,
    TrainState,
    check_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from modeling_udon.training.logging import LossWindow

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def make_training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def make_state(step: int) -> TrainState:
    return TrainState(
        step,
        {"weights": [1 / 3, 2 / 3]},
        {"step": 1, "R@1": 0.1 + 0.2},
        window=LossWindow({"a": 0.1}, {"a": {"b": 0.2}}),
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    model, optimizer = make_training(0)
    for step in (1, 2, 3):
        take_step(model, optimizer, step)
        save_checkpoint(tmp_path, model, optimizer, make_state(step), keep=3)
    return tmp_path


def test_a_loaded_training_takes_the_same_next_steps(tmp_path: Path) -> None:
    model, optimizer = make_training(0)
    take_step(model, optimizer, 1)
    folder = save_checkpoint(tmp_path, model, optimizer, make_state(7), keep=1)
    loaded, loaded_optimizer = make_training(1)
    assert load_checkpoint(folder, loaded, loaded_optimizer) == make_state(7)
    for number in (2, 3):
        take_step(model, optimizer, number)
        take_step(loaded, loaded_optimizer, number)
    for expected, parameter in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_an_optimiser_without_state_for_a_parameter_gets_none(tmp_path: Path) -> None:
    model, optimizer = make_training(0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    folder = save_checkpoint(tmp_path, model, optimizer, make_state(1), keep=1)
    loaded, loaded_optimizer = make_training(1)
    take_step(loaded, loaded_optimizer, 1)
    load_checkpoint(folder, loaded, loaded_optimizer)
    assert list(loaded_optimizer.state) == [loaded[0].weight]


def test_only_the_newest_are_kept(checkpoints: Path) -> None:
    model, optimizer = make_training(0)
    save_checkpoint(checkpoints, model, optimizer, make_state(4), keep=2)
    assert [folder.name for folder in list_checkpoints(checkpoints)] == ["step-00000003", "step-00000004"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_holds_tensors_and_json_alone(checkpoints: Path) -> None:
    for folder in list_checkpoints(checkpoints):
        assert tuple(sorted(path.name for path in folder.iterdir())) == FILES
        for name in ("manifest.json", "state.json"):
            json.loads((folder / name).read_text())
        for name in ("model.safetensors", "optimizer.safetensors"):
            header = (folder / name).read_bytes()
            json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "step-00000003 is damaged: {} is not what was written"),
        (cut_short, "step-00000003 is damaged: {} is not what was written"),
        (Path.unlink, "step-00000003 is not whole: {} is missing"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_found(
    checkpoints: Path, damage: object, words: str, name: str
) -> None:
    newest = checkpoints / "step-00000003"
    damage(newest / name)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(newest)
    assert str(caught.value) == words.format(name)
    with pytest.raises(CheckpointError):
        load_checkpoint(newest, *make_training(1))
    assert find_checkpoint(checkpoints) == (checkpoints / "step-00000002", [words.format(name)])


def test_a_manifest_that_is_missing_or_damaged_is_named(checkpoints: Path) -> None:
    (checkpoints / "step-00000003" / "manifest.json").unlink()
    (checkpoints / "step-00000002" / "manifest.json").write_text("{")
    folder, faults = find_checkpoint(checkpoints)
    assert folder.name == "step-00000001"
    assert faults == [
        "step-00000003 is not whole: manifest.json is missing",
        "step-00000002 is damaged: manifest.json cannot be read",
    ]


def test_no_whole_checkpoint_at_all_is_an_error_that_names_each(checkpoints: Path, tmp_path: Path) -> None:
    for folder in list_checkpoints(checkpoints):
        cut_short(folder / "state.json")
    with pytest.raises(CheckpointError, match="`--resume` must find a whole checkpoint in .* Got step-00000003 is dam"):
        find_checkpoint(checkpoints)
    with pytest.raises(CheckpointError, match="Got none."):
        find_checkpoint(tmp_path / "empty")


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "best"
    with replaced_folder(folder) as aside:
        (aside / "one").write_text("1")
        assert not folder.exists()
    with replaced_folder(folder) as aside:
        (aside / "two").write_text("2")
        assert read(folder) == {"one": "1"}
    assert read(folder) == {"two": "2"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_whose_replacement_fails_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "best"
    with replaced_folder(folder) as aside:
        (aside / "one").write_text("1")
    with pytest.raises(OSError, match="full"), replaced_folder(folder) as aside:
        (aside / "one").write_text("half")
        raise OSError("full")
    assert read(folder) == {"one": "1"}
    recover_folder(folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    folder, old, new = tmp_path / "best", tmp_path / ".best.old", tmp_path / ".best.1a2b3c4d.new"
    for leftover in (old, new):
        leftover.mkdir()
        (leftover / "file").write_text(leftover.name)
    recover_folder(folder)
    assert read(folder) == {"file": ".best.old"}
    assert list(tmp_path.iterdir()) == [folder]
