"""Transfusion, its rival Chameleon, and the text-only Llama between them: equal trunk, equal data, equal compute.

Table 4 of the paper takes the one apart into the other, and each row is a preset, here for 32 pixels and two cores:

    llama-32           text only
    transfusion-32     + diffusion
    llama-32-stable    text only + Chameleon's stability set
    chameleon-32       + LM loss on image tokens

Half of the positions that an arm is trained on are text and half are captioned pictures, and a step has as many
positions in every arm that draws. At equal positions they therefore read equally much text, while a Chameleon, whose
pictures take four times the positions, sees fewer pictures. Text alone has half the positions a step: the text of the
others. `transfuse study baselines` gives those that draw the same 6 N D, and measures all alike.

The paper's own runs are presets, too, by size, and each row of its Tables 3 to 9 by itself:

    7b, 0.76b-unet, ...                 Transfusion of the controlled comparison; with U-Net layers, a row of Table 7
    chameleon-7b, llama-0.76b, ...      its rivals: section 4.2, Table 4
    table6-0.76b-unet-4, ...            the row of a table

250,000 steps of about 2M positions, half of them text: 512 rows of 4,096 into which documents are packed. Epsilon
prediction on 8-channel latents of an eighth of the resolution, 256 patches an image, 250 ancestral steps. They need an
autoencoder of that shape: `transfuse autoencoder train kl-f8` (vq-f8 for a Chameleon), then `--data.autoencoder` its
export. The bundled world and definitions stand in for the paper's data. Their results are in the paper, not ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

from ..config import nearest
from ..data import PairConfig
from ..data.bundled import WorldConfig
from ..diffusion import DiffusionConfig, SamplerConfig
from ..errors import UserError
from ..export import GenerationConfig
from ..model import SIZES, ModelConfig
from ..sequence import ImageAttention
from ..training import LoopConfig, OptimizerConfig
from .recipe import DataConfig, Recipe
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
    model = replace(
        base.model,
        images="codes",
        codebook_size=codebook,
        patch_size=1,
        image_attention="causal",
        patch_positions="none",
    )
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


# --- the paper's runs -------------------------------------------------------------------------------------------------

Adapter = Literal["linear", "unet"]
ROW_LENGTH = 4096
ROWS = 512
POSITIONS_PER_STEP = ROWS * ROW_LENGTH
"""2M tokens a batch"""
CONTROLLED_SCALE, ABLATION_SCALE = 5.0, 3.0
"""guidance of section 4.2 (Tables 3 and 4) and of section 4.3 (Tables 5 to 8)"""
NOISE_LIMIT = 500
"""of images before their captions: section 4.3.4 tries it, so the tables before it are without"""


def paper(
    size: str,
    adapter: Adapter = "linear",
    patch_size: int = 2,
    attention: ImageAttention = "bidirectional",
    noise_limit: int | None = None,
    guidance_scale: float = CONTROLLED_SCALE,
) -> Recipe:
    """A Transfusion; every number is the paper's, or fills a gap it leaves."""
    return Recipe(
        preset=size,
        model=ModelConfig(
            **SIZES[size],
            adapter=adapter,
            timestep_at="patch" if adapter == "linear" else "hidden",
            patch_size=patch_size,
            image_attention=attention,
        ),
        diffusion=DiffusionConfig(),
        data=DataConfig(
            world=WorldConfig(size=256),
            autoencoder="kl-f8",
            text_share=0.5,
            pairs=PairConfig(image_first_max_timestep=noise_limit),
            row_length=ROW_LENGTH,
            batch_size=ROWS,
        ),
        optimizer=OptimizerConfig(),
        loop=LoopConfig(steps=250_000),
        generation=GenerationConfig(SamplerConfig("ddpm", steps=250), guidance_scale=guidance_scale),
    )


def paper_chameleon(size: str) -> Recipe:
    """The paper's re-trained Chameleon: 1,024 codes of 16,384 an image, a third of the learning rate."""
    return by_codes(paper(size), "vq-f8", 16384, PAPER_RATE)


def paper_llama(size: str, stability: bool = False) -> Recipe:
    """The first row of Table 4, or its third: the text of the others alone, 1M tokens a step."""
    recipe = text_only(paper(size))
    recipe = replace(recipe, data=replace(recipe.data, batch_size=ROWS // 2))
    return stable(recipe, PAPER_RATE) if stability else recipe


def headline() -> Recipe:
    """Table 9: 7B with U-Net layers, 4M positions a step, 2T in all.

    The paper does not say whether noise is limited; here it is, as Table 8 finds better. It tunes guidance for each
    benchmark, and prints none of it: the scale is that of the ablations. Its last hundredth weights images of high
    aesthetic scores more: `--data.sources photos fine,weight=0,final=1 ...` does that.
    """
    recipe = paper("7b", "unet", noise_limit=NOISE_LIMIT, guidance_scale=ABLATION_SCALE)
    return replace(recipe, data=replace(recipe.data, batch_size=2 * ROWS), loop=replace(recipe.loop, steps=500_000))


def _named(name: str, make: Callable[[], Recipe]) -> Recipe:
    """The recipe under the name it is known by."""
    return replace(make(), preset=name)


def _runs() -> Iterator[tuple[str, Callable[[], Recipe]]]:
    """Yield the runs by name. "table6-0.76b-linear-1" is the row without patches, "free" is without noise limit."""
    ablation = partial(paper, guidance_scale=ABLATION_SCALE)
    for size in SIZES:
        yield size, partial(paper, size)
        yield f"{size}-unet", partial(ablation, size, "unet")
        yield f"chameleon-{size}", partial(paper_chameleon, size)
        yield f"llama-{size}", partial(paper_llama, size)
        yield f"llama-{size}-stable", partial(paper_llama, size, True)
    adapters: tuple[Adapter, ...] = ("linear", "unet")
    yield "table3-7b", partial(paper, "7b")
    yield "table3-chameleon-7b", partial(paper_chameleon, "7b")
    yield "table4-llama-0.76b", partial(paper_llama, "0.76b")
    yield "table4-0.76b", partial(paper, "0.76b")
    yield "table4-llama-0.76b-stable", partial(paper_llama, "0.76b", True)
    yield "table4-chameleon-0.76b", partial(paper_chameleon, "0.76b")
    for adapter in adapters:
        for attention in ("causal", "bidirectional"):
            yield f"table5-0.76b-{adapter}-{attention}", partial(ablation, "0.76b", adapter, attention=attention)
    for adapter in adapters:
        for patch_size in (1, 2, 4, 8) if adapter == "linear" else (2, 4, 8):
            yield f"table6-0.76b-{adapter}-{patch_size}", partial(ablation, "0.76b", adapter, patch_size)
    for size in SIZES:
        for adapter in adapters:
            yield f"table7-{size}-{adapter}", partial(ablation, size, adapter)
    for size in ("0.76b", "7b"):
        for kind, limit in (("free", None), ("limited", NOISE_LIMIT)):
            yield f"table8-{size}-unet-{kind}", partial(ablation, size, "unet", noise_limit=limit)
    yield "table9-7b-unet", headline


PAPER: dict[str, Callable[[], Recipe]] = {name: partial(_named, name, make) for name, make in _runs()}
"""All of the paper's runs"""
