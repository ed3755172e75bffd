"""Files and folders that are there as a whole or not at all, whenever the process or the machine stops."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Writes a text file aside, syncs it and puts it in the place of the old one."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        sync(draft)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    draft.replace(path)
    sync(path.parent)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill that takes the place of `folder` as a whole, or not at all."""
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
    """Finishes what a `replaced_folder` that was killed had begun."""
    aside, old = _leftovers(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)


def sync(path: Path) -> None:
    """Has a file or folder written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftovers(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
