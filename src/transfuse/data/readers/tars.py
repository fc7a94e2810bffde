"""WebDataset tars: members of one name are one document.

000000012.jpg  000000012.txt  000000012.json         an image and its caption (.txt, or "caption" in .json)
000000012.jpg  000000012.json                        {"captions": [...], "weights": [...]}: several of them
000000013.0.png  000000013.1.png  000000013.json     {"parts": [{"text": ...}, {"image": 0}, ...]}
clip.0000.jpg  clip.0000.txt  clip.0001.jpg  ...     images of one name up to the first dot: each is its own document

A tar is read by its headers alone, and a part at a time, so memory does not grow with it.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ...images import SUFFIXES
from ..remote import File
from .content import CAPTION_COLUMNS, caption_text, captions_in, decode_text, interleaved, parse_json, weighted
from .contract import LOST_REST, PER_PART, Columns, Fault, FileReader, Item, LeftOut, Part, Raw
from .listing import CAPTION_ENDINGS, Listing
from .splits import FIELD, choose_split, split_in, split_of

BLOCK = tarfile.BLOCKSIZE  # of a header, and of what contents are filled up to
MOST_NAMES = 5  # of a document's members, in a message
Entry = tuple[str, int | None, int]
"""of a member: its ending after the document's name, its place in the file (None: a link), its size"""


@dataclass(frozen=True)
class Members:
    """The members of one document."""

    key: str
    files: tuple[Entry, ...]


Found = Members | Fault | LeftOut


class TarReader(FileReader):
    """Members of a document must be adjacent.

    Where they are not, the file was put together wrongly, and nobody knows which caption belongs to which image: each
    such document is a fault.
    """

    def __init__(self, listing: Listing, files: list[File], columns: Columns) -> None:
        super().__init__(listing, files)
        self.columns, self.by_split = columns, False
        if columns.source_split != "all":
            records = ({"split": split} for split in self._splits())
            chosen = choose_split(listing.split, self.files[0].place, records, columns.source_split)
            self.by_split, self.source_split = chosen is not None, chosen or listing.split

    def _splits(self) -> Iterator[str | None]:
        for part in self.parts():
            source, items = part.what
            with source.here().open("rb") as file:
                yield from (self._split(file, item) for item in items)

    def _split(self, file: BinaryIO, item: Found) -> str | None:
        """Return the split of a document by a field of its .json, or by the folders of its name."""
        for suffix, place, size in item.files if isinstance(item, Members) else ():
            if suffix == "json" and place is not None:
                file.seek(place)
                data = file.read(size)
                with suppress(ValueError):
                    text = decode_text(data, suffix, [], self.columns.encoding)
                    if FIELD.search(text) and (split := split_in(parse_json(text))):
                        return split
        return split_of(f"{item.key.rpartition('/')[0]}/")

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            documents = scan(file.here())
            while items := list(islice(documents, PER_PART)):
                sizes = (size for item in items if isinstance(item, Members) for _, _, size in item.files)
                yield Part((file, items), sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes))

    def read(self, part: Part) -> Iterator[Item]:
        source, items = part.what
        with source.here().open("rb") as file:
            for item in items:
                key = f"{source.name}/{item.key}"
                if self.by_split and self._split(file, item) not in (self.source_split, None):
                    continue
                if not isinstance(item, Members):
                    yield replace(item, key=key)
                    continue
                data = {}
                try:
                    for suffix, place, size in item.files:
                        file.seek(place)
                        data[suffix] = file.read(size)
                    yield self._document(key, data)
                except (OSError, ValueError) as error:
                    # Without a list of parts, several images are several documents.
                    images = 0 if b'"parts"' in data.get("json", b"") else sum(map(_is_image, data))
                    yield Fault(key, str(error), max(1, images))

    def _document(self, key: str, data: dict[str, bytes]) -> Raw:
        images = {suffix: value for suffix, value in data.items() if _is_image(suffix)}
        names = ", ".join(sorted(data)[:MOST_NAMES]) + (
            f" and {len(data) - MOST_NAMES} more" if len(data) > MOST_NAMES else ""
        )
        texts, changed = dict[str, str](), list[str]()
        for suffix, value in data.items():
            if suffix == "json" or f".{suffix}".lower().endswith(CAPTION_ENDINGS):
                texts[suffix] = decode_text(value, suffix, changed, self.columns.encoding)
        record = parse_json(texts.pop("json")) if "json" in texts else {}
        if isinstance(record, dict) and isinstance(record.get("parts"), list):
            numbered = {suffix.split(".")[0]: suffix for suffix in images}
            used = {"json"}

            def image(number: Any) -> bytes:
                if not isinstance(number, int) or str(number) not in numbered:
                    raise ValueError(f"expected picture {number} among the members, found {names}")
                used.add(numbered[str(number)])
                return images[numbered[str(number)]]

            raw = Raw(key, interleaved(record["parts"], image))
        else:
            if len(images) != 1:
                raise ValueError(f"expected one picture, found {names}")
            captions, weights, used = self._captions(texts, record)
            if not captions:
                raise ValueError(f"expected a caption, found none among {names}")
            used |= {*images}
            raw = Raw(key, (*images.values(), *captions), True, weights)
        unused = [f".{suffix.rpartition('.')[2]} file of a tar not used" for suffix in data if suffix not in used]
        return replace(raw, changed=(*changed, *unused))

    def _captions(self, texts: dict[str, str], record: Any) -> tuple[list[str], tuple[float, ...], set[str]]:
        """Return the captions of the text members, or of the first caption field of the record, with its weights.

        The last are the members that have them.
        """
        name = self.columns.caption_column
        captions = {} if name else {end: caption_text(text, self.columns.first_line) for end, text in texts.items()}
        if any(captions.values()):
            return list(dict.fromkeys(filter(None, captions.values()))), (), {*captions}
        fields = ((name,) if name else ("captions", *CAPTION_COLUMNS)) if isinstance(record, dict) else ()
        field = next((field for field in fields if record.get(field)), None)
        if field is None:
            return [], (), set()
        return *weighted(captions_in(record[field], field), record.get("weights")), {"json"}


