"""Checkpoints: written aside, synced, renamed; checked by hash when read; safetensors and JSON, no pickle."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_udon.training.sharding import gather_shards, load_weights, shard_like

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"

_PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint that is not there or not whole; its message is one line for the user."""


@dataclass
class TrainState:
    """All that a run goes on from, besides its config and data.

    Attributes:
        step: Optimiser steps taken.
        sampler: State of the sampler at that step.
        best: Step and mean R@1 of the best validation so far, or `None`.
        extra: Further JSON values, such as the gradient scaler's.
    """

    step: int
    sampler: dict[str, Any]
    best: dict[str, float] | None
    extra: dict[str, Any]


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill that takes the place of `folder` as a whole, or not at all."""
    aside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    aside.mkdir()
    yield aside
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finishes what a `replaced_folder` that was killed had begun."""
    aside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def save_checkpoint(
    checkpoints: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    keep: int,
    write: bool = True,
) -> Path:
    """Writes a checkpoint and, once it stands, removes the oldest beyond `keep`; all processes have to call it.

    Args:
        checkpoints: Folder of the run's checkpoints.
        model: The training model.
        optimizer: Its optimiser.
        state: What else there is to save.
        keep: How many checkpoints stay.
        write: Whether this is the process that writes; the others give their shards.

    Returns:
        The checkpoint's folder.
    """
    folder = checkpoints / f"{_PREFIX}{state.step:08d}"
    weights = gather_shards(model.state_dict(), write)
    moments = gather_shards(_optimizer_tensors(model, optimizer), write)
    if not write:
        return folder
    with replaced_folder(folder) as aside:
        save_file(weights, aside / MODEL_FILE)
        save_file(_flatten(moments), aside / OPTIMIZER_FILE)
        _write_json(aside / STATE_FILE, vars(state))
        files = sorted(aside.iterdir())
        _write_json(
            aside / MANIFEST_FILE, {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in files}
        )
    for old in list_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(old)
    return folder


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Returns the folders of all checkpoints, oldest first."""
    return sorted(checkpoints.glob(f"{_PREFIX}[0-9]*"))


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Loads model and optimiser in place; all processes have to call it.

    Raises:
        CheckpointError: If a file is missing or is not what was written.
    """
    check_checkpoint(folder)
    load_weights(model, load_file(folder / MODEL_FILE))
    _unflatten_optimizer(model, optimizer, load_file(folder / OPTIMIZER_FILE))
    return TrainState(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))


def find_checkpoint(checkpoints: Path) -> tuple[Path, list[str]]:
    """Finds the newest whole checkpoint.

    Returns:
        Its folder, and what is wrong with each newer one.

    Raises:
        CheckpointError: If there is none.
    """
    faults = []
    for folder in reversed(list_checkpoints(checkpoints)):
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return folder, faults
    found = "; ".join(faults) or "none"
    raise CheckpointError(f"`--resume` must find a whole checkpoint in {checkpoints}. Got {found}.")


def check_checkpoint(folder: Path) -> None:
    """Compares the files of a checkpoint with its manifest.

    Raises:
        CheckpointError: If a file is missing or is not what was written.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if (folder / name).stat().st_size != expected["bytes"] or _hash(folder / name) != expected["sha256"]:
                raise CheckpointError(f"{folder.name} is damaged: {name} is not what was written")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder.name} is not whole: {Path(error.filename).name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(f"{folder.name} is damaged: {MANIFEST_FILE} cannot be read") from None


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}:{key}": value.detach()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _flatten(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.reshape(value.shape or (1,)).contiguous() for name, value in tensors.items()}


def _unflatten_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, flat: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for full_name, value in flat.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters[name]
        value = value.to(parameter.device)
        optimizer.state[parameter][key] = value.reshape(()) if key == "step" else shard_like(value, parameter)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
