"""The trunk in the words of Hugging Face's Chameleon: Llama's names, and the norms of queries and keys.

Their image logits are the least number there is, because they never draw; ours are `lm_head` of their hidden states.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sequence.tokenizer import BOI, SPECIAL
from .config import ModelConfig
from .llama import llama_weights, trunk_config
from .transfusion import Transfusion

QK_NORM_EPS = 1e-5
"""Written into their norm of queries and keys, whatever `rms_norm_eps` says; ours has one eps for all norms."""


def chameleon_config(config: ModelConfig, boi: int = SPECIAL.index(BOI)) -> dict[str, Any]:
    """Arguments of `transformers.ChameleonConfig` for a model. ValueError where Chameleon can not be it.

    Their `<image>`, the place of a picture yet to be coded, is `boi`: we have no such marker, and no network here reads
    it. Nor do we fill their autoencoder, which is as small as it can be: pictures must come as ids.
    """
    _check(config)
    return {
        **trunk_config(config),
        "swin_norm": config.norm_order == "swin",
        "model_parallel_size": 1,
        "attention_dropout": 0.0,
        # Theirs would be 1 and 2, which are EOS and BOI here.
        "bos_token_id": None,
        "eos_token_id": None,
        "vocabulary_map": {"<image>": boi}
        | {_code_name(code): config.text_vocab_size + code for code in range(config.codebook_size)},
        "vq_config": {
            "num_embeddings": config.codebook_size or 1,
            "embed_dim": 1,
            "latent_channels": 1,
            "base_channels": 32,
            "channel_multiplier": [1],
            "num_res_blocks": 0,
            "attn_type": "none",
        },
    }


def chameleon_weights(model: Transfusion) -> dict[str, Tensor]:
    """All weights under the names of `ChameleonForConditionalGeneration`, which keeps its `model.vqmodel` besides.

    ValueError where Chameleon can not be it.
    """
    config = model.config
    _check(config)
    weights, own = llama_weights(model), dict(model.transformer.named_parameters())
    for layer in range(config.n_layers):
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            for name in ("weight", "bias"):
                flat = own[f"blocks.{layer}.{ours}.{name}"].detach()
                weights[f"model.layers.{layer}.self_attn.{theirs}.{name}"] = flat.view(-1, config.head_dim)
    return weights


def _check(config: ModelConfig) -> None:
    if config.images == "latents" or not config.qk_norm:
        raise ValueError("model: expected a Chameleon trunk, found patch layers or no qk_norm")
    if config.norm_eps != QK_NORM_EPS:
        raise ValueError(f"model.norm_eps: expected Chameleon's {QK_NORM_EPS}, found {config.norm_eps}")


def _code_name(code: int) -> str:
    """The name by which they know code 205: IMGIMGCAFZ."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"
