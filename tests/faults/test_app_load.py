"""The page before strangers: requests that are none, too many of them, and 500 of which a tenth is bad."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from modeling_udon.encoder import Encoder

pytest.importorskip("gradio", reason='the page needs gradio: pip install "modeling-udon[demo]"')
import httpx

from modeling_udon.search.page_answers import answer, answer_request, open_side

NUM_REQUESTS, AT_A_TIME = 500, 20
MAX_SECONDS = 300


@dataclass(frozen=True)
class Visitor:
    """Sends requests to a page, as a program would."""

    address: str
    client: httpx.Client

    def upload(self, content: bytes) -> httpx.Response:
        return self.client.post(f"{self.address}gradio_api/upload", files={"files": content})

    def search(self, *values: Any) -> str:
        """The answer, or what stands in its place."""
        call = f"{self.address}gradio_api/call/search"
        sent = self.client.post(call, json={"data": values})
        if sent.status_code != 200:
            return f"{sent.status_code} {sent.text}"
        told = self.client.get(f"{call}/{sent.json()['event_id']}").text
        event, _, data = told.strip().partition("\ndata: ")
        return json.loads(data)[0] if event == "event: complete" else data


def file_data(path: object, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, **more}


@contextmanager
def visiting(address: str) -> Iterator[Visitor]:
    with httpx.Client(timeout=MAX_SECONDS) as client:
        yield Visitor(address, client)


@pytest.fixture(scope="module")
def served(serve_page, searchable):
    arguments = ("--requests-per-minute", 0, "--examples", searchable.pictures / "plants")
    with serve_page(*arguments) as page:
        yield page


@pytest.fixture(scope="module")
def visitor(served) -> Iterator[Visitor]:
    with visiting(served.address) as one:
        yield one


@pytest.fixture(scope="module")
def uploaded(visitor: Visitor, searchable) -> str:
    return visitor.upload((searchable.pictures / "plants" / "1.png").read_bytes()).json()[0]


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another server's address, and what it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *values: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_a_request_reads_no_file_that_was_not_uploaded(visitor, uploaded, searchable, elsewhere, tmp_path) -> None:
    known = searchable.pictures / "plants" / "1.png"
    link = Path(uploaded).with_name("link.png")
    link.symlink_to(known)
    address, asked = elsewhere
    try:
        for picture in (
            file_data(known), {"path": str(known)}, {"path": "/etc/passwd"}, {"path": f"{uploaded}/../../../x"},
            {"path": str(link)}, {"path": "/dev/zero"}, file_data(f"{address}/a.png"), {"path": f"{address}/b.png"},
            {"path": str(known), "url": uploaded}, [file_data(known)], str(known),
        ):  # fmt: skip
            told = visitor.search(picture, "", 3)
            assert "plants/1.png" not in told and "root:" not in told and "<li>" not in told
    finally:
        link.unlink()
    # An address beside an upload is not asked either.
    assert "plants/1.png" in visitor.search(file_data(uploaded, url=f"{address}/c.png"), "", 3)
    assert asked == []
    for path in ("/etc/passwd", known, searchable.index / "index.json"):
        assert visitor.client.get(f"{visitor.address}gradio_api/file={path}").status_code == 403


# A name that leads to this machine and counts as an address anywhere on the web.
PUBLIC = """
import ipaddress, socket, safehttpx
lookup = socket.getaddrinfo
def found(host, *more, **named):
    return lookup("127.0.0.1" if host == "pictures.example" else host, *more, **named)
