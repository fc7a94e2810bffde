"""The settings of a recipe that its `start` determines, the tokenizer, and the initial weights."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import to_dict
from ..convert.hf_folder import check_vocabulary, match_weights, new_markers, read_hf_config, start_from_hf
from ..diffusion import SamplerConfig
from ..errors import UserError
from ..export import Described, describe, load_weights
from ..folders import bundled_name, is_export, places
from ..io import sha256
from ..log import logger
from ..model import ModelConfig, Transfusion
from ..recipes.recipe import Recipe
from ..sequence import Tokenizer
from ..training import DistilConfig


def resolve_init(recipe: Recipe, begun: Recipe | None = None) -> Recipe:
    """Return the recipe with the settings that `start` determines, or determined when a run had `begun`; log changes.

    An export determines the network, diffusion process, autoencoder and generation settings; with the change
    "network" allowed, the vocabulary alone; with "max_seq_len", all but a longer sequence. A language model determines
    the shape of the transformer.

    Raises UserError for a folder that is neither, or does not fit.
    """
    folder = Path(recipe.start)
    if not is_export(folder):
        return _with_hf_shape(recipe, folder, begun)
    if bundled_name(folder) is None:
        folder = folder.resolve()  # the run may be resumed or exported from another directory
    parts = decided_by(describe(folder), recipe)
    changed = [
        f"{part}.{field} {value}"
        for part, values in parts.items()
        for field, value in to_dict(values).items()
        if to_dict(getattr(recipe, part))[field] != value
    ]
    if changed:
        logger.info(f"{', '.join(changed)}, to start from {folder}")
    return replace(recipe, start=str(folder), **parts)


def decided_by(export: Described, recipe: Recipe) -> dict[str, Any]:
    """Return the parts of a recipe, by name, as an export in its `start` determines them."""
    if "network" in recipe.init.allow_changes:
        return {"model": replace(recipe.model, text_vocab_size=export.model.text_vocab_size)}
    model = _with_experts(export.model, recipe.model)
    if "max_seq_len" in recipe.init.allow_changes:
        model = replace(model, max_seq_len=max(model.max_seq_len, recipe.model.max_seq_len))
    name = "pixels" if export.autoencoder.name == "pixels" else str(export.place["autoencoder"])
    return {
        "model": model,
        "diffusion": export.diffusion,
        "generation": export.generation,
        "data": replace(recipe.data, autoencoder=name),
    }


def warn_of_image_weights(recipe: Recipe, fingerprint: str) -> None:
    """Log what the image layers of an export learned otherwise, where a recipe's own network takes those that fit.

    fingerprint: that of the recipe's autoencoder
    """
    if not recipe.start or "network" not in recipe.init.allow_changes or not is_export(Path(recipe.start)):
        return
    export = describe(recipe.start)
    if recipe.model.images == "none" or recipe.model.images != export.model.images:
        return
    if fingerprint != export.autoencoder.fingerprint:
        logger.info(
            f"warning: data.autoencoder: expected {export.autoencoder.name}, whose images the layers of {recipe.start} "
            f"learned, found {recipe.data.autoencoder}"
        )
    before, now = to_dict(export.diffusion), to_dict(recipe.diffusion)
    learned, given = (
        ", ".join(f"{name} {values[name]}" for name in now if now[name] != before[name]) for values in (before, now)
    )
    if given and recipe.model.images == "latents":
        logger.info(
            f"warning: diffusion: expected {learned}, by which the image layers of {recipe.start} learned, "
            f"found {given}"
        )


def _with_hf_shape(recipe: Recipe, folder: Path, begun: Recipe | None) -> Recipe:
    """Return the recipe with the shape of a language model's transformer."""
    allow = recipe.init.allow_changes
    fields: dict[str, Any] = read_hf_config(folder, recipe.model.max_seq_len, allow)
    check_vocabulary(folder, fields["text_vocab_size"], allow)
    fields["text_vocab_size"] = max(fields["text_vocab_size"], init_tokenizer(folder).vocab_size)
    resumed = begun is not None and begun.start == recipe.start
    if begun is not None and resumed:  # an earlier version may have taken less from the folder
        fields = {name: getattr(begun.model, name) for name in fields}
    changed = {name: value for name, value in fields.items() if getattr(recipe.model, name) != value}
    model = replace(recipe.model, **changed)
    if not resumed:
        match_weights(Transfusion.on_meta(model), folder, allow)
    if changed:
        logger.info(f"model: {', '.join(f'{name} {value}' for name, value in changed.items())}, to start from {folder}")
    return replace(recipe, model=model)


def check_finetuning(recipe: Recipe) -> None:
    """Raise UserError for `freeze`, `lora` and `init.image_tower` that do not fit together."""
    rank, freeze, model, tower = recipe.lora.rank, recipe.freeze, recipe.model, recipe.init.image_tower
    frozen, wider = freeze != "none", model.image_d_ff not in (None, model.ffn_dim)
    partly, lacks_tower, by = frozen or rank > 0, False, recipe.optimizer.name
    if wider and tower != "new" and recipe.start and model.experts != "shared":
        folder = Path(recipe.start)
        lacks_tower = not is_export(folder) or describe(folder).model.experts == "shared"
    for fits, name, expected, value in (
        (not rank or recipe.start, "lora.rank", "0 without start", rank),
        (not frozen or recipe.start, "freeze", "none without start", freeze),
        (not frozen or not rank, "lora.rank", "0 with freeze text, which keeps its text as it is", rank),
        (not frozen or model.images == "latents", "freeze", f'none with model.images "{model.images}"', freeze),
        (not frozen or model.experts != "shared", "freeze", "none with model.experts shared", freeze),
        (not rank or tower == "copy", "init.image_tower", "copy with lora", tower),
        (not lacks_tower, "init.image_tower", "new with image_d_ff", tower),
        (not rank or by == "adamw", "optimizer.name", "adamw with lora, which trains no whole matrix", by),
        (not partly or not recipe.parallel.float8, "parallel.float8", "False with freeze or lora", True),
        (not partly or recipe.parallel.tensor == 1, "parallel.tensor", "1 with freeze or lora", recipe.parallel.tensor),
    ):
        if not fits:
            raise UserError(f"{name}: expected {expected}, found {value}")


