"""`run = resolve(recipe)`: everything a recipe names, opened once and checked, as one value.

    run = resolve(preset("demo"))
    run.recipe           the recipe, with the settings that its data sets, autoencoder and `start` determine
    run.sources          data sets and the bundled world
    run.autoencoder      images to latents, or to codes for a Chameleon
    run.tokenizer        of the run's folder, its data sets or `start`, else trained on the bundled text
    run.process          diffusion

All that trains, samples, exports and plans takes a `Run` and opens nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..autoencoders import Autoencoder, VQTokenizer, bundled, open_autoencoder
from ..autoencoders.features import Features, load_features
from ..data import Mixture
from ..data.bundled import TEMPLATE, World, caption, edit, glosses, vocabulary
from ..diffusion import Process, Sampler
from ..errors import UserError
from ..folders import fetched, places
from ..io import atomic_write
from ..recipes.autoencoders import AUTOENCODERS
from ..recipes.recipe import OF_THE_WORLD, Recipe
from ..sequence import SequenceFormat, Tokenizer, count_positions
from ..training.metrics import check_trackers
from ..vocabulary import Vocabulary
from .folder import read_recipe, record_recipe, settle_device
from .sources import Sources, mixture, open_sources
from .start import check_finetuning, init_tokenizer, resolve_init, warn_of_image_weights, with_distillation, with_model

TOKENIZER_CAPTIONS = 4000  # captions of the bundled world that a tokenizer is trained on, next to the definitions
EDITED = 100  # scenes of a world whose edits are tried before training


@dataclass(frozen=True, eq=False)
class Run:
    """A recipe and what it names, opened."""

    recipe: Recipe
    sources: Sources
    autoencoder: Autoencoder
    """of a text-only model, pixels"""
    saved_tokenizer: Tokenizer | None = None
    """tokenizer of the run's folder, or of `start`"""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run's folder, else of its data sets or `start`, else one trained on the bundled text."""
        tokenizer = self.saved_tokenizer or self.sources.tokenizer or train_tokenizer(self.recipe, self.sources.world)
        if tokenizer.text_format.chat_template is None and any(spec.name == "dialogues" for spec in self.sources.specs):
            return tokenizer.with_template(TEMPLATE)
        return tokenizer

    @cached_property
    def features(self) -> Features | None:
        """The network with whose features images are aligned; None if they are not. Raises UserError."""
        objective = self.recipe.objective
        return load_features(objective.align_teacher) if objective.align_weight else None

    @cached_property
    def process(self) -> Process:
        """The diffusion process."""
        return Process(self.recipe.diffusion)

    @property
    def format(self) -> SequenceFormat:
        """The layout of documents as sequences."""
        return self.recipe.sequence_format(self.tokenizer)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The words of the bundled scenes; None for a model that draws something else, or nothing."""
        if self.recipe.distil.steps:
            return Vocabulary.load(places(Path(self.recipe.start))["vocabulary.json"])
        names = {spec.name for spec in self.sources.pictures}
        if self.recipe.model.images == "none" or not names <= set(OF_THE_WORLD):
            return None
        if self.recipe.start and Vocabulary.load(places(Path(self.recipe.start))["vocabulary.json"]) is None:
            return None  # it has learned words elsewhere
        return vocabulary(self.sources.world, "edits" in names, "dialogues" in names)

    def mixture(self, autoencoder: Autoencoder | None) -> Mixture:
        """Return the stream of documents, with images through `autoencoder`, or without images."""
        return mixture(self.recipe, self.sources, self.tokenizer, self.format, autoencoder)


def resolve(recipe: Recipe, folder: Path | None = None, here: bool = True) -> Run:
    """Open everything a recipe names, once, and fill in the settings that follow from it.

    Args:
        recipe: the recipe to resolve.
        folder: the run's folder; if a run has begun there, its tokenizer and what `start` determined then stay.
        here: whether "auto" in device and precision becomes what suits this machine.

    Raises:
        UserError: something is missing, or the parts do not fit together.
    """
    begun = None
    if folder is not None and (folder / "config.json").exists():
        begun = read_recipe(folder / "config.json", Recipe)
    recipe, sources, saved = resolve_data(recipe, begun)
    _check_world(sources)
    autoencoder = open_recipe_autoencoder(recipe)
    recipe = _with_autoencoder(recipe, sources, autoencoder)
    if begun is None:
        warn_of_image_weights(recipe, autoencoder.fingerprint)
    if here:
        recipe = settle_device(recipe)
    if folder is not None and (folder / "tokenizer.json").exists():
        saved = Tokenizer.load(folder / "tokenizer.json")
    return Run(recipe, sources, autoencoder, saved)


