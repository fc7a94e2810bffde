"""Documents that are records: lines of jsonl, items of a JSON list; also rows of tables, which `parquet` reads.

{"text": "words"}
{"image": "a.png", "text": "a crab"}                                     a pair; captions may be a list
{"image": {"bytes": ..., "path": ...}, "label": 3}                       a class, whose name the table's schema has
{"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}     images by path, or as "data:...;base64,..."
{"texts": ["first", null, "then"], "images": [null, "a.png", null]}      as OBELICS writes them
{"text_list": ["first", "then"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}       as MMC4 does
{"messages": [{"role": "user", "content": "draw a crab"}, ...]}          a dialogue; content may be a list of parts
{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, ...]}         as LLaVA does
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError
from ..remote import File, hash_files
from .content import (
    CAPTION_COLUMNS,
    CHUNK,
    DOWNLOAD,
    IMAGE_COLUMNS,
    SAMPLED,
    caption_columns,
    captions_in,
    check_text,
    chunks,
    conversation,
    decode_text,
    dialogue,
    file_encoding,
    interleaved,
    is_image_name,
    parse_json,
    sniff,
    weighted,
)
from .contract import Columns, Fault, FileReader, Item, Part, Raw
from .listing import Listing, folders_of, may_be_one
from .splits import FIELD, choose_split, split_in

DATA = "data:"  # begins an image that is in the record itself
SPLIT = re.compile(FIELD.pattern.encode(), re.IGNORECASE)  # the field, in a line
ROWS = 64  # of a table, read at a time
DIALOGUES = ("messages", "conversations")
LISTS = ("parts", "texts", "text_list", *DIALOGUES)  # fields of documents of several parts
EMPTY = ({"bytes": None, "path": None}, {"path": None})  # an image that a table does not have
Image = Callable[[Any], bytes]


def document(key: str, record: Any, columns: Columns, image: Image) -> Raw:
    """Return the document of a record; `image` returns the bytes of what stands for an image.

    Raises ValueError where it is none, or images would be left aside.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    if (parts := _parts(record)) is not None:
        shown = [part["image"] for part in parts if isinstance(part, dict) and part.get("image")]
        if (own := own_images(record, columns)) and own != shown:
            raise ValueError("pictures of the record that are not in its parts")
        return Raw(key, interleaved(parts, image))
    if "messages" in record or isinstance(record.get("conversations"), list):
        turns = record.get("messages", record.get("conversations"))
        return dialogue(key, conversation(turns, own_images(record, columns)), image)
    try:
        text, *more = caption_columns(key, record, columns.caption_column)
    except UserError:
        raise ValueError(f"neither parts, nor texts and images, nor {columns.caption_column or 'text'}") from None
    field = image_field(record, columns)
    if columns.reader != "text":
        for other in ("image", "images"):
            if field != other and record.get(other):
                raise ValueError(f"{other} next to {text}: expected one picture in {field or 'image'}, or parts")
    if field is None:
        return Raw(key, interleaved([record[text]], image))
    captions = [words for name in (text, *more) for words in captions_in(record[name], name)]
    if not captions:
        raise ValueError(f"a picture, and no caption in {text}")
    captions, weights = weighted(captions, record.get("weights"))
    return Raw(key, (image(record[field]), *captions), True, weights)


def _parts(record: dict[str, Any]) -> list[Any] | None:
    """Return the parts of a record that lists them, or texts and images; None: it does not. Raises ValueError."""
    if isinstance(record.get("parts"), list):
        return record["parts"]
    if isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
        both = list(zip(record["texts"], record["images"], strict=True))
        if any(text and name for text, name in both):
            raise ValueError("words and a picture in one place")
        return [{"image": name} if name else text for text, name in both if text or name]
    return _mmc4_parts(record) if isinstance(record.get("text_list"), list) else None


