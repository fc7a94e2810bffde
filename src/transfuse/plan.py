"""The cost of a recipe before it is run: parameters, operations, memory, days, and how to spread it over GPUs.

A micro-batch counts documents of average length, or packed rows. Documents vary in length, so a few of them may need
more memory than planned; `--data.row-length` makes all micro-batches alike.

Memory of one GPU, in pieces:

    weights, gradients, moments, EMA   4, 4, 8 and 4 bytes a parameter, float32; divided among shards
    gathered      copies of the weights in the compute dtype, and what reduces their gradients (`_gathered_bytes`)
    activations   kept by the forward pass, recomputed in the backward pass, and their gradients
    logits        the largest chunk in float32, its softmax and gradient, as far as the backward pass needs less later

The total is their sum: the peak, within 10 % of what is measured, casts that are freed early included.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch

from .autoencoders import Autoencoder, ImageAutoencoder, VQTokenizer, bundled
from .config import to_dict
from .errors import UserError
from .model import ModelConfig, Transfusion
from .model.activations import Checkpointing, Load, forward_bytes, step_bytes
from .model.flops import count_parameters, forward_flops
from .recipes import Recipe, preset
from .recipes.autoencoders import AUTOENCODERS
from .recipes.paper import POSITIONS_PER_STEP
from .runs.resolve import open_recipe_autoencoder, train_tokenizer
from .runs.sources import mixture, open_sources
from .runs.start import init_tokenizer
from .training.hardware import ASSUMED_MFU, card
from .training.loss import MAX_LOGITS

TEXT_POSITIONS = 12  # positions of a caption and its markers: an estimate
NODE = 8  # GPUs of a node
SPARE = 0.10  # share of a card's memory left free for contexts, communication and fragmentation
ENOUGH = 4096  # positions that keep a card busy and hide the gathering of shards: one sequence of the paper
PAPER_RUNS = {"paper_0.5t": 250_000 * POSITIONS_PER_STEP, "paper_2t": 500_000 * 2 * POSITIONS_PER_STEP}
"""tokens of the paper's controlled runs (section 4.1) and of its largest (section 4.4)"""


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return figures by name. `parameters` counts as the paper does: embeddings, blocks, head, without patch layers.

    train_flops_per_token            6 N, the paper's theoretical measure, N = parameters + adapter_parameters
    patches_per_image                or codes
    positions_per_step               of packed rows, their capacity; else the mean of a step's documents
    images_per_step                  an estimate
    executed_train_flops_per_image   of an image without a caption: attention within it, logits of codes alone
    memory_gigabytes                 weights, gradients, AdamW moments and EMA in float32, without activations

    Raises UserError for a recipe whose parts do not fit.
    """
    return _plan(fitted(recipe))


def _plan(recipe: Recipe) -> dict[str, Any]:
    model, count, step = recipe.model, count_parameters(recipe.model), StepContents.of(recipe)
    patches, side = step.patches, step.side
    codes = patches if model.images == "codes" else 0
    executed = 3 * forward_flops(model, patches, _pairs(recipe, patches), codes, [(side, side)] if patches else [])
    tokens = step.positions * recipe.loop.steps
    return {
        "preset": recipe.preset,
        "parameters": count.transformer,
        "adapter_parameters": count.adapter,
        "total_parameters": count.total,
        "patches_per_image": patches,
        "positions_per_step": step.positions,
        "images_per_step": step.images,
        "train_flops_per_token": 6 * count.total,
        "executed_train_flops_per_image": executed,
        "steps": recipe.loop.steps,
        "train_tokens": tokens,
        "train_flops": 6 * count.total * tokens,
        "memory_gigabytes": round(count.total * 4 * 5 / 2**30, 3),
    }


def fitted(recipe: Recipe) -> Recipe:
    """Return the recipe with the channels, or codes, of its autoencoder, which need not be trained yet."""
    if recipe.model.images == "none":
        return recipe
    autoencoder = _autoencoder(recipe)
    if isinstance(autoencoder, VQTokenizer):
        return replace(recipe, model=replace(recipe.model, codebook_size=autoencoder.codebook_size))
    return replace(recipe, model=replace(recipe.model, latent_channels=autoencoder.channels))


def _autoencoder(recipe: Recipe) -> Autoencoder:
    """Return the autoencoder of a recipe; of an untrained preset only its shape, on the meta device."""
    name = recipe.data.autoencoder
    if name not in AUTOENCODERS or name in bundled():
        return open_recipe_autoencoder(recipe)
    with torch.device("meta"):
        autoencoder = ImageAutoencoder(AUTOENCODERS[name]().model)
    return VQTokenizer(autoencoder) if recipe.model.images == "codes" else autoencoder


@dataclass(frozen=True)
class StepContents:
    """The contents of a training step: images of one size, each with `TEXT_POSITIONS` of text."""

    positions: int
    images: int
    side: int
    """latent elements along a side of an image"""
    patches: int
    """patches, or codes, of an image"""
    text: int
    """positions of a text-only document: at most a row, where documents are packed"""

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, recipe: Recipe) -> StepContents:
        """Return the contents of a recipe's steps. Raises UserError for images that do not divide into patches."""
        model, data, sources = recipe.model, recipe.data, open_sources(recipe.data)
        autoencoder = None if model.images == "none" else _autoencoder(recipe)
        side = patches = images = 0
        if autoencoder is not None:
            size, factor = sources.image_size(), autoencoder.factor
            if size % (factor * model.patch_size):
                raise UserError(
                    f"model.patch_size: expected one that divides {size} pixels, as images have, times the "
                    f"autoencoder's factor {factor}, found {model.patch_size}"
                )
            side = size // factor
            patches = (side // model.patch_size) ** 2
        if data.row_length is None:
            saved = init_tokenizer(Path(recipe.start)) if recipe.start else None
            tokenizer = sources.tokenizer or saved or train_tokenizer(recipe, sources.world)
            form = model.sequence_format(tokenizer)
            stream = mixture(recipe, sources, tokenizer, form, autoencoder)
            positions = round(data.batch_size * stream.mean_positions(form)[0])
        else:
            positions = data.batch_size * data.row_length
        if patches:
            both = bool(sources.pictures and sources.texts)
            share = _image_share(recipe, patches) if both else float(bool(sources.pictures))
            images = round(positions * share / (patches + TEXT_POSITIONS))
        return cls(positions, images, side, patches, data.row_length or TEXT_POSITIONS)

    def load(self, recipe: Recipe, parts: float) -> Load:
        """Return one of `parts` equal parts of the step; fractions of an image are rounded up."""
        positions, images = -int(-self.positions // parts), -int(-self.images // parts)
        if recipe.model.images != "latents":
            return Load(positions, positions)
        return Load(positions, max(0, positions - images * self.patches), {(self.side, self.side): images})

    def executed_flops(self, recipe: Recipe) -> int:
        """Return the operations of the forward and backward pass, without recomputation."""
        drawn = self.images * (self.patches + TEXT_POSITIONS)
        pairs = self.images * _pairs(recipe, self.patches, TEXT_POSITIONS)
        pairs += (self.positions - drawn) * (self.text + 1) // 2
        load = self.load(recipe, 1)
        sizes = [size for size, count in load.images.items() for _ in range(count)]
        return 3 * forward_flops(recipe.model, load.positions, pairs, load.predictions, sizes)


def _image_share(recipe: Recipe, patches: int) -> float:
    """Return the share of a step's positions in documents with images."""
    share = 1 - recipe.data.text_share
    if recipe.data.share_of == "positions":
        return share
    return share * (patches + TEXT_POSITIONS) / (share * patches + TEXT_POSITIONS)


def _pairs(recipe: Recipe, patches: int, text: int = 0) -> int:
    """Return the (query, visible key) pairs of a document of one image and `text` positions."""
    positions = patches + text
    later = patches * (patches - 1) // 2 if recipe.model.image_attention == "bidirectional" else 0
    return positions * (positions + 1) // 2 + later


@dataclass(frozen=True)
class Spread:
    """A layout of `replicate` copies of the network, each in `shard` parts, on replicate x shard GPUs."""

    name: str
    replicate: int = 1
    shard: int = 1

    @property
    def gpus(self) -> int:
        """The number of GPUs."""
        return self.replicate * self.shard


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU, in bytes."""

    weights: int
    gradients: int
    moments: int
    ema: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum of all pieces."""
        return sum(self.pieces.values())

    @property
    def pieces(self) -> dict[str, int]:
        """The pieces by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters in all, of one block, outside the blocks, and of the embedding, which no product reads."""

    total: int
    block: int
    root: int
    embedding: int


@lru_cache(maxsize=64)
def _parameters(config: ModelConfig) -> ParameterCounts:
    model = Transfusion.on_meta(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    block = sum(parameter.numel() for parameter in model.transformer.blocks[0].parameters())
    return ParameterCounts(total, block, total - config.n_layers * block, model.embedding.weight.numel())


def memory(config: ModelConfig, load: Load, spread: Spread, checkpointing: Checkpointing, element: int = 2) -> Memory:
    """Return the memory of a step whose micro-batch is `load`; `element`: bytes of the compute dtype."""
    part = -(-_parameters(config).total // spread.shard)
    most = step_bytes(config, load, element, checkpointing)
    later = most - forward_bytes(config, load, element, checkpointing)
    return Memory(
        weights=4 * part,
        gradients=4 * part,
        moments=8 * part,
        ema=4 * part,
        gathered=_gathered_bytes(config, spread, checkpointing, element),
        activations=most,
        logits=max(0, 12 * min(MAX_LOGITS, load.predictions * config.vocab_size) - later),
    )


def _gathered_bytes(config: ModelConfig, spread: Spread, checkpointing: Checkpointing, element: int) -> int:
    """Return the bytes of the weights' working copies.

    One GPU: each product casts its weight and keeps the cast for the backward pass, of all blocks or, with
    recomputation, of one block; and one matrix's gradient in that dtype. In float32 nothing is cast.

    Several GPUs (FSDP2): what is outside the blocks stays gathered from the forward to the backward pass, with a
    gradient in that dtype. One block is computed with, the next is waiting, another is arriving, and one has its
    gradient in that dtype and, to be summed, in float32. Derived from FSDP2's code, not measured.
    """
    count = _parameters(config)
    if spread.gpus > 1:
        return 2 * element * count.root + (4 * element + 4) * count.block
    if element == 4:
        return 0
    blocks = config.n_layers if checkpointing == "none" else 1
    largest = max(count.embedding, 2 * config.d_model * config.ffn_dim)
    return element * (count.root - count.embedding + blocks * count.block + largest)


@dataclass(frozen=True)
class Choice:
    """A way to spread a run, with the largest micro-batch of one GPU that fits."""

    spread: Spread
    checkpointing: Checkpointing
    documents: int
    positions: int
    accumulate: int
    memory: Memory
    fits: bool

    @property
    def figures(self) -> dict[str, Any]:
        """Figures by name, as `cluster_plan` returns them."""
        pieces = {**self.memory.pieces, "total": self.memory.total}
        return {
            "sharding": self.spread.name,
            "replicate": self.spread.replicate,
            "shard": self.spread.shard,
            "activation_checkpointing": self.checkpointing,
            "micro_batch": self.documents,
            "micro_batch_positions": self.positions,
            "accumulate": self.accumulate,
            "memory_gigabytes": {name: round(size / 2**30, 3) for name, size in pieces.items()},
            "fits": self.fits,
        }


def cluster_plan(recipe: Recipe, gpus: int, gpu: str, mfu: float | None = None) -> dict[str, Any]:
    """Return figures by name, all calculated; a gigabyte is 2^30 bytes.

    choices            ways to shard and to recompute, each with the largest micro-batch that fits
    recommended        the fastest of them whose micro-batch keeps the card busy; None: nothing fits
    step               operations (6 N D, and executed) and seconds of a step; tokens_per_second
    runs               tokens, days and GPU-hours of the recipe, and of the paper's numbers of tokens
    launch             the command; None: nothing fits

    Raises UserError for an unknown card, or a number of GPUs that does not divide a step.
    """
    hardware = card(gpu)
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu: expected a share above 0 and up to 1, found {mfu:g}")
    recipe = fitted(recipe)
    _check(recipe, gpus)
    reached, step = mfu or ASSUMED_MFU, StepContents.of(recipe)
    executed, theoretical = step.executed_flops(recipe), _plan(recipe)["train_flops_per_token"] * step.positions
    seconds = executed / (reached * hardware.flops * gpus)
    choices = [_choice(recipe, step, spread, way, hardware.memory) for way, spread in _ways(gpus)]
    best = _recommended(choices, step.positions // gpus)
    tokens = {"recipe": step.positions * recipe.loop.steps, **PAPER_RUNS}
    hours = {name: count / step.positions * seconds / 3600 for name, count in tokens.items()}
    return {
        "gpus": gpus,
        "gpu": gpu.lower(),
        "peak_flops": hardware.flops,
        "card_gigabytes": hardware.memory / 2**30,
        "usable_gigabytes": (1 - SPARE) * hardware.memory / 2**30,
        "mfu": reached,
        "mfu_is": "assumed" if mfu is None else "given",
        "step": {
            "positions": step.positions,
            "flops": theoretical,
            "executed_flops": executed,
            "seconds": seconds,
            "tokens_per_second": step.positions / seconds,
        },
        "runs": {
            name: {"tokens": count, "days": hours[name] / 24, "gpu_hours": hours[name] * gpus}
            for name, count in tokens.items()
        },
        "choices": [choice.figures for choice in choices],
        "recommended": None if best is None else best.figures,
        "launch": None if best is None else _launch(recipe, best),
    }


def _check(recipe: Recipe, gpus: int) -> None:
    if gpus < 1:
        raise UserError(f"gpus: expected at least 1, found {gpus}")
    if gpus > NODE and gpus % NODE:
        raise UserError(f"gpus: expected at most {NODE}, or whole nodes of {NODE}, found {gpus}")
    if recipe.data.batch_size % gpus:
        raise UserError(f"gpus: expected a divisor of data.batch_size ({recipe.data.batch_size}), found {gpus}")


def _ways(gpus: int) -> Iterator[tuple[Checkpointing, Spread]]:
    """Yield ways to run, fastest first: recomputation costs more than communication, least within a node."""
    spreads = [Spread("replicated" if gpus > 1 else "one GPU", gpus)]
    if gpus > NODE:
        spreads.append(Spread(f"HSDP, nodes of {NODE}", gpus // NODE, NODE))
    if gpus > 1:
        spreads.append(Spread(f"sharded over {gpus}", 1, gpus))
    for way in get_args(Checkpointing):
        for spread in spreads:
            yield way, spread


def _choice(recipe: Recipe, step: StepContents, spread: Spread, way: Checkpointing, card_memory: int) -> Choice:
    """Return the choice with the largest micro-batch, a power of two, that fits; else with the smallest."""
    share = recipe.data.batch_size // spread.gpus
    documents = share & -share  # the largest power of two that divides it
    while True:
        load = step.load(recipe, recipe.data.batch_size / documents)
        needed = memory(recipe.model, load, spread, way, 4 if recipe.precision == "float32" else 2)
        fits = needed.total <= (1 - SPARE) * card_memory
        if fits or documents == 1:
            return Choice(spread, way, documents, load.positions, share // documents, needed, fits)
        documents //= 2


def _recommended(choices: list[Choice], share: int) -> Choice | None:
    """Return the fastest choice whose micro-batch keeps a card busy, or is all of its `share` of positions.

    If there is none, return the choice with the largest micro-batch; None if nothing fits.
    """
    fitting = [choice for choice in choices if choice.fits]
    enough = (choice for choice in fitting if choice.positions >= min(share, ENOUGH))
    return next(enough, max(fitting, key=lambda choice: choice.positions, default=None))


def _launch(recipe: Recipe, choice: Choice) -> str:
    """Return the command, to be given on each node, with the first node's name in $HEAD."""
    gpus, name = choice.spread.gpus, recipe.preset
    start = "transfuse"
    if gpus > 1:
        nodes = gpus // NODE if gpus > NODE else 1
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 " if nodes > 1 else ""
        start = f"torchrun --nproc-per-node {gpus // nodes} {several}-m transfuse --"
    words = [
        f"{start} train {name} --run runs/{name}",
        *_settings(recipe),
        f"--parallel.replicate {choice.spread.replicate} --parallel.tensor 1",
        f"--parallel.activation-checkpointing {choice.checkpointing}",
        f"--data.accumulate {choice.accumulate}",
    ]
    autoencoder = recipe.data.autoencoder
    if autoencoder in AUTOENCODERS and autoencoder not in bundled():  # to be trained first
        words.append(f"--data.autoencoder runs/{autoencoder}/export")
    return " ".join(words)


PLANNED = {"--data.accumulate", *(f"--parallel.{name}" for name in ("replicate", "tensor", "activation-checkpointing"))}
"""options that a plan determines"""


def _settings(recipe: Recipe) -> Iterator[str]:
    """Yield the options of `transfuse train` in which a recipe differs from its preset."""
    before = dict(_flat(to_dict(fitted(preset(recipe.preset)))))
    for name, value in _flat(to_dict(recipe)):
        option = "--" + name.replace("_", "-")
        if value == before[name] or option in PLANNED:
            continue
        if isinstance(value, bool):
            group, _, last = option.rpartition(".")
            yield option if value else f"{group}.no-{last}" if group else f"--no-{option[2:]}"
        else:
            values = value if isinstance(value, list) else [value]
            yield " ".join([option, *(shlex.quote(str(item)) for item in values)])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
