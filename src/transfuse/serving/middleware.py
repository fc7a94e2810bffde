"""The middleware before every route: who may come in, how large a body may be, and how slow either end."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..config import from_dict, read_settings
from ..devices import give_back_memory
from ..errors import UserError
from ..log import logger
from .engine_client import EngineClient, Share
from .protocol import ApiError

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
OPEN = ("/", "/health", "/ready")  # routes that need no key
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:[0-9]*)?", re.IGNORECASE)
FREE = 65_536  # bytes of each body that do not count against the budget


@dataclass(frozen=True)
class Key:
    """A client's key, and its name in logs and for fairness; `requests` and `cost` replace the general share."""

    name: str
    key: str
    requests: int | None = None
    cost: int | None = None


@dataclass(frozen=True)
class AccessConfig:
    """Limits of every HTTP request."""

    keys: tuple[Key, ...] = ()  # accepted as `Authorization: Bearer KEY`, except on `OPEN`; empty: no key is needed
    hosts: tuple[str, ...] = LOOPBACK  # names a request may be addressed to, to keep other sites' pages out; empty: any
    origins: tuple[str, ...] = ()  # other sites whose pages may send requests (CORS), as https://a.example; "*": all
    max_body: int = 32_000_000  # bytes
    bodies: int = 128_000_000  # bytes of all bodies that are being read; of one client three quarters of them
    patience: float = 30.0  # seconds to wait for the next piece of a body, or for the client to take one of a response
    rate: int = 1_000  # least bytes of a body in each second after these
    root_path: str = ""  # prefix of all paths under a proxy


def read_keys(path: Path | None, environment: str = "") -> tuple[Key, ...]:
    """Return keys of a file, and of a list separated by commas. Raises UserError.

    A file has lines `name:key`, or is TOML with a table for each name: `key`, and if wanted `requests` and `cost`. One
    without a key is refused, as it would let everybody in.
    """
    keys: list[Key] = []
    lines = [(f"TRANSFUSE_API_KEYS {number + 1}", entry) for number, entry in enumerate(environment.split(","))]
    if path is not None and path.suffix == ".toml":
        keys += [from_dict(Key, {"name": name, **values}, f"{path}: {name}")
                 for name, values in read_settings(path).items()]  # fmt: skip
    elif path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: expected lines name:key, found no readable file ({error})") from None
        lines += [(f"{path} line {number + 1}", line) for number, line in enumerate(text.splitlines())]
    for where, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = line.strip().partition(":")
        if not colon and not where.startswith("TRANSFUSE"):
            raise UserError(f"{where}: expected name:key, found no colon")
        name, key = name.strip(), key.strip()
        keys.append(Key(name, key) if colon else Key(where.replace("TRANSFUSE_API_KEYS", "key"), name))
    for what in ("name", "key"):
        repeated = [value for value, count in Counter(getattr(key, what) for key in keys).items() if count > 1]
        if repeated or not all(getattr(key, what) for key in keys):
            raise UserError(
                f"{path or 'TRANSFUSE_API_KEYS'}: expected a different {what} for each, found one twice or none"
            )
    if not keys and (path is not None or environment.strip()):
        raise UserError(f"{path or 'TRANSFUSE_API_KEYS'}: expected at least one key, found none")
    return tuple(keys)


