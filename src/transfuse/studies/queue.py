"""A study's runs, taken one after another from a folder by any number of processes and machines; once each.

    queue = Queue(folder, runs, effort, {"study": "scaling"})
    queue.work(queue.chosen(only=("chameleon-*",)))

    STUDY/study.json              what all runs share: whose they are, how much is measured
    STUDY/positions.json          positions a step, by what pictures are made of
    STUDY/recogniser.safetensors  the judge of drawings, one for all
    STUDY/claims/                 who does what (`claims.py`)
    STUDY/runs/NAME/              a run like any other; its checkpoints go when it is measured
    STUDY/runs/NAME/machines.jsonl    what its seconds depend on, a line for each time that it was trained
    STUDY/results/NAME.json       what was found, whole or not at all: the run is done
    STUDY/failures/NAME.json      why a run came to nothing; it is tried again only when asked for by name

A run that was killed goes on from its newest checkpoint, here or elsewhere. Nothing but this folder is shared.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import nearest, read_json
from ..devices import processor_name
from ..errors import UserError
from ..evaluation import keep_recogniser
from ..evaluation.recogniser import Recogniser
from ..io import atomic_write
from ..log import logger
from ..model.flops import count_parameters
from ..presets import Recipe
from ..presets.runs import open_run
from ..training import RESUMABLE, DivergedError
from .arms import Effort, Exam, pin, positions_per_step
from .claims import hold, newest_claim
from .samples import grid
from .training import train_run

State = Literal["done", "failed", "taken", "begun", "open"]
LOOK = 5.0
"""seconds between looks at what another process is making for all"""
SHOWN = 8
"""drawings kept of each run, to look at"""


@dataclass(frozen=True)
class Planned:
    """A run to be: its recipe, what a table says of it, and positions a step.

    facts   arm, size, budget, seed or whatever tells a study's runs apart: they stand in its result
    """

    name: str
    recipe: Recipe
    facts: dict[str, Any]
    positions: float

    @property
    def flops(self) -> float:
        """6 N D, as far as it is known before."""
        return 6 * count_parameters(self.recipe.model).total * self.positions * self.recipe.loop.steps


def once(claims: Path, name: str, there: Callable[[], bool], make: Callable[[], object]) -> None:
    """Have something made by one of all processes; the others wait until it is there."""
    said = False
    while not there():
        with hold(claims, name) as held:
            if held and not there():
                make()
                return
        if not there():
            if not said:
                logger.info(f"{name}: being made by {newest_claim(claims, name)}; waiting")
            said = True
            time.sleep(LOOK)


class Survey:
    """Positions a step of recipes, counted once for a folder: all machines plan the same steps."""

    def __init__(self, folder: Path) -> None:
        self.path, self.claims = folder / "positions.json", folder / "claims"

    def __call__(self, recipe: Recipe) -> float:
        model, data = recipe.model, recipe.data
        rows = "documents" if data.row_length is None else f"rows of {data.row_length}"
        key = f"{model.images}, patches of {model.patch_size}, {data.autoencoder}, {data.batch_size} {rows} a step"
        key += f", text {data.text_share:g} of {data.share_of}"

        def known() -> dict[str, float]:
            return read_json(self.path) if self.path.is_file() else {}

        def count() -> None:
            logger.info(f"counting positions: {key}")
            found = {**known(), key: positions_per_step(recipe)}
            atomic_write(self.path, lambda path: path.write_text(json.dumps(found, indent=2) + "\n"))

        once(self.claims, "positions", lambda: key in known(), count)
        return known()[key]


def plan_run(name: str, recipe: Recipe, budget: float, payer: Recipe, survey: Survey, facts: dict[str, Any]) -> Planned:
    """A run of as many steps as `budget` positions are for the payer: the recipe itself, or, for text alone, the arm
    whose texts it reads. Short runs warm up over a tenth of their steps at most. Recipes are settled."""
    steps = max(1, round(budget / survey(payer)))
    optimizer = replace(recipe.optimizer, warmup=min(recipe.optimizer.warmup, steps // 10))
    loop = replace(recipe.loop, steps=steps, sample_every=0)
    return Planned(name, replace(recipe, loop=loop, optimizer=optimizer), facts, survey(recipe))


def short(number: float) -> str:
    """2000000 as 2M, 150000 as 150k, for names."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


