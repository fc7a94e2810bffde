"""Is the set in a folder, finished or half built, the one that is asked for? By settings, and by the source's content.

claim(out, settings, contents)       # begins a build, or refuses to resume one of another source
check_built(out, settings)           # the manifest of a set that is finished
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config import read_json
from ..errors import UserError
from ..io import atomic_write
from ..version import __version__
from .dataset import DataSet, Encoding, Manifest
from .readers.files import UNREADABLE

CONTENT = "content "
"""begins a listing by content; sets of earlier versions have one by names and sizes"""


def listing(contents: dict[str, str]) -> str:
    """Return the hash by which settings know a source."""
    return CONTENT + hashlib.sha256(json.dumps(sorted(contents.items())).encode()).hexdigest()


def difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Return in words which files are not as they were; "" for none."""
    changed = [name for name, content in before.items() if now.get(name) != content]
    changed += [name for name in now if name not in before]
    if not changed:
        return ""
    name = changed[0]
    shown = " ".join(name.split())
    what = "is new" if name not in before else "is gone" if now.get(name) in (None, UNREADABLE) else "has other content"
    return f"{shown} {what}" + (f", and {len(changed) - 1} more changed" if changed[1:] else "")


def not_told(encoding: Encoding | None, tokenizer: str | None) -> dict[str, Any]:
    """Return what settings do not tell: a path stays while the autoencoder, or the tokenizer, there becomes another."""
    told = {} if tokenizer is None else {"tokenizer_fingerprint": tokenizer}
    return {"autoencoder_weights": encoding and encoding.fingerprint, **told}


def check_built(out: Path, settings: dict[str, Any]) -> Manifest:
    """Return the manifest of a finished set. Raises UserError where it is another one than `settings` make."""
    try:
        manifest = DataSet(str(out)).manifest
    except UserError as error:
        raise UserError(f"{error}; {_otherwise(out)}") from None
    found = manifest.settings | not_told(manifest.encoding, manifest.tokenizer)
    _compare(out, out / "manifest.json", found, settings)
    return manifest


def claim(out: Path, settings: dict[str, Any], contents: dict[str, str]) -> None:
    """Begin a build, or check that the one begun there is the same."""
    settings = settings | {"transfuse": __version__}  # another version may decode pictures otherwise
    path = out / "building" / "settings.json"
    files = path.with_name("source.json")
    if path.exists():
        changes = difference(read_json(files), contents) if files.exists() else ""
        _compare(out, path, read_json(path), settings, changes)
        return
    if out.exists() and (not out.is_dir() or any(path.name != "building" for path in out.iterdir())):
        raise UserError(f"{out}: expected an empty folder, or a data set begun before, found something else")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write to, found none ({error.strerror})") from None
    atomic_write(files, lambda partial: partial.write_text(json.dumps(contents) + "\n"))
    atomic_write(path, lambda partial: partial.write_text(json.dumps(settings, indent=2) + "\n"))


def _compare(out: Path, path: Path, found: dict[str, Any], asked: dict[str, Any], changes: str = "") -> None:
    for name, value in asked.items():
        if found.get(name) == value:
            continue
        wanted, what = json.dumps(value), json.dumps(found.get(name))
        if name == "listing":
            wanted, what = "the same source", "another source, or one that has changed"
            if not str(found.get(name)).startswith(CONTENT):
                what, changes = "a set of an earlier version", "it did not keep what its source contained"
        said = f" ({changes})" if name == "listing" and changes else ""
        raise UserError(f"{path}: {name}: expected {wanted}, found {what}{said}; {_otherwise(out)}")


def _otherwise(out: Path) -> str:
    return f"name another folder, or remove {out}, to build it again"
