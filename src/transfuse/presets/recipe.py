"""A recipe: everything that defines a run, and how its parts are put together.

The recipe is saved with the run as `config.json`; model, data and noise can be rebuilt from it alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from emoji_scenes import World, WorldConfig, caption, edit, glosses
from emoji_scenes.scenes import Split

from ..autoencoders import Autoencoder, Coded, ImageAutoencoder, Later, bundled, open_autoencoder
from ..config import to_dict
from ..data import EditConfig, FaultLog, Finish, PairConfig, Rows, StepLoader, unchanged
from ..devices import Device, Precision
from ..diffusion import DiffusionConfig, Process, Sampler
from ..errors import UserError
from ..export import GenerationConfig, save_export
from ..io import atomic_write
from ..log import logger
from ..model import ModelConfig, Transfusion
from ..model.flops import train_flops
from ..sequence import Tokenizer
from ..training import (
    CheckpointFolder,
    Distributed,
    LoopConfig,
    Objective,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    TokenObjective,
    Trainer,
    TransfusionObjective,
    parallelize,
    place,
)
from .autoencoders import AUTOENCODERS
from .runs import VERSION, check_split
from .sources import Opened, held_out_prompts, image_size, mixture, of_the_world, open_sources, unseen_noise
from .start import begin, its_tokenizer, started


@dataclass(frozen=True)
class DataConfig:
    """What a run learns from, in what shares, and how much of it a step takes."""

    sources: tuple[str, ...] = ("world", "glosses")
    """ "world" (captioned scenes), "edits" (instructions to change scenes), "glosses" (definitions), data sets (folders
    or URLs that transfuse data build made); each may have settings behind commas: photos,weight=2,epochs=4,final=10"""
    source_fingerprints: tuple[str, ...] = ()
    """of the data sets, filled in when a run begins: it goes on with these or not at all"""
    final_stretch: float = 0.01
    """last part of the run, in which the sources' `final` weights count"""
    max_errors: float = 0.001
    """share of a data set's documents that may turn out damaged before training stops; ten always may"""
    cache_gigabytes: float = 20.0
    """room for what is fetched of remote data sets"""
    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: str = "pixels"
    """ "pixels", the name of a bundled autoencoder, or a folder with one (ours or diffusers')"""
    autoencoder_weights: str = ""
    """fingerprint of the autoencoder, filled in when a run begins: it goes on with these weights or not at all"""
    text_share: float = 0.5
    """share that comes from sources of text alone (the paper's 1 : 1)"""
    share_of: Literal["positions", "documents"] = "positions"
    """positions, as in the paper: the more a picture takes, the fewer there are; documents: sample i is the same
    document for every model, whatever its images are made of"""
    pairs: PairConfig = field(default_factory=PairConfig)
    edits: EditConfig = field(default_factory=EditConfig)
    row_length: int | None = None
    """pack documents into rows of so many positions, planned from their lengths; None: a step takes documents"""
    batch_size: int = 512
    """documents per step, or rows"""
    accumulate: int = 1
    """micro-batches a step is split into; the result is the same, but for what dropout takes"""
    workers: int = 0
    """processes that prepare coming steps; 0: in the training process"""

    def __post_init__(self) -> None:
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"data.text_share: expected a share from 0 to 1, found {self.text_share}")
        for name in ("final_stretch", "max_errors"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name}: expected a share from 0 to 1, found {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"data.workers: expected at least 0, found {self.workers}")
        if self.row_length is not None and self.row_length < 2:
            raise ValueError(f"data.row_length: expected at least 2, found {self.row_length}")
        check_split(self.batch_size, self.accumulate)


