"""The cost of a recipe before it is run: parameters, operations, memory, days, and how to spread it over GPUs.

A micro-batch counts documents of average length, or packed rows. Documents vary in length, so a few of them may need
more memory than planned; `--data.row-length` makes all micro-batches alike.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

from .autoencoders import Autoencoder, ImageAutoencoder, Pixels, VQTokenizer, bundled
from .config import read_settings, to_dict, updated
from .devices import on_meta
from .errors import UserError
from .export import describe
from .model import ModelConfig, Transfusion
from .model.costs import Checkpointing, Frozen, Load, count_parameters, forward_bytes, step_bytes, step_flops
from .recipes import PRESETS, Recipe, preset
from .recipes.autoencoders import AUTOENCODERS
from .recipes.paper import POSITIONS_PER_STEP
from .runs import Run, open_recipe_autoencoder
from .runs.resolve import resolve_data
from .sequence import SequenceFormat
from .training.finetune import Freeze, LoRAConfig, adapt, frozen
from .training.hardware import ASSUMED_MFU, card
from .training.loss import MAX_LOGITS
from .training.optimizer import OptimizerConfig, block_matrices

TEXT_POSITIONS = 12  # positions of a caption and its markers: an estimate
NODE = 8  # GPUs of a node
SPARE = 0.10  # share of a card's memory left free for contexts, communication and fragmentation
ENOUGH = 4096  # positions that keep a card busy and hide the gathering of shards: one sequence of the paper
PAPER_RUNS = {"paper_0.5t": 250_000 * POSITIONS_PER_STEP, "paper_2t": 500_000 * 2 * POSITIONS_PER_STEP}
"""tokens of the paper's controlled runs (section 4.1) and of its largest (section 4.4)"""


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return figures by name. `parameters` counts as the paper does: embeddings, blocks, head, without patch layers.

    image_tower_parameters           with model.experts
    trained_parameters               with freeze or lora
    train_flops_per_token            6 N, the paper's theoretical measure, N = parameters + adapter_parameters
    patches_per_image                or codes
    positions_per_step               of packed rows, their capacity; else the mean of a step's documents
    images_per_step                  an estimate
    executed_train_flops_per_image   of an image without a caption: attention within it, logits of codes alone
    teacher_flops                    with distil.steps: operations of the teacher's evaluations, which 6 N lacks
    memory_gigabytes                 weights, gradients, moments and EMA in float32, without activations; the last
                                     three of trained parameters alone; with distil.steps the teacher's weights, too

    Raises UserError for a recipe whose parts do not fit.
    """
    step = StepContents.of(recipe)
    model, count, tokens = step.recipe.model, count_parameters(step.recipe.model), step.positions * recipe.loop.steps
    codes, sizes = (step.patches if model.images == "codes" else 0), [(step.side, step.side)] * bool(step.patches)
    total, trained, moments = _counted(model, recipe.optimizer, recipe.freeze, recipe.lora)
    image = (model, step.patches, step.image_pairs(), codes, sizes, step.frozen)
    return {
        "preset": recipe.preset,
        "parameters": count.transformer,
        "adapter_parameters": count.adapter,
        **({"image_tower_parameters": count.image_tower} if count.image_tower else {}),
        "total_parameters": total,
        **({"trained_parameters": trained} if trained < total else {}),
        "patches_per_image": step.patches,
        "positions_per_step": step.positions,
        "images_per_step": step.images,
        "train_flops_per_token": 6 * count.active,
        "executed_train_flops_per_image": step_flops(*image),
        "steps": recipe.loop.steps,
        "train_tokens": tokens,
        "train_flops": 6 * count.active * tokens,
        **({"teacher_flops": step.teacher_flops() * recipe.loop.steps} if step.teacher else {}),
        "memory_gigabytes": round((4 * (total + 2 * trained + moments) + step.teacher_bytes) / 2**30, 3),
    }


def cluster_plan(
    recipe: Recipe, gpus: int, gpu: str, mfu: float | None = None, config: Path | None = None
) -> dict[str, Any]:
    """Return figures by name, all calculated; a gigabyte is 2^30 bytes.

    config: the file of settings that the recipe is from, if it is from no preset

    choices            ways to shard and to recompute, each with the largest micro-batch that fits and what each GPU
                       sends in a step
    recommended        the fastest of them whose micro-batch keeps a card busy or is all of its share of a step, else
                       the one with the largest micro-batch; None: nothing fits
    step               operations (6 N D, and executed) and seconds of a step; tokens_per_second
    runs               tokens, days and GPU-hours of the recipe, and of the paper's numbers of tokens
    launch             the command; None: nothing fits, or the recipe is from neither a preset nor a file

    Raises UserError for an unknown card, or a number of GPUs that does not divide a step.
    """
    hardware, batch = card(gpu), recipe.data.batch_size
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu: expected a share above 0 and up to 1, found {mfu:g}")
    if gpus < 1:
        raise UserError(f"gpus: expected at least 1, found {gpus}")
    if gpus > NODE and gpus % NODE:
        raise UserError(f"gpus: expected at most {NODE}, or whole nodes of {NODE}, found {gpus}")
    if batch % gpus:
        raise UserError(f"gpus: expected a divisor of data.batch_size ({batch}), found {gpus}")
    step, reached, usable = StepContents.of(recipe), mfu or ASSUMED_MFU, (1 - SPARE) * hardware.memory
    # Of the forward and backward pass and of the teacher, without recomputation.
    executed = step.flops(step.recipe.model, step.load(1).predictions, step.frozen) + step.teacher_flops()
    seconds = executed / (reached * hardware.flops * gpus)
    runs = {}
    for name, tokens in {"recipe": step.positions * recipe.loop.steps, **PAPER_RUNS}.items():
        hours = tokens / step.positions * seconds / 3600
        runs[name] = {"tokens": tokens, "days": hours / 24, "gpu_hours": hours * gpus}
    choices = list(_choices(step, gpus, usable))
    fitting, enough = [choice for choice in choices if choice["fits"]], min(step.positions // gpus, ENOUGH)
    largest = max(fitting, key=lambda choice: choice["micro_batch_positions"], default=None)
    best = next((choice for choice in fitting if choice["micro_batch_positions"] >= enough), largest)
    return {
        "gpus": gpus,
        "gpu": gpu.lower(),
        "peak_flops": hardware.flops,
        "card_gigabytes": hardware.memory / 2**30,
        "usable_gigabytes": usable / 2**30,
        "mfu": reached,
        "mfu_is": "assumed" if mfu is None else "given",
        "step": {
            "positions": step.positions,
            "flops": 6 * count_parameters(step.recipe.model).active * step.positions,
            "executed_flops": executed,
            "seconds": seconds,
            "tokens_per_second": step.positions / seconds,
        },
        "runs": runs,
        "choices": choices,
        "recommended": best,
        "launch": None if best is None else _launch(recipe, step.recipe.data.autoencoder, best, config),
    }


def fitted(recipe: Recipe) -> tuple[Recipe, Autoencoder | None]:
    """Return the recipe with the channels, or codes, of its autoencoder, and that autoencoder (None: no images).

    A preset that is still to be trained stands for its shape, on the meta device.
    """
    name = recipe.data.autoencoder
    if recipe.model.images == "none":
        return recipe, None
    if name in AUTOENCODERS and name not in bundled():
        with on_meta():
            network = ImageAutoencoder(AUTOENCODERS[name]().model)
        autoencoder: Autoencoder = VQTokenizer(network) if recipe.model.images == "codes" else network
    else:
        autoencoder = open_recipe_autoencoder(recipe)
    if isinstance(autoencoder, VQTokenizer):
        model = replace(recipe.model, codebook_size=autoencoder.codebook_size)
    else:
        model = replace(recipe.model, latent_channels=autoencoder.channels)
    return replace(recipe, model=model), autoencoder


@dataclass(frozen=True)
class StepContents:
    """The contents of a training step of `recipe`: images of one size, each with `TEXT_POSITIONS` of text.

    copies          images that stand twice, an estimate: `images` counts them once
    side            latent elements along a side of an image
    patches         patches, or codes, of an image
    teacher         the network that a student learns from; None without distillation
    teacher_bytes   memory of its weights, float32 and whole on every GPU
    frozen          the matrices that are not trained
    """

    recipe: Recipe
    positions: int
    images: int
    copies: int
    side: int
    patches: int
    teacher: ModelConfig | None
    teacher_bytes: int
    frozen: Frozen

    @classmethod
    @lru_cache(maxsize=16)
    def of(cls, recipe: Recipe) -> StepContents:
        """Return the contents of a recipe's steps. Raises UserError for images that do not divide into patches."""
        recipe, sources, saved = resolve_data(recipe)
        recipe, autoencoder = fitted(recipe)
        model, data = recipe.model, recipe.data
        side = images = 0
        if autoencoder is not None:
            size, factor = sources.image_size, autoencoder.factor
            if size % (factor * model.patch_size):
                raise UserError(
                    f"model.patch_size: expected one that divides {size} pixels, as images have, times the "
                    f"autoencoder's factor {factor}, found {model.patch_size}"
                )
            side = size // factor
        if data.row_length is None:
            run = Run(recipe, sources, autoencoder or Pixels(), saved)
            positions = round(data.batch_size * run.mixture(autoencoder).mean_positions(run.format)[0])
        else:
            positions = data.batch_size * data.row_length
        patches = (side // model.patch_size) ** 2
        # The share of images, taken for those of pairs, that have a noised copy: those before their caption.
        copied = 1 - data.pairs.caption_first if data.context == "clean-copy" else 0.0
        if patches and sources.pictures:
            share, of_image = 1 - data.text_share, patches * (1 + copied)
            document = of_image + TEXT_POSITIONS
            if data.share_of == "documents":
                share = share * document / (share * of_image + TEXT_POSITIONS)
            images = round(positions * (share if sources.texts else 1) / document)
        copies, teacher = round(images * copied), describe(recipe.start).model if recipe.distil.steps else None
        teacher_bytes = 0 if teacher is None else 4 * _parameters(teacher)[0]
        part = frozen(recipe.freeze, recipe.lora)
        return cls(recipe, positions, images, copies, side, patches, teacher, teacher_bytes, part)

    def load(self, parts: float) -> Load:
        """Return one of `parts` equal parts of the step; fractions of an image are rounded up."""
        positions, images = -int(-self.positions // parts), -int(-(self.images + self.copies) // parts)
        if self.recipe.model.images != "latents":
            return Load(positions, positions)
        return Load(positions, max(0, positions - images * self.patches), {(self.side, self.side): images})

    def image_pairs(self, text: int = 0) -> int:
        """Return the (query, visible key) pairs of a document of one image and `text` positions."""
        positions, bidirectional = self.patches + text, self.recipe.model.image_attention == "bidirectional"
        return positions * (positions + 1) // 2 + bidirectional * self.patches * (self.patches - 1) // 2

    def teacher_flops(self) -> int:
        """Return the operations of the teacher's evaluations, all counted as guided; 0 without distillation."""
        distil, config = self.recipe.distil, self.teacher
        if config is None or distil.teacher_steps is None:
            return 0
        passes = self.flops(config, 0)
        if distil.guidance_scale != 1:
            images = [(self.side, self.side)] * self.images
            passes += step_flops(config, self.images * self.patches, self.images * self.image_pairs(), 0, images)
        return distil.teacher_steps // distil.steps * passes // 3

    def flops(self, config: ModelConfig, predictions: int, frozen: Frozen = "none") -> int:
        """Return the operations of a network's forward and backward pass over the step."""
        text = self.positions - self.images * (self.patches + TEXT_POSITIONS) - self.copies * self.patches
        document = self.recipe.data.row_length or TEXT_POSITIONS  # of text alone: at most a row, where rows are packed
        pairs = self.images * self.image_pairs(TEXT_POSITIONS) + self.copies * self.image_pairs()
        pairs += text * (document + 1) // 2
        load = self.load(1)
        sizes = [size for size, count in load.images.items() for _ in range(count)]
        return step_flops(config, load.positions, pairs, predictions, sizes, frozen)


def memory(
    config: ModelConfig,
    load: Load,
    checkpointing: Checkpointing,
    element: int = 2,
    gpus: int = 1,
    shard: int = 1,
    optimizer: OptimizerConfig | None = None,
    freeze: Freeze = "none",
    lora: LoRAConfig | None = None,
) -> dict[str, int]:
    """Return the memory of a GPU, in bytes by piece, in a step whose micro-batch is `load`.

    element       bytes of the compute dtype
    gpus, shard   the GPUs of the run, and the parts that each copy of the network is sharded into

    weights, gradients, moments, EMA   4, 4, 8 and 4 bytes a parameter, float32, divided among shards; the last three of
                  trained parameters alone. Muon keeps one moment of the blocks' matrices, where AdamW keeps two
    gathered      on one GPU, each product's cast of its weight, kept for the backward pass (with recomputation, of one
                  block), and one matrix's gradient in that dtype; nothing in float32. On several (FSDP2), what is
                  outside the blocks, with a gradient, and of the blocks one computed with, one waiting, one arriving,
                  and one with its gradient in that dtype and in float32: derived from FSDP2's code, not measured.
    activations   kept by the forward pass, recomputed in the backward pass, and their gradients
    logits        the largest chunk in float32, its softmax and gradient, as far as the backward pass needs less later

    The total is their sum: the peak, within 10 % of what is measured, casts that are freed early included.
    """
    total, block, embedding = _parameters(config)
    outside = total - config.n_layers * block
    if gpus > 1:
        gathered = 2 * element * outside + (4 * element + 4) * block
    elif element == 4:
        gathered = 0
    else:
        largest = max(embedding, 2 * config.d_model * config.ffn_dim)
        casts = config.n_layers if checkpointing == "none" else 1
        gathered = element * (outside - embedding + casts * block + largest)
    counted = _counted(config, optimizer or OptimizerConfig(), freeze, lora or LoRAConfig())
    part, trained, moments = (-(-count // shard) for count in counted)
    activations = step_bytes(config, load, element, checkpointing)
    later = activations - forward_bytes(config, load, element, checkpointing)
    return {
        "weights": 4 * part,
        "gradients": 4 * trained,
        "moments": 4 * moments,
        "ema": 4 * trained,
        "gathered": gathered,
        "activations": activations,
        "logits": max(0, 12 * min(MAX_LOGITS, load.predictions * config.vocab_size) - later),
    }


def sent_bytes(config: ModelConfig, gpus: int, shard: int, element: int = 2) -> dict[str, int]:
    """Return the bytes that each GPU sends for a micro-batch whose parameters are all trained, by purpose.

    Of what is to be combined over n GPUs a ring sends (n - 1) / n from each. The arguments are those of `memory`.

    gather      weights in the compute dtype: of blocks forward and backward, of the others, which stay, once
    scatter     gradients in float32, summed and scattered to the shards
    replicate   gradients of a shard in float32, all-reduced over the copies of the network, which sends them twice
    """
    total, block, _ = _parameters(config)
    copies = gpus // shard
    return {
        "gather": element * (total + config.n_layers * block) * (shard - 1) // shard,
        "scatter": 4 * total * (shard - 1) // shard,
        "replicate": 8 * total * (copies - 1) // copies // shard,
    }


@lru_cache(maxsize=64)
def _parameters(config: ModelConfig) -> tuple[int, int, int]:
    """Return the parameters in all, of one block, and of the embedding, which no product reads."""
    model = Transfusion.on_meta(config)
    block = sum(weight.numel() for weight in model.transformer.blocks[0].parameters())
    return sum(weight.numel() for weight in model.parameters()), block, model.embedding.weight.numel()


@lru_cache(maxsize=64)
def _counted(config: ModelConfig, optimizer: OptimizerConfig, freeze: Freeze, lora: LoRAConfig) -> tuple[int, int, int]:
    """Return the numbers of all parameters, of those that are trained, and of the moments that an optimizer keeps."""
    model = adapt(Transfusion.on_meta(config), freeze, lora, SequenceFormat(0, 1, 2, 3, 1))
    matrices = block_matrices(model) if optimizer.name == "muon" else {}
    trained = {name: weight.numel() for name, weight in model.named_parameters() if weight.requires_grad}
    moments = sum(size if name in matrices else 2 * size for name, size in trained.items())
    return sum(weight.numel() for weight in model.parameters()), sum(trained.values()), moments


def _choices(step: StepContents, gpus: int, usable: float) -> Iterator[dict[str, Any]]:
    """Yield ways to run, fastest first: recomputation costs more than communication, least within a node.

    Each has the largest micro-batch, a power of two, that fits into `usable` bytes; else the smallest.
    """
    recipe, share = step.recipe, step.recipe.data.batch_size // gpus
    spreads = [("replicated" if gpus > 1 else "one GPU", gpus, 1)]  # name, copies, shards of each
    if gpus > NODE:
        spreads.append((f"HSDP, nodes of {NODE}", gpus // NODE, NODE))
    if gpus > 1:
        spreads.append((f"sharded over {gpus}", 1, gpus))
    for way, (name, replicate, shard) in itertools.product(get_args(Checkpointing), spreads):
        documents = 2 * (share & -share)  # twice the largest power of two that divides the share
        fits = False
        while not fits and documents > 1:
            documents //= 2
            load = step.load(recipe.data.batch_size / documents)
            element = 4 if recipe.precision == "float32" else 2
            pieces = memory(recipe.model, load, way, element, gpus, shard, recipe.optimizer, recipe.freeze, recipe.lora)
            pieces["weights"] += step.teacher_bytes
            pieces["total"] = sum(pieces.values())
            fits = pieces["total"] <= usable
        sent = recipe.model, gpus, shard
        yield {
            "sharding": name,
            "replicate": replicate,
            "shard": shard,
            "activation_checkpointing": way,
            "micro_batch": documents,
            "micro_batch_positions": load.positions,
            "accumulate": share // documents,
            "memory_gigabytes": {name: round(size / 2**30, 3) for name, size in pieces.items()},
            "sent_gigabytes": round(share // documents * sum(sent_bytes(*sent, element).values()) / 2**30, 3),
            "fits": fits,
        }


PLANNED = {"--data.accumulate", *(f"--parallel.{name}" for name in ("replicate", "tensor", "activation-checkpointing"))}
"""options that a plan determines"""


def _launch(recipe: Recipe, autoencoder: str, choice: dict[str, Any], config: Path | None) -> str | None:
    """Return the command, to be given on each node, with the first node's name in $HEAD; None if nothing names it."""
    gpus, name = choice["replicate"] * choice["shard"], recipe.preset
    if name in PRESETS:
        base, given = preset(name), name
    elif config is not None:
        name = name or config.stem
        base, given = updated(Recipe(), read_settings(config), str(config)), f"--config {shlex.quote(str(config))}"
    else:
        return None
    start = "transfuse"
    if gpus > 1:
        nodes = gpus // NODE if gpus > NODE else 1
        several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 " if nodes > 1 else ""
        start = f"torchrun --nproc-per-node {gpus // nodes} {several}-m transfuse --"
    words = [f"{start} train {given} --run {shlex.quote(f'runs/{name}')}"]
    before = dict(_options(to_dict(base)))
    for option, value in _options(to_dict(recipe)):
        if value == before[option] or option in PLANNED:
            continue
        if isinstance(value, bool):
            group, _, last = option[2:].rpartition(".")
            words.append(option if value else f"--{group}{'.' if group else ''}no-{last}")
        else:
            values = value if isinstance(value, list) else [value]
            words.append(" ".join([option, *(shlex.quote(str(item)) for item in values)]))
    words += [
        f"--parallel.replicate {choice['replicate']} --parallel.tensor 1",
        f"--parallel.activation-checkpointing {choice['activation_checkpointing']}",
        f"--data.accumulate {choice['accumulate']}",
    ]
    if autoencoder in AUTOENCODERS and autoencoder not in bundled():  # to be trained first
        words.append(f"--data.autoencoder runs/{autoencoder}/export")
    return " ".join(words)


def _options(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of `transfuse train` with their values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _options(value, f"{prefix}{name}.")
        else:
            yield "--" + f"{prefix}{name}".replace("_", "-"), value
