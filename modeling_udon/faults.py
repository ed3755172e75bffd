"""Faults from outside (full disk, killed worker, no memory, missing package) as one line: what happened, what to do."""

import errno
import importlib
import os
import re
from dataclasses import dataclass
from typing import Any


class OneLineError(Exception):
    """An error whose message is one line for the user, also where a worker process put its traceback before it."""


@dataclass(frozen=True)
class WaysOut:
    """What the user can do about each kind of fault.

    Attributes:
        memory: Against an out-of-memory error.
        workers: Against a killed decoding process.
        disk: Against a full disk.
        folder: Where a folder cannot be written.
        path: Where a path cannot be one.
        compiler: Where the C++ compiler is missing.
        go_on: How to continue afterwards.
    """

    memory: str = "lower --batch-size or --num-workers"
    workers: str = "lower --num-workers or provide more memory"
    disk: str = "free some space"
    folder: str = "change its permissions or choose another folder"
    path: str = "name another one"
    compiler: str = "install one, such as g++"
    go_on: str = "then run the same command again."


_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PATH = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_BROKEN = (errno.EIO, errno.ENOLCK, errno.EMFILE, errno.ESTALE)

# Libraries say these things in words alone.
_FULL = re.compile(r"No space left on device|os error 28\b|Disk quota exceeded|database or disk is full")
_TOO_LARGE = re.compile(r"File too large|os error 27\b")
_NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|CUDA out of memory|std::bad_alloc")
_DEAD_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by|exited unexpectedly)")
_DEAD_POOL = re.compile(r"process in the process pool was terminated abruptly|process pool is not usable")
_DEAD_RANK = re.compile(
    r"gloo.*(?:Connection (?:closed|reset|refused)|Broken pipe|Timed out|Read error|Write error)", re.S
)
_NO_COMPILER = re.compile(r"No working C\+\+ compiler|Failed to find C compiler|InvalidCxxCompiler")
# What a worker's traceback ends with, before the message.
_ERROR_NAME = re.compile(r"^[\w.]+Error: ")


def explain(error: Exception, ways: WaysOut = WaysOut()) -> str | None:  # noqa: B008, frozen
    """Explains in one line why the work ended, or returns `None` for what it does not know.

    Args:
        error: What ended the work.
        ways: What the user can do about it here.
    """
    text = str(error)
    if isinstance(error, OneLineError):
        return _ERROR_NAME.sub("", text.strip().splitlines()[-1])
    if isinstance(error, MemoryError) or _is_a(error, "OutOfMemoryError") or _NO_MEMORY.search(text):
        return f"out of memory ({first_line(text) or 'MemoryError'}): {ways.memory}; {ways.go_on}"
    if _FULL.search(text):
        where = f" at {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"the disk is full{where}: {ways.disk}; {ways.go_on}"
    if _TOO_LARGE.search(text):
        way_out = "write to another file system, or raise the limit"
        return f"a file would be larger than its file system or `ulimit -f` allows: {way_out}; {ways.go_on}"
    if isinstance(error, OSError) and error.errno in _FORBIDDEN and error.filename:
        hidden = os.path.lexists(error.filename) and not os.access(error.filename, os.R_OK)
        return f"{error.filename} must be {'readable' if hidden else 'writable'} ({error.strerror}): {ways.folder}."
    if isinstance(error, OSError) and error.errno in _NO_PATH and error.filename:
        return f"{error.filename} must be a path that can be there ({error.strerror}): {ways.path}."
    if isinstance(error, OSError) and error.errno in _BROKEN:
        where = f" at {error.filename}" if error.filename else ""
        return f"the system failed{where} ({error.strerror}); {ways.go_on}"
    if found := _DEAD_WORKER.search(text):
        return (
            f"a process that decodes images (pid {found[1]}) was killed, often for lack of memory: {ways.workers}; "
            f"{ways.go_on}"
        )
    if _DEAD_POOL.search(text):
        return f"a process that decodes images was killed, often for lack of memory: {ways.workers}; {ways.go_on}"
    if _is_a(error, "DistError") or _DEAD_RANK.search(text):
        return f"another process of this run has ended or gone silent, and its own lines say why; {ways.go_on}"
    if _is_a(error, "InvalidCxxCompiler") or _NO_COMPILER.search(text):
        return f"compiling needs a C++ compiler, and none works here: {ways.compiler}; {ways.go_on}"
    return None


def require(module: str, extra: str, who_needs: str = "this needs") -> Any:
    """Imports a module that an extra brings.

    Args:
        module: Its name.
        extra: The extra of this package that brings it.
        who_needs: Beginning of the message.

    Raises:
        ImportError: If its package is missing; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise ImportError(f'{who_needs} {package}, which is missing: pip install "modeling-udon[{extra}]"') from error


def first_line(text: str) -> str:
    """The first line of a message, at most 200 characters."""
    return next(iter(text.strip().splitlines()), "")[:200]


def _is_a(error: Exception, name: str) -> bool:
    # By name, since this file must not load torch, whose classes these are.
    return name in {kind.__name__ for kind in type(error).__mro__}
