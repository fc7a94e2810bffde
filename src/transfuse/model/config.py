"""One frozen dataclass describes a network; one table holds the sizes (Transfusion, Table 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..sequence import ImageAttention


@dataclass(frozen=True)
class ModelConfig:
    """A Transfusion network. Sizes in elements; defaults follow the paper where it speaks."""

    vocabulary: int = 32000
    """token ids, markers included"""
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
    unet_channels: tuple[int, ...] = (576, 1216)
    """U-Net channels per resolution, log2(patch_size) + 1 of them; not scaled with the transformer"""
    patch_positions: Literal["none", "learned"] = "none"
    """none: rotary positions in raster order only (paper); learned: a row and a column embedding is added"""
    image_attention: ImageAttention = "bidirectional"
    """causal is the ablation of Table 5"""
    qk_norm: bool = False
    """LayerNorm of every head's queries and keys, before they are rotated (Chameleon's stability set)"""
    norm_order: Literal["pre", "swin"] = "pre"
    """pre: `x + f(norm(x))`; swin: `x + norm(f(x))` (ditto; what Transfusion calls post-normalization)"""

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"model.{name}: expected {expected}, found {getattr(self, name)}")

        for name in ("vocabulary", "width", "depth", "heads", "context", "latent_channels"):
            check(getattr(self, name) > 0, name, "a positive number")
        check(self.width % (2 * self.heads) == 0, "width", f"a multiple of 2 x heads ({2 * self.heads})")
        check(self.heads % (self.kv_heads or self.heads) == 0, "kv_heads", f"a divisor of heads ({self.heads})")
        check(self.patch_size in (1, 2, 4, 8), "patch_size", "1, 2, 4 or 8")
        if self.adapter == "unet":
            levels = self.patch_size.bit_length()
            check(
                len(self.unet_channels) == levels, "unet_channels", f"{levels} numbers for patch size {self.patch_size}"
            )

    @property
    def head_channels(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden_channels(self) -> int:
        return self.hidden or -(-(8 * self.width // 3) // 256) * 256


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
