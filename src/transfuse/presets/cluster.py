"""A recipe on given GPUs: ways to spread it, what fits, how long it takes, and the line that starts it.

A micro-batch is counted in documents of average length, or in rows: documents vary, so that a few of them may take more
than is planned; `--data.row-length` makes all micro-batches alike.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from ..autoencoders import bundled
from ..config import to_dict
from ..errors import UserError
from ..model.activations import Checkpointing
from ..training.hardware import ASSUMED_MFU, card
from . import preset
from .autoencoders import AUTOENCODERS
from .memory_plan import Memory, Spread, memory
from .paper import POSITIONS_PER_STEP
from .plan import StepContents, fitted, plan
from .recipe import Recipe

NODE = 8
"""GPUs of a node"""
SPARE = 0.10
"""share of a card's memory that stays free: for what is in no tensor (contexts, communication, gaps between blocks)"""
ENOUGH = 4096
"""positions at once that keep a card busy and hide the gathering of shards: one sequence of the paper"""
PAPER_RUNS = {"paper_0.5t": 250_000 * POSITIONS_PER_STEP, "paper_2t": 500_000 * 2 * POSITIONS_PER_STEP}
"""tokens of the paper's controlled runs (section 4.1) and of its largest (section 4.4)"""


@dataclass(frozen=True)
class Choice:
    """A way to spread a run, with the largest micro-batch (positions, documents or rows of one GPU) that fits."""

    spread: Spread
    checkpointing: Checkpointing
    documents: int
    positions: int
    accumulate: int
    memory: Memory
    fits: bool

    @property
    def figures(self) -> dict[str, Any]:
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
    """Figures by name; gigabytes are of 2^30 bytes. Nothing of it is measured.

    choices            ways to shard and to recompute, each with the largest micro-batch that fits
    recommended        the first of them, in order of speed, whose micro-batch keeps the card busy; None: nothing fits
    step               operations (6 N D, and executed) and seconds of a step; tokens_per_second
    runs               tokens, days and GPU-hours of the recipe, and of as many tokens as the paper's runs
    launch             the command; None where nothing fits

    Raises UserError for a card that is not known, or GPUs between which a step can not be divided.
    """
    found = card(gpu)
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu: expected a share above 0 and up to 1, found {mfu:g}")
    recipe = fitted(recipe)
    _check(recipe, gpus)
    reached, step = mfu or ASSUMED_MFU, StepContents.of(recipe)
    executed, theoretical = step.executed_flops(recipe), plan(recipe)["train_flops_per_token"] * step.positions
    seconds = executed / (reached * found.flops * gpus)
    every = [_choice(recipe, step, spread, way, found.memory) for way, spread in _ways(gpus)]
    best = _recommended(every, step.positions // gpus)
    tokens = {"recipe": step.positions * recipe.loop.steps, **PAPER_RUNS}
    hours = {name: count / step.positions * seconds / 3600 for name, count in tokens.items()}
    return {
        "gpus": gpus,
        "gpu": gpu.lower(),
        "peak_flops": found.flops,
        "card_gigabytes": found.memory / 2**30,
        "usable_gigabytes": (1 - SPARE) * found.memory / 2**30,
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
        "choices": [choice.figures for choice in every],
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
    """The fastest first: what is computed again costs more than what is sent, and that less within a node."""
    spreads = [Spread("replicated" if gpus > 1 else "one GPU", gpus)]
    if gpus > NODE:
        spreads.append(Spread(f"HSDP, nodes of {NODE}", gpus // NODE, NODE))
    if gpus > 1:
        spreads.append(Spread(f"sharded over {gpus}", 1, gpus))
    for way in get_args(Checkpointing):
        for spread in spreads:
            yield way, spread


def _choice(recipe: Recipe, step: StepContents, spread: Spread, way: Checkpointing, card_memory: int) -> Choice:
    """With the largest micro-batch, of those a power of two, that fits; with the smallest where none does."""
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
    """The fastest whose micro-batch is enough to keep a card busy, or all of its `share` of positions; where there is
    none, that with the largest."""
    fitting = [choice for choice in choices if choice.fits]
    enough = (choice for choice in fitting if choice.positions >= min(share, ENOUGH))
    return next(enough, max(fitting, key=lambda choice: choice.positions, default=None))


def _launch(recipe: Recipe, choice: Choice) -> str:
    """One line; on more than one node it is said on each, with the first one's name in $HEAD."""
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
"""options that a plan chooses"""


def _settings(recipe: Recipe) -> Iterator[str]:
    """Options of `transfuse train` by which a recipe differs from its preset."""
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
            yield " ".join([option, *(shlex.quote(str(one)) for one in values)])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
