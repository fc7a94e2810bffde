"""Hugging Face folders of language models (`architectures`): start a model from one, or write one to share.

    config.json                                              the shape
    model.safetensors, or model.safetensors.index.json       the weights, whole or in shards
    tokenizer.json                                           the tokenizer, to which BOI and EOI are added

fields = read_hf_config(folder)                           # fields of ModelConfig
tokenizer = Tokenizer.of_model(folder)
start_from_hf(model, folder, new_ids=new_markers(folder, tokenizer))
save_hf_folder(other, model, tokenizer)

safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import read_json
from ..errors import UserError
from ..folders import atomic_dir
from ..model import ModelConfig, Transfusion
from ..sequence import Tokenizer
from ..sequence.tokenizer import SPECIAL, TOKENIZER_CONFIG
from .architectures import EMBEDDING, HEAD, NUMBERS, hf_config, hf_weights, read_fields, ties_embeddings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # safetensors' names of floating-point types
NAMED = 8  # names that a message lists at most
LAYER = re.compile(r"^model\.layers\.\d+\.")
DROPPABLE = {
    "sliding_window": "sliding_window",
    "full_attention_layers": "sliding_window",
    "tie_embeddings": "tie_word_embeddings",
}
"""fields of ours that may be as if the folder did not have theirs"""
FEWEST_TOKENS = 0.75  # share of the embedding's rows that have a token: padding takes a few percent at most


def read_hf_config(folder: Path, max_seq_len: int | None = None, allow: Collection[str] = ()) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that describe a folder's transformer, the inverse of `hf_config`.

    max_seq_len   replaces the folder's own length, if given
    allow         fields of config.json that may be dropped where a Transfusion cannot have them

    Embeddings that config.json ties, but the files hold as two different matrices, are not tied, as in transformers.

    Raises UserError for a model that ours cannot be, and for an adapter without "adapter" in `allow`.
    """
    if (folder / ADAPTER).is_file() and "adapter" not in allow:
        wanted, hint = "a whole model", "--init.allow-changes adapter starts from the base alone"
        raise UserError(f"{folder / ADAPTER}: expected {wanted}, found an adapter: merge it into its base ({hint})")
    values = _read_config(folder)

    def check(fits: bool, name: str, expected: str, value: Any) -> bool:
        required = name in ("model_type", *NUMBERS.values())  # without these there is no network
        if not fits and (required or name not in allow):
            hint = "" if required else f" (--init.allow-changes {name} drops it)"
            raise UserError(f"{folder / 'config.json'}: {name}: expected {expected}, found {value}{hint}")
        return fits

    try:
        fields = read_fields(values, max_seq_len, check)
        for name in [name for name, their_name in DROPPABLE.items() if their_name in allow]:
            fields.pop(name, None)
        if fields.get("tie_embeddings") and _has_another_head(folder):
            del fields["tie_embeddings"]
        ModelConfig(images="none", **fields)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return fields


def check_vocabulary(folder: Path, rows: int, allow: Collection[str] = ()) -> None:
    """Raise UserError for a tokenizer of another model: more tokens than the embedding has rows, or far fewer."""
    tokens = Tokenizer.adopt(folder).vocab_size - len(SPECIAL)
    if tokens > rows or (tokens < rows * FEWEST_TOKENS and "vocabulary" not in allow):
        hint = "" if tokens > rows else " (--init.allow-changes vocabulary takes it)"
        wanted = f"the tokens of a vocabulary of {rows}, as config.json says"
        raise UserError(f"{folder / 'tokenizer.json'}: expected {wanted}, found {tokens}{hint}")


