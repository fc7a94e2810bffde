"""Work done ahead, by threads or by other processes, and taken in order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any, TypeVar

import torch

from ..errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    submit: Callable[[Item], Future[Result]], items: Iterable[Item], window: int
) -> Generator[Result, None, None]:
    """The results of `submit(item)` in the order of the items, of which up to `window` are under way at a time."""
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(submit(item))
            if len(pending) > window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def processes(count: int, begin: Callable[..., None], *arguments: Any, what: str) -> Iterator[ProcessPoolExecutor]:
    """A pool of worker processes of one thread each; every one calls `begin(*arguments)` first, and ends when this
    process does, even killed.

    Raises UserError, "`what`: ...", where one of them dies.
    """
    with ProcessPoolExecutor(count, initializer=_begin, initargs=(begin, arguments)) as pool:
        try:
            yield pool
        except BrokenProcessPool:
            raise UserError(f"{what}: a worker process died, perhaps of too little memory; call again") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:  # else a worker whose parent was killed would wait for work for ever
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    begin(*arguments)
