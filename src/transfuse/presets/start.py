"""What a run starts from (`start`): an export of ours, taken whole, or the trunk of a Llama-shaped Hugging Face folder.

shaped = started(recipe)                     # the recipe with the shape that the folder has
tokenizer = its_tokenizer(folder)
print(begin(model, folder, tokenizer, recipe.start_strict))
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import to_dict
from ..convert.llama_folder import check_transformer, marker_rows, read_llama_config, start_from_llama
from ..errors import UserError
from ..export import describe, load_weights
from ..folders import bundled_name, is_export, places
from ..log import logger
from ..model import Transfusion
from ..sequence import Tokenizer

if TYPE_CHECKING:
    from .recipe import Recipe


def started(recipe: Recipe) -> Recipe:
    """The recipe with what its start settles; what changes thereby is said.

    An export brings its network, its diffusion process, its autoencoder and its settings for generation, or, where
    `start_strict` is false, its vocabulary alone; a Llama the shape of the trunk. Raises UserError for a folder that is
    neither, or does not fit.
    """
    folder = Path(recipe.start)
    if not is_export(folder):
        return _with_trunk(recipe, folder)
    if bundled_name(folder) is None:
        folder = folder.resolve()  # the run may be gone on with, or exported, from elsewhere
    found = describe(folder)
    if not recipe.start_strict:
        return replace(
            recipe, start=str(folder), model=replace(recipe.model, text_vocab_size=found.model.text_vocab_size)
        )
    name = "pixels" if found.autoencoder.name == "pixels" else str(found.place["autoencoder"])
    parts = {
        "model": found.model,
        "diffusion": found.diffusion,
        "generation": found.generation,
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


def _with_trunk(recipe: Recipe, folder: Path) -> Recipe:
    fields: dict[str, Any] = read_llama_config(folder, recipe.model.max_seq_len)
    ids = its_tokenizer(folder).vocab_size
    fields["text_vocab_size"] = max(fields["text_vocab_size"], ids)
    changed = {name: value for name, value in fields.items() if getattr(recipe.model, name) != value}
    model = replace(recipe.model, **changed)
    check_transformer(model, folder, recipe.start_strict)
    if changed:
        logger.info(f"model: {', '.join(f'{name} {value}' for name, value in changed.items())}, to start from {folder}")
    return replace(recipe, model=model)


def its_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of what a run starts from, with our markers."""
    return Tokenizer.load(places(folder)["tokenizer.json"]) if is_export(folder) else Tokenizer.adopt(folder)


def begin(model: Transfusion, folder: Path, tokenizer: Tokenizer, strict: bool) -> str:
    """Put a folder's weights into a model on the CPU; how many fitted, in words. Raises UserError where they do not."""
    if not is_export(folder):
        return str(start_from_llama(model, folder, strict, marker_rows(folder, tokenizer)))
    found = describe(folder)
    if strict and found.model != model.config:
        raise UserError(f"{folder}: expected the network that the run began with, found another")
    taken = load_weights(model, found.place["model.safetensors"], strict)
    every = len(list(model.parameters()))
    if taken == 0:
        raise UserError(f"{folder}: expected weights that fit this network, found none of {every}")
    return f"{'all' if taken == every else f'{taken} of'} {every} weights, and none of the optimiser's"
