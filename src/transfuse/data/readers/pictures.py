"""Pictures in a folder, each with its caption: in a .txt file beside it, or in a table (`metadata.jsonl`, CSV).

photos/cat.jpg  photos/cat.txt                               the caption is what cat.txt holds
photos/cat.jpg  photos/metadata.jsonl                        {"file_name": "cat.jpg", "text": "a cat"}, a line each
photos/cat.jpg  photos/list.csv                              file_name,text
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...images import image_files
from . import PER_PART, Columns, Fault, Part, Raw, decode_text, parse_json
from .files import File, contents

IMAGE_COLUMNS = ("file_name", "image", "image_path", "filepath", "path", "file")
TABLE = "the list of pictures and captions"
"""stands among the names of files for the table, or for the folder's names"""
CAPTION_COLUMNS = ("text", "caption", "TEXT", "prompt", "description")


@dataclass(frozen=True)
class Row:
    """A picture's file, relative to the folder, and its caption; None: it is in a .txt file beside. fault: why the row
    is no document."""

    name: str
    caption: str | None = None
    fault: str = ""


class PictureReader:
    """Documents are the rows, in their order. atomic_dir: pictures in the folder that no row names are faults."""

    text_only = False

    def __init__(self, folder: Path, rows: list[Row], columns: Columns, atomic_dir: bool = False) -> None:
        self.folder, self.rows, self.first_line = folder, rows, columns.first_line
        if atomic_dir:
            named = {folder / row.name for row in rows}
            unnamed = [path for path in image_files(folder) if path not in named]
            missing = "expected a row of the table, found none"
            self.rows = [*rows, *(Row(path.relative_to(folder).as_posix(), "", missing) for path in unnamed)]
        self.total = len(self.rows)

    def contents(self) -> dict[str, str]:
        """Of pictures and captions; a table goes by what its rows say."""
        paths = [(self.folder / row.name, row.caption is None) for row in self.rows if not row.fault]
        files = [file for path, beside in paths for file in (path, *([path.with_suffix(".txt")] if beside else []))]
        rows = json.dumps([(row.name, row.caption, row.fault) for row in self.rows])
        found = contents(File.of(self.folder, path) for path in files)
        return found | {TABLE: hashlib.sha256(rows.encode()).hexdigest()}

    @classmethod
    def of_folder(cls, folder: Path, columns: Columns) -> PictureReader:
        return cls(folder, [Row(path.relative_to(folder).as_posix()) for path in image_files(folder)], columns)

    def parts(self) -> Iterable[Part]:
        for start in range(0, len(self.rows), PER_PART):
            rows = self.rows[start : start + PER_PART]
            yield Part(rows, len(rows))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        for row in part.what:
            try:
                if row.fault:
                    raise ValueError(row.fault)
                caption = self._beside(row.name) if row.caption is None else row.caption
                if not caption:
                    raise ValueError("expected a caption, found none")
                yield Raw(row.name, ((self.folder / row.name).read_bytes(), caption), pair=True)
            except OSError as error:
                yield Fault(row.name, f"expected a file, found none ({error.strerror})")
            except ValueError as error:
                yield Fault(row.name, str(error))

    def _beside(self, name: str) -> str:
        path = (self.folder / name).with_suffix(".txt")
        if not path.is_file():
            raise ValueError(f"expected a caption in {path.name}, found no such file")
        words = decode_text(path.read_bytes(), path.name).replace("\r\n", "\n").strip()
        return words.split("\n", 1)[0].strip() if self.first_line else words

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rows": []}  # parts carry their own


def table(path: Path, columns: Columns) -> list[Row]:
    """File name and caption of each row of a .csv or .jsonl file. Raises UserError where it is no such table."""
    wanted = f"{path}: expected a table of file names and captions"
    rows: list[Any] = []
    number = 0
    try:
        text = decode_text(path.read_bytes(), str(path))
        if path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            for number, line in enumerate(text.split("\n"), 1):  # noqa: B007  (named where it fails)
                if line.strip():
                    rows.append(parse_json(line))
    except (ValueError, csv.Error) as error:
        where = f"in line {number} " if number else ""
        raise UserError(f"{wanted}, {where}found something else ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{wanted}, found {'no rows' if not rows else 'rows of another kind'}")
    image = column(str(path), rows[0], "image", columns.image_column, IMAGE_COLUMNS)
    caption = column(str(path), rows[0], "caption", columns.caption_column, CAPTION_COLUMNS)
    return [_row(number, row, image, caption) for number, row in enumerate(rows, 1)]


def _row(number: int, row: dict[Any, Any], image: str, caption: str) -> Row:
    name, words = row.get(image), row.get(caption)
    if not isinstance(name, str) or not name:
        return Row(f"row {number}", "", f"expected a file name in {image}, found none")
    if None in row:  # what csv has left over
        return Row(name, "", "expected as many fields as the first line, found more: a comma needs quotes around it")
    if words is not None and not isinstance(words, str):
        return Row(name, "", f"expected words in {caption}, found {json.dumps(words):.60}")
    return Row(name, (words or "").strip())


def column(where: str, known: Iterable[str], what: str, asked: str, usual: tuple[str, ...]) -> str:
    """The name of a column: the one asked for, or the first usual one. Raises UserError, with the names there are."""
    known = list(known)
    for name in (asked,) if asked else usual:
        if name in known:
            return name
    wanted = f'"{asked}"' if asked else f"one of {', '.join(usual)} (or --{what}-column)"
    raise UserError(f"{where}: {what} column: expected {wanted}, found {', '.join(map(str, known))}")