def resolve_data(recipe: Recipe, begun: Recipe | None = None) -> tuple[Recipe, Sources, Tokenizer | None]:
    """Return the recipe as `start`, its teacher and its data sets determine it, these, and the tokenizer of `start`."""
    if recipe.start:
        recipe = resolve_init(replace(recipe, start=str(fetched(recipe.start))), begun)
    check_finetuning(recipe)
    recipe = with_distillation(recipe, begun)
    if recipe.freeze != "none" or recipe.lora.rank:  # BOI's output row is trained without its embedding
        recipe = with_model(recipe, "tie_embeddings", False, "so that output rows are trained apart")
    sources = open_sources(recipe.data)
    _check_alignment(recipe, sources)
    recipe = replace(recipe, data=replace(recipe.data, source_fingerprints=sources.fingerprints))
    saved = init_tokenizer(Path(recipe.start)) if recipe.start else None
    return _with_vocabulary(recipe, sources, saved), sources, saved


def open_run(recipe: Recipe, folder: Path) -> Run:
    """Resolve a recipe and begin a run in `folder`, or resume the one that is there.

    Writes `config.json` and `tokenizer.json` of a new run. Raises UserError if the folder has a run of another recipe,
    or a tracker's package is missing.
    """
    check_trackers(recipe.loop.trackers)
    run = resolve(settle_device(recipe, folder), folder)
    _ = run.features  # a missing file is reported before anything is written
    record_recipe(run.recipe, folder)
    if not (folder / "tokenizer.json").exists():
        atomic_write(folder / "tokenizer.json", run.tokenizer.save)
    return run


def train_tokenizer(recipe: Recipe, world: World | None = None) -> Tokenizer:
    """Train a byte-level BPE on captions and definitions of the bundled world: a function of the recipe."""
    world = world or World(recipe.data.world)
    captions: Sequence[str] = [caption(world.scene(index), index) for index in range(TOKENIZER_CAPTIONS)]
    return Tokenizer.train([*captions, *glosses("train")], recipe.model.text_vocab_size)


def open_recipe_autoencoder(recipe: Recipe) -> Autoencoder:
    """Open the autoencoder of a recipe: for a Chameleon, one of codes.

    Raises UserError for an unknown name, weights other than the run began with, or a missing codebook.
    """
    name = recipe.data.autoencoder
    if name in AUTOENCODERS and name not in bundled():
        raise UserError(
            f'data.autoencoder: "{name}" is a preset, to be trained first (transfuse autoencoder train {name}); '
            "then give its export folder"
        )
    autoencoder = open_autoencoder(name)
    expected = recipe.data.autoencoder_weights
    if expected not in ("", autoencoder.fingerprint):
        raise UserError(
            f"data.autoencoder: expected {name} with the weights {expected}, as the run began, "
            f"found {autoencoder.fingerprint}"
        )
    if recipe.model.images != "codes":
        return autoencoder
    try:
        return VQTokenizer(autoencoder)
    except ValueError as error:
        raise UserError(f"data.{error}") from None


def _check_alignment(recipe: Recipe, sources: Sources) -> None:
    """Raise UserError for images that cannot be aligned with another network's features."""
    weight, layer, model = recipe.objective.align_weight, recipe.objective.align_layer, recipe.model
    if not weight:
        return
    stored = [name for name, data in sources.sets.items() if data.manifest.encoding is not None]
    for fits, name, expected, value in (
        (model.images == "latents", "align_weight", f'0 with model.images "{model.images}"', weight),
        (recipe.parallel.tensor == 1, "align_weight", f"0 with parallel.tensor {recipe.parallel.tensor}", weight),
        (not recipe.distil.steps, "align_weight", f"0 with distil.steps {recipe.distil.steps}", weight),
        (not stored, "align_weight", f"0 with {', '.join(stored)}, which has latents and no pixels", weight),
        (layer <= model.n_layers, "align_layer", f"at most model.n_layers ({model.n_layers})", layer),
    ):
        if not fits:
            raise UserError(f"objective.{name}: expected {expected}, found {value}")


def _with_vocabulary(recipe: Recipe, sources: Sources, init: Tokenizer | None) -> Recipe:
    """Return the recipe with the vocabulary of its data sets."""
    tokenizer = sources.tokenizer
    if tokenizer is None:
        return recipe
    if init is not None and tokenizer.text_fingerprint != init.text_fingerprint:
        raise UserError(
            f"data.sources: expected data sets with the tokenizer of {recipe.start}, found another; build them with "
            f"--tokenizer {recipe.start}"
        )
    most = recipe.model.max_seq_len - 2
    for name, data in sources.sets.items():
        if data.manifest.longest > most:
            raise UserError(
                f"{name}: expected documents of at most {most} tokens (model.max_seq_len, less two markers), found one "
                f"of {data.manifest.longest}; build it with --max-tokens"
            )
    if init is not None and recipe.model.text_vocab_size >= init.vocab_size:
        return recipe
    return with_model(recipe, "text_vocab_size", tokenizer.vocab_size, "as the tokenizer of the data sets has")


