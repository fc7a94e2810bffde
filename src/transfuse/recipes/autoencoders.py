"""Recipes of autoencoders: `transfuse autoencoder train NAME`. The small ones learn on two CPU cores.

The perceptual and identity terms of the paper (Appendix A) need LPIPS and MoCo v2, which no package brings: both are
off until `--objective.perceptual` and `--objective.identity` name local files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from ..autoencoders import AutoencoderConfig
from ..data.bundled import WorldConfig
from ..devices import Device, Precision
from ..errors import UserError
from ..training import LoopConfig, OptimizerConfig
from ..training.autoencoder_loss import AutoencoderObjectiveConfig
from .recipe import VERSION, check_split

TRAINED_NOUNS = 300  # of the bundled world; autoencoders are tested on the others


@dataclass(frozen=True)
class ImagesConfig:
    """The training images: scenes of the bundled world, or a folder of files cropped and scaled to its size."""

    world: WorldConfig = field(default_factory=lambda: WorldConfig(size=64, nouns=TRAINED_NOUNS))
    folder: str | None = None
    """image files, taken recursively, each in a new order every epoch; None: the bundled world"""
    batch_size: int = 8
    accumulate: int = 1
    """micro-batches a step is split into; the result is the same"""

    def __post_init__(self) -> None:
        check_split(self.batch_size, self.accumulate)


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Everything that defines a training run of an autoencoder. Raises UserError for another optimizer than AdamW."""

    preset: str = ""
    version: int = VERSION
    seed: int = 0
    precision: Precision = "float32"
    """bfloat16: the networks' products are taken in it, by autocast; weights and losses stay float32"""
    device: Device = "auto"
    start: str | None = None
    """an autoencoder, bundled or a folder, that gives the initial weights; its shape must be the same"""
    redraw: tuple[int, ...] = ()
    """latent channels of `start` that get new weights, such as those `autoencoder inspect` reports as unused"""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    objective: AutoencoderObjectiveConfig = field(default_factory=AutoencoderObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        if self.optimizer.name != "adamw":
            raise UserError(f"optimizer.name: expected adamw for an autoencoder, found {self.optimizer.name}")


def paper(kind: Literal["kl", "vq"]) -> AutoencoderRecipe:
    """256 pixels to 32 x 32 x 8, or to 1,024 codes of 16,384: the layout nearest to the paper's 86M, 83.7M parameters.

    1M steps, the critic after 50,000. Batch size and learning rate are not in the paper: 256 and 1e-4 here.
    """
    return AutoencoderRecipe(
        preset=f"{kind}-f8",
        model=AutoencoderConfig(kind=kind),
        data=ImagesConfig(WorldConfig(size=256, nouns=TRAINED_NOUNS), batch_size=256),
        optimizer=OptimizerConfig(learning_rate=1e-4, final_learning_rate=1e-5, warmup=5000, weight_decay=0.0),
        loop=LoopConfig(steps=1_000_000, checkpoint_every=5000, sample_every=5000),
    )


def small(kind: Literal["kl", "vq"], factor: Literal[4, 8]) -> AutoencoderRecipe:
    """64 pixels of the bundled world, 8 channels, for two CPU cores. No critic: in so few steps it costs accuracy.

    The bundled `vq-f4-small` came out of 109,000 images in parts: 27.2 dB on held-out scenes. The bundled `kl-f4-small`
    started from the weights before it (203,000 images, under a KL that weighed 12,288 times too much), had all its
    channels drawn again, and saw 20,000 more: 31.0 dB. The commands are in docs/autoencoders.md. This preset as it
    stands sees 40,000 images from random weights, at 12 to 46 a second on one core.
    """
    widths = (16, 32, 96) if factor == 4 else (16, 32, 64, 128)
    return AutoencoderRecipe(
        preset=f"{kind}-f{factor}-small",
        model=AutoencoderConfig(
            kind=kind, widths=widths, blocks=1, groups=8, middle_attention=False, codebook_size=1024, code_channels=8
        ),
        data=ImagesConfig(batch_size=4),
        objective=AutoencoderObjectiveConfig(adversarial_from=None),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-5, warmup=100, weight_decay=0.0, betas=(0.9, 0.99)
        ),
        loop=LoopConfig(steps=10_000, ema_decay=0.999, log_every=20, sample_every=500, checkpoint_every=500),
    )


def tiny(kind: Literal["kl", "vq"]) -> AutoencoderRecipe:
    """Seconds, not minutes: every term and the critic at work, and nothing learned worth looking at."""
    base = small(kind, 4)
    return replace(
        base,
        preset=f"{kind}-tiny",
        model=AutoencoderConfig(kind=kind, widths=(8, 16), blocks=1, latent_channels=4, groups=4, codebook_size=32),
        data=ImagesConfig(WorldConfig(size=32, nouns=8), batch_size=4),
        objective=AutoencoderObjectiveConfig(adversarial_from=10, revive_after=5),
        optimizer=replace(base.optimizer, warmup=5),
        loop=LoopConfig(steps=20, ema_decay=0.9, log_every=5, sample_every=0, checkpoint_every=10),
    )


AUTOENCODERS: dict[str, Callable[[], AutoencoderRecipe]] = {
    "kl-f8": partial(paper, "kl"),
    "vq-f8": partial(paper, "vq"),
    **{f"{kind}-f{factor}-small": partial(small, kind, factor) for kind in ("kl", "vq") for factor in (4, 8)},
    "kl-tiny": partial(tiny, "kl"),
    "vq-tiny": partial(tiny, "vq"),
}
