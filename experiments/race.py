"""The race of docs/leaderboard.md, and time to quality: seconds of training from nothing until scores reach their aims.

    python -m experiments.race --preset small-64 --seeds 0 1 2                      or: transfuse study race ...
    python -m experiments.race --preset latents-32 --config experiments/rows/muon.toml --like runs/demo/report.json

Without `--like` the aims are the race's, on held-out combinations of its world: drawings by two judges of other
architectures and seeds, and captions. Judges' shares are corrected for their errors on real images, of which the strict
classifier names 90 %: small things are hard for it. With `--like` the aims are another run's scores: strict noun,
Fréchet distance and captions' nouns.

A run is measured at its end or, with `--every`, each time that many seconds have passed, and stops where it meets all
aims at once. Its seconds are those of training steps alone. The learning rate follows the recipe's steps, so a shorter
recipe may be faster.

    RACE/seed0/             the training run: metrics.jsonl is its log
    RACE/seed0/scores.json  what was measured, in order
    RACE/report.json        the aims, each seed's seconds and their median

The same command resumes a stopped run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL.Image

from emoji_scenes import World, WorldConfig, caption
from emoji_scenes.accuracy import caption_accuracy, draw_accuracy, held_out_scenes
from emoji_scenes.language import nouns_in
from emoji_scenes.metrics import TaskScenes, task_scenes
from emoji_scenes.scene_classifier import bundled_classifier, keep_scene_classifier
from emoji_scenes.scene_detector import SceneDetector, keep_scene_detector
from transfuse.cli.options import read
from transfuse.config import read_json, read_settings, updated
from transfuse.devices import processor_name
from transfuse.errors import UserError
from transfuse.evaluation.confidence import Estimate, corrected, share
from transfuse.evaluation.image_quality import frechet
from transfuse.inference import TransfusionPipeline
from transfuse.io import atomic_json
from transfuse.log import logger
from transfuse.recipes import Recipe, preset
from transfuse.runs.monitor import pipeline_of
from transfuse.train import train
from transfuse.training import RESUMABLE
from transfuse.version import __version__

from .common import check_grid, pin, run_script

JUDGES = ("first judge", "second judge")
TASKS = {"single object": "one thing right", "two objects": "two things right"}
AIMS = {
    **{f"one thing right, {judge}": 0.95 for judge in JUDGES},
    **{f"two things right, {judge}": 0.75 for judge in JUDGES},
    "captions, nouns right": 0.95,
}
LIKE = {
    "noun right, strict judge": ("noun_strict", "noun_strict_accuracy"),
    "Fréchet distance": ("frechet", "frechet_distance"),
    "captions, nouns right": ("caption_noun", "caption_noun_accuracy"),
}
"""the scores of another run, by their keys in the results of studies and in the demo's report"""
LOWER = ("Fréchet distance",)
BATCH = 24

SOURCES = {"world", "edits", "dialogues", "glosses"}

Measure = Callable[[TransfusionPipeline], dict[str, Estimate]]
Bounds = dict[str, dict[str, float]]
"""by score: its `floor`, of real images of other prompts, and its `ceiling`, of the real images"""


@dataclass(frozen=True)
class Race:
    """Train a recipe at several seeds until it meets the aims, and report the seconds of training.

    transfuse study race --preset small-64 --seeds 0 1 2
    """

    run: Path = Path("runs/race")
    """folder of all runs, judges and the report"""
    preset: str = "small-64"
    """recipe by name"""
    config: Path | None = None
    """file of settings that change it, as `train --config` takes"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """the median counts"""
    like: Path | None = None
    """report.json of a demo, or the result of a study's run, whose scores are the aims"""
    every: float | None = None
    """seconds of training between measurements; once, at the end, if not given"""
    pictures: int = 240
    """drawings, and captions, of each score"""
    judge_steps: int | None = None
    """training steps of the judges; their default if not given"""
    json: bool = False
    """end with one line of JSON"""


def check_options(options: Race) -> Recipe:
    """Return the recipe. Raises UserError for options that do not fit the race or each other."""
    check_grid(seeds=options.seeds)
    for name, least in (("every", 0.0), ("pictures", 1), ("judge_steps", 0)):
        value = getattr(options, name)
        if value is not None and not value > least:
            raise UserError(f"--{name.replace('_', '-')}: expected more than {least:g}, found {value:g}")
    recipe = preset(options.preset)
    if options.config is not None:
        recipe = updated(recipe, read_settings(options.config), str(options.config))
    if recipe.start:
        raise UserError(f"race: start: expected none, as training begins with nothing, found {recipe.start}")
    if options.like is not None:
        held_out_scenes(recipe.data.world, 1)  # refuses scenes of several things
    elif recipe.data.world != preset(Race.preset).data.world:
        raise UserError(f"race: data.world: expected that of {Race.preset}, found another")
    elif others := {source.partition(",")[0] for source in recipe.data.sources} - SOURCES:
        raise UserError(f"race: data.sources: expected some of {', '.join(sorted(SOURCES))}, found {min(others)}")
    return recipe


