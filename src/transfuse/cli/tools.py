"""`transfuse export`, `convert`, `doctor`, `study` and `completion`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
import shutil
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import tyro

from ..config import nearest
from ..errors import UserError, install_command
from ..folders import find_export, is_export
from ..version import __version__
from .options import Json, Positional, Words, print_json, print_result, registry

if TYPE_CHECKING:
    import torch

EXTRAS = (
    *("diffusers", "transformers", "tensorboard", "wandb", "trackio", "torchao", "open_clip", "lm_eval", "fastapi"),
    *("pyarrow", "sentencepiece", "gguf", "s3fs", "gcsfs"),
)
"""optional packages that `doctor` looks for"""
STUDIES: dict[str, str] = {
    "scaling": "train variants of several sizes on several budgets and fit power laws (Figure 5)",
    "ablations": "train the rows of Tables 4 to 8 and compare each difference with the paper's",
    "since": "train the open ablation table: what the field measured since 2024, one switch a row",
    "editing": "fine-tune a model on edits and measure it before and after (section 4.4)",
    "baselines": "train Transfusion, Chameleon and Llama on equal compute and measure them alike",
    "race": "seconds of training until scores reach the leaderboard's aims, or those of another run",
}
"""module of `experiments`, and what it does"""
RENAMED = {"rivals": "baselines", "image-editing": "editing"}


def export(
    run: Positional[Path],
    *,
    out: Path | None = None,
    format: Literal["transfuse", "diffusers", "llama"] = "transfuse",
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    json: Json = False,
) -> int:
    """Write the averaged weights of a run's newest checkpoint as a model folder; or an export in another layout.

    $ transfuse export runs/demo --out my-model --dtype float16

    Args:
        run: folder of a run, or of an export; or a bundled model's name
        out: a new folder, or an earlier export, which is replaced; the run's own export/ (llama/, diffusers/) if not
            given
        format: diffusers: the same files in diffusers' layout, loaded as any export is; llama: the transformer alone,
            with the tokenizer, as a folder that transformers opens as LlamaForCausalLM
        dtype: store the network's weights in it; as they are if not given
    """
    import torch

    from ..export import relayout

    run = find_export(run)
    if not run.is_dir():
        raise UserError(f"{run}: expected a run folder, found {'a file' if run.exists() else 'nothing'}")
    if format == "llama" and dtype:
        raise UserError(f"{run}: expected no --dtype with --format llama, found {dtype}")
    kind = None if dtype is None else getattr(torch, dtype)
    if is_export(run):
        if format == "llama":
            raise UserError(f"{run}: expected a run for --format llama, found an export")
        if out is None:
            raise UserError(f"{run}: expected --out, a folder for the export in the other layout, found none")
        report: dict[str, Any] = {"export": str(relayout(run, out, format, kind))}
    else:
        out = out or run / ("export" if format == "transfuse" else format)
        report = {"export": str(out), "step": _export_run(run, out, format, kind)}
    return print_result(json, report, report["export"])


def _export_run(
    folder: Path, out: Path, format: Literal["transfuse", "diffusers", "llama"], dtype: torch.dtype | None
) -> int:
    """Export the newest checkpoint of a run, of a model or an autoencoder; return its step."""
    from ..convert.hf_folder import save_hf_folder
    from ..export import relayout
    from ..recipes import AutoencoderRecipe, Recipe
    from ..runs import is_kind, read_recipe, resolve
    from ..runs.monitor import averaged_model
    from ..train import build_trainer, export_run
    from ..train_autoencoder import build_autoencoder_trainer, export_autoencoder, resolve_autoencoder

    config = folder / "config.json"
    missing = UserError(f"{folder / 'checkpoints'}: expected a complete checkpoint, found none")
    if is_kind(config, AutoencoderRecipe):
        if format != "transfuse":
            raise UserError(f"{folder}: expected a model's run for --format {format}, found an autoencoder's")
        if dtype:
            name = str(dtype).removeprefix("torch.")
            raise UserError(f"{folder}: expected no --dtype, for autoencoders are kept in float32, found {name}")
        autoencoder_run = resolve_autoencoder(read_recipe(config, AutoencoderRecipe))
        trainer = build_autoencoder_trainer(autoencoder_run, folder)
        if not trainer.restore():
            raise missing
        export_autoencoder(autoencoder_run, trainer, out)
        return trainer.step
    run = resolve(read_recipe(config, Recipe), folder)
    trainer = build_trainer(run, folder)
    if not trainer.restore():
        raise missing
    if format == "llama":
        save_hf_folder(out, averaged_model(run.recipe, trainer.averaged()), run.tokenizer)
    else:
        with TemporaryDirectory() as aside:
            relayout(export_run(run, trainer, Path(aside) / "export"), out, format, dtype)
    return trainer.step


def convert(
    source: Positional[Path],
    out: Positional[Path],
    *,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    json: Json = False,
) -> int:
    """Unpack a GGUF file into a Hugging Face folder, for `transfuse train --start` (needs the extra gguf).

    $ transfuse convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2

    Args:
        source: the GGUF file; quantised weights stay as coarse as they are
        out: a new folder, or an earlier one, which is replaced
        dtype: store the weights in it
    """
    import torch

    from ..convert.gguf import gguf_to_folder

    folder = str(gguf_to_folder(source, out, getattr(torch, dtype)))
    return print_result(json, {"folder": folder}, folder)


def doctor(*, json: Json = False) -> int:
    """Check this machine: versions, threads, bfloat16, cards, communication backends, disk, and say what to do next.

    $ transfuse doctor
    """
    import torch
    import torch.distributed as dist

    from ..recipes import Recipe
    from ..runs import settle_device
    from ..training.hardware import peak_flops

    cards = []
    for name in map(torch.cuda.get_device_name, range(torch.cuda.device_count())):
        peak = peak_flops(name)
        cards.append(f"{name} ({'peak not known: no mfu' if peak is None else f'{peak / 1e12:g} TFLOPS in bfloat16'})")
    backends = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available} if dist.is_available() else {}
    facts: dict[str, Any] = {
        "transfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cards": cards,
        "processes_speak_by": [name for name, available in backends.items() if available()],
        "precision": settle_device(Recipe()).precision,
        "free_disk_gigabytes": round(shutil.disk_usage(".").free / 2**30, 1),
        "folder_writable": os.access(".", os.W_OK),
        "optional": {name: importlib.util.find_spec(name) is not None for name in EXTRAS},
    }
    problems = []
    if facts["free_disk_gigabytes"] < 2:
        free = facts["free_disk_gigabytes"]
        problems.append(f"disk: expected at least 2 GB free, found {free}; free some, or run in a folder elsewhere")
    if not facts["folder_writable"]:
        problems.append("folder: expected to be writable, found read-only; change to one that is yours")
    facts["problems"] = problems
    facts["next"] = [] if problems else _next_steps(cards, facts["precision"])
    if json:
        print_json(facts)
    else:
        for name, value in facts.items():
            if name not in ("problems", "next"):
                print(f"{name:<22} {value}")
        print("\n".join(problems) or "everything needed is here")
        print("\n".join(f"next: {step}" for step in facts["next"]))
    return 2 if problems else 0


def _next_steps(cards: list[str], precision: str) -> list[str]:
    """Return commands that this machine can run now, each with what it gives."""
    from ..folders import trained_exports

    trained = next(iter(trained_exports()), None)
    model = f" --model {trained}" if trained else ""
    steps = [f'transfuse generate "a crab on a blue background"{model}    # an image']
    if not trained:
        minutes = "" if cards or precision == "bfloat16" else " --minutes 25"
        steps.append(f"transfuse demo{minutes}    # train a small model and look at what it draws")
    if cards:
        steps.append("transfuse plan 0.16b    # what a size of the paper costs on this card")
    for extra, package in (("serve", "fastapi"), ("report", "matplotlib")):
        if importlib.util.find_spec(package) is None:
            steps.append(f"{install_command(extra)}    # the extra {extra}")
    return steps


def study(words: Words) -> int:
    """Run the experiments: scaling, ablations, since, editing, baselines, race; from a checkout of the repository.

    $ transfuse study scaling --sizes xs s m l --budgets 1e6 2e6 4e6

    The experiments; transfuse study NAME --help lists the options of each:
    """
    if not words or words[0] in ("-h", "--help"):
        print(inspect.getdoc(study))
        print("\n".join(f"  {name:<12} {about}" for name, about in STUDIES.items()))
        return 0
    name, *rest = words
    if name in RENAMED:
        raise UserError(f"study: {name} is now called {RENAMED[name]}")
    if name not in STUDIES:
        raise UserError(f'study: unknown name "{name}"{nearest(name, STUDIES)}')
    root = checkout()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    code, report = importlib.import_module(f"experiments.{name}").main(rest)
    if "--json" in rest and not code:
        print_json(report)
    return int(code)


def checkout(package: Path = Path(__file__)) -> Path:
    """Return the repository's root, that of this package or the working folder. Raises UserError outside one."""
    for root in (package.parents[3], Path.cwd()):
        if (root / "experiments" / "scaling.py").is_file():
            return root
    raise UserError("study: the experiments are not in the package; clone the repository and run the command there")


def completion(shell: Positional[Literal["bash", "zsh", "fish"]]) -> int:
    """Print a script that completes commands and options.

    $ eval "$(transfuse completion bash)"

    In a shell's start file the line above works for bash and zsh; for fish: transfuse completion fish | source

    Args:
        shell: bash, zsh or fish
    """
    from . import COMMANDS

    app = tyro.extras.SubcommandApp()
    groups: dict[str, tyro.extras.SubcommandApp] = {"": app}
    for name, (module, about) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        function: Any = getattr(importlib.import_module(f".{module}", __package__), last)
        hints = get_type_hints(function)
        if "recipe" in hints:
            function = partial(function, recipe=hints["recipe"]())
        if group not in groups:
            groups[group] = app.command(tyro.extras.SubcommandApp(), name=group)
        groups[group].command(name=last, help=about)(function)
    app.cli(prog="transfuse", args=["--tyro-write-completion", shell, "-"], registry=registry)
    return 0
