"""Outputs that take nothing, since the shell closed them, they are full, or their reader left: no traceback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
# Without these, as a user has it, there must be none in a log either.
BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


@pytest.fixture
def shell(searchable: Any, make_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Any]:
    """Runs `udon` from a shell: takes its words and what follows; gives the codes of the pipe and what was said."""
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(make_values(tmp_path / "runs")))
    places = {"index": searchable.index, "model": searchable.model, "pictures": searchable.pictures, "config": config}

    def run(words: str, after: str) -> tuple[list[int], str, str]:
        command = f"{sys.executable} -m modeling_udon.cli {words.format(**places)} {after}; echo ${{PIPESTATUS[@]}} >&9"
        codes = tmp_path / "codes"
        done = subprocess.run(
            ["bash", "-c", f"exec 9>{codes}; {command}"],
            env={name: value for name, value in os.environ.items() if name not in BARS} | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=240,
            cwd=tmp_path,
        )
        assert "Traceback" not in done.stderr + done.stdout and "Exception ignored" not in done.stderr, done.stderr
        return [int(code) for code in codes.read_text().split()], done.stdout, done.stderr

    return run


SEARCH = "search {pictures}/tools/2.png --index {index} --model {model} --num-workers 0"


@pytest.mark.parametrize(
    ("words", "after", "codes", "said"),
    [
        (SEARCH, "> /dev/full", [1], "error: the disk is full: free some space"),
        (SEARCH, "| true", [141, 0], ""),
        (SEARCH, ">&-", [0], ""),
        (SEARCH + " --html h.html", "2>&- | cat", [0, 0], ""),
        (SEARCH + " --html h.html", "2> /dev/full", [0], ""),
        (SEARCH + " --domain none", "2> /dev/full", [2], ""),
        ("embed {pictures} --model {model} --out e --num-workers 0", "<&- >&- 2>&-", [0], ""),
    ],
)
def test_an_output_that_takes_nothing_ends_no_verb_in_a_traceback(
    shell: Any, tmp_path: Path, words: str, after: str, codes: list[int], said: str
) -> None:
    found, _, told = shell(words, after)
    assert found == codes, told
    assert told.count("\n") == bool(said) and said in told
    assert ("--html" not in words) or (tmp_path / "h.html").is_file()
    assert not words.startswith("embed") or (tmp_path / "e" / "part-00000.parquet").is_file()


def test_a_run_whose_output_is_not_taken_any_more_says_how_to_go_on(shell: Any) -> None:
    for after, codes in (("| head -1", [141, 0]), ("> /dev/full", [141])):
        found, _, told = shell("train --config {config} --overwrite", after)
        assert found == codes, told
        assert "error: the output is not taken any more" in told and "train --config" in told.splitlines()[-1]
        assert told.splitlines()[-1].endswith(" --resume") and len(told.splitlines()) == 2, told  # and no bars
    assert shell("train --config {config} --resume", ">&- 2>&-")[0] == [0]