@dataclass(frozen=True)
class Recipe:
    """A run, whole. Presets are functions that return one."""

    preset: str = ""
    version: int = VERSION
    seed: int = 0
    precision: Precision = "auto"
    """dtype of the residual stream; auto: bfloat16 where the processor multiplies it natively, else float32"""
    device: Device = "auto"
    start: str = ""
    """an export, taken whole; or the folder of a Llama-shaped Hugging Face model: its trunk and tokenizer are taken"""
    start_strict: bool = True
    """if not: of an export the words and those weights that fit the network asked for; of a Llama what fits, where
    weights may be missing, unexpected or of other constants"""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    @property
    def compute(self) -> torch.dtype:
        """Of the residual stream, once "auto" is settled."""
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    def settled(self) -> Recipe:
        """The recipe with the trunk it starts from, the ids of its data and the channels, or codes, of its autoencoder.

        Raises UserError where its parts do not fit.
        """
        return (started(self) if self.start else self)._fed()._fitted()

    def _fed(self) -> Recipe:
        """With what its data sets say."""
        opened = open_sources(self.data)
        recipe = replace(self, data=replace(self.data, source_fingerprints=opened.fingerprints))
        tokenizer = opened.tokenizer
        if tokenizer is None:
            return recipe
        if self.start and tokenizer.fingerprint != its_tokenizer(Path(self.start)).fingerprint:
            raise UserError(
                f"data.sources: expected data sets with the tokenizer of {self.start}, found another; build them with "
                f"--tokenizer {self.start}"
            )
        opened.check_lengths(self.model.max_seq_len - 2, "model.max_seq_len, less two markers")
        if self.model.text_vocab_size >= tokenizer.vocab_size and self.start:
            return recipe
        return recipe._with("text_vocab_size", tokenizer.vocab_size, "as the tokenizer of the data sets has")

    def _fitted(self) -> Recipe:
        check_world(self.data.world, any(spec.name == "edits" for spec in open_sources(self.data).specs))
        autoencoder = self.open_autoencoder()
        nothing = 0.0 if self.model.images == "none" else 1.0
        if self.data.text_share == nothing:
            raise UserError(
                f'data.text_share: expected another share with model.images "{self.model.images}", found {nothing:g}: '
                "there would be nothing of that kind to learn from"
            )
        if self.model.images == "none":
            return self
        weights = "" if self.data.autoencoder == "pixels" else autoencoder.fingerprint
        fitted = replace(self, data=replace(self.data, autoencoder_weights=weights))
        self._check_pictures(self.model.patch_size * autoencoder.factor)
        as_it_has = f"as the autoencoder {self.data.autoencoder} has"
        if isinstance(autoencoder, Coded):
            return fitted._with("codebook_size", autoencoder.codebook_size, as_it_has)
        if self.diffusion.clip_x0 is not None and self.data.autoencoder != "pixels":
            raise UserError(
                f'diffusion.clip_x0: expected None with the autoencoder "{self.data.autoencoder}", whose latents have '
                f"deviation 1 and go beyond, found {self.diffusion.clip_x0}"
            )
        return fitted._with("latent_channels", autoencoder.channels, as_it_has)

    def _check_pictures(self, step: int) -> None:
        """Raise UserError for pictures that the network can not take in patches of `step` pixels, and ways of drawing
        that the process does not know."""
        most = math.inf if self.model.max_grid is None else self.model.max_grid
        opened = open_sources(self.data)
        opened.check_sizes(step, most)
        opened.check_positions(step, self.model.max_seq_len)
        if of_the_world(self.data) and self.data.world.size > most * step:
            raise UserError(
                f"data.world.size: expected at most {most * step:g} (model.patch_positions learned), found "
                f"{self.data.world.size}"
            )
        if of_the_world(self.data) and self.data.world.size % step:
            raise UserError(
                f"data.world.size: expected a multiple of {step} (model.patch_size x the autoencoder's factor), "
                f"found {self.data.world.size}"
            )
        if self.model.images == "latents":
            try:
                Sampler(Process(self.diffusion), self.generation.sampler)
            except ValueError as error:
                raise UserError(f"generation.sampler: {error}") from None

    def _with(self, name: str, value: int, why: str) -> Recipe:
        """With a number of the model's as something else needs it."""
        if getattr(self.model, name) == value:
            return self
        logger.info(f"model.{name}: {value}, {why}")
        model = replace(self.model, **{name: value})  # type: ignore[arg-type]
        return replace(self, model=model)

    def open_autoencoder(self) -> Autoencoder:
        """The autoencoder of the run, one of codes for a Chameleon. Raises UserError where there is none of that name,
        or none with a codebook."""
        name = self.data.autoencoder
        if name in AUTOENCODERS and name not in bundled():
            raise UserError(
                f'data.autoencoder: "{name}" is a preset, to be trained first (transfuse autoencoder train {name}); '
                "then give its export folder"
            )
        autoencoder = open_autoencoder(name)
        expected = self.data.autoencoder_weights
        if expected not in ("", autoencoder.fingerprint):
            raise UserError(
                f"data.autoencoder: expected {name} with the weights {expected}, as the run began, "
                f"found {autoencoder.fingerprint}"
            )
        if self.model.images != "codes":
            return autoencoder
        try:
            return Coded(autoencoder)
        except ValueError as error:
            raise UserError(f"data.{error}") from None


