"""Starts the service and stops it gracefully."""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from modeling_udon.encoder import Encoder, fastest_device
from modeling_udon.search.any_index import AnyIndex
from modeling_udon.search.letterbox import letterboxed
from modeling_udon.serving.app import Service, make_app
from modeling_udon.serving.fetching import Fetcher
from modeling_udon.serving.gate import Access
from modeling_udon.serving.images import ImageService
from modeling_udon.serving.index_service import IndexService
from modeling_udon.serving.limits import Limits
from modeling_udon.serving.metrics import Metrics

LEAST_TOKEN = 16
_KEEP_ALIVE_SECONDS = 75


def make_service(
    encoder: Encoder,
    index: str | os.PathLike[str] | AnyIndex | None = None,
    name: str | None = None,
    limits: Limits | None = None,
    allow_hosts: Sequence[str] = (),
) -> Service:
    """Makes what the routes use; it must be closed.

    Args:
        encoder: The model.
        index: Folder that `udon index` wrote with it, or an opened index, which is only read. Where its images were
            padded to squares, so is every image.
        name: What clients call the model; by default its Hub id, or the last name of its folder.
        limits: What requests may ask for.
        allow_hosts: Hosts that images are fetched from by address.

    Raises:
        ValueError: If the index is none, or of another model.
    """
    limits, metrics = limits or Limits(), Metrics()
    if name is None:
        name = Path(encoder.name).resolve().name if Path(encoder.name).is_dir() else encoder.name
    hosts = frozenset(host.lower().rstrip(".") for host in allow_hosts)
    fetcher = Fetcher(hosts, limits.max_image_bytes, limits.decode_seconds)
    opened = None if index is None else IndexService(index, encoder, limits, metrics)
    if opened is not None and opened.is_letterboxed:
        encoder = letterboxed(encoder)
    return Service(name, ImageService(encoder.to(fastest_device()), limits, fetcher, metrics), opened, limits, metrics)


def read_token(file: str | os.PathLike[str]) -> str:
    """Reads a token.

    Raises:
        ValueError: If it is short, or has more than one word.
    """
    token = Path(file).read_text(encoding="utf-8").strip()
    if len(token) < LEAST_TOKEN or not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"`token_file` must hold one ASCII word of at least {LEAST_TOKEN} characters. Got {len(token)} "
            f"characters in {str(file)!r}; write one with: openssl rand -hex 32 > {file}"
        )
    return token


def listen(host: str, port: int) -> socket.socket:
    """Opens the port.

    Raises:
        OSError: If it is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        opened = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise OSError(f"port {port} of {host} cannot be listened on; give another --host or --port") from error
    opened.set_inheritable(True)
    return opened


def run(service: Service, access: Access, port: socket.socket, say: Callable[[str], None] = lambda text: None) -> None:
    """Serves until SIGTERM or Ctrl+C; what has begun is answered first.

    Args:
        service: What the routes use; closed at the end.
        access: Who may ask.
        port: What `listen` gave.
        say: Called with the line that says where the service is.
    """
    config = uvicorn.Config(
        make_app(service, access),
        lifespan="on",
        log_level="warning",
        access_log=False,
        # Nobody's word about the client's address is taken.
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(service.limits.request_seconds) + 5,
    )
    # uvicorn raises the signal once more when it has stopped; a graceful stop is a success.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    host, number_of_port = port.getsockname()[:2]
    say(f"serving {service.name} at http://{f'[{host}]' if ':' in host else host}:{number_of_port}/, until Ctrl+C")
    _Server(config, service).run(sockets=[port])


class _Server(uvicorn.Server):
    """Tells the service that it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answers what has begun."""
        self._service.is_stopping = True
        await super().shutdown(sockets)
