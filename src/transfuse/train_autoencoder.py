"""Training an autoencoder, from its recipe to its export: `transfuse autoencoder train`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .autoencoders import ImageAutoencoder, open_autoencoder, save_autoencoder
from .autoencoders.features import Features, load_features
from .autoencoders.network import CRITIC_MIN_SIZE
from .data.bundled import NOUNS, World, WorldConfig
from .errors import UserError
from .images import fit, image_files, read_image
from .log import logger
from .recipes.autoencoders import AutoencoderRecipe
from .rng import generator_for
from .runs.folder import held, record_recipe, run_device, settle_device
from .runs.monitor import grid
from .train import run_trainer
from .training import Distributed, Trainer, join
from .training.autoencoder_loss import AutoencoderInTraining, AutoencoderObjective, ImageLoader
from .training.metrics import check_trackers

MEASURED = 512  # training images whose latents give the statistics that the export normalises by
SHOWN = 8  # images in a grid of reconstructions
SHAPE = ("kind", "widths", "blocks", "latent_channels", "groups", "attended", "middle_attention")
SHAPE_OF_KIND = {"kl": ("quant_conv", "post_quant_conv"), "vq": ("codebook_size", "code_channels")}
"""settings that a run must share with the autoencoder it starts from"""


def train_autoencoder(recipe: AutoencoderRecipe, folder: Path) -> tuple[Trainer, Path | None]:
    """Train in a run folder, or resume the run there, and export to `folder/export`; None if it was stopped before.

    Raises UserError if the folder was made by another recipe.
    """
    with join(run_device(recipe, folder)) as ranks:
        run = ranks.on_rank0(lambda: open_autoencoder_run(recipe, folder)) or open_autoencoder_run(recipe, folder)
        with held(folder, ranks):
            trainer = build_autoencoder_trainer(run, folder, ranks)
            if run_trainer(trainer, reconstruction_grid(run)) == "stopped":
                return trainer, None
            ranks.on_rank0(lambda: export_autoencoder(run, trainer, folder / "export"))
    return trainer, folder / "export"


@dataclass(frozen=True, eq=False)
class AutoencoderRun:
    """A recipe of an autoencoder, checked, and `start`, the autoencoder that gives the initial weights."""

    recipe: AutoencoderRecipe
    start: ImageAutoencoder | None

    @cached_property
    def image(self) -> Callable[[int], np.ndarray]:
        """Image n of the run, uint8 `[size, size, 3]`: a function of the recipe and n alone."""
        data = self.recipe.data
        if data.folder is None:
            world = World(data.world)
            return lambda number: world.render(world.scene(number))
        return FolderImages(Path(data.folder), data.world.size, self.recipe.seed)


def resolve_autoencoder(recipe: AutoencoderRecipe, here: bool = True) -> AutoencoderRun:
    """Open what a recipe names, once. Raises UserError if its parts do not fit together."""
    if recipe.loop.measure_every:
        raise UserError("loop.measure_every: expected 0 for an autoencoder, whose grids show it, found more")
    start = None
    if recipe.start is not None:
        autoencoder = open_autoencoder(recipe.start)
        if not isinstance(autoencoder, ImageAutoencoder):
            raise UserError(f"start: expected a trained autoencoder, found {autoencoder.name}")
        start = autoencoder
        for setting in (*SHAPE, *SHAPE_OF_KIND[recipe.model.kind]):
            wanted, present = getattr(recipe.model, setting), getattr(start.config, setting)
            if wanted != present:
                raise UserError(f"start: model.{setting}: expected {wanted}, found {present} in {recipe.start}")
    channels, size = recipe.model.latent_channels, recipe.data.world.size
    if recipe.redraw and (start is None or recipe.model.kind != "kl"):
        other = "none" if start is None else f"a {recipe.model.kind} one"
        raise UserError(f"redraw: expected a KL autoencoder to start from, found {other}")
    if any(not 0 <= channel < channels for channel in recipe.redraw):
        raise UserError(f"redraw: expected channels from 0 to {channels - 1}, found {recipe.redraw}")
    if size % recipe.model.factor:
        expected = f"a multiple of the autoencoder's factor ({recipe.model.factor})"
        raise UserError(f"data.world.size: expected {expected}, found {size}")
    if recipe.objective.adversarial_from is not None and size < CRITIC_MIN_SIZE:
        expected = f"at least {CRITIC_MIN_SIZE} for the critic (objective.adversarial_from)"
        raise UserError(f"data.world.size: expected {expected}, found {size}")
    return AutoencoderRun(settle_device(recipe) if here else recipe, start)


def open_autoencoder_run(recipe: AutoencoderRecipe, folder: Path) -> AutoencoderRun:
    """Resolve a recipe and begin a run in `folder`, or resume the one that is there.

    Raises UserError if the folder has a run of another recipe, or a tracker's package is missing.
    """
    check_trackers(recipe.loop.trackers)
    run = resolve_autoencoder(settle_device(recipe, folder))
    record_recipe(run.recipe, folder)
    return run


def build_autoencoder_trainer(run: AutoencoderRun, folder: Path, ranks: Distributed | None = None) -> Trainer:
    """Return the trainer of a run: network, loss, loader and loop. Every rank has the whole network."""
    recipe, data = run.recipe, run.recipe.data
    ranks = ranks or Distributed(torch.device(recipe.device))
    model = AutoencoderInTraining(recipe.model, recipe.objective.adversarial_from is not None, recipe.seed)
    if run.start is not None:
        # Its statistics belong to the configuration, not to the weights; the export measures them again.
        model.autoencoder.load_state_dict(run.start.state_dict())
        if recipe.redraw:
            model.autoencoder.redraw_channels(recipe.redraw, recipe.seed)
    model = model.to(recipe.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    networks: dict[str, Features] = {}
    for term, path in (("perceptual", recipe.objective.perceptual), ("identity", recipe.objective.identity)):
        if path is None:
            logger.info(f"{term} term: off, because objective.{term} names no network")
        else:
            networks[term] = load_features(path).to(recipe.device)
    objective = AutoencoderObjective(
        recipe.objective,
        recipe.model.kind,
        recipe.loop.steps,
        recipe.seed,
        **networks,
        bfloat16=recipe.precision == "bfloat16",
        ranks=ranks,
    )
    loader = ImageLoader(run.image, data.batch_size, data.accumulate, ranks.data, ranks.datas)
    betas = {"critic": recipe.objective.critic_betas}
    return Trainer(model, objective, loader, folder, recipe.loop, recipe.optimizer, ranks=ranks, betas=betas)


def reconstruction_grid(run: AutoencoderRun) -> Callable[[dict[str, Tensor], Path], None]:
    """Return a function that writes held-out images, or a folder's first, over their reconstructions as one PNG."""
    if run.recipe.data.folder is None:
        world = World(replace(run.recipe.data.world, split="heldout"))
        images = np.stack([world.render(world.scene(number)) for number in range(SHOWN)])
    else:
        images = np.stack([run.image(number) for number in range(SHOWN)])

    def sample(weights: dict[str, Tensor], path: Path) -> None:
        autoencoder = averaged_autoencoder(run.recipe, weights)
        reconstructions = autoencoder.decode(autoencoder.encode(images))
        path.parent.mkdir(parents=True, exist_ok=True)
        grid([*images, *reconstructions], SHOWN, zoom=max(1, 128 // images.shape[1])).save(path)

    return sample


def averaged_autoencoder(recipe: AutoencoderRecipe, weights: dict[str, Tensor]) -> ImageAutoencoder:
    """Return the autoencoder, without the critic, with a trainer's averaged weights."""
    autoencoder = ImageAutoencoder(recipe.model).to(recipe.device)
    prefix = "autoencoder."
    autoencoder.load_state_dict({n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)})
    return autoencoder


@torch.inference_mode()
def export_autoencoder(run: AutoencoderRun, trainer: Trainer, folder: Path) -> ImageAutoencoder:
    """Write the averaged weights, with the statistics of training latents, as a folder that diffusers also opens."""
    recipe, size = run.recipe, run.recipe.data.batch_size
    autoencoder = averaged_autoencoder(recipe, trainer.averaged())
    batches = (np.stack([run.image(n + i) for i in range(size)]) for n in range(0, MEASURED, size))
    latents = torch.cat([autoencoder.encode(images) for images in batches]).double()
    autoencoder.with_statistics(latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
    save_autoencoder(folder, autoencoder, recipe.preset, sample_size=recipe.data.world.size)
    return autoencoder


def unseen_world(trained: WorldConfig) -> World:
    """Return scenes of the nouns that another world, such as a run's, never shows."""
    shown = set(trained.noun_names)
    return World(replace(trained, nouns=tuple(noun for noun in NOUNS if noun not in shown)))


class FolderImages:
    """Image files of a folder, in a new order each epoch: image n is a function of (folder, seed, n).

    An unusable file is replaced by the next of the order, and named once.
    """

    def __init__(self, folder: Path, size: int, seed: int) -> None:
        self.folder, self.size, self.seed = folder, size, seed
        self.files = image_files(folder)
        self._order: tuple[int, list[int]] = (-1, [])
        self._unusable: set[Path] = set()

    def __call__(self, number: int) -> np.ndarray:
        """Return image `number`, uint8 `[size, size, 3]`. Raises UserError if no file can be read."""
        epoch, place = divmod(number, len(self.files))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.files), generator=generator_for(self.seed, "images", epoch))
            self._order = epoch, order.tolist()
        for further in range(len(self.files)):
            path = self.files[self._order[1][(place + further) % len(self.files)]]
            try:
                return fit(read_image(path), self.size)
            except UserError as error:
                if path not in self._unusable:
                    self._unusable.add(path)
                    logger.info(f"left out: {error}")
        raise UserError(f"{self.folder}: expected images, found {len(self._unusable)} files, none of which can be read")
