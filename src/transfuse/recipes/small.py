"""Small runs on the bundled world: the demo, which learns in minutes on two CPU cores, and what differs from it."""

from __future__ import annotations

from dataclasses import replace

from ..data import PairConfig
from ..data.bundled import WorldConfig
from ..diffusion import DiffusionConfig, SamplerConfig
from ..export import GenerationConfig
from ..model import ModelConfig
from ..training import LoopConfig, ObjectiveConfig, OptimizerConfig
from .recipe import DataConfig, Recipe


def pixels_32() -> Recipe:
    """6.4M parameters, 32 pixels; 16 nouns in one drawing style, one large thing a scene, 11 background colours.

    x0 prediction in pixels with few large patches gives pictures in minutes, where the paper's epsilon target needs
    hours (the preset `epsilon-32`). Its loss, weighted as v, is larger than the paper's for the same picture, so lambda
    is 1.5, not 5: with 5 captions come much later.
    """
    return Recipe(
        preset="pixels-32",
        model=ModelConfig(
            text_vocab_size=2048,
            d_model=256,
            n_layers=6,
            n_heads=4,
            d_ff=768,
            max_seq_len=512,
            latent_channels=3,
            patch_size=8,
            patch_positions="learned",
        ),
        diffusion=DiffusionConfig(prediction="x0", weighting="v", clip_x0=1.0),
        data=DataConfig(
            world=WorldConfig(size=32, nouns=16, max_objects=1, max_count=1, styles=("fluent-flat",), sizes=("large",)),
            text_share=0.1,
            pairs=PairConfig(),
            batch_size=32,
        ),
        objective=ObjectiveConfig(image_weight=1.5),
        optimizer=OptimizerConfig(learning_rate=2e-3, final_learning_rate=2e-5, warmup=100, weight_decay=0.05),
        loop=LoopConfig(steps=5000, ema_decay=0.998, log_every=20, sample_every=1000, checkpoint_every=500, keep=1),
        generation=GenerationConfig(SamplerConfig("ddim", steps=25), guidance_scale=3.0),
    )


def latents_32() -> Recipe:
    """The world of `pixels-32` through the bundled KL-VAE; the base of the study `since`.

    16 patches of 2 x 2 of its 8 x 8 x 8 latents a picture, as many as pixels have in patches of 8 x 8. Drawings are far
    plainer than those of pixels. Captions, which latents teach more slowly, come with clean pictures: in three pairs of
    ten the picture is first, and not noised.
    """
    base = pixels_32()
    return replace(
        base,
        preset="latents-32",
        model=replace(base.model, patch_size=2, latent_channels=8),
        diffusion=replace(base.diffusion, clip_x0=None),
        data=replace(
            base.data, autoencoder="kl-f4-small", pairs=PairConfig(caption_first=0.7, image_first_max_timestep=0)
        ),
    )


def demo() -> Recipe:
    """`latents-32` with Muon and half the parameters: what two cores can learn in eight minutes.

    Muon needs half as many steps, and a network of 3.3M parameters takes half as many again in the time as one of 6.4M.
    """
    base = latents_32()
    return replace(
        base,
        preset="demo",
        model=replace(base.model, d_model=192, n_layers=5, n_heads=3, d_ff=576),
        optimizer=replace(base.optimizer, name="muon", learning_rate=3e-3, final_learning_rate=3e-5),
    )


def tiny() -> Recipe:
    """Seconds, not minutes: a network of 0.3M parameters and 30 steps, to see that everything works. Draws nothing."""
    base = pixels_32()
    return replace(
        base,
        preset="tiny",
        model=replace(base.model, text_vocab_size=512, d_model=64, n_layers=2, n_heads=2, d_ff=128, max_seq_len=256),
        data=replace(base.data, batch_size=8, world=replace(base.data.world, nouns=4)),
        optimizer=replace(base.optimizer, warmup=5),
        loop=LoopConfig(steps=30, ema_decay=0.99, log_every=5, sample_every=0, checkpoint_every=10, keep=2),
        generation=GenerationConfig(SamplerConfig("ddim", steps=4), guidance_scale=2.0, max_tokens=16),
    )


