"""Parts of the service: decoder processes, shared batches, and what is fetched by address."""

import os
import signal
import threading
import time
from concurrent.futures import wait
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import numpy as np
import pytest

from modeling_udon.data.images import decode_image
from modeling_udon.data.transforms import EvalTransform
from modeling_udon.search.thumbnails import make_thumbnail
from modeling_udon.serving.batching import Batcher
from modeling_udon.serving.decoding import DecoderPool, UnreadableError
from modeling_udon.serving.fetching import Fetcher, is_public


@pytest.fixture
def pool():
    opened = DecoderPool(EvalTransform(16), 1, 60, 10_000)
    yield opened
    opened.close()


def processes(pool):
    return [worker._process.pid for worker in pool._workers]


def test_a_decoder_gives_the_pixels_of_the_transform(pool, png):
    found = [pool.decode(png(seed)) for seed in range(5)]
    for seed, pixels in enumerate(found):
        np.testing.assert_array_equal(pixels.result().pixels, EvalTransform(16)(decode_image(png(seed))))


def test_a_decoder_makes_a_thumbnail_where_it_is_wanted(pool, png):
    kept = pool.decode(png(0), thumbnail=True).result().thumbnail
    assert kept == make_thumbnail(decode_image(png(0))) and pool.decode(png(0)).result().thumbnail == b""


def test_a_decoder_names_the_reason_and_goes_on(pool, png):
    before = processes(pool)
    with pytest.raises(UnreadableError, match="^must be an image"):
        pool.decode(b"no image").result()
    assert pool.decode(png(0)).result().pixels.shape == (16, 16, 3) and processes(pool) == before


def test_a_decoder_that_hangs_is_replaced_by_another(pool, png):
    (first,) = processes(pool)
    pool._seconds = 0.2
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(UnreadableError, match=r"^must be decoded within 0.2 s. Got one that takes longer"):
        pool.decode(png(0)).result()
    pool._seconds = 60
    assert pool.decode(png(1)).result().pixels.shape == (16, 16, 3)
    assert processes(pool) != [first]


def test_a_decoder_that_is_killed_is_replaced_by_another(pool, png):
    (first,) = processes(pool)
    os.kill(first, signal.SIGKILL)
    with pytest.raises(UnreadableError, match="Got one whose decoder was ended"):
        pool.decode(png(0)).result()
    assert pool.decode(png(1)).result().pixels.shape == (16, 16, 3)


def test_images_that_come_while_the_encoder_works_share_its_next_pass():
    begun, free, sizes = threading.Event(), threading.Event(), []

    def encode(pixels):
        begun.set()
        free.wait(30)
        sizes.append(len(pixels))
        return pixels[:, 0, 0].astype(np.float32)

    batcher = Batcher(encode, max_batch=4, max_wait=0.001)
    images = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    found = [batcher.submit(images[0])]
    begun.wait(30)
    found += [batcher.submit(image) for image in images[1:]]
    found[3].cancel()
    free.set()
    answers = {number: answer.result()[0] for number, answer in enumerate(found) if number != 3}
    batcher.close()
    assert answers == {number: number for number in range(10) if number != 3}
    assert sizes == [1, 3, 4, 1]


def test_a_batch_that_fails_harms_no_other():
    def encode(pixels):
        if pixels.max() > 100:
            raise RuntimeError("out of memory")
        return pixels[:, 0, 0].astype(np.float32)

    batcher = Batcher(encode, max_batch=1, max_wait=0)
    good, bad, other = (batcher.submit(np.full((1, 1, 3), value, np.uint8)) for value in (1, 200, 2))
    assert (good.result()[0], other.result()[0]) == (1, 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result()
    batcher.close()


def test_a_batcher_encodes_what_waits_before_it_ends():
    batcher = Batcher(lambda pixels: pixels[:, 0, 0].astype(np.float32), max_batch=2, max_wait=1)
    found = [batcher.submit(np.full((1, 1, 3), value, np.uint8)) for value in range(7)]
    batcher.close()
    assert all(answer.done() for answer in found) and wait(found, 0).not_done == set()


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1"),
        *("64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1"),
    ],
)
def test_an_address_of_a_private_network_is_not_public(address):
    assert not is_public(address)


