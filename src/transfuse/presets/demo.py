"""The demo: a small world, learned in minutes on two CPU cores."""

from __future__ import annotations

from ..data import PairConfig
from ..data.world import WorldConfig
from ..diffusion import DiffusionConfig, SamplerConfig
from ..export import GenerationConfig
from ..model import ModelConfig
from ..training import LoopConfig, OptimizerConfig
from .recipe import DataConfig, Recipe


def demo() -> Recipe:
    """5M parameters, 32 pixels, 24 nouns, one object a scene; x0 prediction in pixels with patches of 8 x 8."""
    return Recipe(
        preset="demo",
        model=ModelConfig(
            vocabulary=2048,
            width=256,
            depth=6,
            heads=4,
            hidden=768,
            context=512,
            latent_channels=3,
            patch_size=8,
            patch_positions="learned",
        ),
        diffusion=DiffusionConfig(prediction="x0", weighting="v", clip_x0=1.0),
        data=DataConfig(
            world=WorldConfig(size=32, nouns=24, max_objects=1, max_count=1),
            text_share=0.15,
            pairs=PairConfig(),
            batch_size=64,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, final_learning_rate=3e-5, warmup=50, weight_decay=0.05),
        loop=LoopConfig(steps=2000, ema_decay=0.998, log_every=20, sample_every=500, checkpoint_every=500, keep=1),
        generation=GenerationConfig(SamplerConfig("ddim", steps=25), guidance_scale=3.0),
    )
