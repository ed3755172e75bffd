"""SIGTERM and Ctrl-C end a run with a state to go on from, in every process after the same step."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hurt import Patch, at, signalling

import train_udon
from modeling_udon.training import signals as stopping
from modeling_udon.training import validation as assessment
from modeling_udon.training.signals import Stopped, StopSignals, resume_command
from modeling_udon.training.trainer import Trainer

Values = Callable[..., dict[str, Any]]
TERM, INT = signal.SIGTERM, signal.SIGINT


def stop_and_go_on(
    start: Any, config: Path, stops: list[tuple[int, Patch, str]], num_processes: int, run: Path
) -> None:
    for number, patch, checkpoint in stops:
        stopped = start(config, "--resume", num_processes=num_processes, before=patch)
        assert stopped.wait() == [128 + number] * num_processes, stopped.said()
        said = stopped.said()
        command = f"train_udon.py --config {config} --resume"
        assert said.count(f"stopped by {signal.Signals(number).name}; go on with:\n  {command}\n") == 1
        assert "Traceback" not in said and "rror" not in said, said
        assert (
            sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1:] == [checkpoint][: len(checkpoint)]
        )
    assert start(config, "--resume", num_processes=num_processes).wait() == [0] * num_processes


def test_a_stopped_run_saves_its_step_and_goes_on_as_if_nothing_had_been(
    whole: Any, make_values: Values, write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    stops = [
        (TERM, at(assessment, "search_model", 1, signalling(TERM)), ""),
        (INT, at(Trainer, "train_step", 2, signalling(INT)), "step-00000002"),
        (TERM, at(assessment, "search_model", 1, signalling(TERM)), "step-00000005"),
        (INT, at(Trainer, "train_step", 6, signalling(INT)), "step-00000011"),
        (TERM, at(assessment, "search_model", 2, signalling(TERM)), "step-00000011"),
    ]
    stop_and_go_on(start, write(make_values(tmp_path, **whole.changes)), stops, 1, tmp_path / "run")
    whole.compare(tmp_path / "run")
    tell("SIGTERM or Ctrl-C in a step, a validation, the test", len(stops), 0)


def test_two_processes_stop_after_the_same_step_when_one_of_them_is_asked(
    whole_pair: Any, make_values: Values, write: Any, start: Any, tmp_path: Path, tell: Any
) -> None:
    stops = [
        # The others learn of it with the next step.
        (TERM, at(Trainer, "train_step", 1, signalling(TERM), ranks=(1,)), "step-00000002"),
        (INT, at(assessment, "search_model", 1, signalling(INT)), "step-00000005"),
        # The other would wait for it in the next exchange of embeddings, where no signal reaches it.
        (TERM, at(assessment, "search_model", 1, signalling(TERM), ranks=(1,)), "step-00000005"),
        (TERM, at(Trainer, "train_step", 3, signalling(TERM), ranks=(0,)), "step-00000009"),
    ]
    stop_and_go_on(start, write(make_values(tmp_path, **whole_pair.changes)), stops, 2, tmp_path / "run")
    whole_pair.compare(tmp_path / "run")
    tell("SIGTERM or Ctrl-C of two processes, to one or to both", len(stops), 0)


@pytest.mark.parametrize("number", [TERM, INT])
def test_a_second_signal_ends_a_run_at_once(
    make_values: Values, write: Any, start: Any, tmp_path: Path, number: int
) -> None:
    def hang() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        time.sleep(600)

    config = write(make_values(tmp_path))
    started = time.monotonic()
    assert start(config, before=at(Trainer, "train_step", 2, hang)).wait() == [128 + number]
    assert time.monotonic() - started < 300


def test_ctrl_c_while_the_libraries_are_imported_is_no_traceback(tmp_path: Path) -> None:
    # In place of the package, one that is interrupted while it is imported.
    script = Path(shutil.copy(train_udon.__file__, tmp_path))
    (tmp_path / "modeling_udon").mkdir()
    (tmp_path / "modeling_udon" / "__init__.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    # pytest in the background would hand down that Ctrl-C is ignored.
    listen = functools.partial(signal.signal, INT, signal.SIG_DFL)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, preexec_fn=listen)
    assert (done.returncode, done.stdout + done.stderr) == (-INT, "")


def test_a_signal_breaks_off_only_what_can_be_done_again() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), TERM)
        assert signals.requested
        with pytest.raises(Stopped) as caught, signals.interruptible():
            raise AssertionError("it had been asked to stop before")
    assert (caught.value.code, str(caught.value)) == (143, "SIGTERM")
    with StopSignals() as signals, pytest.raises(Stopped) as caught, signals.interruptible():
        os.kill(os.getpid(), INT)
        time.sleep(10)
    assert caught.value.code == 130
    assert signal.getsignal(INT) is not None and signal.getsignal(TERM) == signal.SIG_DFL


def test_a_signal_that_comes_in_a_finaliser_or_while_a_worker_is_forked_is_not_lost() -> None:
    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), TERM)

    with StopSignals() as signals, pytest.raises(Stopped) as caught, signals.interruptible():
        Finalised()
        time.sleep(10)
    assert caught.value.code == 143
    # One that is no signal is told of as ever.
    heard: list[Any] = []
    before, sys.unraisablehook = sys.unraisablehook, heard.append
    try:
        with StopSignals():
            type("Broken", (), {"__del__": lambda self: 1 / 0})()
        assert [type(dropped.exc_value) for dropped in heard] == [ZeroDivisionError]
        assert sys.unraisablehook == heard.append
    finally:
        sys.unraisablehook = before


@pytest.mark.parametrize(
    ("own", "parent", "command"),
    [
        ("python train_udon.py --config a.yaml", "bash", "python train_udon.py --config a.yaml --resume"),
        ("python -m train_udon --config 'a b' --overwrite", "", "python -m train_udon --config 'a b' --resume"),
        ("python t.py --config a --resume --seed 1", "zsh", "python t.py --config a --resume --seed 1"),
        (
            "python -u t.py --config a",
            "python /bin/torchrun --nproc_per_node 2 t.py --config a",
            "python /bin/torchrun --nproc_per_node 2 t.py --config a --resume",
        ),
        (
            "python t.py --config a",
            "python /bin/accelerate launch --num_processes 2 t.py --config a",
            "python /bin/accelerate launch --num_processes 2 t.py --config a --resume",
        ),
        ("python t.py --config a", "python launch other.py", "python t.py --config a --resume"),
    ],
)
def test_the_command_to_go_on_is_the_one_that_was_given(
    monkeypatch: pytest.MonkeyPatch, own: str, parent: str, command: str
) -> None:
    import shlex

    words = shlex.split(own)
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", words[words.index("--config") - 1 :])
    monkeypatch.setattr(stopping, "_parent_command", lambda: shlex.split(parent))
    assert resume_command() == command
