"""The families of language models that a Transfusion can start from, one row each, and how their files describe them.

| family | what it adds to Llama 2 |
| --- | --- |
| llama (2, 3.x, SmolLM2) | scaled rotary frequencies, free head dimension, tied embeddings |
| mistral | free head dimension; a sliding window |
| qwen2 (2, 2.5) | biases of q, k, v |
| qwen3 (dense) | RMSNorm of each head's q and k |
| smollm3 | layers without rotary positions |
| olmo2 | RMSNorm of all heads' q and k; norms after the sublayers |
| phi3 | q, k, v in one matrix, gate and up in another |

To add a family: a row of `ARCHITECTURES`, and a row of the parity test (`tests/parity/test_architectures.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..model import ModelConfig, RopeScaling, Transfusion

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Architecture:
    """A family: its class in transformers, the fields of `ModelConfig` that it fixes, and the names of its norms."""

    model_class: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    attention_norm: str = "input_layernorm"
    feed_forward_norm: str = "post_attention_layernorm"
    fused: bool = False
    """q, k and v are one matrix, gate and up another"""


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM"),
    "mistral": Architecture("MistralForCausalLM"),
    "qwen2": Architecture("Qwen2ForCausalLM", {"qkv_bias": True}),
    "qwen3": Architecture("Qwen3ForCausalLM", {"qk_norm": True, "qk_norm_type": "rms"}),
    "smollm3": Architecture("SmolLM3ForCausalLM"),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        {"qk_norm": True, "qk_norm_type": "rms-all", "norm_order": "swin"},
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "phi3": Architecture("Phi3ForCausalLM", fused=True),
}
"""`model_type` of config.json: the family"""

OTHER_MATHEMATICS = {
    "cohere": "LayerNorm, and both sublayers side by side",
    "cohere2": "LayerNorm, and both sublayers side by side",
    "deepseek_v3": "latent attention and routed experts",
    "ernie4_5": "rotates neighbouring channels",
    "falcon": "LayerNorm",
    "gemma": "norms of 1 + weight",
    "gemma2": "norms of 1 + weight, capped logits",
    "gemma3_text": "norms of 1 + weight",
    "glm4": "rotates neighbouring channels",
    "gpt2": "LayerNorm and learned positions",
    "gpt_neox": "LayerNorm",
    "granite": "multipliers",
    "helium": "rotates neighbouring channels",
    "hyperclovax": "multipliers",
    "minicpm": "multipliers",
    "mixtral": "routed experts",
    "olmo": "LayerNorm",
    "phi": "LayerNorm",
    "qwen2_moe": "routed experts",
    "qwen3_moe": "routed experts",
    "qwen3_next": "linear attention",
    "stablelm": "LayerNorm",
}
"""model types that are met, and why a Transfusion cannot start from them"""

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

SCALING = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "attention_factor": "attention_factor",
}
"""their field of rotary scaling: ours"""

Check = Callable[[bool, str, str, Any], None]  # (fits, field, expected, found): raises if it does not fit


def read_fields(values: Mapping[str, Any], max_seq_len: int | None, check: Check) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a config.json describes, those of the default left out.

    Raises what `check` raises, and ValueError for numbers that no network can have.
    """
    kind = str(values.get("model_type"))
    reason = f" ({OTHER_MATHEMATICS[kind]})" if kind in OTHER_MATHEMATICS else ""
    check(kind in ARCHITECTURES, "model_type", f"one of {', '.join(ARCHITECTURES)}", f'"{kind}"{reason}')
    for name in NUMBERS.values():
        check(isinstance(values.get(name), int | float), name, "a number", repr(values.get(name)))
    for name, plain in PLAIN.items():
        check(values.get(name) in (None, plain), name, repr(plain), repr(values.get(name)))
    fields = {name: values[hf_name] for name, hf_name in NUMBERS.items()} | dict(ARCHITECTURES[kind].fields)
    fields["max_seq_len"] = max_seq_len or fields["max_seq_len"]
    fields["n_kv_heads"] = values.get("num_key_value_heads") or fields["n_heads"]
    # Qwen3's own default is 128, whatever the width.
    head_dim = values.get("head_dim") or (128 if kind == "qwen3" else None)
    if head_dim is not None and head_dim * fields["n_heads"] != fields["d_model"]:
        fields["d_head"] = head_dim
    fields |= _rotary_fields(values, check)
    if kind == "smollm3":
        rotated = values.get("no_rope_layers")  # 1 for each layer that has rotary positions; or an interval
        if rotated is None:
            rotated = [(layer + 1) % values.get("no_rope_layer_interval", 4) for layer in range(fields["n_layers"])]
        fields["nope_layers"] = tuple(layer for layer in range(fields["n_layers"]) if not rotated[layer])
    fields |= _window_fields(values, fields["n_layers"], fields["max_seq_len"], check)
    if values.get("tie_word_embeddings", kind == "smollm3"):
        fields["tie_embeddings"] = True
    return fields


