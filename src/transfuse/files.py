"""Writing so that a crash or a full disk leaves the old state or the new one, never half of one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError


@contextmanager
def whole_folder(folder: Path, what: str) -> Iterator[Path]:
    """Gives a folder aside to write in, which takes the name of `folder`, and its place, when all is written.

    Raises UserError, "`folder`: `what` not written", where it can not be; what was there is left as it was.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: {what} not written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
