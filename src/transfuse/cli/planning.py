"""`transfuse plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from ..errors import UserError
from ..plan import cluster_plan
from ..plan import plan as figures
from ..recipes import PRESETS, Recipe
from .options import Config, Flat, Json, Positional, one_of, print_json


def plan(
    recipe: Annotated[Recipe, Flat],
    preset: Positional[Annotated[str | None, one_of(PRESETS, "PRESET")]] = None,
    *,
    config: Config = None,
    gpus: int = 1,
    gpu: str | None = None,
    mfu: float | None = None,
    json: Json = False,
) -> int:
    """Show a preset's cost: parameters, operations, memory; with a card, also time and the command to start it.

    $ transfuse plan 7b --gpus 64 --gpu h100 --data.batch-size 1024

    Every setting of the recipe is an option, as it is of transfuse train.

    Args:
        gpus: cards, on nodes of 8
        gpu: card to plan for: a100-40, a100, h100, h200, b200, l40s, rtx4090, ...; None: figures of the recipe alone
        mfu: share of the card's peak that training is taken to reach; None: 0.40, an assumption
    """
    if gpu is None and (gpus, mfu) != (1, None):
        raise UserError("plan: expected a card (--gpu h100) with --gpus or --mfu, found none")
    costs = figures(recipe)
    spread = {} if gpu is None else cluster_plan(recipe, gpus, gpu, mfu)
    if json:
        print_json({**costs, **spread})
        return 0
    for name, value in costs.items():
        print(f"{name:<32} {value:,}" if isinstance(value, int | float) else f"{name:<32} {value}")
    if spread:
        print("\n" + "\n".join(_lines(spread)))
    return 0


PIECES = ("weights", "gradients", "moments", "ema", "gathered", "activations", "logits", "total")
AGAIN = {"none": "nothing", "selective": "some", "full": "all"}


def _lines(spread: dict[str, Any]) -> Iterator[str]:
    """The plan on given GPUs, for a person."""
    yield (
        f"{spread['gpus']} x {spread['gpu']}: gigabytes of memory on each, which has {spread['card_gigabytes']:g}, "
        f"{spread['usable_gigabytes']:.1f} to be used"
    )
    yield f"{'':<18}{'recomputed':<11}" + "".join(f"  {name}" for name in PIECES) + "  micro-batches"
    for choice in spread["choices"]:
        sizes = "".join(f"{choice['memory_gigabytes'][name]:>{len(name) + 2}.1f}" for name in PIECES)
        yield f"{choice['sharding']:<18}{AGAIN[choice['activation_checkpointing']]:<11}{sizes}  {_batches(choice)}"
    yield ""
    best, step = spread["recommended"], spread["step"]
    rows = {"recommended": "nothing fits: more GPUs, or larger ones"}
    if best:
        again = AGAIN[best["activation_checkpointing"]]
        rows["recommended"] = (
            f"{best['sharding']}, {again} recomputed; a step is {_batches(best)} positions on each GPU"
        )
    rows["mfu"] = (
        f"{spread['mfu']:.2f} of {spread['peak_flops']:.4g} operations a second, {spread['mfu_is']}, not measured; "
        "what is recomputed does not count"
    )
    rows["step_flops"] = f"{step['flops']:.4g} (6 N D); {step['executed_flops']:.4g} executed"
    rows["seconds_a_step"] = f"{step['seconds']:.3g} for {step['positions']:,} positions"
    rows["tokens_per_second"] = f"{step['tokens_per_second']:,.0f}"
    for name, run in spread["runs"].items():
        days, hours = _number(run["days"]), _number(run["gpu_hours"])
        rows[name] = f"{run['tokens']:.4g} tokens in {days} days, {hours} GPU-hours"
    yield from (f"{name:<32} {value}" for name, value in rows.items())
    if spread["launch"]:
        yield f"\n{spread['launch']}"


def _batches(choice: dict[str, Any]) -> str:
    return f"{choice['accumulate']} x {choice['micro_batch_positions']:,}" if choice["fits"] else "does not fit"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
