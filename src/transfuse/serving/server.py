"""The server's process: listens, and finishes what runs before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Awaitable
from types import FrameType

import uvicorn

from ..errors import UserError
from ..log import logger
from .app import build
from .engine_client import EngineClient, QueueConfig
from .middleware import AccessConfig
from .worker import WorkerConfig

CONNECTIONS = 512
"""most open connections; uvicorn refuses more with 503"""


class Server(uvicorn.Server):
    """A uvicorn server whose first signal to stop drains the engine client, and whose second stops at once."""

    def __init__(self, config: uvicorn.Config, client: EngineClient, drain: float) -> None:
        super().__init__(config)
        self.client, self.drain = client, drain
        self._tasks: list[asyncio.Task[None]] = []

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal to stop."""
        seconds = 0.0 if self.client.draining else self.drain
        if seconds and self.client.streams:
            count = len(self.client.streams)
            logger.info(f"serve: {signal.Signals(sig).name}: finishing {count} requests, then stopping")
        self.client.draining = True
        self._tasks.append(asyncio.get_running_loop().create_task(self._exit_after(self.client.drain(seconds))))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, and end when there is no worker to be had."""
        await super().startup(sockets)
        self._tasks.append(asyncio.create_task(self._exit_after(self.client.stopped.wait())))

    async def _exit_after(self, event: Awaitable[object]) -> None:
        await event
        self.should_exit = True


def run(worker: WorkerConfig, limits: QueueConfig, access: AccessConfig, host: str, port: int, drain: float) -> int:
    """Serve until a signal; return the exit code 0, or 1 where no worker could be had."""
    client = EngineClient(worker, limits)
    listening = listen(host, port)
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        build(client, access),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    logger.info(f"serve: http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C stops it)")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal that stopped it again
        Server(config, client, drain).run([listening])
    return 1 if client.failure else 0


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only on a socket made with its protocol.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(CONNECTIONS)  # now, so that whoever reads the address can connect
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"serve: expected to listen on {host} port {port}, found {error}") from None
    return listening
