"""Images with captions: files in a folder, WebDataset tars, parquet.

photos/cat.jpg  photos/cat.txt              the caption is the content of cat.txt
photos/cat.jpg  photos/metadata.jsonl       {"file_name": "cat.jpg", "text": "a cat"}, a line each
photos/cat.jpg  photos/list.csv             file_name,text
photos/00000.tar                            000000012.jpg 000000012.txt 000000012.json: as img2dataset writes them
photos/0000.parquet                         an image column (bytes, or {"bytes", "path"}) and a caption column
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UserError, install_command
from ...images import SUFFIXES, image_files
from ..remote import File, hash_files
from . import (
    LOST_REST,
    PER_PART,
    Columns,
    Fault,
    FileReader,
    Part,
    Raw,
    captions,
    decode_text,
    interleaved,
    parse_json,
    parts_of,
)

IMAGE_COLUMNS = ("file_name", "image", "image_path", "filepath", "path", "file")
CAPTION_COLUMNS = ("text", "caption", "TEXT", "prompt", "description")
MOST_NAMES = 5  # of a document's members, in a message
TABLE = "the list of pictures and captions"  # the name, among files, of a table's rows or of a folder's names


def column(where: str, known: Iterable[str], what: str, wanted: str, usual: tuple[str, ...]) -> str:
    """Return the name of a column: the wanted one, or the first usual one. Raises UserError that lists the columns."""
    known = list(known)
    for name in (wanted,) if wanted else usual:
        if name in known:
            return name
    expected = f'"{wanted}"' if wanted else f"one of {', '.join(usual)} (or --{what}-column)"
    raise UserError(f"{where}: {what} column: expected {expected}, found {', '.join(map(str, known))}")


# --- folders and tables -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An image's file, relative to the folder, and its caption.

    caption: None if it is in a .txt file of the same name. fault: why the row is no document.
    """

    name: str
    caption: str | None = None
    fault: str = ""


class ImageReader:
    """Documents are the rows, in their order. whole_folder: images in the folder that no row names are faults."""

    text_only = False

    def __init__(self, folder: Path, rows: list[Row], columns: Columns, whole_folder: bool = False) -> None:
        self.folder, self.rows, self.first_line = folder, rows, columns.first_line
        if whole_folder:
            named = {folder / row.name for row in rows}
            missing = "expected a row of the table, found none"
            unnamed = [path for path in image_files(folder) if path not in named]
            self.rows = [*rows, *(Row(path.relative_to(folder).as_posix(), "", missing) for path in unnamed)]
        self.total = len(self.rows)

    @classmethod
    def of_folder(cls, folder: Path, columns: Columns) -> ImageReader:
        """Return the reader of all images in a folder. Raises UserError where there is none."""
        return cls(folder, [Row(path.relative_to(folder).as_posix()) for path in image_files(folder)], columns)

    def contents(self) -> dict[str, str]:
        """Return hashes of images and captions; a table counts by what its rows say."""
        paths = []
        for row in self.rows:
            if not row.fault:
                paths.append(self.folder / row.name)
                if row.caption is None:
                    paths.append(paths[-1].with_suffix(".txt"))
        rows = json.dumps([(row.name, row.caption, row.fault) for row in self.rows])
        hashes = hash_files(File.of(self.folder, path) for path in paths)
        return hashes | {TABLE: hashlib.sha256(rows.encode()).hexdigest()}

    def parts(self) -> Iterable[Part]:
        return parts_of(self.rows)

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        for row in part.what:
            try:
                if row.fault:
                    raise ValueError(row.fault)
                caption = row.caption
                if caption is None:
                    path = (self.folder / row.name).with_suffix(".txt")
                    if not path.is_file():
                        raise ValueError(f"expected a caption in {path.name}, found no such file")
                    caption = _caption(decode_text(path.read_bytes(), path.name), self.first_line)
                if not caption:
                    raise ValueError("expected a caption, found none")
                yield Raw(row.name, ((self.folder / row.name).read_bytes(), caption), pair=True)
            except OSError as error:
                yield Fault(row.name, f"expected a file, found none ({error.strerror})")
            except ValueError as error:
                yield Fault(row.name, str(error))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rows": []}  # parts carry theirs


def _caption(text: str, first_line: bool) -> str:
    text = text.replace("\r\n", "\n").strip()
    return text.split("\n", 1)[0].strip() if first_line else text


