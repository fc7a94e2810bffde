"""Training a model, from its recipe to its export: `transfuse train`, the demo and every experiment come through here.

    trained = train(preset("tiny"), Path("runs/tiny"))        # or resumes the run in that folder
    trained.export                                            # runs/tiny/export

A recipe is resolved into a `Run`, which has opened all that the recipe names; from it come the model, the loader, the
trainer and the export.
"""

from __future__ import annotations

import copy
import inspect
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from .autoencoders import DeferredEncoder, ImageAutoencoder, Pixels
from .config import to_dict
from .data import CorruptLog, Finish, Packer, StepLoader, unchanged
from .devices import on_meta
from .errors import UserError, shown
from .export import Distilled, describe, load_weights, save_export
from .folders import atomic_dir
from .io import sha256
from .log import logger
from .model import Transfusion
from .model.costs import train_flops
from .model.transfusion import AlignmentHead, of_images
from .model_card import write_card
from .recipes import Recipe
from .runs import Curves, Run, held, open_run, resolve, run_device, unseen_noise
from .runs.monitor import measuring, sample_grid
from .runs.start import init_from
from .sequence import Batch
from .training import (
    CheckpointFolder,
    DistillationObjective,
    Distributed,
    TokenObjective,
    Trainer,
    TransfusionObjective,
    join,
    parallelize,
    place,
    read_metrics,
)
from .training.finetune import adapt, begin, frozen, merged
from .training.metrics import Average
from .training.trainer import Measure, Sample


@dataclass(eq=False)
class Trained:
    """A run that has been trained, or stopped and saved."""

    run: Run
    trainer: Trainer
    outcome: Literal["finished", "stopped"]
    """stopped: saved, to be resumed by the same command"""
    export: Path | None
    """the exported model; None for a stopped run"""

    @property
    def recipe(self) -> Recipe:
        """The recipe, resolved."""
        return self.run.recipe

    def _repr_html_(self) -> str:
        """Return the run's losses as a chart, for notebooks."""
        folder = self.trainer.folder
        curves = Curves({str(folder): read_metrics(folder / "metrics.jsonl")})
        return f"<p>{self.outcome} at step {self.trainer.step}</p>{curves._repr_html_()}"


def train(recipe: Recipe, folder: Path) -> Trained:
    """Train a recipe in a run folder, or resume the run there, and export the averaged weights to `folder/export`.

    Runs in as many processes as torchrun started. Raises UserError if the folder was made by another recipe.
    """
    parallel = recipe.parallel
    with join(run_device(recipe, folder), parallel.replicate, parallel.tensor) as ranks:
        # The first rank writes the folder and reports mistakes; then the others open it.
        run = ranks.on_rank0(lambda: open_run(recipe, folder)) or open_run(recipe, folder)
        with held(folder, ranks):
            trainer = build_trainer(run, folder, ranks)
            sample = None if run.recipe.model.images == "none" else sample_grid(run)
            measure = None
            if run.recipe.loop.measure_every:
                measure = measuring(
                    run, trainer, folder, lambda weights: export_weights(run, trainer, weights, folder / "best")
                )
            if run_trainer(trainer, sample, measure) == "stopped":
                return Trained(run, trainer, "stopped", None)
            best, export = folder / "best", folder / "export"
            if run.recipe.loop.patience and best.is_dir():
                ranks.on_rank0(lambda: copy_export(best, export))
            else:
                export_run(run, trainer, export)
            return Trained(run, trainer, "finished", export)


