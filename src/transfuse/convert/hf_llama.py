"""The transformer as Hugging Face's Llama: the same mathematics under other names, with split matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..model import ModelConfig, Transfusion

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

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


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of `transformers.LlamaConfig` for a model. Raises ValueError if it is not a Llama."""
    if config.qk_norm or config.norm_order != "pre":
        raise ValueError("model: expected a Llama, found qk_norm or norm_order swin")
    return shared_config(config)


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


def transformer_fields(values: Mapping[str, Any], max_seq_len: int | None = None) -> dict[str, Any]:
    """Return the fields of `ModelConfig` for a Hugging Face config.json, the inverse of `llama_config`.

    `max_seq_len` replaces the file's own length, if given. Raises ValueError for a model that ours cannot be.
    """
    kind = values.get("model_type")
    reason = OTHER_MATHEMATICS.get(str(kind))
    _check(
        kind not in OTHER_MATHEMATICS,
        "model_type",
        "one with Llama's mathematics",
        f'"{kind}" ({reason})',
    )
    for name in NUMBERS.values():
        _check(isinstance(values.get(name), int | float), name, "a number", repr(values.get(name)))
    for name, plain in PLAIN.items():
        _check(values.get(name) in (None, plain), name, repr(plain), repr(values.get(name)))
    fields = {field: values[hf_name] for field, hf_name in NUMBERS.items()}
    fields["max_seq_len"] = max_seq_len or fields["max_seq_len"]
    fields["n_kv_heads"] = values.get("num_key_value_heads") or fields["n_heads"]
    head = values.get("head_dim")
    wanted = f"hidden_size / num_attention_heads ({fields['d_model']} / {fields['n_heads']})"
    _check(head is None or head * fields["n_heads"] == fields["d_model"], "head_dim", wanted, head)
    fields["rope_theta"] = _rope_theta(values)
    _check_attention(values, fields["max_seq_len"])
    ModelConfig(images="none", **fields)
    return fields


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


def _rope_theta(values: Mapping[str, Any]) -> float:
    """Read either spelling: transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`."""
    theta = values.get("rope_theta")
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        _check(kind == "default", name, 'plain rotary positions ("default")', f'"{kind}"')
        alike = not any(isinstance(value, dict) for value in rope.values())
        _check(alike, name, "the same rotary positions in all layers", ", ".join(rope))
        share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1
        _check(share == 1, "partial_rotary_factor", "1", share)
        theta = rope.get("rope_theta", theta)
    return float(theta or 10000)  # the default of Llama 2, whose files leave it out


def _check_attention(values: Mapping[str, Any], context: int) -> None:
    """Raise ValueError unless every layer attends to the whole context."""
    kinds = values.get("layer_types") or ["full_attention", "sliding_attention"]
    window = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if window is not None and "sliding_attention" in kinds:
        _check(window >= context, "sliding_window", f"none, or at least the context asked for ({context})", window)
    other = ", ".join(sorted({*kinds} - {"full_attention", "sliding_attention"}))
    _check(not other, "layer_types", "full_attention", other)


def _check(ok: bool, name: str, expected: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, found {value}")
