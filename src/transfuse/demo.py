"""`transfuse demo`: train a small model on this machine, measure it on what it never saw, and show it.

    runs/demo/trained.json               written when training is over: steps, images, seconds
    runs/demo/export/                    the model, to load and share
    runs/demo/recogniser.safetensors     the judge of its drawings
    runs/demo/report.json, report.html   every number, and a page to look at
    runs/demo/drawings.png               the first drawings of prompts it never saw, in order

The same command resumes a stopped run and repeats nothing that is done.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .charts import ACCENT, VIOLET, WARM, line_chart
from .config import read_json, to_dict
from .data.bundled import (
    CLASSIFIER_STEPS,
    NOUNS,
    CaptionResult,
    DrawingResult,
    SceneClassifier,
    bundled_classifier,
    caption_accuracy,
    draw_accuracy,
    glosses,
    held_out_scenes,
    keep_scene_classifier,
)
from .errors import UserError
from .evaluation import model_hash, perplexity
from .evaluation.image_quality import frechet, frechet_distance
from .inference import ImageEnd, ImageProgress, Reply, TransfusionPipeline
from .io import atomic_json
from .log import logger
from .recipes import Recipe, preset
from .report import (
    Bar,
    Bars,
    Block,
    Card,
    Cards,
    Charts,
    Details,
    Numbers,
    Page,
    Section,
    Table,
    Text,
    leaves,
    percent,
    with_interval,
    write_page,
)
from .runs import read_recipe
from .runs.monitor import grid
from .train import step_seconds, train
from .training import RESUMABLE, read_metrics
from .version import __version__

SAFETY = 0.9
"""share of the time that the planned steps may take, because a machine's speed varies"""


@dataclass(frozen=True)
class Effort:
    """The amount of measuring: images drawn and captioned, definitions read, training steps of the recogniser."""

    pictures: int = 120
    definitions: int | None = None
    """None: all held-out ones"""
    recogniser_steps: int = CLASSIFIER_STEPS


@dataclass(eq=False)
class Exhibits:
    """Everything the page shows.

    continuations   (prompt, the text the model wrote)
    interleaved     (prompt, the reply: texts and images in the order the model chose)
    strip           (step, predicted clean image uint8 `[row, column, 3]`) of a drawing of the first prompt
    """

    drawings: DrawingResult
    captions: CaptionResult
    continuations: list[tuple[str, str]]
    interleaved: list[tuple[str, Reply]]
    strip: list[tuple[int, np.ndarray]]


