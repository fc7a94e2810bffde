"""Atomic writes: a crash or a full disk leaves the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError
from .folders import MODELLING, PIPELINE


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


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path, sync it and rename it to `path`. Raises UserError if writing fails."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: not written ({error}); the old file is intact; call again to continue") from None


def atomic_json(path: Path, value: Any, allow_nan: bool = True) -> None:
    """Write indented JSON, as `atomic_write`. Raises ValueError for a number that is not finite, unless allowed."""
    text = json.dumps(value, indent=2, allow_nan=allow_nan) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def append_jsonl(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append lines of JSON to a file, after ending a line that a kill or a full disk cut short.

    Raises UserError if writing fails.
    """
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    try:
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else b"\n" + text
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: not written ({error.strerror or error}); checkpoints are intact") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk; Windows opens no folders, and needs no flush of them."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
