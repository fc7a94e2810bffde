"""Models and data on the Hugging Face Hub, or in its cache (extra `hub`): `org/name` in place of a model's folder.

fetched("org/name")                                          # its newest snapshot; offline, the one in the cache
fetched("runs/demo/export")                                  # as it is
fetched_data("hf://datasets/org/name/data", ["data"])        # the snapshot, with the files below data/
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, install_command

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.safetensors", "*.model", "*.md", "*.jinja", "*/*.json", "*/*.safetensors"]
"""what a model needs; code and pickles are left there"""
DATA = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(/.*)?")


def is_repository(name: Path | str) -> bool:
    """Return True for `org/name` where no folder of that name, or of the part before the slash, is here."""
    text = name.as_posix() if isinstance(name, Path) else name
    return NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def fetched(name: Path | str) -> Path:
    """Return the local folder of a model. Raises UserError, one line, for a repository that cannot be had."""
    if not is_repository(name):
        return Path(name)
    repository = name.as_posix() if isinstance(name, Path) else name
    return _snapshot(
        f"{repository}: expected a folder, or a model on the Hub or in its cache", repository, allow_patterns=FILES
    )


def data_address(address: str) -> tuple[str, str | None, str]:
    """Return repository, revision and path of hf://datasets/org/name@revision/path. Raises UserError for another."""
    match = DATA.fullmatch(address)
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
