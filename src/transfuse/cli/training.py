"""`transfuse train`, `transfuse tune`, `transfuse demo` and `transfuse plan`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from ..data.readers import Columns
from ..demo import run_demo
from ..errors import UserError
from ..log import logger
from ..plan import cluster_plan
from ..plan import plan as plan_of
from ..recipes import Recipe
from ..train import Trained
from ..train import train as train_model
from ..training import RESUMABLE, stopped_code
from ..tune import tune_model
from .options import Config, Flat, Json, Positional, Preset, RunFolder, print_json, run_folder


def train(
    recipe: Annotated[Recipe, Flat],
    preset: Positional[Preset] = None,
    *,
    config: Config = None,
    run: RunFolder = None,
    json: Json = False,
) -> int:
    """Train a preset, or resume a run.

    $ transfuse train demo --run runs/mine --loop.steps 500
    $ transfuse train --config settings.yaml

    Every setting of the recipe is an option. The same command resumes from the newest checkpoint; Ctrl-C saves
    and exits with code 75. On several processes:

    $ torchrun --nproc-per-node 8 -m transfuse -- train demo --run runs/mine
    """
    folder = run_folder(run, recipe.preset, config)
    return _finished(train_model(recipe, folder), folder, json)


def distil(
    recipe: Annotated[Recipe, Flat],
    model: Positional[str],
    *,
    steps: int = 4,
    config: Config = None,
    run: RunFolder = None,
    json: Json = False,
) -> int:
    """Teach a model to draw in few steps without guidance, with another model as its teacher.

    $ transfuse distil runs/demo/export --steps 4 --run runs/demo-4-steps

    The data are those that the teacher was trained on: of its run, in whose folder it is, or else of its preset. Every
    setting of the recipe is an option. The same command resumes from the newest checkpoint, as with transfuse train.

    Args:
        model: export folder of the teacher, or a bundled model's name
        steps: denoising steps of the student
    """
    recipe = replace(recipe, start=model, distil=replace(recipe.distil, steps=steps))
    folder = run or Path("runs") / f"{recipe.preset}-{steps}-steps"
    return _finished(train_model(recipe, folder), folder, json)


def _finished(trained: Trained, folder: Path, json: bool) -> int:
    """Report a trained model, or that the run was stopped; return the exit code."""
    if trained.export is None:
        return stopped_code(trained.trainer.ranks)
    if not trained.trainer.ranks.first:
        return 0
    prompt = next(iter(trained.run.sources.held_out_prompts(1)), "a crab on a blue background")
    logger.info(f"{trained.export}: exported; try: transfuse generate {shlex.quote(prompt)} --model {trained.export}")
    if json:
        step, totals = trained.trainer.step, trained.trainer.totals
        print_json({"run": str(folder), "step": step, "export": str(trained.export), **totals})
    return 0


def tune(
    model: Positional[str],
    pictures: Positional[str],
    *,
    run: Path | None = None,
    lora: int = 0,
    replay: float = 0.3,
    heldout: float = 0.1,
    steps: int | None = None,
    patience: int = 0,
    batch_size: int = 32,
    max_errors: float = 0.01,
    columns: Annotated[Columns, Flat] = Columns(),  # noqa: B008
    json: Json = False,
) -> int:
    """Teach a model your own images, and show what it draws and says before and after.

    $ transfuse tune small-64 photos/ --run runs/photos

    Builds a data set with the model's tokenizer and image size, mixes it with what the model learned from, trains,
    exports the weights and writes a page. The same command resumes.

    Args:
        model: an export's folder, or a bundled model's name
        pictures: a folder of images with captions, or whatever transfuse data build reads, or a data set
        run: folder for data set, run, export and page; runs/NAME of the images if not given
        lora: rank of adapters that are trained in place of all weights; 0: all weights
        replay: share that comes from what the model learned from, so that it is not forgotten
        heldout: share of the images that is not learned, to measure by; a data set has its own
        steps: of training; by the number of images if not given
        patience: number of evaluations (20 a run) without a better image loss of held-out pairs that ends the run, with
            the best weights; 0: learn to the end
        batch_size: documents in a step
        max_errors: share of faulty images let pass; ten always are
    """
    folder = run or Path("runs") / (Path(pictures).name or "tuned")
    options = {"lora": lora, "replay": replay, "heldout": heldout, "steps": steps, "patience": patience}
    options |= {"batch_size": batch_size, "max_errors": max_errors}
    tuned = tune_model(model, pictures, folder, **options, columns=columns)  # type: ignore[arg-type]
    if tuned.export is None:
        return RESUMABLE
    logger.info(f"{tuned.export}: exported; try: transfuse generate PROMPT --model {tuned.export}")
    if json:
        print_json(
            {name: str(getattr(tuned, name)) for name in ("run", "export", "report")} | {"numbers": tuned.numbers}
        )
    return 0


def demo(*, run: Path = Path("runs/demo"), minutes: float = 8.0, json: Json = False) -> int:
    """Train a small Transfusion on this machine, then draw, caption and write with it, and report.

    $ transfuse demo --run runs/demo

    Args:
        run: folder for the run and its report; a finished part is not done again
        minutes: most minutes of training
    """
    code, report = run_demo(run, minutes)
    if json:
        print_json(report)
    return code


def plan(
    recipe: Annotated[Recipe, Flat],
    preset: Positional[Preset] = None,
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
    costs = plan_of(recipe)
    spread = {} if gpu is None else cluster_plan(recipe, gpus, gpu, mfu, config)
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
    """Yield the printed lines of a plan on given GPUs."""
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
        days, hours = (f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in (run["days"], run["gpu_hours"]))
        rows[name] = f"{run['tokens']:.4g} tokens in {days} days, {hours} GPU-hours"
    yield from (f"{name:<32} {value}" for name, value in rows.items())
    if spread["launch"]:
        yield f"\n{spread['launch']}"


def _batches(choice: dict[str, Any]) -> str:
    return f"{choice['accumulate']} x {choice['micro_batch_positions']:,}" if choice["fits"] else "does not fit"