def epsilon_32() -> Recipe:
    """Network and world of `pixels-32` with the paper's objective: epsilon prediction, unweighted, 64 patches of 4 x 4.

    Needs hours where x0 prediction needs minutes: after four minutes on two cores its pictures are coloured noise.
    """
    base = pixels_32()
    return replace(
        base,
        preset="epsilon-32",
        model=replace(base.model, patch_size=4),
        diffusion=DiffusionConfig(prediction="epsilon", clip_x0=1.0),
        objective=ObjectiveConfig(),
        loop=replace(base.loop, steps=50_000, ema_decay=0.9995, checkpoint_every=1000, sample_every=2500),
        generation=GenerationConfig(SamplerConfig("ddpm", steps=250), guidance_scale=3.0),
    )


def latent_64() -> Recipe:
    """64 pixels through the bundled KL-VAE: 64 patches of 2 x 2 of its 16 x 16 x 8 latents, v prediction.

    The world of `pixels-32`, twice as large. Any other autoencoder is one setting: `--data.autoencoder vq-f4-small`.
    """
    base = pixels_32()
    return replace(
        base,
        preset="latent-64",
        model=replace(base.model, patch_size=2, latent_channels=8),
        diffusion=DiffusionConfig(prediction="v"),
        data=replace(base.data, autoencoder="kl-f4-small", world=replace(base.data.world, size=64)),
        loop=replace(base.loop, steps=10_000, sample_every=1000),
        generation=GenerationConfig(SamplerConfig("ddim", steps=25), guidance_scale=3.0),
    )


def small_64() -> Recipe:
    """The bundled model: 64 pixels, 24 nouns in one style, up to three copies and two kinds of things; edits and talk.

    19M parameters, U-Net patch layers on the bundled KL-VAE's latents, 64 patches of 2 x 2 an image, x0 prediction:
    things may be anywhere, and convolutions know them in any place (linear layers drew shifted copies one over the
    other). Three pairs in ten show their image first, clean, and are captioned. Which things there are, and how many,
    is decided where noise is strong, so that levels are shifted there. Images that are talked about stand clean in
    their place, and their noised copies are learned. Batches are a GPU's: two CPU cores with AMX take one of 32
    documents (--data.batch-size 32) in two and a half seconds.
    """
    base = latent_64()
    world = replace(base.data.world, nouns=24, max_objects=2, max_count=3, sizes=None)
    return replace(
        base,
        preset="small-64",
        model=replace(
            base.model,
            d_model=384,
            n_layers=8,
            n_heads=6,
            d_ff=1024,
            adapter="unet",
            unet_channels=(64, 128),
            max_seq_len=1024,
        ),
        diffusion=DiffusionConfig(prediction="x0", weighting="v", shift=2.0),
        data=replace(
            base.data,
            sources=("world", "edits,weight=0.3", "dialogues,weight=0.5", "glosses"),
            text_share=0.05,
            context="clean-copy",
            world=world,
            pairs=PairConfig(caption_first=0.7, image_first_max_timestep=0),
            batch_size=512,
        ),
        objective=ObjectiveConfig(image_weight=2.0),
        optimizer=replace(base.optimizer, name="muon", learning_rate=1.5e-3, final_learning_rate=1e-5, warmup=300),
        loop=LoopConfig(steps=8200, ema_decay=0.999, log_every=20, sample_every=1000, checkpoint_every=500, keep=2),
        # Where noise is strongest guidance makes every likely place of a thing a sure one, and draws too many copies.
        generation=GenerationConfig(SamplerConfig("ddpm", steps=25), guidance_scale=5.0, guidance_interval=(0.0, 0.8)),
    )
