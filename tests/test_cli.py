"""The command line: what ends a verb is one line, on every terminal, also when nobody reads any more."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from modeling_udon.cli import index as index_verb
from modeling_udon.cli.options import Parser, add_verb, run_verb
from modeling_udon.cli.terminal import use_escapes

ROOT = Path(__file__).parents[1]


class InvalidCxxCompiler(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("`out` must be\nnew"), 2, "`out` must be new"),
        (OSError(28, "No space left on device", "/x"), 1, "the disk is full at /x: free some space"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x must be writable (Permission denied)"),
        (MemoryError(), 1, "out of memory (MemoryError): lower --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "(pid 7) was killed"),
        (
            BrokenProcessPool("A process in the process pool was terminated abruptly while the future was running"),
            1,
            "a process that decodes images was killed",
        ),
        (InvalidCxxCompiler("No working C++ compiler found"), 1, "compiling needs a C++ compiler"),
        (KeyError("vectors"), 1, "unexpected KeyError at "),
        (TypeError("odd\nvectors"), 1, "please report it with the traceback that UDON_TRACEBACK=1 shows"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_any_fault_of_a_verb_is_one_line(error, code, words, udon, monkeypatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("modeling_udon.search.index.build_index", fail)
    done = udon("index", "embedded", "--out", "index")
    assert done.code == code and done.out == "" and done.err.count("\n") == 1
    assert done.err.startswith("udon index: error: ") and words in done.err


def test_a_reader_that_leaves_ends_a_verb_without_a_word(searchable) -> None:
    command = [sys.executable, "-m", "modeling_udon.cli", "search", searchable.pictures, "--index", searchable.index]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*command, "--model", searchable.model, "--json"],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_show_a_name_gets_its_escape(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    use_escapes()
    print("鞋/1.png", flush=True)
    assert stream.buffer.getvalue() == b"\\u978b/1.png\n"


def test_a_parser_is_what_the_signature_and_the_docstring_say() -> None:
    parser = Parser(prog="udon")
    add_verb(parser.add_subparsers(dest="verb"), "index", index_verb.index)
    arguments = parser.parse_args(["index", "a", "b", "--out", "c", "--recall", "0.5"])
    expected = {"embeddings": ["a", "b"], "out": "c", "kind": None, "recall": 0.5, "force": False}
    expected |= {"add": False, "update": False, "remove": [], "remove_list": None, "remove_where": None}
    expected |= {"compact": False, "no_vectors": False, "wait": 0, "recall_queries": None}
    assert {key: value for key, value in vars(arguments).items() if not key.startswith("verb")} == expected


def test_a_verb_of_two_functions_has_the_options_of_both_and_hands_the_answer_on() -> None:
    def find(source: str, *, size: int = 3) -> list[Any]:
        """Find things.

        Args:
            source: Where.
            size: How large.

        Example:
            udon find here
        """
        return [source, size]

    def show(found: list[Any], *, out: str) -> None:
        """Shows what was found.

        Args:
            out: Where to.
        """
        found += [out]
        answers.append(found)

    answers: list[Any] = []
    parser = Parser(prog="udon")
    add_verb(parser.add_subparsers(dest="verb"), "find", find, show)
    run_verb(parser.parse_args(["find", "here", "--out", "there"]))
    assert answers == [["here", 3, "there"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index", "a"], "the following arguments are required: --out"),
        (["index", "a", "--out", "b", "--recall", "2"], "must be a number above 0 and at most 1. Got '2'"),
        (["search", "a", "--index", "b", "--model", "c", "-k", "0"], "must be a whole number of at least 1. Got '0'"),
        (["index", "a", "--out", "b", "--kind", "best"], "invalid choice: 'best'"),
        (["evaluate", "--run", "a", "--model", "b"], "not allowed with argument --run"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, words, udon: Callable) -> None:
    done = udon(*arguments)
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err and "--help" in done.err


def test_udon_train_is_the_launch_script(udon, monkeypatch) -> None:
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    done = udon("train", "--config", "/nowhere.yaml", "--optim.lr", "1")
    assert done.code == 2 and done.err.startswith("udon train: error: `config` must be a file that can be read")
    assert "udon train [-h] [--config CONFIG]" in udon("train", "--help").out


def test_the_help_of_the_launch_script_loads_nothing_that_only_some_runs_need() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train_udon.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0 and "modeling_udon.cli.train_verb" in loaded
    assert not loaded & {"torch", "faiss", "gradio", "modeling_udon.hub.push", "modeling_udon.evaluation.report"}
