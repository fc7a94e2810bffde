"""Start from a Llama-shaped Hugging Face folder, and write one that transformers opens.

    config.json                                              the shape
    model.safetensors, or model.safetensors.index.json       the weights, whole or in shards
    tokenizer.json                                           the tokenizer, to which our markers are added

fields = read_llama_config(folder)                           # fields of ModelConfig
tokenizer = Tokenizer.adopt(folder / "tokenizer.json")
start_from_llama(model, folder, markers=marker_rows(folder, tokenizer))
save_llama(other, model, tokenizer.bos, tokenizer.eos, tokenizer)

safetensors only: nothing is unpickled. `hf_llama` maps names and fields.
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

from ..config import read_json
from ..errors import UserError
from ..io import atomic_dir
from ..model import ModelConfig, Transfusion
from ..sequence import Tokenizer
from .hf_llama import EMBEDDING, HEAD, llama_config, llama_weights, transformer_fields

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BUFFERS = ".rotary_emb.inv_freq"  # suffix of tensors in old files that are not weights


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
            lines.append(f"{kind} {len(names)}" + (f": {_first(names)}" if names else ""))
        return "\n".join(lines)


def read_llama_config(folder: Path, max_seq_len: int | None = None) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that describe a folder's transformer.

    `max_seq_len` replaces the folder's own length, if given. Raises UserError for a model that ours cannot be.
    """
    try:
        return transformer_fields(_config(folder), max_seq_len)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None


def start_from_llama(
    model: Transfusion, folder: Path, strict: bool = True, markers: Mapping[int, int] | None = None
) -> Match:
    """Copy a folder's weights into a model, in the model's dtype. The image adapter and q/k norms keep their values.

    strict: refuse a folder that lacks a weight of the transformer, has one more, or has other constants; otherwise copy
    what fits. A tied output layer starts as a copy of the embedding and is untied from then on. Rows of the vocabulary
    after the folder's keep their values, except `markers` (our row: the row of theirs it is copied from).

    Raises UserError before the first weight is written.
    """
    config = model.config
    check_transformer(config, folder, strict)
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
        raise UserError(
            f"{folder}: expected the weights of a Llama and no others, found {'; '.join(str(match).splitlines()[1:])}"
        )
    for name in match.matched:
        _check_shape(folder, name, shapes[name], config, own[name])
    tables = [name for name in (EMBEDDING, HEAD) if name in shapes]
    rows = min((shapes[name][0] for name in tables), default=0)
    for row, source in (markers or {}).items():
        if not (0 <= row < config.text_vocab_size and 0 <= source < rows):
            limits = f"rows of ours below {config.text_vocab_size}, of theirs below {rows}"
            raise UserError(f"{folder}: markers: expected {limits}, found {row} from {source}")
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
    """Write embedding, transformer and output layer as a `LlamaForCausalLM`; bos and eos are token ids.

    The image adapter is left out. The folder appears whole or not at all.

    Raises UserError for a transformer that is not a Llama, or a folder that cannot be written.
    """
    try:
        values = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **llama_config(model.config),
            "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
            # Written even if None: without them transformers assumes 1 and 2.
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
    """Map our rows of the embedding to the folder's, for the markers that both have (begin and end of sequence)."""
    values, rows = _config(folder), {}
    for ours, field in ((tokenizer.bos, "bos_token_id"), (tokenizer.eos, "eos_token_id")):
        token_id = values.get(field)
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(token_id, int):
            rows[ours] = token_id
    return rows


def _config(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: expected the fields of a model, found a {type(values).__name__}")
    return values


def check_transformer(config: ModelConfig, folder: Path, strict: bool) -> None:
    """Raise UserError if the folder's transformer differs in fields that shapes do not show, such as the heads."""
    expected = read_llama_config(folder, config.max_seq_len)
    ours: dict[str, float] = {"n_heads": config.n_heads, "n_kv_heads": config.kv_heads}
    if strict:
        ours |= {"rope_theta": config.rope_theta, "norm_eps": config.norm_eps}
    for field, value in ours.items():
        if value != expected[field]:
            raise UserError(f"{folder}: model.{field}: expected {expected[field]}, found {value}")
    if config.norm_order != "pre":
        raise UserError(f"{folder}: model.norm_order: expected pre, found {config.norm_order}")


def _check_shape(folder: Path, name: str, shape: tuple[int, ...], config: ModelConfig, own: Tensor) -> None:
    expected = str(tuple(own.shape))
    fits = shape == tuple(own.shape)
    if name in (EMBEDDING, HEAD):  # image codes follow the text ids in the table
        expected = f"at most {config.text_vocab_size} rows of {config.d_model}"
        fits = len(shape) == 2 and shape[0] <= config.text_vocab_size and shape[1] == config.d_model
    if not fits:
        raise UserError(f"{folder}: tensor {name}: expected {expected}, found {shape}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        instead = "only a pickled .bin" if any(folder.glob("*.bin")) else "no file"
        raise UserError(f"{folder / WEIGHTS}: expected safetensors weights, found {instead}")
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
