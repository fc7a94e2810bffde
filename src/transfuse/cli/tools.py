"""`transfuse export` and `doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ..errors import UserError
from ..folders import find_export, is_export
from ..version import __version__
from .parsing import parse, print_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Export:
    """Write the averaged weights of a run's newest checkpoint as a folder to load and share; or an export in another
    layout.

    transfuse export runs/demo --out my-model --dtype float16
    """

    run: tyro.conf.Positional[Path]
    """folder of a run, or of an export; or a bundled model's name"""
    out: Path | None = None
    """a new folder, or an earlier export, which is replaced; the run's own export/ (llama/, diffusers/) if not given"""
    format: Literal["transfuse", "diffusers", "llama"] = "transfuse"
    """diffusers: the same files in diffusers' layout, loaded as any export is; llama: the trunk alone, with the
    tokenizer, as a folder that transformers opens as LlamaForCausalLM"""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """store the network's weights in it; as they are if not given"""
    json: bool = False
    """end with one line of JSON"""


def export(arguments: Sequence[str]) -> int:
    """Write a run's newest checkpoint as a model folder."""
    from tempfile import TemporaryDirectory

    from ..convert.llama_folder import save_llama
    from ..export import relayout
    from ..recipes import Recipe
    from ..recipes.autoencoders import AutoencoderRecipe
    from ..runs import is_kind, read_recipe, resolve
    from ..train import averaged_model, build_trainer, export_run
    from ..train_autoencoder import build_autoencoder_trainer, export_autoencoder, resolve_autoencoder

    options = parse(Export, arguments, "export")
    options = replace(options, run=find_export(options.run))
    if not options.run.is_dir():
        raise UserError(
            f"{options.run}: expected a run folder, found {'a file' if options.run.exists() else 'nothing'}"
        )
    if options.format == "llama" and options.dtype:
        raise UserError(f"{options.run}: expected no --dtype with --format llama, found {options.dtype}")
    name = "export" if options.format == "transfuse" else options.format
    config, out = options.run / "config.json", options.out or options.run / name
    if is_export(options.run):
        return _relayout(options)
    missing = UserError(f"{options.run / 'checkpoints'}: expected a complete checkpoint, found none")
    if is_kind(config, AutoencoderRecipe):
        if options.format != "transfuse":
            raise UserError(f"{options.run}: expected a model's run for --format {name}, found an autoencoder's")
        if options.dtype:
            raise UserError(
                f"{options.run}: expected no --dtype, for autoencoders are kept in float32, found {options.dtype}"
            )
        autoencoder_run = resolve_autoencoder(read_recipe(config, AutoencoderRecipe))
        trainer = build_autoencoder_trainer(autoencoder_run, options.run)
        if not trainer.restore():
            raise missing
        export_autoencoder(autoencoder_run, trainer, out)
    else:
        run = resolve(read_recipe(config, Recipe), options.run / "tokenizer.json")
        trainer = build_trainer(run, options.run)
        if not trainer.restore():
            raise missing
        if options.format == "llama":
            model = averaged_model(run.recipe, trainer.averaged())
            save_llama(out, model, run.tokenizer.bos, run.tokenizer.eos, run.tokenizer)
        else:
            with TemporaryDirectory() as aside:
                made = export_run(run, trainer, Path(aside) / "export")
                relayout(made, out, options.format, _dtype(options))
    if options.json:
        print_json({"export": str(out), "step": trainer.step})
    else:
        print(out)
    return 0


def _dtype(options: Export) -> torch.dtype | None:
    import torch

    dtype: torch.dtype | None = getattr(torch, options.dtype) if options.dtype else None
    return dtype


def _relayout(options: Export) -> int:
    from ..export import relayout

    if options.format == "llama":
        raise UserError(f"{options.run}: expected a run for --format llama, found an export")
    if options.out is None:
        raise UserError(f"{options.run}: expected --out, a folder for the export in the other layout, found none")
    out = relayout(options.run, options.out, options.format, _dtype(options))
    if options.json:
        print_json({"export": str(out)})
    else:
        print(out)
    return 0


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: versions, threads, bfloat16, cards, what processes speak by, disk, and what is missing.

    transfuse doctor
    """

    json: bool = False
    """end with one line of JSON"""


def doctor(arguments: Sequence[str]) -> int:
    """Check this machine for what Transfuse needs."""
    import importlib.util
    import os
    import platform
    import shutil

    import torch
    import torch.distributed as dist

    from ..recipes import Recipe
    from ..runs import settle_device

    options = parse(Doctor, arguments, "doctor")
    extras = (
        *("diffusers", "transformers", "tensorboard", "wandb", "trackio", "torchao", "open_clip", "lm_eval", "fastapi"),
        *("pyarrow", "sentencepiece", "s3fs", "gcsfs"),
    )
    backends = {"nccl": dist.is_nccl_available, "gloo": dist.is_gloo_available} if dist.is_available() else {}
    facts: dict[str, Any] = {
        "transfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cards": [_card(torch.cuda.get_device_name(number)) for number in range(torch.cuda.device_count())],
        "processes_speak_by": [name for name, available in backends.items() if available()],
        "precision": settle_device(Recipe()).precision,
        "free_disk_gigabytes": round(shutil.disk_usage(".").free / 2**30, 1),
        "folder_writable": os.access(".", os.W_OK),
        "optional": {name: importlib.util.find_spec(name) is not None for name in extras},
    }
    problems = []
    if facts["free_disk_gigabytes"] < 2:
        problems.append(f"disk: expected at least 2 GB free, found {facts['free_disk_gigabytes']}")
    if not facts["folder_writable"]:
        problems.append("folder: expected to be writable, found read-only")
    facts["problems"] = problems
    if options.json:
        print_json(facts)
    else:
        for name, value in facts.items():
            print(f"{name:<22} {value}")
        print("everything needed is here" if not problems else "\n".join(problems))
    return 2 if problems else 0


def _card(name: str) -> str:
    from ..training.hardware import peak_flops

    peak = peak_flops(name)
    return f"{name} ({'peak not known: no mfu' if peak is None else f'{peak / 1e12:g} TFLOPS in bfloat16'})"
