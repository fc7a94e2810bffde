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
    executed_train_flops_per_image   of one caption-less image document: attention within it, logits none
    memory_gigabytes                 weights, gradients, AdamW moments and EMA in float32, activations left out
    """
    model = recipe.model
    count = count_parameters(model)
    side = recipe.data.world.size // _factor(recipe.data.autoencoder)
    patches = (side // model.patch_size) ** 2
    executed = 3 * forward_flops(model, patches, patches**2, 0, [(side, side)])
    positions = (
        POSITIONS_PER_STEP if recipe.preset.removesuffix("-unet") in SIZES else recipe.data.batch_size * (patches + 14)
    )
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
