"""Checkpoints: atomic, fsynced writes; checked by hash when read; safetensors and JSON, no pickle."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_udon.faults import OneLineError
from modeling_udon.storage import recover_folder, replaced_folder
from modeling_udon.training.average import StudentAverage
from modeling_udon.training.logging import LossWindow
from modeling_udon.training.sharding import gather_shards, load_weights, shard_like

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
# The best weights so far, so that a checkpoint by itself gives the same end.
BEST_FILE = "best.safetensors"
MANIFEST_FILE = "manifest.json"

# The average of the student's weights, where a run keeps one.
AVERAGE_FILE = "average.safetensors"

_FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, BEST_FILE, AVERAGE_FILE)
_PREFIX = "step-"


class CheckpointError(OneLineError, ValueError):
    """A checkpoint that is not there or not whole; its message is one line for the user."""


@dataclass
class TrainState:
    """All that a run goes on from, besides its weights, config and data; without values, the start of a run.

    Attributes:
        step: Optimiser steps taken.
        sampler: State of the sampler at that step.
        best: Step and mean R@1 of the best validation so far, or `None`.
        validated: Step of the last validation, or `None`.
        window: Losses since the last log.
        heads: Step up to which the head of each domain is.
        gradient_norms: Running gradient norm of each domain, as `StepGuard` gives it.
        processes: Number of processes.
        broken: Broken images drawn from each domain.
        scaler: State of the gradient scaler, if there is one.
    """

    step: int = 0
    sampler: dict[str, Any] = field(default_factory=dict)
    best: dict[str, float] | None = None
    validated: int | None = None
    window: LossWindow = field(default_factory=LossWindow)
    heads: dict[str, int] = field(default_factory=dict)
    gradient_norms: dict[str, list[float]] = field(default_factory=dict)
    processes: int = 1
    broken: dict[str, int] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None


class CheckpointWriter:
    """Writes checkpoints beside the training: it goes on as soon as everything has been copied to the host.

    A checkpoint takes its place once it is whole, and then the oldest beyond `keep` go. Those of later steps go as
    well: they are damaged, or the run would have gone on from them.

    Args:
        checkpoints: Folder of the run's checkpoints.
        keep: How many stay.
        writes: Whether this is the process that writes; the others give their shards.
    """

    def __init__(self, checkpoints: Path, keep: int, writes: bool = True) -> None:
        self._checkpoints = checkpoints
        self._keep = keep
        self._writes = writes
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: TrainState,
        best_weights: Path | None = None,
        average: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Begins to write a checkpoint, after the one before; all processes have to call it.

        Args:
            model: The training model.
            optimizer: Its optimiser.
            state: What else there is to save.
            best_weights: File of the best weights so far, if there are any; the checkpoint shares them.
            average: Average of the student's weights, if there is one.

        Raises:
            OSError: If the one before could not be written.
        """
        self.wait()
        weights = gather_shards(model.state_dict(), self._writes)
        moments = gather_shards(_optimizer_tensors(model, optimizer), self._writes)
        if not self._writes:
            return
        folder = self._checkpoints / f"{_PREFIX}{state.step:08d}"
        tensors = {MODEL_FILE: _copied(weights), OPTIMIZER_FILE: _copied(moments)}
        if average:
            tensors[AVERAGE_FILE] = _copied(average)
        with ExitStack() as stack:
            draft = stack.enter_context(replaced_folder(folder))
            _write_json(draft / STATE_FILE, asdict(state))
            if best_weights is not None:
                # Now, since a better one may take its place before the thread would come to it.
                _link(best_weights, draft / BEST_FILE)
            self._thread = threading.Thread(target=self._write, args=(stack.pop_all(), draft, folder, tensors))
        self._thread.start()

    def wait(self) -> None:
        """Waits until what was begun is written.

        Raises:
            OSError: If it could not be.
        """
        self.join()
        self.check()

    def check(self) -> None:
        """Raises what has kept a checkpoint from being written, without waiting.

        Raises:
            OSError: If it could not be written.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def join(self) -> None:
        """Waits until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(
        self, draft_context: ExitStack, draft: Path, folder: Path, tensors: dict[str, dict[str, torch.Tensor]]
    ) -> None:
        try:
            with draft_context:
                for name, named in tensors.items():
                    save_file(_flatten(named), draft / name)
                files = sorted(draft.iterdir())
                _write_json(
                    draft / MANIFEST_FILE,
                    {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in files},
                )
            found = list_checkpoints(self._checkpoints)
            position = found.index(folder) + 1
            for old in (*found[: max(0, position - self._keep)], *found[position:]):
                shutil.rmtree(old)
        except BaseException as failure:
            self._failure = failure


