"""One frozen dataclass describes a network; one table holds the sizes (Transfusion, Table 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..sequence import Grammar, ImageAttention, Tokenizer

MAX_GRID = 64
"""rows, and columns, of patches that have a learned embedding"""
MAX_DEPTH = 1000
"""blocks: far more than any network has; a damaged file may say more than can be built"""


@dataclass(frozen=True)
class ModelConfig:
    """A Transfusion, its rival or its control. Sizes in elements; defaults follow the paper where it speaks."""

    images: Literal["latents", "codes", "none"] = "latents"
    """latents: patches, drawn by diffusion (Transfusion); codes: tokens of one joint vocabulary, drawn one by one
    (Chameleon); none: text only (Llama)"""
    vocabulary: int = 32000
    """token ids of text, markers included"""
    codebook: int = 0
    """codes of an image, whose ids follow those of text; 0 unless images are codes"""
    width: int = 768
    """channels of the residual stream (d_model)"""
    depth: int = 16
    """transformer blocks"""
    heads: int = 12
    """query heads"""
    kv_heads: int | None = None
    """key and value heads (grouped-query attention); None: as many as query heads"""
    hidden: int | None = None
    """width of the SwiGLU layer; None: 8/3 of the width, rounded up to a multiple of 256 (Llama)"""
    context: int = 4096
    """longest sequence it is meant for, in positions"""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    latent_channels: int = 8
    """channels of the autoencoder's latent"""
    patch_size: int = 2
    """side of a patch, in latent elements: 1, 2, 4 or 8"""
    adapter: Literal["linear", "unet"] = "linear"
    """patch layers: one linear map each way, or U-Net down and up blocks"""
    unet_channels: tuple[int, ...] | None = None
    """U-Net channels per resolution, log2(patch_size) + 1 of them; None: the paper's 0.27B, whatever the transformer"""
    timestep_at: Literal["hidden", "patch"] = "hidden"
    """where linear patch layers add the timestep embedding. hidden: to the vectors `[width]` after the linear map;
    patch: to the flat patches `[patch_size**2 * latent_channels]` before it (the paper's footnote 6)"""
    patch_positions: Literal["none", "learned"] = "none"
    """none: rotary positions in raster order only (paper); learned: a row and a column embedding is added"""
    image_attention: ImageAttention = "bidirectional"
    """causal is the ablation of Table 5; codes are causal always"""
    qk_norm: bool = False
    """LayerNorm of every head's queries and keys, before they are rotated (Chameleon's stability set)"""
    norm_order: Literal["pre", "swin"] = "pre"
    """pre: `x + f(norm(x))`; swin: `x + norm(f(x))` (ditto; what Transfusion calls post-normalization)"""
    dropout: float = 0.0
    """share of what attention and the feed-forward layer give that is set to zero in training (Chameleon-7B: 0.1)"""

    def __post_init__(self) -> None:
        if self.adapter == "linear" or self.unet_channels == UNET_CHANNELS.get(self.patch_size):
            object.__setattr__(self, "unet_channels", None)  # files of the first release spell the paper's out, always

        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"model.{name}: expected {expected}, found {getattr(self, name)}")

        check(self.hidden is None or self.hidden > 0, "hidden", "a positive number")
        for name in ("vocabulary", "width", "depth", "heads", "context", "latent_channels"):
            check(getattr(self, name) > 0, name, "a positive number")
        check(self.depth <= MAX_DEPTH, "depth", f"at most {MAX_DEPTH}")
        check(self.width % (2 * self.heads) == 0, "width", f"a multiple of 2 x heads ({2 * self.heads})")
        check(self.heads % (self.kv_heads or self.heads) == 0, "kv_heads", f"a divisor of heads ({self.heads})")
        check(self.patch_size in (1, 2, 4, 8), "patch_size", "1, 2, 4 or 8")
        linear = self.adapter == "linear"
        check(linear or self.timestep_at == "hidden", "timestep_at", 'hidden with adapter "unet"')
        check(0 <= self.dropout < 1, "dropout", "a share of at least 0 and below 1")
        if self.images == "codes":
            check(self.patch_size == 1, "patch_size", '1 with images "codes"')
            check(self.image_attention == "causal", "image_attention", 'causal with images "codes"')
            check(self.codebook > 0, "codebook", 'a positive number with images "codes"')
        else:
            check(self.codebook == 0, "codebook", f'0 with images "{self.images}"')
        levels = self.patch_size.bit_length()
        fits = self.unet_channels is None or len(self.unet_channels) == levels
        check(fits, "unet_channels", f"{levels} numbers for patch size {self.patch_size}")

    @property
    def grid(self) -> int | None:
        """Patches along a side of an image at most; None: any number."""
        return MAX_GRID if self.images == "latents" and self.patch_positions == "learned" else None

    @property
    def patch_elements(self) -> int:
        """Elements of a flat patch of latents."""
        return self.latent_channels * self.patch_size**2

    @property
    def head_channels(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def ids(self) -> int:
        """Token ids in all: of text, and of codes behind them."""
        return self.vocabulary + self.codebook

    @property
    def unet_levels(self) -> tuple[int, ...]:
        return self.unet_channels or UNET_CHANNELS[self.patch_size]

    @property
    def hidden_channels(self) -> int:
        return self.hidden or -(-(8 * self.width // 3) // 256) * 256

    def grammar(self, tokenizer: Tokenizer) -> Grammar:
        """How this network's sequences are laid out."""
        return tokenizer.grammar(self.patch_size, self.vocabulary if self.images == "codes" else None)


SIZES: dict[str, dict[str, Any]] = {
    "0.16b": {"depth": 16, "width": 768, "heads": 12},
    "0.37b": {"depth": 24, "width": 1024, "heads": 16},
    "0.76b": {"depth": 24, "width": 1536, "heads": 24},
    "1.4b": {"depth": 24, "width": 2048, "heads": 16},
    "7b": {"depth": 32, "width": 4096, "heads": 32},
}
"""Table 2 of the paper: the same five for Transfusion and Chameleon."""

UNET_CHANNELS: dict[int, tuple[int, ...]] = {
    1: (1280,),
    2: (576, 1216),
    4: (320, 640, 1152),
    8: (192, 384, 768, 1024),
}
"""Channels by patch size that make the U-Net layers about 0.27B parameters at any trunk size (Table 7)."""
