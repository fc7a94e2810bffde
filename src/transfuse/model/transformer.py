"""The transformer: a Llama-style decoder (pre-norm RMSNorm, SwiGLU, RoPE, no biases) over a flat run of positions.

It takes vectors, position ids and an `attend` function; it does not know which positions are tokens and which patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import Attend
from .config import ModelConfig
from .layers import HeadNorm, Linear, RMSNorm, SwiGLU, norm_heads, rotary_table, rotate


class Block(nn.Module):
    """One decoder block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`. `[N, C] -> [N, C]`.

    With `norm_order="swin"` the outputs are normed instead: `x + norm(attention(x))`.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.kv_heads = layer, config.n_heads, config.kv_heads
        self.head_dim = config.head_dim
        self.pre_norm, self.dropout = config.norm_order == "pre", config.dropout
        # Pairs of a norm and the only linear map that reads it, which inference may fold together.
        readers = (("attention_norm", "qkv"), ("feed_forward_norm", "feed_forward.gate_up"))
        self.normed = readers if self.pre_norm else ()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.qkv = Linear(config.d_model, (self.n_heads + 2 * self.kv_heads) * self.head_dim)
        self.out = Linear(config.d_model, config.d_model)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = SwiGLU(config.d_model, config.ffn_dim)
        self.query_norm = HeadNorm(self.n_heads, self.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = HeadNorm(self.kv_heads, self.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, dropout: torch.Generator | None = None
    ) -> Tensor:
        q, k, v = self.project_qkv(x, rotary)
        return self.finish(x, attend(self.layer, q, k, v), dropout)

    def project_qkv(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return rotated queries `[N, H, D]` and keys `[N, K, D]`, and values `[N, K, D]`."""
        # `view` and `split_with_sizes`, because `unflatten` and `split` run Python code, which one token's pass feels.
        rotated = self.n_heads + self.kv_heads
        qkv = self.qkv(self.attention_norm(x) if self.pre_norm else x)
        qkv = qkv.view(-1, rotated + self.kv_heads, self.head_dim)
        qk, v = qkv.split_with_sizes([rotated, self.kv_heads], dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            qk = norm_heads(qk, self.query_norm, self.key_norm)
        q, k = rotate(qk, rotary).split_with_sizes([self.n_heads, self.kv_heads], dim=1)
        return q, k, v

    def finish(self, x: Tensor, attended: Tensor, dropout: torch.Generator | None = None) -> Tensor:
        """Return the block's output, given its input `[N, C]` and the heads' outputs `[N, H * D]`."""
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
    """All blocks and the final norm: `x [N, C]`, `position_ids [N]` -> `[N, C]`.

    `dropout` is the generator for dropout masks; None disables dropout. `table` holds `rotary_table` of positions
    0, 1, ... in the dtype of `x`; a lookup is faster than computing the sines again.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        position_ids: Tensor,
        attend: Attend,
        dropout: torch.Generator | None = None,
        table: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if table is None:
            rotary = rotary_table(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        else:
            rotary = table[0].index_select(0, position_ids), table[1].index_select(0, position_ids)
        for block in self.blocks:
            x = block(x, rotary, attend, dropout)
        return self.norm(x)
