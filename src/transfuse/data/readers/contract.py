"""Shared by readers: documents as they are read, and the settings of reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..remote import File, hash_files
from .listing import Listing

PER_PART = 64  # documents in a part, where they can be counted
LEAST, MOST = float(np.finfo("f4").tiny), float(np.finfo("f4").max)  # weights: the index has them in float32
LOST_REST = 100  # documents that the lost rest of a file counts for, whose number is unknown


@dataclass(frozen=True)
class Raw:
    """A document as it was read: text, and images as the bytes of an image file, or as pixels.

    pair: it is an image and its captions, `(image, caption, ...)`; training shows one of them, in either order.
    weights: how often each of several captions is shown, relative to the others; none: equally often. heldout: its side
    in the data set that it comes from, if it comes from one. roles: of a dialogue, who says or shows each part.
    changed: what reading it changed, each counted by a build, such as "read as cp1252".

    Raises ValueError for weights that do not go with the captions.
    """

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    pair: bool = False
    weights: tuple[float, ...] = ()
    heldout: bool | None = None
    roles: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights and (not self.pair or len(self.weights) != len(self.parts) - 1):
            raise ValueError(f"expected a weight for each of {len(self.parts) - 1} captions, found {len(self.weights)}")
        if not all(LEAST <= weight <= MOST for weight in self.weights):
            raise ValueError(f"expected weights above 0 in float32, found {', '.join(map(str, self.weights)):.60}")


@dataclass(frozen=True)
class Fault:
    """A document that cannot be read: its name, and why. lost: the documents lost with it, such as a file's rest."""

    key: str
    reason: str
    lost: int = 1

    def __post_init__(self) -> None:
        for name in ("key", "reason"):  # names in archives, and errors of libraries, may have several lines
            object.__setattr__(self, name, " ".join(getattr(self, name).split()))


@dataclass(frozen=True)
class LeftOut:
    """A thing that no document is made of, on purpose. reason: its kind, which a build counts."""

    key: str
    reason: str
    detail: str


Item = Raw | Fault | LeftOut


@dataclass(frozen=True)
class Part:
    """A stretch of a source. weight: its size, in the unit of the reader's `total`."""

    what: Any
    weight: int


@dataclass(frozen=True)
class Columns:
    """The parts of a source to read, and the names of things in it."""

    image_column: str = ""
    """of a table, or JSON: the column or field with the file's name, or bytes; none: one of the usual names"""
    caption_column: str = ""
    """of a table, or JSON: the column or field with the caption; none: one of the usual names"""
    first_line: bool = False
    """of a caption's .txt file, take the first line alone"""
    split: Literal["file", "paragraph", "line"] = "file"
    """what is one document of plain text"""
    count: int = 0
    """take this many documents of the source, no more; 0: all. Of "world", make this many"""
    reader: str = ""
    """how to read the source (docs/data.md lists the names); none: by what is in it"""
    caption: str = ""
    """of images in folders of their classes, or rows with a class: the caption, such as "a photo of a {class}\""""
    source_split: str = ""
    """of a source with splits (train-*, test-*, a field "split"): the one to take, or "all"; none: train"""
    encoding: str = ""
    """of text files: the character set, such as cp1252 or shift_jis; none: UTF-8, UTF-16, or Western European, by their
    bytes"""

    def __post_init__(self) -> None:
        try:
            "a".encode(self.encoding or "utf-8")
        except (LookupError, UnicodeError):
            wanted = "expected the name of a character set (cp1252, utf-16, shift_jis)"
            raise ValueError(f"encoding: {wanted}, found {self.encoding}") from None
        if self.count < 0:
            raise ValueError(f"count: expected at least 0, found {self.count}")
        if self.caption and self.caption.count("{class}") != 1:
            raise ValueError(f'caption: expected words with one {{class}} in them, found "{self.caption}"')


class Reader:
    """A source of documents; it is sent to other processes, and so is each part.

    text_only: documents are text alone. total: weight of all parts, in `unit`. items: documents or their numbers, where
    each weighs 1. listing: the files of the source; None: it is not made of files. names: those that are read, and not
    among those of `contents`. source_split: the one that is read of several, chosen by names or by a field.
    """

    text_only = False
    unit = "documents"
    total: int
    items: Sequence[Any]
    listing: Listing | None = None
    names: Sequence[str] = ()
    source_split = ""

    def contents(self) -> dict[str, str]:
        """Return hashes of everything the documents are made of, by name: other content changes one of them.

        Call it before `read`: it also finds the names that cannot all mean the image that is there for them.
        """
        raise NotImplementedError

    def parts(self) -> Iterable[Part]:
        for start in range(0, len(self.items), PER_PART):
            chunk = self.items[start : start + PER_PART]
            yield Part(chunk, len(chunk))

    def read(self, part: Part) -> Iterator[Item]:
        raise NotImplementedError


class FileReader(Reader):
    """The base of readers whose documents are in the files `files` of a listing, weighed in bytes."""

    unit = "bytes"

    def __init__(self, listing: Listing, files: Sequence[File]) -> None:
        self.listing = replace(listing, tables=[file.name for file in files])
        self.source_split = listing.split
        self.files = sorted(files, key=lambda file: file.name.split("/"))
        self.names = [file.name for file in self.files]
        self.total = sum(file.size for file in self.files)

    def contents(self) -> dict[str, str]:
        return hash_files(self.files)
