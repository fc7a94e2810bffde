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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..model import ModelConfig, RopeScaling, Transfusion
from ..model.config import MAX_LAYERS

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
    window: Literal["none", "all", "all or listed", "last", "nope"] = "none"
    """layers that have the sliding window. none: no layer, whatever the file says; all: every layer; all or listed:
    every layer, or those of layer_types; last, nope: with use_sliding_window alone, those of layer_types, or else those
    from max_window_layers on, or those without rotary positions"""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """values that transformers takes for fields that config.json leaves out"""
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM"),
    "mistral": Architecture(
        "MistralForCausalLM",
        window="all or listed",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        {"qkv_bias": True},
        window="last",
        defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32},
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        {"qk_norm": True, "qk_norm_type": "rms"},
        window="last",
        defaults={"sliding_window": 4096, "max_window_layers": 28, "num_key_value_heads": 32, "head_dim": 128},
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM",
        window="nope",
        defaults={
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": 4,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM",
        {"qk_norm": True, "qk_norm_type": "rms-all", "norm_order": "swin"},
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ),
    "phi3": Architecture("Phi3ForCausalLM", fused=True, window="all", rope_types=("default",)),
}
"""`model_type` of config.json: the family"""

OTHER_MATHEMATICS = {
    "cohere": "LayerNorm, and both sublayers side by side",
    "cohere2": "LayerNorm, and both sublayers side by side",
    "deepseek_v3": "latent attention and routed experts",
    "ernie4_5": "rotates neighbouring channels",
    "exaone4": "norms after the sublayers, and rotary positions in the layers with a window alone",
    "falcon": "LayerNorm",
    "gemma": "norms of 1 + weight",
    "gemma2": "norms of 1 + weight, capped logits",
    "gemma3": "norms of 1 + weight",
    "gemma3_text": "norms of 1 + weight",
    "glm4": "rotates neighbouring channels",
    "gpt2": "LayerNorm and learned positions",
    "gpt_neox": "LayerNorm",
    "gpt_oss": "routed experts, and attention sinks",
    "granite": "multipliers",
    "helium": "rotates neighbouring channels",
    "hyperclovax": "multipliers",
    "llama4": "routed experts",
    "llama4_text": "routed experts",
    "minicpm": "multipliers",
    "ministral": 'the network of "mistral", whose layer_types are read: write that name',
    "ministral3": "queries scaled by their position",
    "mixtral": "routed experts",
    "olmo": "LayerNorm",
    "olmo3": "scaled rotary positions in the layers without a window alone",
    "phi": "LayerNorm",
    "phi4_multimodal": "rotates a part of each head, and has encoders of images and sound",
    "qwen2_moe": "routed experts",
    "qwen3_moe": "routed experts",
    "qwen3_next": "linear attention",
    "qwen3_vl": "an image encoder, and rotary positions in three dimensions",
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

PLAIN: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}
"""fields of theirs that must have one of these values, if given"""

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

SCALING_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),  # a factor of null is the ratio of both lengths
}
"""kind of rotary scaling: fields that must be numbers"""

