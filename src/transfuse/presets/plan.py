"""What a recipe costs, before it is run: parameters, operations, memory."""

from __future__ import annotations

from typing import Any

from ..autoencoders import open_autoencoder
from ..model import SIZES
from ..model.flops import count_parameters, forward_flops
from .autoencoders import AUTOENCODERS
from .paper import POSITIONS_PER_STEP
from .recipe import Recipe


def plan(recipe: Recipe) -> dict[str, Any]:
    """Figures by name. `parameters` counts as the paper does: embeddings, blocks, head; patch layers are extra.

    train_flops_per_token            6 N, the paper's theoretical measure, N = parameters + adapter_parameters
    patches_per_image                or codes
    executed_train_flops_per_image   of one caption-less image document: attention within it, logits of codes alone
    memory_gigabytes                 weights, gradients, AdamW moments and EMA in float32, activations left out
    """
    model = recipe.model
    count = count_parameters(model)
    side = recipe.data.world.size // _factor(recipe.data.autoencoder)
    patches = 0 if model.images == "none" else (side // model.patch_size) ** 2
    pairs = patches**2 if model.image_attention == "bidirectional" else patches * (patches + 1) // 2
    codes = patches if model.images == "codes" else 0
    executed = 3 * forward_flops(model, patches, pairs, codes, [(side, side)] if patches else [])
    positions = recipe.data.batch_size * (patches + 14)  # an estimate: what is said takes about 14
    if model.images == "none" and recipe.data.share_of == "documents":
        positions = round(positions * recipe.data.text_share)  # the others are left out
    if any(part in SIZES for part in recipe.preset.split("-")):
        positions = POSITIONS_PER_STEP // (2 if model.images == "none" else 1)  # of text alone: Table 4
    tokens = positions * recipe.loop.steps
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


def _factor(autoencoder: str) -> int:
    """Pixels per latent element; of a preset too, whose weights are not needed to plan."""
    if autoencoder in AUTOENCODERS:
        return AUTOENCODERS[autoencoder]().model.factor
    return open_autoencoder(autoencoder).factor
