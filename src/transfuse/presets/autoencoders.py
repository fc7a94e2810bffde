"""Autoencoders to train: `transfuse autoencoder train NAME`. One function each; the small ones learn on two CPU cores.

What differs from the paper (Appendix A), everywhere: its perceptual term is LPIPS and its identity term compares
features of MoCo v2; neither comes with a package, so both are off until `--objective.perceptual` and
`--objective.identity` name local files. The small ones use the ImageNet MobileNetV2 of an optional package if told to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from emoji_scenes import NOUNS, World, WorldConfig

from ..autoencoders import AutoencoderConfig, ImageAutoencoder, open_autoencoder, save_autoencoder
from ..autoencoders.critic import SMALLEST
from ..autoencoders.features import Features, load_features
from ..config import nearest
from ..devices import Device, Precision
from ..errors import UserError
from ..images import fit, image_files, read_image
from ..log import logger
from ..rng import generator_for
from ..training import Distributed, LoopConfig, OptimizerConfig, Trainer
from ..training.autoencoder_loss import (
    AutoencoderInTraining,
    AutoencoderObjective,
    AutoencoderObjectiveConfig,
    ImageLoader,
)
from .runs import VERSION, check_split

TRAINED_NOUNS = 300
"""of the bundled world's: the others are never shown to an autoencoder, so that new things can be tried on it"""
MEASURED = 512
"""training images whose latents give the mean and deviation that the export normalises by"""


@dataclass(frozen=True)
class ImagesConfig:
    """The images to learn: scenes of the bundled world, or a folder of image files cut and scaled to its size."""

    world: WorldConfig = field(default_factory=lambda: WorldConfig(size=64, nouns=TRAINED_NOUNS))
    folder: str | None = None
    """image files, taken recursively, each in a new order every epoch; None: the bundled world"""
    batch_size: int = 8
    accumulate: int = 1
    """parts a step is split into; the result is the same"""

    def __post_init__(self) -> None:
        check_split(self.batch_size, self.accumulate)


