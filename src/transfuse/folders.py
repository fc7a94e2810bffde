"""Folders of models: the files of an export, in either layout, and the models bundled with the package.

    find_export("small-64")              # the bundled model's folder, unless there is an export of that name here
    is_export(Path("runs/demo/export"))
    trained_exports()                    # those in the run folders under runs/
    places(folder)["config.json"]        # transformer/config.json in diffusers' layout

Nothing here needs torch, so that commands that only look for a model start fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .config import read_json
from .hub import fetched

MODEL_TYPE = "transfusion"
"""`model_type` in an export's config.json"""
GENERATION, FORMER_GENERATION = "transfuse_generation.json", "generation_config.json"
"""default settings of generation, and their file in exports of before 2026-12, when transformers' own took its name"""
MODELLING = "modeling_transfusion.py"
"""the file of an export by which transformers opens it"""
PIPELINE = "pipeline.py"
"""the file of an export in diffusers' layout by which diffusers opens it"""
DIFFUSERS = {
    "config.json": "transformer/config.json",
    "model.safetensors": "transformer/diffusion_pytorch_model.safetensors",
    GENERATION: f"transformer/{GENERATION}",
    "tokenizer.json": "tokenizer/tokenizer.json",
    "tokenizer_config.json": "tokenizer/tokenizer_config.json",
    "autoencoder": "vae",
    "vocabulary.json": "transformer/vocabulary.json",
    "README.md": "README.md",
}
"""paths of an export's parts in diffusers' layout"""
INDEX = "model_index.json"
WEIGHTS = Path(__file__).with_name("weights")
"""the bundled models, a folder each"""
DEFAULT = "small-64"
"""the bundled model that commands use if none is named and none was trained"""
TRIALS = ("tiny",)
"""presets that only test the installation; their models cannot draw"""


def bundled_models() -> tuple[str, ...]:
    """Return the names of the bundled models."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")))


def find_export(name: Path | str) -> Path:
    """Resolve a path, or the name of a bundled model or of one on the Hub, to a folder. A path that exists is first."""
    path = fetched(name)
    own = any((path / file).is_file() for file in (INDEX, "model.safetensors"))
    return WEIGHTS / path if not own and str(name) in bundled_models() else path


def bundled_name(model: Path) -> str | None:
    """Return the name of a bundled model given by name or folder, and None for any other model."""
    folder = find_export(model)
    return folder.name if folder.parent == WEIGHTS else None


def places(folder: Path) -> dict[str, Path]:
    """Return the paths of an export's parts, in the layout it has; `folder` may be a bundled model's name."""
    folder = find_export(folder)
    diffusers = (folder / INDEX).is_file()
    paths = {name: folder / (path if diffusers else name) for name, path in DIFFUSERS.items()}
    former = paths[GENERATION].with_name(FORMER_GENERATION)
    if former.is_file() and not paths[GENERATION].exists() and not (folder / MODELLING).exists():
        paths[GENERATION] = former
    return paths


def is_export(folder: Path) -> bool:
    """Return True for an export of a model, in either layout, by its config.json."""
    return _export_config(folder) is not None


def trained_exports() -> list[Path]:
    """Return the exports of models in the run folders under runs/, newest first."""
    files = sorted(Path("runs").glob("*/export/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [file.parent for file in files if is_export(file.parent)]  # an autoencoder's run has an export there, too


def draws(folder: Path) -> bool:
    """Return True for a model that draws images, False for a text-only one or a preset in `TRIALS`."""
    config = _export_config(folder) or {}
    network = config.get("model")
    return config.get("preset") not in TRIALS and not (isinstance(network, dict) and network.get("images") == "none")


def _export_config(folder: Path) -> dict[str, Any] | None:
    config = places(folder)["config.json"]
    values = read_json(config) if config.is_file() else None
    return values if isinstance(values, dict) and values.get("model_type") == MODEL_TYPE else None
