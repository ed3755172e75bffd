"""Decoder processes: image bytes become pixels of the model's size, in bounded time, outside of the server's process.

A decoder that takes too long is killed and replaced, which no thread allows. Its answers are raw pixels or text, never
pickles: a process that a hostile file has taken over can say nothing that runs here.
"""

import multiprocessing
import multiprocessing.context
import signal
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from modeling_udon.data.images import decode_image, use_one_thread
from modeling_udon.data.transforms import ImageTransform
from modeling_udon.search.thumbnails import make_thumbnail

_START_SECONDS = 120
_HEAD = struct.Struct("<cII")
_PIXELS, _REASON = b"p", b"r"
_BARE, _WITH_THUMBNAIL = b"b", b"t"


class UnreadableError(ValueError):
    """An image that cannot be decoded; the message goes on from the name of its field."""


class Decoded(NamedTuple):
    """Pixels of the model's size, `(height, width, 3)`, uint8, and a small JPEG, empty if none was asked for."""

    pixels: np.ndarray
    thumbnail: bytes


class DecoderPool:
    """Processes that decode images.

    Args:
        transform: Turns a decoded image into one of the model's size.
        num_workers: Processes.
        seconds: Time for an image.
        max_pixels: Pixels of an image.
    """

    def __init__(self, transform: ImageTransform, num_workers: int, seconds: float, max_pixels: int) -> None:
        self._transform = transform
        self._seconds = seconds
        self._max_pixels = max_pixels
        # Forks of a server that has no threads and no model: quick to start, also while the service runs.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._workers = [self._start() for _ in range(num_workers)]
        for worker in self._workers:
            worker.wait_until_ready()
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(num_workers, "decoder")
        self._lock = threading.Lock()
        self._closed = False

    def decode(self, data: bytes, thumbnail: bool = False) -> "Future[Decoded]":
        """Decodes an image file when a process is free; the answer may be an `UnreadableError`.

        Args:
            data: The file's bytes.
            thumbnail: Whether to make one.
        """
        return self._threads.submit(self._decode, data, thumbnail)

    def close(self) -> None:
        """Ends the processes; images that still wait are given up."""
        with self._lock:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown()

    def _start(self) -> "_Worker":
        return _Worker(self._context, self._transform, self._max_pixels)

    def _decode(self, data: bytes, thumbnail: bool) -> Decoded:
        with self._taken() as worker:
            return worker.ask((_WITH_THUMBNAIL if thumbnail else _BARE) + data, self._seconds)

    @contextmanager
    def _taken(self) -> Iterator["_Worker"]:
        worker = self._idle.get()
        try:
            yield worker
        finally:
            with self._lock:
                if not worker.is_alive and not self._closed:
                    self._workers.remove(worker)
                    worker = self._start()
                    self._workers.append(worker)
            self._idle.put(worker)


class _Worker:
    """A process that decodes one image after the other."""

    def __init__(self, context: "multiprocessing.context.ForkServerContext", *arguments: object) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._ready = False
        self.is_alive = True

    def wait_until_ready(self) -> None:
        """Waits until the process has loaded what it needs.

        Raises:
            RuntimeError: If it does not start.
        """
        if not self._ready:
            if not self._pipe.poll(_START_SECONDS):
                raise RuntimeError(f"a decoder did not start within {_START_SECONDS} seconds")
            self._pipe.recv_bytes()
            self._ready = True

    def ask(self, message: bytes, seconds: float) -> Decoded:
        """Has an image decoded, whose bytes follow what is wanted.

        The process is dead afterwards if it took too long or ended by itself.

        Raises:
            UnreadableError: If the image cannot be decoded.
        """
        try:
            self.wait_until_ready()
            self._pipe.send_bytes(message)
            if not self._pipe.poll(seconds):
                self.kill()
                raise UnreadableError(f"must be decoded within {seconds:g} s. Got one that takes longer; shrink it.")
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            self.kill()
            raise UnreadableError(
                "must be an image that decodes in bounded memory. Got one whose decoder was ended; shrink it."
            ) from error
        kind, height, width = _HEAD.unpack_from(answer)
        if kind == _REASON:
            raise UnreadableError(answer[_HEAD.size :].decode())
        size = height * width * 3
        pixels = np.frombuffer(answer, np.uint8, size, _HEAD.size).reshape(height, width, 3)
        return Decoded(pixels, answer[_HEAD.size + size :])

    def kill(self) -> None:
        """Ends the process."""
        self.is_alive = False
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, transform: ImageTransform, max_pixels: int) -> None:
    """Decodes what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the server's, which first answers what it has begun.
    use_one_thread()
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        try:
            image = decode_image(message[1:], max_pixels)
            pixels = np.ascontiguousarray(transform(image))
            small = make_thumbnail(image) if message[:1] == _WITH_THUMBNAIL else b""
            answer = _HEAD.pack(_PIXELS, *pixels.shape[:2]) + pixels.tobytes() + small
        except (ValueError, OSError, MemoryError) as error:
            reason = " ".join(str(error).split()).removeprefix("data ") or "must fit into memory; shrink it"
            answer = _HEAD.pack(_REASON, 0, 0) + reason.encode("utf-8", "backslashreplace")
        pipe.send_bytes(answer)
