"""Chameleon's stability set, each piece alone: QK-norm, norms of what is added, z-loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import randomised, tiny
from torch.nn import functional as F

from transfuse.convert.architectures import hf_config
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.inference.optimize import pack
from transfuse.model import dense
from transfuse.model.layers import rotary_table, rotate
from transfuse.sequence import SequenceFormat, collate
from transfuse.training import ObjectiveConfig, TransfusionObjective, build_optimizer
from transfuse.training.optimizer import OptimizerConfig

PIECES = {"none": {}, "qk_norm": {"qk_norm": True}, "swin": {"norm_order": "swin"},
          "both": {"qk_norm": True, "norm_order": "swin"}}  # fmt: skip


def rms(x: torch.Tensor, norm) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


@pytest.mark.parametrize("name", PIECES)
def test_a_block_written_out(name: str) -> None:
    """Position by position and head by head, with nothing of the block's own code."""
    config = tiny(**PIECES[name])
    block = randomised(config).transformer.blocks[0]
    x, heads, channels = torch.randn(5, config.d_model), config.n_heads, config.head_dim
    rotary = rotary_table(torch.arange(5), config, torch.float32)

    def attention(x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.view(5, -1, channels) for part in block.qkv(x).split(
            [heads * channels, *[config.kv_heads * channels] * 2], dim=-1))  # fmt: skip
        if config.qk_norm:
            for norm, part in ((block.query_norm, q), (block.key_norm, k)):
                for head in range(part.shape[1]):
                    own = slice(head * channels, (head + 1) * channels)
                    mean, variance = part[:, head].mean(-1, keepdim=True), part[:, head].var(-1, False, keepdim=True)
                    unit = (part[:, head] - mean) / (variance + norm.eps).sqrt()
                    part[:, head] = unit * norm.weight[own] + norm.bias[own]
        q, k = rotate(q, rotary), rotate(k, rotary)
        out = torch.empty(5, heads, channels)
        for head in range(heads):
            key = head * config.kv_heads // heads
            for position in range(5):
                scores = k[: position + 1, key] @ q[position, head] / channels**0.5
                out[position, head] = scores.softmax(0) @ v[: position + 1, key]
        return block.out(out.flatten(1))

    def attend(layer, q, k, v):
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)

    with torch.no_grad():
        a, b = block.attention_norm, block.feed_forward_norm
        if config.norm_order == "pre":
            y = x + attention(rms(x, a))
            expected = y + block.feed_forward(rms(y, b))
        else:
            y = x + rms(attention(x), a)
            expected = y + rms(block.feed_forward(y), b)
        torch.testing.assert_close(block(x, rotary, attend), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PIECES)
def test_packing_for_inference_changes_nothing(name: str, grammar: SequenceFormat, mixed) -> None:
    model = randomised(tiny(**PIECES[name])).eval().requires_grad_(False)
    batch = collate(mixed, grammar)
    times = torch.zeros(len(batch.latents), dtype=torch.int64)

    def logits() -> torch.Tensor:
        with torch.inference_mode():
            return model(
                batch.input_ids,
                batch.position_ids,
                dense(batch),
                batch.loss_positions,
                batch.patches,
                batch.latents,
                times,
            ).logits

    plain = logits()
    pack(model)
    torch.testing.assert_close(logits(), plain, atol=1e-4, rtol=1e-4)


def test_norms_of_heads_are_not_decayed() -> None:
    model = randomised(tiny(qk_norm=True))
    decayed = {id(p) for p in build_optimizer(model, OptimizerConfig()).param_groups[0]["params"]}
    norms = [p for name, p in model.named_parameters() if "_norm" in name]
    assert len(norms) >= 8
    assert not any(id(p) in decayed for p in norms)


def test_z_loss_written_out(grammar: SequenceFormat, mixed) -> None:
    model = randomised(tiny())
    batch = collate(mixed, grammar)
    process = Process(DiffusionConfig())
    plain = TransfusionObjective(ObjectiveConfig(), process, 0)
    with_z = TransfusionObjective(ObjectiveConfig(z_weight=1e-5), process, 0)
    assert with_z.names == ("text", "image", "z")
    assert with_z.weights == (1.0, 5.0, 1e-5)
    assert with_z.counts(batch) == (*plain.counts(batch), len(batch.targets))
    a, b = plain.loss(model, batch).losses, with_z.loss(model, batch).losses
    torch.testing.assert_close(a, b[:2])
    noised = plain.noise(batch)
    logits = model(
        batch.input_ids,
        batch.position_ids,
        dense(batch),
        batch.loss_positions,
        batch.patches,
        noised.latents,
        noised.timesteps,
    ).logits.double()
    expected = sum(float(row.exp().sum().log()) ** 2 for row in logits)
    assert float(b[2]) == pytest.approx(expected, rel=1e-4)
    (gradient,) = torch.autograd.grad(b[2], model.lm_head.weight)
    assert gradient.abs().sum() > 0


def test_llama_can_not_be_a_chameleon() -> None:
    hf_config(tiny())
    for fields in (PIECES["qk_norm"], PIECES["swin"]):
        with pytest.raises(ValueError, match=r"expected the transformer of llama, .*, found qkv_bias False"):
            hf_config(replace(tiny(), **fields))
