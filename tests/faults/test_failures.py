"""What fails from outside ends in one line; the last good state stays, and a run that goes on loses nothing."""

import errno
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hurt import Patch, at, die, raising
from safetensors import SafetensorError

from modeling_udon import storage as files
from modeling_udon.cli import train as publishing
from modeling_udon.training import checkpoint
from modeling_udon.training import validation as assessment
from modeling_udon.training.errors import explain
from modeling_udon.training.logging import Reporter
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]

FULL = OSError(errno.ENOSPC, "No space left on device", "/somewhere")
FULL_BY_WORDS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def allocate() -> None:
    torch.empty(1 << 46, dtype=torch.uint8)


def kill_a_worker() -> None:
    multiprocessing.active_children()[0].kill()


# Checkpoints come after steps 3, 6, 9 and 11.
FAILURES: dict[str, tuple[Patch, str]] = {
    "full disk at the start": (at(files, "sync", 1, raising(FULL)), "the disk is full at /somewhere: free some"),
    "full disk in a checkpoint": (at(checkpoint, "save_file", 2, raising(FULL_BY_WORDS)), "the disk is full: free"),
    "no memory in a step": (at(Trainer, "train_step", 5, allocate), "out of memory ("),
    "a worker is killed": (at(Trainer, "train_step", 2, kill_a_worker), "a process that decodes images (pid "),
    "no memory in a validation": (
        at(assessment.Assessment, "validate", 2, raising(MemoryError())),
        "out of memory (Mem",
    ),
    "full disk in a manifest": (at(checkpoint, "_write_json", 2, raising(FULL)), "the disk is full at /somewhere"),
    "full disk in a log": (at(Reporter, "record", 3, raising(FULL)), "the disk is full at /somewhere"),
    "full disk in the best": (at(assessment, "write_student", 1, raising(FULL)), "the disk is full at /somewhere"),
    "full disk in the report": (at(publishing, "write_report", 1, raising(FULL)), "the disk is full at /somewhere"),
}


def test_a_run_that_fails_from_outside_says_so_and_goes_on_as_if_nothing_had_been(
    whole: Any, make_values: Values, write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    config = write(make_values(tmp_path, **whole.changes))
    for failure, (patch, words) in FAILURES.items():
        failed = start(config, "--resume", before=patch)
        assert failed.wait() == [1], (failure, failed.said())
        errors = [line for line in failed.said().splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and words in errors[0], (failure, failed.said())
        assert "Traceback" not in failed.said()
        assert not list((tmp_path / "run").rglob("*.new")), failure
    assert start(config, "--resume").wait() == [0]
    whole.compare(tmp_path / "run")
    tell(", ".join(FAILURES), len(FAILURES), 0)


def test_a_process_whose_partner_dies_ends_within_a_minute_and_the_pair_goes_on(
    whole_pair: Any, make_values: Values, write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    config = write(make_values(tmp_path, **whole_pair.changes))
    moments = [("in a step", Trainer, "train_step", 5), ("in a validation", assessment.Assessment, "validate", 1)]
    for (moment, owner, name, call), rank in zip(moments, (1, 0), strict=True):
        pair = start(config, "--resume", num_processes=2, before=at(owner, name, call, die, ranks=(rank,)))
        pair.processes[rank].join()
        died = time.monotonic()
        codes = pair.wait()
        assert codes[rank] == 128 + signal.SIGKILL and codes[1 - rank] == 1, (moment, pair.said())
        assert time.monotonic() - died < 60
        assert "error: another process of this run has ended or gone silent" in pair.said(), (moment, pair.said())
    assert start(config, "--resume", num_processes=2).wait() == [0, 0]
    whole_pair.compare(tmp_path / "run")
    tell("one of two processes is killed: " + ", ".join(moment for moment, *_ in moments), len(moments), 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full_takes_nothing_from_the_run(
    whole: Any, make_values: Values, write: Any, start: Any, small_disk: Path, tmp_path: Path, tell: Any
) -> None:
    values = make_values(tmp_path, **whole.changes) | {"output_dir": str(small_disk)}
    config = tmp_path / "config.yaml"
    config.write_text(write(values).read_text())
    failed = start(config)
    assert failed.wait() == [1]
    assert "error: the disk is full" in failed.said() and "Traceback" not in failed.said(), failed.said()
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    assert start(config, "--resume").wait() == [0]
    whole.compare(small_disk / "run")
    tell("a disk of 400 kB, mounted for it, is full", 1, 0)


def test_a_folder_that_cannot_be_written_is_one_line(
    make_values: Values, write: Any, start: Any, small_disk: Path, tmp_path: Path
) -> None:
    config = write(make_values(tmp_path))
    config.write_text(config.read_text().replace(f"output_dir: {tmp_path}", f"output_dir: {small_disk}/runs"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    failed = start(config)
    assert failed.wait() == [1]
    assert failed.said().splitlines()[-1].startswith(f"error: {small_disk}/runs must be writable (Read-only file")
    assert "Traceback" not in failed.said()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "(CUDA out of memory. Tried"),
        (torch.OutOfMemoryError("CUDA out of memory."), "lower train.batch_size or eval.batch_size, raise train.acc"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x"), "the disk is full at /x: free some room, or lower"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x must be writable (Permission denied)"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "/x must be a path that can be there (File name"),
        (OSError(errno.EFBIG, "File too large", "/x"), "a file would be larger than its file system or `ulimit -f`"),
        (OSError(errno.EIO, "Input/output error", "/x"), "the system failed at /x (Input/output error)"),
        (torch.distributed.DistBackendError("NCCL watchdog"), "another process of this run has ended"),
    ],
)
def test_what_cannot_be_made_to_happen_here_is_told_by_its_message(error: Exception, words: str) -> None:
    assert words in (explain(error) or "")
    assert "\n" not in (explain(error) or "")


def test_our_own_faults_keep_their_traceback() -> None:
    assert explain(KeyError("x")) is None
    assert explain(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/x")) is None
