"""Models of others: start from a Llama-shaped Hugging Face folder, and write one that transformers opens.

    config.json                                              the shape
    model.safetensors, or model.safetensors.index.json       the weights, whole or in shards
    tokenizer.json                                           the tokenizer, to which our markers are added

fields = read_llama_config(folder)                           # of ModelConfig
tokenizer = Tokenizer.adopt(folder / "tokenizer.json")
start_from_llama(model, folder, markers=marker_rows(folder, tokenizer))
save_llama(other, model, tokenizer.bos, tokenizer.eos, tokenizer)

safetensors only: nothing is unpickled. What both sides must agree on is named in `model.llama`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration import read_json
from .errors import UserError
from .io import atomic_dir
from .model import ModelConfig, Transfusion
from .model.llama import EMBEDDING, HEAD, llama_config, llama_weights, trunk_fields
from .sequence import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BUFFERS = ".rotary_emb.inv_freq"
"""end of names that old files hold and no one needs"""


@dataclass(frozen=True)
class Match:
    """What a folder gave, in Hugging Face's names. Printed, it is a line each."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """weights of the trunk that the folder lacks; they keep their values"""
    unexpected: tuple[str, ...]
    """weights of the folder that the trunk has no place for"""

    def __str__(self) -> str:
        lines = [f"matched {len(self.matched)}"]
        for kind in ("missing", "unexpected"):
            names = getattr(self, kind)
            lines.append(f"{kind} {len(names)}" + (f": {_first(names)}" if names else ""))
        return "\n".join(lines)


def read_llama_config(folder: Path, context: int | None = None) -> dict[str, Any]:
    """The fields of `ModelConfig` that describe a folder's trunk. context: positions asked for; theirs if not given.

    Raises UserError, one line, for what our trunk can not be.
    """
    try:
        return trunk_fields(_config(folder), context)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def start_from_llama(
    model: Transfusion, folder: Path, strict: bool = True, markers: Mapping[int, int] | None = None
) -> Match:
    """Put a folder's weights into a model, in the model's dtype. Patch layers and norms of queries and keys stay.

    strict: a folder that lacks a weight of the trunk, or has one more, or other constants, is refused; if not, what
    fits is taken. A tied head starts as a copy of the embedding, and is a matrix of its own from then on. Rows of our
    vocabulary behind theirs keep their values, but for `markers`, row of ours: row of theirs that it starts as.
    Raises UserError, one line, before the first weight is written.
    """
    config = model.config
    check_trunk(config, folder, strict)
    own, files = llama_weights(model), _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    tied = bool(_config(folder).get("tie_word_embeddings")) and EMBEDDING in shapes and HEAD not in shapes
    match = Match(
        tuple(sorted(own.keys() & shapes.keys())),
        tuple(sorted(own.keys() - shapes.keys() - ({HEAD} if tied else set()))),
        tuple(sorted(name for name in shapes.keys() - own.keys() if not name.endswith(BUFFERS))),
    )
    if strict and (match.missing or match.unexpected):
        found = "; ".join(str(match).splitlines()[1:])
        raise UserError(f"{folder}: expected the weights of a Llama and no others, found {found}")
    for name in match.matched:
        _check_shape(folder, name, shapes[name], config, own[name])
    tables = [name for name in (EMBEDDING, HEAD) if name in shapes]
    rows = min((shapes[name][0] for name in tables), default=0)
    for ours, theirs in (markers or {}).items():
        if not (0 <= ours < config.text_vocab_size and 0 <= theirs < rows):
            limits = f"rows of ours below {config.text_vocab_size}, of theirs below {rows}"
            raise UserError(f"{folder}: markers: expected {limits}, found {ours} from {theirs}")
    for path in files:
        with _opened(path) as file:
            for name in sorted(own.keys() & file.keys()):
                tensor = file.get_tensor(name)
                for target in (EMBEDDING, HEAD) if tied and name == EMBEDDING else (name,):
                    own[target][: len(tensor)] = tensor
    for name in (EMBEDDING, HEAD) if tied else tables:
        if markers:
            own[name][list(markers)] = own[name][list(markers.values())]
    return match


def save_llama(
    folder: Path,
    model: Transfusion,
    bos: int | None = None,
    eos: int | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write embedding, trunk and head as a `LlamaForCausalLM`; the folder appears whole or not at all. bos, eos: ids.

    Patch layers stay behind. Raises UserError where Llama can not be the trunk, or the folder not be written.
    """
    try:
        values = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **llama_config(model.config),
            "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
            # Said even where there is none: left out, they would be 1 and 2.
            "bos_token_id": bos,
            "eos_token_id": eos,
        }
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    with atomic_dir(folder, "Llama") as partial:
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        tensors = {name: weight.contiguous().cpu() for name, weight in llama_weights(model).items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(partial / "tokenizer.json")
    return folder


def marker_rows(folder: Path, tokenizer: Tokenizer) -> dict[int, int]:
    """Row of ours: row of theirs, for the markers that both have: where a sequence begins, and where it ends."""
    values, rows = _config(folder), {}
    for ours, field in ((tokenizer.bos, "bos_token_id"), (tokenizer.eos, "eos_token_id")):
        theirs = values.get(field)
        theirs = theirs[0] if isinstance(theirs, list) and theirs else theirs
        if isinstance(theirs, int):
            rows[ours] = theirs
    return rows


def _config(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: expected the fields of a model, found a {type(values).__name__}")
    return values


def check_trunk(config: ModelConfig, folder: Path, strict: bool) -> None:
    """Raise UserError where a trunk is not the folder's in what no shape tells: 8 heads of 64 are as 16 of 32."""
    theirs = read_llama_config(folder, config.max_seq_len)
    ours: dict[str, float] = {"n_heads": config.n_heads, "n_kv_heads": config.kv_heads}
    if strict:
        ours |= {"rope_theta": config.rope_theta, "norm_eps": config.norm_eps}
    for field, value in ours.items():
        if value != theirs[field]:
            raise UserError(f"{folder}: model.{field}: expected {theirs[field]}, found {value}")
    if config.norm_order != "pre":
        raise UserError(f"{folder}: model.norm_order: expected pre, found {config.norm_order}")


def _check_shape(folder: Path, name: str, found: tuple[int, ...], config: ModelConfig, own: Tensor) -> None:
    expected = str(tuple(own.shape))
    fits = found == tuple(own.shape)
    if name in (EMBEDDING, HEAD):  # codes of an image follow our text: their rows are not for words
        expected = f"at most {config.text_vocab_size} rows of {config.d_model}"
        fits = len(found) == 2 and found[0] <= config.text_vocab_size and found[1] == config.d_model
    if not fits:
        raise UserError(f"{folder}: tensor {name}: expected {expected}, found {found}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        found = "only a pickled .bin" if any(folder.glob("*.bin")) else "no file"
        raise UserError(f"{folder / WEIGHTS}: expected safetensors weights, found {found}")
    index = read_json(folder / INDEX)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise UserError(f"{folder / INDEX}: weight_map: expected the file of every tensor, found none")
    return [folder / name for name in sorted(set(names.values()))]


def _opened(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: expected the shard that {INDEX} names, found no file")
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None


def _first(names: Sequence[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
