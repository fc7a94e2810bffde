"""Files of a data set that lie elsewhere (s3://, gs://, ...; whatever fsspec knows), kept here while there is room.

Whole files are fetched, each by one process while others wait for it, and written aside first: a file in the cache is
whole. Those used longest ago make room. A file that is open stays readable when it is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

PARTIAL = ".partial"


def is_remote(path: str) -> bool:
    """Whether it is a URL and not a path."""
    return "://" in path


@dataclass(frozen=True)
class Cache:
    """folder: where files are kept; none: a folder of the user's. gigabytes: at most so much, but always one file."""

    folder: Path | None = None
    gigabytes: float = 20.0

    def file(self, url: str) -> Path:
        """The file here. Raises UserError where there is none, or the extra that reaches it is missing."""
        folder = self.folder or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "transfuse")
        path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:24]}-{url.rsplit('/', 1)[-1]}"
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder / f".{path.name}.lock"):
            if not path.exists():
                self._fetch(url, path)
        try:
            os.utime(path)
        except FileNotFoundError:  # another process made room with it just now
            return self.file(url)
        return path

    def _fetch(self, url: str, path: Path) -> None:
        try:
            import fsspec

            system, remote = fsspec.core.url_to_fs(url)
            self._make_room(path.parent, int(system.size(remote) or 0))
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=PARTIAL, delete=False) as partial:
                try:
                    with system.open(remote, "rb") as file:
                        shutil.copyfileobj(file, partial, 1 << 20)
                    partial.flush()
                    os.replace(partial.name, path)
                except BaseException:
                    os.unlink(partial.name)
                    raise
        except FileNotFoundError:
            raise UserError(f"{url}: expected a file of a data set, found none") from None
        except ImportError as error:
            extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(url.partition("://")[0])
            hint = f": pip install 'transfuse[{extra}]'" if extra else ""
            raise UserError(f"{url}: expected what reaches it, found none ({error}){hint}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{url}: not fetched ({error})") from None

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


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """One process at a time, thread by thread; a lock of a process that died is free."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
