"""The metrics of a server, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""limits of the buckets of each histogram"""


class Metrics:
    """The counts that Prometheus reads, in a registry for each server."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        known: dict[str, Any] = {"namespace": "transfuse", "registry": registry}
        timed: dict[str, Any] = {**known, "buckets": SECONDS}
        self.registry = registry
        self.requests = Counter("requests", "HTTP requests", ["route", "status"], **known)
        self.seconds = Histogram(
            "request_seconds", "From a request's first byte to its response's last", ["route"], **timed
        )
        self.queued_seconds = Histogram("queued_seconds", "From a request's arrival to its first step", **timed)
        self.first_seconds = Histogram(
            "first_output_seconds", "To the first text, preview or picture", ["kind"], **timed
        )
        self.waiting = Gauge("waiting", "Requests that wait for a slot", **known)
        self.running = Gauge("running", "Requests that have a slot", **known)
        self.cost = Gauge("cost", "Positions that may be computed for both, at most", **known)
        self.text_tokens = Counter("text_tokens", "Tokens written", **known)
        self.images = Counter("images", "Pictures drawn", **known)
        self.evaluations = Counter("network_evaluations", "Denoising steps, or codes", **known)
        self.rejected = Counter("rejected", "Requests for which there was no room", **known)
        self.cancelled = Counter("cancelled", "Requests left before their end", **known)
        self.expired = Counter("expired", "Requests whose deadline passed", **known)
        self.restarts = Counter("worker_restarts", "Workers that died and were replaced", **known)
