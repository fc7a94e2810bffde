"""With codes for images our network is Chameleon: the same weights give the same logits as transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import randomised, tiny
from torch.nn import functional as F

from transfuse.convert.architectures import hf_weights, shared_config
from transfuse.model import ModelConfig, Transfusion, dense, for_batch
from transfuse.model.layers import HeadNorm
from transfuse.sequence import Document, Image, SequenceFormat, Text, collate

transformers = pytest.importorskip("transformers")

VOCABULARY, CODEBOOK = 64, 120
BOS, EOS, BOI, EOI = 0, 1, 2, 3
GRAMMAR = SequenceFormat(BOS, EOS, BOI, EOI, patch_size=1, first_code=VOCABULARY)
VARIANTS = [
    {"norm_order": "pre"},
    {"norm_order": "swin"},
    {"norm_order": "pre", "n_kv_heads": 2, "rope_theta": 500000.0},
    {"norm_order": "swin", "n_kv_heads": 1, "d_ff": 160, "rope_theta": 100.0},
]


def settings(**changes: object) -> ModelConfig:
    return tiny(
        **{
            "images": "codes",
            "text_vocab_size": VOCABULARY,
            "codebook_size": CODEBOOK,
            "patch_size": 1,
            "unet_channels": None,
            "image_attention": "causal",
            "qk_norm": True,
            **changes,
        }
    )


def chameleon_config(config: ModelConfig) -> dict[str, Any]:
    """Arguments of `transformers.ChameleonConfig`.

    Their `<image>` placeholder gets the id of BOI, since we have none. Their autoencoder is made as small as it can be
    and has no weights: images must be given as token ids.
    """
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {f"IMGIMG{str(code).translate(letters)}Z": VOCABULARY + code for code in range(config.codebook_size)}
    return {
        **shared_config(config),
        "swin_norm": config.norm_order == "swin",
        "model_parallel_size": 1,
        "attention_dropout": 0.0,
        # Their defaults, 1 and 2, are EOS and BOI here.
        "bos_token_id": None,
        "eos_token_id": None,
        "vocabulary_map": {"<image>": BOI} | codes,
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


def chameleon_weights(model: Transfusion) -> dict[str, torch.Tensor]:
    """All weights under the names of `ChameleonForConditionalGeneration`, without its `model.vqmodel`."""
    weights, own = hf_weights(model), dict(model.transformer.named_parameters())
    for layer in range(model.config.n_layers):
        for ours, hf_name in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            for name in ("weight", "bias"):
                flat = own[f"blocks.{layer}.{ours}.{name}"].detach()
                weights[f"model.layers.{layer}.self_attn.{hf_name}.{name}"] = flat.view(-1, model.config.head_dim)
    return weights


def both(config: ModelConfig):
    """Ours, whose norms of queries and keys differ much from head to head, and theirs with the same weights."""
    ours = randomised(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for norm in ours.modules():
        if isinstance(norm, HeadNorm):
            for parameter in norm.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.5)
    hf_model = transformers.ChameleonForConditionalGeneration(transformers.ChameleonConfig(**chameleon_config(config)))
    result = hf_model.load_state_dict(chameleon_weights(ours), strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("model.vqmodel.") for name in result.missing_keys)
    assert hf_model.config.swin_norm == (config.norm_order == "swin")
    return ours, hf_model.eval().requires_grad_(False)


def causal(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def assert_same(ours: torch.Tensor, hf_model, tokens: torch.Tensor) -> None:
    """Logits of text as theirs come out; all logits, of codes too, as their head gives them before it hides some."""
    hidden = hf_model.model(tokens[None]).last_hidden_state[0]
    expected = hf_model.lm_head(hidden)
    given = hf_model(tokens[None]).logits[0]
    for part in (expected[:, :VOCABULARY], expected[:, VOCABULARY:]):
        assert not part.numel() or part.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[:, :VOCABULARY], given[:, :VOCABULARY], atol=1e-4, rtol=1e-4)
    assert (given[:, VOCABULARY:] == torch.finfo(given.dtype).min).all()


def mixed_ids() -> torch.Tensor:
    codes = torch.randint(CODEBOOK, (24,), generator=torch.Generator().manual_seed(0)) + VOCABULARY
    return torch.tensor([BOS, *range(4, 30), BOI, *codes.tolist(), EOI, *range(60, 20, -3), EOS])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_logits_equal_chameleon(variant) -> None:
    ours, hf_model = both(settings(**variant))
    tokens = mixed_ids()
    every = torch.arange(len(tokens))
    assert_same(ours(tokens, every, causal, every).logits, hf_model, tokens)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("backend", ["dense", "grouped"])
def test_packed_documents_equal_chameleon_on_each_alone(variant, backend) -> None:
    ours, hf_model = both(settings(**variant))
    alone = mixed_ids()
    codes = (alone[28:52] - VOCABULARY).view(4, 6)
    documents = [
        Document([Text(tuple(range(40, 60)))]),
        Document([Text(tuple(range(4, 30))), Image(codes), Text(tuple(range(60, 20, -3)))]),
        Document([Image(codes[:2]), Image(codes[2:, :3]), Text((9, 8, 7))]),
    ]
    batch = collate(documents, GRAMMAR, "causal", multiple=16)
    attend = dense(batch) if backend == "dense" else for_batch(batch, torch.float32)
    logits = ours(batch.input_ids, batch.position_ids, attend, torch.arange(batch.positions)).logits
    runs = list(zip(logits.split(batch.documents), batch.input_ids.split(batch.documents), strict=True))
    assert torch.equal(runs[1][1], alone)
    for logits, tokens in runs[: len(documents)]:
        assert_same(logits, hf_model, tokens)


def test_text_alone() -> None:
    ours, hf_model = both(settings(images="none", codebook_size=0))
    tokens = torch.arange(4, VOCABULARY)
    every = torch.arange(len(tokens))
    assert_same(ours(tokens, every, causal, every).logits, hf_model, tokens)


def test_their_names_of_codes() -> None:
    """They take the ids of codes for what we do, none more, none less, in order."""
    _, hf_model = both(settings())
    mapping = hf_model.model.vocabulary_mapping
    assert mapping.bpe2img == {VOCABULARY + code: code for code in range(CODEBOOK)}
    assert mapping.image_token_id == hf_model.config.image_token_id == BOI
    picture = torch.arange(CODEBOOK)
    assert torch.equal(mapping.convert_img2bpe(picture), (picture + VOCABULARY).int())


def test_no_marker_of_theirs_ends_what_is_written() -> None:
    """By default their `generate` would stop at id 2, which is BOI here."""
    _, hf_model = both(settings())
    assert hf_model.generation_config.bos_token_id is None
    assert hf_model.generation_config.eos_token_id is None
