"""Checkpoints are written as a whole or not at all, and read only if they are what was written."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from modeling_udon.storage import recover_folder, replaced_folder
from modeling_udon.training import checkpoint
from modeling_udon.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    TrainState,
    check_checkpoint,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
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


def save(checkpoints: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState, keep: int) -> Path:
    writer = CheckpointWriter(checkpoints, keep)
    writer.save(model, optimizer, state)
    writer.wait()
    return checkpoints / f"step-{state.step:08d}"


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    model, optimizer = make_training(0)
    for step in (1, 2, 3):
        take_step(model, optimizer, step)
        save(tmp_path, model, optimizer, make_state(step), keep=3)
    return tmp_path


def test_a_loaded_training_takes_the_same_next_steps(tmp_path: Path) -> None:
    model, optimizer = make_training(0)
    take_step(model, optimizer, 1)
    folder = save(tmp_path, model, optimizer, make_state(7), keep=1)
    loaded, loaded_optimizer = make_training(1)
    assert load_checkpoint(folder, loaded, loaded_optimizer) == make_state(7)
    for number in (2, 3):
        take_step(model, optimizer, number)
        take_step(loaded, loaded_optimizer, number)
    for expected, parameter in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_the_training_may_go_on_while_its_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    save_file = checkpoint.save_file

    def slowly(tensors: Any, path: Path) -> None:
        begun.set()
        assert go_on.wait(60)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    model, optimizer = make_training(0)
    take_step(model, optimizer, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, best = make_state(1), tmp_path / "best.safetensors"
    best.write_bytes(b"the best")
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(model, optimizer, state, best)
    assert begun.wait(60) and not list_checkpoints(tmp_path), "it is not whole yet"
    take_step(model, optimizer, 2)
    state.window.add("a", 1.0, {"b": 1.0})
    best.unlink()
    best.write_bytes(b"a better one")
    go_on.set()
    writer.wait()
    (folder,) = list_checkpoints(tmp_path)
    loaded, loaded_optimizer = make_training(1)
    assert load_checkpoint(folder, loaded, loaded_optimizer) == make_state(1)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert (folder / "best.safetensors").read_bytes() == b"the best"


def test_what_keeps_a_checkpoint_from_being_written_is_raised_at_the_next_step(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*values: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    writer = CheckpointWriter(checkpoints, keep=1)
    writer.save(*make_training(0), make_state(9))
    writer.join()
    with pytest.raises(OSError, match="No space"):
        writer.check()
    writer.check()
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"step-0000000{step}" for step in (1, 2, 3)]


def test_an_optimiser_without_state_for_a_parameter_gets_none(tmp_path: Path) -> None:
    model, optimizer = make_training(0)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.step()
    folder = save(tmp_path, model, optimizer, make_state(1), keep=1)
    loaded, loaded_optimizer = make_training(1)
    take_step(loaded, loaded_optimizer, 1)
    load_checkpoint(folder, loaded, loaded_optimizer)
    assert list(loaded_optimizer.state) == [loaded[0].weight]


def test_only_the_newest_are_kept(checkpoints: Path) -> None:
    model, optimizer = make_training(0)
    save(checkpoints, model, optimizer, make_state(4), keep=2)
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
