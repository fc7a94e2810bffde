"""What every comparison of arms needs: how far a budget goes, and one exam for all.

    steps = budget / (6 * parameters * positions_per_step(recipe))
    exam = Exam.of(world, effort, recogniser)
    facts, drawn = exam.take(folder)                # of a run that is trained and exported

An arm is a run of a recipe. All arms of a comparison are asked the same: held-out pictures and definitions, seeds, one
recogniser.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoji_scenes import WorldConfig, glosses

from ..config import read_json
from ..devices import pick_device
from ..errors import UserError
from ..evaluation import (
    Estimate,
    Recogniser,
    bootstrap,
    caption_accuracy,
    draw_accuracy,
    held_out_scenes,
    perplexity,
)
from ..evaluation.captions import cider_d
from ..evaluation.distances import frechet
from ..evaluation.ptb_tokenizer import tokenize
from ..evaluation.reconstruction import frechet_distance
from ..inference import TransfusionPipeline
from ..io import atomic_write
from ..model.flops import count_parameters
from ..presets import Recipe
from ..presets.recipe import build_loader, train_tokenizer
from ..presets.runs import read_recipe, resolve
from ..presets.sources import open_sources
from ..training import read_metrics

SURVEYED = 50
"""steps whose positions are counted to turn a budget into a number of steps"""


@dataclass(frozen=True)
class Effort:
    """How much is measured of each arm.

    pictures          drawn, and as many captioned
    definitions       held-out ones that are read; None: all
    recogniser_steps  that the judge of drawings is trained for; None: its own default
    """

    pictures: int = 512
    definitions: int | None = None
    recogniser_steps: int | None = None

    def __post_init__(self) -> None:
        if self.pictures < 2:
            raise UserError(f"--pictures: expected at least 2, found {self.pictures}")
        for name in ("definitions", "recogniser_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")

    def settings(self) -> dict[str, Any]:
        """What is pinned: definitions by their number, for another version may hold out others."""
        return {**vars(self), "definitions": len(glosses("heldout")[: self.definitions])}


def stream(recipe: Recipe) -> tuple[Any, ...]:
    """What arms must share to be compared: the world, the shares of text and pictures, how pairs are shown, the
    vocabulary and the seed. Rows may differ: text alone has half of one."""
    data = recipe.data
    mixture = data.batch_size, data.text_share, data.share_of, data.pairs
    return data.world, mixture, recipe.model.text_vocab_size, recipe.seed


UNEQUAL = 1.05
"""how many times one run may read the text of another before their perplexities are not compared"""


def text_read(result: Mapping[str, Any]) -> float:
    """Return how much text alone a run has read: positions of definitions.

    Results of earlier versions do not say. Their steps took equally many documents, so there it is the steps.
    """
    return float(result.get("definition_positions") or result["steps"])


def pin(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that all runs of a folder share, or hold them against those that are there.

    Raises UserError: runs of two settings would stand in one table as if they were equal.
    """
    if path.is_file():
        saved = read_json(path)
        for name, value in settings.items():
            if saved.get(name) != value:
                option = name.replace("_", "-")
                raise UserError(f"{path}: expected --{option} {_plain(saved.get(name))}, found {_plain(value)}")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent}: expected a folder to write to, found {error.strerror or error}") from None
    atomic_write(path, lambda partial: partial.write_text(json.dumps(settings) + "\n"))


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def positions_per_step(recipe: Recipe) -> float:
    """The mean over the first steps of a settled recipe: a property of its data, not of its size or its seed."""
    recipe = resolve(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        load = build_loader(recipe, open_sources(recipe.data), train_tokenizer(recipe), Path(scratch))
        counted = [batch.quantities["positions"] for step in range(SURVEYED) for batch in load(step)]
    return sum(counted) / SURVEYED


@dataclass(frozen=True, eq=False)
class Exam:
    """Held-out pictures uint8 `[image, row, column, 3]`, definitions nobody read, and the judge of drawings."""

    world: WorldConfig
    real: np.ndarray
    definitions: list[str]
    recogniser: Recogniser

    @classmethod
    def of(cls, world: WorldConfig, effort: Effort, recogniser: Recogniser) -> Exam:
        """Raises UserError for a world that can not be measured so."""
        _, _, real = held_out_scenes(world, effort.pictures)
        return cls(world, real, glosses("heldout")[: effort.definitions], recogniser)

    def distance_of_real(self) -> float:
        """Return the Fréchet distance of as many other real pictures, for comparison."""
        _, _, other = held_out_scenes(self.world, len(self.real), seed=1)
        return frechet_distance(self.recogniser.features(other), self.recogniser.features(self.real))

    def take(self, folder: Path) -> tuple[dict[str, Any], np.ndarray]:
        """Figures of a trained run, each with its 95 % interval where it has one; and its drawings.

        `NAME_chance` is what guessing scores.
        """
        recipe = read_recipe(folder / "config.json", Recipe)
        pipe = TransfusionPipeline.from_pretrained(folder / "export", device=pick_device(recipe.device))
        totals = read_metrics(folder / "metrics.jsonl")[-1]
        parameters = count_parameters(recipe.model).total
        facts: dict[str, Any] = {
            "preset": recipe.preset,
            "parameters": parameters,
            "steps": recipe.loop.steps,
            **{name: totals[name] for name in ("positions", "images", "text_targets", "seconds")},
            "definition_positions": totals.get("positions of glosses", 0),
            "theoretical_flops": 6 * parameters * totals["positions"],
            "executed_flops": totals["flops"],
            "guidance_scale": pipe.exported.generation.guidance_scale,
        }
        text = perplexity(pipe.exported, self.definitions)
        found: dict[str, Estimate] = {"text_perplexity": text.perplexity, "bits_per_byte": text.bits_per_byte}
        drawn = np.empty((0, *self.real.shape[1:]), dtype=np.uint8)
        if recipe.model.images != "none":
            drawn, pictured = self._pictures(pipe, facts)
            found |= pictured
        for name, measured in found.items():
            facts |= {name: measured.value, f"{name}_interval": [measured.low, measured.high]}
        return facts, drawn

    def _pictures(self, pipe: TransfusionPipeline, facts: dict[str, Any]) -> tuple[np.ndarray, dict[str, Estimate]]:
        """Drawings, and what a model that knows pictures is asked beside text; adds to the facts."""
        drawings = draw_accuracy(pipe, self.world, len(self.real), self.recogniser)
        captions = caption_accuracy(pipe, self.world, len(self.real))
        autoencoder = pipe.exported.autoencoder
        reconstructed = autoencoder.decode(autoencoder.encode(self.real))
        there = self.recogniser.features(self.real)
        facts["judge"], facts["strict_judge"] = self.recogniser.digest, drawings.strict_digest
        facts["noun_strict_chance"] = drawings.chance_noun_strict
        facts["frechet_of_reconstructions"] = frechet_distance(self.recogniser.features(reconstructed), there)
        facts["images_per_second"] = len(self.real) / drawings.seconds
        for prefix, asked in (("", drawings), ("caption_", captions)):
            facts[f"{prefix}noun_chance"] = asked.chance_noun
            facts[f"{prefix}background_chance"] = asked.chance_background
            facts[f"{prefix}both_chance"] = asked.chance_both
        said = [tokenize(text) for text in captions.captions]
        truths = [[tokenize(text)] for text in captions.truths]
        return drawings.images, {
            "background": drawings.background,
            "noun": drawings.noun,
            "noun_strict": drawings.noun_strict,
            "both": drawings.both,
            "frechet": frechet(self.recogniser.features(drawings.images), there),
            "caption_background": captions.background,
            "caption_noun": captions.noun,
            "caption_both": captions.both,
            "caption_cider": bootstrap(cider_d(said, truths)),
            "caption_perplexity": perplexity(pipe.exported, captions.truths).perplexity,
        }
