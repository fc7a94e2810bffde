"""Pictures in a folder, each with its caption: in a .txt file beside it, or in a table (`metadata.jsonl`, CSV).

photos/cat.jpg  photos/cat.txt                               the caption is what cat.txt holds
photos/cat.jpg  photos/metadata.jsonl                        {"file_name": "cat.jpg", "text": "a cat"}, a line each
photos/cat.jpg  photos/list.csv                              file_name,text
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..images import image_files
from . import PER_PART, Columns, Fault, Part, Raw, decode_text, listing

IMAGE_COLUMNS = ("file_name", "image", "image_path", "filepath", "path", "file")
CAPTION_COLUMNS = ("text", "caption", "TEXT", "prompt", "description")

Row = tuple[str, str | None]
"""file name, relative to the folder, and caption; None: it is in a .txt file beside"""


class PictureReader:
    """Documents are the rows, in their order. whole_folder: pictures in the folder that no row names are faults."""

    text_only = False

    def __init__(self, folder: Path, rows: list[Row], columns: Columns, whole_folder: bool = False) -> None:
        self.folder, self.rows, self.first_line = folder, rows, columns.first_line
        if whole_folder:
            named = {folder / name for name, _ in rows}
            unnamed = [path for path in image_files(folder) if path not in named]
            self.rows = [*rows, *((path.relative_to(folder).as_posix(), "") for path in unnamed)]
        files = [folder / name for name, _ in self.rows]
        names, _ = listing(folder, files)
        words, _ = listing(folder, (path.with_suffix(".txt") for path in files if rows and rows[0][1] is None))
        self.listing = f"{names}{words}"
        self.total = len(self.rows)

    @classmethod
    def of_folder(cls, folder: Path, columns: Columns) -> PictureReader:
        return cls(folder, [(path.relative_to(folder).as_posix(), None) for path in image_files(folder)], columns)

    def parts(self) -> Iterable[Part]:
        for start in range(0, len(self.rows), PER_PART):
            rows = self.rows[start : start + PER_PART]
            yield Part(rows, len(rows))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        for name, words in part.what:
            try:
                caption = self._beside(name) if words is None else words
                if not caption:
                    raise ValueError("expected a caption, found none")
                yield Raw(name, ((self.folder / name).read_bytes(), caption), pair=True)
            except OSError as error:
                yield Fault(name, f"expected a file, found none ({error.strerror})")
            except ValueError as error:
                yield Fault(name, str(error))

    def _beside(self, name: str) -> str:
        path = (self.folder / name).with_suffix(".txt")
        if not path.is_file():
            raise ValueError(f"expected a caption in {path.name}, found no such file")
        words = decode_text(path.read_bytes(), path.name).strip()
        return words.split("\n", 1)[0].strip() if self.first_line else words

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "rows": []}  # parts carry their own


def table(path: Path, columns: Columns) -> list[Row]:
    """File name and caption of each row of a .csv or .jsonl file. Raises UserError where it is no such table."""
    wanted = f"{path}: expected a table of file names and captions"
    try:
        text = decode_text(path.read_bytes(), str(path))
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise UserError(f"{wanted}, found something else ({error})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{wanted}, found {'no rows' if not rows else 'rows of another kind'}")
    image = column(str(path), rows[0], "image", columns.image_column, IMAGE_COLUMNS)
    caption = column(str(path), rows[0], "caption", columns.caption_column, CAPTION_COLUMNS)
    return [(str(row.get(image) or ""), str(row.get(caption) or "").strip()) for row in rows]


def column(where: str, known: Iterable[str], what: str, asked: str, usual: tuple[str, ...]) -> str:
    """The name of a column: the one asked for, or the first usual one. Raises UserError, with the names there are."""
    known = list(known)
    for name in (asked,) if asked else usual:
        if name in known:
            return name
    wanted = f'"{asked}"' if asked else f"one of {', '.join(usual)} (or --{what}-column)"
    raise UserError(f"{where}: {what} column: expected {wanted}, found {', '.join(map(str, known))}")
