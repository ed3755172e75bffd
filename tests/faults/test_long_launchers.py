"""Real launches are stopped as a terminal and a cluster stop them, and go on with the command that they print."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
LAUNCHERS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"],
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        ("python", signal.SIGTERM, False),
        ("python", signal.SIGINT, True),
        ("torchrun", signal.SIGTERM, False),
        ("torchrun", signal.SIGINT, True),
        ("accelerate", signal.SIGTERM, True),
        ("accelerate", signal.SIGINT, True),
    ],
)
def test_a_launched_run_goes_on_with_the_command_that_it_prints(
    make_values: Callable[..., dict[str, Any]],
    tmp_path: Path,
    tell: Callable[..., None],
    launcher: str,
    number: int,
    to_all: bool,
) -> None:
    config = tmp_path / "config.yaml"
    options = ["--mixed_precision", "no", "--dynamo_backend", "no"] if launcher == "accelerate" else []
    values = make_values(tmp_path, train__num_steps=100_000, data__num_workers=2)
    config.write_text(yaml.safe_dump(values, sort_keys=False))
    command = [sys.executable, *LAUNCHERS[launcher], *options, str(ROOT / "train_udon.py"), "--config", str(config)]
    for _ in range(2):
        log = tmp_path / "log"
        with log.open("w") as file:
            run = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                env=ENVIRONMENT,
                start_new_session=True,
                # pytest in the background would hand down that Ctrl-C is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
            )
        while "| loss" not in log.read_text():
            assert run.poll() is None, log.read_text()
            time.sleep(0.2)
        (os.killpg if to_all else os.kill)(run.pid, number)
        began = time.monotonic()
        code = run.wait(120)
        while "go on with" not in log.read_text() and time.monotonic() < began + 30:
            time.sleep(0.2)  # `accelerate launch` does not wait for its process.
        said = log.read_text()
        found = re.findall(r"^stopped by (SIG\w+); go on with:\n  (.*)$", said, re.M)
        assert [name for name, _ in found] == [signal.Signals(number).name], said
        assert launcher != "python" or code == 128 + number
        assert "DataLoader" not in said, said
        command = shlex.split(found[0][1])
        assert command.count("--resume") == 1
    assert re.search(r"^going on from step \d+ of 100000$", said, re.M), said
    whom = "all processes" if to_all else "the launcher"
    tell(f"{signal.Signals(number).name} to {whom} of a run that {launcher} launched, which it then goes on from", 2, 0)
