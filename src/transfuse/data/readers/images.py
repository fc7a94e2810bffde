"""Images with captions that are files of the same name, or the names of their folders; and the reader of all rows.

photos/cat.jpg  photos/cat.txt                  the caption is the content of cat.txt, .caption, or "caption" in .json
photos/cat/1.jpg  photos/dog/2.jpg              a class each; --caption "a photo of a {class}"

Each shape, and those of `tables`, is a function from the files that it claims to `Row`s: an image's file, and its
captions.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from ...log import logger
from ..remote import File, hash_files
from .content import CAPTION_COLUMNS, caption_text, captions_in, decode_text, parse_json, worded
from .contract import Columns, Fault, Item, Part, Raw, Reader
from .listing import CAPTION_ENDINGS, Listing

TABLE = "the list of pictures and captions"  # the name, among files, of a table's rows or of a folder's names


@dataclass(frozen=True)
class Row:
    """An image's file, relative to the folder, and its captions, or files of them.

    fault: why it is no document. changed: as in `Raw`.
    """

    name: str
    captions: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    fault: str = ""
    changed: tuple[str, ...] = ()


class ImageReader(Reader):
    """Documents are the rows, in their order. In a whole folder, images that no row names are faults.

    tables: the files that rows are from. passed_over: images that are left out on purpose.
    """

    def __init__(
        self,
        listing: Listing,
        tables: Sequence[File],
        rows: Sequence[Row],
        columns: Columns,
        passed_over: Iterable[str] = (),
        split: str = "",
    ) -> None:
        self.listing, self.root, self.columns = listing, listing.root, columns
        self.source_split, self.names = split or listing.split, [table.name for table in tables]
        named = {row.name for row in rows} | set(passed_over)
        unnamed = sorted(file.name for file in listing.images() if file.name not in named) if listing.whole else []
        self.items = [*rows, *(Row(name, fault="expected a row of the table, found none") for name in unnamed)]
        self.total = len(self.items)

    def contents(self) -> dict[str, str]:
        """Return hashes of images and captions; a table counts by what its rows say."""
        names = dict.fromkeys(chain.from_iterable((row.name, *row.files) for row in self.items))
        hashes = hash_files(File(name, str(self.root / name), 0) for name in names)
        rows = json.dumps([(row.name, row.captions or None, row.fault if self.names else "") for row in self.items])
        return hashes | {TABLE: hashlib.sha256(rows.encode()).hexdigest()}

    def read(self, part: Part) -> Iterator[Item]:
        for row in part.what:
            changed = [*row.changed]
            try:
                if row.fault:
                    raise ValueError(row.fault)
                captions = [*row.captions, *chain.from_iterable(self._captions(name, changed) for name in row.files)]
                if not captions:
                    raise ValueError("expected a caption, found none")
                image = (self.root / row.name).read_bytes()
                notes = tuple(dict.fromkeys(changed))
                yield Raw(row.name, (image, *dict.fromkeys(captions)), pair=True, changed=notes)
            except OSError as error:
                yield Fault(row.name, f"expected a file, found none ({error.strerror})")
            except ValueError as error:
                yield Fault(row.name, str(error))

    def _captions(self, name: str, changed: list[str]) -> list[str]:
        path = self.root / name
        text = decode_text(path.read_bytes(), path.name, changed, self.columns.encoding)
        if name.endswith(".json"):
            record = parse_json(text)
            record = record if isinstance(record, dict) else {}
            return next((captions_in(record[key], key) for key in CAPTION_COLUMNS if record.get(key)), [])
        return list(filter(None, [caption_text(text, self.columns.first_line)]))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "items": [], "listing": None}  # parts carry their rows


# --- captions in files next to images, and in names -------------------------------------------------------------------


def open_images(listing: Listing, files: list[File], columns: Columns) -> ImageReader:
    """Read images and the files of their captions: x.txt, x.caption or x.jpg.txt of x.jpg, several being several."""
    names = {file.name for file in listing.files}
    rows = []
    for image in sorted(file.name for file in files):
        sidecars = _caption_files(image, names)
        stem = image.rpartition(".")[0]
        fault = "" if sidecars else f"expected a caption in {stem.rpartition('/')[2]}.txt, found no such file"
        rows.append(Row(image, files=tuple(sidecars), fault=fault))
    return ImageReader(listing, [], rows, columns)


def _caption_files(image: str, names: set[str]) -> list[str]:
    stem = image.rpartition(".")[0]
    sidecars = [f"{base}{ending}" for base in (stem, image) for ending in CAPTION_ENDINGS]
    return [name for name in sidecars if name in names] or [name for name in (f"{stem}.json",) if name in names]


def claim_classes(listing: Listing, columns: Columns) -> list[File]:
    """Claim images that are all in folders, of two classes or more, unless there are captions, or names are numbers."""
    images = listing.images()
    classes = {_class_of(file.name) for file in images}
    if "" in classes or (not columns.caption and (len(classes) < 2 or all(name.isdecimal() for name in classes))):
        return []
    names = {file.name for file in listing.files}
    captioned = not columns.caption and any(_caption_files(file.name, names) for file in images)
    return [] if captioned else images


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