def _check_world(sources: Sources) -> None:
    """Raise UserError for a bundled world, if it is used, with nothing to show, hold out or edit."""
    names = [spec.name for spec in sources.specs]
    if not set(OF_THE_WORLD) & set(names):
        return
    try:
        world, _ = sources.world, sources.heldout
        for number in range(EDITED if {"edits", "dialogues"} & set(names) else 0):
            edit(world.scene(number), world, number)
    except ValueError as error:
        raise UserError(f"data.world: {error}") from None


def _with_autoencoder(recipe: Recipe, sources: Sources, autoencoder: Autoencoder) -> Recipe:
    """Return the recipe with the channels, or codes, of its autoencoder. Raises UserError if they do not fit."""
    model, name = recipe.model, recipe.data.autoencoder
    if recipe.data.context == "clean-copy" and model.images != "latents":
        raise UserError(f'data.context: expected "capped" with model.images "{model.images}", found "clean-copy"')
    empty = 0.0 if model.images == "none" else 1.0
    if recipe.data.text_share == empty:
        raise UserError(
            f'data.text_share: expected another share with model.images "{model.images}", found {empty:g}: '
            "there would be nothing of that kind to learn from"
        )
    if model.images == "none":
        return recipe
    weights = "" if name == "pixels" else autoencoder.fingerprint
    recipe = replace(recipe, data=replace(recipe.data, autoencoder_weights=weights))
    _check_images(recipe, sources, model.patch_size * autoencoder.factor)
    reason = f"as the autoencoder {name} has"
    if isinstance(autoencoder, VQTokenizer):
        return with_model(recipe, "codebook_size", autoencoder.codebook_size, reason)
    if recipe.diffusion.clip_x0 is not None and name != "pixels":
        raise UserError(
            f'diffusion.clip_x0: expected None with the autoencoder "{name}", whose latents have deviation 1 and go '
            f"beyond, found {recipe.diffusion.clip_x0}"
        )
    return with_model(recipe, "latent_channels", autoencoder.channels, reason)


def _check_images(recipe: Recipe, sources: Sources, step: int) -> None:
    """Raise UserError for images that the network cannot take, and for an unknown sampler.

    Sides are multiples of `step`, the pixels along a patch; the patches of a document, noised copies among them, fit
    into its sequence.
    """
    model, size, clean_copy = recipe.model, recipe.data.world.size, recipe.data.context == "clean-copy"
    most = math.inf if model.max_grid is None else model.max_grid * step
    for name, data in sources.sets.items():
        for side in ("rows", "columns"):
            if (data.images[side] % step).any():
                raise UserError(
                    f"{name}: expected pictures whose sides are multiples of {step} pixels (model.patch_size x the "
                    f"autoencoder's factor), found others; build it with a --size, or --multiple, that is one"
                )
            if len(data.images) and (largest := int(data.images[side].max())) > most:
                raise UserError(
                    f"{name}: expected pictures of at most {most:g} pixels a side (model.patch_positions learned), "
                    f"found one of {largest}"
                )
    for name, data in sources.sets.items():
        if not len(data.documents):
            continue
        positions = count_positions(data.documents["tokens"].astype(np.int64), [])
        numbers = np.arange(len(data.documents))
        positions += data.image_positions(numbers, step) + (data.copy_positions(numbers, step) if clean_copy else 0)
        if (longest := int(positions.max())) > model.max_seq_len:
            patches = f"patches of {step} pixels{' and their noised copies' if clean_copy else ''}"
            raise UserError(
                f"{name}: expected documents of at most {model.max_seq_len} positions (model.max_seq_len), found one "
                f"of {longest}, its pictures' {patches} among them"
            )
    if recipe.data.of_the_world and size > most:
        raise UserError(f"data.world.size: expected at most {most:g} (model.patch_positions learned), found {size}")
    if recipe.data.of_the_world and size % step:
        raise UserError(
            f"data.world.size: expected a multiple of {step} (model.patch_size x the autoencoder's factor), "
            f"found {size}"
        )
    if model.images == "latents":
        try:
            Sampler(Process(recipe.diffusion), recipe.generation.sampler)
        except ValueError as error:
            raise UserError(f"generation.sampler: {error}") from None
