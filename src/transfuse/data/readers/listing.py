"""The files of a source: each is read, or left out with a reason; and the splits that their names or records tell."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import eq
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError
from ...images import SUFFIXES, walk_folder
from ...log import logger
from ..remote import File

CAPTION_ENDINGS = (".txt", ".caption")
NOT_READ = (".svg", ".svgz", ".eps", ".psd", ".xcf", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".raw")
"""image formats that are left out by name"""
SPLITS = {"train": "train", "training": "train", "restval": "train", "test": "test", "testing": "test", "eval": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
CONTAINERS = (".tar", ".parquet", ".arrow", ".jsonl", ".jsonl.gz", ".ndjson", ".json", ".csv", ".tsv")
"""files whose names may hold the name of a split among others, as in captions_train2017.json"""
SAYS_NOTHING = {"image", "images", "img", "imgs", "photos", "pictures", "set", "dataset", "data", "split", "subset"}
"""words of a folder's name that may stand next to its split"""
LAST_WORD = re.compile(r"(?:^|[\W_])([a-z]+)(?:[\W_]*\d+(?:[\W_]*of[\W_]*\d+)?)?$")
"""the word of a file's name that may be its split: the last, before numbers (wiki.train, test-00000-of-00002)"""
UNNAMED = "image that no document names"
TABLES_OF_IMAGES = (".json", ".csv", ".tsv", "metadata.jsonl")
"""files of records that name images by a path, whatever the split of its folder"""
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
class Listing:
    """The files of a source by name, which is their path below `root`.

    aside: the reason for each file that no reader is shown. whole: it is a folder, every file of which is accounted
    for; otherwise it is one file, or files at a URL. split: the one that `files` are of, if it was chosen. others: the
    split of each file of another one. ambiguous: images that names in several folders would mean.
    """

    source: str
    root: Path
    files: tuple[File, ...]
    aside: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    split: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    ambiguous: Collection[str] = ()

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
        images = {name for file in self.images() for name in (file.name, file.name.rpartition(".")[0])}
        splits = {file.name: split_of(file.name, images) for file in self.files}
        known = sorted({split for split in splits.values() if split})
        if wanted == "all" or (not wanted and len(known) < 2):
            return self
        chosen = split_named(wanted) or "train"
        if chosen not in known:
            fields = TABLES_OF_IMAGES if known[1:] else CONTAINERS
            if wanted and self.ending(*fields):  # which may have a field "split"
                return self
            expected = f'a split "{wanted}"' if wanted else "a split to take (--source-split NAME, or all)"
            raise UserError(f"{self.source}: expected {expected}, found {', '.join(known) or 'no splits'}")
        others = {name: split for name, split in splits.items() if split and split != chosen}
        counts = ", ".join(f"{count} of {split}" for split, count in sorted(Counter(others.values()).items()))
        if counts:
            logger.info(
                f"{self.source}: taking the split {chosen}, not {counts} (--source-split takes another, or all)"
            )
        files = tuple(file for file in self.files if file.name not in others)
        return replace(self, files=files, split=chosen, others=others)

    def ending(self, *endings: str) -> list[File]:
        """Return the files whose names end so, in upper or lower case."""
        return [file for file in self.files if file.name.lower().endswith(endings)]

    def not_of_images(self, *endings: str) -> list[File]:
        """Return the files whose names end so, but none that is named as an image is, of which it tells something."""
        stems = {file.name.rpartition(".")[0] for file in self.images()}
        return [file for file in self.ending(*endings) if file.name.rpartition(".")[0] not in stems]

    def images(self) -> list[File]:
        return self.ending(*SUFFIXES)

    def find(self, name: str, below: str = "") -> str | None:
        """Return the name of the file that a table in the folder `below` calls `name`; None: there is none.

        It is looked for below that folder, below the root, on the disk, and last anywhere by its own name, with or
        without its ending; files of other splits (`others`) come after. Where images are in several folders, a file in
        another folder than the table means is not it. Raises ValueError for a name that several files have, and for
        one of several names, in different folders, that would mean one file.
        """
        name = name.replace("\\", "/")
        if exact := self._at(name, below):
            return exact
        name = composed(name)
        last = name.rpartition("/")[2]
        named = self._by_last.get(last, [])
        if len(named) > 1:
            further = [other for other in named if composed(f"/{other}").endswith(f"/{name}")]
            if len(further) != 1:
                raise ValueError(f"expected one file of this name, found {', '.join(named[:3])}")
            named = further
        if named and len(self._folders) > 1 and not self.is_meant(name, below, named[0]):
            return None
        if named and named[0] in self.ambiguous:
            raise ValueError(f"expected one image for each path, found {named[0]} for several")
        return named[0] if named else None

    def has(self, name: str, below: str) -> bool:
        """Return True if a table in the folder `below` calls one or several files `name`."""
        try:
            return self.find(name, below) is not None
        except ValueError:
            return True

    def is_meant(self, name: str, below: str, path: str) -> bool:
        """Return False if `name` in a table of the folder `below` means another folder than that of the image `path`.

        Folders may have moved as a whole: those of one path are to end with those of the other.
        """
        if self._at(name.replace("\\", "/"), below) == path:
            return True
        meant, here = folders_of(name), folders_of(path)
        if not meant:  # next to the table, unless no images are there
            return below in ("", ".") or below not in self._folders or path.startswith(f"{below}/")
        if not here:
            return all(PurePosixPath(folder).name.lower() != meant[-1] for folder in self._folders)
        return all(map(eq, reversed(meant), reversed(here)))

    def _at(self, name: str, below: str) -> str | None:
        """Return the file at the path `name`, from the folder `below` or the root; None: there is none.

        A name without a folder, in a table next to images, is one of these and no image of the root.
        """
        beside = "/" not in name and below in self._folders
        for path in (os.path.normpath(os.path.join(below, name)), *([] if beside else [os.path.normpath(name)])):
            if listed := self._names.get(path, self._names.get(composed(path))):
                return listed
            if path and os.path.isfile(self.root / path):
                return os.path.relpath(self.root / path, self.root) if os.path.isabs(path) else path
        return None

    @cached_property
    def _names(self) -> dict[str, str]:
        """The names of files by these names, and by these as Unicode composes them."""
        names = [file.name for file in self.files]
        return dict(zip(map(composed, names), names, strict=True)) | dict(zip(names, names, strict=True))

    @cached_property
    def _folders(self) -> set[str]:
        return {str(PurePosixPath(file.name).parent) for file in self.images()}

    @cached_property
    def _by_last(self) -> dict[str, list[str]]:
        """Images by the last part of their names, with and without its ending; those of other splits come last."""
        named: dict[str, list[str]] = {}
        others = [name for name in self.others if name.lower().endswith(SUFFIXES)]
        for names in ([file.name for file in self.images()], others):
            of_these: dict[str, list[str]] = {}
            for name in names:
                last = composed(name).rpartition("/")[2]
                for key in {last, last.rpartition(".")[0]}:
                    of_these.setdefault(key, []).append(name)
            named = of_these | named
        return named

    @property
    def n_files(self) -> int:
        """The number of files, with those that no reader is shown."""
        return len(self.files) + len(self.aside) + len(self.others)

    def left_out(self, used: Collection[str]) -> dict[str, str]:
        """Return why each file is left out of whose content (`used`, names) no document is made, sorted by name."""
        unused = {file.name: _why_unused(file) for file in self.files if file.name not in used}
        others = {name: f"of the split {split}" for name, split in self.others.items()}
        aside = {name: reason for name, reason in {**self.aside, **others}.items() if name not in used}
        return dict(sorted({**aside, **unused}.items()))

    def what_is_there(self) -> str:
        """Return the number of files by ending, and what to do with the most frequent kind."""
        counts = Counter(PurePosixPath(file.name).suffix.lower() or "without an ending" for file in self.files)
        listed = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))
        hints = (hint for ending, _ in counts.most_common() for kinds, hint in NEAREST.items() if ending in kinds)
        hint = next(hints, "")
        aside = [f"{len(self.aside) + len(self.others)} left aside"] if self.aside or self.others else []
        there = ", ".join(filter(None, [listed, *aside]))
        return (f": {there}" if there else "") + (f"; nearest: {hint}" if hint else "")


