"""A server process: listens, drains when it is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from types import FrameType

import uvicorn

from ..errors import UserError
from ..log import logger
from .app import build
from .backend import Backend, QueueConfig
from .gate import GateConfig
from .metrics import Metrics
from .worker import WorkerConfig

CONNECTIONS = 512
"""that may be open at a time; further ones are answered 503"""


class Server(uvicorn.Server):
    """uvicorn's, but that the first signal to stop drains the backend, and a second one stops at once."""

    def __init__(self, config: uvicorn.Config, backend: Backend, drain: float) -> None:
        super().__init__(config)
        self.backend, self.drain = backend, drain
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is None and self.backend.facts is not None and self.backend.tickets:
            logger.info(
                f"serve: {signal.Signals(sig).name}: finishing {len(self.backend.tickets)} requests, then stopping"
            )
            self._draining = asyncio.get_running_loop().create_task(self._drain())
        else:
            self.should_exit = True

    async def _drain(self) -> None:
        await self.backend.drain(self.drain)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watch = asyncio.create_task(self._stop_with_the_backend())

    async def _stop_with_the_backend(self) -> None:
        """A server without a model to serve, now or ever, ends."""
        await self.backend.stopped.wait()
        self.should_exit = True


def run(worker: WorkerConfig, limits: QueueConfig, gate: GateConfig, host: str, port: int, drain: float) -> int:
    """Serve until a signal. Exit code 0, or 1 where there is no worker to be had."""
    backend = Backend(worker, limits, Metrics())
    listening = listen(host, port)
    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(
        build(backend, gate),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    logger.info(f"serve: http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C stops it)")
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again that it was stopped by
        Server(config, backend, drain).run([listening])
    return 1 if backend.failure else 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError where it can not be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Its protocol said: asyncio sends small pieces at once, without waiting for what acknowledges the last, only then.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(CONNECTIONS)  # now, so that whoever reads the address can connect
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"serve: expected to listen on {host} port {port}, found {error}") from None
    return listening