def read_table(path: Path, columns: Columns) -> list[Row]:
    """Return file name and caption of each row of a .csv or .jsonl file. Raises UserError where it is no such table."""
    expected = f"{path}: expected a table of file names and captions"
    records: list[Any] = []
    number = 0
    try:
        text = decode_text(path.read_bytes(), str(path))
        if path.suffix.lower() == ".csv":
            records = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            for number, line in enumerate(text.split("\n"), 1):  # noqa: B007  (named where it fails)
                if line.strip():
                    records.append(parse_json(line))
    except (ValueError, csv.Error) as error:
        where = f"in line {number} " if number else ""
        raise UserError(f"{expected}, {where}found something else ({error})") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{expected}, found {'rows of another kind' if records else 'no rows'}")
    image = column(str(path), records[0], "image", columns.image_column, IMAGE_COLUMNS)
    caption = column(str(path), records[0], "caption", columns.caption_column, CAPTION_COLUMNS)
    rows = []
    for number, record in enumerate(records, 1):
        name, words = record.get(image), record.get(caption)
        if not isinstance(name, str) or not name:
            rows.append(Row(f"row {number}", "", f"expected a file name in {image}, found none"))
        elif None in record:  # the fields that csv has left over
            fault = "expected as many fields as the first line, found more: a comma needs quotes around it"
            rows.append(Row(name, "", fault))
        elif words is not None and not isinstance(words, str):
            rows.append(Row(name, "", f"expected words in {caption}, found {json.dumps(words):.60}"))
        else:
            rows.append(Row(name, (words or "").strip()))
    return rows


# --- tars -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Members:
    """One document's members: suffix, place in the file (None: a link), size."""

    key: str
    files: tuple[tuple[str, int | None, int], ...]


class TarReader(FileReader):
    """WebDataset tars: members of one name up to the first dot are one document.

        000000012.jpg  000000012.txt  000000012.json         an image and its caption (.txt, or "caption" in .json)
        000000012.jpg  000000012.json                        {"captions": [...], "weights": [...]}: several of them
        000000013.0.png  000000013.1.png  000000013.json     {"parts": [{"text": ...}, {"image": 0}, ...]}

    Members of a document must be adjacent. Where they are not, the file was put together wrongly, and nobody knows
    which caption belongs to which image: each such document is a fault.
    """

    def __init__(self, files: list[File], columns: Columns) -> None:
        super().__init__(files)
        self.columns = columns

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            waiting: list[Members | Fault] = []
            for item in scan(file.here()):
                waiting.append(item)
                if len(waiting) == PER_PART:
                    yield _tar_part(file, waiting)
                    waiting = []
            if waiting:
                yield _tar_part(file, waiting)

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        source, items = part.what
        with source.here().open("rb") as file:
            for item in items:
                key = f"{source.name}/{item.key}"
                if isinstance(item, Fault):
                    yield replace(item, key=key)
                    continue
                data = {}
                try:
                    for suffix, place, size in item.files:
                        file.seek(place)
                        data[suffix] = file.read(size)
                    yield self._document(key, data)
                except (OSError, ValueError) as error:
                    # Without a list of parts several images are several documents, whose names have another dot.
                    yield Fault(key, str(error), 1 if "json" in data else max(1, len(_images(data))))

    def _document(self, key: str, data: dict[str, bytes]) -> Raw:
        images = _images(data)
        names = ", ".join(sorted(data)[:MOST_NAMES]) + (
            f" and {len(data) - MOST_NAMES} more" if len(data) > MOST_NAMES else ""
        )
        record = parse_json(decode_text(data["json"], "json")) if "json" in data else {}
        if isinstance(record, dict) and isinstance(record.get("parts"), list):
            numbered = {suffix.split(".")[0]: value for suffix, value in images.items()}

            def image(number: Any) -> bytes:
                if not isinstance(number, int) or str(number) not in numbered:
                    raise ValueError(f"expected picture {number} among the members, found {names}")
                return numbered[str(number)]

            return Raw(key, interleaved(record["parts"], image))
        if len(images) != 1:
            raise ValueError(f"expected one picture, found {names}")
        name, weights = self.columns.caption_column, ()
        texts = [decode_text(data["txt"], "txt")] if "txt" in data and not name else []
        if not any(text.strip() for text in texts) and isinstance(record, dict):
            values = (record.get(usual) for usual in ((name,) if name else ("captions", *CAPTION_COLUMNS)))
            texts = next((captions(value) for value in values if isinstance(value, str | list)), [])
            weights = tuple(record.get("weights", ()))
        texts = [_caption(text, self.columns.first_line) for text in texts]
        if not any(texts):
            raise ValueError("expected a caption, found none")
        return Raw(key, (next(iter(images.values())), *texts), True, weights)


def _images(data: dict[str, bytes]) -> dict[str, bytes]:
    """Return the members that are images, by suffix."""
    return {suffix: value for suffix, value in data.items() if f".{suffix.split('.')[-1].lower()}" in SUFFIXES}


def _tar_part(file: File, items: list[Members | Fault]) -> Part:
    return Part((file, items), sum(size for item in items if isinstance(item, Members) for _, _, size in item.files))


