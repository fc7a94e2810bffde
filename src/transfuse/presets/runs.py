"""Run folders: claimed by one recipe, whose `config.json` says everything that defines the run."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch

from ..configuration import from_dict, read_json, to_dict
from ..errors import UserError
from ..training.ranks import Ranks

FREE = {
    "parallel",
    *(f"data.{name}" for name in ("accumulate", "workers", "cache_gigabytes")),
    *(f"loop.{name}" for name in ("keep", "keep_every", "checkpoint_every", "log_every", "sample_every")),
    *(f"loop.{name}" for name in ("session_seconds", "guard", "profile")),
}
"""settings that may be others when a run goes on: what it learns from, and how, is the same"""

VERSION = 1
"""of the layout of `config.json`"""

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]


class RunRecipe(Protocol):
    """A frozen dataclass that defines a run: of a Transfusion or of an autoencoder."""

    @property
    def device(self) -> Device: ...

    @property
    def precision(self) -> Precision: ...

    def settled(self) -> Any:
        """The recipe with what follows from other settings filled in. Raises UserError where its parts do not fit."""


R = TypeVar("R", bound=RunRecipe)


def check_split(batch_size: int, accumulate: int) -> None:
    """Raise ValueError where a batch can not be split into so many equal parts."""
    if accumulate < 1 or batch_size < 1 or batch_size % accumulate:
        raise ValueError(f"data.batch_size: expected a multiple of data.accumulate ({accumulate}), found {batch_size}")


def resolve(recipe: R) -> R:
    """Settle what is "auto" for this machine, so that a resumed run does not settle it differently."""
    device, precision = recipe.device, recipe.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA device, found none on this machine")
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" or _cpu_multiplies_bfloat16() else "float32"
    return replace(recipe, device=device, precision=precision)  # type: ignore[type-var]


def _cpu_multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16"))


def open_run(recipe: R, folder: Path) -> R:
    """Claim a run folder: a new one gets `config.json`, an old one must have been made by the same recipe.

    Raises UserError that names the first setting that differs.
    """
    recipe = recipe.settled()
    path = folder / "config.json"
    if not path.exists():
        recipe = resolve(recipe)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
        return recipe
    saved = read_recipe(path, type(recipe))
    asked = replace(recipe, device=saved.device, precision=saved.precision)  # type: ignore[type-var]
    difference = _first_difference(to_dict(saved), to_dict(asked))
    if difference:
        raise UserError(f"{path}: {difference}; give the same settings to go on, or another --run folder to start anew")
    return asked


def claim_run(recipe: R, folder: Path, ranks: Ranks) -> R:
    """`open_run` by all ranks of a run: the first one writes, and says what is wrong, once."""
    problem = ""
    if ranks.first:
        try:
            recipe = open_run(recipe, folder)
        except UserError as error:
            problem = str(error)
    problem = ranks.share(problem)
    if problem and ranks.first:
        raise UserError(problem)
    if problem:
        raise SystemExit(2)
    return recipe if ranks.first else open_run(recipe, folder)


def run_device(recipe: RunRecipe, folder: Path) -> str:
    """Where a run computes, or will: it goes on where it began."""
    path = folder / "config.json"
    return read_recipe(path, type(recipe)).device if path.exists() else resolve(recipe).device


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


def _first_difference(saved: Any, asked: Any, name: str = "") -> str:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in saved:
            if (f"{name}.{key}" if name else key) in FREE:
                continue
            difference = _first_difference(saved[key], asked.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return ""
    return "" if saved == asked else f"{name}: this run has {saved!r}, the command asks for {asked!r}"
