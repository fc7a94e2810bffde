"""Networks that judge what a model draws: trained once for what they depend on, and kept in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar


class Judge(Protocol):
    """identity: all that it depends on; a saved one with another must not be used."""

    @property
    def identity(self) -> str: ...

    def save(self, path: Path) -> None: ...


J = TypeVar("J", bound=Judge)


def keep_judge(path: Path, identity: str, load: Callable[[Path], J], train: Callable[[], J]) -> J:
    """The one saved in a file, where it is the one that is needed; else a new one, which is saved there."""
    if path.is_file():
        saved = load(path)
        if saved.identity == identity:
            return saved
    judge = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    judge.save(path)
    return judge
