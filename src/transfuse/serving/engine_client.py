"""The HTTP process's end of the worker: which requests wait, which run, and what each has received.

    submit ──> waits for a slot of the worker ──> started ──> text, previews, images ──> done
                    │ limited in number and cost        │ deadline, cancellation, the worker's death
                    └ kept if the worker dies:          └ each ends the request with one clear line
                      the next worker gets it

Everything here runs on the event loop; `WorkerProcess` carries messages to and from a worker's pipe.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import prometheus_client as prometheus

from ..errors import UserError
from ..inference.events import Done, Event, Failed, ImageEnd, ImageProgress, TextDelta
from ..log import logger
from .protocol import ApiError
from .worker import Accepted, Job, Refused, Started, WorkerConfig, WorkerMessage, WorkerProcess, start_process


@dataclass(frozen=True)
class QueueConfig:
    """Limits of what waits and runs."""

    requests: int = 64  # most requests at a time
    cost: int = 4_000_000  # most positions that the network computes for all of them
    share: float = 0.75  # most of either that one client may hold, unless its key says otherwise
    deadline: float = 300.0  # seconds from a request's first byte to its end, with waiting; a client may ask for fewer
    restarts: int = 5  # most replacements of a dead worker within a minute, before the server gives up


@dataclass(frozen=True)
class Share:
    """A client's own limits of requests and cost; None: the general share."""

    requests: int | None = None
    cost: int | None = None


@dataclass(eq=False)
class RequestStream:
    """A submitted job, and its events that have not been read yet.

    An unread `ImageProgress` makes way for the next, so a slow reader never holds more than the result itself. The
    streams of one `submit` share `changed`, which is set by each event. `deadline` is a time of `time.monotonic`.
    """

    request_id: int
    job: Job
    worker: WorkerProcess
    client: str
    deadline: float
    changed: asyncio.Event
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    accepted: Accepted = field(default=Accepted(0, 0, 0, cost=0))
    """how the worker has read the job; its cost is 0 until then"""
    unread: bool = True  # its worker has not accepted it yet
    suspected: int = 0  # workers that died while this may have been what they read
    seen: set[str] = field(default_factory=set)  # kinds of output so far
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
        self.registry = prometheus.CollectorRegistry()
        counter = partial(prometheus.Counter, namespace="transfuse", registry=self.registry)
        gauge = partial(prometheus.Gauge, namespace="transfuse", registry=self.registry)
        buckets = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        histogram = partial(prometheus.Histogram, namespace="transfuse", registry=self.registry, buckets=buckets)
        self.requests = counter("requests", "HTTP requests", ["route", "status"])
        self.seconds = histogram("request_seconds", "From a request's first byte to its response's last", ["route"])
        self.queued_seconds = histogram("queued_seconds", "From a request's arrival to its first step")
        self.first_seconds = histogram("first_output_seconds", "To the first text, preview or picture", ["kind"])
        self.waiting = gauge("waiting", "Requests that wait for a slot")
        self.running = gauge("running", "Requests that have a slot")
        self.cost = gauge("cost", "Positions that may be computed for both, at most")
        self.text_tokens = counter("text_tokens", "Tokens written")
        self.images = counter("images", "Pictures drawn")
        self.evaluations = counter("network_evaluations", "Denoising steps, or codes")
        self.rejected = counter("rejected", "Requests for which there was no room")
        self.cancelled = counter("cancelled", "Requests left before their end")
        self.expired = counter("expired", "Requests whose deadline passed")
        self.restarts = counter("worker_restarts", "Workers that died and were replaced")


StartWorker = Callable[[WorkerConfig], tuple[Any, Connection]]  # returns the process, and our end of its pipe


