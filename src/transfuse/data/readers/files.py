"""The files of a source, here or elsewhere: what each is called, how large it is, and the way to it.

file = File.of(Path("photos"), Path("photos/00000.tar"))      # or, of a URL, one of remote_files(...)
file.name, file.size, file.here()                             # here(): a path; one elsewhere is fetched first
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ...io import sha256
from ...log import progress
from ..ahead import ahead
from ..remote import Cache, Look, MissingError, find, is_remote, look, url_name

LOOKERS = 16
"""URLs asked after at once"""
UNREADABLE = "unreadable"
"""in place of a hash"""
HASHERS = 4
"""files read at once"""


@dataclass(frozen=True)
class File:
    """name: below the source's folder. place: path or URL. Of a URL, look: what it had when the source was opened;
    cache: where it is kept."""

    name: str
    place: str
    size: int
    look: Look | None = None
    cache: Cache | None = None

    @classmethod
    def of(cls, root: Path, path: Path) -> File:
        try:
            size = path.stat().st_size
        except OSError:  # gone, or a link to nothing: reading it will say so
            size = 0
        return cls(os.path.relpath(path, root), str(path), size)

    def here(self) -> Path:
        """A path to open at once: a bounded cache may give its room to another. Raises UserError as `Cache.file`."""
        return Path(self.place) if self.cache is None else self.cache.file(self.place, self.look)

    def beside(self, name: str) -> bytes:
        """The content of another file, named relative to this one's folder; elsewhere it is fetched anew where this one
        has changed. Raises OSError or ValueError where there is none, UserError where it can not be reached."""
        if self.cache is None:
            return (Path(self.place).parent / name).read_bytes()
        if is_remote(name) or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"expected a name below {self.place.rpartition('/')[0]}, found {name}")
        try:
            return self.cache.file(f"{self.place.rpartition('/')[0]}/{name}", of=str(self.look)).read_bytes()
        except MissingError as error:
            raise ValueError(str(error)) from None


def remote_files(source: str, cache: Cache) -> list[File]:
    """Those that a URL stands for: with braces, stars, or as a folder. Raises UserError for one out of reach."""
    urls = find(source)
    fixed = re.split(r"[{*?[]", source.partition("?")[0] if source.startswith("http") else source, maxsplit=1)[0]
    root = fixed.rpartition("/")[0] if fixed != source or urls == [source] else source.rstrip("/")
    with ThreadPoolExecutor(LOOKERS) as pool:
        looks = list(pool.map(look, urls))
    files = [
        File(_below(url, root), url, found.bytes or 0, found, cache) for url, found in zip(urls, looks, strict=True)
    ]
    return sorted(files, key=lambda file: file.name.split("/"))  # as paths are sorted here


def _below(url: str, root: str) -> str:
    path = url.partition("?")[0] if url.startswith("http") else url
    return path[len(root) + 1 :] if path.startswith(f"{root}/") else url_name(url)


def contents(files: Iterable[File]) -> dict[str, str]:
    """Return of each file, by its name, the SHA-256 of its bytes; of one at a URL, its size and version.

    Reads every file that is here. Times are left out: an edit may keep them, and a copy loses them.
    """
    listed, found = list(files), {}
    with ThreadPoolExecutor(HASHERS) as pool, progress("reading the source", len(listed), unit="files") as bar:
        hashes = ahead(lambda file: pool.submit(_content, file), listed, 16 * HASHERS)
        for file, content in zip(listed, hashes, strict=True):
            found[file.name] = content
            bar.advance()
    return found


def _content(file: File) -> str:
    if file.look is not None:
        return str(file.look)
    try:
        return sha256(Path(file.place))
    except (OSError, ValueError):  # reading its document will say why
        return UNREADABLE
