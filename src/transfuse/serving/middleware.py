"""The middleware before every route: who may come in, how large a body may be, and how slow either end."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ..log import logger
from .engine_client import EngineClient
from .protocol import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
QUIET = ("/health", "/ready", "/metrics")
"""routes that are not logged"""


@dataclass(frozen=True)
class AccessConfig:
    """Limits of every HTTP request.

    keys       accepted as `Authorization: Bearer KEY` under /v1/; empty: no key is needed
    hosts      names that a request may be addressed to, which keeps other sites' pages out; empty: any
    max_body   bytes
    patience   seconds to wait for the next piece of a body, or for the client to take one of a response
    """

    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = LOOPBACK
    max_body: int = 32_000_000
    patience: float = 30.0


class Middleware:
    """ASGI middleware that admits, measures and logs each request, by its number and never by its content."""

    def __init__(self, app: App, client: EngineClient, config: AccessConfig) -> None:
        self.app, self.client, self.config = app, client, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, number = time.monotonic(), uuid.uuid4().hex[:16]
        exchange = Exchange(self.config, number, receive, send)
        try:
            self.admit(scope)
            await self.app(scope, exchange.receive, exchange.send)
        except ApiError as error:
            await exchange.fail(scope, error)
        except SlowReader:
            pass  # the connection is closed
        except Exception as error:
            logger.info(f"{number} {type(error).__name__}: {error}")
            message = f"the server made a mistake; it is logged under {number}"
            await exchange.fail(scope, ApiError(500, message))
        finally:
            seconds, route = time.monotonic() - began, getattr(scope.get("route"), "path", "other")
            self.client.metrics.requests.labels(route, exchange.status or 499).inc()
            self.client.metrics.seconds.labels(route).observe(seconds)
            if route not in QUIET:
                logger.info(f"{number} {scope['method']} {route} {exchange.status or 'left'} {seconds:.2f} s")

    def admit(self, scope: Scope) -> None:
        """Raise ApiError for a request that is refused by its head alone."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin, hosts = headers.get("host", ""), headers.get("origin"), self.config.hosts
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if hosts and name not in hosts:
            raise ApiError(403, f"expected a request to {' or '.join(hosts)}, found one to {name[:100]!r}")
        if origin is not None and urlsplit(origin).netloc != host:
            raise ApiError(403, f"expected a page of this server, found one of {origin[:100]!r}")
        if scope["path"].startswith("/v1/") and self.config.keys:
            given = headers.get("authorization", "").removeprefix("Bearer ").encode()
            if not any(hmac.compare_digest(given, key.encode()) for key in self.config.keys):
                message = "expected a key of this server in the header Authorization: Bearer KEY"
                raise ApiError(401, message, "invalid_api_key")
        if scope["method"] == "POST":
            self.client.check_room()
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > self.config.max_body:
                raise too_large(self.config.max_body, length)


def too_large(limit: int, length: str) -> ApiError:
    """Return the error for a body of too many bytes."""
    return ApiError(413, f"body: expected at most {limit} bytes, found {length}", "body_too_large")


class SlowReader(Exception):
    """The client does not take the response."""


class Exchange:
    """One request and its response: counts the bytes of the body, and limits the waiting in both directions."""

    def __init__(self, config: AccessConfig, number: str, receive: Receive, send: Send) -> None:
        self.config, self.number, self._receive, self._send = config, number, receive, send
        self.status: int | None = None
        self.bytes, self.complete = 0, False
        """of the body so far, and whether that is all of it"""

    async def receive(self) -> MutableMapping[str, Any]:
        """Receive a piece of the body. Raises ApiError for a slow or a large one."""
        if self.complete:
            return await self._receive()  # only `http.disconnect` can follow, at any time
        try:
            async with asyncio.timeout(self.config.patience):
                message = await self._receive()
        except TimeoutError:
            slow = f"body: expected its next piece within {self.config.patience:g} s, found none"
            raise ApiError(408, slow) from None
        self.bytes += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self.bytes > self.config.max_body:
            raise too_large(self.config.max_body, "more")
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a piece of the response. Raises SlowReader."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(b"x-request-id", self.number.encode()), (b"x-content-type-options", b"nosniff")]
            if self.status is not None and self.status >= 400 and not self.complete:
                headers.append((b"connection", b"close"))  # the rest of the body is not read
            message["headers"] = [*message.get("headers", []), *headers]
        try:
            async with asyncio.timeout(self.config.patience):
                await self._send(message)
        except TimeoutError:
            raise SlowReader from None

    async def fail(self, scope: Scope, error: ApiError) -> None:
        """Respond with an error, unless a response has begun."""
        if self.status is None:
            await error.response()(scope, self.receive, self.send)
