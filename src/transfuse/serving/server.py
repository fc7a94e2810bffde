"""The server's process: listens, bounds its connections, reloads, and finishes what runs before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..devices import stop_keeping_memory
from ..errors import UserError
from ..log import logger
from .app import build
from .engine_client import EngineClient, QueueConfig
from .middleware import AccessConfig, address_of
from .protocol import ApiError
from .worker import WorkerConfig


@dataclass(frozen=True)
class ServerConfig:
    """The address of a server, and how it listens.

    drain         seconds to finish what runs before it stops
    cert, key     TLS certificate chain and private key, PEM files
    aliases       other names of the model
    connections   most at a time; of one address half of them
    idle          seconds for a connection to send the whole head of a request
    """

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0
    cert: Path | None = None
    key: Path | None = None
    aliases: tuple[str, ...] = ()
    connections: int = 512
    idle: float = 20.0


class BoundedProtocol(H11Protocol):
    """A connection that must send its request's head in time. One too many takes the place of the oldest idle one.

    uvicorn bounds neither the time of a head nor the connections of an address, and its own refusals are plain text.
    """

    limits = ServerConfig()
    began: float | None = None
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit a connection, or refuse it with one line if all others have a request in progress."""
        super().connection_made(transport)
        self.address, limit = address_of(self.client[0]) if self.client else "", self.limits.connections
        others = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
        others = [other for other in others if not other.transport.is_closing()]
        same = [other for other in others if other.address == self.address]
        crowd = same if len(same) >= max(1, limit // 2) else others if len(others) >= limit else []
        idle = [other for other in crowd if other.idle]
        if idle:
            min(idle, key=lambda other: other.opened).close()
        elif crowd:
            self.refuse(ApiError(503, "expected fewer connections at a time, found too many", retry_after=1))
        self.opened = self.loop.time()
        self.wait()

    @property
    def idle(self) -> bool:
        """True if no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def wait(self) -> None:
        """Give the client some seconds for the next request's head."""
        self.began = None
        self.timer = self.loop.call_later(self.limits.idle, self.close)

    def close(self) -> None:
        """Close an idle connection."""
        if not self.transport.is_closing() and self.idle:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        """Note when a request begins, and that its head is complete."""
        before = self.cycle
        self.began = self.loop.time() if self.began is None else self.began
        super().data_received(data)
        if self.cycle is not before and self.timer is not None:
            self.timer.cancel()
            self.cycle.scope["began"] = self.began  # type: ignore[typeddict-unknown-key]

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        if self.timer is not None:
            self.timer.cancel()
        self.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()

    def refuse(self, error: ApiError) -> None:
        """Send an error and close, outside of any request."""
        response = error.response()
        head = [f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}".encode()]
        head += [name + b": " + value for name, value in (*response.raw_headers, (b"connection", b"close"))]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        self.refuse(ApiError(400, f"request: expected HTTP/1.1, found something else ({msg})", "invalid_request"))


class Server(uvicorn.Server):
    """A uvicorn server whose first signal to stop drains the engine client, and whose second stops at once.

    SIGHUP calls `reload`, except where the terminal that the server was started from is gone: then it stops.
    """

    def __init__(self, config: uvicorn.Config, client: EngineClient, drain: float, reload: Callable[[], None]) -> None:
        super().__init__(config)
        self.client, self.drain, self.reload = client, drain, reload
        self._tasks: list[asyncio.Task[None]] = []
        self._terminal = os.isatty(0)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal to stop."""
        seconds = 0.0 if self.client.draining else self.drain
        if seconds and self.client.streams:
            count = len(self.client.streams)
            logger.info(f"serve: {signal.Signals(sig).name}: finishing {count} requests, then stopping")
        self.client.draining = True
        self._tasks.append(asyncio.get_running_loop().create_task(self._exit_after(self.client.drain(seconds))))

    def hang_up(self) -> None:
        """Handle SIGHUP."""
        if self._terminal and not os.isatty(0):
            self.handle_exit(signal.SIGHUP, None)
            return
        try:
            self.reload()
        except (UserError, OSError) as error:
            logger.error(f"serve: SIGHUP: all stays as it was: {error}")
        else:
            self.client.reload()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and end when there is no worker to be had."""
        await super().startup(sockets)
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.hang_up)
        self._tasks.append(asyncio.create_task(self._exit_after(self.client.stopped.wait())))

    async def _exit_after(self, event: Awaitable[object]) -> None:
        await event
        self.should_exit = True


def run(
    worker: WorkerConfig, limits: QueueConfig, read_access: Callable[[], AccessConfig], server: ServerConfig
) -> int:
    """Serve until a signal; return the exit code 0, or 1 where no worker could be had.

    `read_access` reads the keys, at the start and at SIGHUP. Raises UserError for what cannot be read or listened on.
    """
    stop_keeping_memory()
    access = [read_access()]
    client = EngineClient(worker, limits)
    certificate: dict[str, Any] = {}
    if server.cert is not None:
        certificate = {"ssl_certfile": server.cert, "ssl_keyfile": server.key}
        check_certificate(server)
    listening = listen(server.host, server.port, server.connections)
    host, port = listening.getsockname()[:2]
    protocol = type("Protocol", (BoundedProtocol,), {"limits": server})
    config = uvicorn.Config(
        build(client, lambda: access[0], server.aliases),
        http=protocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, int(server.idle)),
        timeout_graceful_shutdown=5,
        **certificate,
    )

    def reload() -> None:
        access[0] = read_access()
        if server.cert is not None and config.ssl is not None:
            config.ssl.load_cert_chain(server.cert, server.key)

    name = f"[{host}]" if ":" in host else host
    logger.info(f"serve: http{'s' if server.cert else ''}://{name}:{port}{access[0].root_path}/  (Ctrl-C stops it)")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal that stopped it again
        Server(config, client, server.drain, reload).run([listening])
    return 1 if client.failure else 0


def check_certificate(server: ServerConfig) -> None:
    """Raise UserError if the TLS files cannot be used."""
    try:
        assert server.cert is not None
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(server.cert, server.key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{server.cert}: expected a certificate and its key in PEM, found none ({error})") from None


def listen(host: str, port: int, backlog: int = 512) -> socket.socket:
    """Return a listening socket. Raises UserError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only on a socket made with its protocol.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(backlog)  # now, so that whoever reads the address can connect
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"serve: expected to listen on {host} port {port}, found {error}") from None
    return listening
