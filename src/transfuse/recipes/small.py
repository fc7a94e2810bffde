"""Small runs on the bundled world that follow the paper's objective."""

from __future__ import annotations

from dataclasses import replace

from ..data import PairConfig
from ..diffusion import DiffusionConfig, SamplerConfig
from ..export import GenerationConfig
from ..training import LoopConfig, ObjectiveConfig
from .demo import demo
from .recipe import Recipe


def epsilon_32() -> Recipe:
    """The demo's network and world with the paper's objective: epsilon prediction, unweighted, 64 patches of 4 x 4.

    Needs hours where x0 prediction needs minutes: after four minutes on two cores its pictures are coloured noise.
    """
    base = demo()
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

    The world of the demo, twice as large. Any other autoencoder is one setting: `--data.autoencoder vq-f4-small`.
    """
    base = demo()
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
    """The bundled model: 64 pixels, 24 nouns in one style, up to three copies and two kinds of things, and edits.

    19M parameters, U-Net patch layers on the bundled KL-VAE's latents, 64 patches of 2 x 2 a picture, x0 prediction:
    things may be anywhere, and convolutions know them in any place (linear layers drew shifted copies one over the
    other). Three pairs in ten show their picture first, clean, and are captioned. Twelve minutes on an H200
    (--data.workers 14 --parallel.compile). Batches are a GPU's: two CPU cores take one of 32 documents
    (--data.batch-size 32) a second.
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
        ),
        diffusion=DiffusionConfig(prediction="x0", weighting="v"),
        data=replace(
            base.data,
            sources=("world", "edits,weight=0.4", "glosses"),
            text_share=0.03,
            world=world,
            pairs=PairConfig(caption_first=0.7, image_first_max_timestep=0),
            batch_size=512,
        ),
        objective=ObjectiveConfig(image_weight=2.0),
        optimizer=replace(base.optimizer, learning_rate=1.5e-3, final_learning_rate=1e-5, warmup=300),
        loop=LoopConfig(steps=8200, ema_decay=0.999, log_every=20, sample_every=1000, checkpoint_every=500, keep=2),
        # Where noise is strongest guidance makes every likely place of a thing a sure one, and draws too many copies.
        generation=GenerationConfig(SamplerConfig("ddpm", steps=25), guidance_scale=5.0, guidance_interval=(0.0, 0.8)),
    )


def tiny() -> Recipe:
    """Seconds, not minutes: a network of 0.3M parameters and 30 steps, to see that everything works. Draws nothing."""
    base = demo()
    return replace(
        base,
        preset="tiny",
        model=replace(base.model, text_vocab_size=512, d_model=64, n_layers=2, n_heads=2, d_ff=128, max_seq_len=256),
        data=replace(base.data, batch_size=8, world=replace(base.data.world, nouns=4)),
        optimizer=replace(base.optimizer, warmup=5),
        loop=LoopConfig(steps=30, ema_decay=0.99, log_every=5, sample_every=0, checkpoint_every=10, keep=2),
        generation=GenerationConfig(SamplerConfig("ddim", steps=4), guidance_scale=2.0, max_tokens=16),
    )
