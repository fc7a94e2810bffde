"""The demo: a small world, learned in minutes on two CPU cores."""

from __future__ import annotations

from ..data import PairConfig
from ..data.bundled import WorldConfig
from ..diffusion import DiffusionConfig, SamplerConfig
from ..export import GenerationConfig
from ..model import ModelConfig
from ..training import LoopConfig, ObjectiveConfig, OptimizerConfig
from .recipe import DataConfig, Recipe


def demo() -> Recipe:
    """6.4M parameters, 32 pixels; 16 nouns in one drawing style, one large thing a scene, 11 background colours.

    Small on purpose: what two cores can learn in eight minutes. x0 prediction in pixels with few large patches gives
    pictures in minutes, where the paper's epsilon target needs hours (the preset `epsilon-32`). Its loss, weighted
    as v, is larger than the paper's for the same picture, so lambda is 1.5, not 5: with 5 captions come much later.

    `transfuse demo` on two quiet cores, 2,752 steps in 479 s, seed 0, of 120 held-out prompts: background right in
    100 %, noun in 97 % where the judge chooses among the 16 and in 31 % by the strict judge of 328 nouns and "none";
    caption noun in 82 %, 166 perplexity on unread definitions. Other processors, by the closed choice: 3,711 steps 100,
    99 and 92 %; 1,167 steps 100, 70 and 58 %.
    """
    return Recipe(
        preset="demo",
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
