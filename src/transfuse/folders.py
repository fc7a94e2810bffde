"""Models by their folders: what an export consists of, in either layout, and those that come with the package.

    find_export("small-64")              # the bundled model's folder, unless an export of that name lies here
    is_export(Path("runs/demo/export"))
    trained_exports()                    # those in the run folders under runs/
    places(folder)["config.json"]        # transformer/config.json in diffusers' layout

Nothing here needs torch: commands that only ask whether there is a model start at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .configuration import read_json

MODEL_TYPE = "transfusion"
"""of an export's config.json"""
DIFFUSERS = {
    "config.json": "transformer/config.json",
    "model.safetensors": "transformer/diffusion_pytorch_model.safetensors",
    "generation_config.json": "transformer/generation_config.json",
    "tokenizer.json": "tokenizer/tokenizer.json",
    "autoencoder": "vae",
    "README.md": "README.md",
}
"""where diffusers' layout has what an export consists of"""
INDEX = "model_index.json"
WEIGHTS = Path(__file__).with_name("weights")
"""models that come with the package, a folder each"""
DEFAULT = "small-64"
"""the bundled model that commands use where none is named and none was trained"""
TRIALS = ("tiny",)
"""presets that only show that everything works: their models draw nothing"""


def bundled_models() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(path.parent.name for path in WEIGHTS.glob("*/config.json")))


def find_export(name: Path | str) -> Path:
    """The folder that a path, or the name of a bundled model, stands for. An export of that name comes first."""
    path = Path(name)
    own = any((path / file).is_file() for file in (INDEX, "model.safetensors"))
    return WEIGHTS / path if not own and str(name) in bundled_models() else path


def bundled_name(model: Path) -> str | None:
    """The name of a bundled model, given as such or by its folder; None for any other."""
    folder = find_export(model)
    return folder.name if folder.parent == WEIGHTS else None


def places(folder: Path) -> dict[str, Path]:
    """Where an export's parts are, in whichever layout it has; it may be a bundled model's name."""
    folder = find_export(folder)
    other = (folder / INDEX).is_file()
    return {name: folder / (theirs if other else name) for name, theirs in DIFFUSERS.items()}


def is_export(folder: Path) -> bool:
    """Whether a folder is an export, in either layout: of a model, as its config says."""
    return _export_config(folder) is not None


def trained_exports() -> list[Path]:
    """Exports of models in the run folders under runs/, the newest first."""
    files = sorted(Path("runs").glob("*/export/config.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [file.parent for file in files if is_export(file.parent)]  # an autoencoder's export lies there, too


def draws(folder: Path) -> bool:
    """Whether a model draws images: a text-only one does not, nor does one of the presets in `TRIALS`."""
    config = _export_config(folder) or {}
    network = config.get("model")
    return config.get("preset") not in TRIALS and not (isinstance(network, dict) and network.get("images") == "none")


def _export_config(folder: Path) -> dict[str, Any] | None:
    config = places(folder)["config.json"]
    found = read_json(config) if config.is_file() else None
    return found if isinstance(found, dict) and found.get("model_type") == MODEL_TYPE else None