socket.getaddrinfo = found
safehttpx.is_public_ip = lambda ip: True
"""


def test_no_address_that_a_client_names_is_fetched_though_it_be_public(serve_page, searchable, elsewhere) -> None:
    address, asked = elsewhere
    public = address.replace("127.0.0.1", "pictures.example")
    with serve_page("--requests-per-minute", 0, before=PUBLIC) as page, visiting(page.address) as one:
        # Not the picture of the other page: what a page was sent it deletes at its end, and names are by content.
        picture = one.upload((searchable.pictures / "tools" / "2.png").read_bytes()).json()[0]
        for path in (f"{public}/a.png", f"{public}/b.png".replace("http", "HTTP"), f" {public}/c.png"):
            for values in (
                (file_data(path), "", 3),
                ({"path": path}, "", 3),
                (file_data(picture), file_data(path), 3),
                (file_data(picture), "", [{"x": file_data(path)}]),
            ):
                assert one.search(*values).startswith("400 A picture must be uploaded")
            data = {"data": [file_data(path), "", 3], "fn_index": 0, "session_hash": "x"}
            for call in ("gradio_api/queue/join", "gradio_api/run/search", "gradio_api/api/search"):
                assert one.client.post(page.address + call, json=data).status_code == 400
            encoded = json.dumps(data).encode("utf-16")
            assert one.client.post(page.address + "gradio_api/queue/join", content=encoded).status_code == 400
        assert asked == [] and "tools/2.png" in one.search(file_data(picture), "", 3)
        assert one.client.post(page.address + "gradio_api/queue/join", content=bytes(2**21)).status_code == 413


def test_a_header_does_not_make_another_address_of_a_client(serve_page) -> None:
    with serve_page("--requests-per-minute", 2) as page, visiting(page.address) as one:
        while time.monotonic() % 60 > 50:  # the minute must not end in between
            time.sleep(0.5)
        call, files = f"{page.address}gradio_api/upload", {"files": b"x"}
        told = [one.client.post(call, files=files, headers={"X-Forwarded-For": f"10.0.0.{n}"}) for n in range(4)]
        assert [answer.status_code for answer in told] == [200, 200, 429, 429]


@pytest.mark.parametrize(
    ("domain", "k"),
    [("", "many"), ("", None), ("", [1]), ("", {}), (3, 3), (["plants"], 3), ({"a": 1}, 3), ("", "1e999"), ("", True)],
)
def test_a_request_of_wrong_values_is_answered(visitor, uploaded, domain: Any, k: Any) -> None:
    told = visitor.search(file_data(uploaded), domain, k)
    if k is True:  # which is 1
        assert told.count("<li>") == 1
    else:
        assert "<b>This request cannot be read.</b>" in told


@pytest.mark.parametrize("k", [float("nan"), float("inf"), -float("inf")])
def test_no_number_of_neighbours_is_none_that_counts(searchable, k: float) -> None:
    assert "This request cannot be read." in answer_request([], None, "", k)


def test_neither_the_page_nor_an_answer_tells_where_things_lie(visitor, uploaded, searchable) -> None:
    home = str(searchable.model.parent)
    answers = [visitor.search(file_data(uploaded), domain, 12) for domain in ("", "plants", "nowhere")]
    answers += [visitor.search(file_data(home), "", 3), visitor.search()]
    pages = [visitor.client.get(visitor.address + path).text for path in ("", "config", "gradio_api/info")]
    assert all(home not in text and str(Path(__file__).parents[2]) not in text for text in answers + pages)


def test_an_address_that_asks_too_often_is_told_to_wait(serve_page) -> None:
    with serve_page("--requests-per-minute", 6) as page, visiting(page.address) as one:
        while time.monotonic() % 60 > 50:  # the minute must not end in between
            time.sleep(0.5)
        statuses = [one.upload(b"x").status_code for _ in range(9)]
        assert statuses == [200] * 6 + [429] * 3
        assert one.client.get(page.address).status_code == 200


def resident_megabytes(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def bad_requests(folder: Path) -> list[Callable[[Visitor], tuple[str, str]]]:
    """Each sends a bad request; gives what came back and what it must hold."""
    Image.new("RGB", (64, 64), "red").save(folder / "cut.png")
    Image.new("1", (12_000, 12_000)).save(folder / "bomb.png")
    contents = {
        "It must be an image (JPEG": b"<script>alert(1)</script>",
        "It must be the bytes of an image file": b"",
        "It must be a whole image": (folder / "cut.png").read_bytes()[:100],
        "It must be an image of at most 89,478,485 pixels": (folder / "bomb.png").read_bytes(),
    }

    def send(content: bytes, words: str) -> Callable[[Visitor], tuple[str, str]]:
        return lambda one: (one.search(file_data(one.upload(content).json()[0]), "", 3), words)

    requests = [send(content, words) for words, content in contents.items()]
    requests.append(lambda one: (str(one.upload(bytes(21 * 2**20)).status_code), "413"))
    requests.append(lambda one: (one.search({"path": "/etc/passwd"}, "", 3), "This request cannot be read."))
    requests.append(lambda one: (one.search("nonsense", 7), '"error": null'))
    return requests


@pytest.mark.long
def test_500_requests_20_at_a_time_are_answered_right_in_bounded_time_and_memory(
    served, visitor, searchable, tmp_path, tell
) -> None:
    side = open_side(searchable.index, lambda: Encoder.open(str(searchable.model)))
    pictures = sorted(searchable.pictures.rglob("*.png"))
    domains = ["", *side.index.domains()]
    expected = {
        (picture, domain): unescape(answer([side], picture, domain, 5)) for picture in pictures for domain in domains
    }
    bad, good = cycle(bad_requests(tmp_path)), cycle(expected)
    jobs = [next(bad) if number % 10 == 5 else next(good) for number in range(NUM_REQUESTS)]
    seconds: list[float] = []
    memory: list[float] = []

    def ask(job: Any) -> None:
        began = time.perf_counter()
        if callable(job):
            told, words = job(visitor)
            assert words in told, told[:300]
            return
        picture, domain = job
        path = visitor.upload(picture.read_bytes()).json()[0]
        told = visitor.search(file_data(path), domain, 5)
        seconds.append(time.perf_counter() - began)
        assert unescape(told) == expected[job]

    began = time.perf_counter()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for done, _ in enumerate(pool.map(ask, jobs), 1):
            if done % 50 == 0:
                memory.append(resident_megabytes(served.process))
    took = time.perf_counter() - began
    p95 = float(np.percentile(seconds, 95))
    slope = (memory[-1] - memory[3]) / (NUM_REQUESTS - 200)
    tell(
        f"requests to the page, {AT_A_TIME} at a time, {NUM_REQUESTS - len(seconds)} of them bad: {took:.1f} s; right "
        f"answers: median {np.median(seconds):.2f} s, p95 {p95:.2f} s; memory {memory[0]:.0f} MiB after 50, "
        f"{memory[3]:.0f} after 200, {memory[-1]:.0f} after {NUM_REQUESTS} ({1024 * slope:.0f} KiB a request)",
        NUM_REQUESTS,
        0,
    )
    assert len(seconds) == NUM_REQUESTS * 9 // 10
    assert took < MAX_SECONDS and p95 < MAX_SECONDS / 10
    assert memory[-1] - memory[3] < 64
