"""Atomic, locked, fsynced writes: the one way in which files and folders are replaced, whenever a process is killed."""

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from modeling_udon.faults import OneLineError

# What the C libraries of Linux and macOS call the exchange of two names in one step, and its arguments.
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
_SECONDS_BETWEEN_TRIES = 0.02


class InUseError(ValueError):
    """A folder that another process is writing to; its message is one line for the user."""


class DamagedFileError(OneLineError, ValueError):
    """A file that was cut off or overwritten; its message is one line for the user."""


@contextmanager
def locked(folder: Path, shared: bool = False, argument: str = "out", wait: float = 0) -> Iterator[None]:
    """Holds a lock on a folder, which the system takes back from a process that ends, however it ends.

    Args:
        folder: An existing folder. Where its file system has no such locks, none is held.
        shared: Whether others may hold the lock at the same time, for reading.
        argument: The user's argument that named the folder.
        wait: Seconds to wait for another process.

    Raises:
        InUseError: If another process holds it.
    """
    kind, last_try = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, time.monotonic() + wait
    while True:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            is_free = _lock(descriptor, kind)
            # A `replaced_folder` may have put another folder here since it was opened: the lock of the old one is
            # nobody's any more.
            if is_free and os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                yield
                return
        finally:
            os.close(descriptor)
        if is_free:
            continue
        if time.monotonic() >= last_try:
            raise InUseError(
                f"`{argument}` must be a folder that no other process is using. Got {str(folder)!r}, which another "
                "udon command uses; wait for it to end, or name another folder."
            )
        time.sleep(_SECONDS_BETWEEN_TRIES)


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Gives a draft beside `path` to write, which then takes its place in one step.

    The draft has a name of its own, so that two writers do not meet in it. It is synced before it is renamed, and
    removed if the block raises: a reader sees the old file or a new one, whole.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
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


