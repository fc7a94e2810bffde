"""The trunk: a Llama-style decoder (pre-norm RMSNorm, SwiGLU, RoPE, no biases) over a flat run of positions.

It sees vectors, positions and an `attend` function; what a token or a patch is, it does not know.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attend
from .config import ModelConfig
from .layers import HeadNorm, Linear, RMSNorm, SwiGLU, norm_heads, rotary_table, rotate


class Block(nn.Module):
    """One decoder block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`. `[N, C] -> [N, C]`.

    With `norm_order="swin"` the norms are of what is added: `x + norm(attention(x))`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.key_heads = layer, config.heads, config.key_heads
        self.head_channels = config.head_channels
        self.pre_norm, self.dropout = config.norm_order == "pre", config.dropout
        readers = (("attention_norm", "qkv"), ("feed_forward_norm", "feed_forward.gate_up"))
        self.normed = readers if self.pre_norm else ()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_channels)
        self.out = Linear(config.width, config.width)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.hidden_channels)
        self.query_norm = HeadNorm(self.heads, self.head_channels, config.norm_eps) if config.qk_norm else None
        self.key_norm = HeadNorm(self.key_heads, self.head_channels, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, dropout: torch.Generator | None = None
    ) -> Tensor:
        q, k, v = self.before(x, rotary)
        return self.after(x, attend(self.layer, q, k, v), dropout)

    def before(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What attention is asked: queries `[N, H, D]`, keys and values `[N, K, D]`."""
        # `view` and `split_with_sizes`, not `unflatten`, `split` and `len`: those are Python, felt when one token is
        # decoded.
        asked = self.heads + self.key_heads
        qkv = self.qkv(self.attention_norm(x) if self.pre_norm else x)
        qkv = qkv.view(-1, asked + self.key_heads, self.head_channels)
        qk, v = qkv.split_with_sizes([asked, self.key_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            qk = norm_heads(qk, self.query_norm, self.key_norm)
        q, k = rotate(qk, rotary).split_with_sizes([self.heads, self.key_heads], dim=1)
        return q, k, v

    def after(self, x: Tensor, attended: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        """What the block makes of attention's answer `[N, H * D]`."""
        if self.pre_norm:
            x = x + self._drop(self.out(attended), dropout)
            return x + self._drop(self.feed_forward(self.feed_forward_norm(x)), dropout)
        x = x + self._drop(self.attention_norm(self.out(attended)), dropout)
        return x + self._drop(self.feed_forward_norm(self.feed_forward(x)), dropout)

    def _drop(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if generator is None or not self.dropout:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return x * kept.div_(1 - self.dropout)


class Transformer(nn.Module):
    """All blocks and the final norm. `x [N, C], positions [N] -> [N, C]`; `dropout` draws what is dropped.

    `table` is `rotary_table` of positions 0, 1, ... in the dtype of `x`: looking values up is faster than making them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        attend: Attend,
        dropout: torch.Generator | None = None,
        table: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if table is None:
            rotary = rotary_table(positions, self.config.head_channels, self.config.rope_theta, x.dtype)
        else:
            rotary = table[0].index_select(0, positions), table[1].index_select(0, positions)
        for block in self.blocks:
            x = block(x, rotary, attend, dropout)
        return self.norm(x)
