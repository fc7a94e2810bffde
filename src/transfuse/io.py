"""Atomic writes of files: a crash or a full disk leaves the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


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
