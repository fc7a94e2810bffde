"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one server; a registry of its own, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("transfuse_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "transfuse_request_seconds",
            "From a request's first byte to its answer's last",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.queued_seconds = Histogram(
            "transfuse_queued_seconds", "From a request's arrival to its first tick", buckets=SECONDS, registry=registry
        )
        self.first_seconds = Histogram(
            "transfuse_first_output_seconds",
            "To the first text, preview or picture",
            ["kind"],
            buckets=SECONDS,
            registry=registry,
        )
        self.waiting = Gauge("transfuse_waiting", "Requests that wait for a slot", registry=registry)
        self.running = Gauge("transfuse_running", "Requests that have a slot", registry=registry)
        self.cost = Gauge("transfuse_cost", "Positions that may be computed for both, at most", registry=registry)
        self.text_tokens = Counter("transfuse_text_tokens", "Tokens written", registry=registry)
        self.images = Counter("transfuse_images", "Pictures drawn", registry=registry)
        self.evaluations = Counter("transfuse_network_evaluations", "Denoising steps, or codes", registry=registry)
        self.rejected = Counter("transfuse_rejected", "Requests for which there was no room", registry=registry)
        self.cancelled = Counter("transfuse_cancelled", "Requests left before their end", registry=registry)
        self.expired = Counter("transfuse_expired", "Requests whose deadline passed", registry=registry)
        self.restarts = Counter("transfuse_worker_restarts", "Workers that died and were replaced", registry=registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)
