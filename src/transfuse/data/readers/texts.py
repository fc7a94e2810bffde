"""Plain text, and jsonl: a document a line, words alone, a picture and its caption, or words and pictures interleaved.

{"text": "words"}
{"image": "a.png", "text": "a crab"}                                     a pair
{"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}     pictures by path, or as "data:...;base64,..."
{"texts": ["first", null, "then"], "images": [null, "a.png", null]}      as OBELICS writes them
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from ...errors import UserError
from . import Columns, Fault, Part, Raw, decode_text, interleaved, parse_json
from .files import File, contents

DATA = "data:"
"""begins a picture that is in the line itself"""
CHUNK = 1 << 18
"""bytes of lines that make a part"""
SEPARATORS = {"line": (b"\n",), "paragraph": (b"\n\n", b"\n\r\n")}
"""what a part may end after, whatever the line ends are"""


def _open(file: File) -> BinaryIO:
    path = file.here()
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _chunks(source: File, *separators: bytes) -> Iterator[tuple[int, bytes]]:
    """Stretches of a file that end after a separator, and the number of lines before each."""
    lines, rest = 0, bytearray()
    try:
        with _open(source) as file:
            while block := file.read(CHUNK):
                begin = max(0, len(rest) - max(map(len, separators)) + 1)  # a separator may have begun in what is left
                rest += block
                found = [(rest.rfind(one, begin), len(one)) for one in separators]
                cut = max((place + length for place, length in found if place >= 0), default=0)
                if cut:
                    yield lines, bytes(rest[:cut])
                    lines += rest.count(b"\n", 0, cut)
                    del rest[:cut]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source.place}: expected a readable file, found one that is not ({error})") from None
    if rest:
        yield lines, bytes(rest)


class TextReader:
    """Files of words. A document is a file, a paragraph (up to an empty line), or a line."""

    text_only = True

    def __init__(self, files: list[File], columns: Columns) -> None:
        self.files, self.split = files, columns.split
        self.total = sum(file.size for file in files)

    def contents(self) -> dict[str, str]:
        return contents(self.files)

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            if self.split == "file":
                yield Part((file, 0, None), file.size)
            else:
                for lines, data in _chunks(file, *SEPARATORS[self.split]):
                    yield Part((file, lines, data), len(data))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        source, lines, data = part.what
        name = source.name
        if data is None:
            try:
                with _open(source) as file:
                    data = file.read()
            except (OSError, EOFError, zlib.error) as error:
                yield Fault(f"{name}:1", f"expected a readable file, found one that is not ({error})")
                return
        data = data.replace(b"\r\n", b"\n")
        if self.split == "file":
            pieces = [data]
        else:  # with what separates them, to count lines
            pieces = re.split(rb"(\n)" if self.split == "line" else rb"(\n{2,})", data)
        for piece in pieces:
            begin = lines + 1 + piece[: len(piece) - len(piece.lstrip())].count(b"\n")
            lines += piece.count(b"\n")
            try:
                words = decode_text(piece, name).strip()
            except ValueError as error:
                yield Fault(f"{name}:{begin}", str(error))
                continue
            if words:
                yield Raw(f"{name}:{begin}", (words,))
            elif self.split == "file":
                yield Fault(f"{name}:1", "expected words, found none")


class JsonReader:
    """A document a line. Whether there are pictures is known from the first hundred lines."""

    def __init__(self, files: list[File], columns: Columns) -> None:
        self.files = files
        self.image, self.text = columns.image_column or "image", columns.caption_column or "text"
        self.total = sum(file.size for file in files)
        _, first = next(iter(_chunks(files[0], b"\n")), (0, b""))
        lines = [line for line in first.split(b"\n")[:100] if line.strip()]
        if not lines:
            raise UserError(f"{files[0].place}: expected a JSON document a line, found an empty file")
        names = [json.dumps(name).encode() for name in ("image", "images", self.image)]
        self.text_only = not any(name in line for line in lines for name in names)

    def contents(self) -> dict[str, str]:
        """With the picture files that documents name; at a URL these go by the version of the jsonl."""
        return contents(self.files) | ({} if self.text_only else contents(self._pictures()))

    def _pictures(self) -> Iterator[File]:
        for part in self.parts():
            file, _, data = part.what
            if file.cache is not None:
                continue
            names: list[str] = []

            def picture(name: Any, names: list[str] = names) -> bytes:
                if isinstance(name, str) and not name.startswith(DATA):
                    names.append(name)
                return b""

            for line in data.split(b"\n"):
                with suppress(ValueError):  # a fault, once it is read
                    self._document("", parse_json(decode_text(line, "line")), picture)
            folder = Path(file.place).parent
            yield from (File((Path(file.name).parent / name).as_posix(), str(folder / name), 0) for name in names)

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            for lines, data in _chunks(file, b"\n"):
                yield Part((file, lines, data), len(data))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        file, before, data = part.what
        for number, line in enumerate(data.split(b"\n"), before + 1):
            if not line.strip():
                continue
            key = f"{file.name}:{number}"
            try:
                record = parse_json(decode_text(line, "line"))
                yield self._document(key, record, lambda name: _image(file, name))
            except (OSError, ValueError) as error:
                yield Fault(key, f"expected a document, found none ({error})")

    def _document(self, key: str, record: Any, picture: Callable[[Any], bytes]) -> Raw:
        pair = False
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
        if isinstance(record.get("parts"), list):
            listed = record["parts"]
        elif isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
            both = list(zip(record["texts"], record["images"], strict=True))
            if any(words and image for words, image in both):
                raise ValueError("words and a picture in one place")
            listed = [{"image": image} if image else words for words, image in both if words or image]
        elif self.text in record:
            listed = self._listed(record)
            pair = len(listed) == 2
        else:
            raise ValueError(f"neither parts, nor texts and images, nor {self.text}")
        parts = interleaved(listed, picture)
        if self.text_only and not all(isinstance(part, str) for part in parts):
            raise ValueError("pictures, where the first lines have none")
        return Raw(key, parts, pair)

    def _listed(self, record: dict[str, Any]) -> list[Any]:
        """Words alone, or a picture and its caption. Raises ValueError where pictures would be left aside."""
        image, words = record.get(self.image), record[self.text]
        for name in ("image", "images"):
            if name != self.image and record.get(name):
                raise ValueError(f"{name} beside {self.text}: expected one picture in {self.image}, or parts")
        if not image:
            return [words]
        if not isinstance(words, str) or not words.strip():
            raise ValueError(f"a picture, and no caption in {self.text}")
        return [{"image": image}, words]


def _image(file: File, name: Any) -> bytes:
    if not isinstance(name, str):
        raise ValueError(f"image: a {type(name).__name__}")
    if name.startswith(DATA):
        return base64.b64decode(name.partition(",")[2], validate=True)
    return file.beside(name)
