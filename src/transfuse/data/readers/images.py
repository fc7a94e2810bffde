"""Images, a file each, with captions: in files next to them, in tables or JSON, or in the names of their folders.

photos/cat.jpg  photos/cat.txt                  the caption is the content of cat.txt, .caption, or "caption" in .json
photos/cat/1.jpg  photos/dog/2.jpg              a class each; --caption "a photo of a {class}"
photos/cat.jpg  photos/metadata.jsonl           {"file_name": "cat.jpg", "text": "a cat"}, a line each, at any level
photos/cat.jpg  photos/list.csv                 file_name,text; also .tsv, and Flickr8k's and Flickr30k's lists
annotations/captions_train2017.json             COCO's captions, or Karpathy's splits of COCO and Flickr
meta_cap.json                                   {"cat": {"caption": "a cat"}}, as kohya's scripts write it

Each shape is a function from the files that it claims to `Row`s: an image's file, and its captions. Rows of a table
that name the same file are captions of one image.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, compress
from operator import not_
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError
from ...images import SUFFIXES
from ...log import logger
from ..remote import File, hash_files
from .content import (
    CAPTION_COLUMNS,
    DOWNLOAD,
    IMAGE_COLUMNS,
    SURPLUS,
    caption_columns,
    caption_text,
    captions_in,
    check_text,
    column,
    csv_records,
    decode_text,
    is_image_name,
    parse_json,
    sniff,
    weighted,
    worded,
)
from .contract import Columns, Fault, Item, Part, Raw, Reader
from .listing import CAPTION_ENDINGS, Listing, choose_split, composed, folders_of, may_be_one, split_in

TABLES = (".csv", ".tsv", ".txt", ".token")
METADATA = ("metadata.jsonl", "metadata.csv")
NAME: Any = object()  # in place of the field of a record's name


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


Table = tuple[Iterable[Row], Iterable[str], str]
"""what a table names; the images of its records of other splits; and the split that it chose by a field, if it did"""


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
        return list(filter(None, [caption_text(text, self.columns.first_line)])), None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "items": [], "listing": None}  # parts carry their rows


# --- captions in files next to images, and in names -------------------------------------------------------------------


def open_images(listing: Listing, files: list[File], columns: Columns) -> ImageReader:
    """Read images and the files of their captions: x.txt, x.caption or x.jpg.txt of x.jpg, several being several."""
    names = _by_ending(listing)
    rows, splits = list[Row](), list[Any]()
    for image in sorted(file.name for file in files):
        sidecars = _caption_files(image, names, columns)
        fault = "" if sidecars else f"expected a caption in {PurePosixPath(image).stem}.txt, found no such file"
        rows.append(Row(image, files=tuple(sidecars), fault=fault))
        record = names.get(f"{composed(image).rpartition('.')[0]}.json", [""])[0]
        splits.append(_split_in_file(listing.root / record, columns))
    chosen = choose_split(listing, listing.source, splits, columns.source_split)
    taken = [chosen is None or split_in(split) in (chosen, None) for split in splits]
    others = [row.name for row in compress(rows, map(not_, taken))]
    return ImageReader(listing, [], [*compress(rows, taken)], columns, others, chosen or "")


def _split_in_file(path: Path, columns: Columns) -> Any:
    """Return the record in an image's .json, which may have a field "split"; None: it has none, or not that field."""
    with suppress(OSError, ValueError):  # the folder, of an image without such a file
        text = decode_text(path.read_bytes(), path.name, [], columns.encoding)
        return parse_json(text) if "split" in text.lower() else None
    return None


def _by_ending(listing: Listing) -> dict[str, list[str]]:
    """Return the names of files by these names, composed, with endings in lower case."""
    names: dict[str, list[str]] = {}
    for file in listing.files:
        stem, dot, ending = composed(file.name).rpartition(".")
        names.setdefault(f"{stem}{dot}{ending.lower()}", []).append(file.name)
    return names


def _caption_files(image: str, names: dict[str, list[str]], columns: Columns) -> list[str]:
    image = composed(image)
    stem = image.rpartition(".")[0]
    sidecars = [f"{base}{ending}" for base in (stem, image) for ending in CAPTION_ENDINGS]
    texts, records = [*chain.from_iterable(names.get(name, ()) for name in sidecars)], names.get(f"{stem}.json", [])
    return (records or texts) if columns.caption_column else (texts or records)


