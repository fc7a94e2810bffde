"""Transfusion (arXiv 2408.11039): one transformer over tokens and patches, with two heads.

tokens ---------embedding--------+                                +--lm_head---------------> logits
                                 +--> [N, C] --transformer--> [N, C]
noised latents --image_adapter.encode--+                          +--image_adapter.decode--> predictions of the noise

Without an image adapter it is the paper's baseline, a Chameleon (arXiv 2405.09818), whose images are tokens, or a plain
Llama: the same network, so that a comparison of the two compares nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ..devices import on_meta
from ..sequence import Images, shapes_of
from .attention import Attend, AttendTowers, Merge, Towers, for_towers
from .config import ModelConfig
from .image_adapter import Conv, GridPositions, LinearAdapter, UNetAdapter
from .layers import Block, HeadNorm, Linear, Modulation, RMSNorm, Rotary, TiedLinear, TimestepModulation, rotary_table

LMHeadFn = Callable[[Linear | TiedLinear, Tensor], Tensor]
"""A function of the output layer and the hidden states `[M, C]`, such as a fused loss that never holds all logits."""

RENAMED_WEIGHTS = (
    ("trunk.", "transformer."),
    ("head.", "lm_head."),
    ("patches.enter_norm.", "image_adapter.in_norm."),
    ("patches.enter.", "image_adapter.in_proj."),
    ("patches.leave.", "image_adapter.out_proj."),
    ("patches.linear_enter.", "image_adapter.skip_in."),
    ("patches.linear_leave.", "image_adapter.skip_out."),
    ("patches.", "image_adapter."),
)
"""prefixes of weights in files of version 0.1, and today's"""


def current_name(weight: str) -> str:
    """Return a weight's name of today, given its name in a file of this or an earlier version."""
    for old, new in RENAMED_WEIGHTS:
        if weight.startswith(old):
            return new + weight.removeprefix(old)
    return weight


def of_images(weight: str) -> bool:
    """Return True for the name of a weight that images alone use: image adapter, image tower, adaLN's modulation."""
    return any(part.startswith("image") or part.endswith("modulation") for part in weight.split("."))