class Queue:
    """The runs of a study in the order in which they are taken, the cheapest first."""

    def __init__(self, folder: Path, runs: Iterable[Planned], effort: Effort, shared: Mapping[str, Any]) -> None:
        """shared: the study's name and what the names of its runs do not tell, to which the folder keeps.

        Raises UserError under torchrun: a queue is worked on by processes that know nothing of each other.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("study: expected one process, found torchrun's; start the command several times instead")
        self.folder, self.effort, self.shared = folder, effort, shared
        self.runs = sorted(runs, key=lambda run: (run.flops, run.name))
        for one, other in pairwise(sorted(run.name for run in self.runs)):
            if one == other:
                raise UserError(f"study: expected runs of different names, found {one} twice")

    def result(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def failure(self, name: str) -> Path:
        return self.folder / "failures" / f"{name}.json"

    def chosen(self, only: Sequence[str] = (), index: int | None = None) -> list[Planned]:
        """Runs by names or patterns, or by the number that `--list` gives; all unless asked. Raises UserError."""
        if index is not None:
            if not 0 <= index < len(self.runs):
                raise UserError(f"--index: expected 0 to {len(self.runs) - 1}, found {index}")
            return [self.runs[index]]
        names = [run.name for run in self.runs]
        for pattern in only:
            if not fnmatch.filter(names, pattern):
                raise UserError(f'--only: no run "{pattern}"{nearest(pattern, names)}')
        return [run for run in self.runs if not only or any(fnmatch.fnmatchcase(run.name, one) for one in only)]

    def any_done(self) -> bool:
        return any(self.result(run.name).is_file() for run in self.runs)

    def state(self, run: Planned) -> State:
        if self.result(run.name).is_file():
            return "done"
        claim = newest_claim(self.folder / "claims", run.name)
        if claim is not None and claim.alive:
            return "taken"
        if self.failure(run.name).is_file():
            return "failed"
        return "begun" if (self.folder / "runs" / run.name / "config.json").is_file() else "open"

    def work(self, chosen: Sequence[Planned], again: bool = False) -> int:
        """Do what nobody has done or is doing; the exit code (75: stopped and saved). again: what failed, too.

        Raises UserError for a folder whose runs are measured otherwise.
        """
        data = self.runs[0].recipe.data
        split = {"text_share": data.text_share, "share_of": data.share_of}
        settings, path = {**self.shared, **split, **self.effort.settings()}, self.folder / "study.json"
        once(self.folder / "claims", "study", path.is_file, lambda: pin(path, settings))
        pin(path, settings)
        left = list(chosen)

        def over(run: Planned) -> bool:
            """By another process, maybe, since the last look."""
            return self.result(run.name).is_file() or (self.failure(run.name).is_file() and not again)

        while True:
            ready = [run for run in left if not over(run) and self.state(run) != "taken"]
            if not ready:
                break
            left.remove(ready[0])
            with hold(self.folder / "claims", ready[0].name) as held:
                if held and not over(ready[0]) and not self._do(ready[0]):
                    return RESUMABLE
        taken = [run.name for run in chosen if self.state(run) == "taken"]
        if taken:
            logger.info(f"{self.folder}: {', '.join(taken)} with other processes")
        return 0

    def _do(self, run: Planned) -> bool:
        """Train, measure, write down. False where it was stopped; what there is goes on another time."""
        folder = self.folder / "runs" / run.name
        done = sum(self.state(other) == "done" for other in self.runs)
        logger.info(f"{run.name}: {run.flops:.2g} operations (6 N D), {done} of {len(self.runs)} runs are done")
        try:
            recipe = open_run(run.recipe, folder)  # which refuses one that was begun by another plan
            if not (folder / "export" / "config.json").is_file():
                with (folder / "machines.jsonl").open("a") as file:
                    file.write(json.dumps(_machine(recipe)) + "\n")
                if train_run(recipe, folder).export is None:
                    return False
        except DivergedError as error:
            logger.info(f"{run.name}: failed: {error}")
            self._write(self.failure(run.name), {"run": run.name, **run.facts, "why": str(error)})
            return True
        logger.info(f"{run.name}: measuring")
        facts, drawn = self.exam.take(folder)
        if len(drawn):
            zoom = max(1, 96 // drawn.shape[1])
            grid(list(drawn[:SHOWN]), SHOWN, zoom).save(folder / "drawings.png")
        self._write(self.result(run.name), {"run": run.name, **run.facts, **facts, "machine": _machines(folder)})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return True

    def _write(self, path: Path, found: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda partial: partial.write_text(json.dumps(found, indent=2) + "\n"))
        if path.parent.name == "results":
            self.failure(found["run"]).unlink(missing_ok=True)

    @cached_property
    def exam(self) -> Exam:
        """The recogniser is trained by whoever needs it first.

        Raises UserError where another one judged the results that are there: trained anew elsewhere it sees a little
        otherwise, and distances in what it sees do not compare.
        """
        path, world = self.folder / "recogniser.safetensors", self.runs[0].recipe.data.world

        def open_judge() -> Recogniser:
            return keep_recogniser(path, world, self.effort.recogniser_steps)

        once(self.folder / "claims", "recogniser", path.is_file, open_judge)
        judge = open_judge()
        judges = {result["judge"] for result in _read_all(self.folder / "results") if "judge" in result}
        if judges - {judge.digest}:
            raise UserError(f"{path}: expected that of the results there, {', '.join(judges)}, found {judge.digest}")
        return Exam.of(world, self.effort, judge)

    def listing(self) -> str:
        """Every run with its number, its state and its planned cost."""
        width = max(len(run.name) for run in self.runs)
        lines = [f"{'':>4}  {'run':<{width}}  state   parameters    steps    6 N D"]
        left = 0.0
        for number, run in enumerate(self.runs):
            state, parameters = self.state(run), count_parameters(run.recipe.model).total
            left += 0.0 if state == "done" else run.flops
            who = f"  {newest_claim(self.folder / 'claims', run.name)}" if state == "taken" else ""
            steps, flops = run.recipe.loop.steps, run.flops
            lines.append(f"{number:>4}  {run.name:<{width}}  {state:<6}{parameters:>12,}{steps:>9,}{flops:>9.2g}{who}")
        total = sum(run.flops for run in self.runs)
        return "\n".join([*lines, f"6 N D in all {total:.3g}, of runs not yet done {left:.3g}"])


def write_report(
    folder: Path,
    analyse: Callable[[list[dict[str, Any]], list[dict[str, Any]]], dict[str, Any]],
    page: Callable[[dict[str, Any], Path], str],
    figures: Callable[[dict[str, Any]], dict[str, str]] = lambda report: {},
) -> dict[str, Any]:
    """`report.json` of all results that are there, or of those in an earlier one; and the page and figures from it.

    Processes write in turn, so the last has all results. Raises UserError where there are none, or another study's.
    """
    results, failures = _read_all(folder / "results"), _read_all(folder / "failures")
    if not results and (folder / "report.json").is_file():
        earlier = read_json(folder / "report.json")
        results, failures = earlier["results"], earlier["failures"]
    if not results:
        raise UserError(f"{folder}: expected results of runs, or a report.json with some, found none")
    written: dict[str, Any] = {}

    def write() -> None:
        report = analyse(_read_all(folder / "results") or results, failures)
        for path in (folder / "study.json", folder / "report.json"):
            if path.is_file() and (found := read_json(path).get("study")) != report["study"]:
                raise UserError(f"{path}: expected the study {report['study']}, found {found}")
        texts = {"report.json": json.dumps(report, indent=2) + "\n", "report.html": page(report, folder)}
        texts |= {f"figures/{name}.svg": svg for name, svg in figures(report).items()}
        for name, text in texts.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda partial, text=text: partial.write_text(text))  # type: ignore[misc]
        written.update(report)

    once(folder / "claims", "report", lambda: bool(written), write)
    logger.info(f"{folder / 'report.html'}: open it in a browser")
    return written


def _read_all(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(folder.glob("*.json"))]


def _machine(recipe: Recipe) -> dict[str, Any]:
    """What the seconds of training depend on, here and now. recipe: with its device settled."""
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(0) if recipe.device == "cuda" else "cpu",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "precision": recipe.precision,
    }


def _machines(folder: Path) -> dict[str, Any]:
    """The same of all times that a run was trained; facts in which they differ one after the other."""
    path, found = folder / "machines.jsonl", {}
    if not path.is_file():  # trained outside the queue
        return dict.fromkeys(("host", "device", "processor", "threads", "precision"), "not known")
    sessions = [json.loads(line) for line in path.read_text().splitlines()]
    for fact in sessions[0]:
        values = list(dict.fromkeys(one[fact] for one in sessions))
        found[fact] = values[0] if len(values) == 1 else ", then ".join(map(str, values))
    return found
