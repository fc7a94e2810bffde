"""A recipe: everything that defines a run, and how its parts are put together.

The recipe is saved with the run as `config.json`; model, data and noise can be rebuilt from it alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..autoencoders import Pixels
from ..configuration import from_dict, read_json, to_dict
from ..data import Mixture, PairConfig, ScenePairs, Source, StepLoader, Texts
from ..data.world import World, WorldConfig, caption, glosses
from ..diffusion import DiffusionConfig, Process
from ..errors import UserError
from ..export import GenerationConfig, save_export
from ..model import ModelConfig, Transfusion
from ..model.flops import train_flops
from ..sequence import Tokenizer
from ..training import LoopConfig, ObjectiveConfig, OptimizerConfig, Trainer, TransfusionObjective

VERSION = 1
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class DataConfig:
    """Today's data: scenes of the bundled world with captions, and definitions as text."""

    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: Literal["pixels", "kl-f8"] = "pixels"
    """kl-f8: the paper's VAE, 8 channels at an eighth of the resolution"""
    text_share: float = 0.5
    """share of all positions that come from text-only documents (the paper's 1 : 1)"""
    pairs: PairConfig = field(default_factory=PairConfig)
    batch_size: int = 512
    """documents per step"""
    accumulate: int = 1
    """micro-batches a step is split into; the result is the same"""
    workers: int = 0
    """processes that prepare coming steps; 0: in the training process"""

    def __post_init__(self) -> None:
        if not 0 <= self.text_share < 1:
            raise ValueError(f"data.text_share: expected a share of at least 0 and below 1, found {self.text_share}")
        if self.accumulate < 1 or self.batch_size < 1 or self.batch_size % self.accumulate:
            raise ValueError(
                f"data.batch_size: expected a multiple of data.accumulate ({self.accumulate}), found {self.batch_size}"
            )


@dataclass(frozen=True)
class Recipe:
    """A run, whole. Presets are functions that return one."""

    preset: str = ""
    version: int = VERSION
    seed: int = 0
    precision: Precision = "auto"
    """dtype of the residual stream; auto: bfloat16 where the processor multiplies it natively, else float32"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)


def resolve(recipe: Recipe) -> Recipe:
    """Settle what is "auto" for this machine, so that a resumed run does not settle it differently."""
    device = recipe.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: expected a CUDA device, found none on this machine")
    precision = recipe.precision
    if precision == "auto":
        precision = "bfloat16" if device == "cuda" or _cpu_multiplies_bfloat16() else "float32"
    return replace(recipe, device=device, precision=precision)


def _cpu_multiplies_bfloat16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(name in flags.read_text() for name in ("avx512_bf16", "amx_bf16"))


def open_run(recipe: Recipe, folder: Path) -> Recipe:
    """Claim a run folder: a new one gets `config.json`, an old one must have been made by the same recipe.

    Raises UserError that names the first setting that differs.
    """
    check(recipe)
    path = folder / "config.json"
    if not path.exists():
        recipe = resolve(recipe)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
            os.replace(partial, path)
        except OSError as error:
            raise UserError(f"{folder}: expected a folder to write to, found {error.strerror or error}") from None
        return recipe
    saved = read_recipe(path)
    asked = replace(recipe, device=saved.device, precision=saved.precision)
    difference = _first_difference(to_dict(saved), to_dict(asked))
    if difference:
        raise UserError(f"{path}: {difference}; give the same settings to go on, or another --run folder to start anew")
    return saved


def check(recipe: Recipe) -> None:
    """Refuse a recipe whose parts do not fit together, before anything is written."""
    if recipe.data.autoencoder != "pixels":
        raise UserError(
            f'data.autoencoder: "{recipe.data.autoencoder}" can be planned, but not trained yet: use "pixels"'
        )
    if recipe.model.latent_channels != Pixels().channels:
        raise UserError(
            f"model.latent_channels: expected {Pixels().channels}, the channels of the autoencoder "
            f'"{recipe.data.autoencoder}", found {recipe.model.latent_channels}'
        )
    size = recipe.data.world.size
    if size % recipe.model.patch_size:
        raise UserError(
            f"data.world.size: expected a multiple of model.patch_size ({recipe.model.patch_size}), found {size}"
        )


def read_recipe(path: Path) -> Recipe:
    values = read_json(path)
    found = values.get("version") if isinstance(values, dict) else None
    if found != VERSION:
        raise UserError(f"{path}: version: expected {VERSION}, found {found}")
    return from_dict(Recipe, values, str(path))


def _first_difference(saved: Any, asked: Any, name: str = "") -> str:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in saved:
            difference = _first_difference(saved[key], asked.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return ""
    return "" if saved == asked else f"{name}: this run has {saved!r}, the command asks for {asked!r}"


def captions(config: WorldConfig, count: int) -> list[str]:
    world = World(config)
    return [caption(world.scene(index), index) for index in range(count)]


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """A byte-level BPE on the run's own captions and definitions: a function of the recipe."""
    return Tokenizer.train([*captions(recipe.data.world, 4000), *glosses("train")], recipe.model.vocabulary)


