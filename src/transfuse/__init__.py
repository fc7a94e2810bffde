"""Transfuse: models that write and draw with one transformer.

import transfuse
pipe = transfuse.load("small-64")             # the bundled model, an export folder, or "org/name" on the Hub
pipe("a crab on a blue background").images[0].save("crab.png")
trained = transfuse.train(transfuse.preset("tiny"))           # in runs/tiny, or a folder that is named
transfuse.curves("runs/tiny")                 # its losses, as charts in a notebook
transfuse.evaluate("runs/tiny/export", ["quick"], "evaluation")
transfuse.tune("small-64", "photos", "runs/photos")

Importing the package imports no torch; each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from .evaluate import evaluate_model as evaluate
    from .inference import TransfusionPipeline
    from .inference.optimize import Quantize
    from .recipes import Recipe, preset
    from .runs import read_curves as curves
    from .train import train_recipe as train
    from .tune import tune_model as tune

__all__ = ["Recipe", "__version__", "curves", "evaluate", "load", "preset", "train", "tune"]


def load(
    path: Path | str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    quantize: Quantize | None = None,
    compile: bool = False,
    graphs: bool = True,
) -> TransfusionPipeline:
    """Open an export folder (see `transfuse.export`), a bundled model or one on the Hub by name, as a pipeline.

    dtype       "float32", "bfloat16" or "float16"
    device      "cpu", "cuda", "cuda:1" or "mps"
    quantize    "int8" or "float8": keep the blocks' weights in eight bits
    compile     compile the blocks; graphs: record repeated passes on CUDA

    Raises UserError for a missing model, and a device or dtype that this machine does not have.
    """
    from .inference import TransfusionPipeline

    return TransfusionPipeline.from_pretrained(path, dtype, device, quantize, compile, graphs)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in ("Recipe", "preset"):
        return getattr(import_module(".recipes", __name__), name)
    if name == "curves":
        return import_module(".runs", __name__).read_curves
    if name in ("evaluate", "train", "tune"):  # modules that are called like the functions they are named after
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
