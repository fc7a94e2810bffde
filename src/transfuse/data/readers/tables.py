"""Captions of images in tables and in JSON: each file that claims images becomes `Row`s of `images.ImageReader`.

photos/cat.jpg  photos/metadata.jsonl           {"file_name": "cat.jpg", "text": "a cat"}, a line each, at any level
photos/cat.jpg  photos/list.csv                 file_name,text; also .tsv, and Flickr8k's and Flickr30k's lists
annotations/captions_train2017.json             COCO's captions, or Karpathy's splits of COCO and Flickr
meta_cap.json                                   {"cat": {"caption": "a cat"}}, as kohya's scripts write it

Rows of a table that name the same file are captions of one image.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import compress
from operator import not_
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError
from ...images import SUFFIXES
from ..remote import File
from .content import (
    DOWNLOAD,
    IMAGE_COLUMNS,
    SURPLUS,
    caption_columns,
    captions_in,
    check_text,
    column,
    csv_records,
    decode_text,
    is_image_name,
    parse_json,
    sniff,
    weighted,
)
from .contract import Columns
from .images import ImageReader, Row, caption_files
from .listing import Listing, folders_of, may_be_one
from .splits import choose_split, split_in

TABLES = (".csv", ".tsv", ".txt", ".token")
METADATA = ("metadata.jsonl", "metadata.csv")
DERIVED = re.compile(r"[._-](lemma(s|ti[sz]ed)?|stem(s|med)?|token(s|i[sz]ed)|lower(case|cased)?)(?=[._-])", re.I)
"""words in the name of a table that has the captions of another one in another form"""
NAME: Any = object()  # in place of the field of a record's name
Table = tuple[Iterable[Row], Iterable[tuple[str, str | None]], str]
"""what a table names; images of its records of other splits, and these; and the split that it chose by a field"""


def rows_of(
    listing: Listing, file: File, table: Table, changed: Sequence[str]
) -> tuple[list[Row], dict[str, str], list[str]]:
    """Return a row for each image that a table names, with all captions it has there, and one if it has faults.

    Also return the splits of images that are not taken (where the table chose none, folders tell whose they are), and
    the names of images that are missing if all are. An image is missing, too, if the only one of its name is in another
    folder than its row says, and another row names it so; one that several paths would mean is a fault. changed: by
    reading the table.
    """
    named, others, split = [*table[0]], table[1], table[2]
    below = str(PurePosixPath(file.name).parent)
    listing = listing.of_moved([row.name for row in named[:: len(named) // 20 + 1]], below)
    passed_over = dict[str, str]()
    for name, other in others:
        with suppress(ValueError):
            if path := listing.find(name, below):
                passed_over[path] = other or ""
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
            passed_over[path] = listing.others[path]
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
    rows = [replace(row, changed=tuple(changed)) for row in images.values()]
    for name, reasons in faults.items():
        more = f" (and {len(reasons) - 1} more of its rows)" if reasons[1:] else ""
        rows.append(Row(name, fault=reasons[0] + more))
    return rows, passed_over, missing if len(missing) == taken else []


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
            for number, line in enumerate(re.split("\r\n?|\n", text), 1):  # noqa: B007  (named where it fails)
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
    return named, ((str(record.get(image)), split_in(record)) for record in others), split


def _of_split(
    records: list[dict[str, Any]], listing: Listing, table: File, columns: Columns
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return the records of the wanted split by their field "split", the others, and the split. Raises UserError."""
    wanted = choose_split(listing.split, table.place, records, columns.source_split)
    if wanted is None:
        return records, [], ""
    taken = [split_in(record) in (wanted, None) for record in records]
    return [*compress(records, taken)], [*compress(records, map(not_, taken))], wanted


