"""Plain text, and jsonl: a document a line, words alone or words and pictures interleaved.

{"text": "words"}
{"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}     pictures by path, or as "data:...;base64,..."
{"texts": ["first", null, "then"], "images": [null, "a.png", null]}      as OBELICS writes them
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...errors import UserError
from . import Columns, Fault, Part, Raw, decode_text, listing

CHUNK = 1 << 18
"""bytes of lines that make a part"""


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _chunks(path: Path, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Stretches of a file that end after a separator, and the number of lines before each."""
    lines, rest = 0, b""
    try:
        with _open(path) as file:
            while block := file.read(CHUNK):
                block = rest + block
                cut = block.rfind(separator) + len(separator)
                if cut < len(separator):
                    rest = block
                    continue
                yield lines, block[:cut]
                lines += block.count(b"\n", 0, cut)
                rest = block[cut:]
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: expected a readable file, found one that is not ({error})") from None
    if rest:
        yield lines, rest


class TextReader:
    """Files of words. A document is a file, a paragraph (up to an empty line), or a line."""

    text_only = True

    def __init__(self, folder: Path, files: list[Path], columns: Columns) -> None:
        self.folder, self.files, self.split = folder, files, columns.split
        self.listing, self.total = listing(folder, files)

    def parts(self) -> Iterable[Part]:
        for path in self.files:
            if self.split == "file":
                yield Part((path, 0, None), path.stat().st_size)
            else:
                for lines, data in _chunks(path, b"\n" if self.split == "line" else b"\n\n"):
                    yield Part((path, lines, data), len(data))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        path, lines, data = part.what
        name = path.relative_to(self.folder).as_posix()
        try:
            if data is None:
                with _open(path) as file:
                    data = file.read()
            text = decode_text(data, name).replace("\r\n", "\n")
        except (OSError, EOFError, ValueError) as error:
            yield Fault(f"{name}:{lines + 1}", str(error))
            return
        if self.split == "file":
            pieces = [text]
        else:
            pieces = text.split("\n" if self.split == "line" else "\n\n")
        for piece in pieces:
            if piece.strip():
                yield Raw(f"{name}:{lines + 1}", (piece.strip(),))
            lines += piece.count("\n") + (1 if self.split == "line" else 2)


class JsonReader:
    """A document a line. Whether there are pictures is known from the first hundred lines."""

    def __init__(self, folder: Path, files: list[Path], columns: Columns) -> None:
        self.folder, self.files = folder, files
        self.text = columns.caption_column or "text"
        self.listing, self.total = listing(folder, files)
        _, first = next(iter(_chunks(files[0], b"\n")), (0, b""))
        lines = [line for line in first.split(b"\n")[:100] if line.strip()]
        if not lines:
            raise UserError(f"{files[0]}: expected a JSON document a line, found an empty file")
        self.text_only = not any(b'"image"' in line or b'"images"' in line for line in lines)

    def parts(self) -> Iterable[Part]:
        for path in self.files:
            for lines, data in _chunks(path, b"\n"):
                yield Part((path, lines, data), len(data))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        path, before, data = part.what
        name = path.relative_to(self.folder).as_posix()
        for number, line in enumerate(data.split(b"\n"), before + 1):
            if not line.strip():
                continue
            key = f"{name}:{number}"
            try:
                yield Raw(key, self._parts(path.parent, json.loads(decode_text(line, "line"))))
            except (OSError, ValueError, KeyError, TypeError, binascii.Error) as error:
                yield Fault(key, f"expected a document, found none ({error})")

    def _parts(self, folder: Path, record: Any) -> tuple[str | bytes, ...]:
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
        if isinstance(record.get("parts"), list):
            found = record["parts"]
            parts = [p if isinstance(p, str) else p["text"] if "text" in p else _image(folder, p) for p in found]
        elif isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
            both = zip(record["texts"], record["images"], strict=True)
            parts = [_image(folder, {"image": image}) if image else words for words, image in both if words or image]
        else:
            parts = [record[self.text]]
        if not parts or not all(isinstance(part, str | bytes) for part in parts):
            raise ValueError("parts that are neither words nor pictures" if parts else "no parts")
        if self.text_only and not all(isinstance(part, str) for part in parts):
            raise ValueError("pictures, where the first lines have none")
        return tuple(part.strip() if isinstance(part, str) else part for part in parts)


def _image(folder: Path, part: dict[str, Any]) -> bytes:
    name = part["image"]
    if not isinstance(name, str):
        raise ValueError(f"image: a {type(name).__name__}")
    if name.startswith("data:"):
        return base64.b64decode(name.partition(",")[2], validate=True)
    return (folder / name).read_bytes()
