"""Files at URLs (https://, s3://, gs://, and whatever else fsspec knows), kept in a bounded cache on this disk.

    Cache().file("https://host/a.tar", look("https://host/a.tar"))       # a local path; fetched if it is not here yet
    Cache().newest("https://host/photos/manifest.json")                  # fetched again, small as it is
    find("https://host/{00000..00041}.tar"), look("s3://bucket/a.tar")   # URLs; size and version of one

Whole files are fetched, each by one process while others wait for it, and written aside first: a file in the cache is
whole. A failed attempt is repeated from the beginning. Files used longest ago make room; an open file stays readable
after it is removed. fsspec's own `filecache` was tried (docs/LOG.md): it has no bound, fetches a file once per
process, misses changed files over HTTP, and needs aiohttp for it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from filelock import FileLock

from ..errors import UserError, install_command
from ..io import sha256
from ..log import logger, progress
from .prefetch import prefetch

PARTIAL = ".partial"
WAITS = (1.0, 4.0, 15.0)  # seconds before each further attempt
TIMEOUT = 60  # seconds without a byte, over HTTP
TRANSIENT = (408, 425, 429)  # HTTP codes below 500 that another attempt may not meet
NO_HEAD = (403, 405, 501)  # HTTP codes of servers, or of signed URLs, that answer GET alone
LOOKS_AT_ONCE, HASHES_AT_ONCE = 16, 4
UNREADABLE = "unreadable"  # in place of a hash

Result = TypeVar("Result")

_unreachable: set[str] = set()
"""URLs that this process could not reach since it last fetched anything: each attempt takes half a minute or more"""


class MissingError(UserError):
    """There is no such file, and trying again would not help."""


@dataclass(frozen=True)
class Look:
    """The size and version of a remote file before it is fetched.

    bytes: None where the server does not say. version: an ETag or hash that tells it from another file of the same
    name; "" without one.
    """

    bytes: int | None
    version: str = ""

    def __str__(self) -> str:
        return f"{self.bytes} bytes{f' ({self.version})' if self.version else ''}"


def is_remote(path: str) -> bool:
    """Return True for a URL, False for a path."""
    return "://" in path


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def url_name(url: str) -> str:
    """Return the last part of a URL's path, without what may follow it over HTTP (a signature). Raises UserError."""
    try:
        path = urlsplit(url).path if is_http(url) else url
    except ValueError as error:
        raise UserError(f"{url}: expected a URL, found something else ({error})") from None
    return path.rstrip("/").rsplit("/", 1)[-1]


# --- the servers ------------------------------------------------------------------------------------------------------


def look(url: str, waits: tuple[float, ...] | None = None) -> Look:
    """Return the size and version of a file. Raises MissingError, or UserError where it cannot be reached."""
    return _attempt(url, partial(_look, url), waits)


def _look(url: str) -> Look:
    if not is_http(url):
        system, path = _system(url)
        info = system.info(path)
        # S3 has an ETag, Google's storage a hash. Times are not used, because copies lose them.
        version = next((str(info[name]) for name in ("ETag", "etag", "md5Hash") if info.get(name)), "")
        return Look(info.get("size"), version.strip('"'))
    try:
        with urlopen(Request(url, method="HEAD"), timeout=TIMEOUT) as response:
            return _of_response(response)
    except HTTPError as error:
        if error.code not in NO_HEAD:
            raise
    with urlopen(url, timeout=TIMEOUT) as response:
        return _of_response(response)


def _of_response(response: Any) -> Look:
    length = response.headers.get("Content-Length")
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return Look(None if length is None else int(length), version.strip('"'))


def _open(url: str) -> tuple[BinaryIO, Look]:
    """Return the open file at a URL, and its size and version."""
    if is_http(url):
        response = urlopen(url, timeout=TIMEOUT)
        return response, _of_response(response)
    system, path = _system(url)
    remote = _look(url)
    return cast(BinaryIO, system.open(path, "rb")), remote


