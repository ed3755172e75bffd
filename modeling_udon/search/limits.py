"""What one address may ask of the page: a number of requests a minute."""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, NamedTuple

SECONDS = 60

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
            # Starting anew each minute, the counts stay as few as the addresses of one.
            self._minute, self._sent = minute, Counter()
        self._sent[address] += 1
        return self._sent[address] <= self._per_minute


class Middleware(NamedTuple):
    """A layer around the server with its arguments, as Starlette takes them apart; Gradio brings Starlette along."""

    layer: Any
    positional: tuple[Any, ...]
    named: dict[str, Any]
