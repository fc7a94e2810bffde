"""Files that lie elsewhere (https://, s3://, gs://, ...; whatever fsspec knows), kept here while there is room.

    Cache().file("https://host/a.tar", look("https://host/a.tar"))       # a path; fetched where it is not here yet
    Cache().newest("https://host/photos/manifest.json")                  # fetched anew, small as it is
    find("https://host/{00000..00041}.tar"), look("s3://bucket/a.tar")   # URLs; bytes and version of one

Whole files are fetched, each by one process while others wait for it, and written aside first: a file in the cache is
whole. What breaks off, or is refused for the moment, is tried again, from its beginning. Those used longest ago make
room; a file that is open stays readable when it is removed. https:// needs no extra.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ..errors import UserError
from ..log import logger

PARTIAL = ".partial"
WAITS = (1.0, 4.0, 15.0)
"""seconds before each further attempt"""
TIMEOUT = 60
"""seconds without a byte, over HTTP"""
PASSING = (408, 425, 429)
"""codes of HTTP below 500 that another attempt may not meet"""
NO_HEAD = (403, 405, 501)
"""codes of servers, or of signed URLs, that answer GET alone"""

Found = TypeVar("Found")

_unreached: set[str] = set()
"""URLs that this process has looked at in vain since it last fetched anything: a look costs half a minute or more"""


class MissingError(UserError):
    """There is no such file, and trying again would not help."""


@dataclass(frozen=True)
class Look:
    """What is known of a file before it is fetched. bytes: None where nobody says. version: what tells it from another
    under the same name, as an ETag; "" where nothing does."""

    bytes: int | None
    version: str = ""

    def __str__(self) -> str:
        return f"{self.bytes} bytes{f' ({self.version})' if self.version else ''}"


def is_remote(path: str) -> bool:
    """Whether it is a URL and not a path."""
    return "://" in path


def url_name(url: str) -> str:
    """The last part of a URL's path, without what may follow it over HTTP (a signature)."""
    path = urlsplit(url).path if _is_http(url) else url
    return path.rstrip("/").rsplit("/", 1)[-1]


def look(url: str) -> Look:
    """Raises MissingError where nothing is there, UserError where it can not be reached."""

    def work() -> Look:
        if not _is_http(url):
            system, remote = _system(url)
            return _look(system.info(remote))
        try:
            with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as answer:
                return _answered(answer)
        except HTTPError as error:
            if error.code not in NO_HEAD:
                raise
        with urlopen(url, timeout=TIMEOUT) as answer:
            return _answered(answer)

    return _tried(url, work)


def find(pattern: str) -> list[str]:
    """The URLs that a pattern stands for, sorted: {00000..00041} and {a,b} anywhere; * and folders where they can be
    listed, which HTTP can not. Raises UserError, as `look`."""
    found: list[str] = []
    for url in expanded(pattern):
        found += [url] if _is_http(url) else _tried(url, lambda url=url: _listed(url))  # type: ignore[misc]
    return sorted(dict.fromkeys(found))


