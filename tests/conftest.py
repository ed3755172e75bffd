"""Shared fixtures: tiny domains on disk, a tiny config, and runs in this process or in one of their own."""

import functools
import io
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Before the libraries are imported: no network, no cache of the user's, one thread.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": tempfile.mkdtemp(prefix="udon-tests-"),
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from tiny_models import TINY_VIT

from modeling_udon import UdonConfig, UdonModel
from modeling_udon.cli import main
from modeling_udon.cli.train import train_and_publish
from modeling_udon.config import TrainConfig
from modeling_udon.config_file import load_config
from modeling_udon.data.dataset import DomainBatch
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor
from modeling_udon.training.run import build_run
from modeling_udon.training.run_folder import RunFolder
from modeling_udon.training.signals import StopSignals
from modeling_udon.training.step import StepResult
from modeling_udon.training.trainer import Trainer

# A student and pictures on disk, for the tests of embedding, search and evaluation.
pytest_plugins = ["picture_fixtures", "shop_index"]

ROOT = Path(__file__).parent.parent
KILLED = 9

# Classes of training, validation and test, and images of each class: other sizes for each domain.
DOMAIN_SHAPES = {"stripes": ((5, 3, 3), 8), "blobs": ((3, 3, 4), 10), "noise": ((4, 2, 3), 7)}


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes pixels of shape `(height, width, 3)`, uint8."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def draw_image(domain: int, label: int, rng: np.random.Generator) -> np.ndarray:
    """Draws an image whose class can be seen: a pattern of the class under noise, in some size."""
    height, width = rng.integers(18, 30, size=2)
    pattern = np.random.default_rng((domain, label)).integers(40, 215, size=(3, 3, 3)).astype(float)
    rows, columns = np.arange(height) * 3 // height, np.arange(width) * 3 // width
    noisy = pattern[rows][:, columns] + rng.normal(0, 70, size=(height, width, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def write_parquet(path: Path, images: list[bytes], labels: list[Any]) -> None:
    """Writes encoded images with their labels as `datasets` does."""
    features = Features({"image": Image(), "label": Value("string" if isinstance(labels[0], str) else "int64")})
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    Dataset.from_dict(rows, features=features).to_parquet(path)


def write_domain(folder: Path, number: int, name: str) -> None:
    """Writes train, validation and test of one domain; their classes are disjoint."""
    folder.mkdir(parents=True)
    counts, per_class = DOMAIN_SHAPES[name]
    rng, first = np.random.default_rng(number), 0
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        labels = [label for label in range(first, first + count) for _ in range(per_class)]
        write_parquet(
            folder / f"{split}.parquet", [encode_png(draw_image(number, label, rng)) for label in labels], labels
        )
        first += count


@pytest.fixture(scope="session")
def tiny_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three domains, each a folder of train, validation and test as parquet."""
    folder = tmp_path_factory.mktemp("domains")
    for number, name in enumerate(DOMAIN_SHAPES):
        write_domain(folder / name, number, name)
    return folder


def tiny_values(domains: Path, output_dir: Path, /, **changes: Any) -> dict[str, Any]:
    """Values of a run of 11 steps with all that can upset a resume; `section__key=value` changes one."""
    values: dict[str, Any] = {
        "name": "run",
        "output_dir": str(output_dir),
        "seed": 3,
        "domains": {name: {"path": str(domains / name)} for name in DOMAIN_SHAPES},
        "model": {
            "backbone_config": {**TINY_VIT, "hidden_dropout_prob": 0.1},
            "embedding_dim": 8,
            "teacher_dim": 12,
        },
        "data": {"image_size": 16, "num_workers": 0},
        "sampling": {"update_every": 4},
        "optim": {"lr": 1e-2, "backbone_lr": 1e-3, "frozen_fraction": 0.2},
        "train": {"num_steps": 11, "batch_size": 16, "checkpoint_every": 3, "keep_checkpoints": 9},
        "eval": {"every": 5, "batch_size": 32},
        "log": {"every": 2},
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return values


@pytest.fixture(scope="session")
def make_values(tiny_domains: Path) -> Callable[..., dict[str, Any]]:
    """`tiny_values` on the tiny domains: takes the folder of runs and changes."""
    return functools.partial(tiny_values, tiny_domains)


@dataclass(frozen=True)
class Searchable:
    """Folders: a student, pictures in a folder a domain, their embeddings, and the index of these."""

    model: Path
    pictures: Path
    embedded: Path
    index: Path


# Nothing of it may act in a page.
HOSTILE_DOMAIN = "<b id=hostile>{{1}}${alert(1)}"


@pytest.fixture(scope="session")
def make_searchable(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Searchable]:
    """Draws pictures, embeds and indexes them by the commands: takes a seed of the student, and names of domains."""

    def make(seed: int = 0, domains: Sequence[str] = ("plants", "tools", HOSTILE_DOMAIN)) -> Searchable:
        folder = tmp_path_factory.mktemp("searchable")
        made = Searchable(*(folder / name for name in ("model", "pictures", "embedded", "index")))
        torch.manual_seed(seed)
        UdonModel(UdonConfig(backbone_config=dict(TINY_VIT), embedding_dim=8)).student().save_pretrained(made.model)
        image_processor(16, IMAGENET_STANDARD).save_pretrained(made.model)
        rng = np.random.default_rng(0)
        for number, domain in enumerate(domains):
            (made.pictures / domain).mkdir(parents=True)
            for label in range(5 - number):
                (made.pictures / domain / f"{label}.png").write_bytes(encode_png(draw_image(number, label, rng)))
        embed = ["embed", made.pictures, "--domain-from-folder", "--model", made.model, "--out", made.embedded]
        for command in ([*embed, "--num-workers", 0], ["index", made.embedded, "--out", made.index]):
            assert main([str(word) for word in command]) == 0
        return made

    return make


@pytest.fixture(scope="session")
def searchable(make_searchable: Callable[..., Searchable]) -> Searchable:
    """12 pictures of three domains, one of them with a hostile name."""
    return make_searchable()


@pytest.fixture
def tiny_config(make_values: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """Writes a config file of a tiny run and returns its path: takes changes."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        values = make_values(tmp_path / "runs", **changes)
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def run_train() -> Callable[..., Path]:
    """Trains in this process: takes values of a config and what `train` takes, and returns the run's folder."""

    def run(
        values: dict[str, Any], *, resume: bool = False, overwrite: bool = False, allow: Sequence[str] = ()
    ) -> Path:
        _reset_accelerate()
        train_and_publish(load_config(write_config(values)), resume, overwrite, allow)
        return Path(values["output_dir"]) / values["name"]

    return run


def write_config(values: dict[str, Any]) -> Path:
    """Writes values beside the runs as YAML."""
    path = Path(values["output_dir"]) / f"{values['name']}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `train_udon.py`, or a script in its place, on values of a config in one new process or more."""

    def run(
        values: dict[str, Any],
        *options: str,
        num_processes: int = 1,
        script: Path = ROOT / "train_udon.py",
        check: bool = True,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        launcher = [sys.executable]
        if num_processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        done = subprocess.run(
            [*launcher, str(script), "--config", str(write_config(values)), *options],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def run_two_processes() -> Callable[..., Path]:
    """Trains in two forks of this process that talk by gloo: quicker to start than `run_script`.

    Takes values of a config, `resume`, `stop_at`, the step at which both die as if killed, and another number of forks.
    """

    def run(
        values: dict[str, Any], *, resume: bool = False, stop_at: int | None = None, num_processes: int = 2
    ) -> Path:
        config = load_config(write_config(values))
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=_train_as_rank, args=(rank, num_processes, port, config, resume, stop_at))
            for rank in range(num_processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            assert process.exitcode == (0 if stop_at is None else KILLED)
        return config.run_dir

    return run


class Served(NamedTuple):
    """The page in a process of its own."""

    address: str
    process: int


@pytest.fixture(scope="session")
def serve_page(searchable: Searchable) -> Callable[..., AbstractContextManager[Served]]:
    """Runs `udon app` on the searchable pictures, in a process of its own since Gradio leaves sockets open.

    Takes further arguments, and a program to run before the command.
    """

    @contextmanager
    def serving(*arguments: object, before: str = "") -> Iterator[Served]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["app", "--model", searchable.model, "--index", searchable.index, "--port", port, *arguments]
        # A shell's background job ignores Ctrl+C, and so would its children.
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(
            [sys.executable, "-c", f"{before}\nfrom modeling_udon.cli import main\nmain()", *map(str, command)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=listen,
        ) as process:
            try:
                assert process.stdout is not None
                told = re.fullmatch(
                    r"the page is at (http://127.0.0.1:\d+/), until Ctrl\+C\n", process.stdout.readline()
                )
                assert told is not None
                yield Served(told[1], process.pid)
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 0
            finally:
                process.kill()

    return serving


@pytest.fixture
def open_trainer() -> Iterator[Callable[[TrainConfig], Trainer]]:
    """Makes a trainer; its folder is free again after the test."""
    with ExitStack() as folders:
        yield lambda config: Trainer(build_run(config, folders.enter_context(RunFolder(config)), StopSignals()))


class Answer(NamedTuple):
    """What a command gave."""

    code: int
    out: str
    err: str


@pytest.fixture
def udon(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Runs `udon` with some arguments; gives its exit code and what it printed."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return Answer(code, *capsys.readouterr())

    return run


def _train_as_rank(
    rank: int, num_processes: int, port: str, config: TrainConfig, resume: bool, stop_at: int | None
) -> None:
    world = str(num_processes)
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    _reset_accelerate()
    train_step = Trainer.train_step

    def dying_train_step(self: Trainer, batch: DomainBatch) -> StepResult:
        if self.step == stop_at:
            os._exit(KILLED)
        return train_step(self, batch)

    Trainer.train_step = dying_train_step
    train_and_publish(config, resume)


def _reset_accelerate() -> None:
    # Accelerate keeps one state a process; the next run may want another precision.
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def _one_thread_and_fresh_state() -> None:
    torch.set_num_threads(1)
    _reset_accelerate()
