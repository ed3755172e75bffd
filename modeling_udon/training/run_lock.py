"""One run in a folder at a time."""

import fcntl
import json
import os
import socket
from io import TextIOWrapper
from pathlib import Path

LOCK_FILE = ".lock"


class FolderInUseError(ValueError):
    """A folder that another run is writing to; its message is one line for the user."""


class RunLock:
    """A lock on a run's folder, which the system takes from a process that ends, however it ends.

    It is of the kind that forked processes do not inherit, so that a worker that outlives a killed run does not hold
    it, and that network file systems pass on between machines.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._file: TextIOWrapper | None = None

    def acquire(self) -> None:
        """Takes the lock, if it is not held already; its folder must exist.

        Raises:
            FolderInUseError: If another process holds it.
        """
        if self._file is not None:
            return
        file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file:
                file.seek(0)
                holder = file.read()
            raise FolderInUseError(
                f"`output_dir`/`name` must be a folder that no other run is using. Got {self._path.parent}, which "
                f"{_describe(holder)} writes to; wait for it to end, stop it, or choose another --name."
            ) from None
        self._file = file

    def sign(self) -> None:
        """Says in the lock's file who holds it."""
        assert self._file is not None, "signed before it was acquired"
        self._file.truncate(0)
        self._file.write(json.dumps({"process": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def release(self) -> None:
        """Gives the lock back, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _describe(holder: str) -> str:
    try:
        values = json.loads(holder)
        return f"process {values['process']} on {values['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
