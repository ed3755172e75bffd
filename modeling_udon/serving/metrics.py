"""Prometheus metrics of the service."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters and times of one service, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("udon_requests", "Requests answered", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "udon_request_seconds", "Time to answer a request", ["path"], buckets=_SECONDS, registry=registry
        )
        self.images = Counter("udon_images", "Images encoded", registry=registry)
        self.unreadable = Counter("udon_unreadable_images", "Images that could not be read", registry=registry)
        self.batch_size = Histogram("udon_batch_size", "Images of a forward pass", buckets=_SIZES, registry=registry)
        self.encode_seconds = Histogram(
            "udon_encode_seconds", "Time of a forward pass", buckets=_SECONDS, registry=registry
        )
        self.search_seconds = Histogram(
            "udon_search_seconds", "Time of a search of the index", buckets=_SECONDS, registry=registry
        )
        self.waiting_images = Gauge(
            "udon_waiting_images", "Images being decoded, waiting or being encoded", registry=registry
        )
        self.waiting_bytes = Gauge("udon_waiting_bytes", "Bytes of the requests in work", registry=registry)
        self.index_images = Gauge("udon_index_images", "Images of the index", registry=registry)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Counts a forward pass."""
        self.images.inc(size)
        self.batch_size.observe(size)
        self.encode_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of them as Prometheus reads them."""
        return generate_latest(self._registry)