def read_json(path: Path, shape: Any = dict) -> Any:
    """Reads a JSON file that this package wrote.

    Args:
        path: The file.
        shape: What it must hold, as `check_shape` takes it.

    Raises:
        DamagedFileError: If it is not whole, or holds something else.
        OSError: If it is not there or cannot be read.
    """
    with damage_of(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        check_shape(content, shape)
        return content


def check_shape(value: Any, shape: Any, name: str = "it") -> None:
    """Compares plain values, as JSON and YAML have them, with what is read from them afterwards.

    Args:
        value: The values.
        shape: A type or several (`int | None`); `[shape]` for a list of such; `{"key": shape}` for a mapping that has
            at least these keys; `{str: shape}` for one of any keys.
        name: What the values are called.

    Raises:
        TypeError: If they are of another shape.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else kind
        raise TypeError(f"{name} must be {wanted}, not {type(value).__name__}")
    for key, inner in shape.items() if isinstance(shape, dict) else ():
        if key is not str and key not in value:
            raise TypeError(f"{name} has no {key!r}")
        for each in value if key is str else (key,):
            check_shape(value[each], inner, f"{key!r}" if key is not str else f"{each!r}")
    for each in value if isinstance(shape, list) else ():
        check_shape(each, shape[0], f"what is in {name}")


@contextmanager
def damage_of(
    path: Path,
    *kinds: type[Exception],
    argument: str | None = None,
    way_out: str = "bring back a copy of it, or make it again",
) -> Iterator[None]:
    """Turns what reading a damaged file raises into one line with its name.

    Args:
        path: The file.
        kinds: What its reader raises besides ValueError, KeyError and TypeError.
        argument: The user's argument that led to it.
        way_out: What the user can do.

    Raises:
        DamagedFileError: If the block fails so.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except Exception as error:
        if not isinstance(error, (ValueError, KeyError, TypeError, *kinds)):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        rule = f"{str(path)!r} must be whole. Got a damaged file"
        if argument is not None:
            rule = f"`{argument}` must be whole. Got {str(path)!r}, which is damaged"
        raise DamagedFileError(f"{rule} ({reason}); {way_out}.") from error


@contextmanager
def replaced_folder(
    folder: Path, replace: bool = True, guard: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Path]:
    """Gives an empty folder to fill, which then takes the place of `folder` as a whole, or not at all.

    Each writer has a draft of its own: of several at once, the last one stays, whole. The two names are exchanged in
    one step where the system can do that, so that there is no moment without the folder.

    Args:
        folder: The folder; its parents are made.
        replace: Whether a folder that has come to be there in the meantime is replaced.
        guard: Gives what is held while the folder is put in its place, such as a lock against its other writers.

    Raises:
        InUseError: If `replace` is false and the folder is there at the end.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name beside which a draft could lie
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    draft, descriptor = _locked_draft(folder)
    try:
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync(path)
        with guard():
            if not (replace or is_new(folder)):
                raise InUseError(
                    f"`out` must be a new folder. Got {str(folder)!r}, which another process has just made."
                )
            _put_in_place(draft, folder)
    finally:
        # The draft, or after the exchange the old folder. On a full disk, half a checkpoint would take the room that
        # the next one needs.
        shutil.rmtree(draft, ignore_errors=True)
        os.close(descriptor)


def check_out(folder: Path, mark: str, whose: str, what: str, force: bool) -> None:
    """Refuses an output folder that must not be written.

    Args:
        folder: The folder.
        mark: File by which a folder is known that may be replaced.
        whose: Which folders those are, in words that follow "one".
        what: What is in such a folder.
        force: Whether it may be replaced.

    Raises:
        ValueError: If the folder exists and is none of those, or is one and `force` is not given.
    """
    if is_new(folder):
        return
    if not (folder / mark).is_file():
        raise ValueError(f"`out` must be a new folder, or one {whose}. Got {str(folder)!r}.")
    if not force:
        raise ValueError(f"`out` must be a new folder. Got {str(folder)!r}, {what}; give --force to replace it.")


def is_new(folder: Path) -> bool:
    """Whether nothing is there but perhaps an empty folder."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def recover_folder(folder: Path) -> None:
    """Finishes or undoes what a `replaced_folder` that was killed had begun; drafts in work are left alone."""
    folder = Path(os.path.abspath(folder))
    old = _old(folder)
    if old.exists() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    prefix = f".{folder.name}."
    names = os.listdir(folder.parent) if folder.parent.is_dir() else []
    for name in names:
        if name.startswith(prefix) and name.endswith(".new") and "." not in name[len(prefix) : -len(".new")]:
            _remove_if_left_behind(folder.with_name(name))


def standing_folder(folder: Path) -> Path:
    """The folder, or what a `replaced_folder` that was killed between two names has left of it."""
    old = _old(Path(os.path.abspath(folder)))
    return old if old.is_dir() and not folder.exists() else folder


def sync(path: Path) -> None:
    """Has a file or folder written to the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked_draft(folder: Path) -> tuple[Path, int]:
    """Makes an empty draft; the lock tells it from one that a killed process left behind."""
    while True:
        draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
        draft.mkdir()
        # Before the lock is held, another writer may take the draft for one left behind, and remove it.
        with suppress(FileNotFoundError):
            descriptor = os.open(draft, os.O_RDONLY)
            if _lock(descriptor, fcntl.LOCK_EX) and draft.exists():
                return draft, descriptor
            os.close(descriptor)


def _put_in_place(draft: Path, folder: Path) -> None:
    if not (folder.exists() and _exchange(draft, folder)):
        old = _old(folder)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step; returns whether the system can."""
    library = ctypes.CDLL(None, use_errno=True)
    one, other = os.fsencode(first), os.fsencode(second)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, _RENAME_EXCHANGE) == 0)
    if hasattr(library, "renamex_np"):
        return bool(library.renamex_np(one, other, _RENAME_SWAP) == 0)
    return False


def _remove_if_left_behind(draft: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(draft, os.O_RDONLY)
        try:
            if _lock(descriptor, fcntl.LOCK_EX):
                shutil.rmtree(draft, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, kind: int) -> bool:
    """Locks an opened folder without waiting; returns whether nobody else holds it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # This file system has no such locks.
    return True


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
