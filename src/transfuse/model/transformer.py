"""The trunk: a Llama-style decoder (pre-norm RMSNorm, SwiGLU, RoPE, no biases) over a flat run of positions.

It sees vectors, positions and an `attend` function; what a token or a patch is, it does not know.
"""

from __future__ import annotations

from torch import Tensor, nn

from .attention import Attend
from .config import ModelConfig
from .layers import Linear, RMSNorm, SwiGLU, rotary_table, rotate


class Block(nn.Module):
    """One decoder block: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`. `[N, C] -> [N, C]`."""

    normed = (("attention_norm", "qkv"), ("feed_forward_norm", "feed_forward.gate_up"))

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.heads, self.key_heads = layer, config.heads, config.key_heads
        self.head_channels = config.head_channels
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_channels)
        self.out = Linear(config.width, config.width)
        self.feed_forward_norm = RMSNorm(config.width, config.norm_eps)
        self.feed_forward = SwiGLU(config.width, config.hidden_channels)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        # `view` and `split_with_sizes`, not `unflatten` and `split`: those are Python, felt when one token is decoded.
        qkv = self.qkv(self.attention_norm(x)).view(len(x), -1, self.head_channels)
        qk, v = qkv.split_with_sizes([self.heads + self.key_heads, self.key_heads], dim=1)
        q, k = rotate(qk, rotary).split_with_sizes([self.heads, self.key_heads], dim=1)
        x = x + self.out(attend(self.layer, q, k, v))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Transformer(nn.Module):
    """All blocks and the final norm. `x [N, C], positions [N] -> [N, C]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        rotary = rotary_table(positions, self.config.head_channels, self.config.rope_theta, x.dtype)
        for block in self.blocks:
            x = block(x, rotary, attend)
        return self.norm(x)