def test_an_address_of_the_internet_is_public():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")


class Pictures(BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self):
        self.server.asked.append(self.path)
        path = urlsplit(self.path).path
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[len("/to/") :])
            self.end_headers()
            return
        self.send_response(404 if path == "/gone" else 200)
        if path == "/short":
            self.send_header("Content-Length", "100")
        self.end_headers()
        if path == "/slow":
            while not self.server.ended.wait(0.05):
                self.wfile.write(b"x")
        self.wfile.write(b"x" * (2000 if path == "/large" else 10))

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.asked, server.ended = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetcher(web):
    """Takes this machine for the host `pictures.test`, and for a public one."""
    names = {"pictures.test": ["127.0.0.1"], "inside.test": ["10.0.0.1"], "both.test": ["127.0.0.1", "10.0.0.1"]}
    return Fetcher(
        frozenset(names),
        max_bytes=1000,
        seconds=0.5,
        resolve=lambda host, port: names[host],
        is_allowed=lambda address: address == "127.0.0.1",
        ports={"http": web.server_port},
    )


def test_a_host_of_the_list_is_asked(fetcher, web):
    assert fetcher.fetch("http://pictures.test/a.png?b=c") == b"x" * 10
    assert fetcher.fetch("http://PICTURES.test./to/http://pictures.test/b") == b"x" * 10
    assert web.asked == ["/a.png?b=c", "/to/http://pictures.test/b", "/b"]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://other.test/", "must be an address of a host that may be asked"),
        ("http://pictures.test.evil.test/", "must be an address of a host that may be asked"),
        ("http://me@pictures.test/", "must be an address of a host that may be asked"),
        ("http://pictures.test@other.test/", "must be an address of a host that may be asked"),
        ("http://pictures.test:22/", "must be an address of a host that may be asked"),
        ("ftp://pictures.test/", "must be an address of a host that may be asked"),
        ("http://[::1", "must be a whole address"),
        ("http://127.0.0.1/", "must be an address of a host that may be asked"),
        ("http://inside.test/", "must be an address that answers"),
        ("http://both.test/", "must be an address that answers"),
        ("http://pictures.test/to/http://inside.test/", "must be an address that answers"),
        ("http://pictures.test/to/http://other.test/", "must be an address of a host that may be asked"),
        ("http://pictures.test/to/file:///etc/passwd", "must be an address of a host that may be asked"),
        ("http://pictures.test/to//to//to//to//to//a", "at most 3 redirects"),
        ("http://pictures.test/gone", "must be an address that answers"),
        ("http://pictures.test/short", "must be an address that answers"),
        ("http://pictures.test/a\r\nX: y", "must be an address that answers"),
        ("http://pictures.test/large", "must be a file of at most 1,000 bytes"),
    ],
)
def test_what_may_not_be_fetched_is_not(fetcher, web, url, words):
    with pytest.raises(UnreadableError, match=words):
        fetcher.fetch(url)
    assert not any("passwd" in path and not path.startswith("/to/") for path in web.asked)


def test_a_server_that_sends_slowly_is_left_in_time(fetcher):
    began = time.monotonic()
    with pytest.raises(UnreadableError, match="must be an address that answers"):
        fetcher.fetch("http://pictures.test/slow")
    assert time.monotonic() - began < 5


def test_a_name_is_looked_up_once_for_the_check_and_the_connection(web):
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    asked = []

    def resolve(host, port):
        asked.append(host)
        return next(answers)

    fetcher = Fetcher(
        frozenset({"pictures.test"}), 1000, 5, resolve, lambda found: found == "127.0.0.1", {"http": web.server_port}
    )
    assert fetcher.fetch("http://pictures.test/a") == b"x" * 10 and asked == ["pictures.test"]
