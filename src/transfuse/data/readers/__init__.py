"""Documents before they are a data set, from folders, tables, tars, parquet, jsonl, text, "world", or a data set.

    reader = open_source("photos/", Columns())
    for part in reader.parts():              # cheap: names and places; each part goes to one process
        for item in reader.read(part):       # Raw documents, and a Fault for each that cannot be read
            ...

A source is listed once (`Listing`), and the first of `FORMATS` that claims files of it, by their content, reads it.
Tars, parquet, jsonl, text and data sets may be at a URL. Nothing is skipped silently: what is not a document is a
fault, with its name and the reason, and `Listing.left_out` names each file that no document is made of.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from ...errors import UserError
from ...folders import data_address, fetched_data
from ...images import SUFFIXES, unpad
from ...io import sha256
from ...log import logger
from .. import bundled
from ..dataset import CorruptSampleError, DataSet
from ..remote import Cache, File, MissingError, expanded, is_remote, remote_files, url_name
from . import images, split_lists, tables
from .content import CHUNK, SAMPLED, chunks, decode_text, file_encoding, open_file
from .contract import LOST_REST, Columns, Fault, FileReader, Item, LeftOut, Part, Raw, Reader
from .listing import Listing
from .parquet import ArrowReader, ParquetReader, claim_arrow
from .records import JsonReader, claim_json
from .splits import split_named
from .tars import TarReader

__all__ = [
    "FORMATS",
    "LOST_REST",
    "Columns",
    "Fault",
    "Item",
    "LeftOut",
    "Part",
    "Raw",
    "Reader",
    "SetReader",
    "TextReader",
    "open_source",
]

SET = ("manifest.json", "documents.npy", "tokenizer.json")  # files by which a folder is known as a data set
ABOUT = re.compile(r"read.?me|licen[cs]e|copying|changelog|notice", re.IGNORECASE)
"""names of texts about other files"""
TEXT_ENDINGS = (".txt", ".txt.gz", ".md")
SEPARATORS = {"line": (b"\n",), "paragraph": (b"\n\n", b"\n\r\n")}  # what a part may end after, whatever the line ends
EXPECTED = (
    'expected "world", or pictures with captions (.txt next to each, metadata.jsonl, a .csv table), WebDataset .tar '
    "files, .parquet, .jsonl or .txt, or a data set"
)
EXPECTED_AT_URL = "expected .tar, .parquet, .jsonl or .txt files, many as {00000..00041}.tar, or a data set"


def open_source(source: str, columns: Columns, size: int = 64, cache: Cache | None = None) -> Reader:
    """Return the reader of a path or URL, by what is there; of "world", the bundled data set, at `size` pixels.

    cache: where files of a URL are kept. Raises UserError where nothing is, or nothing known.
    """
    known = {form.name: form for form in FORMATS}
    if columns.reader and columns.reader not in known:
        raise UserError(f"--reader: expected one of {', '.join(known)}, found {columns.reader}")
    if source == "world":
        return WorldReader(columns.count, size)
    if is_remote(source) and not source.startswith("hf://"):
        return _open_url(source, columns, cache or Cache())
    path = Path(source)
    if source.startswith("hf://"):
        *_, below = data_address(source)
        patterns = expanded(below)
        folder = fetched_data(source, patterns)
        path = folder / below
    if path.is_dir():
        if all((path / name).is_file() for name in SET):
            return SetReader(DataSet(str(path)))
        listing = split_lists.of_split(Listing.of_folder(path), columns)
    elif source.startswith("hf://") and not path.exists():
        matches = (match for pattern in patterns for match in sorted(folder.glob(pattern)))
        matched = tuple(dict.fromkeys(File.of(folder, match) for match in matches if match.is_file()))
        if not matched:
            raise UserError(f"{source}: {EXPECTED}, found no such file on the Hub, or in its cache")
        listing = Listing(source, folder, matched).of_split(columns.source_split)
    elif path.is_file():
        listing = Listing(source, path.parent, (File.of(path.parent, path),))
    else:
        raise UserError(f"{path}: {EXPECTED}, found {'something that is no file' if path.exists() else 'none'}")
    forced = [known[columns.reader]] if columns.reader else list(FORMATS)
    if columns.reader == "text":  # of records, too
        forced += [known[name] for name in ("arrow", "parquet", "records")]
    beside = not columns.reader and images.has_captions_beside(listing, columns)
    for form in forced:
        files = form.claim(listing, columns)
        if beside and form.name not in ("classes", "images"):
            files = _with_captions(form, listing, files, columns)
        if files:
            return _of_split(form.open(listing, files, columns), source, columns)
    what = "a folder with none of these" if listing.whole else "a file of another kind"
    raise UserError(
        f"{path}: {f'expected {form.holds}' if columns.reader else EXPECTED}, found {what}{listing.what_is_there()}"
    )


def _with_captions(form: Format, listing: Listing, files: list[File], columns: Columns) -> list[File]:
    """Return the files that have captions of images themselves, in a folder of images with captions next to them.

    Other files there, such as logs and lists of sizes, do not decide how the folder is read. A line names them.
    """

    def has_pair(file: File) -> bool:
        with suppress(UserError):
            reader = form.open(listing, [file], replace(columns, source_split="all"))
            items = (item for part in reader.parts() for item in reader.read(part))
            return any(
                isinstance(item, Raw) and not all(isinstance(part, str) for part in item.parts)
                for item in islice(items, SAMPLED)
            )
        return False

    taken = [file for file in files if has_pair(file)]
    if others := [file.name for file in files if file not in taken]:
        more = f" and {len(others) - 1} more" if others[1:] else ""
        logger.info(
            f"{listing.source}: {others[0]}{more} left aside, without a caption of an image; those next to images are "
            f"read (--reader {form.name} reads it)"
        )
    return taken


def _of_split(reader: Reader, source: str, columns: Columns) -> Reader:
    """Return a reader that has the wanted split. Raises UserError for one that knows of no splits."""
    if split_named(columns.source_split) not in ("", "all", reader.source_split):
        expected = f'expected a split "{columns.source_split}" (--source-split)'
        raise UserError(f"{source}: {expected}, found neither files nor records of one")
    return reader


def _open_url(source: str, columns: Columns, cache: Cache) -> Reader:
    """Return the reader of a URL: a data set has a manifest below it; otherwise it is a file, or a pattern of files."""
    forms = [form for form in FORMATS if form.remote and columns.reader in ("", form.name)]
    endings = tuple(ending for form in forms for ending in form.remote)
    if not url_name(source).lower().endswith(endings) and "*" not in source:
        try:
            cache.newest(f"{source.rstrip('/')}/{SET[0]}")
            return SetReader(DataSet(source, cache))
        except MissingError:
            pass
    try:
        files = remote_files(source, cache)
    except MissingError as error:
        raise UserError(f"{source}: {EXPECTED_AT_URL}, found none ({error})") from None
    listing = Listing(source, Path(), tuple(files)).of_split(columns.source_split)
    for form in forms:
        if chosen := listing.ending(*form.remote):
            return _of_split(form.open(listing, chosen, columns), source, columns)
    what = "none" if not files else "a file of another kind" if len(files) == 1 else "files of another kind"
    raise UserError(f"{source}: {EXPECTED_AT_URL}, found {what}")


# --- text, a data set, and the bundled one ----------------------------------------------------------------------------


class TextReader(FileReader):
    """Files of text. A document is a file, a paragraph (up to an empty line), or a line. chunk: bytes of a part."""

    text_only = True

    def __init__(self, listing: Listing, files: list[File], columns: Columns, chunk: int = CHUNK) -> None:
        super().__init__(listing, files)
        self.split, self.encoding, self.chunk = columns.split, columns.encoding, chunk

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            if self.split == "file":
                yield Part((file, 0, None, self.encoding), file.size)
            else:
                encoding = file_encoding(file, self.encoding)
                for lines, data in chunks(file, self.chunk, encoding, *SEPARATORS[self.split]):
                    yield Part((file, lines, data, encoding), len(data))

    def read(self, part: Part) -> Iterator[Item]:
        source, lines, data, encoding = part.what
        if data is None:
            yield self._whole(source)
            return
        data = data.replace(b"\r\n", b"\n") if b"\n" in data else data.replace(b"\r", b"\n")
        # with their separators, to count lines
        for piece in re.split(rb"(\n)" if self.split == "line" else rb"(\n{2,})", data):
            begin = lines + 1 + piece[: len(piece) - len(piece.lstrip())].count(b"\n")
            lines += piece.count(b"\n")
            changed = [f"read as {encoding}"] if encoding else []
            try:
                text = decode_text(piece, source.name, changed, "utf-8" if encoding else "").strip()
                if text:
                    yield Raw(f"{source.name}:{begin}", (text,), changed=tuple(changed))
            except ValueError as error:
                yield Fault(f"{source.name}:{begin}", str(error))

    def _whole(self, source: File) -> Item:
        changed: list[str] = []
        try:
            with open_file(source) as file:
                text = decode_text(file.read(), source.name, changed, self.encoding)
        except (OSError, EOFError, zlib.error) as error:
            return Fault(f"{source.name}:1", f"expected a readable file, found an unreadable one ({error})")
        except ValueError as error:
            return Fault(f"{source.name}:1", str(error))
        words = re.sub("\r\n?", "\n", text).strip()
        if not words:
            return Fault(f"{source.name}:1", "expected words, found none")
        begin = 1 + text[: len(text) - len(text.lstrip())].count("\n")
        return Raw(f"{source.name}:{begin}", (words,), changed=tuple(changed))


class SetReader(Reader):
    """A data set's documents in their order, held-out ones too, each compared with its hash; they keep its tokenizer.

    Raises UserError for a set without images, or of latents.
    """

    def __init__(self, data: DataSet) -> None:
        encoding = data.manifest.encoding
        if data.manifest.kind == "text" or encoding is not None:
            kind = "text" if encoding is None else f"what {encoding.autoencoder} makes of them"
            raise UserError(f"{data.path}: expected a data set of pictures to build from, found one of {kind}")
        self.data, self.total, self.items = data, len(data), range(len(data))

    def contents(self) -> dict[str, str]:
        return {"manifest.json": self.data.fingerprint}  # which has the hashes of everything else

    def read(self, part: Part) -> Iterator[Item]:
        heldout = set(self.data.heldout.tolist())
        for number in part.what:
            try:
                stored = self.data.read(number)
                parts = stored.parts
                if self.data.manifest.padded:  # a new set pads them again, or crops what is not padding
                    insides = iter(self.data.insides(number))
                    parts = tuple(
                        part if isinstance(part, str) else unpad(self.data.decode(number, stored, part), next(insides))
                        for part in parts
                    )
                yield Raw(stored.key, parts, stored.pair, stored.weights, number in heldout, stored.roles)
            except CorruptSampleError as error:
                yield Fault(error.sample.key, error.sample.reason)


class WorldReader(Reader):
    """Scenes of the bundled data set's training part, from number 0. Raises UserError without a count."""

    def __init__(self, count: int, size: int) -> None:
        if count < 1:
            raise UserError("world: expected how many documents to make (--count N), found none; it never ends")
        self.size, self.total, self.items = size, count, range(count)

    def contents(self) -> dict[str, str]:
        return {bundled.SPRITE_FILE.name: sha256(bundled.SPRITE_FILE)}  # count and size are settings of the build

    def read(self, part: Part) -> Iterator[Item]:
        world = bundled.World(bundled.WorldConfig(size=self.size))
        for number in part.what:
            scene = world.scene(number)
            yield Raw(f"scene-{number}", (world.render(scene), bundled.caption(scene, number)), pair=True)


