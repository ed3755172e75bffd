"""Proxies in the environment: what is on this machine is reached without them."""

import os
import socket
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from modeling_udon.proxies import go_past_proxies

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "x")  # so that it is put back, whatever a test does
        monkeypatch.setenv(name.upper(), "x")
        del os.environ[name], os.environ[name.upper()]


@pytest.fixture
def asked() -> Iterator[list[bytes]]:
    """What a proxy was asked, after its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = [str(server.getsockname()[1]).encode()]

        def answer() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    found.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield found
        server.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.mark.skipif(find_spec("gradio") is None, reason='the page needs gradio: pip install "modeling-udon[demo]"')
def test_the_page_starts_behind_a_proxy_that_is_asked_nothing(
    serve_page: Any, asked: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = f"http://127.0.0.1:{asked[0].decode()}"
    for name in NAMES[:3]:
        monkeypatch.setenv(name, proxy)
        monkeypatch.setenv(name.upper(), proxy)
    monkeypatch.setenv("NO_PROXY", "example.org")
    with serve_page():
        pass
    assert asked[1:] == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({"https_proxy": ""}, None),
        ({"HTTP_PROXY": "http://p:1"}, "localhost,127.0.0.1,::1,10.0.0.7"),
        ({"http_proxy": "http://p:1", "no_proxy": "*"}, "*"),
        ({"http_proxy": "http://p:1", "NO_PROXY": " a.org, localhost"}, "a.org,localhost,127.0.0.1,::1,10.0.0.7"),
        ({"all_proxy": "socks5://p:1", "no_proxy": "b", "NO_PROXY": "c"}, "b,localhost,127.0.0.1,::1,10.0.0.7"),
    ],
)
def test_what_was_reached_without_a_proxy_still_is(
    before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    go_past_proxies("10.0.0.7")
    assert os.environ.get("no_proxy") == after