def expanded(pattern: str) -> list[str]:
    """{00000..00041}, numbers as wide as the first, and {a,b} of a pattern written out."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None and int(last) < int(first):
        raise UserError(f"{pattern}: expected a range that goes up, found {match[0]}")
    some = names.split(",") if names else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return [url for one in some for url in expanded(pattern[: match.start()] + one + pattern[match.end() :])]


@dataclass(frozen=True)
class Cache:
    """folder: where files are kept; none: a folder of the user's. gigabytes: at most so much, but always one file."""

    folder: Path | None = None
    gigabytes: float = 20.0

    def file(
        self, url: str, expected: Look | None = None, of: str = "", check: Callable[[Path], None] = lambda path: None
    ) -> Path:
        """The file here. `expected`: as it was when it was looked at; another version of it is an error. `of`: version
        of what it is a part of; a part of another one is another file. `check`: called with what was fetched just now,
        which is not kept where it raises UserError.

        Raises MissingError where there is none, UserError where the extra that reaches it is missing, it can not be
        fetched, or has changed.
        """
        path = self._path(url, "" if expected is None else str(expected), of)
        with _held(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                _tried(url, lambda: self._fetch(url, path, expected, check))
        try:
            os.utime(path)
        except FileNotFoundError:  # another process made room with it just now
            return self.file(url, expected, of, check)
        return path

    def newest(self, url: str) -> Path:
        """A small file as it is now; where it can not be reached the one kept here, which is said once.

        Raises MissingError where there is none any more, UserError where none is kept either.
        """
        path = self._path(url)
        if url not in _unreached or not path.exists():
            try:
                _tried(url, lambda: self._fetch(url, path))
            except MissingError:
                raise
            except UserError as error:
                if not path.exists():
                    raise
                _unreached.add(url)
                logger.info(f"{error}; going on with the one that is kept here, which may be old")
        with suppress(FileNotFoundError):
            os.utime(path)
        return path

    def _path(self, *known: str) -> Path:
        """Where a URL is kept, or what it was in a version."""
        folder = self.folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "transfuse")
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(" ".join(filter(None, known)).encode()).hexdigest()[:24]
        return folder / f"{name}-{url_name(known[0])}"

    def _fetch(
        self, url: str, path: Path, expected: Look | None = None, check: Callable[[Path], None] = lambda path: None
    ) -> None:
        with _opened(url) as (file, found):
            if expected is not None and found != expected:
                raise UserError(f"{url}: expected {expected}, as it was, found {found}: it has changed")
            self._make_room(path.parent, found.bytes or 0)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PARTIAL, delete=False) as partial:
                try:
                    shutil.copyfileobj(file, partial, 1 << 20)
                    if found.bytes is not None and partial.tell() != found.bytes:
                        raise ConnectionError(f"it broke off after {partial.tell()} of {found.bytes} bytes")
                    partial.flush()
                    _unreached.clear()
                    check(Path(partial.name))
                    os.replace(partial.name, path)
                except BaseException:
                    os.unlink(partial.name)
                    raise

    def _make_room(self, folder: Path, size: int) -> None:
        """Remove those used longest ago until `size` more bytes fit."""
        with _held(folder / ".room.lock"):
            files = []
            for path in folder.iterdir():
                try:
                    if not path.name.startswith(".") and not path.name.endswith(PARTIAL):
                        found = path.stat()
                        files.append((found.st_atime_ns, found.st_size, path))
                except FileNotFoundError:
                    continue
            left = self.gigabytes * 1e9 - size - sum(size for _, size, _ in files)
            for _, bytes_, path in sorted(files):
                if left >= 0:
                    break
                path.unlink(missing_ok=True)
                left += bytes_


# --- what reaches it --------------------------------------------------------------------------------------------------


def _is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    system, remote = fsspec.core.url_to_fs(url)
    return system, remote


def _listed(url: str) -> list[str]:
    """Files that match a star, or lie in a folder, hidden ones left out; else the one."""
    system, remote = _system(url)
    if "*" in remote:
        paths = [path for path in system.glob(remote) if not system.isdir(path)]
    elif system.isdir(remote):
        paths = system.find(remote)
    else:
        return [url]
    before = url.rstrip("/").removesuffix(remote.strip("/"))  # what a path here lacks of a URL
    shown = [path for path in paths if not any(part.startswith(".") for part in path.split("/"))]
    return [before + path.strip("/") for path in shown]


@contextmanager
def _opened(url: str) -> Iterator[tuple[BinaryIO, Look]]:
    """Its bytes to read, and how many there should be."""
    if _is_http(url):
        with urlopen(url, timeout=TIMEOUT) as answer:
            yield answer, _answered(answer)
        return
    system, remote = _system(url)
    found = _look(system.info(remote))
    with system.open(remote, "rb") as file:
        yield file, found


def _answered(answer: Any) -> Look:
    length = answer.headers.get("Content-Length")
    version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return Look(None if length is None else int(length), version.strip('"'))


def _look(info: dict[str, Any]) -> Look:
    """Of what fsspec says of a file: S3 has an ETag, Google's storage a hash. Not of times, which copies lose."""
    version = next((str(info[name]) for name in ("ETag", "etag", "md5Hash") if info.get(name)), "")
    return Look(info.get("size"), version.strip('"'))


def _tried(url: str, work: Callable[[], Found]) -> Found:
    """What `work` gives, in several attempts where it fails for the moment, and in one line where it fails for good."""
    for wait in (*WAITS, None):
        try:
            return work()
        except FileNotFoundError:
            raise MissingError(f"{url}: expected a file, found none") from None
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(url.partition("://")[0])
            hint = f": pip install 'transfuse[{extra}]'" if extra else ""
            raise UserError(f"{url}: expected what reaches it, found none ({error}){hint}") from None
        except (OSError, ValueError, HTTPException) as error:
            if isinstance(error, HTTPError) and error.code in (404, 410):
                raise MissingError(f"{url}: expected a file, found none") from None
            if wait is None or not _passing(error):
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{url}: not fetched ({reason})") from None
            time.sleep(wait)
    raise AssertionError


def _passing(error: Exception) -> bool:
    if isinstance(error, HTTPError):
        return error.code >= 500 or error.code in PASSING
    if isinstance(error, ValueError | PermissionError):
        return False
    return getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time, thread by thread; a lock of a process that died is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
