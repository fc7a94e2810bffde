"""Ways to continue from a model: all weights, an image tower next to a frozen text tower, or LoRA.

    adapt(model, freeze, lora, form)        before sharding: add adapters, freeze the rest
    begin(model, plain, seed)               fill it from the network that training continues from
    merged(model, weights)                  weights under the names of the plain network, for exports

With the text frozen, text logits keep every bit: nothing that a text position reads is trained, nor are the embeddings
of BOI and EOI. One row of the output layer is, that of BOI, so that the model learns when to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..model import Transfusion
from ..model.layers import Linear
from ..model.transfusion import of_images
from ..rng import generator_for
from ..sequence import SequenceFormat
from .distributed import place, restacked, stacked_name

TARGETS = ("qkv", "out", "gate_up", "down")
"""linear maps of a block: queries, keys and values; attention's output; the two of the feed-forward layer"""
ADDED = (".lora_a", ".lora_b", ".rows")
"""ends of the names of weights that the plain network does not have"""
ALIGNMENT = "image_alignment."
"""beginning of the names of other weights that it does not have"""

Freeze = Literal["none", "text"]


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685). Raises ValueError, naming the field, for values out of range."""

    rank: int = 0
    """rank of the products added to frozen matrices of the blocks; 0: no adapters"""
    alpha: float | None = None
    """the products are multiplied by alpha / rank; None: 2 x rank"""
    targets: tuple[str, ...] = TARGETS
    """linear maps that have an adapter: qkv (one for the three), out, gate_up, down"""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank: expected at least 0, found {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha: expected a number above 0, found {self.alpha}")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"lora.targets: expected some of {', '.join(TARGETS)}, found {unknown or 'none'}")


class LoRALinear(Linear):
    """A linear map with a product of rank r added: `W x + scale * B A x`; A is `[r, inputs]`, B `[outputs, r]`."""

    def __init__(self, linear: Linear, rank: int, scale: float) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.empty(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))
        return super().forward(x) + self.scale * F.linear(low, self.lora_b.to(x.dtype))


class OutputRows(Linear):
    """An output layer whose rows `ids` are trained apart from the others, as `rows`."""

    def __init__(self, linear: Linear, ids: Sequence[int]) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.ids = tuple(ids)
        self.rows = nn.Parameter(torch.empty(len(ids), linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        logits, own = super().forward(x), F.linear(x, self.rows.to(x.dtype))
        for number, token in enumerate(self.ids):
            logits[:, token] = own[:, number]
        return logits


class EmbeddingRows(nn.Embedding):
    """An embedding whose rows `ids` are trained apart from the others, as `rows`."""

    def __init__(self, embedding: nn.Embedding, ids: Sequence[int]) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim)
        self.ids = tuple(ids)
        self.rows = nn.Parameter(torch.empty(len(ids), embedding.embedding_dim))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = super().forward(input_ids)
        for row, token in zip(self.rows, self.ids, strict=True):
            x = torch.where((input_ids == token)[:, None], row, x)
        return x


def frozen(freeze: Freeze, lora: LoRAConfig) -> Literal["none", "text", "all"]:
    """Return which of the transformer's matrices get no gradient."""
    return "all" if lora.rank else freeze


def adapt(model: Transfusion, freeze: Freeze, lora: LoRAConfig, form: SequenceFormat) -> Transfusion:
    """Add what is to be trained to a network on the meta device, freeze the rest, and return the network.

    freeze text   trained are the image adapter, the image tower, and BOI's row of the output layer
    lora          trained are the adapters, the image adapter, and the rows of BOI and EOI
    """
    if freeze == "none" and not lora.rank:
        return model
    assert isinstance(model.lm_head, Linear)  # resolved recipes are not tied here
    with torch.device("meta"):
        model.lm_head = OutputRows(model.lm_head, [form.boi])
        if lora.rank:
            scale = 2.0 if lora.alpha is None else lora.alpha / lora.rank
            model.embedding = EmbeddingRows(model.embedding, [form.boi, form.eoi])
            for parent in list(model.transformer.modules()):
                for name, child in parent.named_children():
                    if isinstance(child, Linear) and name in lora.targets:
                        setattr(parent, name, LoRALinear(child, lora.rank, scale))
    for name, weight in model.named_parameters():
        base = not of_images(name)
        if lora.rank:  # the image tower has adapters, too
            base = base or (name.startswith("transformer.") and not name.endswith("modulation"))
        weight.requires_grad_(name.endswith(ADDED) or not base)
    return model


@torch.no_grad()
def begin(model: Transfusion, plain: Transfusion, seed: int) -> None:
    """Fill a network, adapted or sharded, from the plain one: adapters add nothing yet, rows are those they replace."""
    weights = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "lora_a":
            values = torch.randn(weight.shape, generator=generator_for(seed, name)) / weight.shape[1] ** 0.5
        elif kind == "lora_b":
            values = torch.zeros(weight.shape)
        elif kind == "rows":
            values = weights[f"{owner}.weight"][list(model.get_submodule(owner).ids)]  # type: ignore[arg-type]
        elif name.startswith(ALIGNMENT):
            continue  # new, as it was initialised
        else:
            values = restacked(name, weight, [weights[stacked_name(name)]])
        place(weight, values)


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapted network's weights (unsharded, by name) with adapters and rows put into the plain matrices.

    The alignment head is left out.
    """
    added = [name for name in weights if name.endswith(ADDED) or name.startswith(ALIGNMENT)]
    plain = {name: weight for name, weight in weights.items() if name not in added}
    for name, module in model.named_modules():
        key = f"{name}.weight"
        if isinstance(module, LoRALinear) and key in plain:
            low, high = weights[f"{name}.lora_a"], weights[f"{name}.lora_b"]
            plain[key] = plain[key] + module.scale * (high @ low)
        elif isinstance(module, OutputRows | EmbeddingRows) and key in plain:
            rows = torch.tensor(module.ids, device=plain[key].device)
            plain[key] = plain[key].index_copy(0, rows, weights[f"{name}.rows"])
    return plain
