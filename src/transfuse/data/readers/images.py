"""Images, a file each, with captions: in files next to them, or in the names of their folders (`tables`: in tables).

photos/cat.jpg  photos/cat.txt                  the caption is the content of cat.txt, .caption, or "caption" in .json
photos/cat/1.jpg  photos/dog/2.jpg              a class each; --caption "a photo of a {class}"

Each shape is a function from the files that it claims to `Row`s: an image's file, and its captions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ...log import logger
from ..remote import File, hash_files
from .content import (
    CAPTION_COLUMNS,
    caption_text,
    captions_in,
    decode_text,
    parse_json,
    sniff,
    weighted,
    worded,
)
from .contract import Columns, Fault, Item, Part, Raw, Reader
from .listing import CAPTION_ENDINGS, Listing, composed, shared_folders
from .splits import FIELD, choose_split, split_in

TEXT_FOLDER = re.compile(
    r"(?<![a-z])(captions?|te?xts?|labels?|annotations?|descriptions?|prompts?|tags)(?![a-z])", re.I
)
"""names of folders of captions"""
BOXES = re.compile(r"(\s*\d+(\s+-?\d*\.?\d+){4,}\s*)+")  # classes and places of objects, as YOLO writes them


@dataclass(frozen=True)
class Row:
    """An image's file, relative to the folder or as a table names it, and its captions, or files of them.

    fault: why it is no document. changed, weights: as in `Raw`.
    """

    name: str
    captions: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fault: str = ""
    changed: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __add__(self, other: Row) -> Row:
        """Return the row of an image that two rows name; captions without a weight next to weighted ones have 1."""
        weighed = (self, other) if self.weights or other.weights else ()
        weights = chain.from_iterable(row.weights or (1.0,) * len(row.captions) for row in weighed)
        captions, changed = self.captions + other.captions, self.changed + other.changed
        return Row(self.name, captions, changed=changed, weights=tuple(weights))


class ImageReader(Reader):
    """Documents are the rows, in their order. In a whole folder, images that no row names are faults.

    tables: the files that rows are from. passed_over: the splits of files that are left out on purpose.
    """

    def __init__(
        self,
        listing: Listing,
        tables: Sequence[File],
        rows: Sequence[Row],
        columns: Columns,
        passed_over: Mapping[str, str] = MappingProxyType({}),
        split: str = "",
    ) -> None:
        self.listing = replace(listing, others={**listing.others, **passed_over})
        self.root, self.columns = listing.root, columns
        self.source_split, self.names = split or listing.split, [table.name for table in tables]
        named = {row.name for row in rows} | set(passed_over)
        unnamed = sorted(file.name for file in listing.images() if file.name not in named) if listing.whole else []
        self.items = [*rows, *(Row(name, fault="expected a row of the table, found none") for name in unnamed)]
        self.total = len(self.items)

    def contents(self) -> dict[str, str]:
        """Return hashes of images and captions; a table counts by what its rows say."""
        names = dict.fromkeys(chain.from_iterable((row.name, *row.files) for row in self.items))
        hashes = hash_files(File(name, str(self.root / name), 0) for name in names)
        listed = [(row.name, row.captions or None, row.fault if self.names else "") for row in self.items]
        rows = json.dumps([*listed, *(row.weights for row in self.items if row.weights)])
        return hashes | {"the list of pictures and captions": hashlib.sha256(rows.encode()).hexdigest()}

    def read(self, part: Part) -> Iterator[Item]:
        for row in part.what:
            changed = [*row.changed]
            try:
                if row.fault:
                    raise ValueError(row.fault)
                beside = [self._captions(name, changed) for name in row.files]
                captions = [*row.captions, *chain.from_iterable(words for words, _ in beside)]
                if not captions:
                    raise ValueError("expected a caption, found none")
                weights = next((weights for _, weights in beside if weights), list(row.weights))
                captions, shares = weighted(captions, weights)
                image = (self.root / row.name).read_bytes()
                notes = tuple(dict.fromkeys(changed))
                yield Raw(row.name, (image, *captions), True, shares, changed=notes)
            except OSError as error:
                yield Fault(row.name, f"expected a file, found none ({error.strerror})")
            except ValueError as error:
                yield Fault(row.name, str(error))

    def _captions(self, name: str, changed: list[str]) -> tuple[list[str], Any]:
        """Return the captions in a file, and their weights if it is JSON."""
        path = self.root / name
        text = decode_text(path.read_bytes(), path.name, changed, self.columns.encoding)
        if name.lower().endswith(".json"):
            record = content if isinstance(content := parse_json(text), dict) else {}
            keys = [self.columns.caption_column] if self.columns.caption_column else CAPTION_COLUMNS
            listed = next((captions_in(record[key], key) for key in keys if record.get(key)), [])
            return listed, record.get("weights") if listed else None
        if BOXES.fullmatch(text):
            raise ValueError(f"expected words in {name}, found numbers, as of boxes")
        return list(filter(None, [caption_text(text, self.columns.first_line)])), None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "items": [], "listing": None}  # parts carry their rows


# --- captions in files next to images, and in names -------------------------------------------------------------------


def open_images(listing: Listing, files: list[File], columns: Columns) -> ImageReader:
    """Read images and the files of their captions: x.txt, x.caption or x.jpg.txt of x.jpg, several being several."""
    names = _by_ending(listing)
    rows, splits, records = list[Row](), list[Any](), list[str]()
    for image, texts in caption_files(listing, sorted(file.name for file in files), columns).items():
        fault = "" if texts else f"expected a caption in {PurePosixPath(image).stem}.txt, found no such file"
        rows.append(Row(image, files=texts, fault=fault))
        records += names.get(f"{composed(image).rpartition('.')[0]}.json", [""])[:1]
        splits.append(_split_in_file(listing.root / records[-1], columns))
    chosen = choose_split(listing.split, listing.source, splits, columns.source_split)
    taken, others = list[Row](), dict[str, str]()
    for row, record, split in zip(rows, records, map(split_in, splits), strict=True):
        if chosen is None or split in (chosen, None):
            taken.append(row)
            if split and record not in row.files:
                listing.notes[record] = "read for its split alone: the captions are in other files"
        else:
            others |= dict.fromkeys((row.name, *row.files, record), split)
    others.pop("", None)
    return ImageReader(listing, [], taken, columns, others, chosen or "")


def _split_in_file(path: Path, columns: Columns) -> Any:
    """Return the record in an image's .json, which may name its split; None: there is none, or it does not."""
    with suppress(OSError, ValueError):  # the folder, of an image without such a file
        text = decode_text(path.read_bytes(), path.name, [], columns.encoding)
        return parse_json(text) if FIELD.search(text) else None
    return None


