"""The HTTP process's end of the worker: which requests wait, which run, and what each has received.

    submit ──> waits for a slot of the worker ──> started ──> text, previews, images ──> done
                    │ limited in number and cost        │ deadline, cancellation, the worker's death
                    └ kept if the worker dies:          └ each ends the request with one clear line
                      the next worker gets it

Everything here runs on the event loop; two threads carry messages to and from the pipe.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..errors import UserError
from ..inference.events import Done, Event, Failed, ImageEnd, ImageProgress, TextDelta
from ..log import logger
from .protocol import ApiError
from .worker import Accepted, Job, Refused, Started, WorkerConfig, WorkerMessage, work

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""limits of the buckets of each histogram"""
OUTPUTS = {TextDelta: "text", ImageProgress: "preview", ImageEnd: "picture"}
"""labels of the metric `transfuse_first_output_seconds`"""
RESTART_WINDOW = 60.0
"""seconds in which `QueueConfig.restarts` are counted"""


@dataclass(frozen=True)
class QueueConfig:
    """Limits of what waits and runs.

    requests   most requests at a time
    cost       most positions that the network computes for all of them
    deadline   seconds from a request's arrival to its end, waiting included; a client may ask for fewer
    restarts   most replacements of a dead worker within a minute, before the server gives up
    """

    requests: int = 64
    cost: int = 4_000_000
    deadline: float = 300.0
    restarts: int = 5


@dataclass(eq=False)
class RequestStream:
    """A submitted job, and its events that have not been read yet.

    An unread `ImageProgress` makes way for the next, so a slow reader never holds more than the result itself. The
    streams of one `submit` share `changed`, which is set by each event. `deadline` is a time of `time.monotonic`.
    """

    request_id: int
    job: Job
    deadline: float
    changed: asyncio.Event
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    prompt_tokens: int = 0
    cost: int = 0
    """0 until a worker has accepted the job"""
    suspected: int = 0
    """workers that died while this may have been what they read"""
    seen: set[str] = field(default_factory=set)
    """kinds of output so far"""
    queue: deque[Event | Exception] = field(default_factory=deque)

    def put(self, event: Event | Exception) -> None:
        """Add an event, or the error that ends the request."""
        if isinstance(event, ImageProgress) and self.queue and isinstance(self.queue[-1], ImageProgress):
            self.queue.pop()
        self.queue.append(event)
        self.changed.set()


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


def start_process(config: WorkerConfig) -> tuple[BaseProcess, Connection]:
    """Start a worker's process; return it and our end of its pipe."""
    context = multiprocessing.get_context("spawn")
    ours, workers = context.Pipe()
    process = context.Process(target=work, args=(workers, config), name="transfuse-worker", daemon=True)
    process.start()
    workers.close()
    return process, ours


