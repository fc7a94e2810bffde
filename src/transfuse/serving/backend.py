"""The HTTP process's end of the worker: who waits, who runs, what each has heard; a new worker where one dies.

    submit ──> waits its turn in the worker's queue ──> started ──> text, previews, pictures ──> ended
                    │ bounded by count and by cost            │ deadline, cancellation, the worker's death
                    └ survives the worker: sent to the next   └ told in one clear line

Everything here happens on the event loop; two threads carry messages to and from the pipe.
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
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from ..errors import UserError
from ..log import logger
from .messages import Accepted, Drawing, Drawn, Ended, Failed, Job, JobMessage, Ready, Refused, Said, Started
from .metrics import Metrics
from .worker import WorkerConfig, work


class Unavailable(Exception):
    """Not now. retry_after: seconds after which it may be tried again; status: of HTTP."""

    def __init__(self, message: str, status: int, retry_after: int = 1) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class QueueConfig:
    """What may wait, and for how long."""

    requests: int = 64
    """most requests that wait or run"""
    cost: int = 4_000_000
    """most positions that the network may have to compute for all of them"""
    deadline: float = 300.0
    """seconds from a request's arrival to its end, waiting included; a client may ask for fewer"""
    restarts: int = 5
    """times within a minute that a dead worker is replaced, before the server gives up"""


@dataclass(eq=False)
class Ticket:
    """A submitted job, and what has been heard of it and not yet read. A preview that nobody has read makes way for the
    next, so what waits for a slow reader is never more than the result itself."""

    number: int
    job: Job
    deadline: float
    began: float = field(default_factory=time.monotonic)
    prompt: int = 0
    cost: int = 0
    started: float | None = None
    suspected: int = 0
    """workers that died while this may have been what they read"""
    seen: set[str] = field(default_factory=set)
    """kinds of what has been heard"""
    heard: deque[JobMessage] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, message: JobMessage) -> None:
        if isinstance(message, Drawing) and self.heard and isinstance(self.heard[-1], Drawing):
            self.heard.pop()
        self.heard.append(message)
        self.news.set()

    async def next(self) -> JobMessage:
        while not self.heard:
            self.news.clear()
            await self.news.wait()
        return self.heard.popleft()


