"""Named runs: one function each, the expected result in its docstring. `PRESETS` is what `transfuse train` knows."""

from __future__ import annotations

from collections.abc import Callable

from ..config import nearest
from ..errors import UserError
from .demo import demo
from .paper import PAPER
from .recipe import Recipe
from .rivals import chameleon_32, llama_32, llama_32_stable, transfusion_32
from .small import epsilon_32, latent_64, small_64, tiny

PRESETS: dict[str, Callable[[], Recipe]] = {
    "demo": demo,
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


def preset(name: str) -> Recipe:
    """The recipe of a name. Raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f'preset: unknown name "{name}"{nearest(name, PRESETS)}')
    return PRESETS[name]()


__all__ = ["PRESETS", "Recipe", "preset"]
