"""The demo: train a small model on this machine, measure what it can do on what it never saw, and show it.

    runs/demo/trained.json               training is over: steps, images, seconds
    runs/demo/export/                    the model, to load and share
    runs/demo/recogniser.safetensors     the judge of its drawings
    runs/demo/report.json, report.html   every number, and a page to look at
    runs/demo/drawings.png               the first drawings of prompts it never saw, none picked out

What is finished is not done again; the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoji_scenes import NOUNS, glosses

from ..config import read_json, to_dict
from ..errors import UserError
from ..evaluation import (
    Estimate,
    Recogniser,
    bundled_classifier,
    caption_accuracy,
    draw_accuracy,
    held_out_scenes,
    keep_recogniser,
    model_hash,
    perplexity,
)
from ..evaluation.distances import frechet, frechet_distance
from ..evaluation.recogniser import STEPS as RECOGNISER_STEPS
from ..inference import ImageEnd, ImageProgress, Reply, TransfusionPipeline
from ..log import logger
from ..presets import Recipe, preset
from ..presets.recipe import build_trainer
from ..presets.runs import read_recipe, resolve
from ..training import RESUMABLE, read_metrics
from ..training.metrics import Average
from ..version import __version__
from .report import Exhibits, write_report
from .samples import grid
from .training import train_run

SAFETY = 0.9
"""share of the time that the planned steps may take: machines do not keep their pace"""
STRIP = 10
"""pictures of a drawing on its way"""


@dataclass(frozen=True)
class Effort:
    """How much is measured: pictures drawn and as many captioned, definitions read, steps of the recogniser."""

    pictures: int = 120
    definitions: int | None = None
    """None: all that are held out"""
    recogniser_steps: int = RECOGNISER_STEPS


def run_demo(
    folder: Path, minutes: float, recipe: Recipe | None = None, effort: Effort | None = None
) -> tuple[int, dict[str, Any]]:
    """Do all of it in a run folder. Gives the exit code (75: stopped and saved) and the report.

    An existing run keeps the recipe it was started with. Raises UserError where the folder can not be used.
    """
    if minutes <= 0:
        raise UserError(f"minutes: expected more than 0, found {minutes:g}")
    effort = effort or Effort()
    trained = _train(folder, minutes, recipe)
    if trained is None:
        return RESUMABLE, {}
    recipe = read_recipe(folder / "config.json", Recipe)
    written, page = folder / "report.json", folder / "report.html"
    made_of = {"version": __version__, "model_hash": model_hash(folder / "export"), "effort": to_dict(effort)}
    done = read_json(written) if written.is_file() and page.is_file() else {}
    if made_of.items() <= done.items():
        logger.info(f"{page}: everything is done already; open it in a browser")
        return 0, done
    recogniser = keep_recogniser(
        folder / "recogniser.safetensors", recipe.data.world, effort.recogniser_steps, recipe.seed
    )
    began = time.monotonic()
    pipe = TransfusionPipeline.from_pretrained(folder / "export", device=recipe.device)
    report, exhibits = measure(pipe, recipe, recogniser, effort)
    report = {
        **made_of,
        "command": f"transfuse demo --run {folder} --minutes {minutes:g}",
        "preset": recipe.preset,
        "seed": recipe.seed,
        **trained,
        **report,
        "recogniser_seconds": recogniser.seconds,
        "measuring_seconds": round(time.monotonic() - began, 1),
        "machine": _machine(recipe),
    }
    write_report(page, report, exhibits, recipe, read_metrics(folder / "metrics.jsonl"))
    grid(list(exhibits.drawings.images[:36]), columns=12, zoom=2).save(folder / "drawings.png")
    partial = written.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(written)
    logger.info(
        f"demo: drawings with the noun right: {report['noun_strict_accuracy']:.1%} named among all {len(NOUNS)} nouns "
        f"and none, {report['noun_accuracy']:.1%} picked among its own {report['nouns']}"
    )
    logger.info(f"{page}: open it in a browser")
    return 0, report


# --- training ---------------------------------------------------------------------------------------------------------


def _train(folder: Path, minutes: float, recipe: Recipe | None) -> dict[str, Any] | None:
    """What training took, by the name it has in the report; None if it was stopped."""
    path, begun = folder / "trained.json", (folder / "config.json").is_file()
    if begun:
        recipe = read_recipe(folder / "config.json", Recipe)
        _check_minutes(folder, recipe, minutes)
    if path.is_file() and (folder / "export" / "config.json").is_file():
        facts: dict[str, Any] = read_json(path)
        logger.info(f"{folder}: trained already, {facts['steps']} steps")
        return facts
    recipe = recipe if begun and recipe is not None else fit(recipe or preset("demo"), minutes)
    trained = train_run(recipe, folder)
    if trained.export is None:
        return None
    totals = trained.trainer.totals
    facts = {
        "parameters": sum(parameter.numel() for parameter in trained.trainer.model.parameters()),
        "steps": trained.trainer.step,
        "planned_steps": recipe.loop.steps,
        "train_seconds": round(totals["seconds"], 1),
        "images_seen": totals["images"],
        "text_tokens_seen": totals["text_targets"],
        "positions_seen": totals["positions"],
        "training_operations": totals["flops"],
        "train_tokens_per_second": round(totals["positions"] / totals["seconds"], 1),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _check_minutes(folder: Path, recipe: Recipe, minutes: float) -> None:
    """Raise UserError where a run that there is was begun with another time: its learning rate falls over that one."""
    begun = recipe.loop.max_seconds
    if begun is not None and begun != minutes * 60:
        raise UserError(
            f"minutes: expected {begun / 60:g}, as {folder} was begun with, found {minutes:g}; --run begins another"
        )


def fit(recipe: Recipe, minutes: float) -> Recipe:
    """The recipe with as many steps as fit into the time here, never more than it asks for.

    The learning rate falls over the steps planned, so they must be known before the first: a throw-away trainer, with
    a folder of its own, takes a few and is timed.
    """
    average, paces = Average(), []
    with tempfile.TemporaryDirectory() as scratch:
        trainer, _ = build_trainer(resolve(recipe), Path(scratch))
        for _ in range(20):
            began = time.monotonic()
            trainer.train_step(average)
            paces.append(time.monotonic() - began)
    # The first steps prepare kernels, and a passing disturbance must not halve the training: the quicker ones count.
    pace = sorted(paces)[len(paces) // 4]
    steps = max(1, min(recipe.loop.steps, int(SAFETY * minutes * 60 / pace)))
    logger.info(f"demo: {pace * 1000:.0f} ms a step here: {steps} steps, about {steps * pace / 60:.1f} minutes")
    return replace(recipe, loop=replace(recipe.loop, steps=steps, max_seconds=minutes * 60))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    pipe: TransfusionPipeline, recipe: Recipe, recogniser: Recogniser, effort: Effort
) -> tuple[dict[str, Any], Exhibits]:
    """All numbers of the report that come from the model, and what there is to see."""
    world = recipe.data.world
    drawings = draw_accuracy(pipe, world, effort.pictures, recogniser)
    captions = caption_accuracy(pipe, world, effort.pictures)
    unread = glosses("heldout")[: effort.definitions]
    text = perplexity(pipe.exported, unread)
    words = perplexity(pipe.exported, captions.truths)
    continuations, pace_many, pace_one = _continue(pipe, recipe, unread)
    interleaved, own_accord, within = _interleaved(pipe, recipe, unread)
    strip, strip_prompt, one_image = _strip(pipe, drawings.prompts[0])
    sampler = pipe.exported.generation.sampler
    real, (_, _, others) = recogniser.features(drawings.real_images), held_out_scenes(world, effort.pictures, seed=1)
    report: dict[str, Any] = {
        "nouns": len(world.noun_names),
        "image_size": world.size,
        "pictures_measured": effort.pictures,
        **_named("background_accuracy", drawings.background),
        **_named("noun_strict_accuracy", drawings.noun_strict),
        **_named("noun_accuracy", drawings.noun),
        **_named("both_accuracy", drawings.both),
        "real_background_accuracy": drawings.real_background.value,
        "real_noun_strict_accuracy": drawings.real_noun_strict.value,
        "real_noun_accuracy": drawings.real_noun.value,
        **_named("frechet_distance", frechet(recogniser.features(drawings.images), real)),
        "frechet_distance_of_other_real_pictures": frechet_distance(recogniser.features(others), real),
        **_named("caption_noun_accuracy", captions.noun),
        **_named("caption_background_accuracy", captions.background),
        **_named("caption_both_accuracy", captions.both),
        "chance_noun_strict_accuracy": drawings.chance_noun_strict,
        "chance_noun_accuracy": drawings.chance_noun,
        "chance_background_accuracy": drawings.chance_background,
        "draws_of_its_own_accord": own_accord,
        "draws_within_definitions": within,
        **_named("heldout_text_perplexity", text.perplexity),
        **_named("bits_per_byte", text.bits_per_byte),
        "heldout_text_tokens": text.tokens,
        "heldout_definitions": text.documents,
        "heldout_caption_perplexity": words.perplexity.value,
        "recogniser_accuracy": float(np.mean(list(recogniser.accuracy.values()))),
        "recogniser_accuracy_by_split": recogniser.accuracy,
        "recogniser_parameters": recogniser.parameters,
        "recogniser_digest": recogniser.digest,
        "strict_judge_digest": drawings.strict_digest,
        "strict_judge_accuracy": bundled_classifier().accuracy,
        "strict_judge_false_acceptance": bundled_classifier().false_acceptance,
        "images_per_second": effort.pictures / drawings.seconds,
        "seconds_for_one_image": one_image,
        "tokens_per_second": pace_many,
        "tokens_per_second_alone": pace_one,
        "captions_per_second": effort.pictures / captions.seconds,
        "sampler": sampler.name,
        "denoising_steps": sampler.steps,
        "guidance_scale": pipe.exported.generation.guidance_scale,
    }
    return report, Exhibits(drawings, captions, continuations, interleaved, strip, strip_prompt)


def _named(name: str, found: Estimate) -> dict[str, Any]:
    return {name: found.value, f"{name}_interval": [found.low, found.high]}


def _continue(
    pipe: TransfusionPipeline, recipe: Recipe, unread: list[str]
) -> tuple[list[tuple[str, str]], float, float]:
    """Definitions of the first nouns and of words whose definitions it never read; tokens a second, many and one."""
    nouns = list(recipe.data.world.noun_names[:4])
    unknown = [line.partition(":")[0] for line in unread[:: max(1, len(unread) // 4)]][:4]
    prompts = [f"{word}:" for word in [*nouns, *unknown]]
    requests = [replace(pipe.request([prompt]), draw="never", max_tokens=48) for prompt in prompts]
    began = time.monotonic()
    replies = pipe.replies(requests)
    many = sum(reply.done.text_tokens for reply in replies) / (time.monotonic() - began)
    began = time.monotonic()
    alone = pipe.replies(requests[:1])[0]
    one = alone.done.text_tokens / (time.monotonic() - began)
    return [(prompt, reply.text) for prompt, reply in zip(prompts, replies, strict=True)], many, one


def _interleaved(
    pipe: TransfusionPipeline, recipe: Recipe, unread: list[str]
) -> tuple[list[tuple[str, Reply]], float, float]:
    """Rows in which the model decides, to show: after captions it never saw, and after the beginnings of some.

    With them the share of such captions after which it draws at once, and that of definitions in which it draws at all:
    only a model for which both are right knows when to draw.
    """
    scenes, texts, _ = held_out_scenes(recipe.data.world, 12, seed=1)
    begun = [f"a picture of {NOUNS[scene.things[0].noun].a}" for scene in scenes[:2]] + ["There is a"]
    definitions = [" ".join(line.split()[:4]) for line in unread[:12]]
    prompts = [*texts, *begun, *definitions]
    replies = pipe.replies([replace(pipe.request([text]), draw="auto", seed=n) for n, text in enumerate(prompts)])
    first = len(texts) + len(begun)
    at_once = [bool(reply.parts) and not isinstance(reply.parts[0], str) for reply in replies[: len(texts)]]
    within = [bool(reply.images) for reply in replies[first:]]
    shown = [*range(3), *range(len(texts), first)]
    return [(prompts[n], replies[n]) for n in shown], float(np.mean(at_once)), float(np.mean(within))


def _strip(pipe: TransfusionPipeline, prompt: str) -> tuple[list[tuple[int, np.ndarray]], str, float]:
    """The predicted clean image at about ten of the steps of one drawing, and the seconds it took."""
    request = replace(pipe.request([prompt]), draw="force", max_tokens=0, preview_every=1)
    total = request.sampler.steps
    chosen = {round(step) for step in np.linspace(1, total, min(STRIP, total))}
    strip: list[tuple[int, np.ndarray]] = []
    began = time.monotonic()
    seconds = 0.0
    for event in pipe.stream(request):
        if isinstance(event, ImageProgress) and event.step in chosen and event.preview is not None:
            strip.append((event.step, np.asarray(pipe.picture(event.preview))))
        elif isinstance(event, ImageEnd):
            seconds = time.monotonic() - began
    return strip, prompt, seconds


def _machine(recipe: Recipe) -> dict[str, Any]:
    """Facts on which the speeds depend."""
    cuda = recipe.device == "cuda"
    return {
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "training_precision": recipe.precision,
        "inference_precision": "float32",
        "system": platform.system(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
