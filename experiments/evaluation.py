"""One evaluation for every run of an experiment: the same held-out prompts, seeds, definitions and judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emoji_scenes import WorldConfig, glosses
from emoji_scenes.accuracy import caption_accuracy, draw_accuracy, held_out_scenes
from emoji_scenes.scene_classifier import SceneClassifier
from transfuse.config import read_json
from transfuse.devices import pick_device
from transfuse.errors import UserError
from transfuse.evaluation import Estimate, bootstrap, perplexity
from transfuse.evaluation.captions import cider_d, tokenize
from transfuse.evaluation.image_quality import frechet, frechet_distance
from transfuse.export import Exported, load_export
from transfuse.inference import TransfusionPipeline
from transfuse.model.costs import count_parameters
from transfuse.recipes import Recipe
from transfuse.report import with_interval
from transfuse.runs import read_recipe
from transfuse.sequence import Document, Image, Text, collate
from transfuse.training import ObjectiveConfig, TransfusionObjective, read_metrics

UNEQUAL = 1.05
"""factor in text read above which the perplexities of two runs are not compared"""


@dataclass(frozen=True)
class EvalSize:
    """The amount of measuring: images drawn and captioned, definitions read (None: all), judge's training steps."""

    pictures: int = 512
    definitions: int | None = None
    recogniser_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("pictures", 2), ("definitions", 1), ("recogniser_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')}: expected at least {least}, found {value}")

    def settings(self) -> dict[str, Any]:
        """Return the settings to pin; definitions by number, because versions hold out different ones."""
        return {**vars(self), "definitions": len(glosses("heldout")[: self.definitions])}


def evaluate_run(
    folder: Path, world: WorldConfig, size: EvalSize, judge: SceneClassifier
) -> tuple[dict[str, Any], np.ndarray]:
    """Measure a trained and exported run; return its result and its drawings uint8 `[image, row, column, 3]`.

    All runs of a study answer the same held-out prompts, with the same seeds and judge. `NAME_interval` is a 95 %
    interval, `NAME_chance` the score of guessing.
    """
    recipe = read_recipe(folder / "config.json", Recipe)
    pipe = TransfusionPipeline.from_pretrained(folder / "export", device=pick_device(recipe.device))
    totals = read_metrics(folder / "metrics.jsonl")[-1]
    parameters = count_parameters(recipe.model).active
    result: dict[str, Any] = {
        "preset": recipe.preset,
        "parameters": parameters,
        "steps": recipe.loop.steps,
        **{name: totals[name] for name in ("positions", "images", "text_targets", "seconds")},
        "definition_positions": totals.get("positions of glosses", 0),
        "theoretical_flops": 6 * parameters * totals["positions"],
        "executed_flops": totals["flops"],
        "guidance_scale": pipe.exported.generation.guidance_scale,
    }
    text = perplexity(pipe.exported, glosses("heldout")[: size.definitions])
    measured: dict[str, Estimate] = {"text_perplexity": text.perplexity, "bits_per_byte": text.bits_per_byte}
    drawn = np.empty((0, 1, 1, 3), dtype=np.uint8)
    if recipe.model.images != "none":
        drawn, of_images, facts = _evaluate_images(pipe, world, size, judge)
        measured |= of_images
        result |= facts
    for name, value in measured.items():
        result |= with_interval(name, value)
    return result, drawn


