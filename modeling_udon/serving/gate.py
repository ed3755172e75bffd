"""The gate before all routes: bounds the bytes and the time of requests, asks for the token, and counts answers."""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

from modeling_udon.serving.limits import Limits, ServiceError
from modeling_udon.serving.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# What a refused request still sends is read up to here and thrown away: a client that is cut off while it sends does
# not read the answer.
_DRAINED_BYTES, _DRAIN_SECONDS = 64 * 2**20, 5.0


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        token: What a request must show as its bearer token; `None` where none is configured.
        for_all: Whether every request must show it, and not those alone that change something.
    """

    token: str | None = None
    for_all: bool = False

    def check(self, header: str) -> None:
        """Refuses a request without the token.

        Args:
            header: Its `Authorization`, empty if there is none.

        Raises:
            ServiceError: 403 where no token is configured, 401 for a missing or wrong one.
        """
        if self.token is None:
            message = "changes of the index need a token, and the service has none; start it with --token-file."
            raise ServiceError(403, message, code="no_token_configured")
        scheme, _, shown = header.partition(" ")
        # In bytes, since of strings only ASCII ones are compared in constant time.
        is_right = hmac.compare_digest(shown.strip().encode("latin-1", "replace"), self.token.encode())
        if scheme.lower() != "bearer" or not is_right:
            message = "`Authorization` must be `Bearer` with the token of this service. Got another or none; send it."
            raise ServiceError(401, message, code="invalid_api_key")


class Gate:
    """Lets requests through to an ASGI application within limits.

    Args:
        app: The application.
        limits: What requests may ask for.
        access: Who may ask.
        metrics: Where answers are counted.
        paths: The paths that are counted by name.
        open_paths: Those that need no token in any case.
        guarded: What paths begin with that need it in every case.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        access: Access,
        metrics: Metrics,
        paths: Collection[str],
        open_paths: Collection[str],
        guarded: str,
    ) -> None:
        self._app = app
        self._limits = limits
        self._access = access
        self._metrics = metrics
        self._paths = frozenset(paths)
        self._open_paths = frozenset(open_paths)
        self._guarded = guarded
        self._bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, began = scope["path"], time.monotonic()
        name = path if path in self._paths else "other"
        kept = 0

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(name, str(message["status"])).inc()
                self._metrics.request_seconds.labels(name).observe(time.monotonic() - began)
            await send(message)

        try:
            headers = dict(scope["headers"])
            if path.startswith(self._guarded) or (self._access.for_all and path not in self._open_paths):
                self._access.check(headers.get(b"authorization", b"").decode("latin-1"))
            body = await self._read(headers, receive)
            kept = len(body)
            await self._app(scope, _replay(body, receive), counted)
        except ServiceError as error:
            await _drain(receive)
            await send_error(error, counted)
        except ClientGoneError:
            return
        finally:
            self._take(-kept)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Reads a request's body; its bytes are counted until it is answered."""
        body, more, limits = bytearray(), True, self._limits
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limits.max_body_bytes:
            raise _too_large(limits)
        try:
            async with asyncio.timeout(limits.request_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part, more = message.get("body", b""), message.get("more_body", False)
                    if len(body) + len(part) > limits.max_body_bytes:
                        raise _too_large(limits)
                    if self._bytes + len(part) > limits.max_waiting_bytes:
                        rule = "the service has as many requests in work as fit into its memory; send it again later."
                        raise ServiceError(429, rule, code="overloaded", retry_after=1)
                    body += part
                    self._take(len(part))
        except BaseException as error:
            self._take(-len(body))
            if isinstance(error, TimeoutError):
                rule = f"a request must be sent within {limits.request_seconds:g} s. Got a slower one; send less."
                raise ServiceError(408, rule, code="timeout") from error
            raise
        return bytes(body)

    def _take(self, number: int) -> None:
        self._bytes += number
        self._metrics.waiting_bytes.set(self._bytes)


class ClientGoneError(Exception):
    """The client has left before its request was whole."""


async def send_error(error: ServiceError, send: Send) -> None:
    """Answers a request with an error."""
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _too_large(limits: Limits) -> ServiceError:
    rule = f"a request must be of at most {limits.max_body_bytes:,} bytes. Got more; send fewer or smaller images."
    return ServiceError(413, rule, code="request_too_large")


async def _drain(receive: Receive) -> None:
    size = 0
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while size < _DRAINED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return parts.pop() if parts else await receive()

    return replayed