class EngineClient:
    """Submits jobs to a worker and gives their events; a worker that dies is replaced.

    Call `start` in a running loop.
    """

    def __init__(self, worker: WorkerConfig, limits: QueueConfig, start_worker: StartWorker = start_process) -> None:
        self.config, self.limits, self.start_worker = worker, limits, start_worker
        self.metrics = Metrics()
        self.failure: str | None = None  # why there will be no worker again
        self.draining = False
        self.streams: dict[int, RequestStream] = {}  # the requests that wait or run, in order of arrival
        self.abandoned: dict[int, RequestStream] = {}
        """cancelled requests that the worker has not read yet: they hold their place until it has"""
        self.arriving: Counter[str] = Counter()  # requests whose bodies are being read, by client
        self.worker: WorkerProcess | None = None  # the worker that gets new requests; others finish what they have
        self.next: WorkerProcess | None = None  # the worker that takes its place once it has loaded its model
        self.stopped = asyncio.Event()  # set when there will be no further worker
        self.metrics.running.set_function(lambda: sum(stream.started is not None for stream in self.streams.values()))
        self.metrics.waiting.set_function(lambda: sum(stream.started is None for stream in self.streams.values()))
        self.metrics.cost.set_function(lambda: sum(stream.accepted.cost for stream in self.streams.values()))
        self._ids = itertools.count()
        self._deaths: deque[float] = deque()
        self._last_end = 0.0
        self._interval = 1.0  # seconds between the ends of requests, while there are some

    @property
    def model(self) -> dict[str, Any] | None:
        """The worker's description of its model; None while no worker is ready."""
        return None if self.worker is None else self.worker.model

    def start(self) -> None:
        """Start a worker, which gets all requests that wait."""
        self.worker = WorkerProcess(partial(self.start_worker, self.config), self._on_message)
        for stream in self.streams.values():
            if stream.started is None:
                stream.worker, stream.unread = self.worker, True
                self.worker.outbox.put((stream.request_id, stream.client, stream.job))

    def reload(self) -> None:
        """Load the model again, in a worker that takes the place of this one; this one finishes what it has."""
        if self.next is None and self.model is not None and not self.draining:
            self.next = WorkerProcess(partial(self.start_worker, self.config), self._on_message)

    async def stop(self) -> None:
        """End the workers; requests that still run fail."""
        self.draining = True
        workers = {stream.worker for stream in self.streams.values()} | {self.worker, self.next}
        self.worker = self.next = None
        self._fail_all("the server stops")
        for worker in workers:
            if worker is not None:
                worker.stop()
        self.stopped.set()

    async def drain(self, seconds: float) -> None:
        """Accept nothing new, and wait until nothing runs; after `seconds`, what still runs fails."""
        self.draining = True
        end = time.monotonic() + seconds
        while (self.streams or self.arriving) and time.monotonic() < end:
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

    def check_room(self, client: str = "", share: Share = Share(), count: int = 1) -> None:
        """Raise ApiError if `count` requests of a client would not be accepted now, whatever they ask for.

        Raises UserError if they never would be: there are too many of them.
        """
        self.check_ready()
        most = share.requests or max(1, int(self.limits.requests * self.limits.share))
        if count > min(most, self.limits.requests):
            limit = min(most, self.limits.requests)
            raise UserError(f"n: expected at most {limit} requests of one client at a time, found {count} in one")
        held = [*self.streams.values(), *self.abandoned.values()]
        own = sum(stream.client == client for stream in held) + self.arriving[client]
        if own + count > most:
            self._refuse(f"expected at most {most} requests of one client at a time, found as many", own + count - most)
        over = len(held) + self.arriving.total() + count - self.limits.requests
        if over > 0:
            self._refuse(f"expected at most {self.limits.requests} requests at a time, found as many", over)

    def _check_cost(self, client: str, share: Share, streams: Sequence[RequestStream]) -> None:
        """Raise ApiError if what waits and runs costs too much with `streams`: that of one client, or of all.

        Raises UserError if they cost too much without any other.
        """
        most = share.cost or int(self.limits.cost * self.limits.share)
        new, limit = [stream.accepted.cost for stream in streams], min(most, self.limits.cost)
        if sum(new) > limit:
            name = "max_tokens" if streams[0].job.settings.get("draw") == "never" else "num_inference_steps"
            name = "n" if max(new) <= limit else name
            raise UserError(f"{name}: expected at most {limit} positions to compute for one client, found {sum(new)}")
        own = [stream.accepted.cost for stream in self.streams.values() if stream.client == client]
        every = [stream.accepted.cost for stream in self.streams.values()]
        for costs, limit, whose in ((own, most, "of one client"), (every, self.limits.cost, "for all requests")):
            if sum(costs) > limit:
                over = (sum(costs) - limit) * len(costs) / sum(costs)
                self._refuse(f"expected at most {limit} positions to compute {whose}, found more", math.ceil(over))

    def _refuse(self, message: str, count: int) -> None:
        """Raise ApiError for a request that has room once `count` requests have ended, at the pace of the last ones.

        If none has ended since those that run began, the pace is no faster than that.
        """
        self.metrics.rejected.inc()
        now = time.monotonic()
        oldest = min((stream.started for stream in self.streams.values() if stream.started is not None), default=now)
        seconds = count * max(self._interval, min(now - max(self._last_end, oldest), 60.0))
        raise ApiError(429, message, retry_after=max(1, min(600, math.ceil(seconds))))

    async def submit(
        self, jobs: Sequence[Job], client: str = "", share: Share = Share(), deadline: float = math.inf
    ) -> list[RequestStream]:
        """Return the streams of jobs, once the worker has accepted all of them; if one is refused, none is kept.

        `deadline` is a time of `time.monotonic`; the server's own counts from now where that is earlier.

        Raises:
            UserError: a job is invalid, or there would be no room for it even alone.
            ApiError: there is no room, or no worker, or the deadline passed.
        """
        self.check_room(client, share, len(jobs))
        assert self.worker is not None
        deadline = min(deadline, time.monotonic() + self.limits.deadline)
        late = "the deadline passed before the request was read"
        if deadline <= time.monotonic():
            raise ApiError(504, late, retry_after=1)
        changed = asyncio.Event()
        streams = [RequestStream(next(self._ids), job, self.worker, client, deadline, changed) for job in jobs]
        for stream in streams:
            self.streams[stream.request_id] = stream
            self.worker.outbox.put((stream.request_id, client, stream.job))
        try:
            while not all(stream.accepted.cost for stream in streams):
                changed.clear()
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    await changed.wait()
                for stream in streams:
                    if stream.queue and isinstance(error := stream.queue[0], Exception):
                        raise error
            self._check_cost(client, share, streams)
        except BaseException as error:
            for stream in streams:
                self.cancel(stream)
            if isinstance(error, TimeoutError):
                raise ApiError(504, late, retry_after=1) from None
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
        """Forget a request, wherever it is. One that has ended stays as it is.

        It counts against the limits until the worker has read it, so that nobody fills the queue by leaving.
        """
        if self.streams.pop(stream.request_id, None) is not None:
            self.metrics.cancelled.inc()
            stream.worker.outbox.put((stream.request_id, stream.client, None))
            if stream.unread:
                self.abandoned[stream.request_id] = stream
            self._retire(stream.worker)

    def _retire(self, worker: WorkerProcess) -> None:
        """End a worker that another has replaced, once it has no request left."""
        left = any(stream.worker is worker for stream in self.streams.values())
        if not left and worker not in (self.worker, self.next):
            worker.stop()

    def _on_message(
        self, worker: WorkerProcess, message: dict[str, Any] | UserError | list[WorkerMessage] | None
    ) -> None:
        """Handle what a worker has sent: its model's description, why it has none, events, or None when it has died."""
        match message:
            case None if worker is self.worker:
                self._on_death(worker)
            case None if worker is not self.next:
                self._fail_running(worker)
            case dict():
                worker.model = message
                # What was timed at the start need not be timed again.
                self.config = replace(self.config, guidance=message.get("guidance", self.config.guidance))
                if worker is self.next:
                    old, self.worker, self.next = self.worker, worker, None
                    logger.info("serve: the model is loaded again, and serves new requests")
                    if old is not None:
                        self._retire(old)
            case None | UserError() if worker is self.next:
                logger.error(f"serve: the model was not loaded again: {message or 'the worker ended'}")
                self.next = None
            case UserError() if worker is self.worker:
                self._give_up(str(message))
            case list():
                for event in message:
                    self.abandoned.pop(event.request_id, None)
                    stream = self.streams.get(event.request_id)
                    if stream is not None and stream.worker is worker:
                        self._on_event(stream, event)

    def _on_event(self, stream: RequestStream, event: WorkerMessage) -> None:
        match event:
            case Accepted():
                stream.accepted, stream.unread = event, False
                stream.changed.set()
            case Started():
                stream.started = time.monotonic()
                self.metrics.queued_seconds.observe(stream.started - stream.submitted)
            case Refused(reason=reason):
                self._end(stream, UserError(reason))
            case Failed(reason=reason):
                self._end(stream, ApiError(502, reason))
            case Done():
                self.metrics.text_tokens.inc(event.text_tokens)
                self.metrics.evaluations.inc(event.network_evaluations)
                self._end(stream, event)
            case _:
                kind = {TextDelta: "text", ImageProgress: "preview", ImageEnd: "picture"}.get(type(event))
                if kind is not None and kind not in stream.seen:
                    stream.seen.add(kind)
                    self.metrics.first_seconds.labels(kind).observe(time.monotonic() - stream.submitted)
                self.metrics.images.inc(isinstance(event, ImageEnd))
                stream.put(event)

    def _end(self, stream: RequestStream, event: Done | Exception) -> None:
        now, busy = time.monotonic(), len(self.streams) > 1
        if stream.started is not None:
            # With one request at a time, from its start; else between two ends.
            since = max(self._last_end, stream.started) if busy else stream.started
            self._interval += (now - since - self._interval) / 4
            self._last_end = now
        del self.streams[stream.request_id]
        stream.put(event)
        self._retire(stream.worker)

    def _fail_all(self, message: str) -> None:
        for stream in list(self.streams.values()):
            self._end(stream, ApiError(503, message, retry_after=1))

    def _on_death(self, worker: WorkerProcess) -> None:
        """Fail the requests that ran; the next worker gets those that waited, in their order."""
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > 60:
            self._deaths.popleft()
        exit_code, count = worker.process.exitcode, len(self.streams)
        logger.error(f"serve: the worker ended (exit code {exit_code}); {count} requests were with it")
        # Jobs are read in order, so only the first that was not accepted may have killed it. Twice is no accident.
        held = [*self.streams.values(), *self.abandoned.values()]
        unread = [stream for stream in held if stream.worker is worker and not stream.accepted.cost]
        if unread:
            min(unread, key=lambda stream: stream.request_id).suspected += 1
        self._fail_running(worker)
        if len(self._deaths) > self.limits.restarts:
            self._give_up(f"the worker ended {len(self._deaths)} times within a minute")
        else:
            self.metrics.restarts.inc()
            self.start()

    def _fail_running(self, worker: WorkerProcess) -> None:
        """Fail the requests that a dead worker computed; the current one gets those of a replaced one that waited.

        Their status is 502: a proxy that asks another server after a 503 must not have it compute what kills workers.
        """
        self.abandoned = {number: other for number, other in self.abandoned.items() if other.worker is not worker}
        for stream in [stream for stream in self.streams.values() if stream.worker is worker]:
            if stream.started is not None or stream.suspected > 1:
                message = "the worker ended while it computed this request; try again"
                self._end(stream, ApiError(502, message))
            elif self.worker is not None and worker is not self.worker:
                stream.worker, stream.unread = self.worker, True
                self.worker.outbox.put((stream.request_id, stream.client, stream.job))

    def _give_up(self, message: str) -> None:
        self.failure = message
        logger.info(f"serve: {message}")
        self._fail_all(message)
        self.stopped.set()
