"""Models on the Hugging Face Hub, or in its cache: `org/name` in place of a folder (extra `hub`).

fetched("org/name")            # the folder of its newest snapshot; without a network, of the one in the cache
fetched("runs/demo/export")    # as it is
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import UserError, install_command

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILES = ["*.json", "*.safetensors", "*.md", "*.jinja", "*/*.json", "*/*.safetensors"]
"""what a model needs; code and pickles are left there"""


def is_repository(name: Path | str) -> bool:
    """Return True for `org/name` where no folder of that name, or of the part before the slash, is here."""
    text = name.as_posix() if isinstance(name, Path) else name
    return NAME.fullmatch(text) is not None and not Path(text).parent.exists()


def fetched(name: Path | str) -> Path:
    """Return the local folder of a model. Raises UserError, one line, for a repository that cannot be had."""
    if not is_repository(name):
        return Path(name)
    repository = name.as_posix() if isinstance(name, Path) else name
    wanted = f"{repository}: expected a folder, or a model on the Hub"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{wanted}, which needs the extra hub: {install_command('hub')}") from None
    try:
        return Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=_cached(repository)))
    except Exception as error:  # the Hub's, HTTP's or the file system's: each says why not
        reason = " ".join(str(error).split())
        raise UserError(f"{wanted}, found neither ({type(error).__name__}: {reason[:160]})") from None


def _cached(repository: str) -> bool:
    """Return True if the Hub is switched off (HF_HUB_OFFLINE) and its cache is all there is."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
