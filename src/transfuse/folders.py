"""Folders of models and data: the files of an export, bundled models, and repositories of the Hugging Face Hub.

    find_export("small-64")              # the bundled model's folder, unless there is an export of that name here
    find_export("org/name")              # its newest snapshot on the Hub (extra `hub`); offline, the one in the cache
    is_export(Path("runs/demo/export"))
    trained_exports()                    # those in the run folders under runs/
    places(folder)["config.json"]        # transformer/config.json in diffusers' layout
    fetched_data("hf://datasets/org/name/data", ["data"])    # the snapshot, with the files below data/
    with atomic_dir(Path("my-model"), "export") as new: ...  # write a folder, which appears whole or not at all
    upload(Path("my-model"), "org/name")                     # to the Hub, with its own model card

Nothing here needs torch, so that commands that only look for a model start fast.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .config import read_json
from .errors import UserError, install_command, shown
from .io import sync

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
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.md", "*.jinja", "*/*.json", "*/*.safetensors"]
"""what a model needs of its repository; code and pickles are left there"""
HUB_DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(/.*)?")


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


def places(folder: Path | str) -> dict[str, Path]:
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


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_dir(folder: Path, what: str) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the block ends without an error.

    A process killed between the two renames leaves the old one as `folder`.old.

    Raises UserError, "`folder`: `what` not written", if writing fails; the old folder stays. Also refuses to replace a
    run, or anything but an earlier folder of this kind.
    """
    place = folder.resolve()
    partial, old = (place.with_name(place.name + ending) for ending in (".partial", ".old"))
    if (place / "checkpoints").exists():
        raise UserError(f"{folder}: expected a folder to write {what} to, found a run, which it would replace")
    other = _not_a_models(place)
    if other is not None:
        raise UserError(f"{folder}: expected a folder for {what} alone, found {other.name} there, which would be lost")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shared = partial.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
        for path in [*partial.rglob("*"), partial]:
            if path.is_file():
                path.chmod(shared)
            sync(path)
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            os.replace(place, old)
        os.replace(partial, place)
        sync(place.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: {what} not written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _not_a_models(place: Path) -> Path | None:
    """Return an entry of a folder that no export (of a model or an autoencoder) contains, or None."""
    if not place.is_dir():
        return place if place.exists() else None
    entries = sorted(place.iterdir())
    if not any((place / name).is_file() for name in ("config.json", "model_index.json")):
        return entries[0] if entries else None
    for path in entries:
        if path.is_dir():
            known = ("config.json", "tokenizer.json", "scheduler_config.json")  # parts, as diffusers lays them out
            if not any((path / name).is_file() for name in known):
                return path
        elif path.suffix not in (".json", ".safetensors", ".jinja", ".md") and path.name not in (MODELLING, PIPELINE):
            return path
    return None


# --- the Hub ----------------------------------------------------------------------------------------------------------


def is_repository(name: Path | str) -> bool:
    """Return True for `org/name` where no folder of that name, or of the part before the slash, is here."""
    text = name.as_posix() if isinstance(name, Path) else name
    return REPOSITORY.fullmatch(text) is not None and not Path(text).parent.exists()


def fetched(name: Path | str) -> Path:
    """Return the local folder of a model. Raises UserError for what is no name, and a repository that cannot be had."""
    if not isinstance(name, str | Path):
        raise UserError(f"model: expected a folder, or a model's name, found {shown(name)}")
    if not is_repository(name):
        return Path(name)
    repository = name.as_posix() if isinstance(name, Path) else name
    return _snapshot(
        f"{repository}: expected a folder, or a model on the Hub or in its cache", repository, allow_patterns=HUB_FILES
    )


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
    **options: Any,
) -> str:
    """Upload an export as it is, model card included, to a repository, made if it is new; return the commit's address.

    tags: added to the uploaded card's, not to the folder's. options: commit_message, commit_description, create_pr and
    path_in_repo of `huggingface_hub.upload_folder`.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as temporary:
        if tags:
            from .model_card import read_card, write_card

            metadata, text = read_card(folder / "README.md")
            metadata["tags"] = list(dict.fromkeys([*(metadata.get("tags") or ()), *tags]))
            folder = Path(shutil.copytree(folder.resolve(), Path(temporary) / "export", copy_function=_link))
            (folder / "README.md").unlink(missing_ok=True)
            (folder / "README.md").write_text(write_card(metadata, text), encoding="utf-8")
        name = huggingface_hub.create_repo(repository, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            huggingface_hub.create_branch(name, branch=revision, token=token, exist_ok=True)
        return str(
            huggingface_hub.upload_folder(repo_id=name, folder_path=folder, token=token, revision=revision, **options)
        )


def _link(source: str, target: str) -> None:
    """Make `target` a link to `source`, or a copy where links are not allowed, as on some Windows."""
    try:
        os.symlink(source, target)
    except OSError:
        shutil.copyfile(source, target)


def data_address(address: str) -> tuple[str, str | None, str]:
    """Return repository, revision and path of hf://datasets/org/name@revision/path. Raises UserError for another."""
    match = HUB_DATA.fullmatch(address)
    if match is None:
        raise UserError(f"{address}: expected hf://datasets/ORG/NAME or a path below it, found another address")
    return match[1], match[2], (match[3] or "").strip("/")


def fetched_data(address: str, patterns: Sequence[str]) -> Path:
    """Return the local folder of a data repository, with those files of it that match. Raises UserError as `fetched`.

    patterns: paths with stars, of files or folders; an empty one is the whole repository.
    """
    repository, revision, _ = data_address(address)
    files = [each for pattern in patterns for each in (pattern, f"{pattern}/*")] if all(patterns) else None
    wanted = f"{address}: expected data on the Hub or in its cache"
    return _snapshot(wanted, repository, repo_type="dataset", revision=revision, allow_patterns=files)


def _snapshot(wanted: str, repository: str, **options: Any) -> Path:
    """Return the folder of a repository's snapshot, fetched unless HF_HUB_OFFLINE leaves the cache alone to read."""
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError:
        raise UserError(f"{wanted}, which needs the extra hub: {install_command('hub')}") from None
    try:
        return Path(snapshot_download(repository, local_files_only=bool(constants.HF_HUB_OFFLINE), **options))
    except Exception as error:  # the Hub's, HTTP's or the file system's: each says why not
        reason = " ".join(str(error).split())
        raise UserError(f"{wanted}, found none ({type(error).__name__}: {reason[:160]})") from None
