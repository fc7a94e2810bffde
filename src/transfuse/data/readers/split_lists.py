"""Lists of the names of images that make a split: train.txt, splits/val.lst, Flickr_8k.testImages.txt.

A line names an image, by its path or its name, with its ending or without; numbers may follow (of classes), and a word
where captions are elsewhere. A table without captions is such a list, too, by its field "split" or its name. A file of
JSON may have the names of all splits: {"train": ["a.jpg", ...], "test": [...]}.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...log import logger
from ..remote import File
from .content import CAPTION_COLUMNS, IMAGE_COLUMNS, csv_records, decode_text, is_image_name, parse_json, sniff
from .contract import Columns
from .images import caption_files, has_captions_beside
from .listing import Listing
from .splits import SPLITS, split_in, split_named, split_of

ENDINGS = (".txt", ".lst", ".list", ".json", ".csv", ".tsv")
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of a name such as Flickr_8k.trainImages
ORDER = ("test", "testa", "testb", "validation", "train", "trainval")
"""of several splits, an image is of the first"""
PARTITION = ("train", "validation", "test")
"""splits by number, in a file such as CelebA's list_eval_partition.txt"""


def of_split(listing: Listing, columns: Columns) -> Listing:
    """Return the listing of the wanted split, where names of files, or lists of names, show several.

    Where a list is of training, images that are in no list are left out; otherwise they are what training has. Lists
    themselves are left out, with what they are. Raises UserError as `Listing.of_split`.
    """
    every = {file.name for file in listing.images()}
    by_split, named = {split: set[str]() for split in ORDER}, set[File]()
    candidates = {file: _names_in(file) for file in (listing.not_of_images(*ENDINGS) if every else ())}
    # A word after a name may be its caption, unless captions are elsewhere.
    labels = any(candidates.values()) and (bool(columns.caption) or has_captions_beside(listing, columns))
    for file, by_name in candidates.items():
        lists = {split: _images_in(names, file, listing, labels) for split, names in by_name.items()}
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


def _words(file: File) -> list[str]:
    return [*map(str.lower, WORD.findall(PurePosixPath(file.name).name.rpartition(".")[0]))]


def _names_in(file: File) -> dict[str, list[str]]:
    """Return what a list names, by the split: its lines, a column of images, or the strings of its JSON."""
    with suppress(OSError, ValueError, csv.Error):
        ending = PurePosixPath(file.name).suffix.lower()
        split = next((SPLITS[word] for word in _words(file) if word in SPLITS), None)
        if ending == ".json":
            return _names_in_json(file, split)
        text = decode_text(Path(file.place).read_bytes(), "", []).strip()
        lines = re.split("[\r\n]+", text)
        if ending in (".csv", ".tsv") and not any(map(is_image_name, re.split(r"[\t,;|]", lines[0]))):
            return _names_in_table(text, lines[:2], split)
        numbered = [match for line in lines if (match := re.fullmatch(r"(\S.*?)[\s,;]+([012])", line.strip()))]
        if "partition" in _words(file) and len(numbered) == len(lines):
            return _by_split((PARTITION[int(match[2])], match[1]) for match in numbered)
        # Not so tables and JSON: in the folder of a split they are of something else.
        split = split or split_of(f"{file.name.rpartition('/')[0]}/")
        return {split: lines} if split else {}
    return {}


def _by_split(pairs: Iterable[tuple[str | None, str]]) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for split, name in pairs:
        if split in ORDER:
            lists.setdefault(split, []).append(name)
    return lists


def _names_in_table(text: str, first: list[str], split: str | None) -> dict[str, list[str]]:
    """Return the images of a table without captions by the split of their row, or all as those of `split`.

    first: its first lines; a table with captions is not parsed whole.
    """
    begin = csv_records("\n".join(first), strict=False)
    heads = {str(head).strip().lower(): head for head in begin[0]} if begin else {}
    image = next((heads[name] for name in IMAGE_COLUMNS if name in heads), None)
    if image is None or not heads.keys().isdisjoint(map(str.lower, CAPTION_COLUMNS)):
        return {}
    return _by_split((split_in(row) or split, str(row.get(image))) for row in csv_records(text, strict=False))


def _names_in_json(file: File, split: str | None) -> dict[str, list[str]]:
    """Return the names in {"train": [...], "test": [...]}, or those of a list; a name may stand first of a list."""
    first = re.match(rb'\s*(?:\{\s*"([^"]+)"\s*:\s*)?\[\s*(?:\[\s*)?"', sniff(file))
    if not first or (split if first[1] is None else split_named(first[1].decode("utf-8", "replace"))) not in ORDER:
        return {}
    values = parse_json(decode_text(Path(file.place).read_bytes(), "", []))
    lists = {split_named(name): names for name, names in values.items()} if first[1] else {str(split): values}
    if not all(name in ORDER and isinstance(names, list) for name, names in lists.items()):
        return {}
    return {
        name: [str(each[0] if isinstance(each, list) and each else each) for each in names]
        for name, names in lists.items()
    }


def _images_in(lines: list[str], file: File, listing: Listing, labels: bool) -> set[str]:
    """Return the images that lines name, if more than half of them name one; otherwise none.

    Numbers may follow a name, and a word if `labels`.
    """
    below = str(PurePosixPath(file.name).parent)
    after = r"(?:[\s,;]+[-+]?[\d.]+)+\s*$"

    def named(line: str) -> str | None:
        line = line.strip()
        for name in dict.fromkeys(
            (line, re.sub(after, "", line), re.sub(r"[\s,;]+\S+$", "", line) if labels else line)
        ):
            with suppress(ValueError):
                if path := listing.find(name, below):
                    return path
        return None

    for stretch in (lines[:20], lines):
        paths = [path for line in stretch if (path := named(line))]
        if 2 * len(paths) <= len(stretch):
            return set()
    return set(paths)