def has_captions_beside(listing: Listing, columns: Columns) -> bool:
    """Return True for a folder where half of the images or more have captions in files of their names."""
    images, names = listing.images() if listing.whole else [], _by_ending(listing)
    captioned = sum(bool(_caption_files(file.name, names, columns)) for file in images)
    return bool(images) and 2 * captioned >= len(images)


def claim_classes(listing: Listing, columns: Columns) -> list[File]:
    """Claim images that are all in folders, of two classes or more, unless there are captions, or names are numbers."""
    images = listing.images()
    classes = {_class_of(file.name) for file in images}
    if "" in classes or (not columns.caption and (len(classes) < 2 or all(name.isdecimal() for name in classes))):
        return []
    names = _by_ending(listing)
    captioned = not columns.caption and any(_caption_files(file.name, names, columns) for file in images)
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


# --- captions in tables -----------------------------------------------------------------------------------------------


def rows_of(listing: Listing, file: File, table: Table, changed: Sequence[str]) -> tuple[list[Row], list[str]]:
    """Return a row for each image that a table names, with all captions it has there, and one if it has faults.

    Also return the images of splits that are not taken; where the table chose none, folders tell whose they are.
    An image is missing, too, if the only one of its name is in another folder than its row says, and has a row of its
    own; one that several paths would mean is a fault. changed: by reading the table. Raises UserError if none of the
    images exist.
    """
    named, others, split = table
    below = str(PurePosixPath(file.name).parent)
    passed_over = list[str]()
    for name in others:
        with suppress(ValueError):
            passed_over.append(listing.find(name, below) or "")
    rows_at: list[tuple[Row, str | None]] = []
    for row in named:
        try:
            rows_at.append((row, listing.find(row.name, below)))
        except ValueError as error:
            rows_at.append((replace(row, fault=row.fault or str(error)), None))
    own = {path for row, path in rows_at if path is not None and listing.is_meant(row.name, below, path)}
    named_by: dict[str, dict[tuple[str, ...], str]] = {}
    for place, (row, path) in enumerate(rows_at):
        if path in own and not listing.is_meant(row.name, below, path):
            rows_at[place] = (row, None)
        elif path is not None:
            named_by.setdefault(path, {}).setdefault(tuple(folders_of(row.name)), row.name)
    images, faults, missing, taken = dict[str, Row](), dict[str, list[str]](), list[str](), 0
    for row, path in rows_at:
        if path is not None and path in listing.others and not split:
            passed_over.append(path)
            continue
        fault = row.fault
        if path is not None and not fault and not may_be_one(named_by[path]):
            fault = f"expected one image for each path, found it for {' and '.join([*named_by[path].values()][:3])}"
        taken += not fault or path is not None
        if fault:
            faults.setdefault(path or row.name, []).append(fault)
            continue
        missing += [row.name] if path is None else []
        name = path or f"{below}/{row.name}".removeprefix("./")
        images[name] = images[name] + row if name in images else replace(row, name=name)
    if missing and len(missing) == taken:
        first = f"{file.place}: expected the images it names, found none of {len(images)} (the first: {missing[0]:.80})"
        if re.match(r"https?://", missing[0]):
            raise UserError(f"{first}: these are URLs; {DOWNLOAD}")
        raise UserError(f"{first}; put them next to it, or take its words alone with --reader text")
    rows = [replace(row, changed=tuple(changed)) for row in images.values()]
    for name, reasons in faults.items():
        more = f" (and {len(reasons) - 1} more of its rows)" if reasons[1:] else ""
        rows.append(Row(name, fault=reasons[0] + more))
    return rows, passed_over


