"""Who does what, among any number of processes and machines that share a folder and nothing else.

    with hold(folder / "claims", "chameleon-m-2M") as held:
        if held: ...                                    # nobody else does it meanwhile

    claims/chameleon-m-2M.0       host, process, since when; its time of change is the heartbeat
    claims/chameleon-m-2M.1       who came next: because the heart of 0 had stopped, or 0 had let go

The highest number holds. Files are created, exclusively, and never removed, so of two that come next one wins; whoever
was taken over while it stood still finds so at its next heartbeat, and ends there and then.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io import atomic_write
from ..log import logger
from ..training import RESUMABLE

BEAT = 20.0
"""seconds between heartbeats"""
DEAD = 600.0
"""seconds without one after which another may take over; at once where the process is seen to be gone"""


@dataclass(frozen=True)
class Claim:
    """Number `generation` of a name's claims. idle: seconds since its last heartbeat, by the file system's clock; home:
    where its process has its number (`_home`)."""

    generation: int
    host: str
    process: int
    home: str
    idle: float
    over: bool
    """let go"""

    @property
    def alive(self) -> bool:
        if self.over or self.idle > DEAD:
            return False
        if self.home != _home():
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}, last heard of {self.idle:.0f} s ago"


def newest_claim(folder: Path, name: str) -> Claim | None:
    """The claim that counts, alive or not; None where there is none."""
    generations = [int(end) for path in folder.glob(f"{name}.*") if (end := path.name[len(name) + 1 :]).isdigit()]
    if not generations:
        return None
    path = folder / f"{name}.{max(generations)}"
    try:
        idle = _now(folder) - path.stat().st_mtime
        who = json.loads(path.read_text() or "{}")
    except ValueError:  # its process died while it wrote
        who = {}
    return Claim(
        max(generations),
        who.get("host", "?"),
        who.get("process", 0),
        who.get("home", ""),
        max(0.0, idle),
        "over" in who,
    )


def _now(folder: Path) -> float:
    """The time by the clock of the folder's file system: machines' own may differ."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except PermissionError:  # a folder to look at alone
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


@contextmanager
def hold(folder: Path, name: str) -> Iterator[bool]:
    """Claim a name for as long as the context lasts; False where another, alive, has it.

    Raises UserError where the folder can not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = _take(folder, name)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
    if path is None:
        yield False
        return
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(folder, name, path, over), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        over.set()
        heart.join()
        atomic_write(path, lambda partial: partial.write_text(json.dumps({**_me(), "over": time.time()})))


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "process": os.getpid(), "home": _home()}


@cache
def _home() -> str:
    """Where numbers of processes mean the same: this machine since it was started, and this container of it, for two
    may have one name."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # of systems that have no such files
        return socket.gethostname()


def _take(folder: Path, name: str) -> Path | None:
    before = newest_claim(folder, name)
    if before is not None and before.alive:
        return None
    path = folder / f"{name}.{0 if before is None else before.generation + 1}"
    try:
        with path.open("x") as file:
            file.write(json.dumps({**_me(), "began": time.time()}))
    except FileExistsError:  # another was quicker
        return None
    if before is not None and not before.over:
        logger.info(f"{name}: taken over from {before}")
    return path


def _beat(folder: Path, name: str, path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        try:
            os.utime(path)
            newest = newest_claim(folder, name)
        except OSError as error:  # of a file system that is away for a while; the heart goes on
            logger.info(f"{path}: heartbeat not written ({error.strerror or error})")
            continue
        if newest is not None and folder / f"{name}.{newest.generation}" != path:
            _give_up(name)


def _give_up(name: str) -> None:
    """Two that write to one run's folder would spoil it: this one ends before it writes another byte."""
    logger.info(f"{name}: this process stood still for so long that another has taken over; it ends here")
    os._exit(RESUMABLE)
