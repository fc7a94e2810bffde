"""Where documents come from, before they are a data set: folders, tables, tars, parquet, jsonl, plain text, the world,
another data set; tars, parquet, jsonl, text and data sets by URL, too.

    reader = open_source("photos/", Columns())
    for part in reader.parts():              # cheap: names and places; each part goes to one process
        for item in reader.read(part):       # Raw documents, and a Fault for each that can not be read
            ...

A reader never skips anything silently: what is not a document is a fault, with its name and the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ...errors import UserError
from ...log import logger
from ..dataset import DataSet
from ..remote import Cache, MissingError, is_remote, url_name
from .files import File, remote_files

PER_PART = 64
"""documents in a part, where they can be counted"""


@dataclass(frozen=True)
class Raw:
    """A document as it was found: words, and pictures as the bytes of an image file (or pixels already).

    pair    a picture and its caption, `(picture, caption)`, which training may put in either order
    """

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    pair: bool = False


UNTOLD = 100
"""documents that the lost rest of a file counts for, which does not say how many they were"""


@dataclass(frozen=True)
class Fault:
    """A document that can not be read: its name, and why. lost: documents that go with it, a file's rest, say."""

    key: str
    reason: str
    lost: int = 1

    def __post_init__(self) -> None:
        for name in ("key", "reason"):  # of names in archives, and of others' errors, some have several lines
            object.__setattr__(self, name, " ".join(getattr(self, name).split()))


@dataclass(frozen=True)
class Part:
    """A stretch of a source. `weight`: how much of the source it is, in the unit of the reader's `total`."""

    what: Any
    weight: int


class Reader(Protocol):
    """A source of documents. It is sent to other processes, and so is each part."""

    text_only: bool
    """whether documents are words alone"""
    total: int
    """weight of all parts"""

    def contents(self) -> dict[str, str]:
        """Return hashes of all that the documents are made of, by name: what another content would change."""

    def parts(self) -> Iterable[Part]: ...

    def read(self, part: Part) -> Iterator[Raw | Fault]: ...


@dataclass(frozen=True)
class Columns:
    """How to find things in a source."""

    image_column: str = ""
    """of a table, or JSON: the column or field with the file's name, or bytes; none: one of the usual names"""
    caption_column: str = ""
    """of a table, or JSON: the column or field with the words; none: one of the usual names"""
    first_line: bool = False
    """of a caption's .txt file, take the first line alone"""
    split: Literal["file", "paragraph", "line"] = "file"
    """what is one document of plain text"""
    count: int = 0
    """take so many documents of the source, no more; 0: all. Of "world", make so many"""


def open_source(source: str, columns: Columns, size: int = 64, cache: Cache | None = None) -> Reader:
    """The reader of a path or URL, by what is there; of the bundled world, with pictures of `size` pixels.

    cache: where files of a URL are kept. Raises UserError where nothing is, or nothing that is known.
    """
    from .pictures import PictureReader, table
    from .world import WorldReader

    if source == "world":
        return WorldReader(columns.count, size)
    if is_remote(source):
        return _elsewhere(source, columns, cache or Cache())
    path = Path(source)
    if path.is_dir():
        if all((path / name).is_file() for name in SET):
            return _of_set(source, Cache())
        found = [file for endings, _ in _kinds()[:3] for ending in endings for file in _files(path, ending)]
        files = [File.of(path, file) for file in sorted(found) if file.name != "metadata.jsonl"]
        if files:
            return _of_files(source, files, columns)
        for name in ("metadata.jsonl", "metadata.csv"):
            if (path / name).is_file():
                return PictureReader(path, table(path / name, columns), columns, atomic_dir=True)
        try:
            return PictureReader.of_folder(path, columns)
        except UserError:
            texts = sorted(file for ending in TEXT for file in _files(path, ending))
            if not texts:
                raise UserError(f"{path}: {EXPECTED}, found a folder with none of these") from None
            return _of_files(source, [File.of(path, file) for file in texts], columns)
    if not path.is_file():
        raise UserError(f"{path}: {EXPECTED}, found {'something that is no file' if path.exists() else 'none'}")
    name = path.name.lower()
    if name.endswith(".csv") or name == "metadata.jsonl":
        return PictureReader(path.parent, table(path, columns), columns)
    return _of_files(source, [File.of(path.parent, path)], columns)


