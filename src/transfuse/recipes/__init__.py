"""Named runs: one function each, the expected result in its docstring. `PRESETS` is what `transfuse train` knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..config import nearest
from ..errors import UserError, shown
from .autoencoders import AUTOENCODERS, AutoencoderRecipe
from .paper import PAPER, chameleon_32, llama_32, llama_32_stable, transfusion_32
from .recipe import VERSION, ImageContext, InitConfig, Recipe
from .small import demo, epsilon_32, latent_64, latents_32, pixels_32, small_64, tiny

PRESETS: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
    "pixels-32": pixels_32,
    "latents-32": latents_32,
    "tiny": tiny,
    "epsilon-32": epsilon_32,
    "latent-64": latent_64,
    "small-64": small_64,
    "transfusion-32": transfusion_32,
    "chameleon-32": chameleon_32,
    "llama-32": llama_32,
    "llama-32-stable": llama_32_stable,
    **PAPER,
}
NAMED: Mapping[type[Any], Mapping[str, Callable[[], Any]]] = {Recipe: PRESETS, AutoencoderRecipe: AUTOENCODERS}
"""the presets of each kind of recipe"""
R = TypeVar("R", Recipe, AutoencoderRecipe)


def preset(name: str, kind: type[R] = Recipe) -> R:  # type: ignore[assignment]
    """Return the recipe of a name, for a model or an autoencoder. Raises UserError with the nearest name."""
    if not isinstance(name, str):
        raise UserError(f"preset: expected a name, found {shown(name)}")
    if name not in NAMED[kind]:
        raise UserError(f'preset: unknown name "{name}"{nearest(name, NAMED[kind])}')
    recipe: R = NAMED[kind][name]()
    return recipe


__all__ = [
    "AUTOENCODERS",
    "NAMED",
    "PRESETS",
    "VERSION",
    "AutoencoderRecipe",
    "ImageContext",
    "InitConfig",
    "Recipe",
    "preset",
]