def _why_unused(file: File) -> str:
    ending = PurePosixPath(file.name).suffix.lower()
    if not os.path.exists(file.place):
        return "broken link"
    if ending in SUFFIXES:
        return UNNAMED
    if ending in NOT_READ:
        return f"image format that is not read ({ending}): write it as PNG"
    if ending in CAPTION_ENDINGS:
        return "text of no image"
    return f"not read by this reader ({ending or 'no ending'})"


def split_of(name: str, images: Collection[str] = ()) -> str | None:
    """Return "train", "validation" or "test" if a folder says so, the outermost first, or a file name; or else None.

    images: names of images, with and without endings; an image's own name, and that of its caption, say nothing.
    """
    of_image = name.rpartition(".")[0] in images
    *folders, last = name.lower().split("/")
    stem, words = last.removesuffix(".gz").rpartition(".")[0], list[str]()
    if last.endswith(CONTAINERS) and not (of_image and last.endswith(".json")):
        words = re.findall(r"[a-z]+", stem)
    elif not of_image:
        words = [last.partition(".")[0], *LAST_WORD.findall(stem)]
    return next((SPLITS[word] for word in (*map(folder_split, folders), *reversed(words)) if word in SPLITS), None)


def composed(name: str) -> str:
    """Return a name with its accents as one letter each (NFC): some file systems keep them apart, tables do not."""
    return unicodedata.normalize("NFC", name)


