"""Lists of the names of images that make a split: train.txt, splits/val.lst, Flickr_8k.testImages.txt.

A line names an image, by its path or its name, with its ending or without; a number may follow (of a class).
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...log import logger
from ..remote import File
from .content import decode_text, sniff
from .contract import Columns
from .images import caption_files
from .listing import Listing
from .splits import SPLITS, split_of

ENDINGS = (".txt", ".lst", ".list")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of a name such as Flickr_8k.trainImages
ORDER = ("test", "testa", "testb", "validation", "train", "trainval")
"""of several splits, an image is of the first"""


def of_split(listing: Listing, columns: Columns) -> Listing:
    """Return the listing of the wanted split, where names of files, or lists of names, show several.

    Where a list is of training, images that are in no list are left out; otherwise they are what training has. Lists
    themselves are left out, with what they are. Raises UserError as `Listing.of_split`.
    """
    lists = {file: split for file in listing.not_of_images(*ENDINGS) if (split := _split_of_list(file))}
    named = {file: images for file in lists if listing.images() and (images := _images_in(file, listing))}
    every = {file.name for file in listing.images()}
    named = {file: images for file, images in named.items() if images != every or lists[file] == "train"}
    if not named:
        return listing.of_split(columns.source_split)
    by_split = {split: set[str]() for split in ORDER}
    for file, images in named.items():
        by_split[lists[file]] |= images
        listing.notes[file.name] = f"list of the images of the split {lists[file]}"
    own = listing.splits()
    images = [file.name for file in listing.images() if not own[file.name]]
    rest = "" if by_split["train"] or by_split["trainval"] else "train"
    splits = {name: next((split for split in ORDER if name in by_split[split]), rest) for name in images}
    if several := sum(sum(name in by_split[split] for split in ORDER[:-1]) > 1 for name in images):
        logger.info(f"{listing.source}: {several} images are in lists of several splits; test comes before train")
    for name, files in caption_files(listing, images, columns).items():
        splits |= dict.fromkeys(files, splits[name])
    aside = {**listing.aside, **{file.name: listing.notes[file.name] for file in named}}
    left = tuple(file for file in listing.files if file not in named)
    return replace(listing, files=left, aside=aside).of_split(columns.source_split, splits)


def _split_of_list(file: File) -> str | None:
    """Return the split that a word of a list's name tells, or its folder."""
    words = map(str.lower, WORD.findall(PurePosixPath(file.name).name.rpartition(".")[0]))
    return next((SPLITS[word] for word in words if word in SPLITS), split_of(f"{file.name.rpartition('/')[0]}/"))


def _images_in(file: File, listing: Listing) -> set[str]:
    """Return the images that a list names, if more than half of its lines name one; otherwise none."""
    below = str(PurePosixPath(file.name).parent)

    def named(line: str) -> str | None:
        for name in (line, re.sub(r"[\s,;]+[-+]?[\d.]+$", "", line)):
            with suppress(ValueError):
                if path := listing.find(name, below):
                    return path
        return None

    first = re.split("[\r\n]+", sniff(file).decode("utf-8", "replace").strip())[:20]
    if 2 * sum(named(line.strip()) is not None for line in first) <= len(first):
        return set()
    with suppress(OSError, ValueError):
        lines = re.split("[\r\n]+", decode_text(Path(file.place).read_bytes(), file.name, []).strip())
        paths = [named(line.strip()) for line in lines]
        if 2 * sum(path is not None for path in paths) > len(paths):
            return {path for path in paths if path}
    return set()