def _window_fields(values: Mapping[str, Any], n_layers: int, max_seq_len: int, check: Check) -> dict[str, Any]:
    """Read sliding windows, unless they hide nothing: all layers have them, those of a list, or those from a number."""
    kind = values["model_type"]
    window = values.get("sliding_window", 4096 if kind == "mistral" else None)
    if not values.get("use_sliding_window", kind not in ("qwen2", "qwen3", "smollm3")):
        window = None
    first = values.get("max_window_layers", 28) if kind in ("qwen2", "qwen3") else 0
    layers = values.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * n_layers
    other = ", ".join(sorted({*layers} - {"full_attention", "sliding_attention"}))
    check(not other, "layer_types", "full_attention or sliding_attention", other)
    full = tuple(layer for layer in range(n_layers) if layers[layer] == "full_attention")
    if window is None or window >= max_seq_len or len(full) == n_layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def _rotary_fields(values: Mapping[str, Any], check: Check) -> dict[str, Any]:
    """Read rotary positions in either spelling: transformers 4 has `rope_scaling`, transformers 5 `rope_parameters`."""
    theta = values.get("rope_theta")
    fields: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = values.get(name) or {}
        alike = not any(isinstance(value, dict) for value in rope.values())
        check(alike, name, "the same rotary positions in all layers", ", ".join(rope))
        kind = rope.get("rope_type", rope.get("type", "default"))
        check(kind in ("default", "linear", "llama3", "yarn"), name, "default, linear, llama3 or yarn", f'"{kind}"')
        check("mscale" not in rope, f"{name}.mscale", "none", rope.get("mscale"))
        share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1
        check(share == 1, "partial_rotary_factor", "1", share)
        theta = rope.get("rope_theta", theta)
        if kind in ("linear", "llama3", "yarn"):
            scaling = {ours: rope[hf_name] for hf_name, ours in SCALING.items() if rope.get(hf_name) is not None}
            scaling.setdefault("original_max_seq_len", values["max_position_embeddings"])
            fields["rope_scaling"] = RopeScaling(type=kind, **scaling)
    fields["rope_theta"] = float(theta or 10000)  # the default of Llama 2, whose files leave it out
    return fields


def model_type_of(config: ModelConfig) -> str:
    """Return the family that a network belongs to. Raises ValueError if it belongs to none."""
    own: dict[str, Any] = {"qkv_bias": config.qkv_bias, "qk_norm": config.qk_norm, "norm_order": config.norm_order}
    if config.qk_norm:
        own["qk_norm_type"] = config.qk_norm_type
    plain = {"qkv_bias": False, "qk_norm": False, "norm_order": "pre"}
    kin = ["smollm3"] if config.nope_layers else [*ARCHITECTURES]
    if config.sliding_window is not None and not config.nope_layers:  # Mistral has one in every layer, SmolLM3 in some
        kin = ["smollm3" if config.full_attention_layers else "mistral", "qwen2", "qwen3"]
    for model_type in kin:
        if plain | dict(ARCHITECTURES[model_type].fields) == own:
            return model_type
    pieces = ", ".join(f"{name} {value}" for name, value in own.items())
    raise ValueError(f"model: expected the transformer of {', '.join(ARCHITECTURES)}, found {pieces}")