def folders_of(name: str) -> list[str]:
    """Return the folders in a path, in lower case and composed."""
    parts = composed(name.replace("\\", "/")).lower().split("/")[:-1]
    return [part for part in parts if part not in ("", ".", "..")]


def may_be_one(folders: Collection[tuple[str, ...]]) -> bool:
    """Return True if paths in these folders may be those of one file: each is the end of the longest."""
    longest = max(folders, key=len)
    return all(longest[len(longest) - len(folder) :] == folder for folder in folders)


def folder_split(folder: str) -> str:
    """Return the split that a folder is named for, alone or with words that say nothing (train_images, split=test)."""
    if (named := split_named(folder)) in SPLITS.values():
        return named
    words = [word for word in re.findall(r"[a-z]+", folder.lower()) if word not in SAYS_NOTHING]
    return split_named(words[0]) if len(words) == 1 else folder


def split_named(word: str) -> str:
    """Return the split that a word means, whatever its case, and the year or number after it (val2014)."""
    word = word.strip().lower()
    return SPLITS.get(re.sub(r"[\W_]*\d+$", "", word), word)


def split_in(record: Any) -> str | None:
    """Return the split that a record's field "split" (in any case) names, None for a record without one."""
    fields = record.items() if isinstance(record, dict) else ()
    value = next((value for name, value in fields if str(name).strip().lower() == "split"), None)
    return split_named(value) or None if isinstance(value, str) else None


def choose_split(listing: Listing, place: str, records: Iterable[Any], chosen: str) -> str | None:
    """Return which split of the records by their field "split" is taken; None: there are none, or all are wanted.

    Records without a split are of every one. chosen: the split that is wanted, if names of files have not told; "" is
    train. The field counts as one of splits if a value of it is a usual name of one.

    Raises UserError for a split that does not exist.
    """
    counts = Counter(split for record in records if (split := split_in(record)) is not None)
    known = not counts.keys().isdisjoint(SPLITS.values())
    chosen = listing.split or chosen
    if chosen == "all" or (not chosen and (len(counts) < 2 or not known)) or (listing.split and not known):
        return None
    wanted = split_named(chosen) or "train"
    if wanted not in counts:
        there = ", ".join(sorted(counts)) or "no splits"
        raise UserError(f'{place}: expected a split "{wanted}" (--source-split NAME, or all), found {there}')
    others = ", ".join(f"{count} of {name}" for name, count in sorted(counts.items()) if name != wanted)
    if others:
        logger.info(f"{place}: taking the split {wanted}, not {others} (--source-split takes another, or all)")
    return wanted
