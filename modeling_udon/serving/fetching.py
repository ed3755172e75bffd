"""Images by address: only from hosts on a list, only from public addresses, in bounded time and size.

The name is resolved once and the connection goes to the very address that was checked, so that a name server cannot
give another one in between (DNS rebinding). Redirects are followed by the same rules.
"""

import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, urljoin, urlsplit

from modeling_udon.serving.decoding import UnreadableError

_MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_BLOCK = 2**16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Sequence[str]]


def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public Internet, whatever it may be wrapped into."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None,))[0]
        if inner is not None or found in _NAT64:
            return False
    return found.is_global and not found.is_multicast


@dataclass(frozen=True)
class Fetcher:
    """Fetches images from some hosts.

    Attributes:
        hosts: The names that addresses may have, in lower case; of none, nothing is fetched.
        max_bytes: Size of a file.
        seconds: Time for a file, redirects included.
        resolve: Finds the IP addresses of a host.
        is_allowed: Whether an IP address may be connected to.
        ports: The ports of the schemes that may be named.
    """

    hosts: frozenset[str]
    max_bytes: int
    seconds: float
    resolve: Resolve = resolve
    is_allowed: Callable[[str], bool] = is_public
    ports: dict[str, int] = field(default_factory=lambda: dict(_PORTS))

    def fetch(self, url: str) -> bytes:
        """Fetches a file.

        Raises:
            UnreadableError: If the address may not be fetched, or the file is not had within the limits; the message
                goes on from the name of its field.
        """
        for _ in range(_MAX_REDIRECTS + 1):
            parts = self._checked(url)
            try:
                location, data = self._get(parts)
            except UnreadableError:
                raise
            except (OSError, HTTPException, ValueError) as error:
                # What exactly went wrong would tell strangers about the network that the server stands in.
                raise UnreadableError(f"must be an address that answers. Got {url[:200]!r}; send the image.") from error
            if location is None:
                return data
            url = urljoin(url, location)
        raise UnreadableError(f"must be an address with at most {_MAX_REDIRECTS} redirects. Got more; send the image.")

    def _checked(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise UnreadableError(f"must be a whole address. Got {url[:200]!r}; send the image.") from None
        host = (parts.hostname or "").rstrip(".")
        if not self.hosts:
            raise UnreadableError(
                "must be an image in base64 or a data URI, since no address is fetched. Got an address; send the image."
            )
        known = parts.scheme in self.ports and port in (None, self.ports.get(parts.scheme))
        if not known or parts.username is not None or host not in self.hosts:
            raise UnreadableError(
                f"must be an address of a host that may be asked: {', '.join(sorted(self.hosts))}. Got {url[:200]!r}; "
                "send the image."
            )
        return parts

    def _get(self, parts: SplitResult) -> tuple[str | None, bytes]:
        """Asks for a file: where it has moved to, or its bytes."""
        host, port = (parts.hostname or "").rstrip("."), self.ports[parts.scheme]
        addresses = self.resolve(host, port)
        if not addresses or not all(map(self.is_allowed, addresses)):
            raise OSError("not a public address")
        connection = _Pinned(host, port, addresses[0], parts.scheme == "https", self.seconds)
        # A server that sends a byte now and then keeps every single wait short; this ends them all.
        clock = threading.Timer(self.seconds, connection.cut)
        clock.daemon = True
        clock.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
            answer = connection.getresponse()
            if answer.status in _REDIRECTS:
                return answer.headers["Location"], b""
            if answer.status != 200:
                raise OSError(f"status {answer.status}")
            data = self._read(answer)
            if connection.is_cut:  # which reads like the end of a file
                raise TimeoutError
            return None, data
        finally:
            clock.cancel()
            connection.close()

    def _read(self, answer: HTTPResponse) -> bytes:
        data = bytearray()
        while block := answer.read(_BLOCK):
            data += block
            if len(data) > self.max_bytes:
                raise UnreadableError(
                    f"must be a file of at most {self.max_bytes:,} bytes. Got more; shrink the image and send it."
                )
        if answer.length:
            raise OSError("cut short")
        return bytes(data)


class _Pinned(HTTPConnection):
    """A connection to one IP address, by whatever name the server is called."""

    def __init__(self, host: str, port: int, address: str, encrypted: bool, seconds: float) -> None:
        super().__init__(host, port, timeout=seconds)
        self._address = address
        self._encrypted = encrypted
        self.is_cut = False
        # `sock` is given up as soon as an answer without a length begins.
        self._open: socket.socket | None = None

    def connect(self) -> None:
        """Connects; the certificate is checked against the name."""
        self._open = self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._encrypted:
            context = ssl.create_default_context()
            self._open = self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        if self.is_cut:
            raise TimeoutError

    def cut(self) -> None:
        """Ends the connection, whatever it waits for."""
        self.is_cut = True
        if self._open is not None:
            with suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)