def own_images(record: dict[str, Any], columns: Columns) -> list[Any]:
    """Return the images in fields of a record of several parts. Raises ValueError for others in a second field."""
    listed: list[list[Any]] = []
    for field in () if columns.reader == "text" else filter(None, (image_field(record, columns), "images")):
        value = record.get(field)
        names = [name for name in (value if isinstance(value, list) else [value]) if name and name not in EMPTY]
        listed += [names] if names and names not in listed else []
    if listed[1:]:
        raise ValueError("pictures in images, and others in another field")
    return listed[0] if listed else []


def image_field(record: dict[str, Any], columns: Columns) -> str | None:
    """Return the field that has a record's image; fields of any files count only where they name an image."""
    if columns.reader == "text":
        return None
    for field in (columns.image_column,) if columns.image_column else IMAGE_COLUMNS:
        value = record.get(field)
        named = not isinstance(value, str) or is_image_name(value) or value.startswith(DATA)
        if value and (named or field == columns.image_column or field not in ("path", "file", "filepath")):
            return field
    return None


def _mmc4_parts(record: dict[str, Any]) -> list[Any]:
    """Return sentences, each after the images that are matched with it. Raises ValueError."""
    images: dict[int, list[Any]] = {}
    for info in record.get("image_info") or []:
        if not isinstance(info, dict) or not isinstance(info.get("matched_text_index"), int):
            raise ValueError("an image without matched_text_index")
        images.setdefault(info["matched_text_index"], []).append({"image": info.get("image_name")})
    beyond = [number for number in images if not 0 <= number < len(record["text_list"])]
    if beyond:
        raise ValueError(f"an image matched with sentence {beyond[0]} of {len(record['text_list'])}")
    return [part for number, text in enumerate(record["text_list"]) for part in (*images.get(number, []), text)]


def is_dialogue(record: Any) -> bool:
    return isinstance(record, dict) and any(isinstance(record.get(name), list) for name in DIALOGUES)


def has_images(record: Any, columns: Columns) -> bool:
    """Return True for a record that names an image, or has one."""
    if not isinstance(record, dict):
        return False
    listed = [record.get("images"), record.get("image_info"), record.get("parts")]
    parts = [part for values in listed if isinstance(values, list) for part in values]
    return image_field(record, columns) is not None or any(
        part and (not isinstance(part, dict) or "text" not in part) and not isinstance(part, list) for part in parts
    )


# --- jsonl, and lists in JSON -----------------------------------------------------------------------------------------


