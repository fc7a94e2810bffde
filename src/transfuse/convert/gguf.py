"""Unpack a GGUF file, llama.cpp's format, into a Hugging Face folder that a run can start from.

gguf_to_folder(Path("SmolLM2-135M-Instruct.Q4_1.gguf"), Path("smollm2"))

The folder has `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` with the chat template, and
`generation_config.json`. Quantised weights become floating point: what quantising lost stays lost. Needs the extra
`gguf`. GGUF stores q and k of Llamas with their rows in another order, because llama.cpp rotates neighbouring channels
where Hugging Face rotates halves; here they are put back.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from ..errors import UserError, install_command
from ..folders import atomic_dir
from .architectures import ARCHITECTURES, EMBEDDING, HEAD

KNOWN = ("llama", "qwen2", "qwen3")  # architectures, by the name that GGUF and transformers share
FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""transformers' field: GGUF's, after the name of the architecture"""

READ = {*FIELDS.values(), "attention.head_count_kv", "attention.key_length", "rope.freq_base", "rope.scaling.type"}
INERT = {"vocab_size", "rope.scaling.original_context_length", "rope.scaling.finetuned"}
"""GGUF's fields, after the name of the architecture, that are read, and those that change no arithmetic; any other is
refused unless it has the value of `_config` that changes nothing"""

ROPE_FACTORS = "rope_freqs.weight"
"""the tensor of Llama 3.1 and 3.2: what each rotary frequency is divided by"""
LOW_TURNS, HIGH_TURNS, PRETRAINED_LENGTH = 1.0, 4.0, 8192
"""`low_freq_factor`, `high_freq_factor` and `original_max_position_embeddings` of every published Llama 3; a GGUF file
has none of the three"""

GLOBAL_TENSORS = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How a text is split before byte pairs are merged, by `tokenizer.ggml.pre`; None: by GPT-2's expression.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,  # after single digits
    "qwen2": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}",
    "llama-bpe": rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}",
}
CONTROL, USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


