"""Networks that judge what a model draws: trained once for what they depend on, and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from emoji_scenes import WorldConfig
from emoji_scenes.sprites import SPRITE_FILE

from ..config import to_dict
from ..io import sha256
from ..version import __version__


class Judge(Protocol):
    """identity: all that it depends on; a saved one with another must not be used."""

    @property
    def identity(self) -> str: ...

    def save(self, path: Path) -> None: ...


J = TypeVar("J", bound=Judge)


def judge_identity(world: WorldConfig, **facts: Any) -> str:
    """Return as JSON what a judge depends on: its world and settings, the drawings of things, the package's version."""
    package = {"version": __version__, "sprites": sha256(SPRITE_FILE)[:16]}
    return json.dumps({"world": to_dict(world), **facts, **package}, sort_keys=True)


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