SET = ("manifest.json", "documents.npy", "tokenizer.json")
"""files by which a folder is known as a data set"""
TAR, PARQUET, JSON = (".tar",), (".parquet",), (".jsonl", ".jsonl.gz")
TEXT = (".txt", ".txt.gz", ".md")
EXPECTED = (
    'expected "world", or pictures with captions (.txt beside each, metadata.jsonl, a .csv table), WebDataset .tar '
    "files, .parquet, .jsonl or .txt, or a data set"
)
ELSEWHERE = "expected .tar, .parquet, .jsonl or .txt files, many as {00000..00041}.tar, or a data set"


def _kinds() -> list[tuple[tuple[str, ...], Callable[[list[File], Columns], Reader]]]:
    from .parquet import ParquetReader
    from .tars import TarReader
    from .texts import JsonReader, TextReader

    return [(TAR, TarReader), (PARQUET, ParquetReader), (JSON, JsonReader), (TEXT, TextReader)]


def _of_files(source: str, files: list[File], columns: Columns, expected: str = EXPECTED) -> Reader:
    """The reader of those of the first kind that there is."""
    for endings, reader in _kinds():
        some = [file for file in files if file.name.lower().endswith(endings)]
        if some:
            if len(some) < len(files) or Path(source).is_dir():
                logger.info(f"{source}: taking its {len(some)} {endings[0]} files; what else is there is left aside")
            return reader(some, columns)
    raise UserError(f"{source}: {expected}, found {'a file' if len(files) == 1 else 'files'} of another kind")


def _of_set(source: str, cache: Cache) -> Reader:
    from .sets import SetReader

    return SetReader(DataSet(source, cache))


def _elsewhere(source: str, columns: Columns, cache: Cache) -> Reader:
    """Of a URL: a data set has a manifest below it; else it is a file, or stands for several."""
    if not url_name(source).lower().endswith((*TAR, *PARQUET, *JSON, *TEXT)) and "*" not in source:
        try:
            cache.newest(f"{source.rstrip('/')}/{SET[0]}")
            return _of_set(source, cache)
        except MissingError:
            pass
    try:
        files = remote_files(source, cache)
    except MissingError as error:
        raise UserError(f"{source}: {ELSEWHERE}, found none ({error})") from None
    if not files:
        raise UserError(f"{source}: {ELSEWHERE}, found none")
    return _of_files(source, files, columns, ELSEWHERE)


def _files(folder: Path, ending: str) -> list[Path]:
    """In a folder and its folders, hidden ones left out."""
    return [
        path
        for path in folder.rglob(f"*{ending}")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def parse_json(text: str) -> Any:
    """Raises ValueError where it is no JSON, or nested deeper than anything is."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, found brackets in brackets without end") from None
    except ValueError as error:
        raise ValueError(f"expected JSON, found something else ({error})") from None


def interleaved(parts: list[Any], picture: Callable[[Any], bytes]) -> tuple[str | bytes, ...]:
    """A list of words, `{"text": words}` and `{"image": name}` as parts of a document. Raises ValueError."""
    found: list[str | bytes] = []
    for part in parts:
        words = part.get("text") if isinstance(part, dict) else part
        if isinstance(words, str):
            found.append(words.strip())
        elif isinstance(part, dict) and "image" in part and words is None:
            found.append(picture(part["image"]))
        else:
            raise ValueError(f"expected parts that are words or pictures, found {json.dumps(part):.60}")
    if not found:
        raise ValueError("expected parts, found none")
    return tuple(found)


def decode_text(data: bytes, what: str) -> str:
    """UTF-8, with or without a mark. Raises ValueError that says where it is none."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8, found something else at byte {error.start}") from None