def step_seconds(recipe: Recipe, steps: int = 20) -> float:
    """Return the seconds that a step of a recipe takes on this machine, by a trainer that is thrown away.

    The first quartile of `steps`, because the first steps prepare kernels and other work may disturb some.
    """
    average, paces = Average(), []
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(resolve(recipe), Path(scratch))
        for _ in range(steps):
            began = time.monotonic()
            trainer.train_step(average)
            paces.append(time.monotonic() - began)
    return sorted(paces)[steps // 4]


def build_trainer(run: Run, folder: Path, ranks: Distributed | None = None) -> Trainer:
    """Return the trainer of a run: model, loss, loader and loop. Raises UserError if the parts do not fit."""
    recipe = run.recipe
    ranks = ranks or Distributed(torch.device(recipe.device))
    model = build_model(run, folder, ranks)
    objective, finish = TokenObjective(recipe.objective, recipe.seed), unchanged
    if recipe.model.images == "latents":
        # Where batches of pixels are encoded: on the trainer's GPU, or in the loader's processes.
        on_gpu, encoder, features = recipe.device == "cuda", None, None
        place_of_encoder = ranks.device if on_gpu else torch.device("cpu")
        if encodes_later(recipe):
            assert isinstance(run.autoencoder, ImageAutoencoder | Pixels)
            encoder = run.autoencoder
            if isinstance(encoder, ImageAutoencoder):
                encoder = copy.deepcopy(encoder).to(place_of_encoder)
        if run.features is not None:
            side = recipe.model.patch_size * run.autoencoder.factor
            features = partial(run.features.to(place_of_encoder).patches, side=side)
        if recipe.distil.steps:
            export = describe(recipe.start)
            teacher = Transfusion.on_meta(export.model, recipe.compute)
            load_weights(teacher, export.place["model.safetensors"])
            teacher = teacher.float().requires_grad_(False).to(ranks.device)
            objective = DistillationObjective(
                recipe.objective, run.process, recipe.seed, teacher, run.format, recipe.distil, encoder
            )
        else:
            objective = TransfusionObjective(recipe.objective, run.process, recipe.seed, encoder, features)
        finish = objective.sample_noise if on_gpu else objective.prepare
    loader = build_loader(run, folder, ranks.data, ranks.datas, finish)
    if recipe.model.images == "latents" and ranks.first and (warning := unseen_noise(recipe, loader.document)):
        logger.info(warning)

    def flops(batch: Batch) -> int:
        student = train_flops(recipe.model, batch, frozen(recipe.freeze, recipe.lora))
        return student + (objective.teacher_flops(batch) if isinstance(objective, DistillationObjective) else 0)

    return Trainer(
        model,
        objective,
        loader,
        folder,
        recipe.loop,
        recipe.optimizer,
        flops,
        ranks,
        rate_of=lambda name: 1.0 if of_images(name) else recipe.text_rate,
        plain=partial(merged, model),
    )


def run_trainer(
    trainer: Trainer, sample: Sample | None = None, measure: Measure | None = None
) -> Literal["finished", "stopped"]:
    """Restore the newest checkpoint, if any, and train until the run is finished or stopped."""
    if trainer.restore():
        logger.info(f"{trainer.folder}: resumed from step {trainer.step}")
    outcome = trainer.run(sample, measure)
    if outcome == "stopped":
        logger.info(f"{trainer.folder}: stopped at step {trainer.step} and saved; the same command resumes it")
    return outcome


def encodes_later(recipe: Recipe) -> bool:
    """Return True if batches of pixels are encoded whole: by the trainer on its GPU, or with a teacher's features."""
    by_network = recipe.device == "cuda" and recipe.data.autoencoder != "pixels"
    return recipe.model.images == "latents" and (by_network or recipe.objective.align_weight > 0)


def build_model(run: Run, folder: Path, ranks: Distributed) -> Transfusion:
    """Return the network with its initial weights, or this rank's shards of it; they do not depend on the ranks."""
    recipe = run.recipe
    model = adapt(Transfusion.on_meta(recipe.model, recipe.compute), recipe.freeze, recipe.lora, run.format)
    if run.features is not None:
        with on_meta():
            layer, channels = recipe.objective.align_layer, run.features.channels[-2]
            model.image_alignment = AlignmentHead(recipe.model.d_model, layer, channels)
    model = parallelize(model, ranks, recipe.parallel)
    model.to_empty(device=ranks.device).initialise(recipe.seed, place)
    if recipe.start and CheckpointFolder(folder / "checkpoints", ranks=ranks).newest()[0] is None:
        start = Path(recipe.start)
        plain = Transfusion.on_meta(recipe.model, recipe.compute).to_empty(device="cpu").initialise(recipe.seed)
        copy_tower = recipe.init.image_tower == "copy"
        logger.info(f"{start}: {init_from(plain, start, run.tokenizer, recipe.init.allow_changes, copy_tower)}")
        begin(model, plain, recipe.seed)
    return model


def build_loader(run: Run, folder: Path, rank: int = 0, ranks: int = 1, finish: Finish = unchanged) -> StepLoader:
    """Return the batches of a run, or one rank's part of them; damaged documents are listed in `folder`."""
    recipe, data, form = run.recipe, run.recipe.data, run.format
    autoencoder = None if recipe.model.images == "none" else run.autoencoder
    if autoencoder is not None and encodes_later(recipe):
        autoencoder = DeferredEncoder(autoencoder)
    stream = run.mixture(autoencoder)
    packer = None
    if data.row_length is not None:
        packer = Packer(lambda samples: stream.lengths(samples, form), data.row_length, end=stream.end)
    sizes = {name: len(data_set) for name, data_set in run.sources.sets.items()}
    padding_image = None
    if ranks > 1 and recipe.model.images == "latents":
        padding_image = torch.zeros(recipe.model.latent_channels, *[recipe.model.patch_size] * 2)
    return StepLoader(
        stream.document,
        form,
        data.batch_size,
        data.accumulate,
        recipe.model.image_attention,
        data.workers,
        packer,
        rank,
        ranks,
        CorruptLog(folder, sizes, data.max_errors, rank).add,
        padding_image,
        finish,
    )


def export_run(run: Run, trainer: Trainer, folder: Path) -> Path:
    """Export a trainer's averaged weights: the first rank writes, all ranks must call it."""
    weights = trainer.averaged()
    trainer.merge()
    trainer.ranks.on_rank0(lambda: export_weights(run, trainer, weights, folder))
    return folder


def copy_export(source: Path, folder: Path) -> None:
    """Copy an export. Raises UserError if it cannot be written."""
    with atomic_dir(folder, "export") as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)