def init_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of `start`, with the markers of images."""
    return Tokenizer.load(places(folder)["tokenizer.json"]) if is_export(folder) else Tokenizer.of_model(folder)


def init_from(
    model: Transfusion, folder: Path, tokenizer: Tokenizer, allow: Collection[str] = (), copy_tower: bool = True
) -> str:
    """Load a folder's weights into a model on the CPU and return how many fit, in words.

    allow: changes, by name (`InitConfig`)
    copy_tower: an image tower that the folder does not have becomes a copy of its text tower

    Raises UserError if the weights do not fit.
    """
    strict, new_tower = "network" not in allow, model.config.experts != "shared"
    if not is_export(folder):
        words = str(start_from_hf(model, folder, allow, new_markers(folder, tokenizer)))
    else:
        export = describe(folder)
        path, new_tower = export.place["model.safetensors"], new_tower and export.model.experts == "shared"
        # No weight depends on the length of a sequence.
        expected = replace(_with_experts(export.model, model.config), max_seq_len=model.config.max_seq_len)
        tied = expected.tie_embeddings and model.config.tie_embeddings  # `resolve_data` unties
        if strict and replace(expected, tie_embeddings=tied) != model.config:
            raise UserError(f"{folder}: expected the network that the run began with, found another")
        if strict and export.model != model.config:  # all of its weights must fit; a new tower is not among them
            source = Transfusion.on_meta(export.model)
            loaded, weights = load_weights(source, path), source.state_dict()
            model.load_state_dict({"lm_head.weight": weights["embedding.weight"], **weights}, strict=False)
        else:
            loaded = load_weights(model, path, strict)
        total = len(list(model.parameters()))
        if loaded == 0:
            raise UserError(f"{folder}: expected weights that fit this network, found none of {total}")
        words = f"{'all' if loaded == total else f'{loaded} of'} {total} weights, and none of the optimiser's"
    if new_tower and copy_tower:
        model.transformer.copy_text_tower()
    if new_tower:
        words += f"\nimage tower: {'a copy of the text tower' if copy_tower else 'new'}"
    return words


def _with_experts(model: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """Return an export's network with the image tower that is asked for, if it has none."""
    if model.experts != "shared":
        return model
    return replace(model, experts=wanted.experts, image_d_ff=wanted.image_d_ff)


def with_distillation(recipe: Recipe, begun: Recipe | None = None) -> Recipe:
    """Return the recipe with its teacher's way of drawing, and its student's: DDIM in `distil.steps`, not guided.

    Images before all text are shown clean, for a noised one would be part of the way of no drawing. Raises UserError
    for a teacher that cannot be distilled, or another than the run began with.
    """
    distil, pairs = recipe.distil, recipe.data.pairs
    if not distil.steps:
        return recipe
    if not recipe.start or not is_export(Path(recipe.start)) or recipe.init.allow_changes:
        raise UserError(f"distil.steps: expected 0 without a teacher, an export in start, found {distil.steps}")
    teacher = describe(recipe.start)
    if teacher.model.images != "latents" or teacher.diffusion.prediction == "epsilon":
        predicted = teacher.diffusion.prediction if teacher.model.images == "latents" else teacher.model.images
        raise UserError(
            f"{recipe.start}: expected a model that predicts x0 or v, which few steps can draw with, found {predicted}"
        )
    own, levels = teacher.generation, teacher.diffusion.timesteps
    teacher_steps = distil.teacher_steps or -(-own.sampler.steps // distil.steps) * distil.steps
    if teacher_steps % distil.steps or teacher_steps > levels:
        raise UserError(
            f"distil.teacher_steps: expected a multiple of the student's {distil.steps}, at most {levels}, "
            f"found {teacher_steps}"
        )
    weights = sha256(teacher.place["model.safetensors"])[:16]
    if begun is not None and begun.distil.steps and not begun.distil.teacher_weights:
        weights = ""  # the run began before recipes named them
    elif distil.teacher_weights not in ("", weights):
        raise UserError(
            f"distil.teacher_weights: expected {recipe.start} with the weights {distil.teacher_weights}, as the run "
            f"began, found {weights}"
        )
    scale, interval = distil.guidance_scale, distil.guidance_interval
    if scale is None:
        scale, interval = own.guidance_scale, interval or own.guidance_interval
    sampler = SamplerConfig("ddim", distil.steps)
    return replace(
        recipe,
        distil=DistilConfig(distil.steps, teacher_steps, scale, interval, weights),
        generation=replace(own, sampler=sampler, guidance_scale=1.0, guidance_interval=None),
        data=replace(recipe.data, pairs=replace(pairs, image_first_max_timestep=0)),
    )


def with_model(recipe: Recipe, name: str, value: int, reason: str) -> Recipe:
    """Return the recipe with one setting of the model changed, and log the change."""
    if getattr(recipe.model, name) == value:
        return recipe
    logger.info(f"model.{name}: {value}, {reason}")
    return replace(recipe, model=replace(recipe.model, **{name: value}))  # type: ignore[arg-type]
