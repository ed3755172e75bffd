"""A run to publish, the loopback Hub, and a client of it in this process."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from loopback import WRITE_TOKEN, LoopbackHub, known_to_clients, running_hub
from tiny_models import TINY_VIT

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.data.preprocessing import ChannelStatistics, image_processor
from modeling_udon.hub.student_folder import write_student

ROOT = Path(__file__).parents[2]
Values = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def trained(
    make_values: Values, run_train: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Runs on the tiny domains: `student`, and `teachers`, whose `best` has its teachers too."""
    folder = tmp_path_factory.mktemp("published")
    return {
        "student": run_train(make_values(folder, name="student")),
        "teachers": run_train(make_values(folder, name="teachers", train__keep_teachers=True)),
    }


@pytest.fixture
def run(trained: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained["student"], tmp_path / "runs" / "student"))


@pytest.fixture(scope="module")
def shared_hub() -> Iterator[LoopbackHub]:
    """One Hub for the tests of a file."""
    with running_hub() as hub:
        yield hub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub of the test's own; the clients of this process know no other."""
    with running_hub() as hub, known_to_clients(hub):
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture(scope="session")
def run_udon() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `udon` in a process of its own: takes its arguments, and variables of the environment."""

    def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "modeling_udon.cli", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def make_student(tmp_path: Path) -> Callable[..., Path]:
    """Exports a student of random weights, biases and norms included."""

    def make(kind: str = "vit", **values: Any) -> Path:
        torch.manual_seed(0)
        config = UdonConfig(
            backbone_config=TINY_VIT | {"model_type": kind, "num_hidden_layers": 2}, embedding_dim=8, **values
        )
        model = UdonModel(config)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.2 * torch.randn_like(value))
        folder = tmp_path / "student"
        processor = image_processor(16, ChannelStatistics((0.5, 0.4, 0.3), (0.5, 0.5, 0.4)))
        write_student(folder, model, processor, ModelCard("---\n---\n"))
        return folder

    return make
