"""The trunk in the words of Hugging Face's Llama: same mathematics, other names, split matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .config import ModelConfig
from .transfusion import Transfusion


def llama_config(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `transformers.LlamaConfig` for the text side of a model. ValueError where Llama can not be it."""
    if config.qk_norm or config.norm_order != "pre":
        raise ValueError("model: expected a Llama trunk, found qk_norm or norm_order swin")
    return {
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_channels,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "max_position_embeddings": config.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
    }


def llama_weights(model: Transfusion) -> dict[str, Tensor]:
    """The weights of embedding, trunk and head under `LlamaForCausalLM`'s names; patch layers are left out."""
    config = model.config
    sizes = [config.heads * config.head_channels, *[config.key_heads * config.head_channels] * 2]
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.trunk.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    own = dict(model.trunk.named_parameters())
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        query, key, value = own[ours + "qkv.weight"].split(sizes)
        gate, up = own[ours + "feed_forward.gate_up.weight"].chunk(2)
        weights |= {
            theirs + "input_layernorm.weight": own[ours + "attention_norm.weight"],
            theirs + "self_attn.q_proj.weight": query,
            theirs + "self_attn.k_proj.weight": key,
            theirs + "self_attn.v_proj.weight": value,
            theirs + "self_attn.o_proj.weight": own[ours + "out.weight"],
            theirs + "post_attention_layernorm.weight": own[ours + "feed_forward_norm.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": own[ours + "feed_forward.down.weight"],
        }
    return {name: weight.detach().contiguous() for name, weight in weights.items()}
