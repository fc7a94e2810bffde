"""Transfusion, its rival Chameleon, and the text-only Llama between them: equal trunk, equal data, equal compute.

Table 4 of the paper takes the one apart into the other, and each row is a preset, here for 32 pixels and two cores; the
same names with a size of the paper in front (`chameleon-0.76b`) are the paper's own runs.

    llama-32           text only
    transfusion-32     + diffusion
    llama-32-stable    text only + Chameleon's stability set
    chameleon-32       + LM loss on image tokens

As in the paper, half of the positions that an arm is trained on are text and half are captioned pictures, and a step
has as many positions in every arm that draws. At equal positions they therefore read equally much text, while a
Chameleon, whose pictures take four times the positions, sees fewer pictures. Text alone has half the positions a step:
the text of the others. `transfuse study baselines` gives those that draw the same 6 N D, and measures all alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ..config import nearest
from ..diffusion import DiffusionConfig, SamplerConfig
from ..errors import UserError
from ..export import GenerationConfig
from ..training import OptimizerConfig
from .recipe import Recipe
from .small import pixels_32

PAPER_RATE = 1 / 3
"""of Transfusion's learning rate that its Chameleon takes"""
ROW = 1024
"""positions a step of the small arms: half of it text, half captioned pictures"""


def stable(recipe: Recipe, rate: float = 1.0) -> Recipe:
    """With Chameleon's stability set (section 2.3 of its paper, as far as Transfusion's baseline uses it).

    QK-norm, norms of what is added, z-loss 1e-5, AdamW's eps 1e-5; no dropout. The paper's runs also take a third of
    the learning rate (`rate`), 1e-4 for 3e-4; small ones learn better without (after 250 steps of `chameleon-32`
    cross-entropy of codes 3.92, with it 4.27), and a rival should be at its best.
    """
    optimizer = recipe.optimizer
    return replace(
        recipe,
        model=replace(recipe.model, qk_norm=True, norm_order="swin"),
        objective=replace(recipe.objective, z_weight=1e-5),
        optimizer=replace(
            optimizer,
            eps=1e-5,
            learning_rate=optimizer.learning_rate * rate,
            final_learning_rate=optimizer.final_learning_rate * rate,
        ),
    )


def text_only(recipe: Recipe) -> Recipe:
    """Leave the pictures out. How many positions a step then has is the caller's to say."""
    data = replace(recipe.data, autoencoder="pixels")
    return replace(recipe, model=replace(recipe.model, images="none", latent_channels=3), data=data)


def by_codes(recipe: Recipe, autoencoder: str, codebook: int, rate: float = 1.0) -> Recipe:
    """A Chameleon: pictures are codes of a VQ autoencoder, in the vocabulary, under the next-token loss."""
    base = stable(recipe, rate)
    codes = {"images": "codes", "codebook_size": codebook, "patch_size": 1, "image_attention": "causal"}
    model = replace(base.model, patch_positions="none", **codes)  # type: ignore[arg-type]
    return replace(base, model=model, data=replace(base.data, autoencoder=autoencoder))


def transfusion_32() -> Recipe:
    """The demo's world through the bundled KL-VAE: 16 patches of 2 x 2 of 8 x 8 x 8 latents, v prediction, lambda 5.

    A quarter of the positions a Chameleon spends on the same picture, as in the paper. A step is one packed row of
    1,024 positions, half of definitions and half of captioned pictures.
    """
    base = pixels_32()
    return replace(
        base,
        preset="transfusion-32",
        model=replace(base.model, patch_size=2, latent_channels=8, patch_positions="none"),
        diffusion=DiffusionConfig(prediction="v"),
        data=replace(base.data, autoencoder="kl-f4-small", text_share=0.5, row_length=ROW, batch_size=1),
        objective=replace(base.objective, image_weight=5.0),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-5, warmup=100, weight_decay=0.05),
        loop=replace(base.loop, checkpoint_every=200),
        generation=GenerationConfig(SamplerConfig("ddim", steps=25), guidance_scale=3.0),
    )


def chameleon_32() -> Recipe:
    """The same, 64 codes of the bundled VQ-VAE a picture (1,024 of them), drawn at temperature 1."""
    return replace(by_codes(transfusion_32(), "vq-f4-small", 1024), preset="chameleon-32")


def llama_32() -> Recipe:
    """The text half of the others' steps, no pictures."""
    base = text_only(transfusion_32())
    return replace(base, preset="llama-32", data=replace(base.data, row_length=ROW // 2))


def llama_32_stable() -> Recipe:
    """The same with Chameleon's stability set."""
    return replace(stable(llama_32()), preset="llama-32-stable")


# --- variants of several sizes, for studies ---------------------------------------------------------------------------

SCALES: dict[str, tuple[int, int]] = {
    "xxs": (64, 2),
    "xs": (128, 4),
    "s": (192, 5),
    "m": (256, 6),
    "l": (384, 8),
    "xl": (512, 10),
    "xxl": (768, 12),
}
"""channels and blocks, for transformers of 0.4, 1.4, 3.2, 6.2, 17, 36 and 90 million parameters; m is the presets'"""
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
    """Return the recipe with a transformer of another size. Raises UserError for a size that is not in `SCALES`.

    Those wider than the preset's learn at a rate less by as many times (Adam's rule of thumb, not tuned here); the
    paper takes one rate for all sizes.
    """
    if size not in SCALES:
        raise UserError(f'size: unknown name "{size}"{nearest(size, SCALES)}')
    (width, depth), model, optimizer = SCALES[size], recipe.model, recipe.optimizer
    slower = min(1.0, model.d_model / width)
    return replace(
        recipe,
        model=replace(model, d_model=width, n_layers=depth, n_heads=width // HEAD_CHANNELS, d_ff=3 * width),
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