def _is_image(suffix: str) -> bool:
    return f".{suffix.split('.')[-1].lower()}" in SUFFIXES


def scan(path: Path) -> Iterator[Found]:
    """Yield the documents of one tar, by its headers alone.

    Where it is cut short or damaged, a fault says from where on, and counts the documents that the rest would hold.
    """
    seen: set[str] = set()
    key, files = "", list[Entry]()
    reached, documents, size = -1, 0, 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:  # once: a cache may remove it
            size = os.fstat(file.fileno()).st_size
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                if tar.offset <= reached:  # a negative size would lead back here for ever
                    raise tarfile.ReadError("a member's size is below zero")
                reached = tar.offset
                if member.isdir():
                    continue
                *folders, base = [part for part in member.name.split("/") if part not in ("", ".", "..")] or [""]
                if any(part.startswith(".") for part in (*folders, base)):
                    yield LeftOut(member.name, "hidden file of a tar", f"{member.size} bytes")
                    continue
                stem, _, suffix = base.partition(".")
                name = "/".join([*folders, stem])
                if name != key:
                    yield from _documents(key, files, seen)
                    documents += bool(files)
                    key, files = name, []
                suffix = "json" if suffix.lower() == "json" else suffix
                files.append((suffix, member.offset_data if member.isfile() else None, member.size))
            yield from _documents(key, files, seen)
            documents += bool(files)
            end = tar.offset
            # tarfile takes a damaged header, or one block of zeros, for the end: after the end all is zeros.
            file.seek(end)
            while block := file.read(1 << 20):
                if block.strip(b"\0"):
                    lost = f"expected a tar's end at byte {end}, found more after it, which is lost"
                    yield Fault("(the file)", lost, _lost_documents(size - end, end, documents))
                    break
    except (tarfile.TarError, OSError) as error:
        # The member read last may be the one cut short: what is left of its document cannot be trusted.
        lost = f"found one cut short or damaged ({error}); what follows is lost"
        yield Fault(key or "(the file)", f"expected a tar, {lost}", _lost_documents(size - reached, reached, documents))


def _lost_documents(rest: int, reached: int, documents: int) -> int:
    """Return how many documents of the size of those before it the rest of a tar may hold, at least `LOST_REST`."""
    return max(LOST_REST, rest * documents // reached) if reached > 0 else LOST_REST


def _documents(key: str, files: list[Entry], seen: set[str]) -> Iterator[Members | Fault]:
    """Yield the documents among members of one name up to the first dot.

    They are one, unless it has several images of further names (clip.0000.jpg, a.left.jpg) and no list of parts, which
    is in KEY.json, or captions of an image that is lost: then each name up to the last dot is a document.
    """
    images = [suffix for suffix, _, _ in files if _is_image(suffix)]
    numbered = all(suffix.split(".")[0].isdecimal() for suffix in images)
    shown = {suffix.rpartition(".")[0] for suffix in images}
    texts = {suffix.rpartition(".")[0] for suffix, _, _ in files if f".{suffix}".lower().endswith(CAPTION_ENDINGS)}
    others = texts - shown - {""} if shown != {""} else set()
    one_is_lost = bool(shown and others and (shown & texts or (numbered and any(map(str.isdecimal, others)))))
    several = len(shown) > 1 and not (numbered and "json" in {suffix for suffix, _, _ in files})
    if not several and not one_is_lost:
        documents = {key: files} if files else {}
    else:
        documents = {}
        for suffix, place, size in files:
            further, _, ending = suffix.rpartition(".")
            documents.setdefault(f"{key}.{further}" if further else key, []).append((ending, place, size))
    for name, members in documents.items():
        suffixes = [suffix for suffix, _, _ in members]
        lost = max(1, sum(map(_is_image, suffixes)))
        if name in seen:
            reason = "expected a document's members side by side, found more of this name further on"
            yield Fault(name, reason, lost)
        elif any(place is None for _, place, _ in members):
            yield Fault(name, "expected files, found links to others", lost)
        elif len(set(suffixes)) != len(members):
            yield Fault(name, f"expected members of different kinds, found {', '.join(suffixes[:MOST_NAMES])}", lost)
        else:
            yield Members(name, tuple(members))
        seen.add(name)