class Backend:
    """Start it in a running loop; it has a worker from then on, or the reason why not in `failure`."""

    def __init__(self, worker: WorkerConfig, limits: QueueConfig, metrics: Metrics) -> None:
        self.worker, self.limits, self.metrics = worker, limits, metrics
        self.facts: dict[str, Any] | None = None
        """of the model; None while no worker is ready"""
        self.failure: str | None = None
        self.draining = False
        self.tickets: dict[int, Ticket] = {}
        """those that wait or run, in order of arrival"""
        self._numbers = itertools.count()
        self._outbox: queue.SimpleQueue[tuple[int, Job | None] | None] = queue.SimpleQueue()
        self._deaths: deque[float] = deque()
        self._seconds = 1.0
        """of a request, from its start to its end, on the average of the last ones"""
        self.process: BaseProcess | None = None
        self.stopped = asyncio.Event()
        """set when there will be no further worker"""

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._spawn()

    async def stop(self) -> None:
        """End the worker; what still runs fails."""
        self.draining = True
        process, self.process = self.process, None
        self._outbox.put(None)
        for ticket in list(self.tickets.values()):
            self._end(ticket, Failed(ticket.number, "the server stops"))
        if process is not None:
            await asyncio.to_thread(process.join, 10)
            if process.is_alive():
                process.kill()
        self.stopped.set()

    async def drain(self, seconds: float) -> None:
        """Take nothing new, and wait until nothing runs, or so long."""
        self.draining = True
        until = time.monotonic() + seconds
        while self.tickets and time.monotonic() < until:
            await asyncio.sleep(0.05)

    def known(self) -> dict[str, Any]:
        """The model's facts. Raises Unavailable where there is none, now or ever."""
        if self.failure is not None:
            raise Unavailable(self.failure, 503, 60)
        if self.facts is None:
            raise Unavailable("the model is being loaded", 503, 5)
        return self.facts

    def check_ready(self) -> None:
        """Raise Unavailable where nothing new is taken, or there is no model."""
        if self.draining:
            raise Unavailable("the server is about to stop and takes nothing new", 503, 10)
        self.known()

    def check(self) -> None:
        """Raise Unavailable where a request would not be taken now, whatever it asks for."""
        self.check_ready()
        if len(self.tickets) >= self.limits.requests:
            self.metrics.rejected.inc()
            message = f"expected at most {self.limits.requests} requests at a time, found as many"
            raise Unavailable(message, 429, self.retry_after())

    def retry_after(self) -> int:
        """Seconds in which a place should be free: those of a request, for the slots to turn over."""
        return max(1, min(60, math.ceil(self._seconds)))

    async def submit(self, job: Job, seconds: float | None = None) -> Ticket:
        """A ticket for a job that the worker has accepted, waiting its turn. seconds: fewer than the deadline.

        Raises UserError for a job that can not be, Unavailable where there is no room, or no worker.
        """
        self.check()
        now = time.monotonic()
        ticket = Ticket(next(self._numbers), job, now + min(seconds or math.inf, self.limits.deadline))
        self.tickets[ticket.number] = ticket
        self._outbox.put((ticket.number, job))
        self._gauge()
        try:
            async with asyncio.timeout_at(self._loop.time() + ticket.deadline - now):
                answer = await ticket.next()
            match answer:
                case Refused(message=message):
                    raise UserError(message)
                case Failed(message=message):
                    raise Unavailable(message, 503)
                case _ if sum(other.cost for other in self.tickets.values()) > self.limits.cost:
                    self.metrics.rejected.inc()
                    message = f"expected at most {self.limits.cost} positions to compute for all requests, found more"
                    raise Unavailable(message, 429, self.retry_after())
        except TimeoutError:
            self.cancel(ticket)
            raise Unavailable("the deadline passed before the request was read", 504) from None
        except BaseException:
            self.cancel(ticket)
            raise
        return ticket

    async def events(self, ticket: Ticket, ping: float = 15.0) -> AsyncIterator[JobMessage | None]:
        """What happens to a job, to its end; None where nothing has for `ping` seconds. Leaving it cancels the job."""
        try:
            while True:
                left = ticket.deadline - time.monotonic()
                try:
                    async with asyncio.timeout(min(ping, max(left, 0.0))):
                        message = await ticket.next()
                except TimeoutError:
                    if time.monotonic() < ticket.deadline:
                        yield None
                        continue
                    self.metrics.expired.inc()
                    yield Failed(ticket.number, "the deadline passed", 504)
                    return
                yield message
                if isinstance(message, (Ended, Failed)):
                    return
        finally:
            self.cancel(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Forget a job, wherever it is. One that has ended stays as it is."""
        if self.tickets.pop(ticket.number, None) is None:
            return
        self.metrics.cancelled.inc()
        self._outbox.put((ticket.number, None))
        self._gauge()

    def _gauge(self) -> None:
        running = sum(ticket.started is not None for ticket in self.tickets.values())
        self.metrics.running.set(running)
        self.metrics.waiting.set(len(self.tickets) - running)
        self.metrics.cost.set(sum(ticket.cost for ticket in self.tickets.values()))

    def _hear(self, process: BaseProcess, messages: Ready | UserError | list[JobMessage] | None) -> None:
        """What the worker says; None: it has died."""
        if process is not self.process:
            return
        match messages:
            case None:
                self._died()
            case Ready(facts=facts):
                self.facts = facts
            case UserError():
                self._give_up(str(messages))
            case list():
                for message in messages:
                    ticket = self.tickets.get(message.number)
                    if ticket is not None:
                        self._tell(ticket, message)

    def _tell(self, ticket: Ticket, message: JobMessage) -> None:
        match message:
            case Accepted(prompt=prompt, cost=cost):
                if ticket.cost:  # by a worker before this one
                    return
                ticket.prompt, ticket.cost = prompt, cost
                ticket.hear(message)
            case Started():
                ticket.started = time.monotonic()
                self.metrics.queued_seconds.observe(ticket.started - ticket.began)
            case Ended() | Failed() | Refused():
                self._end(ticket, message)
            case _:
                self._count(ticket, message)
                ticket.hear(message)
        self._gauge()

    def _count(self, ticket: Ticket, message: JobMessage) -> None:
        kinds = {Said: "text", Drawing: "preview", Drawn: "picture"}
        kind = kinds.get(type(message), "")
        if kind and kind not in ticket.seen:
            ticket.seen.add(kind)
            self.metrics.first_seconds.labels(kind).observe(time.monotonic() - ticket.began)
        if isinstance(message, Drawn):
            self.metrics.images.inc()

    def _end(self, ticket: Ticket, message: JobMessage) -> None:
        del self.tickets[ticket.number]
        if ticket.started is not None:
            self._seconds += (time.monotonic() - ticket.started - self._seconds) / 8
        if isinstance(message, Ended):
            self.metrics.text_tokens.inc(message.text_tokens)
            self.metrics.evaluations.inc(message.evaluations)
        ticket.hear(message)
        self._gauge()

    def _died(self) -> None:
        """Those that ran are told; those that waited go to the next worker, in their order."""
        self.facts = None
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > 60:
            self._deaths.popleft()
        assert self.process is not None
        logger.info(
            f"serve: the worker ended (exit code {self.process.exitcode}); {len(self.tickets)} requests were with it"
        )
        # They are read in order: only the first that was not accepted may be what it died of. Twice is no accident.
        unread = next((ticket for ticket in self.tickets.values() if not ticket.cost), None)
        if unread is not None:
            unread.suspected += 1
        for ticket in list(self.tickets.values()):
            if ticket.started is not None or ticket.suspected > 1:
                self._end(ticket, Failed(ticket.number, "the worker ended while it computed this request; try again"))
        if len(self._deaths) > self.limits.restarts:
            self._give_up(f"the worker ended {len(self._deaths)} times within a minute")
            return
        self.metrics.restarts.inc()
        self._spawn()

    def _give_up(self, message: str) -> None:
        self.failure = message
        logger.info(f"serve: {message}")
        for ticket in list(self.tickets.values()):
            self._end(ticket, Failed(ticket.number, message))
        self.stopped.set()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(theirs, self.worker), name="transfuse-worker", daemon=True)
        process.start()
        theirs.close()
        self.process = process
        old, self._outbox = self._outbox, queue.SimpleQueue()
        old.put(None)
        for ticket in self.tickets.values():
            self._outbox.put((ticket.number, ticket.job))
        for carry in (self._read, self._write):
            threading.Thread(target=carry, args=(process, ours, self._outbox), daemon=True).start()

    def _read(self, process: BaseProcess, connection: Connection, _: Any) -> None:
        """Thread: from the pipe to the loop."""
        while True:
            try:
                messages = connection.recv()
            except (EOFError, OSError):
                process.join(10)  # for its exit code
                connection.close()
                messages = None
            try:
                self._loop.call_soon_threadsafe(self._hear, process, messages)
            except RuntimeError:
                return  # the loop is closed
            if messages is None:
                return

    def _write(self, process: BaseProcess, connection: Connection, outbox: queue.SimpleQueue[Any]) -> None:
        """Thread: to the pipe. A large picture waits here until the worker reads, not on the loop."""
        message: Any = ()
        while message is not None:
            message = outbox.get()
            try:
                connection.send(message)  # None: end
            except OSError:
                return  # the reader says so