def _system(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


def find(pattern: str) -> list[str]:
    """Return the URLs that a pattern stands for, sorted.

    {00000..00041} and {a,b} may be anywhere; * and folders need a server that can list them, which HTTP cannot. Raises
    UserError, like `look`.
    """
    urls: list[str] = []
    for url in expanded(pattern):
        urls += [url] if is_http(url) else _attempt(url, partial(_listed, url))
    return sorted(dict.fromkeys(urls))


def expanded(pattern: str) -> list[str]:
    """Return a pattern's {00000..00041}, numbers as wide as the first, and {a,b} written out."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    first, last, names = match.groups()
    if names is None and int(last) < int(first):
        raise UserError(f"{pattern}: expected a range that goes up, found {match[0]}")
    middles = names.split(",") if names else [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [url for middle in middles for url in expanded(before + middle + after)]


def _listed(url: str) -> list[str]:
    """Return files that match a star, or are in a folder, hidden ones left out; otherwise the URL itself."""
    system, path = _system(url)
    if "*" in path:
        paths = [match for match in system.glob(path) if not system.isdir(match)]
    elif system.isdir(path):
        paths = system.find(path)
    else:
        return [url]
    scheme = url.rstrip("/").removesuffix(path.strip("/"))  # fsspec's paths lack it
    visible = [path for path in paths if not any(part.startswith(".") for part in path.split("/"))]
    return [scheme + path.strip("/") for path in visible]


def _attempt(url: str, work: Callable[[], Result], waits: tuple[float, ...] | None = None) -> Result:
    """Return the result of `work`, repeated after transient failures. Raises MissingError or UserError, in one line."""
    for wait in (*(WAITS if waits is None else waits), None):
        try:
            return work()
        except FileNotFoundError:
            raise MissingError(f"{url}: expected a file, found none") from None
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hub"}.get(url.partition("://")[0])
            hint = f": {install_command(extra)}" if extra else ""
            raise UserError(f"{url}: expected what reaches it, found none ({error}){hint}") from None
        except (OSError, ValueError, HTTPException) as error:
            if isinstance(error, HTTPError):
                if error.code in (404, 410):
                    raise MissingError(f"{url}: expected a file, found none") from None
                transient = error.code >= 500 or error.code in TRANSIENT
            else:
                full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
                transient = not isinstance(error, ValueError | PermissionError) and not full
            if wait is None or not transient:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{url}: not fetched ({reason})") from None
            time.sleep(wait)
    raise AssertionError


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cache:
    """Remote files on this disk.

    folder: where files are kept; None: a folder of the user's. gigabytes: the most it holds, but always one file.
    waits: seconds before each further attempt to fetch a file; None: `WAITS`.
    """

    folder: Path | None = None
    gigabytes: float = 20.0
    waits: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.gigabytes >= 0:
            raise UserError(f"cache_gigabytes: expected at least 0, found {self.gigabytes}")

    def file(
        self, url: str, expected: Look | None = None, part_of: str = "", check: Callable[[Path], None] | None = None
    ) -> Path:
        """Return the local path of a file, fetched if it is not here.

        expected: its size and version when it was looked at; another version is an error. part_of: version of what it
        belongs to; the same URL as part of another version is another file. check: called with a file just fetched,
        which is not kept if it raises UserError.

        Raises MissingError where there is none, UserError where the extra that reaches it is missing, it cannot be
        fetched, or has changed.
        """
        path = self._path(url, "" if expected is None else str(expected), part_of)
        while True:
            with FileLock(path.with_name(f".{path.name}.lock")):
                if not path.exists():
                    _attempt(url, lambda: self._fetch(url, path, expected, check), self.waits)
            with suppress(FileNotFoundError):  # another process made room with it just now
                os.utime(path)
                return path

    def newest(self, url: str) -> Path:
        """Return a small file as it is now; if it cannot be reached, the one kept here, which is reported once.

        Raises MissingError where there is none any more, UserError where none is kept either.
        """
        path = self._path(url)
        if url not in _unreachable or not path.exists():
            try:
                _attempt(url, lambda: self._fetch(url, path), self.waits)
            except MissingError:
                raise
            except UserError as error:
                if not path.exists():
                    raise
                _unreachable.add(url)
                logger.info(f"{error}; going on with the one that is kept here, which may be old")
        with suppress(FileNotFoundError):
            os.utime(path)
        return path

    def _path(self, url: str, *versions: str) -> Path:
        folder = self.folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "transfuse")
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(" ".join(filter(None, (url, *versions))).encode()).hexdigest()[:24]
        last = os.fsencode(url_name(url))[-120:].decode(errors="ignore")  # file names have at most 255 bytes
        return folder / f"{name}-{last}"

    def _fetch(
        self, url: str, path: Path, expected: Look | None = None, check: Callable[[Path], None] | None = None
    ) -> None:
        file, remote = _open(url)
        with closing(file):
            if expected is not None and remote != expected:
                raise UserError(f"{url}: expected {expected}, as it was, found {remote}: it has changed")
            self._make_room(path.parent, remote.bytes or 0)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PARTIAL, delete=False) as written:
                local = Path(written.name)
                try:
                    shutil.copyfileobj(file, written, 1 << 20)
                    if remote.bytes is not None and written.tell() != remote.bytes:
                        raise ConnectionError(f"it broke off after {written.tell()} of {remote.bytes} bytes")
                    written.close()
                    _unreachable.clear()
                    if check is not None:
                        check(local)
                    os.replace(local, path)
                except BaseException:
                    written.close()
                    local.unlink()
                    raise

    def _make_room(self, folder: Path, size: int) -> None:
        """Remove those used longest ago until `size` more bytes fit."""
        with FileLock(folder / ".room.lock"):
            files = []
            for path in folder.iterdir():
                if not path.name.startswith(".") and not path.name.endswith(PARTIAL):
                    with suppress(FileNotFoundError):
                        stat = path.stat()
                        files.append((stat.st_atime_ns, stat.st_size, path))
            left = self.gigabytes * 1e9 - size - sum(size for _, size, _ in files)
            for _, bytes_, path in sorted(files):
                if left >= 0:
                    break
                path.unlink(missing_ok=True)
                left += bytes_


# --- the files of a source --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file of a source, here or at a URL.

    name: its path below the source's folder. place: path or URL. Of a URL also `look`: its size and version when the
    source was opened, and `cache`: where it is kept.
    """

    name: str
    place: str
    size: int
    look: Look | None = None
    cache: Cache | None = None

    @classmethod
    def of(cls, root: Path, path: Path) -> File:
        """Return a local file; a missing one has size 0, and reading it reports that."""
        try:
            size = path.stat().st_size
        except OSError:
            size = 0
        return cls(os.path.relpath(path, root), str(path), size)

    def here(self) -> Path:
        """Return a path to open at once, before the cache gives its room to another. Raises UserError like `Cache`."""
        return Path(self.place) if self.cache is None else self.cache.file(self.place, self.look)

    def sibling(self, name: str) -> bytes:
        """Return the content of another file, named relative to this one's folder.

        At a URL it is fetched again if this one has changed. Raises OSError or ValueError where there is none,
        UserError where it cannot be reached.
        """
        if self.cache is None:
            return (Path(self.place).parent / name).read_bytes()
        folder = self.place.rpartition("/")[0]
        if is_remote(name) or name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(f"expected a name below {folder}, found {name}")
        try:
            return self.cache.file(f"{folder}/{name}", part_of=str(self.look)).read_bytes()
        except MissingError as error:
            raise ValueError(str(error)) from None


def remote_files(source: str, cache: Cache) -> list[File]:
    """Return the files that a URL stands for: with braces, stars, or as a folder. Raises UserError, like `look`."""

    def without_query(url: str) -> str:
        return url.partition("?")[0] if is_http(url) else url

    urls = find(source)
    fixed = re.split(r"[{*?[]", without_query(source), maxsplit=1)[0]
    root = fixed.rpartition("/")[0] if fixed != source or urls == [source] else source.rstrip("/")
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        looks = list(pool.map(lambda url: look(url, cache.waits), urls))
    files = []
    for url, remote in zip(urls, looks, strict=True):
        path = without_query(url)
        name = path[len(root) + 1 :] if path.startswith(f"{root}/") else url_name(url)
        files.append(File(name, url, remote.bytes or 0, remote, cache))
    return sorted(files, key=lambda file: file.name.split("/"))  # as local paths are sorted


def hash_files(files: Iterable[File]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name; of one at a URL, its size and version.

    Reads every local file. Times are left out: an edit may keep them, and a copy loses them.
    """
    listed, hashes = list(files), {}

    def hash_of(file: File) -> str:
        if file.look is not None:
            return str(file.look)
        try:
            return sha256(Path(file.place))
        except (OSError, ValueError):  # reading its document will report why
            return UNREADABLE

    with ThreadPoolExecutor(HASHES_AT_ONCE) as pool, progress("reading the source", len(listed), unit="files") as bar:
        results = prefetch(lambda file: pool.submit(hash_of, file), listed, 16 * HASHES_AT_ONCE)
        for file, content in zip(listed, results, strict=True):
            hashes[file.name] = content
            bar.advance()
    return hashes
