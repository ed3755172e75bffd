"""Images of requests become embeddings: fetched or unpacked, decoded in processes, encoded in shared batches."""

import asyncio
import base64
import binascii
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from modeling_udon.encoder import Encoder
from modeling_udon.serving.batching import Batcher
from modeling_udon.serving.decoding import DecoderPool, UnreadableError
from modeling_udon.serving.fetching import Fetcher
from modeling_udon.serving.limits import Limits, ServiceError, refusal
from modeling_udon.serving.metrics import Metrics

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.ASCII | re.IGNORECASE)
_NUM_FETCHERS = 8
# Of the speed by which clients are told when to come back.
_MEMORY = 0.9


class ReadImage(NamedTuple):
    """An image of a request.

    Attributes:
        embedding: Of shape `(dim,)`, float32, unit norm.
        sha256: Digest of its bytes, empty if it was not asked for.
        num_bytes: Their number.
        thumbnail: A small JPEG, empty if it was not asked for.
    """

    embedding: np.ndarray
    sha256: str
    num_bytes: int
    thumbnail: bytes


class ImageService:
    """Turns images of requests into embeddings.

    Args:
        encoder: The model, on its device.
        limits: What requests may ask for.
        fetcher: Fetches images by address, where that is allowed.
        metrics: Where images are counted.
    """

    def __init__(self, encoder: Encoder, limits: Limits, fetcher: Fetcher, metrics: Metrics) -> None:
        self.encoder = encoder
        self._limits = limits
        self._fetcher = fetcher
        self._metrics = metrics
        # First, before there are threads.
        self._decoders = DecoderPool(encoder.transform, limits.num_decoders, limits.decode_seconds, limits.max_pixels)
        self._fetchers = ThreadPoolExecutor(_NUM_FETCHERS, "fetcher")
        self._images_per_second = 0.0
        self._num_waiting = 0
        device = next(iter(encoder.network.parameters()), torch.empty(0)).device
        self._batcher = Batcher(
            lambda pixels: encoder(torch.from_numpy(pixels).to(device)).cpu().numpy(),
            limits.max_batch,
            limits.max_wait,
            self._observe,
        )

    @property
    def is_ready(self) -> bool:
        """Whether images can be encoded."""
        return self._batcher.is_alive

    async def embed(self, images: Sequence[str], names: Sequence[str]) -> np.ndarray:
        """Embeds images, as `read`: shape `(num_images, dim)`, float32, unit norm."""
        return np.stack([image.embedding for image in await self.read(images, names)])

    async def read(self, images: Sequence[str], names: Sequence[str], facts: bool = False) -> list[ReadImage]:
        """Embeds images.

        Args:
            images: Each a data URI, base64, or an address where these are allowed.
            names: What each is called in the request.
            facts: Whether their digests and thumbnails are wanted too.

        Raises:
            ServiceError: 400 for an image that cannot be read, 429 where too many wait, 503 where it takes too long.
        """
        with self._admitted(len(images)):
            try:
                async with asyncio.timeout(self._limits.request_seconds), asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._read(image, name, facts))
                        for image, name in zip(images, names, strict=True)
                    ]
            except* ServiceError as errors:
                raise _first(errors) from None
            except* TimeoutError:
                message = f"the service could not answer within {self._limits.request_seconds:g} s; send fewer images."
                raise ServiceError(503, message, code="timeout", retry_after=self._seconds_to_wait()) from None
        return [task.result() for task in tasks]

    def close(self) -> None:
        """Ends the processes and threads."""
        self._batcher.close()
        self._decoders.close()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    async def _read(self, image: str, name: str, facts: bool) -> ReadImage:
        loop = asyncio.get_running_loop()
        try:
            if _ADDRESS.match(image):
                data = await loop.run_in_executor(self._fetchers, self._fetcher.fetch, image)
            else:
                data = unpack(image, self._limits.max_image_bytes)
            decoded = await asyncio.wrap_future(self._decoders.decode(data, facts))
        except UnreadableError as error:
            self._metrics.unreadable.inc()
            raise refusal(f"`{name}` {error}", name, "invalid_image") from error
        embedding = await asyncio.wrap_future(self._batcher.submit(decoded.pixels))
        if not np.isfinite(embedding).all():
            raise ServiceError(500, f"the model gives no finite embedding for `{name}`; send another image.", name)
        sha256 = hashlib.sha256(data).hexdigest() if facts else ""
        return ReadImage(embedding, sha256, len(data), decoded.thumbnail)

    @contextmanager
    def _admitted(self, number: int) -> Iterator[None]:
        """Counts images while they are in work, and refuses them where too many are."""
        if self._num_waiting + number > self._limits.max_waiting:
            message = f"{self._num_waiting} images are waiting, and {number} more do not fit; send them again later."
            raise ServiceError(429, message, code="overloaded", retry_after=self._seconds_to_wait())
        self._count(number)
        try:
            yield
        finally:
            self._count(-number)

    def _count(self, number: int) -> None:
        self._num_waiting += number
        self._metrics.waiting_images.set(self._num_waiting)

    def _seconds_to_wait(self) -> int:
        """When half of what waits now will be done."""
        return max(math.ceil(self._num_waiting / 2 / self._images_per_second), 1) if self._images_per_second else 1

    def _observe(self, size: int, seconds: float) -> None:
        self._metrics.observe_batch(size, seconds)
        speed = size / max(seconds, 1e-6)
        self._images_per_second = _MEMORY * (self._images_per_second or speed) + (1 - _MEMORY) * speed


def unpack(image: str, max_bytes: int) -> bytes:
    """The bytes of a data URI or of base64.

    Raises:
        UnreadableError: If it is neither, or larger; the message goes on from the name of its field.
    """
    start = _DATA_URI.match(image)
    if image[:5].lower() == "data:" and start is None:
        raise UnreadableError("must be a data URI with base64. Got another; begin it with `data:image/jpeg;base64,`.")
    text = image[start.end() :] if start else image
    if len(text) > (max_bytes + 2) // 3 * 4 + max_bytes // 32:  # lines may be broken
        raise UnreadableError(f"must be a file of at most {max_bytes:,} bytes. Got more; shrink the image.")
    try:
        if "\n" in text or "\r" in text:
            text = text.replace("\r", "").replace("\n", "")
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UnreadableError(
            "must be an image in base64 or a data URI. Got text that is no base64; encode the image file's bytes."
        ) from error
    if len(data) > max_bytes:
        raise UnreadableError(f"must be a file of at most {max_bytes:,} bytes. Got {len(data):,}; shrink the image.")
    return data


def _first(errors: "BaseExceptionGroup[ServiceError]") -> ServiceError:
    found = errors.exceptions[0]
    return found if isinstance(found, ServiceError) else _first(found)
