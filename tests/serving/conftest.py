"""A service on a port of this machine, in a thread of the test process or in a process of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_models import TINY_VIT

from modeling_udon import Encoder, UdonConfig, UdonModel
from modeling_udon.data.preprocessing import IMAGENET_STANDARD, image_processor

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client", "openai", "httpx")):
    collect_ignore_glob = ["*"]  # the extras `serve` and `dev` are not installed
else:
    import httpx
    import uvicorn

    from modeling_udon.serving.app import Service, make_app
    from modeling_udon.serving.gate import Access
    from modeling_udon.serving.limits import Limits
    from modeling_udon.serving.server import listen, make_service

ROOT = Path(__file__).parents[2]


class Running(NamedTuple):
    """A service, where it listens, and a client of it."""

    service: Service
    address: str
    client: httpx.Client


@pytest.fixture(scope="session")
def nested_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 8 dimensions whose first 4 are an embedding too."""
    folder = tmp_path_factory.mktemp("serving") / "nested"
    torch.manual_seed(0)
    config = UdonConfig(backbone_config=dict(TINY_VIT), embedding_dim=8, matryoshka_dims=(4,))
    UdonModel(config).student().save_pretrained(folder)
    image_processor(16, IMAGENET_STANDARD).save_pretrained(folder)
    return folder


@contextmanager
def _serving(
    model: Path,
    index: Path | None = None,
    access: Access | None = None,
    allow_hosts: tuple[str, ...] = (),
    **limits: Any,
) -> Iterator[Running]:
    chosen = Limits(**{"num_decoders": 2, "decode_seconds": 30, **limits})
    service = make_service(Encoder.open(model), index, limits=chosen, allow_hosts=allow_hosts)
    port = listen("127.0.0.1", 0)
    app = make_app(service, access or Access())
    server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="critical", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [port]})
    thread.start()
    address = f"http://127.0.0.1:{port.getsockname()[1]}"
    try:
        with httpx.Client(base_url=address, timeout=60) as client:
            yield Running(service, address, client)
    finally:
        server.should_exit = True
        thread.join()
        with contextlib.suppress(OSError):
            port.close()


@pytest.fixture(scope="session")
def serving() -> Callable[..., AbstractContextManager[Running]]:
    """Serves in a thread: takes a model, an index, who may ask, hosts, and limits."""
    return _serving


@pytest.fixture(scope="session")
def running(searchable: Any, nested_student: Path) -> Iterator[Running]:
    """The searchable pictures' index, with a token."""
    with _serving(searchable.model, searchable.index, Access("a-token-of-the-tests")) as found:
        yield found


@pytest.fixture(scope="session")
def expected(searchable: Any) -> dict[Path, np.ndarray]:
    """The embedding of each searchable picture, by the encoder alone."""
    files = sorted(searchable.pictures.rglob("*.png"))
    return dict(zip(files, Encoder.open(searchable.model).encode(files).embeddings, strict=True))


class Command(NamedTuple):
    """`udon serve` in a process of its own."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def _command(*arguments: object) -> Iterator[Command]:
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    # A shell's background job ignores Ctrl+C, and so would its children.
    before = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    words = [sys.executable, "-m", "modeling_udon.cli", "serve", "--port", port, *arguments]
    with subprocess.Popen(
        list(map(str, words)),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            told = re.fullmatch(r"serving \S+ at (http://127.0.0.1:\d+)/, until Ctrl\+C\n", line)
            assert told is not None, line + process.stderr.read()
            yield Command(told[1], process)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def command() -> Callable[..., AbstractContextManager[Command]]:
    """Runs `udon serve` with some arguments."""
    return _command