class JsonReader(FileReader):
    """A document a line, or an item of a list; the first hundred tell whether there are images. chunk: bytes of a part.

    Raises UserError for an empty file, for images by URL, and for text alone with fields that speak of images.
    """

    def __init__(self, listing: Listing, files: list[File], columns: Columns, chunk: int = CHUNK) -> None:
        super().__init__(listing, files)
        self.columns, self.chunk = columns, chunk
        self.by_field, place = False, self.files[0].place
        first = list(islice(self._every_record(), SAMPLED))
        if not first:
            raise UserError(f"{place}: expected a JSON document a line, found an empty file")
        if columns.source_split != "all":
            chosen = choose_split(listing.split, place, self._every_record(SPLIT), columns.source_split)
            self.by_field, self.source_split = chosen is not None, chosen or listing.split
        text = columns.reader == "text"
        records = [record for record in first if isinstance(record, dict)]
        fields = {*LISTS, *([columns.caption_column] if columns.caption_column else CAPTION_COLUMNS)} - {*DIALOGUES}
        sound = (record for record in records if is_dialogue(record) or any(record.get(field) for field in fields))
        self.dialogues = not text and is_dialogue(next(sound, None))
        self.text_only = text or not (self.dialogues or any(has_images(record, columns) for record in first))
        names = list(self._image_names(first))
        if self.text_only:
            check_text(place, records, columns)
        elif names and all(re.match(r"https?://", name) for name in names):
            raise UserError(
                f"{place}: expected images, found their URLs (the first: {names[0]:.80}); {DOWNLOAD}, or write the "
                "names of their files in place of the URLs"
            )

    def _every_record(self, having: re.Pattern[bytes] | None = None) -> Iterator[Any]:
        """Yield the records, or the ValueErrors of lines that are none; of lines, from parts where `having` is."""
        for part in self.parts():
            if having is None or part.what[2] is None or having.search(part.what[2]):
                for _, record, _ in self._records(part):
                    yield record

    def _image_names(self, records: Iterable[Any]) -> Iterator[str]:
        """Yield the names of image files in records, except in those that are faults once they are read."""
        for record in records:
            yield from names_in(record, lambda record, image: document("", record, self.columns, image))

    def contents(self) -> dict[str, str]:
        """Return hashes, also of the image files that documents name; at a URL these go by the version of the jsonl."""
        hashes = super().contents()
        if self.text_only or self.listing is None:
            return hashes
        named = NamedImages(replace(self.listing, ambiguous=()))
        for part in self.parts():
            file = part.what[0]
            if file.cache is not None:
                continue
            below = str(PurePosixPath(file.name).parent)
            for _, record, _ in self._records(part):
                if self._is_taken(record, below):
                    named.add(self._image_names([record]), below)
                elif self.by_field:
                    named.pass_over(self._image_names([record]), below, split_in(record) or "")
        self._pass_over_others(named)
        self.listing = named.checked()
        return hashes | hash_files(named.files())

    def _pass_over_others(self, named: NamedImages) -> None:
        """Add the images that files of other splits name."""
        others, whole = named.listing.others, named.listing.with_others()
        for file in claim_json(whole, self.columns) if others else ():
            if file.name in others:
                with suppress(UserError):
                    reader = JsonReader(whole, [file], replace(self.columns, source_split="all"))
                    names = self._image_names(reader._every_record())
                    named.pass_over(names, str(PurePosixPath(file.name).parent), others[file.name])

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            if file.name.lower().endswith(".json"):
                count = len(_items(file.place, self.columns.encoding)[0])
                for start in range(0, count, ROWS):
                    yield Part((file, start, None, ""), file.size * ROWS // max(ROWS, count))
            else:
                encoding = file_encoding(file, self.columns.encoding)
                for lines, data in chunks(file, self.chunk, encoding, b"\n"):
                    yield Part((file, lines, data, encoding), len(data))

    def _records(self, part: Part) -> Iterator[tuple[int, Any, list[str]]]:
        """Yield the number of each record, the record (of a line that is none the ValueError), and what was changed."""
        file, before, data, encoding = part.what
        if data is None:
            items, changed = _items(file.place, self.columns.encoding)
            for number, item in enumerate(items[before : before + ROWS], before + 1):
                yield number, item, changed
            return
        for number, line in enumerate(data.split(b"\n" if b"\n" in data else b"\r"), before + 1):
            if line.strip():
                changed = [f"read as {encoding}"] if encoding else []
                try:
                    yield number, parse_json(decode_text(line, "line", changed, "utf-8" if encoding else "")), changed
                except ValueError as error:
                    yield number, error, []

    def _is_taken(self, record: Any, below: str) -> bool:
        """Return False for a record of another split: by its field, or by the folder of its images."""
        if self.by_field or self.listing is None or not self.listing.others:
            return not self.by_field or split_in(record) in (self.source_split, None)
        with suppress(ValueError):
            return not any(
                self.listing.find(name, below) in self.listing.others for name in self._image_names([record])
            )
        return True

    def read(self, part: Part) -> Iterator[Item]:
        file = part.what[0]
        image, below = image_loader(file, self.listing), str(PurePosixPath(file.name).parent)
        for number, record, changed in self._records(part):
            key = f"{file.name}:{number}"
            if not self._is_taken(record, below):
                continue
            try:
                if isinstance(record, ValueError):
                    raise record
                if self.columns.reader != "text" and isinstance(record, dict) and is_dialogue(record) != self.dialogues:
                    raise ValueError("no turns" if self.dialogues else "a dialogue, where the first document is none")
                raw = document(key, record, self.columns, image)
                if self.text_only and not all(isinstance(part, str) for part in raw.parts):
                    raise ValueError("pictures, where the first lines have none")
                yield replace(raw, changed=tuple(changed))
            except (OSError, ValueError) as error:
                yield Fault(key, f"expected a document, found none ({error})")


def names_in(record: Any, make: Callable[[Any, Image], Raw]) -> list[str]:
    """Return the names of the image files that a record's document is made of, as far as `make` gets."""
    names: list[str] = []

    def image(value: Any) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and not value.startswith(DATA):
            names.append(value)
        return b""

    with suppress(ValueError):
        make(record, image)
    return names


class NamedImages:
    """The image files that records name."""

    def __init__(self, listing: Listing) -> None:
        self.listing, self._folders = listing, dict[str, set[tuple[str, ...]]]()
        self._others = dict[str, str]()

    def add(self, names: Iterable[str], below: str) -> None:
        """Add the names in records of the folder `below`."""
        for name in names:
            with suppress(ValueError):
                path = self.listing.find(name, below)
                self._folders.setdefault(path or str(PurePosixPath(below, name)), set()).add(tuple(folders_of(name)))

    def pass_over(self, names: Iterable[str], below: str, split: str) -> None:
        """Add the names in records of a split that is not taken."""
        for name in names:
            with suppress(ValueError):
                if path := self.listing.find(name, below):
                    self._others.setdefault(path, split)

    def files(self) -> list[File]:
        return [File(path, str(self.listing.root / path), 0) for path in self._folders]

    def checked(self) -> Listing:
        """Return the listing, which then knows the images of other splits, and names in folders that cannot be one."""
        ambiguous = (path for path, folders in self._folders.items() if not may_be_one(folders))
        others = {path: split for path, split in self._others.items() if path not in self._folders}
        return replace(self.listing, ambiguous=frozenset(ambiguous), others={**self.listing.others, **others})


def image_loader(file: File, listing: Listing | None) -> Image:
    """Return a function from what a record of `file` has for an image to its bytes; it raises OSError or ValueError."""
    below = str(PurePosixPath(file.name).parent)

    def image(value: Any) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise ValueError(f"image: a {type(value).__name__}")
        if value.startswith(DATA):
            return base64.b64decode(value.partition(",")[2], validate=True)
        path = listing.find(value, below) if listing is not None and file.cache is None else None
        return file.sibling(value) if path is None or listing is None else (listing.root / path).read_bytes()

    return image


@lru_cache(maxsize=1)
def _items(place: str, encoding: str) -> tuple[list[Any], list[str]]:
    """Return the items of a list in JSON, and what reading it changed. Raises UserError for anything else."""
    changed: list[str] = []
    try:
        items = parse_json(decode_text(Path(place).read_bytes(), "the file", changed, encoding))
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: expected a list of documents in JSON, found something else ({error})") from None
    if not isinstance(items, list):
        raise UserError(f"{place}: expected a list of documents in JSON, found a {type(items).__name__}")
    return items, changed


def claim_json(listing: Listing, columns: Columns) -> list[File]:
    """Claim .jsonl files, and .json files of lists; of a folder, only those with the name of a document's field."""
    fields = {*LISTS, *CAPTION_COLUMNS, *IMAGE_COLUMNS, columns.caption_column, columns.image_column}
    marks = tuple(f'"{field}"'.encode() for field in fields if field)

    def is_marked(data: bytes) -> bool:
        return not listing.whole or any(mark in data for mark in marks)

    lines = listing.ending(".jsonl", ".jsonl.gz", ".ndjson")
    lines = [file for file in lines if file.name.endswith(".gz") or file.size == 0 or is_marked(sniff(file))]
    lists = listing.not_of_images(".json")
    return [*lines, *(file for file in lists if re.match(rb"\s*\[\s*\{", data := sniff(file)) and is_marked(data))]
