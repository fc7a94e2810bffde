"""WebDataset tars, as img2dataset writes them: members of one name up to the first dot are one document.

    00000.tar:  000000012.jpg  000000012.txt  000000012.json     a picture and its caption (.txt, or "caption" in .json)
                000000013.0.png  000000013.1.png  000000013.json {"parts": [{"text": ...}, {"image": 0}, ...]}

Members of a document must lie side by side. Where they do not, the file was put together wrongly, and which caption
belongs to which picture is anyone's guess: each such document is a fault.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...images import SUFFIXES
from . import PER_PART, UNTOLD, Columns, Fault, Part, Raw, decode_text, interleaved, parse_json
from .files import File, contents
from .pictures import CAPTION_COLUMNS

LINK = -1
"""in place of a member's place: it is none of its own"""


@dataclass(frozen=True)
class Members:
    """One document's members: suffix, place in the file, size."""

    key: str
    files: tuple[tuple[str, int, int], ...]


class TarReader:
    """Documents in the order of the files' names, and in a file as they lie there."""

    text_only = False

    def __init__(self, files: list[File], columns: Columns) -> None:
        self.files, self.columns = files, columns
        self.total = sum(file.size for file in files)

    def contents(self) -> dict[str, str]:
        return contents(self.files)

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            waiting: list[Members | Fault] = []
            for item in scan(file.here()):
                waiting.append(item)
                if len(waiting) == PER_PART:
                    yield _part(file, waiting)
                    waiting = []
            if waiting:
                yield _part(file, waiting)

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        source, items = part.what
        with source.here().open("rb") as file:
            for item in items:
                key = f"{source.name}/{item.key}"
                if isinstance(item, Fault):
                    yield replace(item, key=key)
                    continue
                try:
                    data = {suffix: os.pread(file.fileno(), size, place) for suffix, place, size in item.files}
                    yield self._document(key, data)
                except (OSError, ValueError) as error:
                    yield Fault(key, str(error))

    def _document(self, key: str, data: dict[str, bytes]) -> Raw:
        pictures = {suffix: value for suffix, value in data.items() if f".{suffix.split('.')[-1].lower()}" in SUFFIXES}
        record = parse_json(decode_text(data["json"], "json")) if "json" in data else {}
        if isinstance(record, dict) and isinstance(record.get("parts"), list):
            numbered = {suffix.split(".")[0]: value for suffix, value in pictures.items()}

            def picture(number: Any) -> bytes:
                if not isinstance(number, int) or str(number) not in numbered:
                    raise ValueError(f"expected picture {number} among the members, found {', '.join(sorted(data))}")
                return numbered[str(number)]

            return Raw(key, interleaved(record["parts"], picture))
        if len(pictures) != 1:
            raise ValueError(f"expected one picture, found {', '.join(sorted(data))}")
        asked = self.columns.caption_column
        words = decode_text(data["txt"], "txt") if "txt" in data and not asked else ""
        if not words.strip() and isinstance(record, dict):
            names = (asked,) if asked else CAPTION_COLUMNS
            words = next((record[name] for name in names if isinstance(record.get(name), str)), "")
        words = words.replace("\r\n", "\n").strip()
        if not words:
            raise ValueError("expected a caption, found none")
        words = words.split("\n", 1)[0].strip() if self.columns.first_line else words
        return Raw(key, (next(iter(pictures.values())), words), pair=True)


def _part(file: File, items: list[Members | Fault]) -> Part:
    size = sum(size for item in items if isinstance(item, Members) for _, _, size in item.files)
    return Part((file, items), size)


def scan(path: Path) -> Iterator[Members | Fault]:
    """The documents of one tar, by its headers alone. Where it is cut short or damaged, a fault says from where on."""
    seen: set[str] = set()
    key, files = "", list[tuple[str, int, int]]()
    reached = -1
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # which would keep all
                if tar.offset <= reached:  # a size below zero would lead back here for ever
                    raise tarfile.ReadError("a member's size is below zero")
                reached = tar.offset
                if member.isdir() or member.name.rsplit("/", 1)[-1].startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                name = f"{folder}/{stem}".lstrip("./")
                if name != key:
                    if files:
                        yield _members(key, files, seen)
                    key, files = name, []
                files.append((suffix, member.offset_data if member.isfile() else LINK, member.size))
            if files:
                yield _members(key, files, seen)
            yield from _rest(path, tar.offset)
    except (tarfile.TarError, OSError) as error:
        # the member last met may be the one cut short: whatever there is of its document can not be trusted
        found = f"found one cut short or damaged ({error}); what follows is lost"
        yield Fault(key or "(the file)", f"expected a tar, {found}", UNTOLD)


def _members(key: str, files: list[tuple[str, int, int]], seen: set[str]) -> Members | Fault:
    if key in seen:
        return Fault(key, "expected a document's members side by side, found more of this name further on")
    seen.add(key)
    if any(place == LINK for _, place, _ in files):
        return Fault(key, "expected files, found links to others")
    if len({suffix for suffix, _, _ in files}) != len(files):
        return Fault(key, f"expected members of different kinds, found {', '.join(suffix for suffix, _, _ in files)}")
    return Members(key, tuple(files))


def _rest(path: Path, offset: int) -> Iterator[Fault]:
    """tarfile takes a damaged header, or one block of zeros, for the end: behind the end all is zeros."""
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                found = f"expected a tar's end at byte {offset}, found more behind it, which is lost"
                yield Fault("(the file)", found, UNTOLD)
                return