def scan(path: Path) -> Iterator[Members | Fault]:
    """Yield the documents of one tar, by its headers alone.

    Where it is cut short or damaged, a fault says from where on.
    """
    seen: set[str] = set()
    key, files = "", list[tuple[str, int | None, int]]()
    reached = -1
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # or it would keep all of them
                if tar.offset <= reached:  # a negative size would lead back here for ever
                    raise tarfile.ReadError("a member's size is below zero")
                reached = tar.offset
                if member.isdir() or member.name.rsplit("/", 1)[-1].startswith("."):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                name = f"{folder}/{stem}".lstrip("./")
                if name != key:
                    if files:
                        yield _members(key, files, seen)
                    key, files = name, []
                files.append((suffix, member.offset_data if member.isfile() else None, member.size))
            if files:
                yield _members(key, files, seen)
            end = tar.offset
        with path.open("rb") as file:
            # tarfile takes a damaged header, or one block of zeros, for the end: after the end all is zeros.
            file.seek(end)
            while block := file.read(1 << 20):
                if block.strip(b"\0"):
                    lost = f"expected a tar's end at byte {end}, found more after it, which is lost"
                    yield Fault("(the file)", lost, LOST_REST)
                    break
    except (tarfile.TarError, OSError) as error:
        # The member read last may be the one cut short: what is left of its document cannot be trusted.
        lost = f"found one cut short or damaged ({error}); what follows is lost"
        yield Fault(key or "(the file)", f"expected a tar, {lost}", LOST_REST)


def _members(key: str, files: list[tuple[str, int | None, int]], seen: set[str]) -> Members | Fault:
    if key in seen:
        return Fault(key, "expected a document's members side by side, found more of this name further on")
    seen.add(key)
    suffixes = [suffix for suffix, _, _ in files]
    if any(place is None for _, place, _ in files):
        return Fault(key, "expected files, found links to others")
    if len(set(suffixes)) != len(files):
        return Fault(key, f"expected members of different kinds, found {', '.join(suffixes)}")
    return Members(key, tuple(files))


# --- parquet ----------------------------------------------------------------------------------------------------------


class ParquetReader(FileReader):
    """Rows with an image column and a caption column, as the Hugging Face hub exports data sets; or text alone.

    Raises UserError without the extra `parquet`, for a damaged file, or where columns are missing.
    """

    def __init__(self, files: list[File], columns: Columns) -> None:
        super().__init__(files)
        opened = [self._open(file) for file in files]
        schema = opened[0].schema_arrow
        names, where = list(schema.names), files[0].place
        binary = [n for n in names if str(schema.field(n).type).startswith(("binary", "large_binary", "struct"))]
        self.caption = column(where, names, "caption", columns.caption_column, CAPTION_COLUMNS)
        self.text_only = not columns.image_column and not set(IMAGE_COLUMNS) & set(binary)
        self.image = ""
        if not self.text_only:
            known = names if columns.image_column else binary
            self.image = column(where, known, "image", columns.image_column, IMAGE_COLUMNS)
        self.rows, self.sizes = [], []
        for file, parquet in zip(files, opened, strict=True):
            for name in filter(None, (self.image, self.caption)):
                if name not in parquet.schema_arrow.names:
                    raise UserError(f'{file.place}: expected the column "{name}", as {files[0].name} has, found none')
            groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
            self.rows.append([group.num_rows for group in groups])
            self.sizes.append([group.total_byte_size for group in groups])
        self.total = sum(map(sum, self.sizes))

    def parts(self) -> Iterable[Part]:
        for number, sizes in enumerate(self.sizes):
            for group, size in enumerate(sizes):
                yield Part((number, group), size)

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        number, group = part.what
        file = self.files[number]
        columns = [self.caption] if self.text_only else [self.image, self.caption]
        try:
            rows = self._open(file).read_row_group(group, columns=columns).to_pylist()
        except Exception as error:  # pyarrow's kinds, which may not be named without it
            reason = f"expected a readable row group, found a damaged one ({error})"
            yield Fault(f"{file.name}/{group}", reason, max(1, self.rows[number][group]))
            return
        for place, row in enumerate(rows):
            key = f"{file.name}/{group}/{place}"
            text = row[self.caption]
            if not isinstance(text, str) or not text.strip():
                yield Fault(key, f"expected a caption in {self.caption}, found {'no text' if text else 'none'}")
            elif self.text_only:
                yield Raw(key, (text,))
            else:
                data = row[self.image]
                data = data.get("bytes") if isinstance(data, dict) else data
                if isinstance(data, bytes):
                    yield Raw(key, (data, text.strip()), pair=True)
                else:
                    yield Fault(key, f"expected bytes of an image in {self.image}, found {type(data).__name__}")

    def _open(self, file: File) -> Any:
        try:
            import pyarrow.parquet
        except ImportError:
            needed = f"expected the extra that reads it, found none: {install_command('parquet')}"
            raise UserError(f"{file.place}: {needed}") from None
        path = file.here()
        try:
            return pyarrow.parquet.ParquetFile(path)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file.place}: expected a parquet file, found something else ({reason})") from None
