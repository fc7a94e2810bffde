"""A recipe: everything that defines a run, and how its parts are put together.

The recipe is saved with the run as `config.json`; model, data and noise can be rebuilt from it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ..autoencoders import Autoencoder, Coded, bundled, open_autoencoder
from ..console import say
from ..data import Mixture, PairConfig, ScenePairs, Source, StepLoader, Texts
from ..data.world import World, WorldConfig, caption, glosses
from ..diffusion import DiffusionConfig, Process
from ..errors import UserError
from ..export import GenerationConfig, save_export
from ..interchange import check_trunk, marker_rows, read_llama_config, start_from_llama
from ..model import ModelConfig, Transfusion
from ..model.flops import train_flops
from ..sequence import Grammar, Tokenizer
from ..training import (
    CheckpointFolder,
    LoopConfig,
    Objective,
    ObjectiveConfig,
    OptimizerConfig,
    TokenObjective,
    Trainer,
    TransfusionObjective,
    verify,
)
from .autoencoders import AUTOENCODERS
from .runs import VERSION, Device, Precision, check_split


@dataclass(frozen=True)
class DataConfig:
    """Today's data: scenes of the bundled world with captions, and definitions as text."""

    world: WorldConfig = field(default_factory=WorldConfig)
    autoencoder: str = "pixels"
    """ "pixels", the name of a bundled autoencoder, or a folder with one (ours or diffusers')"""
    autoencoder_weights: str = ""
    """fingerprint of the autoencoder, filled in when a run begins: it goes on with these weights or not at all"""
    text_share: float = 0.5
    """share that comes from text-only documents (the paper's 1 : 1)"""
    share_of: Literal["positions", "documents"] = "positions"
    """positions, as in the paper: the more a picture takes, the fewer there are; documents: sample i is the same
    document for every model, whatever its images are made of"""
    pairs: PairConfig = field(default_factory=PairConfig)
    batch_size: int = 512
    """documents per step"""
    accumulate: int = 1
    """micro-batches a step is split into; the result is the same, but for what dropout takes"""
    workers: int = 0
    """processes that prepare coming steps; 0: in the training process"""

    def __post_init__(self) -> None:
        if not 0 <= self.text_share <= 1:
            raise ValueError(f"data.text_share: expected a share from 0 to 1, found {self.text_share}")
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
    """folder of a Llama-shaped Hugging Face model whose weights, tokenizer and shape the run starts with"""
    start_strict: bool = True
    """refuse weights that are missing, unexpected or of other constants; if not, what fits is taken"""
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    def settled(self) -> Recipe:
        """The recipe with the trunk it starts from and the channels, or codes, of its autoencoder.

        Raises UserError where its parts do not fit.
        """
        return self._started()._fitted()

    def _started(self) -> Recipe:
        if not self.start:
            return self
        folder = Path(self.start)
        fields = read_llama_config(folder, self.model.context)
        ids = Tokenizer.adopt(folder / "tokenizer.json").vocabulary
        fields["vocabulary"] = max(fields["vocabulary"], ids)
        changed = {name: value for name, value in fields.items() if getattr(self.model, name) != value}
        model = replace(self.model, **changed)
        check_trunk(model, folder, self.start_strict)
        if changed:
            say(f"model: {', '.join(f'{name} {value}' for name, value in changed.items())}, to start from {folder}")
        return replace(self, model=model)

    def _fitted(self) -> Recipe:
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
        step = self.model.patch_size * autoencoder.factor
        if self.data.world.size % step:
            raise UserError(
                f"data.world.size: expected a multiple of {step} (model.patch_size x the autoencoder's factor), "
                f"found {self.data.world.size}"
            )
        if isinstance(autoencoder, Coded):
            return fitted._with("codebook", autoencoder.codebook_size)
        if self.diffusion.clip_x0 is not None and self.data.autoencoder != "pixels":
            raise UserError(
                f'diffusion.clip_x0: expected None with the autoencoder "{self.data.autoencoder}", whose latents have '
                f"deviation 1 and go beyond, found {self.diffusion.clip_x0}"
            )
        return fitted._with("latent_channels", autoencoder.channels)

    def _with(self, name: str, value: int) -> Recipe:
        """With a number of the model's as the autoencoder has it."""
        if getattr(self.model, name) == value:
            return self
        say(f"model.{name}: {value}, as the autoencoder {self.data.autoencoder} has")
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
    path = folder / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer.adopt(Path(recipe.start) / "tokenizer.json") if recipe.start else train_tokenizer(recipe)
        tokenizer.save(path)
    tokenizer = Tokenizer.load(path)
    grammar = recipe.model.grammar(tokenizer)
    data = recipe.data
    loader = StepLoader(
        _mixture(recipe, tokenizer, grammar).document,
        grammar,
        data.batch_size,
        data.accumulate,
        recipe.model.image_attention,
        data.workers,
    )
    dtype = torch.float32 if recipe.precision == "float32" else torch.bfloat16
    model = Transfusion.on_meta(recipe.model, compute=dtype).to_empty(device=recipe.device).initialise(recipe.seed)
    saved = CheckpointFolder(folder / "checkpoints", recipe.loop.keep).complete()
    if recipe.start and not any(verify(path) is None for path in saved):
        start = Path(recipe.start)
        say(f"{start}: {start_from_llama(model, start, recipe.start_strict, marker_rows(start, tokenizer))}")
    objective: Objective = TokenObjective(recipe.objective, recipe.seed)
    if recipe.model.images == "latents":
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


def _mixture(recipe: Recipe, tokenizer: Tokenizer, grammar: Grammar) -> Mixture:
    """The stream of a run: pairs and texts. A text-only model leaves the pairs out."""
    data = recipe.data
    texts = Texts(glosses("train"), tokenizer, recipe.seed)
    if data.text_share == 1 or (recipe.model.images == "none" and data.share_of == "positions"):
        return Mixture([texts], [1.0], None)
    pairs: Source | None = None
    if recipe.model.images != "none":
        pairs = ScenePairs(World(data.world), tokenizer, recipe.open_autoencoder(), data.pairs, recipe.seed)
    shares = [1 - data.text_share, data.text_share]
    return Mixture([pairs, texts], shares, grammar if data.share_of == "positions" else None)


def export_run(recipe: Recipe, trainer: Trainer, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write the averaged weights of a trainer as an export."""
    return save_export(
        folder,
        trainer.ema.weights,
        recipe.model,
        recipe.diffusion,
        tokenizer,
        recipe.open_autoencoder(),
        recipe.data.world.size,
        recipe.generation,
        _card(recipe, trainer),
    )


def _card(recipe: Recipe, trainer: Trainer) -> str:
    world, images = recipe.data.world, recipe.model.images
    kind = {"latents": "Transfusion", "codes": "Chameleon", "none": "text-only"}[images]
    seen = f"scenes of the bundled world at {world.size} pixels ({len(world.noun_names)} nouns), WordNet definitions"
    call = '("a crab on a blue background").images[0]'
    if images == "none":
        seen, call = "WordNet definitions", '.generate("crab:").text'
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