# --- the table of readers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A shape of sources.

    name: of the option --reader. holds: what is in it. claim: returns the files of a listing that are read as it; none:
    it is not of this shape. open: returns their reader. remote: endings of its files that may be at a URL.
    """

    name: str
    holds: str
    claim: Callable[[Listing, Columns], list[File]]
    open: Callable[[Listing, list[File], Columns], Reader]
    remote: tuple[str, ...] = ()


def _ending(*endings: str) -> Callable[[Listing, Columns], list[File]]:
    return lambda listing, columns: listing.ending(*endings)


def _claim_text(listing: Listing, columns: Columns) -> list[File]:
    """Claim texts, unless all that there are tell about other files (README.md, LICENSE.txt)."""
    texts = listing.ending(*TEXT_ENDINGS)
    about = all(ABOUT.match(file.name.rpartition("/")[2]) for file in texts)
    return [] if about and len(texts) < len(listing.files) and columns.reader != "text" else texts


FORMATS = (
    Format("arrow", "tables of datasets.save_to_disk", claim_arrow, ArrowReader),
    Format("tar", "WebDataset .tar files", _ending(".tar"), TarReader, (".tar",)),
    Format("parquet", ".parquet tables", _ending(".parquet"), ParquetReader, (".parquet",)),
    Format("coco", "COCO's or Karpathy's captions in .json, and images", tables.claim_coco, tables.open_coco),
    Format("metadata", "metadata.jsonl or metadata.csv, and images", tables.claim_metadata, tables.open_metadata),
    Format("records", "records in .jsonl, or in lists in .json", claim_json, JsonReader, (".jsonl", ".jsonl.gz")),
    Format("table", "a table or list of images' names and captions", tables.claim_table, tables.open_table),
    Format("captions-json", "captions by the names of images in .json", tables.claim_captions, tables.open_captions),
    Format("classes", "images in folders of their classes", images.claim_classes, images.open_classes),
    Format("images", "images, with captions in .txt files of the same name", _ending(*SUFFIXES), images.open_images),
    Format("text", ".txt, .md or .txt.gz files", _claim_text, TextReader, TEXT_ENDINGS),
)
"""all shapes, in the order in which they claim a source's files"""