Check = Callable[[bool, str, str, Any], bool]
"""(fits, field, expected, found): raises if it does not fit, or returns False where the field may be dropped"""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def read_fields(values: Mapping[str, Any], max_seq_len: int | None, check: Check) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a config.json describes, those of the default left out.

    Raises what `check` raises, and ValueError for numbers that no network can have.
    """
    kind = str(values.get("model_type"))
    reason = f" ({OTHER_MATHEMATICS[kind]})" if kind in OTHER_MATHEMATICS else ""
    check(kind in ARCHITECTURES, "model_type", f"one of {', '.join(ARCHITECTURES)}", f'"{kind}"{reason}')
    family = ARCHITECTURES[kind]
    values = {**family.defaults, **values}
    for name in NUMBERS.values():
        value, whole = values.get(name), name != "rms_norm_eps"
        check(isinstance(value, int | float), name, "a number", repr(value))
        wanted = "a positive whole number" if whole else "a positive number"
        check((_is_count if whole else _is_number)(value), name, wanted, repr(value))
    n_layers = values["num_hidden_layers"]
    check(n_layers <= MAX_LAYERS, "num_hidden_layers", f"at most {MAX_LAYERS}", n_layers)
    for name, plain in PLAIN.items():
        check(values.get(name) in (None, *plain), name, repr(plain[0]), repr(values.get(name)))
    fields = {name: values[hf_name] for name, hf_name in NUMBERS.items()} | dict(family.fields)
    fields["max_seq_len"] = max_seq_len or fields["max_seq_len"]
    sizes = {}
    for name in ("num_key_value_heads", "head_dim"):
        value = values.get(name)
        fits = check(value is None or _is_count(value), name, "a positive whole number", repr(value))
        sizes[name] = value if fits else None
    fields["n_kv_heads"] = sizes["num_key_value_heads"] or fields["n_heads"]
    head_dim = sizes["head_dim"] or family.defaults.get("head_dim")
    if head_dim is not None and head_dim * fields["n_heads"] != fields["d_model"]:
        fields["d_head"] = head_dim
    fields |= _rotary_fields(values, family, check)
    rotated = _rotated_layers(values, n_layers, check) if kind == "smollm3" else [True] * n_layers
    if kind == "smollm3":
        fields["nope_layers"] = tuple(layer for layer in range(n_layers) if not rotated[layer])
    fields |= _window_fields(values, family, rotated, fields["max_seq_len"], check)
    if ties_embeddings(values):
        fields["tie_embeddings"] = True
    return fields


def ties_embeddings(values: Mapping[str, Any]) -> bool:
    """Return True if a config.json says that the output layer is the embedding."""
    family = ARCHITECTURES[str(values["model_type"])]
    return bool(values.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings")))


def _rotated_layers(values: Mapping[str, Any], n_layers: int, check: Check) -> list[bool]:
    """Return for each layer whether it has rotary positions: of a list of ones and zeros, or all but every n-th."""
    listed: Any = values.get("no_rope_layers")
    interval: Any = values.get("no_rope_layer_interval")
    if listed is not None:
        fits = isinstance(listed, list) and len(listed) >= n_layers and all(x in (0, 1) for x in listed)
        if check(fits, "no_rope_layers", f"a list of 0 or 1 for each of {n_layers} layers", repr(listed)[:80]):
            return [bool(x) for x in listed[:n_layers]]
    if not check(_is_count(interval), "no_rope_layer_interval", "a positive whole number", repr(interval)):
        return [True] * n_layers
    return [(layer + 1) % interval != 0 for layer in range(n_layers)]


def _window_fields(
    values: Mapping[str, Any], family: Architecture, rotated: list[bool], max_seq_len: int, check: Check
) -> dict[str, Any]:
    """Read the sliding window and the layers without it, as the family's rule has them, unless it hides nothing."""
    window, layers, n_layers = values.get("sliding_window"), values.get("layer_types"), len(rotated)
    names = layers if isinstance(layers, list) else []
    other = ", ".join(sorted({str(name) for name in names} - {"full_attention", "sliding_attention"}))
    check(not other, "layer_types", "full_attention or sliding_attention", other)
    flagged = family.window in ("last", "nope")
    if family.window == "none" or window is None or (flagged and not values.get("use_sliding_window")):
        return {}
    if not check(_is_count(window), "sliding_window", "a positive whole number or null", repr(window)):
        return {}
    if layers is not None and family.window != "all":
        fits = isinstance(layers, list) and len(layers) == n_layers
        if not check(fits, "layer_types", f"a list of {n_layers} names", repr(layers)[:80]):
            return {}
        full = tuple(layer for layer in range(n_layers) if layers[layer] == "full_attention")
    elif family.window == "last":
        first: Any = values.get("max_window_layers")
        fits = first == 0 or _is_count(first)
        if not check(fits, "max_window_layers", "a whole number of layers", repr(first)):
            return {}
        full = tuple(range(min(first, n_layers)))
    else:
        full = tuple(layer for layer in range(n_layers) if rotated[layer]) if family.window == "nope" else ()
    if window >= max_seq_len or len(full) == n_layers:
        return {}
    return {"sliding_window": window, "full_attention_layers": full}


def _rotary_fields(values: Mapping[str, Any], family: Architecture, check: Check) -> dict[str, Any]:
    """Read rotary positions: `rope_scaling` of transformers 4, if it is there, or else `rope_parameters` of 5."""
    name = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name) or {}
    if not check(isinstance(rope, dict), name, "an object of settings", repr(rope)[:80]):
        rope = {}
    alike = not any(isinstance(value, dict) for value in rope.values())
    if not check(alike, name, "the same rotary positions in all layers", ", ".join(rope)):
        rope = {}
    kind, known = rope.get("rope_type", rope.get("type", "default")), family.rope_types
    if not check(
        kind in known, name, " or ".join([", ".join(known[:-1])] * (len(known) > 1) + [known[-1]]), f'"{kind}"'
    ):
        kind = "default"
    check(rope.get("mscale") is None, f"{name}.mscale", "none", rope.get("mscale"))
    share = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    check(share in (None, 1), "partial_rotary_factor", "1", share)
    default = family.defaults.get("rope_theta", 10000.0)  # 10,000 is that of Llama 2, whose files leave it out
    theta = rope.get("rope_theta", values.get("rope_theta")) or default
    if not check(_is_number(theta) and theta > 1, "rope_theta", "a number above 1", repr(theta)):
        theta = default
    fields: dict[str, Any] = {"rope_theta": float(theta)}
    scaling = _scaling(values, rope, name, str(kind), check) if kind != "default" else None
    return fields if scaling is None else fields | {"rope_scaling": scaling}


def _scaling(
    values: Mapping[str, Any], rope: Mapping[str, Any], name: str, kind: str, check: Check
) -> RopeScaling | None:
    """Read rotary scaling; None where a field that does not fit may be dropped."""
    given = {key: rope[key] for key in SCALING if rope.get(key) is not None}
    outside = values.get("original_max_position_embeddings")
    if kind != "linear" and outside is not None:  # transformers prefers it to the one inside
        given["original_max_position_embeddings"] = outside
    given.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    required = [*SCALING_NEEDS[kind], *(["factor"] if kind == "yarn" and "factor" not in rope else [])]
    for key in required:
        if not check(key in given, f"{name}.{key}", "a number", "none"):
            return None
    if "truncate" in rope:
        given["truncate"] = bool(rope["truncate"])
    for key in ("beta_fast", "beta_slow"):
        if given.get(key) == 0:  # which is none in transformers
            del given[key]
    for key, value in given.items():
        wanted = "a positive whole number" if key == "original_max_position_embeddings" else "a positive number"
        fits = key == "truncate" or (_is_count if "whole" in wanted else _is_number)(value)
        if not check(fits, f"{name}.{key}", wanted, repr(value)):
            return None
    if kind == "yarn":
        length = given["original_max_position_embeddings"]
        given.setdefault("factor", values["max_position_embeddings"] / length)
    fields: dict[str, Any] = {ours: given[key] for key, ours in SCALING.items() if key in given}
    return RopeScaling(**fields, type=kind)  # type: ignore[arg-type]


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