def build_trainer(
    recipe: Recipe, folder: Path, sample: Callable[[nn.Module, Path], None] | None = None
) -> tuple[Trainer, Tokenizer]:
    """Put model, data, objective and loop together for a resolved recipe. Raises UserError where they do not fit."""
    check(recipe)
    autoencoder = Pixels()
    path = folder / "tokenizer.json"
    if not path.exists():
        train_tokenizer(recipe).save(path)
    tokenizer = Tokenizer.load(path)
    grammar = tokenizer.grammar(recipe.model.patch_size)
    sources: list[Source] = [
        ScenePairs(World(recipe.data.world), tokenizer, autoencoder, recipe.data.pairs, recipe.seed),
        Texts(glosses("train"), tokenizer, recipe.seed),
    ]
    shares = [1 - recipe.data.text_share, recipe.data.text_share]
    mixture = Mixture(sources, shares, grammar)
    data = recipe.data
    loader = StepLoader(
        mixture.document, grammar, data.batch_size, data.accumulate, recipe.model.image_attention, data.workers
    )
    dtype = torch.float32 if recipe.precision == "float32" else torch.bfloat16
    model = Transfusion.on_meta(recipe.model, compute=dtype).to_empty(device=recipe.device).initialise(recipe.seed)
    objective = TransfusionObjective(recipe.objective, Process(recipe.diffusion), recipe.seed)
    trainer = Trainer(
        model,
        objective,
        loader,
        folder,
        recipe.loop,
        recipe.optimizer,
        flops=lambda batch: train_flops(recipe.model, batch),
        sample=sample,
    )
    return trainer, tokenizer


def export_run(recipe: Recipe, trainer: Trainer, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write the averaged weights of a trainer as an export."""
    return save_export(
        folder,
        trainer.ema.weights,
        recipe.model,
        recipe.diffusion,
        tokenizer,
        recipe.data.world.size,
        recipe.generation,
        _card(recipe, trainer),
    )


def _card(recipe: Recipe, trainer: Trainer) -> str:
    world = recipe.data.world
    return f"""---
pipeline_tag: any-to-any
library_name: transfuse
license: apache-2.0
---
# A Transfusion model trained with the preset "{recipe.preset}"

- Data: scenes of the bundled world at {world.size} pixels ({len(world.noun_names)} nouns), WordNet definitions.
- Training: {trainer.step} steps, {int(trainer.totals["positions"])} positions, {int(trainer.totals["images"])} images,
  {trainer.totals["flops"]:.3g} operations, {trainer.totals["seconds"]:.0f} seconds.
- Limits: it knows drawn icons on plain grounds, and definitions; nothing else.

    import transfuse
    transfuse.load("this folder")("a crab on a blue background").images[0]
"""
