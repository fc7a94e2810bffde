"""What a recipe costs, before it is run: parameters, operations, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..autoencoders import open_autoencoder
from ..model import SIZES
from ..model.activations import Load
from ..model.flops import count_parameters, forward_flops
from .autoencoders import AUTOENCODERS
from .paper import POSITIONS_PER_STEP
from .recipe import Recipe

SAID = 14
"""positions that a caption and the markers take: an estimate"""


def plan(recipe: Recipe) -> dict[str, Any]:
    """Figures by name. `parameters` counts as the paper does: embeddings, blocks, head; patch layers are extra.

    train_flops_per_token            6 N, the paper's theoretical measure, N = parameters + adapter_parameters
    patches_per_image                or codes
    executed_train_flops_per_image   of one caption-less image document: attention within it, logits of codes alone
    memory_gigabytes                 weights, gradients, AdamW moments and EMA in float32, activations left out
    """
    model = recipe.model
    count = count_parameters(model)
    step = StepContents.of(recipe)
    patches, side = step.patches, step.side
    codes = patches if model.images == "codes" else 0
    executed = 3 * forward_flops(model, patches, _pairs(recipe, patches), codes, [(side, side)] if patches else [])
    tokens = step.positions * recipe.loop.steps
    return {
        "preset": recipe.preset,
        "parameters": count.trunk,
        "adapter_parameters": count.adapter,
        "total_parameters": count.total,
        "patches_per_image": patches,
        "train_flops_per_token": 6 * count.total,
        "executed_train_flops_per_image": executed,
        "steps": recipe.loop.steps,
        "train_tokens": tokens,
        "train_flops": 6 * count.total * tokens,
        "memory_gigabytes": round(count.total * 4 * 5 / 2**30, 3),
    }


@dataclass(frozen=True)
class StepContents:
    """What a step of a recipe holds, estimated: images are the world's, and `SAID` positions are said of each.

    side, patches   of one image: latent elements a side, and patches (or codes)
    text            positions of a document of text alone: the whole context in the paper's runs, the most it may cost
    """

    positions: int
    images: int
    side: int
    patches: int
    text: int

    @classmethod
    def of(cls, recipe: Recipe) -> StepContents:
        model, data = recipe.model, recipe.data
        side = data.world.size // _factor(data.autoencoder)
        patches = 0 if model.images == "none" else (side // model.patch_size) ** 2
        of_the_paper = any(part in SIZES for part in recipe.preset.split("-"))
        positions = data.batch_size * (patches + SAID)
        if data.row_length is not None:
            positions = data.batch_size * data.row_length
        elif of_the_paper:
            positions = POSITIONS_PER_STEP // (2 if model.images == "none" else 1)  # of text alone: Table 4
        elif model.images == "none" and data.share_of == "documents":
            positions = round(positions * data.text_share)  # the others are left out
        images = round(positions * (1 - data.text_share) / (patches + SAID)) if patches else 0
        return cls(positions, images, side, patches, model.context if of_the_paper else SAID)

    def load(self, recipe: Recipe, parts: float) -> Load:
        """One of so many equal parts of the step; fractions of an image are rounded up."""
        positions, images = -int(-self.positions // parts), -int(-self.images // parts)
        if recipe.model.images != "latents":
            return Load(positions, positions)
        return Load(positions, max(0, positions - images * self.patches), {(self.side, self.side): images})

    def executed_flops(self, recipe: Recipe) -> int:
        """Operations of forward and backward, nothing computed again."""
        drawn = self.images * (self.patches + SAID)
        pairs = self.images * _pairs(recipe, self.patches, SAID) + (self.positions - drawn) * (self.text + 1) // 2
        load = self.load(recipe, 1)
        sizes = [size for size, count in load.images.items() for _ in range(count)]
        return 3 * forward_flops(recipe.model, load.positions, pairs, load.predictions, sizes)


def _pairs(recipe: Recipe, patches: int, said: int = 0) -> int:
    """(query, visible key) pairs of a document of one image, and of what is said of it."""
    positions = patches + said
    later = patches * (patches - 1) // 2 if recipe.model.image_attention == "bidirectional" else 0
    return positions * (positions + 1) // 2 + later


def _factor(autoencoder: str) -> int:
    """Pixels per latent element; of a preset too, whose weights are not needed to plan."""
    if autoencoder in AUTOENCODERS:
        return AUTOENCODERS[autoencoder]().model.factor
    return open_autoencoder(autoencoder).factor