def gguf_to_folder(source: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Unpack a GGUF file into a folder, which appears whole or not at all; weights are written in `dtype`.

    Raises UserError for a file that is not GGUF, an architecture, tokenizer or tensor that is not known here, or a
    missing `gguf` package.
    """
    try:
        import gguf
    except ImportError:
        raise UserError(f"gguf: expected the extra, found no such package; {install_command('gguf')}") from None
    if not source.is_file():
        raise UserError(f"{source}: expected a GGUF file, found no file")
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{source}: expected a GGUF file, found something else ({error})") from None
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(source, values)
    backend = _tokenizer(source, values)
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS and config["model_type"] == "llama":
            config["rope_scaling"] = _rope_scaling(source, np.asarray(tensor.data), config)
            continue
        name = _tensor_name(source, tensor.name, config["model_type"])
        try:
            weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{source}: tensor {tensor.name}: expected a known quantisation, found {tensor.tensor_type.name}"
            ) from None
        if config["model_type"] == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            # Rows that were neighbours are half a head apart.
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        tensors[name] = torch.tensor(weight, dtype=dtype)
    if EMBEDDING not in tensors:
        raise UserError(f"{source}: tensor token_embd.weight: expected one, found none")
    config["vocab_size"] = len(tensors[EMBEDDING])  # it may have spare rows, for which there is no token
    config["tie_word_embeddings"] = HEAD not in tensors
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    tokens = values["tokenizer.ggml.tokens"]
    special = {
        f"{name}_token_id": values[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in values
    }
    for name, number in special.items():
        if number not in range(len(tokens)):
            raise UserError(f"{source}: {name}: expected an id below {len(tokens)}, found {number}")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": values.get("tokenizer.chat_template"),
        # Llama 3's files may not say it; llama.cpp takes it for granted.
        "add_bos_token": values.get("tokenizer.ggml.add_bos_token", values.get("tokenizer.ggml.pre") == "llama-bpe"),
        **{name.removesuffix("_id"): tokens[number] for name, number in special.items()},
    }
    files = {"config": config | special, "generation_config": special, "tokenizer_config": tokenizer_config}
    with atomic_dir(folder, "model") as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        backend.save(str(partial / "tokenizer.json"))
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (partial / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def _config(source: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' config.json for a GGUF file's fields."""
    architecture = values.get("general.architecture")
    if architecture not in KNOWN:
        raise UserError(f"{source}: general.architecture: expected one of {', '.join(KNOWN)}, found {architecture}")

    def field(key: str, default: Any = None) -> Any:
        return _value(source, values, f"{architecture}.{key}", default)

    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none":
        raise UserError(f"{source}: {architecture}.rope.scaling.type: expected none, found {scaling}")
    config = {hf_name: field(key) for hf_name, key in FIELDS.items()}
    config["num_key_value_heads"] = field("attention.head_count_kv", config["num_attention_heads"])
    config["head_dim"] = field("attention.key_length", 0)
    for name, value in config.items():
        whole = isinstance(value, int) and (value > 0 or name == "head_dim")
        if not whole and name != "rms_norm_eps":  # a list has another number for each layer
            keys = FIELDS | {"num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length"}
            raise UserError(
                f"{source}: {architecture}.{keys[name]}: expected a positive whole number, found {value!r:.80}"
            )
    config["head_dim"] = head_dim = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    # What llama.cpp would do with these is nothing.
    nothing: dict[str, tuple[Any, ...]] = {
        "rope.dimension_count": (head_dim,),
        "attention.value_length": (head_dim,),
        "attention.causal": (True,),
        "expert_count": (0,),
        "expert_used_count": (0,),
    }
    nothing |= dict.fromkeys(("rope.scaling.factor", "rope.scale_linear", "rope.scaling.attn_factor"), (0, 1))
    for name, value in values.items():
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in READ | INERT:
            continue
        if value not in nothing.get(key, ()):
            wanted = " or ".join(str(plain) for plain in nothing.get(key, ("no such field",)))
            raise UserError(f"{source}: {name}: expected {wanted}, found {value!r:.80}")
    return {
        "architectures": [ARCHITECTURES[architecture].model_class],
        "model_type": architecture,
        **config,
        "rope_theta": float(field("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        "attention_bias": False,
    }


def _rope_scaling(source: Path, factors: np.ndarray, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return transformers' `rope_scaling` for the factors `[head_dim / 2]` of a file; None where they change nothing.

    Raises UserError for factors that Llama 3's rule does not give.
    """
    frequency = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    turns = PRETRAINED_LENGTH * frequency / (2 * math.pi)
    kept = ((turns - LOW_TURNS) / (HIGH_TURNS - LOW_TURNS)).clip(0, 1)
    factor = float(factors.max(initial=1.0))
    if factors.shape != kept.shape or not np.allclose(factors, 1 / (kept + (1 - kept) / factor), rtol=1e-4):
        raise UserError(f"{source}: tensor {ROPE_FACTORS}: expected the factors of Llama 3.1 or 3.2, found others")
    if factor == 1:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_TURNS,
        "high_freq_factor": HIGH_TURNS,
        "original_max_position_embeddings": PRETRAINED_LENGTH,
    }


def _value(source: Path, values: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return a field of the file. Raises UserError if it has none of that name, and there is no default."""
    value = values.get(name, default)
    if value is None:
        raise UserError(f"{source}: {name}: expected a value, found none")
    return value


def _tensor_name(source: Path, name: str, architecture: str) -> str:
    """Return transformers' name of a tensor. Raises UserError for one that the architecture does not have there."""
    if name in GLOBAL_TENSORS:
        return GLOBAL_TENSORS[name]
    match name.split("."):
        case ["blk", layer, part, kind] if part in LAYER_TENSORS and _has_tensor(architecture, part, kind):
            return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{kind}"
    raise UserError(f"{source}: tensor {name}: expected one of a known network, found a part that is not known here")


def _has_tensor(architecture: str, part: str, kind: str) -> bool:
    """Return True unless transformers' network lacks the tensor, and would drop it."""
    if kind == "bias":
        return architecture == "qwen2" and part in ("attn_q", "attn_k", "attn_v")
    return kind == "weight" and (architecture == "qwen3" or not part.endswith(("q_norm", "k_norm")))


def _tokenizer(source: Path, values: dict[str, Any]) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of a GGUF file."""
    kind = _value(source, values, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(f"{source}: tokenizer.ggml.model: expected gpt2 (byte-level BPE), found {kind}")
    split = values.get("tokenizer.ggml.pre", "default")
    if split not in SPLITS:
        raise UserError(f"{source}: tokenizer.ggml.pre: expected one of {', '.join(SPLITS)}, found {split}")
    tokens = _value(source, values, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _value(source, values, "tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe")
    except Exception as error:  # the library raises a bare Exception
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: tokenizer.ggml.merges: expected pairs of tokens ({reason:.80})") from None
    backend = tokenizers.Tokenizer(model)
    if split == "qwen2":
        backend.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if split == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if (expression := SPLITS[split]) is not None:
        steps.append(pre_tokenizers.Split(Regex(expression), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    kinds = values.get("tokenizer.ggml.token_type", [])
    for add, added in ((backend.add_special_tokens, CONTROL), (backend.add_tokens, USER_DEFINED)):
        add([AddedToken(tokens[i], normalized=False) for i, kind in enumerate(kinds) if kind == added])
    return backend
