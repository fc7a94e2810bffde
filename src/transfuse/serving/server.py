"""The server's process: listens, bounds its connections, reloads, and finishes what runs before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..devices import keep_freed_memory
from ..errors import UserError
from ..log import logger
from .app import build
from .engine_client import EngineClient, QueueConfig
from .middleware import AccessConfig, address_of
from .protocol import ApiError
from .worker import WorkerConfig

ACCEPTED = 16  # connections accepted in one turn of the event loop, so that a flood of them delays no others
CHUNKS, CHUNK = 256, 64
"""after the first number of chunks of a body, the second is the fewest bytes that they must have on average"""
GOODBYE = 1.0  # seconds for a client to answer that TLS ends
WAITING = 512  # connections that the system keeps until they are accepted


@dataclass(frozen=True)
class ServerConfig:
    """The address of a server, and how it listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    drain: float = 30.0  # seconds to finish what runs before it stops
    cert: Path | None = None  # TLS certificate chain, a PEM file; `key` is its private key, another
    key: Path | None = None
    aliases: tuple[str, ...] = ()  # other names of the model
    connections: int = 512  # most at a time; of one address half of them
    idle: float = 20.0  # seconds for a connection to send the whole head of a request, and before it TLS's handshake


class Parser(h11.Connection):
    """HTTP/1.1's parser, which refuses a body of many tiny chunks: each takes it as long as a large one."""

    chunks = data = 0
    tiny = False

    def next_event(self) -> Any:
        """Return the next part of what was received. Raises RemoteProtocolError."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = self.data = 0
        elif isinstance(event, h11.Data):
            self.chunks, self.data = self.chunks + event.chunk_start, self.data + len(event.data)
            self.tiny = self.chunks > CHUNKS and self.data < self.chunks * CHUNK
            if self.tiny:
                raise h11.RemoteProtocolError("tiny chunks")
        return event


class BoundedProtocol(H11Protocol):
    """A connection that must send its request's head in time. One too many takes the place of one that is idle.

    uvicorn bounds neither the time of a head nor the connections of an address, and its own refusals are plain text.
    With TLS a connection counts as soon as it is accepted: asyncio's own TLS servers report it only after the
    handshake, so the handshake is made here.
    """

    limits = ServerConfig()
    tls: ClassVar[ssl.SSLContext | None] = None
    open: ClassVar[dict[BoundedProtocol, None]] = {}  # all connections, those first that have been idle for longest
    of_address: ClassVar[Counter[str]] = Counter()  # their number, by address
    began: float | None = None
    timer: asyncio.TimerHandle | None = None
    handshake: asyncio.Task[None] | None = None
    early: list[bytes] | None = None  # what came together with the end of the handshake, until that is known to be over

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn: Parser = Parser(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Admit a connection, or refuse it if all others have a request in progress: with one line, if without TLS."""
        super().connection_made(transport)
        if self.tls is not None:
            transport.pause_reading()
            self.early = []
        self.address, limit = address_of(self.client[0]) if self.client else "", self.limits.connections
        crowded = self.of_address[self.address] >= max(1, limit // 2)
        if crowded or len(self.open) >= limit:
            same = (other for other in self.open if other.idle and (not crowded or other.address == self.address))
            if longest := next(same, None):
                longest.close()
            else:
                self.refuse(ApiError(503, "expected fewer connections at a time, found too many", retry_after=1))
                return
        self.of_address[self.address] += 1
        self.open[self] = None
        self.wait()
        if self.tls is not None:
            self.handshake = self.loop.create_task(self.secure(transport, self.tls))

    async def secure(self, plain: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """Put TLS in place of plain TCP, and then read what the client sends."""
        idle, transport = self.limits.idle, None
        with contextlib.suppress(OSError):  # no TLS, or the client left
            transport = await self.loop.start_tls(
                plain, self, tls, server_side=True, ssl_handshake_timeout=idle, ssl_shutdown_timeout=GOODBYE
            )
        if transport is None:
            self.connection_lost(None)
        elif self in self.open:
            super().connection_made(transport)
            early, self.early = self.early or [], None
            for data in early:
                self.data_received(data)

    @property
    def idle(self) -> bool:
        """True if no request is in progress, and its response is sent."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.get_write_buffer_size()

    def wait(self) -> None:
        """Give the client some seconds to take the last response, and then for the next request's head."""
        self.began, self.unsent = None, self.transport.get_write_buffer_size()
        self.timer = self.loop.call_later(self.limits.idle, self.expire)
        if self in self.open:
            self.open[self] = self.open.pop(self)  # now the last

    def expire(self) -> None:
        """Close the connection, unless its client has taken some of the last response meanwhile."""
        if self.transport.get_write_buffer_size() < self.unsent:
            self.wait()
        else:
            self.close()

    def close(self) -> None:
        """Close the connection at once, whatever its client has not taken yet."""
        self.leave()
        self.transport.abort()

    def leave(self) -> None:
        """Count the connection no longer."""
        if self in self.open:
            del self.open[self]
            self.of_address[self.address] -= 1
            if not self.of_address[self.address]:
                del self.of_address[self.address]
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Note when a request begins, and that its head is complete."""
        if self.early is not None:
            self.early.append(data)
            return
        before = self.cycle
        self.began = self.loop.time() if self.began is None else self.began
        super().data_received(data)
        if self.cycle is not before:
            self.begin()

    def begin(self) -> None:
        """Tell the application when the request began, and how to end the connection."""
        if self.timer is not None:
            self.timer.cancel()
        more = {"began": self.began or self.loop.time(), "abort": self.transport.abort}
        self.cycle.scope.update(more)  # type: ignore[typeddict-item]

    def on_response_complete(self) -> None:
        """Wait for the next request, or begin the one that has come already."""
        before = self.cycle
        super().on_response_complete()
        if self.timer is not None:
            self.timer.cancel()
        if self.cycle is before:
            self.wait()
        else:
            self.began = None
            self.begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self.leave()

    def refuse(self, error: ApiError) -> None:
        """Send an error and close, outside of any request. Before a handshake nothing can be sent."""
        if self.early is not None:
            self.transport.abort()
            return
        response = error.response()
        head = [f"HTTP/1.1 {error.status_code} {HTTPStatus(error.status_code).phrase}".encode()]
        head += [name + b": " + value for name, value in (*response.raw_headers, (b"connection", b"close"))]
        self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP."""
        message = f"request: expected HTTP/1.1, found something else ({msg})"
        if self.conn.tiny:
            message = f"body: expected chunks of {CHUNK} bytes and more, found over {CHUNKS} smaller ones"
        self.refuse(ApiError(400, message, "invalid_request"))


def bounded_protocol(server: ServerConfig) -> type[BoundedProtocol]:
    """Return a protocol with connections and a certificate of this server alone. Raises UserError for its files."""
    own = {"limits": server, "open": {}, "of_address": Counter(), "tls": server.cert and read_certificate(server)}
    return type("Protocol", (BoundedProtocol,), own)


def read_certificate(server: ServerConfig) -> ssl.SSLContext:
    """Return the context of TLS. Raises UserError if its files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(server.cert or "", server.key)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"{server.cert}: expected a certificate and its key in PEM, found none ({error})") from None
    return context


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
        for listening in sockets or ():
            listening.listen(WAITING)  # asyncio has set it to `ACCEPTED`
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
    keep_freed_memory(False)
    access = [read_access()]
    client = EngineClient(worker, limits)
    protocol = bounded_protocol(server)
    listening = listen(server.host, server.port)
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        build(client, lambda: access[0], server.aliases),
        http=protocol,
        backlog=ACCEPTED,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=max(1, int(server.idle)),
        timeout_graceful_shutdown=5,
    )

    def reload() -> None:
        read = read_access()
        if protocol.tls is not None and server.cert is not None:
            protocol.tls.load_cert_chain(server.cert, server.key)
        access[0] = read

    name = f"[{host}]" if ":" in host else host
    logger.info(f"serve: http{'s' if server.cert else ''}://{name}:{port}{access[0].root_path}/  (Ctrl-C stops it)")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal that stopped it again
        Server(config, client, server.drain, reload).run([listening])
    gc.freeze()  # else the interpreter spends two seconds on freeing all objects before it ends
    return 1 if client.failure else 0


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only on a socket made with its protocol.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(WAITING)  # now, so that whoever reads the address can connect
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"serve: expected to listen on {host} port {port}, found {error}") from None
    return listening
