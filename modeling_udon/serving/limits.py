"""Limits of the service, and the errors that it answers with, in OpenAI's form."""

from dataclasses import dataclass, field
from typing import Any

from modeling_udon.data.images import num_cores


@dataclass(frozen=True)
class Limits:
    """What one request and all requests together may ask for.

    Attributes:
        max_body_bytes: Size of a request.
        max_waiting_bytes: Size of all requests that are being read or answered.
        max_image_bytes: Size of an image file.
        max_pixels: Pixels of an image; its header is checked before it is decoded.
        max_items: Images of a request.
        max_waiting: Images that are being decoded, wait, or are being encoded; more are answered 429.
        max_neighbours: Neighbours of a search.
        decode_seconds: Time to decode an image; then its process is killed.
        request_seconds: Time to send a request, and time to answer it.
        max_batch: Images of one forward pass.
        max_wait: Seconds that an image waits for others to share its forward pass.
        num_decoders: Processes that decode.
    """

    max_body_bytes: int = 32 * 2**20
    max_waiting_bytes: int = 256 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_pixels: int = 50_000_000
    max_items: int = 128
    max_waiting: int = 512
    max_neighbours: int = 1000
    decode_seconds: float = 10.0
    request_seconds: float = 60.0
    max_batch: int = 32
    max_wait: float = 0.005
    num_decoders: int = field(default_factory=lambda: max(num_cores() // 2, 2))


class ServiceError(Exception):
    """An answer that refuses a request.

    Args:
        status: HTTP status.
        message: One line for the user.
        param: The field of the request that is wrong.
        code: What programs can tell it by.
        retry_after: Seconds after which the request may be sent again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """The answer's JSON, as clients of OpenAI read it."""
        return {"error": {"message": str(self), "type": _kind(self.status), "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """The answer's headers."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return found | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def refusal(message: str, param: str | None = None, code: str | None = None) -> ServiceError:
    """An error of the request itself, 400."""
    return ServiceError(400, message, param, code)


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