def export_weights(run: Run, trainer: Trainer, weights: dict[str, Tensor], folder: Path) -> Path:
    """Export averaged weights from this process."""
    recipe, distil, distilled = run.recipe, run.recipe.distil, None
    if distil.steps:
        teacher = distil.teacher_weights or sha256(describe(recipe.start).place["model.safetensors"])[:16]
        assert distil.teacher_steps is not None
        assert distil.guidance_scale is not None
        distilled = Distilled(distil.steps, teacher, distil.teacher_steps, distil.guidance_scale)
    return save_export(
        folder,
        weights,
        recipe.model,
        recipe.diffusion,
        run.tokenizer,
        run.autoencoder,
        run.sources.image_size,
        recipe.generation,
        _model_card(run, trainer, distilled),
        to_dict(recipe.data.world) if recipe.data.of_the_world else None,
        recipe.preset,
        run.vocabulary,
        distilled,
    )


def _model_card(run: Run, trainer: Trainer, distilled: Distilled | None) -> str:
    recipe, images = run.recipe, run.recipe.model.images
    kind = {"latents": "Transfusion", "codes": "Chameleon", "none": "text-only"}[images]
    data = ", ".join(_data_described(run))
    call = f'("{next(iter(run.sources.held_out_prompts(1)), "a crab")}").images[0]'
    if images == "none":
        call = '.generate("crab:").text'
    done = {"positions": 0, "images": 0, "flops": 0, "seconds": 0, **trainer.totals}
    start = f"\n- Started from the weights in {Path(recipe.start).name}, whose licence holds." if recipe.start else ""
    if distilled:
        start += f"\n- Distilled: {distilled}."
    metadata = {"pipeline_tag": "text-generation" if images == "none" else "any-to-any", "library_name": "transfuse"}
    if not recipe.start and not run.sources.sets:  # nothing but what comes with the package
        metadata["license"] = "apache-2.0"
    text = f"""# A {kind} model trained with the preset "{recipe.preset}"

- Data: {data}.{start}
- Autoencoder: {"none" if images == "none" else recipe.data.autoencoder}.
- Training: {trainer.step} steps, {int(done["positions"])} positions, {int(done["images"])} images,
  {done["flops"]:.3g} operations, {done["seconds"]:.0f} seconds.
- Limits: it knows {data}; nothing else.

    import transfuse
    transfuse.load("this folder"){call}
"""
    return write_card(metadata, text)


def _data_described(run: Run) -> Iterator[str]:
    """Yield a phrase for each source of a run."""
    sources, world = run.sources, run.recipe.data.world
    for spec in [*(sources.pictures if run.recipe.model.images != "none" else []), *sources.texts]:
        if spec.name == "world":
            yield f"scenes of the bundled world at {world.size} pixels ({len(world.noun_names)} nouns)"
        elif spec.name == "edits":
            yield "instructions to change scenes, with what they ask for"
        elif spec.name == "dialogues":
            yield "conversations about such scenes"
        elif spec.name == "glosses":
            yield "WordNet definitions"
        else:
            data = sources.sets[spec.name]
            yield f"the data set {data.name} ({len(data)} documents of {data.manifest.source})"


def train_recipe(recipe: Recipe, folder: Path | str | None = None) -> Trained:
    """Train a recipe in a run folder, or resume the run there: `transfuse.train`. Raises UserError as `train`.

    folder: by default one under runs/ with the name of the recipe's preset, as on the command line.
    """
    if not isinstance(recipe, Recipe):
        raise UserError(
            f"recipe: expected a transfuse.Recipe, as transfuse.preset(NAME) returns, found {shown(recipe)}"
        )
    if not isinstance(folder, str | Path | None):
        raise UserError(f"folder: expected a path, found {shown(folder)}")
    return train(recipe, Path("runs", recipe.preset or "run") if folder is None else Path(folder))


class _CallableModule(ModuleType):
    """A module that is called as `train_recipe`: the package has the module and the function under one name."""

    __call__ = staticmethod(train_recipe)
    __signature__ = inspect.signature(train_recipe)


__doc__ = f"{train_recipe.__doc__}\n{__doc__}"  # of `help(transfuse.train)`
sys.modules[__name__].__class__ = _CallableModule
