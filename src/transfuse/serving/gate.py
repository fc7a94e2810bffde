"""The gate before every route: who may come in, how much they may bring, how slow they may be."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..log import logger
from .backend import Backend, Unavailable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class GateConfig:
    """keys: one of these must come as `Authorization: Bearer KEY`; none: everybody may. hosts: names that a request may
    be addressed to, which keeps other sites' pages out; none: any. body: most bytes. seconds: to send the next piece of
    a body, or to take that of an answer."""

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK
    body: int = 32_000_000
    seconds: float = 30.0


class Problem(Exception):
    """An answer of OpenAI's shape that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, retry: int = 0):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def content(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else None
        kind = kind or ("authentication_error" if self.status == 401 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        more = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return {"Retry-After": str(self.retry), **more} if self.retry else more

    @classmethod
    def of(cls, error: Unavailable) -> Problem:
        code = {429: "queue_full", 504: "deadline_exceeded"}.get(error.status, "unavailable")
        return cls(error.status, str(error), code, retry=error.retry_after)


class Gate:
    """ASGI middleware: keys, hosts, origins, size of the body and speed of both ways; counts and logs every request, by
    its number and never by what it says."""

    def __init__(self, app: App, backend: Backend, config: GateConfig) -> None:
        self.app, self.backend, self.config = app, backend, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        passage = _Passage(self.config, scope, receive, send)
        try:
            self._check(scope, passage.headers)
            await self.app(scope, passage.receive, passage.send)
        except Problem as problem:
            await passage.refuse(problem)
        except _Slow:
            pass  # the connection is closed: nobody takes what it is sent
        except Exception as error:
            logger.info(f"{passage.number} {type(error).__name__}: {error}")
            await passage.refuse(Problem(500, f"the server made a mistake; it is logged under {passage.number}"))
        finally:
            seconds = time.monotonic() - passage.began
            route = getattr(scope.get("route"), "path", "other")
            self.backend.metrics.requests.labels(route, passage.status or 499).inc()
            self.backend.metrics.seconds.labels(route).observe(seconds)
            if route not in ("/health", "/ready", "/metrics"):
                logger.info(f"{passage.number} {scope['method']} {route} {passage.status or 'left'} {seconds:.2f} s")

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raise Problem for a request that may not come in."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.config.hosts and name not in self.config.hosts:
            raise Problem(403, f"expected a request to {' or '.join(self.config.hosts)}, found one to {name[:100]!r}")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Problem(403, f"expected a page of this server, found one of {origin[:100]!r}")
        if scope["path"].startswith("/v1/"):
            self._check_key(headers.get("authorization", ""))
        if scope["method"] == "POST":
            try:
                self.backend.check()
            except Unavailable as error:
                raise Problem.of(error) from None
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > self.config.body:
                raise too_large(self.config.body, length)

    def _check_key(self, given: str) -> None:
        key = given.removeprefix("Bearer ").encode()
        if self.config.keys and not any(hmac.compare_digest(key, one.encode()) for one in self.config.keys):
            raise Problem(
                401, "expected a key of this server in the header Authorization: Bearer KEY", "invalid_api_key"
            )


def too_large(most: int, found: object) -> Problem:
    return Problem(413, f"body: expected at most {most} bytes, found {found}", "body_too_large")


class _Slow(Exception):
    """The other end does not take what it is sent."""


class _Passage:
    """One request on its way through the gate."""

    def __init__(self, config: GateConfig, scope: Scope, receive: Receive, send: Send) -> None:
        self.config, self._receive, self._send = config, receive, send
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.number = scope.setdefault("state", {})["request"] = uuid.uuid4().hex[:16]
        self.began = time.monotonic()
        self.status: int | None = None
        self.read, self.whole = 0, False
        self.problem: Problem | None = None
        """with the body, of which the app makes something of its own: what is answered is this"""

    async def receive(self) -> MutableMapping[str, Any]:
        if self.whole:
            return await self._receive()  # only that the other end is gone can come: whenever it likes
        try:
            async with asyncio.timeout(self.config.seconds):
                message = await self._receive()
        except TimeoutError:
            slow = f"body: expected its next piece within {self.config.seconds:g} s, found none"
            self.problem = Problem(408, slow)
            raise self.problem from None
        self.read += len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.read > self.config.body:
            self.problem = too_large(self.config.body, "more")
            raise self.problem
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if self.problem is not None:
            await self.refuse(self.problem)
        else:
            await self._pass(message)

    async def _pass(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self.number.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        try:
            async with asyncio.timeout(self.config.seconds):
                await self._send(message)
        except TimeoutError:
            raise _Slow from None

    async def refuse(self, problem: Problem) -> None:
        """Answer with a problem, if nothing has been answered yet."""
        if self.status is not None:
            return
        body = json.dumps(problem.content).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **problem.headers}
        if not self.whole:
            headers["connection"] = "close"  # what is left of the body is not read
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._pass({"type": "http.response.start", "status": problem.status, "headers": raw})
        await self._pass({"type": "http.response.body", "body": body})
