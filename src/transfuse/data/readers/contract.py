"""Shared by readers: documents as they are read, the settings of reading, and the files of a source."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Protocol, cast

import numpy as np

from ...errors import UserError
from ...images import SUFFIXES, walk_folder
from ...log import logger
from ..remote import File, hash_files

PER_PART = 64  # documents in a part, where they can be counted
LOST_REST = 100  # documents that the lost rest of a file counts for, whose number is unknown
SNIFFED = 1 << 16  # bytes at each end of a file that tell what is in it
CHUNK = 1 << 18  # bytes of lines that make a part
CAPTION_ENDINGS = (".txt", ".caption")
NOT_READ = (".svg", ".svgz", ".eps", ".psd", ".xcf", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".raw")
"""image formats that are left out by name"""
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
IMAGE_COLUMNS = (
    *("file_name", "image", "image_path", "filepath", "path", "file"),
    *("filename", "image_name", "image_file", "img", "jpg", "png", "picture", "photo"),
)
CAPTION_COLUMNS = (
    *("text", "caption", "TEXT", "prompt", "description"),
    *("captions", "sentences", "sentence", "comment", "alt_text", "raw"),
)
NUMBERED = re.compile(r"(caption|text|sentence)_?\d+", re.IGNORECASE)  # columns of one caption each
DOWNLOAD = "download them first (img2dataset writes tars, which are read as they are)"
ROLES = ("system", "user", "assistant")
CONTAINERS = (".tar", ".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv")
"""files whose names may hold the name of a split among others, as in captions_train2017.json"""
NEAREST = {
    (".zip", ".7z", ".rar", ".tgz", ".tar.gz", ".tar.zst", ".gz"): "unpack them, and build from the folder",
    (".json",): "coco, records or captions-json: their fields are none of those (docs/data.md lists them)",
    (".csv", ".tsv"): "table: name its columns with --image-column and --caption-column",
    NOT_READ: "images: write them as PNG, with a .txt file of the same name as the caption",
    (".npy", ".npz", ".h5", ".hdf5", ".mat", ".tfrecord", ".pkl"): "parquet or images: write its arrays as image files",
    (".mp4", ".avi", ".mov", ".mkv", ".webm"): "images: extract frames, with a .txt file each",
    (".pdf", ".html", ".htm", ".docx", ".epub"): "text: convert them to .txt",
}
"""what to do with files that no reader takes"""


@dataclass(frozen=True)
class Raw:
    """A document as it was read: text, and images as the bytes of an image file, or as pixels.

    pair: it is an image and its captions, `(image, caption, ...)`; training shows one of them, in either order.
    weights: how often each of several captions is shown, relative to the others; none: equally often. heldout: its side
    in the data set that it comes from, if it comes from one. roles: of a dialogue, who says or shows each part.

    Raises ValueError for weights that do not go with the captions.
    """

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    pair: bool = False
    weights: tuple[float, ...] = ()
    heldout: bool | None = None
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights and (not self.pair or len(self.weights) != len(self.parts) - 1):
            raise ValueError(f"expected a weight for each of {len(self.parts) - 1} captions, found {len(self.weights)}")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"expected weights above 0, found {', '.join(f'{weight:g}' for weight in self.weights)}")


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
    """of a source with splits (train-*, test-*): the one to take, or "all"; none: train"""

    def __post_init__(self) -> None:
        if self.caption and self.caption.count("{class}") != 1:
            raise ValueError(f'caption: expected words with one {{class}} in them, found "{self.caption}"')


class Reader(Protocol):
    """A source of documents; it is sent to other processes, and so is each part.

    text_only: documents are text alone. total: weight of all parts. listing: the files of the source; None: it is not
    made of files. names: those that are read, and not among those of `contents`.
    """

    text_only: bool
    total: int
    listing: Listing | None
    names: Sequence[str]

    def contents(self) -> dict[str, str]:
        """Return hashes of everything the documents are made of, by name: other content changes one of them."""

    def parts(self) -> Iterable[Part]: ...

    def read(self, part: Part) -> Iterator[Raw | Fault]: ...


class FileReader:
    """The base of readers whose documents are in the files `files` of a listing, weighed in bytes."""

    text_only = False

    def __init__(self, listing: Listing, files: Sequence[File]) -> None:
        self.listing: Listing | None = listing
        self.files = sorted(files, key=lambda file: file.name.split("/"))
        self.names: Sequence[str] = [file.name for file in self.files]
        self.total = sum(file.size for file in self.files)

    def contents(self) -> dict[str, str]:
        return hash_files(self.files)


class CountedReader:
    """The base of readers whose documents have numbers, each of weight 1."""

    text_only = False
    total: int
    listing: Listing | None = None
    names: Sequence[str] = ()

    def parts(self) -> Iterable[Part]:
        return parts_of(range(self.total))


def parts_of(items: Sequence[Any]) -> Iterator[Part]:
    """Yield `PER_PART` items at a time, each of weight 1."""
    for start in range(0, len(items), PER_PART):
        some_items = items[start : start + PER_PART]
        yield Part(some_items, len(some_items))


# --- the files of a source --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The files of a source by name, which is their path below `root`.

    aside: the reason for each file that no reader is shown. whole: it is a folder, every file of which is accounted
    for; otherwise it is one file, or files at a URL. split: the one that `files` are of, if it was chosen.
    """

    source: str
    root: Path
    files: tuple[File, ...]
    aside: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    split: str = ""

    @classmethod
    def of_folder(cls, folder: Path) -> Listing:
        """List a folder and its subfolders."""
        paths, left_out = walk_folder(folder)
        files = tuple(File.of(folder, path) for path in paths)
        aside = {path.relative_to(folder).as_posix(): reason for path, reason in left_out.items()}
        return cls(str(folder), folder, files, aside, whole=True)

    def of_split(self, wanted: str) -> Listing:
        """Return the listing of one split alone, if names show several; the files of others are left out, and counted.

        Folders are named as a split (train/, val2017/), tables and archives have it in their names (test-00000.tar).
        Files of no split are kept. Raises UserError for a split that does not exist, or if none is called train.
        """
        splits = {file.name: split_of(file.name) for file in self.files}
        known = sorted({split for split in splits.values() if split})
        if wanted == "all" or (not wanted and len(known) < 2):
            return self
        chosen = SPLITS.get(wanted, wanted or "train")
        if chosen not in known:
            if wanted and self.ending(".json", ".csv", ".tsv", "metadata.jsonl"):  # which may have a field "split"
                return self
            expected = f'a split "{wanted}"' if wanted else "a split to take (--source-split NAME, or all)"
            raise UserError(f"{self.source}: expected {expected}, found {', '.join(known) or 'no splits'}")
        others = {name: split for name, split in splits.items() if split and split != chosen}
        counts = ", ".join(f"{count} of {split}" for split, count in sorted(Counter(others.values()).items()))
        if counts:
            logger.info(
                f"{self.source}: taking the split {chosen}, not {counts} (--source-split takes another, or all)"
            )
        aside = {name: f"of the split {split}" for name, split in others.items()}
        files = tuple(file for file in self.files if file.name not in others)
        return replace(self, files=files, aside={**self.aside, **aside}, split=chosen)

    def ending(self, *endings: str) -> list[File]:
        """Return the files whose names end so, in upper or lower case."""
        return [file for file in self.files if file.name.lower().endswith(endings)]

    def images(self) -> list[File]:
        return self.ending(*SUFFIXES)

    def find(self, name: str, below: str = "") -> str | None:
        """Return the name of the file that a table in the folder `below` calls `name`; None: there is none.

        It is looked for below that folder, below the root, on the disk, and last anywhere by its own name, with or
        without its ending. Raises ValueError for a name that several files have.
        """
        name = name.replace("\\", "/")
        for path in (os.path.normpath(os.path.join(below, name)), os.path.normpath(name)):
            if path in self._names or (path and os.path.isfile(self.root / path)):
                return os.path.relpath(self.root / path, self.root) if os.path.isabs(path) else path
        named = self._by_last.get(name.rpartition("/")[2], [])
        if len(named) > 1:
            further = [other for other in named if f"/{other}".endswith(f"/{name}")]
            if len(further) != 1:
                raise ValueError(f"expected one file of this name, found {', '.join(named[:3])}")
            named = further
        return named[0] if named else None

    @cached_property
    def _names(self) -> set[str]:
        return {file.name for file in self.files}

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        """Names of images by their last part, with and without its ending."""
        named: dict[str, list[str]] = {}
        for file in self.images():
            last = file.name.rpartition("/")[2]
            for key in {last, last.rpartition(".")[0]}:
                named.setdefault(key, []).append(file.name)
        return named

    @property
    def n_files(self) -> int:
        """The number of files, with those that no reader is shown."""
        return len(self.files) + len(self.aside)

    def left_out(self, used: Collection[str]) -> dict[str, str]:
        """Return why each file is left out of whose content (`used`, names) no document is made, sorted by name."""
        unused = {file.name: _why_unused(file) for file in self.files if file.name not in used}
        return dict(sorted({**self.aside, **unused}.items()))

    def what_is_there(self) -> str:
        """Return the number of files by ending, and what to do with the most frequent kind."""
        counts = Counter(PurePosixPath(file.name).suffix.lower() or "without an ending" for file in self.files)
        listed = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))
        hints = (hint for ending, _ in counts.most_common() for kinds, hint in NEAREST.items() if ending in kinds)
        hint = next(hints, "")
        aside = [f"{len(self.aside)} left aside"] if self.aside else []
        there = ", ".join(filter(None, [listed, *aside]))
        return (f": {there}" if there else "") + (f"; nearest: {hint}" if hint else "")