# --- scores -----------------------------------------------------------------------------------------------------------


def race_measure(options: Race, world: WorldConfig) -> tuple[Measure, Bounds]:
    """Return the measure of the race, one thing and two things drawn, by both judges, and captions' nouns; its bounds.

    The bounds are the judges' shares as they are, by which scores are corrected.
    """
    count = options.pictures
    judges = [
        keep_scene_detector(options.run / f"{name.replace(' ', '-')}.safetensors", world, options.judge_steps, second)
        for name, second in zip(JUDGES, (False, True), strict=True)
    ]
    tasks = task_scenes(world, "heldout", count, TASKS)
    known = [[verdicts(task, images, judges) for images in (task.real, task.others)] for task in tasks]
    bounds = {
        f"{TASKS[task.task]}, {name}": {"floor": float(other.mean()), "ceiling": float(real.mean())}
        for task, of_task in zip(tasks, known, strict=True)
        for name, real, other in zip(JUDGES, *of_task, strict=True)
    }
    shown = World(replace(world, split="heldout"))
    scenes = [shown.scene(index) for index in range(count)]
    pictures = [PIL.Image.fromarray(shown.render(scene)) for scene in scenes]
    truths = [nouns_in(caption(scene, index)) for index, scene in enumerate(scenes)]

    def measure(pipe: TransfusionPipeline) -> dict[str, Estimate]:
        scores = {}
        for task, of_task in zip(tasks, known, strict=True):
            drawn = verdicts(task, draw(pipe, task.prompts), judges)
            for name, each in zip(JUDGES, zip(drawn, *of_task, strict=True), strict=True):
                scores[f"{TASKS[task.task]}, {name}"] = corrected(each)
        answers = [text for at in range(0, count, BATCH) for text in pipe.caption(pictures[at : at + BATCH])]
        right = [nouns_in(answer) == truth for answer, truth in zip(answers, truths, strict=True)]
        return {**scores, "captions, nouns right": share(np.array(right))}

    return measure, bounds


def verdicts(task: TaskScenes, images: np.ndarray, judges: Sequence[SceneDetector]) -> list[np.ndarray]:
    """Return the verdicts of both judges, bool `[image]`.

    A single thing is judged by the strict classifier first; the second judge must see that thing alone.
    """
    if task.task != "single object":
        return [task.judge(images, judge)[0] for judge in judges]
    nouns = [scene.things[0].noun for scene in task.scenes]
    named = [[thing.noun for thing in seen] for seen in judges[1](images)]
    strict = bundled_classifier()(images)
    return [
        np.array([answer == noun for answer, noun in zip(strict, nouns, strict=True)]),
        np.array([seen == [noun] for seen, noun in zip(named, nouns, strict=True)]),
    ]


def draw(pipe: TransfusionPipeline, prompts: Sequence[str]) -> np.ndarray:
    """Draw prompts, uint8 `[image, row, column, 3]`; prompt n has the seed n."""
    starts = range(0, len(prompts), BATCH)
    return np.concatenate(
        [np.stack(pipe(list(prompts[at : at + BATCH]), generator=at, output_type="np").images) for at in starts]
    )


def like_measure(options: Race, world: WorldConfig) -> tuple[Measure, Bounds]:
    """Return the measure of time to quality, the scores of `LIKE`, and no bounds.

    Raises UserError where the other run was measured by another judge or on another number of drawings, by which
    Fréchet distances change.
    """
    count = options.pictures
    classifier = keep_scene_classifier(options.run / "recogniser.safetensors", world, options.judge_steps)
    report = read_json(options.like) if options.like else {}
    for keys, value in ((("recogniser_digest", "judge"), classifier.digest), (("pictures_measured",), count)):
        for key in keys:
            if report.get(key, value) != value:
                raise UserError(f"{options.like}: {key}: expected {value}, as here, found {report[key]}")
    real = classifier.features(held_out_scenes(world, count)[2])

    def measure(pipe: TransfusionPipeline) -> dict[str, Estimate]:
        drawings = draw_accuracy(pipe, world, count, classifier)
        distance = frechet(classifier.features(drawings.images), real)
        values = drawings.noun_strict, distance, caption_accuracy(pipe, world, count).noun
        return dict(zip(LIKE, values, strict=True))

    return measure, {}


def aims_like(path: Path) -> tuple[dict[str, float], float]:
    """Return the scores of another run, and its seconds of training. Raises UserError where the file lacks one."""
    report = read_json(path)
    aims = {}
    for name, keys in {**LIKE, "seconds": ("seconds",)}.items():
        values = [report[key] for key in keys if isinstance(report, dict) and key in report]
        if not values:
            raise UserError(f"{path}: {keys[0]}: expected a number, found none")
        aims[name] = float(values[0])
    return aims, aims.pop("seconds")


