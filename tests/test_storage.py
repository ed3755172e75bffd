"""Folders and files are replaced whole, by several processes at once and whenever one is killed."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modeling_udon import storage
from modeling_udon.storage import InUseError, locked, recover_folder, replaced_file, replaced_folder


def in_a_fork(work: Callable[[], None]) -> int:
    """Starts the work in a fork of this process."""
    process = os.fork()
    if process == 0:
        try:
            work()
        finally:
            os._exit(0)
    return process


def fill(folder: Path, value: str) -> None:
    with replaced_folder(folder) as draft:
        for name in ("first", "second"):
            (draft / name).write_text(value)
            time.sleep(0.002)


def values(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.iterdir()}


def test_writers_at_once_leave_one_whole_folder_and_no_draft(tmp_path: Path) -> None:
    writers = [threading.Thread(target=fill, args=(tmp_path / "x", str(n))) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(values(tmp_path / "x")) == 1 and os.listdir(tmp_path) == ["x"]


def test_a_writer_killed_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    fill(folder, "start")

    def replace_again_and_again() -> None:
        for number in range(10_000):
            fill(folder, str(number))

    for delay in (0.005, 0.011, 0.017, 0.023, 0.029, 0.035):
        process = in_a_fork(replace_again_and_again)
        time.sleep(delay)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert len(values(folder)) == 1 and len(list(folder.iterdir())) == 2
    recover_folder(folder)
    assert os.listdir(tmp_path) == ["x"]


def test_a_draft_that_another_writer_removes_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch) -> None:
    opened, removed = os.open, []

    def remove_first(path, flags, *more):
        if str(path).endswith(".new") and not removed:
            removed.append(path)
            os.rmdir(path)
        return opened(path, flags, *more)

    monkeypatch.setattr(storage.os, "open", remove_first)
    fill(tmp_path / "x", "a")
    assert len(removed) == 1 and values(tmp_path / "x") == {"a"} and os.listdir(tmp_path) == ["x"]


def test_a_draft_in_work_is_left_alone_and_one_left_behind_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".x.0badcafe.new").mkdir()
    with replaced_folder(tmp_path / "x") as draft:
        recover_folder(tmp_path / "x")
        assert draft.is_dir() and len(os.listdir(tmp_path)) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_without_an_exchange_the_folder_is_replaced_all_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "_exchange", lambda first, second: False)
    fill(tmp_path / "x", "a")
    fill(tmp_path / "x", "b")
    assert values(tmp_path / "x") == {"b"} and os.listdir(tmp_path) == ["x"]


def test_a_folder_that_came_in_the_meantime_is_not_replaced_unless_told(tmp_path: Path) -> None:
    with pytest.raises(InUseError, match="just made"), replaced_folder(tmp_path / "x", replace=False):
        fill(tmp_path / "x", "another's")
    assert values(tmp_path / "x") == {"another's"} and os.listdir(tmp_path) == ["x"]


def test_the_folder_one_stands_in_can_be_replaced(tmp_path: Path, monkeypatch) -> None:
    fill(tmp_path / "x", "a")
    monkeypatch.chdir(tmp_path / "x")
    fill(Path("."), "b")
    assert values(tmp_path / "x") == {"b"}


def test_writers_of_one_file_do_not_meet_in_its_draft(tmp_path: Path) -> None:
    with replaced_file(tmp_path / "x") as first, replaced_file(tmp_path / "x") as second:
        first.write_text("1")
        second.write_text("2")
        assert first != second
    assert (tmp_path / "x").read_text() == "1" and os.listdir(tmp_path) == ["x"]


def test_a_lock_is_refused_to_others_until_its_holder_ends(tmp_path: Path) -> None:
    ready, told = os.pipe()

    def hold() -> None:
        with locked(tmp_path):
            os.write(told, b"!")
            time.sleep(60)

    process = in_a_fork(hold)
    os.read(ready, 1)
    with pytest.raises(InUseError, match="which another udon command uses"), locked(tmp_path, shared=True):
        pass
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True):
        pass


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_draft_that_another_writer_took_for_left_behind_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    swept: list[Path] = []
    opened, lock = os.open, storage._lock

    def sweep() -> None:
        if not swept:
            swept.extend(tmp_path.glob(".x.*.new"))
            swept[0].rmdir()

    def open_late(path: Path, flags: int) -> int:
        if moment == "before it is opened":
            sweep()
        return opened(path, flags)

    def lock_late(descriptor: int, kind: int) -> bool:
        sweep()
        return lock(descriptor, kind)

    monkeypatch.setattr(storage.os, "open", open_late)
    monkeypatch.setattr(storage, "_lock", lock_late)
    with storage.replaced_folder(tmp_path / "x") as draft:
        (draft / "file").write_text("whole")
    assert swept and [path.name for path in tmp_path.iterdir()] == ["x"]
