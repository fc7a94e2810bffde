"""A folder of runs that any number of processes work on, shared by all experiments.

    study = Study(folder, runs, size, {"study": "scaling"})
    study.work(study.chosen(only=("chameleon-*",)))

    STUDY/study.json              what all runs share: the study's name and how much is measured
    STUDY/positions.json          positions per step of each kind of batch, counted once
    STUDY/recogniser.safetensors  the judge of drawings, one for all runs
    STUDY/locks/                  one file lock per run; the system releases those of a killed process
    STUDY/runs/NAME/              a training run; its checkpoints are removed when it is measured
    STUDY/runs/NAME/machines.jsonl    one line per training session: what its seconds depend on
    STUDY/results/NAME.json       the measured result, written atomically: the run is done
    STUDY/failures/NAME.json      why a run diverged; it is tried again only when named by --only

A killed run resumes from its newest checkpoint. Processes share nothing but this folder; a SLURM array gives each of
its jobs `--index I --of N` instead.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout

from emoji_scenes import WorldConfig
from emoji_scenes.accuracy import held_out_scenes
from emoji_scenes.scene_classifier import SceneClassifier, keep_scene_classifier
from transfuse.config import nearest, read_json
from transfuse.devices import processor_name
from transfuse.errors import UserError
from transfuse.images import read_image
from transfuse.io import atomic_json
from transfuse.log import logger
from transfuse.model.costs import count_parameters
from transfuse.recipes import Recipe
from transfuse.report import Block, Card, Cards, Page, Section, Table, write_page
from transfuse.runs import open_run, resolve
from transfuse.runs.monitor import grid
from transfuse.train import build_loader, train
from transfuse.training import RESUMABLE, DivergedError

from .evaluation import EvalSize, evaluate_run, read_result, with_variant

SURVEYED = 50
"""steps whose positions are counted to turn a budget into a number of steps"""
SHOWN = 8
"""drawings kept of each run"""


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shared:
    """Options of every study with many runs."""

    renamed: ClassVar[dict[str, str]] = {"arms": "variants"}

    only: tuple[str, ...] = ()
    """names or patterns of runs, such as "chameleon-*"; one that failed is tried again"""
    index: int | None = None
    """do every N-th run from this one on; for arrays of jobs, with --of N"""
    of: int = 1
    """number of jobs in the array"""
    list_runs: Annotated[bool, tyro.conf.arg(name="list")] = False
    """list every run with its state and its planned 6 N D, and stop"""
    report_only: bool = False
    """only write the report of the results in the folder"""
    pictures: int = 512
    """images drawn, and as many captioned, by each run"""
    definitions: int | None = None
    """held-out definitions to score; all if not given"""
    recogniser_steps: int | None = None
    """training steps of the judge of drawings; its default if not given"""
    json: bool = False
    """end with one line of JSON"""


def run_script(main: Callable[[Sequence[str]], tuple[int, dict[str, Any]]]) -> NoReturn:
    """Run an experiment as a script: `python -m experiments.scaling`."""
    try:
        code, report = main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    if "--json" in sys.argv and not code:
        print(json.dumps(report))
    sys.exit(code)


def run_study(
    options: Any,
    plan: Callable[[], Iterable[StudyRun]],
    settings: Mapping[str, Any],
    write: Callable[[Path], dict[str, Any]],
    summary: Callable[[dict[str, Any]], str],
) -> tuple[int, dict[str, Any]]:
    """List, work or report, as the options say; print the summary; return the exit code and the report, {} without."""
    code, has_results = 0, True
    if not options.report_only:
        size = EvalSize(options.pictures, options.definitions, options.recogniser_steps)
        study = Study(options.run, plan(), size, settings)
        if options.list_runs:
            print(study.listing())
            return 0, {}
        code = study.work(study.chosen(options.only, options.index, options.of), again=bool(options.only))
        has_results = any(study.result(run.name).is_file() for run in study.runs)
    if code or not has_results:
        return code, {}
    report = write(options.run)
    print(summary(report))
    return code, report


# --- planning ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyRun:
    """A planned run. facts: variant, size, budget, seed; they are part of its result. positions: per step."""

    name: str
    recipe: Recipe
    facts: dict[str, Any]
    positions: float

    @property
    def flops(self) -> float:
        """The planned 6 N D."""
        return 6 * count_parameters(self.recipe.model).active * self.positions * self.recipe.loop.steps


def comparable(recipe: Recipe) -> tuple[Any, ...]:
    """Return what recipes must share to be compared: scenes, mixture, pairs, vocabulary and seed."""
    data = recipe.data
    mixture = (data.batch_size, data.text_share, data.share_of, data.pairs)
    return data.world, mixture, recipe.model.text_vocab_size, recipe.seed


def surveyed(folder: Path, recipe: Recipe) -> float:
    """Return a recipe's mean positions per step, counted once for a folder, so that all machines plan the same steps.

    They depend on its data, not on its size or seed.
    """
    model, data, path = recipe.model, recipe.data, folder / "positions.json"
    rows = "documents" if data.row_length is None else f"rows of {data.row_length}"
    key = f"{model.images}, patches of {model.patch_size}, {data.autoencoder}, {data.batch_size} {rows} a step"
    key += f", text {data.text_share:g} of {data.share_of}"
    key += "" if data.context == "capped" else f", context {data.context}"
    with lock(folder, "positions"):
        known = read_json(path) if path.is_file() else {}
        if key not in known:
            logger.info(f"counting positions: {key}")
            with tempfile.TemporaryDirectory() as scratch:
                load = build_loader(resolve(recipe), Path(scratch))
                counts = [batch.quantities["positions"] for step in range(SURVEYED) for batch in load(step)]
            known[key] = sum(counts) / SURVEYED
            write_json(path, known)
    return float(known[key])


def plan_run(
    folder: Path, name: str, recipe: Recipe, budget: float, budget_model: Recipe, facts: dict[str, Any]
) -> StudyRun:
    """Plan a run whose step count spends `budget` positions of the budget model; recipes are settled.

    The budget model is the recipe itself, or for text alone the variant whose texts it reads. A short run warms up over
    at most a tenth of its steps.
    """
    steps = max(1, round(budget / surveyed(folder, budget_model)))
    optimizer = replace(recipe.optimizer, warmup=min(recipe.optimizer.warmup, steps // 10))
    loop = replace(recipe.loop, steps=steps, sample_every=0)
    return StudyRun(name, replace(recipe, loop=loop, optimizer=optimizer), facts, surveyed(folder, recipe))


def check_grid(**axes: Sequence[Any]) -> None:
    """Raise UserError for an axis of a grid that is empty or repeats a value, or a budget that is not positive."""
    for name, values in axes.items():
        if not values or len(set(values)) < len(values):
            listed = ", ".join(map(str, values)) or "none"
            raise UserError(f"--{name}: expected at least one, and each once, found {listed}")
        if name in ("budgets", "positions"):
            for budget in values:
                if not 0 < budget < np.inf:
                    raise UserError(f"--{name}: expected positive numbers of positions, found {budget:g}")


# --- a folder of runs -------------------------------------------------------------------------------------------------


def lock(folder: Path, name: str) -> FileLock:
    """Return the lock of a name in a study's folder. Raises UserError where it cannot be written to."""
    try:
        (folder / "locks").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
    return FileLock(folder / "locks" / f"{name}.lock")


