"""The paper's controlled runs (Transfusion sections 4.1 to 4.3): five sizes, linear or U-Net patch layers.

250,000 steps of about 2M positions, epsilon prediction on 8-channel latents of an eighth of the resolution, 256 patches
an image, 250 ancestral steps. They need an autoencoder of that shape: `transfuse autoencoder train kl-f8`, then
`--data.autoencoder` its export. Their results are in the paper's Tables 3 and 7, not ours.
"""

from __future__ import annotations

from typing import Literal

from ..data import PairConfig
from ..data.world import WorldConfig
from ..diffusion import DiffusionConfig, SamplerConfig
from ..export import GenerationConfig
from ..model import SIZES, ModelConfig
from ..training import LoopConfig, OptimizerConfig
from .recipe import DataConfig, Recipe

POSITIONS_PER_STEP = 512 * 4096
"""2M tokens a batch"""


def paper(size: str, adapter: Literal["linear", "unet"] = "linear") -> Recipe:
    """The recipe of one of the five sizes; every number is the paper's, or fills a gap it leaves."""
    return Recipe(
        preset=size if adapter == "linear" else f"{size}-unet",
        model=ModelConfig(**SIZES[size], adapter=adapter, timestep_at="patch" if adapter == "linear" else "hidden"),
        diffusion=DiffusionConfig(),
        data=DataConfig(
            world=WorldConfig(size=256), autoencoder="kl-f8", text_share=0.5, pairs=PairConfig(), batch_size=8192
        ),
        optimizer=OptimizerConfig(),
        loop=LoopConfig(steps=250_000),
        generation=GenerationConfig(SamplerConfig("ddpm", steps=250), guidance_scale=5.0),
    )
