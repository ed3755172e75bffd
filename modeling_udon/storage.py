"""Atomic, locked, fsynced writes: the one way in which files and folders are replaced, whenever a process is killed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Gives a draft beside `path` to write, which then takes its place in one step.

    The draft is synced before it is renamed, and removed if the block raises: a reader sees the old file or the new
    one, whole.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        sync(draft)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replaces a UTF-8 text file in one step."""
    with replaced_file(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Replaces a JSON file in one step.

    Raises:
        ValueError: If the content holds NaN or infinity, which are no JSON; the old file stays.
    """
    write_text(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill, which then takes the place of `folder` as a whole, or not at all."""
    aside, old = _leftovers(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    aside.mkdir()
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            sync(path)
    except BaseException:
        # On a full disk, half a checkpoint would take the room that the next one needs.
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Finishes or undoes what a `replaced_folder` that was killed had begun."""
    aside, old = _leftovers(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Has a file or folder written to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftovers(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