def meets(scores: Mapping[str, float], aims: Mapping[str, float]) -> bool:
    """Return whether scores reach all aims."""
    return all(scores[name] <= aim if name in LOWER else scores[name] >= aim for name, aim in aims.items())


# --- the race ---------------------------------------------------------------------------------------------------------


def run_seed(recipe: Recipe, folder: Path, every: float | None, measure: Measure, aims: Mapping[str, float]) -> bool:
    """Train and measure one run until it meets the aims or ends; return False if it was stopped and saved."""
    path = folder / "scores.json"
    rows: list[dict[str, Any]] = read_json(path) if path.is_file() else []
    while not (rows and (rows[-1]["ended"] or meets(rows[-1]["scores"], aims))):
        began = time.monotonic()
        trained = train(replace(recipe, loop=replace(recipe.loop, session_seconds=every)), folder)
        stopped = trained.outcome == "stopped"
        if stopped and (every is None or time.monotonic() - began < every):
            return False
        trainer = trained.trainer
        trainer.merge()
        scores = measure(pipeline_of(trained.run, trainer.averaged()))
        facts = {"step": trainer.step, "seconds": trainer.totals["seconds"], "ended": not stopped}
        values = {name: score.value for name, score in scores.items()}
        intervals = {name: [score.low, score.high] for name, score in scores.items()}
        rows.append({**facts, "scores": values, "intervals": intervals})
        atomic_json(path, rows)
        listed = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        logger.info(f"{folder.name}: {facts['seconds']:,.0f} s of training: {listed}")
    return True


def report_of(
    options: Race, aims: Mapping[str, float], reference: float | None, bounds: Bounds | None = None
) -> dict[str, Any]:
    """Return the report, as JSON; seconds are None where a run ended without meeting the aims."""
    runs = []
    for seed in options.seeds:
        rows = read_json(options.run / f"seed{seed}" / "scores.json")
        last = rows[-1]
        reached = meets(last["scores"], aims)
        runs.append({"seed": seed, "seconds": last["seconds"] if reached else None, "measured": rows})
    middle = median(math.inf if run["seconds"] is None else run["seconds"] for run in runs)
    return {
        "study": "race",
        "version": __version__,
        "preset": options.preset,
        "config": None if options.config is None else str(options.config),
        "pictures": options.pictures,
        "processor": processor_name(),
        "aims": dict(aims),
        "bounds": bounds or {},
        "runs": runs,
        "seconds": middle if middle < math.inf else None,
        "seconds_of_reference": reference,
        "ratio": middle / reference if reference and middle < math.inf else None,
    }


def table(report: dict[str, Any]) -> str:
    """Return a Markdown table: a row for each seed with its last scores, and a last line with the median."""
    aims = report["aims"]
    lines = [f"| seed | steps | seconds | {' | '.join(f'{name} ({aim:.3g})' for name, aim in aims.items())} |"]
    lines.append(f"| --- |{' ---: |' * (2 + len(aims))}")
    for run in report["runs"]:
        last = run["measured"][-1]
        seconds = "not reached" if run["seconds"] is None else f"{run['seconds']:,.0f}"
        scores = " | ".join(
            "{:.3g} ({:.3g} to {:.3g})".format(last["scores"][name], *last["intervals"][name]) for name in aims
        )
        lines.append(f"| {run['seed']} | {last['step']:,} | {seconds} | {scores} |")
    for key, words in (("ceiling", "real images"), ("floor", "those of other prompts")) if report["bounds"] else ():
        shares = [f"{report['bounds'][name][key]:.3g}" if name in report["bounds"] else "" for name in aims]
        lines.append(f"| {words} | | | {' | '.join(shares)} |")
    if report["seconds"] is None:
        lines.append("\nThe median seed does not reach all aims.")
    else:
        lines.append(f"\nMedian: {report['seconds']:,.0f} seconds of training.")
    if report["ratio"] is not None:
        lines.append(f"{report['ratio']:.2g} of the reference's {report['seconds_of_reference']:,.0f} seconds.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run the race; return the exit code and the report."""
    options = read(Race, arguments, "study race")
    recipe = check_options(options)
    aims, reference = (AIMS, None) if options.like is None else aims_like(options.like)
    make = race_measure if options.like is None else like_measure
    settings = {name: getattr(options, name) for name in ("preset", "pictures", "judge_steps")}
    paths = {name: None if (path := getattr(options, name)) is None else str(path) for name in ("config", "like")}
    pin(options.run / "study.json", {"study": "race", **settings, **paths})
    measure, bounds = make(options, recipe.data.world)
    for seed in options.seeds:
        if not run_seed(replace(recipe, seed=seed), options.run / f"seed{seed}", options.every, measure, aims):
            return RESUMABLE, {}
    report = report_of(options, aims, reference, bounds)
    atomic_json(options.run / "report.json", report)
    print(table(report))
    return 0, report


if __name__ == "__main__":
    run_script(main)