@cache
def check_world(config: WorldConfig, edited: bool) -> None:
    """Raise UserError for a world with nothing to learn from, or nothing that is held out; or, if it is to be edited,
    with scenes in which nothing can change."""
    try:
        worlds = {split: World(replace(config, split=split)) for split in get_args(Split)}
        world = worlds[config.split]
        for number in range(PROBED if edited else 0):
            edit(world.scene(number), world, number)
    except ValueError as error:
        raise UserError(f"data.world: {error}") from None


PROBED = 100
"""scenes of a world that are tried to be edited"""


def captions(config: WorldConfig, count: int) -> list[str]:
    world = World(config)
    return [caption(world.scene(index), index) for index in range(count)]


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """A byte-level BPE on the run's own captions and definitions: a function of the recipe."""
    return Tokenizer.train([*captions(recipe.data.world, 4000), *glosses("train")], recipe.model.text_vocab_size)


def build_trainer(recipe: Recipe, folder: Path, ranks: Distributed | None = None) -> tuple[Trainer, Tokenizer]:
    """Put model, data, objective and loop together for a resolved recipe. Raises UserError where they do not fit."""
    ranks = ranks or Distributed(torch.device(recipe.device))
    opened = open_sources(recipe.data)
    path = folder / "tokenizer.json"
    tokenizer = ranks.on_rank0(lambda: _tokenizer(recipe, opened, path)) or _tokenizer(recipe, opened, path)
    objective: Objective = TokenObjective(recipe.objective, recipe.seed)
    finish: Finish = unchanged
    if recipe.model.images == "latents":
        encoder: ImageAutoencoder | None = None
        if encodes_later(recipe):
            opened_autoencoder = recipe.open_autoencoder()
            assert isinstance(opened_autoencoder, ImageAutoencoder)
            encoder = opened_autoencoder.to(ranks.device)
        objective = TransfusionObjective(recipe.objective, Process(recipe.diffusion), recipe.seed, encoder)
        finish = objective.sample_noise
    loader = build_loader(recipe, opened, tokenizer, folder, ranks.data, ranks.datas, finish)
    if recipe.model.images == "latents" and ranks.first and (unseen := unseen_noise(recipe, loader.document)):
        logger.info(unseen)
    model = build_model(recipe, folder, tokenizer, ranks)
    trainer = Trainer(
        model,
        objective,
        loader,
        folder,
        recipe.loop,
        recipe.optimizer,
        flops=lambda batch: train_flops(recipe.model, batch),
        ranks=ranks,
    )
    return trainer, tokenizer


def encodes_later(recipe: Recipe) -> bool:
    """Whether pictures are encoded where the network trains, not in the loader: on a GPU, for latents of a network."""
    return recipe.device == "cuda" and recipe.model.images == "latents" and recipe.data.autoencoder != "pixels"


def build_model(recipe: Recipe, folder: Path, tokenizer: Tokenizer, ranks: Distributed) -> Transfusion:
    """The network with its first weights, or this rank's shards of it: the same for any number of ranks."""
    model = parallelize(Transfusion.on_meta(recipe.model, recipe.compute), ranks, recipe.parallel)
    model.to_empty(device=ranks.device).initialise(recipe.seed, place)
    if recipe.start and CheckpointFolder(folder / "checkpoints", ranks=ranks).newest()[0] is None:
        start = Path(recipe.start)
        begun = Transfusion.on_meta(recipe.model, recipe.compute).to_empty(device="cpu").initialise(recipe.seed)
        logger.info(f"{start}: {begin(begun, start, tokenizer, recipe.start_strict)}")
        with torch.no_grad():
            for weight, values in zip(model.parameters(), begun.parameters(), strict=True):
                place(weight, values)
    return model


def averaged_model(recipe: Recipe, weights: dict[str, Tensor]) -> Transfusion:
    """The network with a trainer's averaged weights, which it shares: for looking, not for changing."""
    model = Transfusion.on_meta(recipe.model, recipe.compute)
    model.load_state_dict(weights, assign=True)
    return model.to(recipe.device).requires_grad_(False)


def _tokenizer(recipe: Recipe, opened: Opened, path: Path) -> Tokenizer:
    """The run's own, which it writes when it begins."""
    if not path.exists():
        atomic_write(path, new_tokenizer(recipe, opened).save)
    return Tokenizer.load(path)