class Transformer(nn.Module):
    """All blocks and the final norm: `x [N, C]`, `position_ids [N]` or `[N, 3]` -> `[N, C]`, or `Towers` of each.

    `image_norm` is the final norm of image positions, with `ModelConfig.experts`.
    `dropout` is the generator for dropout masks; None disables dropout. `table` holds `rotary_table` of positions
    0, 1, ... in the dtype of `x`; a lookup is faster than computing the sines again, but serves tokens alone.
    `modulation` is that of the pass's images with `timestep="adaln"`. Of the blocks whose numbers, from 1, are keys of
    `taps`, the outputs are put there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.image_norm = None if config.experts == "shared" else RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        x: Any,
        position_ids: Any,
        attend: Attend | AttendTowers,
        dropout: Generator | None = None,
        table: Rotary | None = None,
        modulation: Modulation | None = None,
        taps: dict[int, Any] | None = None,
    ) -> Any:
        def rotary_of(position_ids: Tensor, dtype: torch.dtype) -> Rotary:
            if table is None or position_ids.dim() == 2:
                return rotary_table(position_ids, self.config, dtype)
            return table[0].index_select(0, position_ids), table[1].index_select(0, position_ids)

        rotary: Any
        if isinstance(x, Towers):
            rotary = Towers(*(rotary_of(ids, x.image.dtype) for ids in position_ids))
        else:
            rotary = rotary_of(position_ids, x.dtype)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, rotary, attend, dropout, modulation)
            if taps and number in taps:
                taps[number] = x
        if not isinstance(x, Towers):
            return self.norm(x)
        assert self.image_norm is not None
        return Towers(None if x.text is None else self.norm(x.text), self.image_norm(x.image))

    @torch.no_grad()
    def copy_text_tower(self) -> None:
        """Give the image tower the weights of the text tower, which must have the same sizes."""
        weights = dict(self.named_parameters())
        for name, weight in weights.items():
            if of_images(name):
                weight.copy_(weights[name.replace(".image.", ".").replace("image_norm", "norm")])


class AlignmentHead(nn.Module):
    """A perceptron of three layers from patches' hidden states after block `layer`, `[P, C]`, to features `[P, D]`.

    Part of a network in training alone, where the features are another network's of the clean images (REPA, arXiv
    2410.06940); exports do not have it.
    """

    def __init__(self, channels: int, layer: int, features: int) -> None:
        super().__init__()
        self.layer = layer
        self.inner = Linear(channels, 2 * channels, bias=True)
        self.middle = Linear(2 * channels, 2 * channels, bias=True)
        self.outer = Linear(2 * channels, features, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(F.silu(self.middle(F.silu(self.inner(x)))))


class Output(NamedTuple):
    """The result of a forward pass.

    logits        `[M, vocab_size]` for the M positions in `loss_positions`, or the result of `lm_head_fn`
    predictions   one float32 `[channel, row, column]` per latent
    features      `[P, D]` of the patches, by a network with an `AlignmentHead`

    It is a tuple because FSDP hooks onto the tensors its root returns, and some versions do not look into a dataclass.
    """

    logits: Tensor
    predictions: Images
    features: Tensor | None = None


class Transfusion(nn.Module):
    """The network. It knows nothing of noise schedules, samplers, parallelism or files.

    `compute_dtype` is the dtype of the residual stream; weights may be stored in another.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.image_adapter: LinearAdapter | UNetAdapter | None = None
        if config.images == "latents":
            self.image_adapter = LinearAdapter(config) if config.adapter == "linear" else UNetAdapter(config)
        self.transformer = Transformer(config)
        self.lm_head: Linear | TiedLinear = Linear(config.d_model, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head = TiedLinear(self.embedding)
        # Last, so that the other weights that a seed gives are the same without it.
        self.timestep_modulation = TimestepModulation(config.d_model) if config.timestep == "adaln" else None
        self.image_alignment: AlignmentHead | None = None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        loss_positions: Tensor,
        patches: Tensor | None = None,
        latents: Images = (),
        timesteps: Tensor | None = None,
        dropout: Generator | None = None,
        lm_head_fn: LMHeadFn = Linear.__call__,
        separate: bool = False,
        table: Rotary | None = None,
    ) -> Output:
        """Run a flat sequence of N positions that holds I images of P patches in all.

        input_ids [N]               token ids (ignored at patches)
        position_ids                rotary positions, `[N]` or `[N, 3]`, as in `Layout`
        attend                      attention: a backend of `attention`, or an inference cache
        loss_positions [M]          positions to compute logits for
        patches [P], latents, timesteps [I]   positions of the patches, the (noised) latents, each image's timestep; of
                                    codes with `experts`, patches are their positions, and there are no latents
        dropout                     generator of dropout masks in training; None disables dropout
        lm_head_fn                  replaces the logits where all of them would take too much memory; called in here,
                                    because FSDP has the output layer's weight gathered only during this call
        separate                    run the image adapter on one image at a time. Stacking images of one shape is
                                    faster, but the last bits of a convolution then depend on how many there are
        table                       rotary cosines and sines, as in `Transformer`

        Raises ValueError for latents given to a model without an image adapter.
        """
        if len(latents) and self.image_adapter is None:
            raise ValueError(f'latents: expected none with model.images "{self.config.images}", found {len(latents)}')
        adapter, vectors, state = self.image_adapter if len(latents) else None, None, None
        align = self.image_alignment if len(latents) else None
        taps = None if align is None else dict.fromkeys([align.layer])
        if adapter is not None:
            assert timesteps is not None
            vectors, state = adapter.encode(latents, timesteps, self.compute_dtype, separate)
        if self.config.experts != "shared" and patches is not None:
            modulation = self._modulation(torch.arange(len(patches), device=patches.device), latents, timesteps)
            run = partial(self.transformer, dropout=dropout, table=table, modulation=modulation, taps=taps)
            x = self._by_towers(run, input_ids, position_ids, attend, patches, vectors)
        else:
            x = self.embedding(input_ids).to(self.compute_dtype)
            if vectors is not None:
                assert patches is not None
                x = vectors if len(patches) == len(input_ids) else x.index_copy(0, patches, vectors)
            modulation = self._modulation(patches, latents, timesteps, len(input_ids))
            x = self.transformer(x, position_ids, attend, dropout, table, modulation, taps)
        predictions: Images = []
        if adapter is not None:
            assert patches is not None
            predictions = adapter.decode(x.index_select(0, patches), latents, state)
        features = None
        if align is not None and taps is not None:
            assert patches is not None
            hidden: Any = taps[align.layer]
            features = align(hidden.image if isinstance(hidden, Towers) else hidden.index_select(0, patches))
        return Output(lm_head_fn(self.lm_head, x.index_select(0, loss_positions)), predictions, features)

    def _by_towers(
        self,
        run: Callable[..., Towers],
        input_ids: Tensor,
        position_ids: Tensor,
        attend: Attend,
        patches: Tensor,
        vectors: Tensor | None,
    ) -> Tensor:
        """Run the transformer over text and image positions apart, and return `[N, C]` in order.

        run              the transformer, given the modulation of the image positions, in their own order
        vectors [P, C]   of the patches; None for codes
        """
        is_patch = torch.zeros(len(input_ids), dtype=torch.bool, device=patches.device).index_fill_(0, patches, True)
        text = is_patch.argsort(stable=True)[: len(input_ids) - len(patches)]
        ids = Towers(position_ids.index_select(0, text), position_ids.index_select(0, patches))
        if vectors is None:
            vectors = self.embedding(input_ids.index_select(0, patches)).to(self.compute_dtype)
        if not len(text):
            return run(Towers(None, vectors), ids, attend).image
        words = self.embedding(input_ids.index_select(0, text)).to(self.compute_dtype)
        attend_towers = for_towers(attend, text, patches)
        x = run(Towers(words, vectors), ids, attend_towers)
        return Merge.apply(x.text, x.image, text, patches, len(input_ids), None)

    def _modulation(
        self, patches: Tensor | None, latents: Images, timesteps: Tensor | None, positions: int | None = None
    ) -> Modulation | None:
        """Return the modulation of a pass over `positions`, or patches alone; None without latents or adaLN."""
        if self.timestep_modulation is None or not len(latents):
            return None
        assert patches is not None
        assert timesteps is not None
        counts = [rows * columns // self.config.patch_size**2 for _, rows, columns in shapes_of(latents)]
        image = torch.arange(len(counts), device=patches.device)
        if len(set(counts)) == 1:
            image = image.repeat_interleave(counts[0])
        else:
            image = image.repeat_interleave(torch.tensor(counts, device=patches.device), output_size=len(patches))
        if positions is not None:
            text = torch.full((positions,), len(counts), device=patches.device)
            image = text.index_copy(0, patches, image)
        return Modulation(self.timestep_modulation(timesteps, self.compute_dtype), image, patches, counts)

    def initialise(self, seed: int, place: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> Transfusion:
        """Initialise all weights from `seed`, on any device, and return self.

        Normal with deviation 0.02; projections into the residual stream are divided by sqrt(2 * n_layers); the last
        layer of the image adapter starts at zero, so that the first image loss is the variance of the target. So do
        the gates of modulated blocks, which pass images through at first (adaLN-zero).
        `place(weight, values)` stores the values; a shard draws them all and keeps its part, so that every number of
        ranks starts from the same weights.
        """
        generator = Generator().manual_seed(seed)

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
            for name, weight in self.transformer.named_parameters():
                if name.endswith((".out.weight", ".down.weight")):  # into the residual stream
                    weight.div_(math.sqrt(2 * self.config.n_layers))
            if self.timestep_modulation is not None:
                self.timestep_modulation.out.weight.zero_()
                shift, gate = torch.zeros(2 * self.config.d_model), -torch.ones(self.config.d_model)
                for block in self.transformer.blocks:
                    assert isinstance(block, Block)
                    assert block.modulation is not None
                    place(block.modulation, torch.cat([shift, gate, shift, gate]))
            if isinstance(self.image_adapter, LinearAdapter):
                self.image_adapter.out_proj.weight.zero_()
            elif self.image_adapter is not None:
                draw(self.image_adapter.in_proj.weight, 0.02)
                if self.image_adapter.positions is not None:
                    # On the scale of the convolutions' output: much weaker ones are ignored (docs/LOG.md).
                    draw(self.image_adapter.positions.row, 0.2)
                    draw(self.image_adapter.positions.column, 0.2)
                self.image_adapter.last.weight.zero_()
                self.image_adapter.skip_out.weight.zero_()
        return self

    @classmethod
    def on_meta(cls, config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> Transfusion:
        """Build the network on the meta device: for counting, sharding, or loading weights straight into place."""
        with on_meta():
            return cls(config, compute_dtype)
