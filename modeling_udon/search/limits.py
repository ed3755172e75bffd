"""Limits of the page: requests per minute and address, and no request that names a URL to fetch."""

import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

SECONDS = 60
# A search is a few hundred bytes.
MAX_REQUEST_BYTES = 2**20
_ADDRESSES = ("http:", "https:")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class RateLimit:
    """Answers 429 to an address that has sent too much in the current minute; what it reads is not counted.

    Args:
        app: The page's server, in the form of ASGI.
        per_minute: Uploads and searches that one address may send in a minute.
        clock: Seconds, that never go back.
    """

    def __init__(self, app: App, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._per_minute = per_minute
        self._clock = clock
        self._minute = -1
        self._sent: Counter[str] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http" or scope["method"] != "POST" or self._admits(scope["client"][0]):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"text/plain"), (b"retry-after", str(SECONDS).encode())]
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"Too many requests from your address; wait a minute."})

    def _admits(self, address: str) -> bool:
        minute = int(self._clock() // SECONDS)
        if minute != self._minute:
            # Reset each minute, so that there are never more counts than addresses in one minute.
            self._minute, self._sent = minute, Counter()
        self._sent[address] += 1
        return self._sent[address] <= self._per_minute


class NoAddresses:
    """Answers 400 to a request that names another server's file as a picture, before Gradio would fetch it.

    Gradio downloads whatever address a client puts into `path`, of any size. Uploads bring bytes and are let through.

    Args:
        app: The page's server, in the form of ASGI.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one request."""
        is_upload = scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload")
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or is_upload:
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more and len(body) <= MAX_REQUEST_BYTES:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        if len(body) > MAX_REQUEST_BYTES:
            await _refuse(send, 413, b"A search is smaller than this request.")
        elif names_address(body):
            await _refuse(send, 400, b"A picture must be uploaded; addresses are not fetched.")
        else:
            await self._app(scope, _replay(body, receive), send)


def names_address(body: bytes) -> bool:
    """Whether JSON holds, at any depth, a `path` that is an address on the web."""
    try:
        waiting = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # The server cannot read it either.
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(_ADDRESSES):
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


def _replay(body: bytes, receive: Receive) -> Receive:
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return parts.pop() if parts else await receive()

    return replayed


async def _refuse(send: Send, status: int, text: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text})


class Middleware(NamedTuple):
    """A layer around the server with its arguments, as Starlette takes them apart; Gradio brings Starlette along."""

    layer: Any
    positional: tuple[Any, ...]
    named: dict[str, Any]