def _by_ending(listing: Listing) -> dict[str, list[str]]:
    """Return the names of files by these names, composed, with endings in lower case."""
    names: dict[str, list[str]] = {}
    for file in listing.files:
        stem, dot, ending = composed(file.name).rpartition(".")
        names.setdefault(f"{stem}{dot}{ending.lower()}", []).append(file.name)
    return names


def caption_files(listing: Listing, images: Iterable[str], columns: Columns) -> dict[str, tuple[str, ...]]:
    """Return the files next to each image that have its captions, or those in a folder that mirrors the images' one."""
    images = [*images]
    files = _caption_files(_by_ending(listing), {image: image for image in images}, columns)
    return files if any(files.values()) else _caption_files(_by_ending(listing), _mirrored(listing, images), columns)


def _mirrored(listing: Listing, images: Collection[str]) -> dict[str, str]:
    """Return where images would be in the folder of their captions: captions/a/1.jpg for images/a/1.jpg.

    That folder has to be called so: another one may have lost its own images.
    """
    stems = {composed(image).rpartition("/")[2].rpartition(".")[0] for image in images}
    texts = [file for file in listing.ending(*CAPTION_ENDINGS) if PurePosixPath(composed(file.name)).stem in stems]
    if not texts or not images or BOXES.fullmatch(sniff(texts[0]).decode("utf-8", "replace")):
        return {image: image for image in images}
    of_texts, of_images = shared_folders([file.name for file in texts]), shared_folders(images)
    if not any(TEXT_FOLDER.search(folder) for folder in of_texts if folder not in of_images):
        return {image: image for image in images}
    return {image: "/".join([*of_texts, *image.split("/")[len(of_images) :]]) for image in images}


def _caption_files(names: dict[str, list[str]], images: dict[str, str], columns: Columns) -> dict[str, tuple[str, ...]]:
    """Return the files of captions of images. images: the places next to which they are looked for."""
    files = dict[str, tuple[str, ...]]()
    for image, place in images.items():
        whole = composed(place)
        stem = whole.rpartition(".")[0]
        sidecars = (f"{base}{ending}" for base in (stem, whole) for ending in CAPTION_ENDINGS)
        texts, records = [*chain.from_iterable(names.get(name, ()) for name in sidecars)], names.get(f"{stem}.json", [])
        files[image] = tuple((records or texts) if columns.caption_column else (texts or records))
    return files


def has_captions_beside(listing: Listing, columns: Columns) -> bool:
    """Return True for a folder where half of the images or more have captions in files of their names."""
    images = [file.name for file in listing.images()] if listing.whole else []
    captioned = sum(map(bool, caption_files(listing, images, columns).values()))
    return bool(images) and 2 * captioned >= len(images)


def claim_classes(listing: Listing, columns: Columns) -> list[File]:
    """Claim images that are all in folders, of two classes or more, unless there are captions, or names are numbers."""
    images = listing.images()
    classes = {_class_of(file.name) for file in images}
    if "" in classes or (not columns.caption and (len(classes) < 2 or all(name.isdecimal() for name in classes))):
        return []
    files = () if columns.caption else caption_files(listing, (file.name for file in images), columns).values()
    return [] if any(files) else images


def _class_of(name: str) -> str:
    """Return the folder of an image, without the number of repeats that kohya's scripts put before it."""
    return re.sub(r"^\d+_(?=.)", "", PurePosixPath(name).parent.name)


def open_classes(listing: Listing, files: list[File], columns: Columns) -> ImageReader:
    """Read images whose folder's name is their class, which becomes the caption."""
    rows = [Row(name, (worded(_class_of(name), columns),)) for name in sorted(file.name for file in files)]
    if not columns.caption:
        words = ", ".join(sorted({row.captions[0] for row in rows})[:5])
        logger.info(f"{listing.source}: no captions, so the names of folders are taken ({words}); --caption words them")
    return ImageReader(listing, [], rows, columns)
