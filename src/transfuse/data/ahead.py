"""Work done ahead, taken in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import TypeVar

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
