"""What /metrics says, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)
GAP_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.15, 0.2, 0.25, 0.5, 1, 2, 5)


class Metrics:
    """Counts and times of a server. Its methods may be called in any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "apb_requests", "Requests that were answered or refused", ["path", "status"], registry=registry
        )
        self._tokens = Counter("apb_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._first = Histogram(
            "apb_first_token_seconds", "From a request to its first token", buckets=FIRST_TOKEN_S, registry=registry
        )
        self._gaps = Histogram("apb_token_gap_seconds", "Between two tokens", buckets=GAP_S, registry=registry)
        self._loads = Histogram(
            "apb_load_seconds", "Prefills and loads of documents", ["source"], buckets=FIRST_TOKEN_S, registry=registry
        )
        self._under_way = Gauge("apb_requests_under_way", "Requests by state", ["state"], registry=registry)
        self._documents = Gauge("apb_documents", "Documents by place", ["place"], registry=registry)
        self._bytes = Gauge("apb_document_bytes", "Bytes of documents on a rank", ["place"], registry=registry)
        for kind in ("prompt", "cached", "new"):
            self._tokens.labels(kind)

    def count_request(self, path: str, status: int) -> None:
        """Count a response."""
        self._requests.labels(path, str(status)).inc()

    def count_tokens(self, prompt: int, cached: int, new: int) -> None:
        """Count an answer's tokens."""
        for kind, number in (("prompt", prompt), ("cached", cached), ("new", new)):
            self._tokens.labels(kind).inc(number)

    def observe_first_token(self, seconds: float) -> None:
        """Note how long a request waited for its first token."""
        self._first.observe(seconds)

    def observe_gap(self, seconds: float) -> None:
        """Note how long the next token of an answer took."""
        self._gaps.observe(seconds)

    def observe_load(self, source: str, seconds: float) -> None:
        """Note how long a document took from a source: ``prefill``, ``host`` or ``disk``."""
        self._loads.labels(source).observe(seconds)

    def set_requests(self, running: int, waiting: int) -> None:
        """Say how many requests there are now."""
        self._under_way.labels("running").set(running)
        self._under_way.labels("waiting").set(waiting)

    def set_documents(self, found: Mapping[str, tuple[int, int]]) -> None:
        """Say what there is now: number and bytes of documents by place."""
        for place, (number, num_bytes) in found.items():
            self._documents.labels(place).set(number)
            self._bytes.labels(place).set(num_bytes)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)