@dataclass(frozen=True)
class Match:
    """The weights of a folder against a model's, by Hugging Face's names. `str` gives one line each.

    matched      weights copied into the model
    missing      weights of the transformer that the folder lacks; they keep their values
    unexpected   weights of the folder that the transformer does not have
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"matched {len(self.matched)}"]
        for kind in ("missing", "unexpected"):
            names = getattr(self, kind)
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"{kind} {len(names)}" + (f": {', '.join(names[:NAMED])}{more}" if names else ""))
        return "\n".join(lines)


def match_weights(
    model: Transfusion, folder: Path, allow: Collection[str] = ()
) -> tuple[list[Any], dict[str, Tensor], Match]:
    """Return a folder's open files, a network's weights under the folder's names, and the two against each other.

    The network may be on the meta device.
    allow: kinds of weights, such as self_attn.o_proj.bias, that may be missing or left over; fields of `ModelConfig`
    that may differ; and those of `read_hf_config`.

    Raises UserError for files that are missing, damaged or pickled, for weights that do not fit, and for a network
    that differs from the folder's in what shapes do not show, such as the heads.
    """
    config = model.config
    expected = ModelConfig(images="none", **read_hf_config(folder, config.max_seq_len, allow))
    names = ["n_heads", "kv_heads", "head_dim", "norm_order"]
    free = ["rope_theta", "rope_scaling", "nope_layers", "norm_eps", "qkv_bias", "sliding_window"]
    free += ["full_attention_layers"]
    # A norm that the folder does not have begins as it was made: one may add it.
    free += ["qk_norm", "qk_norm_type"] if expected.qk_norm else []
    for name in [*names, *(name for name in free if name not in allow)]:
        wanted, value = getattr(expected, name), getattr(config, name)
        if value != wanted:
            field = {"kv_heads": "n_kv_heads", "head_dim": "d_head"}.get(name, name)
            raise UserError(f"{folder}: model.{field}: expected {wanted}, found {value}")
    values = _read_config(folder)
    own = hf_weights(model, str(values["model_type"]))
    files = _open_weights(folder)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for file in files for name in file.keys()}  # noqa: SIM118
    tied = ties_embeddings(values) and EMBEDDING in shapes
    # A head that equals the embedding is not left over.
    left = shapes.keys() - own.keys() - ({HEAD} if config.tie_embeddings and expected.tie_embeddings else set())
    match = Match(
        tuple(sorted(own.keys() & shapes.keys())),
        tuple(sorted(own.keys() - shapes.keys() - ({HEAD} if tied else set()))),
        tuple(sorted(name for name in left if not name.endswith(".rotary_emb.inv_freq"))),  # a buffer, in old files
    )
    kinds = sorted({LAYER.sub("", name) for name in (*match.missing, *match.unexpected)} - set(allow))
    if kinds:
        lines = "; ".join(str(match).splitlines()[1:])
        hint = f"(--init.allow-changes {' '.join(kinds)} does without)"
        raise UserError(f"{folder}: expected the weights of its architecture and no others, found {lines} {hint}")
    dtypes = {name: file.get_slice(name).get_dtype() for file in files for name in file.keys()}  # noqa: SIM118
    for name in match.matched:
        if dtypes[name] not in FLOATS:
            raise UserError(f"{folder}: tensor {name}: expected floating-point numbers, found {dtypes[name]}")
        shape, wanted = shapes[name], str(tuple(own[name].shape))
        fits = str(shape) == wanted
        if name in (EMBEDDING, HEAD):  # image codes follow the text ids in the table
            wanted = f"at most {config.text_vocab_size} rows of {config.d_model}"
            fits = len(shape) == 2 and shape[0] <= config.text_vocab_size and shape[1] == config.d_model
            if fits and shape[0] < values["vocab_size"]:
                fits, wanted = False, f"{values['vocab_size']} rows, as config.json's vocab_size says"
        if not fits:
            raise UserError(f"{folder}: tensor {name}: expected {wanted}, found {shape}")
    return files, own, match


def start_from_hf(
    model: Transfusion, folder: Path, allow: Collection[str] = (), new_ids: Collection[int] = ()
) -> Match:
    """Copy a folder's weights into a model, in the model's dtype. The image adapter and q/k norms keep their values.

    A tied output layer starts as a copy of the embedding where the model's are not tied.
    allow: what may be dropped or missing, as in `match_weights`; missing weights keep their values.
    new_ids: ids that the folder's model has not learned (`new_markers`); their rows become the mean of the others.

    Raises UserError before the first weight is written.
    """
    config = model.config
    files, own, match = match_weights(model, folder, allow)
    if any(not 0 <= row < config.text_vocab_size for row in new_ids):
        raise UserError(f"{folder}: new_ids: expected ids below {config.text_vocab_size}, found {sorted(new_ids)}")
    copied = HEAD in own and HEAD not in (*match.matched, *match.missing)
    for file in files:
        for name in sorted(own.keys() & set(file.keys())):
            tensor = file.get_tensor(name)
            for target in (EMBEDDING, HEAD) if copied and name == EMBEDDING else (name,):
                own[target][: len(tensor)] = tensor
    if new_ids:
        for name in (EMBEDDING, HEAD):
            if name in own and name not in match.missing:
                known = own[name][: min(new_ids)]  # later rows pad the table: nothing has learned them
                own[name][list(new_ids)] = known.mean(0, dtype=torch.float32).to(known.dtype)
    return match


def save_hf_folder(folder: Path, model: Transfusion, tokenizer: Tokenizer | None = None) -> Path:
    """Write embedding, transformer and output layer as transformers' model of that family, with its tokenizer.

    The image adapter is left out: `generate` stops at BOI, where an image would begin. The folder appears whole or not
    at all.

    Raises UserError for a transformer of no known family, or a folder that cannot be written.
    """
    try:
        values = {
            **hf_config(model.config),
            "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
            # Written even if None: without them transformers assumes 1 and 2.
            "bos_token_id": None if tokenizer is None else tokenizer.bos,
            "eos_token_id": None if tokenizer is None else tokenizer.eos,
        }
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    with atomic_dir(folder, "Llama") as partial:
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        tensors = {name: weight.contiguous().cpu() for name, weight in hf_weights(model, values["model_type"]).items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer.json")
            ends = [*tokenizer.ends, tokenizer.boi]  # after which transformers' `generate` stops
            special = {"bos_token_id": tokenizer.bos, "eos_token_id": ends, "pad_token_id": tokenizer.eos}
            files = {TOKENIZER_CONFIG: tokenizer.text_format.config(), "generation_config.json": special}
            for name, content in files.items():
                (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def new_markers(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of markers that the folder's tokenizer.json does not have: BOI and EOI, or all four."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [tokenizer.backend.token_to_id(name) for name in SPECIAL if backend.token_to_id(name) is None]
    return [number for number in ids if number is not None]


def _read_config(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: expected the fields of a model, found a {type(values).__name__}")
    return values


def _has_another_head(folder: Path) -> bool:
    """Return True if the folder's weights have an output layer that differs from the embedding."""
    if not any((folder / name).is_file() for name in (WEIGHTS, INDEX)):
        return False
    place = {name: file for file in _open_weights(folder) for name in file.keys()}  # noqa: SIM118
    if HEAD not in place or EMBEDDING not in place:
        return False
    return not torch.equal(place[HEAD].get_tensor(HEAD), place[EMBEDDING].get_tensor(EMBEDDING))


def _open_weights(folder: Path) -> list[Any]:
    """Return the open safetensors files of a folder. Raises UserError for a file that is missing or damaged."""
    paths = [folder / WEIGHTS]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            instead = "only a pickled .bin" if any(folder.glob("*.bin")) else "no file"
            raise UserError(f"{folder / WEIGHTS}: expected safetensors weights, found {instead}")
        index = read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            wrong = "another thing" if isinstance(names, dict) else "none"
            raise UserError(f"{folder / INDEX}: weight_map: expected the file of every tensor, found {wrong}")
        paths = [folder / name for name in sorted(set(names.values()))]
    files = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: expected the shard that {INDEX} names, found no file")
        try:
            files.append(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None
    return files
