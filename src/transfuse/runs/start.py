"""Initial weights of a run (`start`): a Transfuse export, taken whole, or the transformer of a Llama folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import to_dict
from ..convert.hf_llama import check_transformer, marker_rows, read_llama_config, start_from_llama
from ..errors import UserError
from ..export import describe, load_weights
from ..folders import bundled_name, is_export, places
from ..log import logger
from ..model import Transfusion
from ..recipes.recipe import Recipe
from ..sequence import Tokenizer


def resolve_init(recipe: Recipe) -> Recipe:
    """Return the recipe with the settings that `start` determines, and log the changes.

    An export determines the network, diffusion process, autoencoder and generation settings; with `start_strict` off,
    the vocabulary alone. A Llama determines the shape of the transformer.

    Raises UserError for a folder that is neither, or does not fit.
    """
    folder = Path(recipe.start)
    if not is_export(folder):
        return _with_llama_shape(recipe, folder)
    if bundled_name(folder) is None:
        folder = folder.resolve()  # the run may be resumed or exported from another directory
    export = describe(folder)
    if not recipe.start_strict:
        return replace(
            recipe, start=str(folder), model=replace(recipe.model, text_vocab_size=export.model.text_vocab_size)
        )
    name = "pixels" if export.autoencoder.name == "pixels" else str(export.place["autoencoder"])
    parts = {
        "model": export.model,
        "diffusion": export.diffusion,
        "generation": export.generation,
        "data": replace(recipe.data, autoencoder=name),
    }
    changed = [
        f"{part}.{field} {value}"
        for part, values in parts.items()
        for field, value in to_dict(values).items()
        if to_dict(getattr(recipe, part))[field] != value
    ]
    if changed:
        logger.info(f"{', '.join(changed)}, to start from {folder}")
    return replace(recipe, start=str(folder), **parts)  # type: ignore[arg-type]


def _with_llama_shape(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with the shape of a Llama folder's transformer."""
    fields: dict[str, Any] = read_llama_config(folder, recipe.model.max_seq_len)
    ids = init_tokenizer(folder).vocab_size
    fields["text_vocab_size"] = max(fields["text_vocab_size"], ids)
    changed = {name: value for name, value in fields.items() if getattr(recipe.model, name) != value}
    model = replace(recipe.model, **changed)
    check_transformer(model, folder, recipe.start_strict)
    if changed:
        logger.info(f"model: {', '.join(f'{name} {value}' for name, value in changed.items())}, to start from {folder}")
    return replace(recipe, model=model)


def init_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of `start`, with the markers of images."""
    return Tokenizer.load(places(folder)["tokenizer.json"]) if is_export(folder) else Tokenizer.adopt(folder)


def init_from(model: Transfusion, folder: Path, tokenizer: Tokenizer, strict: bool) -> str:
    """Load a folder's weights into a model on the CPU and return how many fit, in words.

    Raises UserError if they do not fit.
    """
    if not is_export(folder):
        return str(start_from_llama(model, folder, strict, marker_rows(folder, tokenizer)))
    export = describe(folder)
    if strict and export.model != model.config:
        raise UserError(f"{folder}: expected the network that the run began with, found another")
    loaded = load_weights(model, export.place["model.safetensors"], strict)
    total = len(list(model.parameters()))
    if loaded == 0:
        raise UserError(f"{folder}: expected weights that fit this network, found none of {total}")
    return f"{'all' if loaded == total else f'{loaded} of'} {total} weights, and none of the optimiser's"