def recover_checkpoints(checkpoints: Path) -> None:
    """Finishes what was begun when a run was killed while it wrote a checkpoint."""
    for leftover in sorted(checkpoints.glob(f".{_PREFIX}[0-9]*")):
        recover_folder(checkpoints / leftover.name.split(".")[1])


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """Returns the folders of all checkpoints, oldest first."""
    return sorted(checkpoints.glob(f"{_PREFIX}[0-9]*"))


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: StudentAverage | None = None
) -> TrainState:
    """Loads model, optimiser and the average of weights, if any, in place; all processes have to call it.

    Raises:
        CheckpointError: If a file is missing or is not what was written, or holds other weights than the model's.
    """
    check_checkpoint(folder)
    check_weights(folder, model)
    load_weights(model, load_file(folder / MODEL_FILE))
    _unflatten_optimizer(model, optimizer, load_file(folder / OPTIMIZER_FILE))
    if average is not None and average.tensors:
        if not (folder / AVERAGE_FILE).is_file():
            raise CheckpointError(
                f"{folder.name} must hold an average of the weights for `train.ema_decay`. Got none; go on without it, "
                "or start a new run."
            )
        average.load(load_file(folder / AVERAGE_FILE))
    return read_state(folder)


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
    manifest = _read_manifest(folder)
    for name, (size, digest) in manifest.items():
        try:
            same = (folder / name).stat().st_size == size and _hash(folder / name) == digest
        except FileNotFoundError:
            raise CheckpointError(f"{folder.name} is not whole: {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{folder.name} is damaged: {name} cannot be read: {error.strerror}") from None
        if not same:
            raise CheckpointError(f"{folder.name} is damaged: {name} is not what was written")


def read_state(folder: Path) -> TrainState:
    """Reads what a whole checkpoint says besides its tensors.

    Raises:
        CheckpointError: If another version has written it, with other values.
    """
    values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if values.keys() != TrainState.__dataclass_fields__.keys():
        raise CheckpointError(
            f"{folder.name} must be a checkpoint of this version of the package. Got one that another version wrote; "
            "go on with that version, or start a new run."
        )
    return TrainState(**values | {"window": LossWindow(**values["window"])})


def check_weights(folder: Path, model: nn.Module) -> None:
    """Compares names and shapes of a whole checkpoint's weights with the model's.

    Raises:
        CheckpointError: If they differ.
    """
    now = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(folder / MODEL_FILE, "pt") as file:
        before = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise CheckpointError(
                f"{folder.name} must have the weights of the config's model. Got {name} of shape {before.get(name)}, "
                f"where the model has {now.get(name)}; go on with the run's own config or start a new run."
            )


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """The size and hash of each file, or a `CheckpointError`."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        found = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{folder.name} is not whole: {MANIFEST_FILE} is missing") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{folder.name} is damaged: {MANIFEST_FILE} cannot be read") from None
    # A name that is no file's of ours was one before it was damaged.
    if not {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE} <= found.keys() <= {*_FILES}:
        raise CheckpointError(f"{folder.name} is damaged: {MANIFEST_FILE} does not name its files")
    return found


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


def _copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _link(source: Path, target: Path) -> None:
    """Gives a file a second name, which stays when the first one is replaced; copies where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