def read_records(file: File, encoding: str, changed: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a .csv, .tsv or .jsonl file, or of a list without a head, by column.

    encoding, changed: as in `decode_text`. Raises UserError where it is no such table.
    """
    path, number = Path(file.place), 0
    expected = f"{path}: expected a table of file names and captions"
    records: list[Any] = []
    try:
        text = decode_text(path.read_bytes(), path.name, changed, encoding)
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(text.split("\n"), 1):  # noqa: B007  (named where it fails)
                if line.strip():
                    records.append(parse_json(line))
        else:
            records = csv_records(text)
    except (ValueError, csv.Error) as error:
        where = f"in line {number} " if number else ""
        raise UserError(f"{expected}, {where}found something else ({error})") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{expected}, found {'rows of another kind' if records else 'no rows'}")
    return records


def row_of(name: Any, texts: dict[str, Any], otherwise: str, weights: Any = None) -> Row:
    """Return a row by the values of its fields; its fault says what is missing. otherwise: its name, if it has none."""
    if not isinstance(name, str) or not name:
        return Row(otherwise, fault="expected a file name, found none")
    try:
        captions = [words for field, value in texts.items() for words in captions_in(value, field)]
        captions, shares = weighted(captions, weights)
    except ValueError as error:
        return Row(name, fault=str(error))
    return Row(name, tuple(captions), fault="" if captions else "expected a caption, found none", weights=shares)


def table_names(listing: Listing, table: File, columns: Columns, changed: list[str]) -> Table:
    """Return what a .csv, .tsv or .jsonl file names. Raises UserError."""
    records = read_records(table, columns.encoding, changed)
    heads = [head for head in records[0] if head is not SURPLUS]
    try:
        image = column(table.place, filter(None, heads), "image", columns.image_column, IMAGE_COLUMNS)
    except UserError:
        if not columns.image_column:
            check_text(table.place, records, columns)  # which says what to do about URLs
        raise
    texts = caption_columns(table.place, filter(None, heads), columns.caption_column)
    records, others, split = _of_split(records, listing, table, columns)
    named, below = list[Row](), str(PurePosixPath(table.name).parent)
    for number, record in enumerate(records, 1):
        name, fault = record.get(image), ""
        if SURPLUS in record and (texts != heads[-1:] or not isinstance(record[texts[0]], str)):
            fault = "expected as many fields as the first line, found more: a comma needs quotes around it"
        elif SURPLUS in record:  # of a caption that is last, with commas and no quotes, as Flickr8k's are
            record[texts[0]] += record[SURPLUS]
        if isinstance(name, str) and re.search(r"#\d+$", name) and not listing.has(name, below):
            name = name[: name.rindex("#")]  # Flickr8k's number of a caption
        row = row_of(name, {text: record.get(text) for text in texts}, f"row {number}", record.get("weights"))
        named.append(replace(row, fault=fault) if fault and isinstance(name, str) and name else row)
    return named, (str(record.get(image)) for record in others), split


def _of_split(
    records: list[dict[str, Any]], listing: Listing, table: File, columns: Columns
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return the records of the wanted split by their field "split", the others, and the split. Raises UserError."""
    wanted = choose_split(listing, table.place, records, columns.source_split)
    if wanted is None:
        return records, [], ""
    taken = [split_in(record) in (wanted, None) for record in records]
    return [*compress(records, taken)], [*compress(records, map(not_, taken))], wanted


def _open_tables(
    read: Callable[[Listing, File, Columns, list[str]], Table], listing: Listing, files: list[File], columns: Columns
) -> ImageReader:
    """Read the rows of several tables; an image that two of them name has the captions of both."""
    merged, faults, passed_over, split = dict[str, Row](), list[Row](), list[str](), ""
    for file in files:
        changes: list[str] = []
        table = read(listing, file, columns, changes)
        rows, others = rows_of(listing, file, table, changes)
        passed_over += others
        split = split or table[2]
        for row in rows:
            if row.fault:
                faults.append(row)
            else:
                merged[row.name] = merged[row.name] + row if row.name in merged else row
    return ImageReader(listing, files, [*merged.values(), *faults], columns, passed_over, split)


def claim_metadata(listing: Listing, columns: Columns) -> list[File]:
    """Claim one metadata file of each folder, .jsonl before .csv."""
    chosen: dict[str, File] = {}
    for name in METADATA:
        for file in listing.files:
            folder, _, last = file.name.rpartition("/")
            if last == name:
                chosen.setdefault(folder, file)
    return sorted(chosen.values(), key=lambda file: file.name.split("/"))


def claim_table(listing: Listing, columns: Columns) -> list[File]:
    """Claim tables whose first rows name images: by their ending if one is the whole source, else by content."""
    if not listing.whole:
        named = listing.ending(".csv", ".tsv")
        return named or [file for file in listing.ending(*TABLES) if _names_images(file, columns)]
    return [file for file in listing.not_of_images(*TABLES) if _names_images(file, columns)]


def _names_images(file: File, columns: Columns) -> bool:
    """Return True if the first rows of a table have an image's name or URL each, in one column."""
    text = sniff(file).decode("utf-8", "replace").replace("\r\n", "\n")
    try:
        records = csv_records("\n".join(text.split("\n")[:20]), strict=False)
    except (csv.Error, ValueError):
        return False
    for name in (columns.image_column,) if columns.image_column else [*(records or [{}])[0]]:
        values = list(filter(None, (str(record.get(name) or "").strip() for record in records[:10])))
        if name and len([*records[0]]) > 1 and 2 * sum(map(is_image_name, values)) > len(values):
            return True
    return False


# --- captions in JSON -------------------------------------------------------------------------------------------------


def claim_coco(listing: Listing, columns: Columns) -> list[File]:
    """Claim JSON files with COCO's fields and captions; those of boxes and keypoints have none."""
    marks = ((b'"caption"', b'"image_id"'), (b'"sentences"', b'"raw"'))
    return [file for file, data in _json_files(listing) if any(all(mark in data for mark in both) for both in marks)]


def _json_files(listing: Listing) -> Iterator[tuple[File, bytes]]:
    """Yield the files of JSON records by name, and both of their ends, but not those that belong to an image."""
    for file in listing.not_of_images(".json"):
        if (data := sniff(file).lstrip()).startswith(b"{"):
            yield file, data


def coco_names(listing: Listing, table: File, columns: Columns, changed: list[str]) -> Table:
    """Return what COCO's captions name, or Karpathy's of the wanted split. Raises UserError."""
    try:
        record = parse_json(decode_text(Path(table.place).read_bytes(), table.name, changed, columns.encoding))
        images, others, split = _of_split(record["images"], listing, table, columns)
        if "annotations" in record:
            named = _annotated(images, others, record["annotations"])
        else:
            texts = enumerate([{"sentences": image["sentences"]} for image in images])
            named = [row_of(_karpathy_name(images[place]), text, f"image {place + 1}") for place, text in texts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{table.place}: expected COCO's or Karpathy's captions, found others ({reason})") from None
    return named, filter(None, map(_karpathy_name, others)), split


def _annotated(images: list[Any], others: list[Any], annotations: list[Any]) -> list[Row]:
    """Return the captions of COCO's images by their ids.

    Faults: no file name, words that are none, ids of no image or several.
    """
    names: dict[Any, dict[str, None]] = {image["id"]: {} for image in [*images, *others]}
    named: list[Row] = []
    for image in images:
        if isinstance(image["file_name"], str) and image["file_name"]:
            names[image["id"]][image["file_name"]] = None
        else:
            named.append(Row(f"image_id {image['id']}", fault="expected a file name, found none"))
    captions, faulty = dict[Any, list[str]](), set[Any]()
    for annotation in annotations:
        number = annotation["image_id"]
        if number not in names:
            named.append(Row(f"image_id {number}", fault="expected an image of this id, found none"))
        try:
            captions.setdefault(number, []).extend(captions_in(annotation["caption"], "caption"))
        except ValueError as error:
            named += [Row(name, fault=str(error)) for name in names.get(number, ())]
            faulty.add(number)
    for number, several in names.items():
        fault = f"expected one image of the id {number}, found {' and '.join(several)}" if len(several) > 1 else ""
        if captions.get(number) or number not in faulty:
            named += [Row(name, tuple(captions.get(number, ())), fault=fault) for name in several]
    return named


def _karpathy_name(image: dict[str, Any]) -> str:
    """Return the path of Karpathy's image; "" where it has no file name."""
    name = image.get("filename") or image.get("file_name")
    return "/".join(filter(None, [image.get("filepath"), name])) if isinstance(name, str) else ""


def claim_captions(listing: Listing, columns: Columns) -> list[File]:
    """Claim JSON files that map names of images to captions, or to records with "caption" or "tags"."""
    ending = "|".join(re.escape(suffix) for suffix in SUFFIXES).encode()
    named = re.compile(rb'^\{\s*"[^"]+"\s*:\s*\{[^{}]*"(caption|tags)"\s*:|^\{\s*"[^"]+(' + ending + rb')"\s*:', re.I)
    return [file for file, data in _json_files(listing) if named.search(data)]


def captions_names(listing: Listing, table: File, columns: Columns, changed: list[str]) -> Table:
    """Return what a file that maps names to captions names, as kohya's meta_cap.json. Raises UserError."""
    try:
        record = parse_json(decode_text(Path(table.place).read_bytes(), table.name, changed, columns.encoding))
        entries = {name: value if isinstance(value, dict) else {"caption": value} for name, value in record.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{table.place}: expected captions by the names of images, found others ({error})") from None
    records = [{**value, NAME: name} for name, value in entries.items()]
    records, others, split = _of_split(records, listing, table, columns)
    named = []
    for value in records:
        words = value.get("caption") or value.get("tags")
        named.append(row_of(value[NAME], {"caption": words}, "", value.get("weights")))
    return named, [value[NAME] for value in others], split


open_metadata = open_table = partial(_open_tables, table_names)
open_coco = partial(_open_tables, coco_names)
open_captions = partial(_open_tables, captions_names)
