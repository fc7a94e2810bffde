"""Named runs: one function each, the expected result in its docstring. `PRESETS` is what `transfuse train` knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ..configuration import nearest
from ..errors import UserError
from ..model import SIZES
from .demo import demo
from .paper import paper
from .recipe import Recipe
from .rivals import chameleon_32, llama_32, llama_32_stable, paper_chameleon, paper_llama, transfusion_32
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
    **{size: partial(paper, size) for size in SIZES},
    **{f"{size}-unet": partial(paper, size, "unet") for size in SIZES},
    **{f"chameleon-{size}": partial(paper_chameleon, size) for size in SIZES},
    **{f"llama-{size}": partial(paper_llama, size) for size in SIZES},
    **{f"llama-{size}-stable": partial(paper_llama, size, True) for size in SIZES},
}


def preset(name: str) -> Recipe:
    """The recipe of a name. Raises UserError with the nearest name."""
    if name not in PRESETS:
        raise UserError(f'preset: unknown name "{name}"{nearest(name, PRESETS)}')
    return PRESETS[name]()


__all__ = ["PRESETS", "Recipe", "preset"]
