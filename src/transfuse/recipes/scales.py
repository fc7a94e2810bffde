"""The arms of a study at several sizes: the rivals of 32 pixels, wider and deeper or narrower and flatter.

    arm_recipe("chameleon", "xs")     # `chameleon-32` with 4 blocks of 128 channels
    arm_recipe("transfusion", "m")    # `transfusion-32` itself

The paper's sizes (Table 2) are for its own data; these are for the bundled world, from seconds to hours on a few cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import nearest
from ..errors import UserError
from .recipe import Recipe
from .rivals import chameleon_32, llama_32, transfusion_32


@dataclass(frozen=True)
class Scale:
    """Channels of the residual stream and transformer blocks; heads have 64 channels, SwiGLU three times the width."""

    width: int
    depth: int


SCALES: dict[str, Scale] = {
    "xxs": Scale(64, 2),
    "xs": Scale(128, 4),
    "s": Scale(192, 5),
    "m": Scale(256, 6),
    "l": Scale(384, 8),
    "xl": Scale(512, 10),
    "xxl": Scale(768, 12),
}
"""0.4, 1.4, 3.2, 6.2, 17, 36 and 90 million parameters in the trunk; m is the presets' own"""
HEAD_CHANNELS = 64
UNET_CHANNELS = (64, 128)
"""3.1 to 3.3 million parameters at any size: a fixed extra, as the paper's 0.27 billion are (Table 7)"""


def transfusion_32_unet() -> Recipe:
    """`transfusion-32` with U-Net patch layers (section 4.3.3)."""
    base = transfusion_32()
    return replace(base, model=replace(base.model, adapter="unet", unet_channels=UNET_CHANNELS))


ARMS: dict[str, Callable[[], Recipe]] = {
    "transfusion": transfusion_32,
    "transfusion-unet": transfusion_32_unet,
    "chameleon": chameleon_32,
    "llama": llama_32,
}
"""Figure 5's two, the paper's better Transfusion, and the text of both alone"""


def scaled(recipe: Recipe, size: str) -> Recipe:
    """The recipe with another trunk. Raises UserError for a size that is not in `SCALES`.

    Trunks wider than the preset's learn at a rate less by as many times (Adam's rule of thumb, not tuned here); the
    paper takes one rate for all sizes.
    """
    if size not in SCALES:
        raise UserError(f'size: unknown name "{size}"{nearest(size, SCALES)}')
    scale, model, optimizer = SCALES[size], recipe.model, recipe.optimizer
    slower = min(1.0, model.d_model / scale.width)
    return replace(
        recipe,
        model=replace(
            model,
            d_model=scale.width,
            n_layers=scale.depth,
            n_heads=scale.width // HEAD_CHANNELS,
            d_ff=3 * scale.width,
        ),
        optimizer=replace(
            optimizer,
            learning_rate=optimizer.learning_rate * slower,
            final_learning_rate=optimizer.final_learning_rate * slower,
        ),
    )


def arm_recipe(arm: str, size: str) -> Recipe:
    """An arm at a size. Raises UserError for another arm or size."""
    if arm not in ARMS:
        raise UserError(f'arm: unknown name "{arm}"{nearest(arm, ARMS)}')
    return scaled(ARMS[arm](), size)