class EngineClient:
    """Submits jobs to a worker and gives their events; a worker that dies is replaced.

    Call `start` in a running loop. `start_worker` returns a process and a pipe to it.
    """

    def __init__(
        self,
        worker: WorkerConfig,
        limits: QueueConfig,
        start_worker: Callable[[WorkerConfig], tuple[Any, Connection]] = start_process,
    ) -> None:
        self.worker, self.limits, self.start_worker = worker, limits, start_worker
        self.metrics = Metrics()
        self.model: dict[str, Any] | None = None
        """the worker's description of its model; None while no worker is ready"""
        self.failure: str | None = None
        """why there will be no worker again"""
        self.draining = False
        self.streams: dict[int, RequestStream] = {}
        """the requests that wait or run, in order of arrival"""
        self.process: Any = None
        self.stopped = asyncio.Event()
        """set when there will be no further worker"""
        self._ids = itertools.count()
        self._outbox: queue.SimpleQueue[tuple[int, Job | None] | None] = queue.SimpleQueue()
        self._deaths: deque[float] = deque()
        self._mean_seconds = 1.0
        """of the last requests, from start to end"""

    def start(self) -> None:
        """Start a worker, which gets all requests that wait."""
        self._loop = asyncio.get_running_loop()
        self.process, connection = self.start_worker(self.worker)
        self._outbox.put(None)  # ends the writer of the worker before
        self._outbox = queue.SimpleQueue()
        for stream in self.streams.values():
            self._outbox.put((stream.request_id, stream.job))
        for carry in (self._read, self._write):
            threading.Thread(target=carry, args=(self.process, connection, self._outbox), daemon=True).start()

    async def stop(self) -> None:
        """End the worker; requests that still run fail."""
        self.draining = True
        process, self.process = self.process, None
        self._outbox.put(None)
        self._fail_all("the server stops")
        if process is not None:
            await asyncio.to_thread(process.join, 10)
            if process.is_alive():
                process.kill()
        self.stopped.set()

    async def drain(self, seconds: float) -> None:
        """Accept nothing new, and wait until nothing runs; after `seconds`, what still runs fails."""
        self.draining = True
        end = time.monotonic() + seconds
        while self.streams and time.monotonic() < end:
            await asyncio.sleep(0.05)
        self._fail_all("the server stops")

    def require_model(self) -> dict[str, Any]:
        """Return the model's description. Raises ApiError where there is none, yet or ever."""
        if self.failure is not None:
            raise ApiError(503, self.failure, retry_after=60)
        if self.model is None:
            raise ApiError(503, "the model is being loaded", retry_after=5)
        return self.model

    def check_ready(self) -> None:
        """Raise ApiError if nothing new is accepted, or there is no model."""
        if self.draining:
            raise ApiError(503, "the server is about to stop and takes nothing new", retry_after=10)
        self.require_model()

    def check_room(self, count: int = 1) -> None:
        """Raise ApiError if `count` requests would not be accepted now, whatever they ask for."""
        self.check_ready()
        if len(self.streams) + count > self.limits.requests:
            raise self._full(f"expected at most {self.limits.requests} requests at a time, found as many")

    def _full(self, message: str) -> ApiError:
        self.metrics.rejected.inc()
        return ApiError(429, message, retry_after=max(1, min(60, math.ceil(self._mean_seconds))))

    async def submit(self, jobs: Sequence[Job], timeout: float | None = None) -> list[RequestStream]:
        """Return the streams of jobs, once the worker has accepted all of them; if one is refused, none is kept.

        `timeout` counts from now, where it is shorter than the server's deadline.

        Raises:
            UserError: a job is invalid.
            ApiError: there is no room, or no worker, or the deadline passed.
        """
        self.check_room(len(jobs))
        deadline = time.monotonic() + min(timeout or math.inf, self.limits.deadline)
        changed = asyncio.Event()
        streams = [RequestStream(next(self._ids), job, deadline, changed) for job in jobs]
        for stream in streams:
            self.streams[stream.request_id] = stream
            self._outbox.put((stream.request_id, stream.job))
        self._set_gauges()
        try:
            while not all(stream.cost for stream in streams):
                changed.clear()
                async with asyncio.timeout(deadline - time.monotonic()):
                    await changed.wait()
                for stream in streams:
                    if stream.queue and isinstance(error := stream.queue[0], Exception):
                        raise error
            if sum(stream.cost for stream in self.streams.values()) > self.limits.cost:
                raise self._full(
                    f"expected at most {self.limits.cost} positions to compute for all requests, found more"
                )
        except BaseException as error:
            for stream in streams:
                self.cancel(stream)
            if isinstance(error, TimeoutError):
                raise ApiError(504, "the deadline passed before the request was read", retry_after=1) from None
            raise
        return streams

    async def events(
        self, streams: Sequence[RequestStream], ping: float = 15.0
    ) -> AsyncGenerator[tuple[int, Event | None], None]:
        """Yield the events of the streams of one `submit` to their ends, each with its stream's index.

        The event is None if nothing came for `ping` seconds. Leaving the iterator cancels what has not ended. Raises
        ApiError if a request fails or the deadline passes.
        """
        open_streams, changed, deadline = dict(enumerate(streams)), streams[0].changed, streams[0].deadline
        try:
            while open_streams:
                ready = [index for index, stream in open_streams.items() if stream.queue]
                for index in ready:
                    event = streams[index].queue.popleft()
                    if isinstance(event, Exception):
                        raise event
                    if isinstance(event, Done):
                        del open_streams[index]
                    yield index, event
                if ready:
                    continue
                changed.clear()
                try:
                    async with asyncio.timeout(max(0.0, min(ping, deadline - time.monotonic()))):
                        await changed.wait()
                except TimeoutError:
                    if time.monotonic() >= deadline:
                        self.metrics.expired.inc()
                        raise ApiError(504, "the deadline passed", retry_after=1) from None
                    yield 0, None
        finally:
            for stream in streams:
                self.cancel(stream)

    def cancel(self, stream: RequestStream) -> None:
        """Forget a request, wherever it is. One that has ended stays as it is."""
        if self.streams.pop(stream.request_id, None) is not None:
            self.metrics.cancelled.inc()
            self._outbox.put((stream.request_id, None))
            self._set_gauges()

    def _set_gauges(self) -> None:
        running = sum(stream.started is not None for stream in self.streams.values())
        self.metrics.running.set(running)
        self.metrics.waiting.set(len(self.streams) - running)
        self.metrics.cost.set(sum(stream.cost for stream in self.streams.values()))

    def _on_message(self, process: Any, message: dict[str, Any] | UserError | list[WorkerMessage] | None) -> None:
        """Handle what a worker has sent: its model's description, why it has none, events, or None when it has died."""
        if process is not self.process:
            return
        match message:
            case None:
                self._on_death()
            case dict():
                self.model = message
            case UserError():
                self._give_up(str(message))
            case list():
                for event in message:
                    stream = self.streams.get(event.request_id)
                    if stream is not None:
                        self._on_event(stream, event)

    def _on_event(self, stream: RequestStream, event: WorkerMessage) -> None:
        match event:
            case Accepted(prompt_tokens=prompt_tokens, cost=cost):
                stream.prompt_tokens, stream.cost = prompt_tokens, cost
                stream.changed.set()
            case Started():
                stream.started = time.monotonic()
                self.metrics.queued_seconds.observe(stream.started - stream.submitted)
            case Refused(reason=reason):
                self._end(stream, UserError(reason))
            case Failed(reason=reason):
                self._end(stream, ApiError(503, reason, retry_after=1))
            case Done():
                self.metrics.text_tokens.inc(event.text_tokens)
                self.metrics.evaluations.inc(event.network_evaluations)
                self._end(stream, event)
            case _:
                kind = OUTPUTS.get(type(event))
                if kind is not None and kind not in stream.seen:
                    stream.seen.add(kind)
                    self.metrics.first_seconds.labels(kind).observe(time.monotonic() - stream.submitted)
                self.metrics.images.inc(isinstance(event, ImageEnd))
                stream.put(event)
        self._set_gauges()

    def _end(self, stream: RequestStream, event: Done | Exception) -> None:
        del self.streams[stream.request_id]
        if stream.started is not None:
            self._mean_seconds += (time.monotonic() - stream.started - self._mean_seconds) / 8
        stream.put(event)
        self._set_gauges()

    def _fail_all(self, message: str) -> None:
        for stream in list(self.streams.values()):
            self._end(stream, ApiError(503, message, retry_after=1))

    def _on_death(self) -> None:
        """Fail the requests that ran; the next worker gets those that waited, in their order."""
        self.model, now = None, time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > RESTART_WINDOW:
            self._deaths.popleft()
        exit_code, count = self.process.exitcode, len(self.streams)
        logger.info(f"serve: the worker ended (exit code {exit_code}); {count} requests were with it")
        # Jobs are read in order, so only the first that was not accepted may have killed it. Twice is no accident.
        unread = next((stream for stream in self.streams.values() if not stream.cost), None)
        if unread is not None:
            unread.suspected += 1
        for stream in list(self.streams.values()):
            if stream.started is not None or stream.suspected > 1:
                message = "the worker ended while it computed this request; try again"
                self._end(stream, ApiError(503, message, retry_after=1))
        if len(self._deaths) > self.limits.restarts:
            self._give_up(f"the worker ended {len(self._deaths)} times within a minute")
        else:
            self.metrics.restarts.inc()
            self.start()

    def _give_up(self, message: str) -> None:
        self.failure = message
        logger.info(f"serve: {message}")
        self._fail_all(message)
        self.stopped.set()

    def _read(self, process: Any, connection: Connection, _: object) -> None:
        """Carry messages from the pipe to the loop, in a thread, until the worker ends."""
        message: Any = ()
        while message is not None:
            try:
                message = connection.recv()
            except (EOFError, OSError):
                process.join(10)  # sets its exit code
                connection.close()
                message = None
            try:
                self._loop.call_soon_threadsafe(self._on_message, process, message)
            except RuntimeError:
                return  # the loop is closed

    def _write(self, process: Any, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        """Carry jobs to the pipe, in a thread, so that the loop need not wait until the worker reads a large one."""
        message: Any = ()
        while message is not None:
            message = outbox.get()
            try:
                connection.send(message)  # None ends the worker
            except OSError:
                return  # `_read` reports it
