"""The transformer as Hugging Face's Chameleon: Llama's names, plus the norms of queries and keys.

Their model masks its image logits to the smallest number, because it never generates images.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..model import ModelConfig, Transfusion
from ..sequence.tokenizer import BOI, SPECIAL
from .architectures import hf_weights, shared_config

QK_NORM_EPS = 1e-5
"""fixed in their norm of queries and keys, whatever `rms_norm_eps` is; ours has one eps for all norms"""


def chameleon_config(config: ModelConfig, boi: int = SPECIAL.index(BOI)) -> dict[str, Any]:
    """Return the arguments of `transformers.ChameleonConfig` for a model. Raises ValueError if it is not a Chameleon.

    Their `<image>` placeholder gets the id of BOI, since we have none. Their autoencoder is made as small as it can be
    and has no weights: images must be given as token ids.
    """
    _check(config)
    return {
        **shared_config(config),
        "swin_norm": config.norm_order == "swin",
        "model_parallel_size": 1,
        "attention_dropout": 0.0,
        # Their defaults, 1 and 2, are EOS and BOI here.
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
    """Return all weights under the names of `ChameleonForConditionalGeneration`, without its `model.vqmodel`.

    Raises ValueError for a model that is not a Chameleon.
    """
    config = model.config
    _check(config)
    weights, own = hf_weights(model), dict(model.transformer.named_parameters())
    for layer in range(config.n_layers):
        for ours, hf_name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            for name in ("weight", "bias"):
                flat = own[f"blocks.{layer}.{ours}.{name}"].detach()
                weights[f"model.layers.{layer}.self_attn.{hf_name}.{name}"] = flat.view(-1, config.head_dim)
    return weights


def _check(config: ModelConfig) -> None:
    if config.images == "latents" or not config.qk_norm or config.qk_norm_type != "layer":
        raise ValueError("model: expected a Chameleon, found an image adapter or no qk_norm")
    if config.norm_eps != QK_NORM_EPS:
        raise ValueError(f"model.norm_eps: expected Chameleon's {QK_NORM_EPS}, found {config.norm_eps}")


def _code_name(code: int) -> str:
    """Return the token name of a code: 205 is IMGIMGCAFZ."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"
