"""The files of a source: each is read, or left out with a reason."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from operator import eq
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from ...errors import UserError
from ...images import SUFFIXES, walk_folder
from ...log import logger
from ..remote import File
from .splits import CONTAINERS, default_split, split_named, split_of

CAPTION_ENDINGS = (".txt", ".caption")
NOT_READ = (".svg", ".svgz", ".eps", ".psd", ".xcf", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw", ".raw")
"""image formats that are left out by name"""
UNNAMED = "image that no document names"
NO_LIST = "in no list of the names of a split"
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
    split of each file of another one; "" is none. ambiguous: images that names in several folders would mean. tables:
    files whose records name images. moved: a folder in names of images, and the one that it is now. notes: why files
    are not read, which readers add.
    """

    source: str
    root: Path
    files: tuple[File, ...]
    aside: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    split: str = ""
    others: Mapping[str, str] = field(default_factory=dict)
    ambiguous: Collection[str] = ()
    tables: Collection[str] = ()
    moved: tuple[str, str] = ("", "")
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_folder(cls, folder: Path) -> Listing:
        """List a folder and its subfolders."""
        paths, left_out = walk_folder(folder)
        files = tuple(File.of(folder, path) for path in paths)
        aside = {path.relative_to(folder).as_posix(): reason for path, reason in left_out.items()}
        return cls(str(folder), folder, files, aside, whole=True)

    def splits(self) -> dict[str, str | None]:
        """Return the split of each file, by its name and its folders."""
        images = {name for file in self.images() for name in (file.name, file.name.rpartition(".")[0])}
        return {file.name: split_of(file.name, images) for file in self.files}

    def of_split(self, wanted: str, listed: Mapping[str, str] = MappingProxyType({})) -> Listing:
        """Return the listing of one split alone, if names show several; the files of others are left out, and counted.

        Folders are named as a split (train/, val2017/), tables and archives have it in their names (test-00000.tar).
        Files of no split are kept. listed: the splits of files by lists of names; "" is in no list, and left out.
        Raises UserError for a split that does not exist, or if none is called train.
        """
        splits = {**self.splits(), **listed}
        known = sorted({split for split in splits.values() if split})
        if wanted == "all" or (not wanted and len(known) < 2 and "" not in listed.values()):
            return self
        chosen = split_named(wanted) or default_split(known)
        if chosen not in known:
            fields = TABLES_OF_IMAGES if known[1:] else CONTAINERS
            if wanted and self.ending(*fields):  # which may have a field "split"
                return self
            expected = f'a split "{wanted}"' if wanted else "a split to take (--source-split NAME, or all)"
            raise UserError(f"{self.source}: expected {expected}, found {', '.join(known) or 'no splits'}")
        others = {name: split for name, split in splits.items() if split is not None and split != chosen}
        totals = sorted(Counter(others.values()).items())
        counts = ", ".join(f"{count} of {split}" if split else f"{count} in no list" for split, count in totals)
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
        stems = {name for file in self.images() for name in (file.name, file.name.rpartition(".")[0])}
        return [file for file in self.ending(*endings) if file.name.rpartition(".")[0] not in stems]

    def images(self) -> list[File]:
        return self.ending(*SUFFIXES)

    def find(self, name: str, below: str = "") -> str | None:
        """Return the name of the file that a table in the folder `below` calls `name`; None: there is none.

        It is looked for below that folder, below the root, on the disk, and last anywhere by its own name, with or
        without its ending; files of other splits (`others`) come after. Where images are in several folders, a file in
        another folder than the table means is not it, nor is one of a folder that has another table. Raises ValueError
        for a name that several files have, and for one of several names, in different folders, that would mean one.
        """
        name = self._where(name)
        if exact := self._at(name, below):
            return exact
        name = composed(name)
        last = name.rpartition("/")[2]
        named = [path for path in self._by_last.get(last, ()) if not self._has_own_table(path, below)]
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
        name = self._where(name)
        if self._at(name, below) == path:
            return True
        meant, here = folders_of(name), folders_of(path)
        if not meant:  # next to the table, unless no images are there
            return below in ("", ".") or below not in self._folders or path.startswith(f"{below}/")
        if not here:
            return all(PurePosixPath(folder).name.lower() != meant[-1] for folder in self._folders)
        return all(map(eq, reversed(meant), reversed(here)))

    def _at(self, name: str, below: str) -> str | None:
        """Return the file at the path `name`, from the folder `below` or the root; None: there is none.

        A name without a folder, in a table next to images, is one of these and no image of the root. Raises ValueError
        for a name without an ending that several images have.
        """
        paths = [os.path.normpath(os.path.join(below, name))]
        at_root = os.path.normpath(name)
        if not ("/" not in name and below in self._folders) and not self._has_own_table(at_root, below, ("", ".")):
            paths.append(at_root)
        for path in paths:
            if listed := self._names.get(path, self._names.get(composed(path))):
                return listed
            if stems := self._stems.get(composed(path)):
                if stems[1:]:
                    raise ValueError(f"expected one file of this name, found {', '.join(stems[:3])}")
                return stems[0]
            if path and os.path.isfile(self.root / path):
                return os.path.relpath(self.root / path, self.root) if os.path.isabs(path) else path
        return None

    def of_moved(self, names: Iterable[str], below: str) -> Listing:
        """Return a listing that knows where the folder of these absolute paths is now, if none is where it says.

        All that may differ is the beginning: the folders in which images are stay as they are.
        """
        paths = [name.replace("\\", "/") for name in names if re.match(r"[\\/]|[A-Za-z]:", name)]
        if not paths or any(self.has_at(path, below) for path in paths):
            return self
        parents = {parent for folder in self._folders for parent in (folder, *map(str, PurePosixPath(folder).parents))}
        shared = shared_folders(paths)
        for length in range(1, len(shared) + 1):
            rests = ["/".join(path.split("/")[length:]) for path in paths]

            counts = Counter[str]()
            for folder in parents:
                here = (os.path.normpath(f"{folder}/{rest}") for rest in rests if "/" in rest or folder == ".")
                counts[folder] = sum(path in self._names and not self._has_own_table(path, below) for path in here)
            (new, most), *more = counts.most_common(2)
            if 2 * most > len(paths):
                unsure = any(count == most for _, count in more)
                return self if unsure else replace(self, moved=("/".join(shared[:length]), new))
        return self

    def has_at(self, name: str, below: str) -> bool:
        """Return True if `name` is the path of a file, from the folder `below` or the root."""
        try:
            return self._at(name, below) is not None
        except ValueError:
            return True

    def _where(self, name: str) -> str:
        """Return a name in a table with its folder as it is now."""
        name, (old, new) = name.replace("\\", "/"), self.moved
        return os.path.normpath(f"{new}/{name[len(old) + 1 :]}") if new and name.startswith(f"{old}/") else name

    def _has_own_table(self, path: str, below: str, of: Collection[str] = ()) -> bool:
        """Return True if an image belongs to another table than those of the folder `below`, which is not above it.

        It belongs to the nearest table above. Tables below a folder may tell of its images, too, unless theirs has the
        same name: then each tells of the folder that it is in. of: the folders whose images alone are looked at.
        """
        above = map(str, PurePosixPath(path).parents)
        folder = next((folder for folder in above if folder in self._table_names), "")
        stems, at_table = self._table_names.get(folder), "." if below in ("", ".") else below
        if stems is None or (of and folder not in of) or at_table == "." or f"{path}/".startswith(f"{at_table}/"):
            return False
        within = folder == "." or f"{at_table}/".startswith(f"{folder}/")
        return not within or not stems.isdisjoint(self._table_names.get(at_table, ()))

    @cached_property
    def _table_names(self) -> dict[str, set[str]]:
        """The names of tables, without endings, by folder."""
        named: dict[str, set[str]] = {}
        for table in map(PurePosixPath, self.tables):
            named.setdefault(str(table.parent), set()).add(table.name.partition(".")[0].lower())
        return named

    @cached_property
    def _stems(self) -> dict[str, list[str]]:
        """Images by their names without endings."""
        named: dict[str, list[str]] = {}
        others = (name for name in self.others if name.lower().endswith(SUFFIXES))
        for name in dict.fromkeys((*(file.name for file in self.images()), *others)):
            named.setdefault(composed(name).rpartition(".")[0], []).append(name)
        return named

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

    def with_others(self) -> Listing:
        """Return the listing of all splits."""
        files = (File(name, str(self.root / name), 0) for name in self.others)
        return replace(
            self, files=tuple({file.name: file for file in (*files, *self.files)}.values()), others={}, split=""
        )

    @property
    def n_files(self) -> int:
        """The number of files, with those that no reader is shown."""
        return len({*(file.name for file in self.files), *self.aside, *self.others})

    def left_out(self, used: Collection[str]) -> dict[str, str]:
        """Return why each file is left out of whose content (`used`, names) no document is made, sorted by name."""
        unused = {file.name: self._why_unused(file) for file in self.files if file.name not in used}
        others = {name: f"of the split {split}" if split else NO_LIST for name, split in self.others.items()}
        reasons = {**unused, **self.aside, **others}
        return {name: reasons[name] for name in sorted(reasons) if name not in used}

    def what_is_there(self) -> str:
        """Return the number of files by ending, and what to do with the most frequent kind."""
        counts = Counter(PurePosixPath(file.name).suffix.lower() or "without an ending" for file in self.files)
        listed = ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))
        hints = (hint for ending, _ in counts.most_common() for kinds, hint in NEAREST.items() if ending in kinds)
        hint = next(hints, "")
        aside = [f"{len(self.aside) + len(self.others)} left aside"] if self.aside or self.others else []
        there = ", ".join(filter(None, [listed, *aside]))
        return (f": {there}" if there else "") + (f"; nearest: {hint}" if hint else "")

    def _why_unused(self, file: File) -> str:
        ending = PurePosixPath(file.name).suffix.lower()
        if file.name in self.notes:
            return self.notes[file.name]
        if not os.path.exists(file.place):
            return "broken link"
        if ending in SUFFIXES:
            return UNNAMED
        if ending in NOT_READ:
            return f"image format that is not read ({ending}): write it as PNG"
        if ending in CAPTION_ENDINGS:
            of_image = composed(file.name).rpartition(".")[0] in self._stems
            return "text next to an image, whose captions are read elsewhere" if of_image else "text of no image"
        return f"not read by this reader ({ending or 'no ending'})"


def composed(name: str) -> str:
    """Return a name with its accents as one letter each (NFC): some file systems keep them apart, tables do not."""
    return unicodedata.normalize("NFC", name)


def folders_of(name: str) -> list[str]:
    """Return the folders in a path, in lower case and composed."""
    parts = composed(name.replace("\\", "/")).lower().split("/")[:-1]
    return [part for part in parts if part not in ("", ".", "..")]


def shared_folders(paths: Collection[str]) -> list[str]:
    """Return the folders that all paths begin with."""
    first, last = (path.split("/")[:-1] for path in (min(paths), max(paths)))
    return first[: sum(takewhile(bool, map(eq, first, last)))]


def may_be_one(folders: Collection[tuple[str, ...]]) -> bool:
    """Return True if paths in these folders may be those of one file: each is the end of the longest."""
    longest = max(folders, key=len)
    return all(longest[len(longest) - len(folder) :] == folder for folder in folders)