@dataclass(frozen=True)
class AutoencoderRecipe:
    """A run of an autoencoder, whole."""

    preset: str = ""
    version: int = VERSION
    seed: int = 0
    precision: Precision = "float32"
    """bfloat16: the networks' products are taken in it, by autocast; weights and losses stay float32"""
    device: Device = "auto"
    start: str | None = None
    """an autoencoder to go on from, bundled or a folder, in place of random weights; its trunk must be the same"""
    redraw: tuple[int, ...] = ()
    """latent channels of `start` that get new weights: those that `autoencoder inspect` finds to carry nothing"""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    data: ImagesConfig = field(default_factory=ImagesConfig)
    objective: AutoencoderObjectiveConfig = field(default_factory=AutoencoderObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def settled(self) -> AutoencoderRecipe:
        """Itself. Raises UserError where its parts do not fit together."""
        if self.loop.measure_every:
            raise UserError("loop.measure_every: expected 0 for an autoencoder, whose grids show it, found more")
        if self.start is not None:
            self.started_from(self.start)
        self._check_redraw()
        if self.data.world.size % self.model.factor:
            raise UserError(
                f"data.world.size: expected a multiple of the autoencoder's factor ({self.model.factor}), "
                f"found {self.data.world.size}"
            )
        if self.objective.adversarial_from is not None and self.data.world.size < SMALLEST:
            raise UserError(
                f"data.world.size: expected at least {SMALLEST} for the critic (objective.adversarial_from), "
                f"found {self.data.world.size}"
            )
        return self

    def _check_redraw(self) -> None:
        if self.redraw and (self.start is None or self.model.kind != "kl"):
            there = "none" if self.start is None else f"a {self.model.kind} one"
            raise UserError(f"redraw: expected a KL autoencoder to start from, found {there}")
        if any(not 0 <= channel < self.model.latent_channels for channel in self.redraw):
            raise UserError(
                f"redraw: expected channels from 0 to {self.model.latent_channels - 1}, found {self.redraw}"
            )

    def started_from(self, name: str) -> ImageAutoencoder:
        """The autoencoder to go on from. Raises UserError where it has another trunk."""
        found = open_autoencoder(name)
        if not isinstance(found, ImageAutoencoder):
            raise UserError(f"start: expected a trained autoencoder, found {found.name}")
        shapes = ["kind", "widths", "blocks", "latent_channels", "groups", "attended", "middle_attention"]
        shapes += ["codebook_size", "code_channels"] if self.model.kind == "vq" else ["quant_conv", "post_quant_conv"]
        for shape in shapes:
            asked, there = getattr(self.model, shape), getattr(found.config, shape)
            if asked != there:
                raise UserError(f"start: model.{shape}: expected {asked}, found {there} in {name}")
        return found


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


def autoencoder_preset(name: str) -> AutoencoderRecipe:
    """The recipe of a name. Raises UserError with the nearest name."""
    if name not in AUTOENCODERS:
        raise UserError(f'autoencoder preset: unknown name "{name}"{nearest(name, AUTOENCODERS)}')
    return AUTOENCODERS[name]()


def unseen_world(trained: WorldConfig) -> World:
    """Scenes of the nouns that another world, some run's, never shows."""
    shown = set(trained.noun_names)
    return World(replace(trained, nouns=tuple(noun for noun in NOUNS if noun not in shown)))


def image_source(recipe: AutoencoderRecipe) -> Callable[[int], np.ndarray]:
    """Image number n of the run, uint8 `[size, size, 3]`: a function of the recipe and n alone."""
    if recipe.data.folder is None:
        world = World(recipe.data.world)
        return lambda number: world.render(world.scene(number))
    return FolderImages(Path(recipe.data.folder), recipe.data.world.size, recipe.seed)


class FolderImages:
    """Files of a folder, all in a new order each epoch: number n is a function of (folder, seed, n).

    In place of a file that can not be used comes the next of the order; each such file is named once, when it is met.
    """

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.files = image_files(folder)
        self._order: tuple[int, list[int]] = (-1, [])
        self._named: set[Path] = set()

    def __call__(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, len(self.files))
        if self._order[0] != epoch:
            drawn = torch.randperm(len(self.files), generator=generator_for(self.seed, "images", epoch))
            self._order = epoch, drawn.tolist()
        for further in range(len(self.files)):
            path = self.files[self._order[1][(place + further) % len(self.files)]]
            try:
                return fit(read_image(path), self.size)
            except UserError as error:
                if path not in self._named:
                    self._named.add(path)
                    logger.info(f"left out: {error}")
        raise UserError(f"{self.folder}: expected images, found {len(self._named)} files, none of which can be read")


def build_autoencoder_trainer(
    recipe: AutoencoderRecipe,
    folder: Path,
    sample: Callable[[dict[str, Tensor], Path], None] | None = None,
    ranks: Distributed | None = None,
) -> Trainer:
    """Put network, data, objective and loop together for a resolved recipe. Every rank has all of the network."""
    ranks = ranks or Distributed(torch.device(recipe.device))
    model = AutoencoderInTraining(recipe.model, recipe.objective.adversarial_from is not None).initialise(recipe.seed)
    if recipe.start is not None:
        # Its statistics belong to the configuration, not to the weights; an export measures them anew.
        model.autoencoder.load_state_dict(recipe.started_from(recipe.start).state_dict())
        if recipe.redraw:
            model.autoencoder.redraw_channels(recipe.redraw, recipe.seed)
    model = model.to(recipe.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = AutoencoderObjective(
        recipe.objective,
        recipe.model.kind,
        recipe.loop.steps,
        recipe.seed,
        perceptual=_features(recipe, "perceptual"),
        identity=_features(recipe, "identity"),
        bfloat16=recipe.precision == "bfloat16",
        ranks=ranks,
    )
    data = recipe.data
    loader = ImageLoader(image_source(recipe), data.batch_size, data.accumulate, ranks.data, ranks.datas)
    betas = {"critic": recipe.objective.critic_betas}
    return Trainer(
        model, objective, loader, folder, recipe.loop, recipe.optimizer, sample=sample, ranks=ranks, betas=betas
    )


def _features(recipe: AutoencoderRecipe, term: str) -> Features | None:
    path = getattr(recipe.objective, term)
    if path is None:
        logger.info(f"{term} term: off, because objective.{term} names no network")
        return None
    return load_features(path).to(recipe.device)


def averaged_autoencoder(recipe: AutoencoderRecipe, weights: dict[str, Tensor]) -> ImageAutoencoder:
    """The autoencoder itself, without the critic, with a trainer's averaged weights."""
    autoencoder = ImageAutoencoder(recipe.model).to(recipe.device)
    prefix = "autoencoder."
    autoencoder.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    return autoencoder


@torch.inference_mode()
def export_autoencoder(recipe: AutoencoderRecipe, trainer: Trainer, folder: Path) -> ImageAutoencoder:
    """Write the averaged weights, with the statistics of training latents, as a folder that diffusers opens too."""
    autoencoder = averaged_autoencoder(recipe, trainer.averaged())
    source = image_source(recipe)
    size = recipe.data.batch_size
    latents = torch.cat(
        [autoencoder.encode(np.stack([source(n + i) for i in range(size)])) for n in range(0, MEASURED, size)]
    ).double()
    autoencoder.with_statistics(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    save_autoencoder(folder, autoencoder, recipe.preset, sample_size=recipe.data.world.size)
    return autoencoder