def address_of(host: str) -> str:
    """Return what stands for a client without a key: its address, and of IPv6 the network, which is one customer's."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


class Middleware:
    """ASGI middleware that admits, measures and logs each request, never its content. `config` may be replaced."""

    def __init__(self, app: ASGIApp, client: EngineClient, config: Callable[[], AccessConfig]) -> None:
        self.app, self.client, self.config = app, client, config
        self.bodies: Counter[str] = Counter()  # bytes of bodies that are being read, by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = scope.get("began") or time.monotonic()
        # uvicorn keeps the method in the scope that it made, and sends no body for HEAD.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        if root := self.config().root_path:
            inner["root_path"] = root
            if inner["path"] == root:  # the page, which finds its way without a last slash
                inner["path"] = root + "/"
        exchange = Exchange(self, uuid.uuid4().hex[:16], began, receive, send)
        inner["exchange"] = exchange
        try:
            self.admit(inner, exchange)
            await self.app(inner, exchange.receive, exchange.send)
        except ClientDisconnect:
            scope.get("abort", lambda: None)()  # closing it would wait for the client to take what is left
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.error(f"{exchange.number} {type(error).__name__}: {error}")
                error = ApiError(500, f"the server made a mistake; it is logged under {exchange.number}")
            if exchange.status is None:  # else a response has begun
                await error.response()(inner, exchange.receive, exchange.send)
        finally:
            exchange.read()
            route, status = getattr(inner.get("route"), "path", "other"), exchange.status or 499
            seconds = time.monotonic() - began
            self.client.metrics.requests.labels(route, status).inc()
            self.client.metrics.seconds.labels(route).observe(seconds)
            if route not in ("/health", "/ready", "/metrics"):
                what = {"method": scope["method"], "route": route}
                numbers = {"status": status, "tokens": 0, "images": 0, **exchange.counts, "ms": round(1000 * seconds)}
                fields: dict[str, Any] = {"request_id": exchange.number, "key": exchange.key, **what, **numbers}
                pairs = [f"{name}={value}" for name, value in fields.items() if value != "" and name not in what]
                logger.info(f"{scope['method']} {route} {' '.join(pairs)}", extra={"fields": fields})

    def admit(self, scope: Scope, exchange: Exchange) -> None:
        """Raise ApiError for a request that is refused by its head alone."""
        config, headers = self.config(), dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        parts = HOST.fullmatch(host)
        if parts is None and (host or config.hosts):
            raise ApiError(400, f"host: expected a name and a port, found {host[:100]!r}", "invalid_request", "host")
        if parts and config.hosts and parts[1].lower().removesuffix(".") not in map(str.lower, config.hosts):
            raise ApiError(403, f"expected a request to {' or '.join(config.hosts)}, found one to {host[:100]!r}")
        origin = headers.get(b"origin", b"").decode("latin-1")
        allowed = not origin or urlsplit(origin).netloc.lower() == host.lower()
        if not allowed and origin not in config.origins and "*" not in config.origins:
            raise ApiError(403, f"expected a page of this server, found one of {origin[:100]!r}")
        path, peer = scope["path"].removeprefix(config.root_path), scope.get("client")
        exchange.client = address_of(peer[0]) if peer else "unknown"
        if config.keys and path not in OPEN:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            token = token.strip() if scheme.lower() == b"bearer" else b""
            given = [key for key in config.keys if hmac.compare_digest(token, key.key.encode())]
            if not given:
                message = "expected a key of this server in the header Authorization: Bearer KEY"
                raise ApiError(401, message, "invalid_api_key")
            exchange.client, exchange.key = given[0].name, given[0].name
            exchange.share = Share(given[0].requests, given[0].cost)
        if scope["method"] == "POST":
            length = headers.get(b"content-length", b"0").decode("latin-1")
            if not length.isdecimal() or int(length) > config.max_body:
                message = f"body: expected at most {config.max_body} bytes, found {length:.30}"
                raise ApiError(413, message, "body_too_large")
            self.client.check_room(exchange.client, exchange.share)
            exchange.reading = True
            self.client.arriving[exchange.client] += 1


@dataclass
class Exchange:
    """One request and its response: counts the bytes of the body, and limits the waiting in both directions.

    client   whose request it is, for fairness: a key's name, or an address
    counts   tokens and images of the response, for the log
    """

    middleware: Middleware
    number: str
    began: float
    receive_: Receive
    send_: Send
    client: str = ""
    key: str = ""
    share: Share = field(default_factory=lambda: Share())
    status: int | None = None
    bytes: int = 0
    complete: bool = False
    reading: bool = False
    since: float = field(default_factory=time.monotonic)  # when its body began
    counts: dict[str, int] = field(default_factory=dict)

    async def receive(self) -> Message:
        """Receive a piece of the body. Raises ApiError for a slow or a large one, or where there is no room for it."""
        if self.complete:
            return await self.receive_()  # only `http.disconnect` can follow, at any time
        config, now = self.middleware.config(), time.monotonic()
        left = {
            f"its next piece within {config.patience:g} s, found none": config.patience,
            f"at least {config.rate} bytes a second on average after {config.patience:g} s, found fewer": (
                self.since + config.patience + self.bytes / config.rate - now
            ),
            "all of it before the deadline, found less": self.began + self.middleware.client.limits.deadline - now,
        }
        slow = min(left, key=left.__getitem__)
        try:
            async with asyncio.timeout(max(0.0, left[slow])):
                message = await self.receive_()
        except TimeoutError:
            raise ApiError(408, f"body: expected {slow}") from None
        piece = len(message.get("body", b""))
        before, self.bytes = max(0, self.bytes - FREE), self.bytes + piece
        self.complete = not message.get("more_body", False)
        if self.bytes > config.max_body:
            raise ApiError(413, f"body: expected at most {config.max_body} bytes, found more", "body_too_large")
        held = self.middleware.bodies
        if self.reading:
            held[self.client] += max(0, self.bytes - FREE) - before
            if held[self.client] > config.bodies * 3 // 4 or held.total() > config.bodies:
                status = 429 if held[self.client] > config.bodies * 3 // 4 else 503
                raise ApiError(status, "body: expected fewer large bodies at a time, found too many", retry_after=5)
        return message

    def read(self) -> None:
        """The body is read, and no longer held."""
        if self.reading:
            self.reading = False
            client, held = self.middleware.client, max(0, self.bytes - FREE)
            for counter, count in ((client.arriving, 1), (self.middleware.bodies, held)):
                counter[self.client] -= count
                if not counter[self.client]:
                    del counter[self.client]
            if held:
                give_back_memory()

    async def send(self, message: Message) -> None:
        """Send a piece of the response. Raises ClientDisconnect if the client does not take it in time."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(b"x-request-id", self.number.encode()), (b"x-content-type-options", b"nosniff")]
            if self.status is not None and self.status >= 400 and not self.complete:
                headers.append((b"connection", b"close"))  # the rest of the body is not read
            message["headers"] = [*message.get("headers", []), *headers]
        try:
            async with asyncio.timeout(self.middleware.config().patience):
                await self.send_(message)
        except TimeoutError:
            raise ClientDisconnect from None
