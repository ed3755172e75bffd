"""One list of endings and one walk of folders: what is read, what is passed over, and how often."""

import os
from collections import Counter
from pathlib import Path

import pytest

from modeling_udon.data.folders import IMAGE_SUFFIXES, describe_passed_over, walk_images


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def walk(folder: Path) -> tuple[list[str], Counter[str]]:
    images = walk_images(folder)
    return list(images), images.passed_over


def test_every_ending_of_a_format_that_is_read_counts_in_any_case(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{n}{suffix.upper() if n % 2 else suffix}" for n, suffix in enumerate(sorted(IMAGE_SUFFIXES))))
    paths, passed_over = walk(tmp_path)
    assert len(paths) == len(IMAGE_SUFFIXES) and paths == sorted(paths) and not passed_over


def test_files_of_systems_and_editors_are_passed_over_and_counted(tmp_path: Path) -> None:
    touch(tmp_path / "c" / "1.png", tmp_path / "c" / "._1.png", tmp_path / "c" / "Thumbs.db", tmp_path / ".DS_Store")
    touch(tmp_path / ".ipynb_checkpoints" / "1.png", tmp_path / "c" / "@eaDir" / "1.png", tmp_path / "c" / "notes.TXT")
    touch(tmp_path / "__MACOSX" / "c" / "._1.png", tmp_path / "$RECYCLE.BIN" / "2.jpg", tmp_path / "c" / "Makefile")
    touch(tmp_path / "c" / "x.heic", tmp_path / "c" / "y.HEIC")
    paths, passed_over = walk(tmp_path)
    assert paths == ["c/1.png"]
    expected = {"hidden file": 2, "hidden folder": 1, "system file": 1, "system folder": 3}
    assert passed_over == {**expected, ".txt file": 1, "file without ending": 1, ".heic file": 2}
    assert describe_passed_over(passed_over) == (
        "3 system folders, 2 .heic files, 2 hidden files, 1 .txt file, 1 file without ending, 1 hidden folder, "
        "1 system file"
    )


def test_linked_folders_are_followed_once_and_cycles_end(tmp_path: Path) -> None:
    pictures, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    touch(pictures / "real" / "1.png", elsewhere / "2.png", pictures / ".store" / "3.png")
    (pictures / "linked").symlink_to(elsewhere)
    (pictures / "linked too").symlink_to(elsewhere)
    (pictures / "a real one").symlink_to(pictures / "real")
    (pictures / "stored").symlink_to(pictures / ".store")
    (pictures / "real" / "up").symlink_to(pictures)
    (elsewhere / "round").symlink_to(elsewhere)
    (pictures / "loop.png").symlink_to("loop.png")
    (pictures / "gone.png").symlink_to("nowhere")
    paths, passed_over = walk(pictures)
    # A link to a file that cannot be read is named when it is read, not lost here.
    assert paths == ["gone.png", "linked/2.png", "loop.png", "real/1.png", "stored/3.png"]
    assert passed_over == {"folder linked again": 4, "hidden folder": 1}


def test_the_walked_folder_may_itself_be_hidden_or_a_link(tmp_path: Path) -> None:
    touch(tmp_path / ".cache" / "c" / "1.png")
    (tmp_path / "link").symlink_to(tmp_path / ".cache")
    assert walk(tmp_path / ".cache")[0] == walk(tmp_path / "link")[0] == ["c/1.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_without_permission_is_counted(tmp_path: Path) -> None:
    touch(tmp_path / "open" / "1.png", tmp_path / "shut" / "2.png")
    (tmp_path / "shut").chmod(0)
    paths, passed_over = walk(tmp_path)
    (tmp_path / "shut").chmod(0o755)
    assert paths == ["open/1.png"] and passed_over == {"folder without permission to read": 1}