def _open_tables(
    read: Callable[[Listing, File, Columns, list[str]], Table],
    claim: Callable[[Listing, Columns], list[File]],
    listing: Listing,
    files: list[File],
    columns: Columns,
) -> ImageReader:
    """Read the rows of several tables; an image that two of them name has the captions of both.

    An image that none of them names has those in files next to it. Raises UserError if no image of any table exists.
    """
    merged, faults, passed_over, split, lost = dict[str, Row](), list[Row](), dict[str, str](), "", list[str]()
    listing = replace(listing, tables=[file.name for file in files])
    for file in files:
        changes: list[str] = []
        table = read(listing, file, columns, changes)
        rows, others, missing = rows_of(listing, file, table, changes)
        if missing:
            lost.append(_all_missing(file, missing, len(rows)))
        passed_over |= others
        split = split or table[2]
        for row in rows:
            if row.fault:
                faults.append(row)
            else:
                merged[row.name] = merged[row.name] + row if row.name in merged else row
    if lost and len(lost) == len(files):
        raise UserError(lost[0])
    rows = [*merged.values(), *faults]
    seen = {*merged, *passed_over, *(row.name for row in faults)}
    if unnamed := [file.name for file in listing.images() if listing.whole and file.name not in seen]:
        passed_over |= _named_by_others(read, claim, listing, unnamed, columns)
        captioned = caption_files(listing, unnamed if merged else (), columns).items()
        rows += [Row(name, files=texts) for name, texts in captioned if texts and name not in passed_over]
    return ImageReader(listing, files, rows, columns, passed_over, split)


def _all_missing(file: File, missing: list[str], count: int) -> str:
    first = f"{file.place}: expected the images it names, found none of {count} (the first: {missing[0]:.80})"
    if re.match(r"https?://", missing[0]):
        return f"{first}: these are URLs; {DOWNLOAD}"
    return f"{first}; put them next to it, or take its words alone with --reader text"


def _named_by_others(
    read: Callable[[Listing, File, Columns, list[str]], Table],
    claim: Callable[[Listing, Columns], list[File]],
    listing: Listing,
    unnamed: list[str],
    columns: Columns,
) -> dict[str, str]:
    """Return the splits of images that only the tables of other splits name."""
    whole, splits = listing.with_others(), dict[str, str]()
    for file in claim(whole, columns) if listing.others else ():
        if file.name in listing.others:
            with suppress(UserError):
                table = read(whole, file, replace(columns, source_split="all"), [])
                splits |= {row.name: listing.others[file.name] for row in rows_of(whole, file, table, [])[0]}
    return {name: splits[name] for name in unnamed if name in splits}


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
    """Claim tables whose first rows name images: by their ending if one is the whole source, else by content.

    Lists of images without captions are not tables; of tables with a head, those without captions count only alone.
    """
    if not listing.whole and (named := listing.ending(".csv", ".tsv")):
        return named
    tables = {file: _first_rows(file, columns) for file in listing.not_of_images(*TABLES)}
    claimed, without = list[File](), list[File]()
    for file, rows in tables.items():
        heads = [head for head in rows[0] if head is not SURPLUS] if rows else []
        if not rows:
            continue
        original = DERIVED.sub("", file.name)
        if original != file.name and any(other.name == original for other in tables):
            listing.notes[file.name] = f"captions of {original} in another form"
        elif heads == ["image", "caption"] and not any(map(any, (captions_in(row["caption"], "") for row in rows))):
            listing.notes[file.name] = "list of images without captions"
        else:
            try:
                caption_columns("", heads, columns.caption_column)
                claimed.append(file)
            except UserError:
                without.append(file)
                listing.notes[file.name] = f"table of images without captions: {', '.join(heads[:9])}"
    return claimed or without


def _first_rows(file: File, columns: Columns) -> list[dict[str, Any]]:
    """Return the first rows of a table in which most have an image's name or URL in one column; none: it is no such."""
    text = re.sub("\r\n?", "\n", sniff(file).decode("utf-8", "replace"))
    try:
        records = csv_records("\n".join(text.split("\n")[:20]), strict=False)
    except (csv.Error, ValueError):
        return []
    if columns.image_column:
        return records if records and columns.image_column in records[0] else []
    for name in (records or [{}])[0]:
        values = list(filter(None, (str(record.get(name) or "").strip() for record in records[:10])))
        if name and len([*records[0]]) > 1 and 2 * sum(map(is_image_name, values)) > len(values):
            return records
    return []


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
    return named, ((name, split_in(image)) for image in others if (name := _karpathy_name(image))), split


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
    return named, [(value[NAME], split_in(value)) for value in others], split


open_metadata = partial(_open_tables, table_names, claim_metadata)
open_table = partial(_open_tables, table_names, claim_table)
open_coco = partial(_open_tables, coco_names, claim_coco)
open_captions = partial(_open_tables, captions_names, claim_captions)
