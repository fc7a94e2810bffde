"""Hugging Face's Llama: the same transformer under other names, and folders to start a model from or to share one.

    config.json                                              the shape
    model.safetensors, or model.safetensors.index.json       the weights, whole or in shards
    tokenizer.json                                           the tokenizer, to which our markers are added

fields = read_llama_config(folder)                           # fields of ModelConfig
tokenizer = Tokenizer.adopt(folder / "tokenizer.json")
start_from_llama(model, folder, markers=marker_rows(folder, tokenizer))
save_llama(other, model, tokenizer.bos, tokenizer.eos, tokenizer)

safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BUFFERS = ".rotary_emb.inv_freq"  # suffix of tensors in old files that are not weights
NAMED = 8  # names that a message lists at most

NUMBERS = {
    "text_vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""our field: theirs, of those that every config.json must have"""

PLAIN: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None}
"""fields of theirs that must have this value, if given"""

OTHER_MATHEMATICS = {
    "ernie4_5": "rotates neighbouring channels",
    "gemma": "norms of 1 + weight",
    "granite": "multipliers",
    "helium": "rotates neighbouring channels",
    "hyperclovax": "multipliers",
    "minicpm": "multipliers",
    "smollm3": "layers without positions",
}
"""model types with Llama's fields and names but other mathematics, which nothing else in the files shows"""


def shared_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that Hugging Face's Llama and Chameleon have in common."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where transformers 4 looks for it
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `transformers.LlamaConfig` for a model. Raises ValueError if it is not a Llama."""
    if config.qk_norm or config.norm_order != "pre":
        raise ValueError("model: expected a Llama, found qk_norm or norm_order swin")
    return shared_config(config)


def llama_weights(model: Transfusion) -> dict[str, Tensor]:
    """Return the weights under `LlamaForCausalLM`'s names, without the image adapter.

    They are views: writing to them writes to the model.
    """
    config = model.config
    sizes = [config.n_heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
    weights = {
        EMBEDDING: model.embedding.weight,
        "model.norm.weight": model.transformer.norm.weight,
        HEAD: model.lm_head.weight,
    }
    own = dict(model.transformer.named_parameters())
    for layer in range(config.n_layers):
        ours, prefix = f"blocks.{layer}.", f"model.layers.{layer}."
        query, key, value = own[ours + "qkv.weight"].split(sizes)
        gate, up = own[ours + "feed_forward.gate_up.weight"].chunk(2)
        weights |= {
            prefix + "input_layernorm.weight": own[ours + "attention_norm.weight"],
            prefix + "self_attn.q_proj.weight": query,
            prefix + "self_attn.k_proj.weight": key,
            prefix + "self_attn.v_proj.weight": value,
            prefix + "self_attn.o_proj.weight": own[ours + "out.weight"],
            prefix + "post_attention_layernorm.weight": own[ours + "feed_forward_norm.weight"],
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": own[ours + "feed_forward.down.weight"],
        }
    return {name: weight.detach() for name, weight in weights.items()}


def read_llama_config(folder: Path, max_seq_len: int | None = None) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that describe a folder's transformer, the inverse of `llama_config`.

    `max_seq_len` replaces the folder's own length, if given. Raises UserError for a model that ours cannot be.
    """
    values = _read_config(folder)

    def check(fits: bool, name: str, expected: str, value: Any) -> None:
        if not fits:
            raise UserError(f"{folder / 'config.json'}: {name}: expected {expected}, found {value}")

    kind = str(values.get("model_type"))
    reason = OTHER_MATHEMATICS.get(kind)
    check(reason is None, "model_type", "one with Llama's mathematics", f'"{kind}" ({reason})')
    for name in NUMBERS.values():
        check(isinstance(values.get(name), int | float), name, "a number", repr(values.get(name)))
    for name, plain in PLAIN.items():
        check(values.get(name) in (None, plain), name, repr(plain), repr(values.get(name)))
    fields = {field: values[hf_name] for field, hf_name in NUMBERS.items()}
    fields["max_seq_len"] = max_seq_len or fields["max_seq_len"]
    fields["n_kv_heads"] = values.get("num_key_value_heads") or fields["n_heads"]
    head = values.get("head_dim")
    wanted = f"hidden_size / num_attention_heads ({fields['d_model']} / {fields['n_heads']})"
    check(head is None or head * fields["n_heads"] == fields["d_model"], "head_dim", wanted, head)
    # Rotary positions in either spelling: transformers 4 has `rope_scaling`, transformers 5 `rope_parameters`.
    theta = values.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        scaling = rope.get("rope_type", rope.get("type", "default"))
        check(scaling == "default", name, 'plain rotary positions ("default")', f'"{scaling}"')
        alike = not any(isinstance(value, dict) for value in rope.values())
        check(alike, name, "the same rotary positions in all layers", ", ".join(rope))
        share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1
        check(share == 1, "partial_rotary_factor", "1", share)
        theta = rope.get("rope_theta", theta)
    fields["rope_theta"] = float(theta or 10000)  # the default of Llama 2, whose files leave it out
    # Every layer must attend to the whole context.
    layers = values.get("layer_types") or ["full_attention", "sliding_attention"]
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None and "sliding_attention" in layers:
        expected = f"none, or at least the context asked for ({fields['max_seq_len']})"
        check(window >= fields["max_seq_len"], "sliding_window", expected, window)
    other = ", ".join(sorted({*layers} - {"full_attention", "sliding_attention"}))
    check(not other, "layer_types", "full_attention", other)
    try:
        ModelConfig(images="none", **fields)
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    return fields