def _evaluate_images(
    pipe: TransfusionPipeline, world: WorldConfig, size: EvalSize, judge: SceneClassifier
) -> tuple[np.ndarray, dict[str, Estimate], dict[str, Any]]:
    """Return drawings, measures with intervals, and further facts of a model that draws."""
    (_, truths, real), (_, _, others) = (held_out_scenes(world, size.pictures, seed=seed) for seed in (0, 1))
    drawings = draw_accuracy(pipe, world, size.pictures, judge)
    captions = caption_accuracy(pipe, world, size.pictures)
    autoencoder, features = pipe.exported.autoencoder, judge.features(real)
    reconstructed = autoencoder.decode(autoencoder.encode(real))
    facts: dict[str, Any] = {
        "judge": judge.digest,
        "strict_judge": drawings.strict_digest,
        "noun_strict_chance": drawings.chance_noun_strict,
        "frechet_of_reconstructions": frechet_distance(judge.features(reconstructed), features),
        "frechet_of_other_real_images": frechet_distance(judge.features(others), features),
        "images_per_second": size.pictures / drawings.seconds,
    }
    for prefix, answers in (("", drawings), ("caption_", captions)):
        facts[f"{prefix}noun_chance"] = answers.chance_noun
        facts[f"{prefix}background_chance"] = answers.chance_background
        facts[f"{prefix}both_chance"] = answers.chance_both
    cider = cider_d([tokenize(text) for text in captions.captions], [[tokenize(text)] for text in captions.truths])
    measured = {
        "background": drawings.background,
        "noun": drawings.noun,
        "noun_strict": drawings.noun_strict,
        "both": drawings.both,
        "frechet": frechet(judge.features(drawings.images), features),
        "caption_background": captions.background,
        "caption_noun": captions.noun,
        "caption_both": captions.both,
        "caption_cider": bootstrap(cider),
        "caption_perplexity": perplexity(pipe.exported, captions.truths).perplexity,
    }
    if pipe.exported.model.config.images == "latents":
        assert pipe.exported.weights is not None
        plain = load_export(
            pipe.exported.weights.parent, device=next(pipe.exported.model.parameters()).device
        )  # the pipeline packs its matrices
        measured["image_loss"] = image_loss(plain, truths, real)
    return drawings.images, measured, facts


@torch.inference_mode()
def image_loss(exported: Exported, captions: Sequence[str], images: np.ndarray) -> Estimate:
    """Return the diffusion loss of images after their captions; the noise of an image follows from its number."""
    form = exported.model.config.sequence_format(exported.tokenizer)
    objective = TransfusionObjective(ObjectiveConfig(), exported.process, seed=0)
    device = next(exported.model.parameters()).device
    losses = []
    for number, (caption, pixels) in enumerate(zip(captions, images, strict=True)):
        text, latent = exported.tokenizer.encode(caption), exported.autoencoder.encode(pixels[None])[0]
        document = Document([Text(tuple(text)), Image(latent.cpu())], sample=number)
        batch = collate([document], form, exported.model.config.image_attention)
        losses.append(float(objective.loss(exported.model, batch.to(device)).losses[1]))
    return bootstrap(losses)


def text_read(result: Mapping[str, Any]) -> float:
    """Return the positions of definitions a run has read.

    Results from before November 2026 lack them; their steps took equally many documents, so there it is the steps.
    """
    return float(result.get("definition_positions") or result["steps"])


def unequal_text(results: Sequence[Mapping[str, Any]], share: bool = False) -> float | None:
    """Return the factor between the most and the least text read (a `share` of positions), if it is too large."""
    read = [text_read(result) / (result["positions"] if share else 1) for result in results]
    factor = max(read) / min(read)
    return factor if factor > UNEQUAL else None


def check_one_size(study: str, results: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError for results of several sizes or budgets, whose differences are not those of the rows alone."""
    for fact in ("size", "budget"):
        if len(values := {result[fact] for result in results}) > 1:
            raise UserError(f"{study}: expected results of one {fact}, found {', '.join(map(str, sorted(values)))}")


def by_seed(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """Return a number of the results by variant and seed; results without that number are left out."""
    values: dict[str, dict[int, float]] = {}
    for result in results:
        if key in result:
            values.setdefault(result["variant"], {})[result["seed"]] = result[key]
    return values


def read_result(path: Path) -> dict[str, Any]:
    """Read a result, also one from before `arm` was called `variant`."""
    return with_variant(read_json(path))


def with_variant(result: dict[str, Any]) -> dict[str, Any]:
    return {"variant" if key == "arm" else key: value for key, value in result.items()}
