"""Run folders: claimed by one recipe, whose `config.json` says everything that defines the run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from ..config import from_dict, read_json, to_dict
from ..devices import Device, Precision, pick_device, training_precision
from ..errors import UserError
from ..log import logger
from ..training import Distributed, LoopConfig
from ..training.metrics import check_trackers

FREE = {
    "parallel",
    *(f"data.{name}" for name in ("accumulate", "workers", "cache_gigabytes")),
    *(f"loop.{name}" for name in ("keep", "keep_every", "checkpoint_every", "log_every", "sample_every")),
    *(f"loop.{name}" for name in ("measure_every", "measures", "measure_count", "best")),
    *(f"loop.{name}" for name in ("session_seconds", "guard", "profile", "trackers")),
}
"""settings that may be others when a run goes on: what it learns from, and how, is the same"""

VERSION = 2
"""of the layout of `config.json`"""


class RunRecipe(Protocol):
    """A frozen dataclass that defines a run: of a Transfusion or of an autoencoder."""

    @property
    def device(self) -> Device: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def loop(self) -> LoopConfig: ...

    def settled(self) -> Any:
        """The recipe with what follows from other settings filled in. Raises UserError where its parts do not fit."""


R = TypeVar("R", bound=RunRecipe)


def check_split(batch_size: int, accumulate: int) -> None:
    """Raise ValueError where a batch can not be split into so many equal parts."""
    if accumulate < 1 or batch_size < 1 or batch_size % accumulate:
        raise ValueError(f"data.batch_size: expected a multiple of data.accumulate ({accumulate}), found {batch_size}")


def resolve(recipe: R) -> R:
    """Settle what is "auto" for this machine, so that a resumed run does not settle it differently."""
    device = pick_device(recipe.device)
    precision = training_precision(recipe.precision, device)
    return replace(recipe, device=device, precision=precision)  # type: ignore[type-var]


def open_run(recipe: R, folder: Path) -> R:
    """Claim a run folder: a new one gets `config.json`, an old one must have been made by the same recipe.

    Of the settings in FREE those asked for now count, and it is said which are others; `config.json` stays as the run
    began. Raises UserError that names the first other setting that differs, or a package that a tracker needs.
    """
    check_trackers(recipe.loop.trackers)
    recipe = recipe.settled()
    path = folder / "config.json"
    if not path.exists():
        recipe = resolve(recipe)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".partial-{os.getpid()}")
            partial.write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
        return recipe
    saved = read_recipe(path, type(recipe))
    settled = {name: getattr(saved, name) for name in ("device", "precision") if getattr(recipe, name) == "auto"}
    asked = replace(recipe, **settled)  # type: ignore[type-var]
    differences = list(_differences(to_dict(saved), to_dict(asked)))
    for name, before, now in differences:
        if not _is_free(name):
            raise UserError(
                f"{path}: {name}: this run has {before!r}, the command asks for {now!r}; give the same settings to go "
                "on, or another --run folder to start anew"
            )
    if differences:
        others = ", ".join(f"{name} {now!r} ({before!r})" for name, before, now in differences)
        logger.info(f"{folder}: goes on with settings other than those it began with, in brackets: {others}")
    return asked


@contextmanager
def claimed(recipe: R, folder: Path, ranks: Distributed) -> Iterator[R]:
    """`open_run` by all ranks of a run, while no other command trains there: two would write over each other's
    checkpoints. The first rank writes, and says what is wrong, once.

    The lock is the process's, and goes with it, however it ends. Raises UserError where another has it, too.
    """
    opened = ranks.on_rank0(lambda: open_run(recipe, folder)) or open_run(recipe, folder)
    held = ranks.on_rank0(lambda: _locked(folder))
    try:
        yield opened
    finally:
        if held is not None:
            held.close()


def _locked(folder: Path) -> IO[str]:
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
    try:
        # Not flock, which workers would inherit, and hold for as long as they outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX names both
        file.close()
        raise UserError(f"{folder}: expected a run that nobody else trains, found another process at it") from None
    except OSError as error:  # a file system without locks
        logger.info(f"{folder}: can not be locked ({error.strerror or error}): do not train there twice at once")
    return file


def run_device(recipe: RunRecipe, folder: Path) -> str:
    """Where a run computes, or will: it goes on where it began. Raises UserError where there is no such device."""
    path = folder / "config.json"
    return pick_device(read_recipe(path, type(recipe)).device if path.exists() else recipe.device)


def read_recipe(path: Path, kind: type[R]) -> R:
    """The recipe of a run. Raises UserError: no such file, another version, another kind of run."""
    values = read_json(path)
    found = values.get("version") if isinstance(values, dict) else None
    if found != VERSION:
        raise UserError(f"{path}: version: expected {VERSION}, found {found}")
    return from_dict(kind, values, str(path))


def is_kind(path: Path, kind: type[RunRecipe]) -> bool:
    """Whether a run's file holds a recipe of this kind: its settings have the kind's names."""
    values = read_json(path)
    return isinstance(values, dict) and values.keys() == {field.name for field in fields(kind)}  # type: ignore[arg-type]


def _differences(saved: Any, asked: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in saved:
            yield from _differences(saved[key], asked.get(key), f"{name}.{key}" if name else key)
    elif saved != asked:
        yield name, saved, asked


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in FREE for count in range(1, len(parts) + 1))