def check_transformer(config: ModelConfig, folder: Path, strict: bool) -> None:
    """Raise UserError if the folder's transformer differs in fields that shapes do not show, such as the heads."""
    expected: dict[str, Any] = {**read_llama_config(folder, config.max_seq_len), "norm_order": "pre"}
    own: dict[str, Any] = {"n_heads": config.n_heads, "n_kv_heads": config.kv_heads}
    if strict:
        own |= {"rope_theta": config.rope_theta, "norm_eps": config.norm_eps}
    own["norm_order"] = config.norm_order
    for field, value in own.items():
        if value != expected[field]:
            raise UserError(f"{folder}: model.{field}: expected {expected[field]}, found {value}")


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


def start_from_llama(
    model: Transfusion, folder: Path, strict: bool = True, markers: Mapping[int, int] | None = None
) -> Match:
    """Copy a folder's weights into a model, in the model's dtype. The image adapter and q/k norms keep their values.

    strict: refuse a folder that lacks a weight of the transformer, has one more, or has other constants; otherwise copy
    what fits. A tied output layer starts as a copy of the embedding and is untied from then on. Rows of the vocabulary
    after the folder's keep their values, except `markers` (our row: the row of theirs it is copied from).

    Raises UserError before the first weight is written.
    """
    config, own = model.config, llama_weights(model)
    check_transformer(config, folder, strict)
    files = _open_weights(folder)
    shapes = {name: tuple(file.get_slice(name).get_shape()) for file in files for name in file.keys()}  # noqa: SIM118
    tied = bool(_read_config(folder).get("tie_word_embeddings")) and EMBEDDING in shapes and HEAD not in shapes
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
        shape, expected = shapes[name], str(tuple(own[name].shape))
        fits = str(shape) == expected
        if name in (EMBEDDING, HEAD):  # image codes follow the text ids in the table
            expected = f"at most {config.text_vocab_size} rows of {config.d_model}"
            fits = len(shape) == 2 and shape[0] <= config.text_vocab_size and shape[1] == config.d_model
        if not fits:
            raise UserError(f"{folder}: tensor {name}: expected {expected}, found {shape}")
    rows = min((shapes[name][0] for name in (EMBEDDING, HEAD) if name in shapes), default=0)
    for row, source in (markers or {}).items():
        if not (0 <= row < config.text_vocab_size and 0 <= source < rows):
            limits = f"rows of ours below {config.text_vocab_size}, of theirs below {rows}"
            raise UserError(f"{folder}: markers: expected {limits}, found {row} from {source}")
    for file in files:
        for name in sorted(own.keys() & set(file.keys())):
            tensor = file.get_tensor(name)
            for target in (EMBEDDING, HEAD) if tied and name == EMBEDDING else (name,):
                own[target][: len(tensor)] = tensor
    if markers:
        for name in (EMBEDDING, HEAD):
            if tied or name in shapes:
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
    values, rows = _read_config(folder), {}
    for ours, field in ((tokenizer.bos, "bos_token_id"), (tokenizer.eos, "eos_token_id")):
        token_id = values.get(field)
        token_id = token_id[0] if isinstance(token_id, list) and token_id else token_id
        if isinstance(token_id, int):
            rows[ours] = token_id
    return rows


def _read_config(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: expected the fields of a model, found a {type(values).__name__}")
    return values


def _open_weights(folder: Path) -> list[Any]:
    """Return the open safetensors files of a folder. Raises UserError for a file that is missing or damaged."""
    paths = [folder / WEIGHTS]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            instead = "only a pickled .bin" if any(folder.glob("*.bin")) else "no file"
            raise UserError(f"{folder / WEIGHTS}: expected safetensors weights, found {instead}")
        index = read_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict):
            raise UserError(f"{folder / INDEX}: weight_map: expected the file of every tensor, found none")
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
