"""Lists of the names of images that make a split: train.txt, splits/val.lst, Flickr_8k.testImages.txt.

A line names an image, by its path or its name, with its ending or without; a number may follow (of a class). A file of
JSON may have the names of all splits: {"train": ["a.jpg", ...], "test": [...]}.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...log import logger
from ..remote import File
from .content import decode_text, parse_json, sniff
from .contract import Columns
from .images import caption_files
from .listing import Listing
from .splits import SPLITS, split_named, split_of

ENDINGS = (".txt", ".lst", ".list", ".json")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of a name such as Flickr_8k.trainImages
ORDER = ("test", "testa", "testb", "validation", "train", "trainval")
"""of several splits, an image is of the first"""


def of_split(listing: Listing, columns: Columns) -> Listing:
    """Return the listing of the wanted split, where names of files, or lists of names, show several.

    Where a list is of training, images that are in no list are left out; otherwise they are what training has. Lists
    themselves are left out, with what they are. Raises UserError as `Listing.of_split`.
    """
    every = {file.name for file in listing.images()}
    by_split, named = {split: set[str]() for split in ORDER}, set[File]()
    for file in listing.not_of_images(*ENDINGS) if every else ():
        lists = {split: _images_in(names, file, listing) for split, names in _names_in(file).items()}
        if any(lists.values()) and any(images != every or split == "train" for split, images in lists.items()):
            named.add(file)
            what = "list of the images of the split" if len(lists) == 1 else "lists of the images of the splits"
            listing.notes[file.name] = f"{what} {', '.join(lists)}"
            for split, images in lists.items():
                by_split[split] |= images
    if not named:
        return listing.of_split(columns.source_split)
    own = listing.splits()
    names = [file.name for file in listing.images() if not own[file.name]]
    rest = "" if by_split["train"] or by_split["trainval"] else "train"
    splits = {name: next((split for split in ORDER if name in by_split[split]), rest) for name in names}
    if several := sum(sum(name in by_split[split] for split in ORDER[:-1]) > 1 for name in names):
        logger.info(f"{listing.source}: {several} images are in lists of several splits; test comes before train")
    for name, files in caption_files(listing, names, columns).items():
        splits |= dict.fromkeys(files, splits[name])
    aside = {**listing.aside, **{file.name: listing.notes[file.name] for file in named}}
    left = tuple(file for file in listing.files if file not in named)
    return replace(listing, files=left, aside=aside).of_split(columns.source_split, splits)


def _split_of_list(file: File) -> str | None:
    """Return the split that a word of a list's name tells, or its folder."""
    words = map(str.lower, WORD.findall(PurePosixPath(file.name).name.rpartition(".")[0]))
    return next((SPLITS[word] for word in words if word in SPLITS), split_of(f"{file.name.rpartition('/')[0]}/"))


def _names_in(file: File) -> dict[str, list[str]]:
    """Return the lines of a list, or of {"train": [...], "test": [...]} in JSON the names, by their split."""
    with suppress(OSError, ValueError):
        if not file.name.lower().endswith(".json"):
            split = _split_of_list(file)
            return (
                {split: re.split("[\r\n]+", decode_text(Path(file.place).read_bytes(), "", []).strip())}
                if split
                else {}
            )
        first = re.match(rb'\s*\{\s*"([^"]+)"\s*:\s*\[\s*"', sniff(file))
        if first and split_named(first[1].decode("utf-8", "replace")) in ORDER:
            lists = {
                split_named(name): names
                for name, names in parse_json(decode_text(Path(file.place).read_bytes(), "", [])).items()
            }
            if all(split in ORDER and isinstance(names, list) for split, names in lists.items()):
                return {split: [*map(str, names)] for split, names in lists.items()}
    return {}


def _images_in(lines: list[str], file: File, listing: Listing) -> set[str]:
    """Return the images that lines name, if more than half of them name one; otherwise none."""
    below = str(PurePosixPath(file.name).parent)

    def named(line: str) -> str | None:
        for name in (line.strip(), re.sub(r"[\s,;]+[-+]?[\d.]+\s*$", "", line.strip())):
            with suppress(ValueError):
                if path := listing.find(name, below):
                    return path
        return None

    for stretch in (lines[:20], lines):
        paths = [path for line in stretch if (path := named(line))]
        if 2 * len(paths) <= len(stretch):
            return set()
    return set(paths)