def new_tokenizer(recipe: Recipe, opened: Opened) -> Tokenizer:
    """That of a run's data sets, or of the model it starts from, or one trained on the bundled words."""
    if opened.tokenizer is not None:
        return opened.tokenizer
    return its_tokenizer(Path(recipe.start)) if recipe.start else train_tokenizer(recipe)


def build_loader(
    recipe: Recipe,
    opened: Opened,
    tokenizer: Tokenizer,
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    finish: Finish = unchanged,
) -> StepLoader:
    """The batches of a run, or one rank's part of them; damaged documents are listed in `folder`."""
    data, grammar = recipe.data, recipe.model.sequence_format(tokenizer)
    autoencoder = None if recipe.model.images == "none" else recipe.open_autoencoder()
    if autoencoder is not None and encodes_later(recipe):
        autoencoder = Later(autoencoder)
    stream = mixture(recipe, opened, tokenizer, grammar, autoencoder)
    rows = None
    if data.row_length is not None:
        rows = Rows(lambda samples: stream.lengths(samples, grammar), data.row_length, end=stream.end)
    faults = FaultLog(folder, {name: len(found) for name, found in opened.sets.items()}, data.max_errors, rank)
    return StepLoader(
        stream.document,
        grammar,
        data.batch_size,
        data.accumulate,
        recipe.model.image_attention,
        data.workers,
        rows,
        rank,
        ranks,
        faults.add,
        torch.zeros(recipe.model.latent_channels, *[recipe.model.patch_size] * 2)
        if ranks > 1 and recipe.model.images == "latents"
        else None,
        finish,
    )


def export_run(recipe: Recipe, trainer: Trainer, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write the averaged weights of a trainer as an export: the first rank does, all must call it."""
    weights = trainer.averaged()
    trainer.merge()
    trainer.ranks.on_rank0(lambda: export_weights(recipe, trainer, weights, tokenizer, folder))
    return folder


def export_weights(
    recipe: Recipe, trainer: Trainer, weights: dict[str, Tensor], tokenizer: Tokenizer, folder: Path
) -> Path:
    """Write averaged weights of a trainer as an export, in this process."""
    return save_export(
        folder,
        weights,
        recipe.model,
        recipe.diffusion,
        tokenizer,
        recipe.open_autoencoder(),
        image_size(recipe),
        recipe.generation,
        _card(recipe, trainer),
        to_dict(recipe.data.world) if of_the_world(recipe.data) else None,
        recipe.preset,
    )


def _described(recipe: Recipe, pictured: bool) -> Iterator[str]:
    opened = open_sources(recipe.data)
    for spec in [*(opened.pictures if pictured else []), *opened.texts]:
        if spec.name == "world":
            world = recipe.data.world
            yield f"scenes of the bundled world at {world.size} pixels ({len(world.noun_names)} nouns)"
        elif spec.name == "edits":
            yield "instructions to change scenes, with what they ask for"
        elif spec.name == "glosses":
            yield "WordNet definitions"
        else:
            found = opened.sets[spec.name]
            yield f"the data set {found.name} ({len(found)} documents of {found.manifest.source})"


def _card(recipe: Recipe, trainer: Trainer) -> str:
    images = recipe.model.images
    kind = {"latents": "Transfusion", "codes": "Chameleon", "none": "text-only"}[images]
    seen = ", ".join(_described(recipe, images != "none"))
    call = f'("{next(iter(held_out_prompts(recipe, 1)), "a crab")}").images[0]'
    if images == "none":
        call = '.generate("crab:").text'
    start = f"\n- Started from the weights in {Path(recipe.start).name}, whose licence holds." if recipe.start else ""
    return f"""---
pipeline_tag: {"text-generation" if images == "none" else "any-to-any"}
library_name: transfuse
{"" if recipe.start else "license: apache-2.0" + chr(10)}---
# A {kind} model trained with the preset "{recipe.preset}"

- Data: {seen}.{start}
- Autoencoder: {"none" if images == "none" else recipe.data.autoencoder}.
- Training: {trainer.step} steps, {int(trainer.totals["positions"])} positions, {int(trainer.totals["images"])} images,
  {trainer.totals["flops"]:.3g} operations, {trainer.totals["seconds"]:.0f} seconds.
- Limits: it knows {seen}; nothing else.

    import transfuse
    transfuse.load("this folder"){call}
"""
