"""One thread that encodes: images of concurrent requests share its forward passes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NamedTuple

import numpy as np

Encode = Callable[[np.ndarray], np.ndarray]


class _Job(NamedTuple):
    pixels: np.ndarray
    answer: "Future[np.ndarray]"


class Batcher:
    """Collects images into batches and encodes them in one thread.

    While a batch is encoded, the next one gathers; only an idle encoder waits, at most `max_wait` seconds.

    Args:
        encode: Takes pixels of shape `(batch_size, height, width, 3)`, uint8, and gives `(batch_size, dim)`, float32.
        max_batch: Images of a batch.
        max_wait: Seconds that the first image of a batch waits for others.
        observe: Called with the size of each batch and the seconds that it took.
    """

    def __init__(
        self, encode: Encode, max_batch: int, max_wait: float, observe: Callable[[int, float], None] = lambda *_: None
    ) -> None:
        self._encode = encode
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._observe = observe
        self._waiting: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether images are being encoded."""
        return self._thread.is_alive()

    def submit(self, pixels: np.ndarray) -> "Future[np.ndarray]":
        """Encodes an image, `(height, width, 3)`, uint8, with the next batch; one that is cancelled is left out."""
        job = _Job(pixels, Future())
        self._waiting.put(job)
        return job.answer

    def close(self) -> None:
        """Encodes what waits and ends the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], time.monotonic() + self._max_wait
            closing = False
            with suppress(Empty):
                while len(batch) < self._max_batch and not closing:
                    job = self._waiting.get(timeout=max(last - time.monotonic(), 0))
                    closing = job is None
                    batch += [] if job is None else [job]
            self._answer([job for job in batch if job.answer.set_running_or_notify_cancel()])
            if closing:
                return

    def _answer(self, batch: list[_Job]) -> None:
        if not batch:
            return
        began = time.monotonic()
        try:
            embeddings = self._encode(np.stack([job.pixels for job in batch]))
        except (
            Exception
        ) as error:  # Whatever it is, the requests of this batch are told, and the next batch is encoded.
            for job in batch:
                job.answer.set_exception(error)
            return
        for job, embedding in zip(batch, embeddings, strict=True):
            job.answer.set_result(embedding)
        self._observe(len(batch), time.monotonic() - began)