def run_demo(
    folder: Path, minutes: float, recipe: Recipe | None = None, effort: Effort | None = None
) -> tuple[int, dict[str, Any]]:
    """Train, measure and write the page in a run folder; return the exit code (75: stopped and saved) and the report.

    An existing run keeps its recipe. Raises UserError where the folder cannot be used.
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
    recogniser = keep_scene_classifier(
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
        "machine": {
            "device": torch.cuda.get_device_name(0) if recipe.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "training_precision": recipe.precision,
            "inference_precision": "float32",
            "system": platform.system(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    write_page(page, demo_page(report, exhibits, recipe, read_metrics(folder / "metrics.jsonl")))
    grid(list(exhibits.drawings.images[:36]), columns=12, zoom=2).save(folder / "drawings.png")
    atomic_json(written, report)
    logger.info(
        f"demo: drawings with the noun right: {report['noun_strict_accuracy']:.1%} named among all {len(NOUNS)} nouns "
        f"and none, {report['noun_accuracy']:.1%} picked among its own {report['nouns']}"
    )
    logger.info(f"{page}: open it in a browser")
    return 0, report


# --- training ---------------------------------------------------------------------------------------------------------


def _train(folder: Path, minutes: float, recipe: Recipe | None) -> dict[str, Any] | None:
    """Train and export; return the report's facts about training, or None if it was stopped."""
    path, begun = folder / "trained.json", (folder / "config.json").is_file()
    if begun:
        recipe = read_recipe(folder / "config.json", Recipe)
        limit = recipe.loop.max_seconds  # the learning rate decays over it
        if limit is not None and limit != minutes * 60:
            wanted = f"{limit / 60:g}, with which {folder} was started"
            raise UserError(f"minutes: expected {wanted}, found {minutes:g}; use another --run")
    if path.is_file() and (folder / "export" / "config.json").is_file():
        facts: dict[str, Any] = read_json(path)
        logger.info(f"{folder}: trained already, {facts['steps']} steps")
        return facts
    recipe = recipe if begun and recipe is not None else fit(recipe or preset("demo"), minutes)
    trained = train(recipe, folder)
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
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def fit(recipe: Recipe, minutes: float) -> Recipe:
    """Return the recipe with the number of steps that fit into the time here, at most its own.

    The learning rate decays over the planned steps, so they must be known before the first: a few steps are timed.
    """
    pace = step_seconds(recipe)
    steps = max(1, min(recipe.loop.steps, int(SAFETY * minutes * 60 / pace)))
    logger.info(f"demo: {pace * 1000:.0f} ms a step here: {steps} steps, about {steps * pace / 60:.1f} minutes")
    return replace(recipe, loop=replace(recipe.loop, steps=steps, max_seconds=minutes * 60))


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    pipe: TransfusionPipeline, recipe: Recipe, recogniser: SceneClassifier, effort: Effort
) -> tuple[dict[str, Any], Exhibits]:
    """Return the report's numbers about the model, and the examples of the page."""
    world = recipe.data.world
    drawings = draw_accuracy(pipe, world, effort.pictures, recogniser)
    captions = caption_accuracy(pipe, world, effort.pictures)
    unread = glosses("heldout")[: effort.definitions]
    text = perplexity(pipe.exported, unread)
    words = perplexity(pipe.exported, captions.truths)
    continuations, pace_many, pace_one = _continue(pipe, recipe, unread)
    interleaved, own_accord, within = _interleaved(pipe, recipe, unread)
    strip, one_image = _strip(pipe, drawings.prompts[0])
    sampler = pipe.exported.generation.sampler
    real, (_, _, others) = recogniser.features(drawings.real_images), held_out_scenes(world, effort.pictures, seed=1)
    report: dict[str, Any] = {
        "nouns": len(world.noun_names),
        "image_size": world.size,
        "pictures_measured": effort.pictures,
        **with_interval("background_accuracy", drawings.background),
        **with_interval("noun_strict_accuracy", drawings.noun_strict),
        **with_interval("noun_accuracy", drawings.noun),
        **with_interval("both_accuracy", drawings.both),
        "real_background_accuracy": drawings.real_background.value,
        "real_noun_strict_accuracy": drawings.real_noun_strict.value,
        "real_noun_accuracy": drawings.real_noun.value,
        **with_interval("frechet_distance", frechet(recogniser.features(drawings.images), real)),
        "frechet_distance_of_other_real_pictures": frechet_distance(recogniser.features(others), real),
        **with_interval("caption_noun_accuracy", captions.noun),
        **with_interval("caption_background_accuracy", captions.background),
        **with_interval("caption_both_accuracy", captions.both),
        "chance_noun_strict_accuracy": drawings.chance_noun_strict,
        "chance_noun_accuracy": drawings.chance_noun,
        "chance_background_accuracy": drawings.chance_background,
        "draws_of_its_own_accord": own_accord,
        "draws_within_definitions": within,
        **with_interval("heldout_text_perplexity", text.perplexity),
        **with_interval("bits_per_byte", text.bits_per_byte),
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
    return report, Exhibits(drawings, captions, continuations, interleaved, strip)


def _continue(
    pipe: TransfusionPipeline, recipe: Recipe, unread: list[str]
) -> tuple[list[tuple[str, str]], float, float]:
    """Write definitions of known and held-out words; return them with tokens per second in a batch and alone."""
    nouns = list(recipe.data.world.noun_names[:4])
    unknown = [line.partition(":")[0] for line in unread[:: max(1, len(unread) // 4)]][:4]
    prompts = [f"{word}:" for word in [*nouns, *unknown]]
    requests = [replace(pipe.request([prompt]), draw="never", max_tokens=48) for prompt in prompts]
    began = time.monotonic()
    replies = pipe.replies(requests)
    many = sum(reply.done.text_tokens for reply in replies) / (time.monotonic() - began)
    began = time.monotonic()
    alone = pipe.replies(requests[:1])[0]
    single = alone.done.text_tokens / (time.monotonic() - began)
    return [(prompt, reply.text) for prompt, reply in zip(prompts, replies, strict=True)], many, single


def _interleaved(
    pipe: TransfusionPipeline, recipe: Recipe, unread: list[str]
) -> tuple[list[tuple[str, Reply]], float, float]:
    """Let the model decide when to draw, after unseen captions, the beginnings of captions, and definitions.

    Return the replies to show, the share of captions after which it draws at once, and the share of definitions in
    which it draws at all; only a model with a high first and a low second share knows when to draw.
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


def _strip(pipe: TransfusionPipeline, prompt: str) -> tuple[list[tuple[int, np.ndarray]], float]:
    """Draw one image; return the predicted clean image at about ten of its steps, and the seconds it took."""
    request = replace(pipe.request([prompt]), draw="force", max_tokens=0, preview_every=1)
    total = request.sampler.steps
    chosen = {round(step) for step in np.linspace(1, total, min(10, total))}
    strip: list[tuple[int, np.ndarray]] = []
    began = time.monotonic()
    seconds = 0.0
    for event in pipe.stream(request):
        if isinstance(event, ImageProgress) and event.step in chosen and event.preview is not None:
            strip.append((event.step, np.asarray(pipe.picture(event.preview))))
        elif isinstance(event, ImageEnd):
            seconds = time.monotonic() - began
    return strip, seconds


# --- the page ---------------------------------------------------------------------------------------------------------


def demo_page(report: dict[str, Any], exhibits: Exhibits, recipe: Recipe, metrics: Sequence[dict[str, Any]]) -> Page:
    """Return the demo's page. report: as in `report.json`; metrics: the lines of `metrics.jsonl`."""
    machine = report["machine"]
    threads = "one processor thread" if machine["threads"] == 1 else f"{machine['threads']} processor threads"
    where = threads if machine["device"] == "cpu" else machine["device"]
    lead = (
        f"One transformer that draws, captions and writes: {report['parameters'] / 1e6:.1f} million parameters, "
        f"trained from scratch for {report['train_seconds'] / 60:.1f} minutes on {where} with "
        f"{report['images_seen']:,} captioned images of {report['nouns']} things and with dictionary definitions."
    )
    count, drawings = report["pictures_measured"], exhibits.drawings
    strip = Card(drawings.prompts[0], [(image, f"step {n}") for n, image in exhibits.strip])
    sections = [
        Section(
            "Drawings",
            f"All {count} prompts in order. A strict judge names the thing among all nouns, or finds none plain; a "
            "second judge must choose among the nouns of this training, so a blob of the right colour is enough for "
            "it. The background is read off the border.",
            [Cards(_drawing_cards(drawings), "", "pictures", 36)],
        ),
        Section(
            "From noise to image",
            "The image the model expects at the end, at steps along the way.",
            [Cards([strip], "", "full")],
        ),
        Section(
            "Text and images in its own order",
            "Nothing tells the model to draw: after every token it may continue with a word, an image or the end. Its "
            "words are coloured. The first three of twelve unseen captions, then three beginnings.",
            [Cards(_interleaved_cards(exhibits.interleaved))],
        ),
        Section(
            "Captions",
            f"All {count} real images of held-out combinations, in order, described by the model.",
            [Cards(_caption_cards(exhibits.captions))],
        ),
        Section(
            "Definitions",
            "Text alone, the most probable token each time. The first four words name things it draws; the others are "
            "spread evenly over the held-out ones. A model of this size learns how definitions sound, not what is "
            "true.",
            [Cards([Card(prompt, reply=[text]) for prompt, text in exhibits.continuations])],
        ),
        Section(
            "Training",
            "Losses of every step. The image loss is the mean squared error of the predicted image; it is small for "
            "images that are nearly clean and larger the more noise there is to remove.",
            [Charts(_curves(metrics))],
        ),
    ]
    provenance: list[Block] = [
        Text(str(report["command"]), code=True),
        Details("Every number, as in report.json", [Table([], list(leaves(report)))]),
        Details("The whole recipe", [Text(json.dumps(to_dict(recipe), indent=2), code=True)]),
    ]
    return Page(str(report["preset"]), lead, _summary(report), sections, provenance)


def _summary(report: dict[str, Any]) -> list[Block]:
    """Return the first screen: a bar for each share and distance, then speeds."""
    bars = [
        ("Draws the right noun, strict judge", "noun_strict_accuracy", "noun_strict", "real_noun_strict_accuracy"),
        ("Draws the right noun, of the known", "noun_accuracy", "noun", "real_noun_accuracy"),
        ("Draws the right background", "background_accuracy", "background", "real_background_accuracy"),
        ("Names the right noun", "caption_noun_accuracy", "noun", ""),
        ("Names the right background", "caption_background_accuracy", "background", ""),
    ]
    items = []
    for name, key, chance, real in bars:
        low, high = report[f"{key}_interval"]
        items.append(Bar(name, report[key], low, high, report[f"chance_{chance}_accuracy"], report.get(real, 1.0)))
    others = report["frechet_distance_of_other_real_pictures"]
    tokens, alone = report["tokens_per_second"], report["tokens_per_second_alone"]
    for name, key, reference in (
        ("Fréchet distance to real images", "frechet_distance", others),
        ("Perplexity of unseen definitions", "heldout_text_perplexity", None),
        ("Bits per byte of them", "bits_per_byte", None),
    ):
        low, high = report[f"{key}_interval"]
        items.append(Bar(name, report[key], low, high, None, reference, "lower"))
    numbers = [
        (
            "Draws unasked",
            percent(report["draws_of_its_own_accord"]),
            f"of unseen captions are followed by an image at once; {percent(report['draws_within_definitions'])} of "
            "definitions, where none belongs",
        ),
        (
            "Images per second",
            f"{report['images_per_second']:.1f}",
            f"in a batch; {report['seconds_for_one_image']:.2f} s for a single image",
        ),
        ("Tokens per second", f"{tokens:,.0f}", f"in a batch; {alone:,.0f} for a single prompt"),
    ]
    note = (
        "Each noun has one background colour on which training never showed it; the shares are measured on exactly "
        "those combinations. The reference is the same measure on real images, or a perfect score."
    )
    return [Bars(items), Text(note), Numbers(numbers)]


def _drawing_cards(drawings: DrawingResult) -> list[Card]:
    cards = []
    for n, prompt in enumerate(drawings.prompts):
        marks = [
            ("plain", bool(drawings.noun_strict_right[n]), drawings.named_strictly[n] or "none"),
            (drawings.nouns[n], bool(drawings.noun_right[n]), drawings.named[n]),
            (drawings.backgrounds[n], bool(drawings.background_right[n]), drawings.seen[n]),
        ]
        cards.append(Card(prompt, [(drawings.images[n], "")], marks))
    return cards


def _caption_cards(captions: CaptionResult) -> list[Card]:
    cards = []
    for n, caption in enumerate(captions.captions):
        marks = [("noun", bool(captions.noun_right[n]), ""), ("background", bool(captions.background_right[n]), "")]
        cards.append(Card("", [(captions.images[n], captions.truths[n])], marks, [caption or "(nothing)"]))
    return cards


def _interleaved_cards(rows: Sequence[tuple[str, Reply]]) -> list[Card]:
    cards = []
    for prompt, reply in rows:
        parts = [part if isinstance(part, str) else np.asarray(part) for part in reply.parts]
        ended = "ended without an image" if reply.done.reason == "stop" else "no image so far"
        cards.append(Card(prompt, reply=parts if reply.images else [*parts, f"({ended})"]))
    return cards


def _curves(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    def points(name: str) -> list[tuple[float, float]]:
        return [(line["step"], line[name]) for line in metrics if name in line]

    prefix = "image_by_timestep/"
    names = {name for line in metrics for name in line if name.startswith(prefix)}
    bins = sorted(names, key=lambda name: int(name.removeprefix(prefix)))
    ends = [bins[0], bins[len(bins) // 2], bins[-1]] if len(bins) > 2 else bins
    by_timestep = [
        (f"range {int(name.removeprefix(prefix)) + 1} of {len(bins)}", points(name), colour)
        for name, colour in zip(ends, (ACCENT, VIOLET, WARM), strict=False)
    ]
    return [
        ("Text loss, nats per token", line_chart([("text", points("text"), ACCENT)], "step")),
        ("Image loss, weighted", line_chart([("image", points("image"), WARM)], "step")),
        ("Image error by range of timesteps, 1 nearly clean", line_chart(by_timestep, "step", logarithmic=True)),
    ]
