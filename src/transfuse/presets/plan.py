"""What a recipe costs, before it is run: parameters, operations, memory, and what a step of it holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..autoencoders import Autoencoder, ImageAutoencoder, VQTokenizer, bundled
from ..errors import UserError
from ..model.activations import Load
from ..model.flops import count_parameters, forward_flops
from .autoencoders import AUTOENCODERS
from .recipe import Recipe, new_tokenizer
from .sources import image_size, mixture, open_sources

SAID = 12
"""positions that a caption and the markers take: an estimate"""


def plan(recipe: Recipe) -> dict[str, Any]:
    """Figures by name. `parameters` counts as the paper does: embeddings, blocks, head; patch layers are extra.

    train_flops_per_token            6 N, the paper's theoretical measure, N = parameters + adapter_parameters
    patches_per_image                or codes
    positions_per_step               of rows, all there is room for; else what a step's documents take on average
    images_per_step                  an estimate
    executed_train_flops_per_image   of one caption-less image document: attention within it, logits of codes alone
    memory_gigabytes                 weights, gradients, AdamW moments and EMA in float32, activations left out

    Raises UserError for a recipe whose parts do not fit.
    """
    recipe = fitted(recipe)
    model = recipe.model
    count = count_parameters(model)
    step = StepContents.of(recipe)
    patches, side = step.patches, step.side
    codes = patches if model.images == "codes" else 0
    executed = 3 * forward_flops(model, patches, _pairs(recipe, patches), codes, [(side, side)] if patches else [])
    tokens = step.positions * recipe.loop.steps
    return {
        "preset": recipe.preset,
        "parameters": count.transformer,
        "adapter_parameters": count.adapter,
        "total_parameters": count.total,
        "patches_per_image": patches,
        "positions_per_step": step.positions,
        "images_per_step": step.images,
        "train_flops_per_token": 6 * count.total,
        "executed_train_flops_per_image": executed,
        "steps": recipe.loop.steps,
        "train_tokens": tokens,
        "train_flops": 6 * count.total * tokens,
        "memory_gigabytes": round(count.total * 4 * 5 / 2**30, 3),
    }


@dataclass(frozen=True)
class StepContents:
    """What a step of a recipe holds: its images are of one size, and `SAID` positions are said of each.

    side, patches   of one image: latent elements a side, and patches (or codes)
    text            positions of a document of text alone, the most it may have: a row, where documents are packed
    """

    positions: int
    images: int
    side: int
    patches: int
    text: int

    @classmethod
    def of(cls, recipe: Recipe) -> StepContents:
        model, data = recipe.model, recipe.data
        side = patches = images = 0
        if model.images != "none":
            side = _side(recipe)
            patches = (side // model.patch_size) ** 2
        if data.row_length is None:
            positions = round(data.batch_size * _mean_positions(recipe))
        else:
            positions = data.batch_size * data.row_length
        if patches:
            images = round(positions * _image_share(recipe, patches) / (patches + SAID))
        return cls(positions, images, side, patches, data.row_length or SAID)

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


def fitted(recipe: Recipe) -> Recipe:
    """The recipe with the channels, or codes, of its autoencoder."""
    if recipe.model.images == "none":
        return recipe
    autoencoder = _autoencoder(recipe)
    if isinstance(autoencoder, VQTokenizer):
        return replace(recipe, model=replace(recipe.model, codebook_size=autoencoder.codebook_size))
    return replace(recipe, model=replace(recipe.model, latent_channels=autoencoder.channels))


def _autoencoder(recipe: Recipe) -> Autoencoder:
    """Of a preset that is not trained yet, the shape is enough to plan."""
    name = recipe.data.autoencoder
    if name not in AUTOENCODERS or name in bundled():
        return recipe.open_autoencoder()
    with torch.device("meta"):
        found = ImageAutoencoder(AUTOENCODERS[name]().model)
    return VQTokenizer(found) if recipe.model.images == "codes" else found


def _side(recipe: Recipe) -> int:
    """Latent elements along a side of an image."""
    size, factor = image_size(recipe), _autoencoder(recipe).factor
    if size % (factor * recipe.model.patch_size):
        raise UserError(
            f"model.patch_size: expected one that divides {size} pixels, as images have, times the autoencoder's "
            f"factor {factor}, found {recipe.model.patch_size}"
        )
    return size // factor


def _image_share(recipe: Recipe, patches: int) -> float:
    """Share of a step's positions in documents with images."""
    opened, data = open_sources(recipe.data), recipe.data
    if not (opened.pictures and opened.texts):
        return float(bool(opened.pictures))
    pictured = 1 - data.text_share
    if data.share_of == "positions":
        return pictured
    return pictured * (patches + SAID) / (pictured * patches + SAID)


@lru_cache(maxsize=16)
def _mean_positions(recipe: Recipe) -> float:
    """Mean positions of the documents of a run, by the lengths that its sources have."""
    opened = open_sources(recipe.data)
    tokenizer = new_tokenizer(recipe, opened)
    grammar = recipe.model.sequence_format(tokenizer)
    autoencoder = None if recipe.model.images == "none" else _autoencoder(recipe)
    return mixture(recipe, opened, tokenizer, grammar, autoencoder).mean_positions(grammar)[0]
