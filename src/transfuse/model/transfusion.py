"""Transfusion (arXiv 2408.11039): one transformer over tokens and patches, two heads.

tokens --embedding--+                          +--head-----> logits        at positions whose next token is learned
                    +--> [N, C] --trunk--> [N, C]
noised latents --patches.encode--+             +--patches.decode--> what the diffusion process asks for

Without patch layers it is the paper's rival, a Chameleon (arXiv 2405.09818), whose images are tokens, or its control, a
plain Llama: one network, one trunk, so that a comparison compares nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..sequence import Images
from .attention import Attend
from .config import ModelConfig
from .layers import HeadNorm, Linear, RMSNorm
from .patches import Conv, GridPositions, LinearPatches, UNetPatches
from .transformer import Block, Transformer

Read = Callable[[Linear, Tensor], Tensor]
"""What to make of the head and the vectors `[M, C]` at the M positions asked for."""


def logits(head: Linear, x: Tensor) -> Tensor:
    """`[M, C] -> [M, ids]`."""
    return head(x)


class Output(NamedTuple):
    """logits `[M, ids]` for the M positions asked for, or what `read` made of them; one prediction per latent, shaped
    as it, float32.

    A tuple, because FSDP hooks onto the tensors that its root returns, and not every version looks into a dataclass.
    """

    logits: Tensor
    predictions: Images


class Transfusion(nn.Module):
    """The network. It knows nothing of noise schedules, samplers, parallelism or files.

    `compute` is the dtype of the residual stream; weights may be kept in another.
    """

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute = compute
        self.embedding = nn.Embedding(config.ids, config.width)
        self.patches: LinearPatches | UNetPatches | None = None
        if config.images == "latents":
            self.patches = LinearPatches(config) if config.adapter == "linear" else UNetPatches(config)
        self.trunk = Transformer(config)
        self.head = Linear(config.width, config.ids)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        predict: Tensor,
        patches: Tensor | None = None,
        latents: Images = (),
        timesteps: Tensor | None = None,
        dropout: torch.Generator | None = None,
        read: Read = logits,
        apart: bool = False,
        table: tuple[Tensor, Tensor] | None = None,
    ) -> Output:
        """Run a flat sequence.

        tokens [N], positions [N]   ids (ignored where a patch lies) and rotary positions
        attend                      what sees what: a backend of `attention`, or an inference cache
        predict [M]                 positions to give logits for
        patches [P], latents, timesteps [I]   where the patches lie, the (noised) latents, and each image's timestep
        dropout                     draws what is dropped, in training; None: nothing is
        read                        what to make of the vectors at `predict` where all their logits would be too much;
                                    called in here, because only in here does FSDP have the head's weight gathered
        apart                       each image alone through the patch layers; otherwise those of one shape together,
                                    which is faster, but the last bits of a convolution depend on how many they are
        table                       cosines and sines of the rotary embedding to look up, as in `Transformer`
        """
        x = self.embedding(tokens).to(self.compute)
        state = None
        if len(latents):
            layers = self._patch_layers()
            assert patches is not None
            assert timesteps is not None
            vectors, state = layers.encode(latents, timesteps, self.compute, apart)
            x = vectors if len(patches) == len(tokens) else x.index_copy(0, patches, vectors)
        x = self.trunk(x, positions, attend, dropout, table=table)
        predictions: Images = []
        if len(latents):
            assert patches is not None
            predictions = self._patch_layers().decode(x.index_select(0, patches), latents, state)
        return Output(read(self.head, x.index_select(0, predict)), predictions)

    def _patch_layers(self) -> LinearPatches | UNetPatches:
        if self.patches is None:
            raise ValueError(f'latents: expected none with model.images "{self.config.images}", found some')
        return self.patches

    def initialise(self, seed: int, place: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> Transfusion:
        """Draw all weights from `seed`, on any device, materialised or not before. Returns self.

        Normal with deviation 0.02; projections into the residual stream are divided by sqrt(2 x depth); the last layer
        of the patch decoder starts at zero, so that the first image loss is the variance of the target. `place(weight,
        values)` puts drawn values where they belong; they are drawn whole, whatever part of them is kept.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(weight: Tensor, deviation: float) -> None:
            values = torch.empty(weight.shape, dtype=torch.float32).normal_(0, deviation, generator=generator)
            place(weight, values.to(weight.dtype))

        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Embedding):
                    draw(module.weight, 0.02)
                elif isinstance(module, Conv):
                    draw(module.weight, 1 / math.sqrt(module.weight[0].numel()))
                elif isinstance(module, GridPositions):
                    draw(module.row, 0.02)
                    draw(module.column, 0.02)
                elif isinstance(module, RMSNorm | nn.LayerNorm | HeadNorm):
                    module.weight.fill_(1)
                bias = getattr(module, "bias", None)
                if isinstance(bias, Tensor):
                    bias.zero_()
            for block in self.trunk.blocks:
                assert isinstance(block, Block)
                for residual in (block.out, block.feed_forward.down):
                    residual.weight.div_(math.sqrt(2 * self.config.depth))
            if isinstance(self.patches, LinearPatches):
                self.patches.leave.weight.zero_()
            elif self.patches is not None:
                draw(self.patches.enter.weight, 0.02)
                if self.patches.positions is not None:
                    # As strong as what the convolutions give: much weaker ones are not looked at (docs/LOG.md).
                    draw(self.patches.positions.row, 0.2)
                    draw(self.patches.positions.column, 0.2)
                self.patches.last.weight.zero_()
                self.patches.linear_leave.weight.zero_()
        return self

    @classmethod
    def on_meta(cls, config: ModelConfig, compute: torch.dtype = torch.float32) -> Transfusion:
        """The network without storage: for counting, sharding, or loading weights straight into place."""
        with torch.device("meta"):
            return cls(config, compute)