def _why_unused(file: File) -> str:
    ending = PurePosixPath(file.name).suffix.lower()
    if not os.path.exists(file.place):
        return "broken link"
    if ending in SUFFIXES:
        return "image that no document names"
    if ending in NOT_READ:
        return f"image format that is not read ({ending}): write it as PNG"
    if ending in CAPTION_ENDINGS:
        return "text of no image"
    return f"not read by this reader ({ending or 'no ending'})"


def split_of(name: str) -> str | None:
    """Return "train", "validation" or "test" if a folder or file name says so, None otherwise."""
    *folders, last = name.lower().split("/")
    stem = last.partition(".")[0]
    words = [re.sub(r"\d+$", "", folder) for folder in folders]
    words += re.findall(r"[a-z]+", last.rpartition(".")[0]) if last.endswith(CONTAINERS) else [stem]
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


def sniff(file: File) -> bytes:
    """Return both ends of a file. Raises UserError like `File.here`; an unreadable file is empty."""
    path = file.here()
    try:
        with path.open("rb") as opened:
            head = opened.read(SNIFFED)
            opened.seek(max(len(head), path.stat().st_size - SNIFFED))
            return head + opened.read(SNIFFED)
    except OSError:
        return b""


def open_file(file: File) -> BinaryIO:
    """Open a file, decompressed if its name ends in .gz. Raises OSError, UserError."""
    path = file.here()
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def chunks(source: File, chunk: int, *separators: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield stretches of a file that end after a separator, and the number of lines before each."""
    lines, rest = 0, bytearray()
    try:
        with open_file(source) as file:
            while block := file.read(chunk):
                begin = max(0, len(rest) - max(map(len, separators)) + 1)  # a separator may have begun in the rest
                rest += block
                ends = [(rest.rfind(separator, begin), len(separator)) for separator in separators]
                cut = max((place + length for place, length in ends if place >= 0), default=0)
                if cut:
                    yield lines, bytes(rest[:cut])
                    lines += rest.count(b"\n", 0, cut)
                    del rest[:cut]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source.place}: expected a readable file, found an unreadable one ({error})") from None
    if rest:
        yield lines, bytes(rest)


# --- content ----------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError where it is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, found brackets in brackets without end") from None
    except ValueError as error:
        raise ValueError(f"expected JSON, found something else ({error})") from None


def decode_text(data: bytes, what: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises ValueError that names the first wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8, found something else at byte {error.start}") from None


def interleaved(parts: list[Any], image: Callable[[Any], bytes]) -> tuple[str | bytes, ...]:
    """Return strings, `{"text": text}` and `{"image": name}` as parts of a document. Raises ValueError."""
    converted: list[str | bytes] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            converted.append(text.strip())
        elif isinstance(part, dict) and "image" in part and text is None:
            converted.append(image(part["image"]))
        else:
            raise ValueError(f"expected parts that are words or pictures, found {json.dumps(part):.60}")
    if not converted:
        raise ValueError("expected parts, found none")
    return tuple(converted)


def dialogue(key: str, messages: Any, image: Callable[[Any], bytes]) -> Raw:
    """Return a dialogue of OpenAI's messages: content is a text, or a list of texts and images.

    Raises ValueError for other messages, two turns of one role after another, or no turn of the assistant.
    """
    parts: list[str | bytes] = []
    roles: list[str] = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or message.get("role") not in ROLES or message["role"] in roles[-1:]:
            raise ValueError(f"expected messages of {', '.join(ROLES)} in turns, found {json.dumps(message):.60}")
        content = message.get("content")
        listed = [
            {"image": part["image_url"]["url"]} if isinstance(part, dict) and "image_url" in part else part
            for part in (content if isinstance(content, list) else [content])
        ]
        spoken = interleaved(listed, image)
        parts += spoken
        roles += [message["role"]] * len(spoken)
    if "assistant" not in roles:
        raise ValueError("expected a turn of the assistant, found none")
    return Raw(key, tuple(parts), roles=tuple(roles))


# --- fields and their names -------------------------------------------------------------------------------------------


def column(where: str, known: Iterable[str], what: str, wanted: str, usual: tuple[str, ...]) -> str:
    """Return the name of a column: the wanted one, or the first usual one, in upper or lower case.

    Raises UserError that lists the columns.
    """
    known = [str(name) for name in known]
    for name in (wanted,) if wanted else usual:
        if name in known:
            return name
    lower = {name.lower(): name for name in reversed(known)}
    for name in () if wanted else usual:
        if name.lower() in lower:
            return lower[name.lower()]
    expected = f'"{wanted}"' if wanted else f"one of {', '.join(usual)} (or --{what}-column)"
    raise UserError(f"{where}: {what} column: expected {expected}, found {', '.join(known)}")


def caption_columns(where: str, known: Iterable[str], wanted: str) -> list[str]:
    """Return the caption column as `column` does; or all of caption_0, caption_1, ... Raises UserError."""
    known = list(known)
    try:
        return [column(where, known, "caption", wanted, CAPTION_COLUMNS)]
    except UserError:
        numbered = [name for name in known if NUMBERED.fullmatch(str(name))]
        if wanted or not numbered:
            raise
        return numbered


def captions_in(value: Any, where: str) -> list[str]:
    """Return the captions of a field: words, or a list of words or of records that have them. Raises ValueError."""
    if isinstance(value, str) and value.startswith('["') and value.endswith('"]'):  # a list in a table's field
        value = parse_json(value)
    values = value if isinstance(value, list | tuple) else [value]
    captions = []
    for item in values:
        if isinstance(item, dict):
            item = next((item[name] for name in ("raw", *CAPTION_COLUMNS) if isinstance(item.get(name), str)), item)
        if item is not None and not isinstance(item, str):
            raise ValueError(f"expected words in {where}, found {json.dumps(item, default=str):.60}")
        captions.append((item or "").strip())
    return list(filter(None, captions))


def worded(class_name: str, columns: Columns) -> str:
    """Return the caption of a class, by the template `columns.caption`."""
    words = class_name.replace("_", " ").strip()
    return columns.caption.replace("{class}", words) if columns.caption else words


def is_image_name(field: str) -> bool:
    """Return True for the name or URL of an image, with the number of its caption (#0) or without."""
    return len(field) < 300 and re.sub(r"[#?].*$", "", field).lower().endswith(SUFFIXES)


def caption_text(text: str, first_line: bool) -> str:
    """Return the caption in a text file: all of it, or its first line."""
    text = text.replace("\r\n", "\n").strip()
    return text.split("\n", 1)[0].strip() if first_line else text
