"""A run folder: its recipe in `config.json`, the lock of the process that trains in it, and its logged numbers.

transfuse.curves("runs/tiny")                         # its losses, and measures taken while it trained
transfuse.curves("runs/tiny", "runs/slower")          # a chart of each number, a curve for each run
transfuse.curves("runs/tiny").lines["runs/tiny"][-1]  # the last line of its metrics.jsonl
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from ..charts import ACCENT, SOFT, VIOLET, WARM, has_charts, line_chart, standing_alone
from ..config import from_dict, read_json, to_dict
from ..data.bundled import WorldConfig
from ..devices import pick_device, training_precision
from ..errors import UserError, install_command, shown
from ..export import describe
from ..folders import find_export
from ..io import atomic_write
from ..log import logger
from ..recipes import PRESETS, VERSION, AutoencoderRecipe, Recipe, preset
from ..training import DistilConfig, Distributed, LoopConfig, OptimizerConfig, read_metrics

FREE = {
    *(f"parallel.{name}" for name in ("replicate", "tensor", "activation_checkpointing", "compile")),
    *(f"data.{name}" for name in ("accumulate", "workers", "cache_gigabytes")),
    *(f"loop.{name}" for name in ("keep", "keep_every", "checkpoint_every", "log_every", "sample_every")),
    *(f"loop.{name}" for name in ("measure_every", "measures", "measure_count", "measure_data", "best", "patience")),
    *(f"loop.{name}" for name in ("session_seconds", "guard", "profile", "trackers")),
}
"""settings that may change when a run is resumed, as they do not change what it learns"""

LOSSES = ("text", "image")
COLOURS = (ACCENT, WARM, VIOLET, SOFT)
SHOWN = (*LOSSES, "gradient_norm", "positions", "images", "seconds")
"""columns of the table: the last numbers of each run"""

R = TypeVar("R", Recipe, AutoencoderRecipe)


def settle_device(recipe: R, folder: Path | None = None) -> R:
    """Replace "auto" in device and precision: by what the run in `folder` uses, else by what suits this machine."""
    path = None if folder is None else folder / "config.json"
    if path is not None and path.exists():
        saved = read_recipe(path, type(recipe))
        same = {name: getattr(saved, name) for name in ("device", "precision") if getattr(recipe, name) == "auto"}
        return replace(recipe, **same)
    device = pick_device(recipe.device)
    return replace(recipe, device=device, precision=training_precision(recipe.precision, device))


def run_device(recipe: R, folder: Path) -> str:
    """Return the device a run uses: the one it began with. Raises UserError if this machine has none."""
    path = folder / "config.json"
    return pick_device(read_recipe(path, type(recipe)).device if path.exists() else recipe.device)


def record_recipe(recipe: R, folder: Path) -> None:
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
        parts = name.split(".")
        if not any(".".join(parts[:count]) in FREE for count in range(1, len(parts) + 1)):
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
    """Return the recipe that distils an export to a few steps, on the data that it was trained on.

    A run of a few hundred steps: most of what a student needs, its teacher knows. Raises UserError for an export whose
    own recipe is not known.
    """
    recipe = recipe_of(model)
    if recipe is None:
        config = describe(model).place["config.json"]
        name = read_json(config).get("preset")
        raise UserError(f"{config}: preset: expected a preset, whose data it learns from, found {name!r}")
    return Recipe(
        preset=recipe.preset,
        start=model,
        distil=DistilConfig(steps=4),
        model=recipe.model,
        data=replace(recipe.data, autoencoder_weights=""),  # the teacher's copy
        objective=replace(recipe.objective, align_weight=0.0),
        optimizer=OptimizerConfig(learning_rate=5e-4, final_learning_rate=1e-5, warmup=20, weight_decay=0.0),
        loop=LoopConfig(steps=600, ema_decay=0.99, log_every=10, sample_every=100, checkpoint_every=100, keep=1),
    )


def is_kind(path: Path, kind: type[R]) -> bool:
    """Return True if a run's `config.json` has the settings of this kind of recipe."""
    values = read_json(path)
    return isinstance(values, dict) and values.keys() == {field.name for field in fields(kind)}


def _differences(saved: Any, given: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(given, dict):
        for key in saved:
            yield from _differences(saved[key], given.get(key), f"{name}.{key}" if name else key)
    elif saved != given:
        yield name, saved, given


@dataclass
class Curves:
    """Logged numbers by run folder; `_repr_html_` draws them. lines: those of `metrics.jsonl`, by the folder's name."""

    lines: dict[str, list[dict[str, Any]]]

    @property
    def names(self) -> list[str]:
        """The numbers that are drawn: losses, and measures taken while training (METRIC/NUMBER)."""
        logged = {name for lines in self.lines.values() for line in lines for name in line}
        return [
            *(name for name in LOSSES if name in logged),
            *sorted(name for name in logged if "/" in name and not name.startswith("image_by_timestep/")),
        ]

    def points(self, run: str, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of one number of a run."""
        return [(line["step"], line[name]) for line in self.lines[run] if line.get(name) is not None]

    def _repr_html_(self) -> str:
        """Return a chart of each number, with a curve for each run, and a table of the last numbers, for notebooks."""
        short = [Path(run).name for run in self.lines]
        labels = short if len({*short}) == len(short) else [*self.lines]
        parts = []
        for name in self.names:
            curves = [
                (label, self.points(run, name), COLOURS[number % len(COLOURS)])
                for number, (label, run) in enumerate(zip(labels, self.lines, strict=True))
            ]
            if chart := standing_alone(line_chart(curves, "step")):
                parts.append(
                    f'<figure style="display:inline-block; margin:0 1em 0 0">'
                    f"<figcaption>{html.escape(name)}</figcaption>{chart}</figure>"
                )
        if not has_charts():
            parts.append(f"<p>charts need matplotlib: {install_command('report')}</p>")
        return "".join([*parts, self._table()])

    def _table(self) -> str:
        logged = {name for lines in self.lines.values() for line in lines for name in line}
        columns = ["step", *(name for name in SHOWN if name in logged)]
        rows = [["run", *columns]]
        for run, lines in self.lines.items():
            last = {name: value for line in lines for name, value in line.items()}
            rows.append([run, *(f"{last[name]:,.4g}" if name in last else "" for name in columns)])
        cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def read_curves(*runs: Path | str) -> Curves:
    """Read the logged numbers of run folders: `transfuse.curves`. Raises UserError for a folder without any."""
    lines = {}
    for run in runs:
        if not isinstance(run, str | Path):
            raise UserError(f"curves: expected run folders, found {shown(run)}")
        path = Path(run) / "metrics.jsonl"
        lines[str(run)] = read_metrics(path)
        if not lines[str(run)]:
            raise UserError(f"{path}: expected the logged steps of a run, found none")
    return Curves(lines)