def shared_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that all families have in common."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling.type != "none":
        scaling = {hf_name: getattr(config.rope_scaling, ours) for hf_name, ours in SCALING.items()}
        rope = {"rope_theta": config.rope_theta, "rope_type": config.rope_scaling.type} | {
            name: value for name, value in scaling.items() if value is not None
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rope_parameters": rope,
        # Where transformers 4 looks for them.
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling.type == "none" else rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of the config.json that transformers needs for a network. Raises ValueError for no family."""
    model_type = model_type_of(config)
    values = {
        "architectures": [ARCHITECTURES[model_type].model_class],
        "model_type": model_type,
        **shared_config(config),
        "head_dim": config.head_dim,
        "pad_token_id": None,  # a family's own default may be beyond this vocabulary
    }
    if model_type == "smollm3":
        values["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in range(config.n_layers)]
    if model_type in ("mistral", "smollm3", "qwen2", "qwen3"):
        kinds = ["sliding_attention" if windowed else "full_attention" for windowed in config.windowed]
        values["sliding_window"] = config.sliding_window
        if model_type != "mistral":
            values |= {"use_sliding_window": config.sliding_window is not None, "layer_types": kinds}
    return values


def hf_weights(model: Transfusion, model_type: str = "llama") -> dict[str, Tensor]:
    """Return the weights under a family's names in transformers, without the image adapter.

    They are views: writing to them writes to the model.
    """
    config, family = model.config, ARCHITECTURES[model_type]
    sizes = [config.heads_dim, *[config.kv_heads * config.head_dim] * 2]
    weights = {EMBEDDING: model.embedding.weight, "model.norm.weight": model.transformer.norm.weight}
    if not config.tie_embeddings:
        weights[HEAD] = model.lm_head.weight
    own = dict(model.transformer.named_parameters())
    # A model may lack what its family has, where one starts from a folder without insisting on all of it.
    kinds = ("weight", "bias") if family.fields.get("qkv_bias") and config.qkv_bias else ("weight",)
    normed = config.qk_norm and family.fields.get("qk_norm_type") == config.qk_norm_type
    for layer in range(config.n_layers):
        ours, prefix = f"blocks.{layer}.", f"model.layers.{layer}."
        weights |= {
            f"{prefix}{family.attention_norm}.weight": own[ours + "attention_norm.weight"],
            f"{prefix}self_attn.o_proj.weight": own[ours + "out.weight"],
            f"{prefix}{family.feed_forward_norm}.weight": own[ours + "feed_forward_norm.weight"],
            f"{prefix}mlp.down_proj.weight": own[ours + "feed_forward.down.weight"],
        }
        qkv, gate_up = own[ours + "qkv.weight"], own[ours + "feed_forward.gate_up.weight"]
        if family.fused:
            weights |= {f"{prefix}self_attn.qkv_proj.weight": qkv, f"{prefix}mlp.gate_up_proj.weight": gate_up}
        else:
            gate, up = gate_up.chunk(2)
            weights |= {f"{prefix}mlp.gate_proj.weight": gate, f"{prefix}mlp.up_proj.weight": up}
            for kind in kinds:
                for name, part in zip("qkv", own[f"{ours}qkv.{kind}"].split(sizes), strict=True):
                    weights[f"{prefix}self_attn.{name}_proj.{kind}"] = part
        if normed:
            for ours_name, name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
                weights[f"{prefix}self_attn.{name}.weight"] = own[f"{ours}{ours_name}.weight"]
    return {name: weight.detach() for name, weight in weights.items()}
