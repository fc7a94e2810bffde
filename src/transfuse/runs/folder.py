"""A run folder: `config.json` holds the recipe, and one process at a time trains in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock, Timeout

from ..config import from_dict, read_json, to_dict
from ..data.bundled import WorldConfig
from ..devices import Device, Precision, pick_device, training_precision
from ..errors import UserError
from ..export import describe
from ..folders import find_export
from ..io import atomic_write
from ..log import logger
from ..recipes import PRESETS, Recipe, preset
from ..recipes.recipe import VERSION, student
from ..training import Distributed, LoopConfig

FREE = {
    *(f"parallel.{name}" for name in ("replicate", "tensor", "activation_checkpointing", "compile")),
    *(f"data.{name}" for name in ("accumulate", "workers", "cache_gigabytes")),
    *(f"loop.{name}" for name in ("keep", "keep_every", "checkpoint_every", "log_every", "sample_every")),
    *(f"loop.{name}" for name in ("measure_every", "measures", "measure_count", "measure_data", "best", "patience")),
    *(f"loop.{name}" for name in ("session_seconds", "guard", "profile", "trackers")),
}
"""settings that may change when a run is resumed, as they do not change what it learns"""


class RunRecipe(Protocol):
    """A frozen dataclass that defines a run, of a model or of an autoencoder."""

    @property
    def device(self) -> Device: ...

    @property
    def precision(self) -> Precision: ...

    @property
    def loop(self) -> LoopConfig: ...


R = TypeVar("R", bound=RunRecipe)


def settle_device(recipe: R, folder: Path | None = None) -> R:
    """Replace "auto" in device and precision: by what the run in `folder` uses, else by what suits this machine."""
    path = None if folder is None else folder / "config.json"
    if path is not None and path.exists():
        saved = read_recipe(path, type(recipe))
        same = {name: getattr(saved, name) for name in ("device", "precision") if getattr(recipe, name) == "auto"}
        return replace(recipe, **same)  # type: ignore[type-var]
    device = pick_device(recipe.device)
    precision = training_precision(recipe.precision, device)
    return replace(recipe, device=device, precision=precision)  # type: ignore[type-var]


def run_device(recipe: RunRecipe, folder: Path) -> str:
    """Return the device a run uses: the one it began with. Raises UserError if this machine has none."""
    path = folder / "config.json"
    return pick_device(read_recipe(path, type(recipe)).device if path.exists() else recipe.device)


def record_recipe(recipe: RunRecipe, folder: Path) -> None:
    """Write `config.json` of a new run, or check that an earlier run has the same recipe.

    Settings in FREE may differ; they are logged, and `config.json` stays as the run began.

    Raises UserError that names the first other setting that differs.
    """
    path = folder / "config.json"
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
        atomic_write(
            path, lambda partial: partial.write_text(json.dumps(to_dict(recipe), indent=2) + "\n", encoding="utf-8")
        )
        return
    saved = read_recipe(path, type(recipe))
    differences = list(_differences(to_dict(saved), to_dict(recipe)))
    for name, before, now in differences:
        if not _is_free(name):
            raise UserError(
                f"{path}: {name}: this run has {before!r}, the command asks for {now!r}; give the same settings to "
                "resume, or another --run folder to start a new run"
            )
    if differences:
        changes = ", ".join(f"{name} {now!r} (was {before!r})" for name, before, now in differences)
        logger.info(f"{folder}: resumes with changed settings: {changes}")


@contextmanager
def held(folder: Path, ranks: Distributed) -> Iterator[None]:
    """Hold a run folder while training, so that two commands cannot overwrite each other's checkpoints.

    The lock belongs to the first rank's process and ends with it. Raises UserError if another process holds it.
    """
    lock = ranks.on_rank0(lambda: _lock(folder))
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(folder: Path) -> FileLock:
    lock = FileLock(folder / ".lock")
    try:
        (folder / ".lock").touch()
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
    try:
        # Not inherited by forked loader workers (filelock 4.3), which may outlive a killed run by seconds.
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: expected a run that nobody else trains, found another process at it") from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        reason = getattr(error, "strerror", None) or error
        logger.info(f"{folder}: cannot be locked ({reason}): do not train there twice at once")
    return lock


def read_recipe(path: Path, kind: type[R]) -> R:
    """Read the recipe of a run. Raises UserError for a missing file, another version or another kind of run."""
    values = read_json(path)
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: version: expected {VERSION}, found {version}")
    return from_dict(kind, values, str(path))


def recipe_of(model: str) -> Recipe | None:
    """Return the recipe of an export: of the run whose folder it is in, else of the preset that it names, or None."""
    export, run = describe(model), find_export(model).parent / "config.json"
    if run.is_file() and is_kind(run, Recipe):
        return read_recipe(run, Recipe)
    config = export.place["config.json"]
    name = read_json(config).get("preset")
    if name not in PRESETS:
        return None
    recipe = preset(name)
    if export.world is not None:
        world = from_dict(WorldConfig, export.world, f"{config}: world")
        recipe = replace(recipe, data=replace(recipe.data, world=world))
    return recipe


def student_of(model: str) -> Recipe:
    """Return the recipe that distils an export (`student`). Raises UserError for one whose own recipe is not known."""
    recipe = recipe_of(model)
    if recipe is None:
        config = describe(model).place["config.json"]
        name = read_json(config).get("preset")
        raise UserError(f"{config}: preset: expected a preset, whose data it learns from, found {name!r}")
    return student(recipe, model)


def is_kind(path: Path, kind: type[RunRecipe]) -> bool:
    """Return True if a run's `config.json` has the settings of this kind of recipe."""
    values = read_json(path)
    return isinstance(values, dict) and values.keys() == {field.name for field in fields(kind)}  # type: ignore[arg-type]


def _differences(saved: Any, given: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in saved:
            yield from _differences(saved[key], given.get(key), f"{name}.{key}" if name else key)
    elif saved != given:
        yield name, saved, given


def _is_free(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:count]) in FREE for count in range(1, len(parts) + 1))