@contextmanager
def try_lock(folder: Path, name: str) -> Iterator[bool]:
    """Hold a lock while the context lasts; False where another process holds it."""
    file_lock = lock(folder, name)
    try:
        file_lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        file_lock.release()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_json(path, value)


def pin(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that all runs of a folder share; raise UserError where the folder has others."""
    if not path.is_file():
        write_json(path, dict(settings))
    saved = read_json(path)
    for name, value in settings.items():
        if saved.get(name) != value:
            was, now = (f"{x:g}" if isinstance(x, float) else x for x in (saved.get(name), value))
            raise UserError(f"{path}: expected --{name.replace('_', '-')} {was}, found {now}")


class Study:
    """The runs of a study, the cheapest first."""

    def __init__(self, folder: Path, runs: Iterable[StudyRun], size: EvalSize, settings: Mapping[str, Any]) -> None:
        """`settings`: the study's name and what the names of its runs do not tell; they are pinned in `study.json`.

        Raises UserError under torchrun, because the processes of a study do not communicate, or for repeated names.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("study: expected one process, found torchrun's; start the command several times instead")
        self.folder, self.size, self.settings = folder, size, settings
        self.runs = sorted(runs, key=lambda run: (run.flops, run.name))
        names = [run.name for run in self.runs]
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"study: expected runs of different names, found {name} twice")

    def result(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def failure(self, name: str) -> Path:
        return self.folder / "failures" / f"{name}.json"

    def chosen(self, only: Sequence[str] = (), index: int | None = None, of: int = 1) -> list[StudyRun]:
        """Return the runs of names or patterns, or every `of`-th from `index` on; all by default. Raises UserError."""
        if index is not None:
            if only or not 0 <= index < of:
                raise UserError(f"--index: expected 0 to {of - 1} as --of is {of}, without --only; found {index}")
            return self.runs[index::of]
        names = [run.name for run in self.runs]
        for pattern in only:
            if not fnmatch.filter(names, pattern):
                raise UserError(f'--only: no run "{pattern}"{nearest(pattern, names)}')
        return [run for run in self.runs if not only or any(fnmatch.fnmatchcase(run.name, each) for each in only)]

    def work(self, chosen: Sequence[StudyRun], again: bool = False) -> int:
        """Do every chosen run that no other process does or has done; return the exit code (75: stopped and saved).

        `again` retries failed runs. Raises UserError for a folder with other settings.
        """
        data = self.runs[0].recipe.data
        split = {"text_share": data.text_share, "share_of": data.share_of}
        with lock(self.folder, "study"):
            pin(self.folder / "study.json", {**self.settings, **split, **self.size.settings()})
        for run in chosen:
            with try_lock(self.folder, run.name) as free:
                if not free:
                    logger.info(f"{run.name}: another process runs it")
                elif self.result(run.name).is_file() or (self.failure(run.name).is_file() and not again):
                    continue
                elif not self._do(run):
                    return RESUMABLE
        return 0

    def _do(self, run: StudyRun) -> bool:
        """Train, measure and write the result; return False if training was stopped and saved."""
        folder = self.folder / "runs" / run.name
        logger.info(f"{run.name}: {run.flops:.2g} FLOPs (6 N D)")
        try:
            recipe = open_run(run.recipe, folder).recipe  # refuses a folder made by another plan
            if not (folder / "export" / "config.json").is_file():
                with (folder / "machines.jsonl").open("a") as file:
                    file.write(json.dumps(_machine(recipe)) + "\n")
                if train(recipe, folder).export is None:
                    return False
        except DivergedError as error:
            logger.info(f"{run.name}: failed: {error}")
            write_json(self.failure(run.name), {"run": run.name, **run.facts, "why": str(error)})
            return True
        logger.info(f"{run.name}: measuring")
        result, drawn = evaluate_run(folder, recipe.data.world, self.size, self.judge)
        if len(drawn):
            shown = list(drawn[:SHOWN])
            grid(shown, len(shown), max(1, 96 // drawn.shape[1])).save(folder / "drawings.png")
        facts = {"run": run.name, **run.facts, **result, "machine": _machines(folder / "machines.jsonl")}
        write_json(self.result(run.name), facts)
        self.failure(run.name).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return True

    @cached_property
    def judge(self) -> SceneClassifier:
        """The judge of drawings, trained by the first process that needs it.

        Raises UserError where another judge measured the results in the folder: distances by two do not compare.
        """
        path = self.folder / "recogniser.safetensors"
        with lock(self.folder, "recogniser"):
            judge = keep_scene_classifier(path, self.runs[0].recipe.data.world, self.size.recogniser_steps)
        results = [read_json(other) for other in (self.folder / "results").glob("*.json")]
        others = {result["judge"] for result in results if "judge" in result} - {judge.digest}
        if others:
            listed = ", ".join(others)
            raise UserError(f"{path}: expected the judge of the results there, {listed}, found {judge.digest}")
        return judge

    def listing(self) -> str:
        """Return a table of every run with its state and its planned cost."""
        width = max(len(run.name) for run in self.runs)
        lines = [f"{'':>4}  {'run':<{width}}  state    parameters    steps    6 N D"]
        left = 0.0
        for number, run in enumerate(self.runs):
            with try_lock(self.folder, run.name) as free:
                if self.result(run.name).is_file():
                    state = "done"
                elif not free:
                    state = "running"
                elif self.failure(run.name).is_file():
                    state = "failed"
                else:
                    state = "begun" if (self.folder / "runs" / run.name / "config.json").is_file() else "open"
            left += 0.0 if state == "done" else run.flops
            steps, parameters = run.recipe.loop.steps, count_parameters(run.recipe.model).active
            lines.append(f"{number:>4}  {run.name:<{width}}  {state:<7}{parameters:>12,}{steps:>9,}{run.flops:>9.2g}")
        total = sum(run.flops for run in self.runs)
        return "\n".join([*lines, f"6 N D in all {total:.3g}, of runs not yet done {left:.3g}"])


def _machine(recipe: Recipe) -> dict[str, Any]:
    """Return what the seconds of training depend on; the recipe's device is settled."""
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(0) if recipe.device == "cuda" else "cpu",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "precision": recipe.precision,
    }


def _machines(path: Path) -> dict[str, Any]:
    """Return the facts of all sessions that trained a run; those that differ are joined by "then"."""
    if not path.is_file():  # trained outside the study
        return dict.fromkeys(("host", "device", "processor", "threads", "precision"), "not known")
    sessions = [json.loads(line) for line in path.read_text().splitlines()]
    values = {fact: list(dict.fromkeys(session[fact] for session in sessions)) for fact in sessions[0]}
    return {fact: each[0] if len(each) == 1 else ", then ".join(map(str, each)) for fact, each in values.items()}


# --- reports ----------------------------------------------------------------------------------------------------------


def write_report(
    folder: Path,
    analyse: Callable[[list[dict[str, Any]], list[dict[str, Any]]], dict[str, Any]],
    page: Callable[[dict[str, Any], Path], Page],
) -> dict[str, Any]:
    """Write `report.json` and `report.html` of all results in a folder, or of an earlier `report.json` there.

    Raises UserError where there are no results, or those of another study.
    """
    earlier = folder / "report.json"
    with lock(folder, "report"):
        results = [read_result(path) for path in sorted((folder / "results").glob("*.json"))]
        failures = [read_result(path) for path in sorted((folder / "failures").glob("*.json"))]
        if not results and earlier.is_file():
            saved = read_json(earlier)
            results, failures = ([with_variant(each) for each in saved[name]] for name in ("results", "failures"))
        if not results:
            raise UserError(f"{folder}: expected results of runs, or a report.json with some, found none")
        report = analyse(results, failures)
        for path in (folder / "study.json", earlier):
            if path.is_file() and (name := read_json(path).get("study")) != report["study"]:
                raise UserError(f"{path}: expected the study {report['study']}, found {name}")
        write_json(earlier, report)
        write_page(folder / "report.html", page(report, folder))
    logger.info(f"{folder / 'report.html'}: open it in a browser")
    return report


def drawings_section(folder: Path, names: Sequence[str], world: WorldConfig) -> list[Section]:
    """Return the first drawings of runs next to the real scenes, where their contact sheets are in the folder."""
    paths = {name: folder / "runs" / name / "drawings.png" for name in names}
    sheets = {name: np.asarray(read_image(path)) for name, path in paths.items() if path.is_file()}
    if not sheets:
        return []
    _, prompts, real = held_out_scenes(world, SHOWN)
    rows = {"the scenes themselves": list(real)}
    for name, sheet in sheets.items():  # a row of squares; a run that drew fewer has fewer
        rows[name] = np.split(sheet, sheet.shape[1] // sheet.shape[0], axis=1)
    cards = [Card(images=list(zip(images, prompts, strict=False)), title=name) for name, images in rows.items()]
    return [Section("Drawings", "The first held-out prompts in order, by each run.", [Cards(cards, layout="full")])]


def difference_cells(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """Return the mean of a comparison (`statistics.Difference`, as JSON) and its interval, "" without one."""
    low, high = comparison["low"], comparison["high"]
    return f"{comparison['mean']:+.3g}", "" if low is None else f"{low:+.3g} to {high:+.3g}"


def common_scale(comparisons: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the ends of a scale, 0 in its middle, on which all these comparisons fit with their intervals."""
    top = 1.05 * max(abs(each[key] or 0.0) for each in comparisons for key in ("mean", "low", "high")) or 1.0
    return -top, top


def failures_block(report: dict[str, Any]) -> list[Block]:
    """Return a table of the failed runs, or nothing."""
    rows = [[run["run"], run["why"]] for run in report["failures"]]
    return [Table(["failed", "why"], rows)] if rows else []
