"""Plain text, and jsonl: a document a line, text alone, an image and its caption, or text and images interleaved.

{"text": "words"}
{"image": "a.png", "text": "a crab"}                                     a pair (or "file_name" for "image")
{"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}     images by path, or as "data:...;base64,..."
{"texts": ["first", null, "then"], "images": [null, "a.png", null]}      as OBELICS writes them
{"messages": [{"role": "user", "content": "draw a crab"}, ...]}          a dialogue; content may be a list of parts
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
from ..remote import File, hash_files
from . import Columns, Fault, FileReader, Part, Raw, decode_text, interleaved, parse_json

IMAGE_FIELDS = ("image", "file_name")  # the usual fields with the image of a pair
DATA = "data:"  # begins an image that is in the line itself
CHUNK = 1 << 18  # bytes of lines that make a part
SEPARATORS = {"line": (b"\n",), "paragraph": (b"\n\n", b"\n\r\n")}  # what a part may end after, whatever the line ends


def _open(file: File) -> BinaryIO:
    path = file.here()
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _chunks(source: File, chunk: int, *separators: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield stretches of a file that end after a separator, and the number of lines before each."""
    lines, rest = 0, bytearray()
    try:
        with _open(source) as file:
            while block := file.read(chunk):
                begin = max(0, len(rest) - max(map(len, separators)) + 1)  # a separator may have begun in the rest
                rest += block
                ends = [(rest.rfind(separator, begin), len(separator)) for separator in separators]
                cut = max((place + length for place, length in ends if place >= 0), default=0)
                if cut:
                    yield lines, bytes(rest[:cut])
                    lines += rest.count(b"\n", 0, cut)
                    del rest[:cut]
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{source.place}: expected a readable file, found an unreadable one ({error})") from None
    if rest:
        yield lines, bytes(rest)


class TextReader(FileReader):
    """Files of text. A document is a file, a paragraph (up to an empty line), or a line. chunk: bytes of a part."""

    text_only = True

    def __init__(self, files: list[File], columns: Columns, chunk: int = CHUNK) -> None:
        super().__init__(files)
        self.split, self.chunk = columns.split, chunk

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            if self.split == "file":
                yield Part((file, 0, None), file.size)
            else:
                for lines, data in _chunks(file, self.chunk, *SEPARATORS[self.split]):
                    yield Part((file, lines, data), len(data))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        source, lines, data = part.what
        if data is None:
            try:
                with _open(source) as file:
                    data = file.read()
            except (OSError, EOFError, zlib.error) as error:
                yield Fault(f"{source.name}:1", f"expected a readable file, found an unreadable one ({error})")
                return
        data = data.replace(b"\r\n", b"\n")
        if self.split == "file":
            pieces = [data]
        else:  # with their separators, to count lines
            pieces = re.split(rb"(\n)" if self.split == "line" else rb"(\n{2,})", data)
        for piece in pieces:
            begin = lines + 1 + piece[: len(piece) - len(piece.lstrip())].count(b"\n")
            lines += piece.count(b"\n")
            key = f"{source.name}:{begin}"
            try:
                text = decode_text(piece, source.name).strip()
            except ValueError as error:
                yield Fault(key, str(error))
                continue
            if text:
                yield Raw(key, (text,))
            elif self.split == "file":
                yield Fault(f"{source.name}:1", "expected words, found none")


class JsonReader(FileReader):
    """A document a line; the first hundred lines tell whether there are images. chunk: bytes of a part.

    Raises UserError for an empty file.
    """

    def __init__(self, files: list[File], columns: Columns, chunk: int = CHUNK) -> None:
        super().__init__(files)
        self.images = (columns.image_column,) if columns.image_column else IMAGE_FIELDS
        self.text, self.chunk = columns.caption_column or "text", chunk
        _, first = next(iter(_chunks(files[0], chunk, b"\n")), (0, b""))
        lines = [line for line in first.split(b"\n")[:100] if line.strip()]
        if not lines:
            raise UserError(f"{files[0].place}: expected a JSON document a line, found an empty file")
        names = [json.dumps(name).encode() for name in {"images", "messages", *IMAGE_FIELDS, *self.images}]
        self.text_only = not any(name in line for line in lines for name in names)
        self.dialogues = b'"messages"' in lines[0]

    def contents(self) -> dict[str, str]:
        """Return hashes, also of the image files that documents name; at a URL these go by the version of the jsonl."""
        return super().contents() | ({} if self.text_only else hash_files(self._image_files()))

    def _image_files(self) -> Iterator[File]:
        for part in self.parts():
            file, _, data = part.what
            if file.cache is not None:
                continue
            names: list[str] = []

            def image(name: Any, names: list[str] = names) -> bytes:
                if isinstance(name, str) and not name.startswith(DATA):
                    names.append(name)
                return b""

            for line in data.split(b"\n"):
                with suppress(ValueError):  # a fault, once it is read
                    self._document("", parse_json(decode_text(line, "line")), image)
            folder = Path(file.place).parent
            yield from (File((Path(file.name).parent / name).as_posix(), str(folder / name), 0) for name in names)

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            for lines, data in _chunks(file, self.chunk, b"\n"):
                yield Part((file, lines, data), len(data))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        file, before, data = part.what

        def image(name: Any) -> bytes:
            if not isinstance(name, str):
                raise ValueError(f"image: a {type(name).__name__}")
            if name.startswith(DATA):
                return base64.b64decode(name.partition(",")[2], validate=True)
            return file.sibling(name)

        for number, line in enumerate(data.split(b"\n"), before + 1):
            if not line.strip():
                continue
            key = f"{file.name}:{number}"
            try:
                yield self._document(key, parse_json(decode_text(line, "line")), image)
            except (OSError, ValueError) as error:
                yield Fault(key, f"expected a document, found none ({error})")

    def _document(self, key: str, record: Any, image: Callable[[Any], bytes]) -> Raw:
        """Return the document of a line's value. Raises ValueError where it is none, or images would be left aside."""
        pair = False
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
        if ("messages" in record) != self.dialogues:
            raise ValueError("a dialogue, where the first line has none" if "messages" in record else "no messages")
        if self.dialogues:
            return _dialogue(key, record["messages"], image)
        if isinstance(record.get("parts"), list):
            listed = record["parts"]
        elif isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
            both = list(zip(record["texts"], record["images"], strict=True))
            if any(text and name for text, name in both):
                raise ValueError("words and a picture in one place")
            listed = [{"image": name} if name else text for text, name in both if text or name]
        elif self.text in record:
            named = [record[field] for field in self.images if record.get(field)]
            name, text = named[0] if named else None, record[self.text]
            for other in ("image", "images"):
                if other not in self.images and record.get(other):
                    raise ValueError(f"{other} next to {self.text}: expected one picture in {self.images[0]}, or parts")
            if name and (not isinstance(text, str) or not text.strip()):
                raise ValueError(f"a picture, and no caption in {self.text}")
            pair = bool(name)
            listed = [{"image": name}, text] if pair else [text]
        else:
            raise ValueError(f"neither parts, nor texts and images, nor {self.text}")
        parts = interleaved(listed, image)
        if self.text_only and not all(isinstance(part, str) for part in parts):
            raise ValueError("pictures, where the first lines have none")
        return Raw(key, parts, pair)


ROLES = ("system", "user", "assistant")


def _dialogue(key: str, messages: Any, image: Callable[[Any], bytes]) -> Raw:
    """Return a dialogue of OpenAI's messages: content is a text, or a list of texts and images.

    Raises ValueError for other messages, two turns of one role after another, or no turn of the assistant.
    """
    parts: list[str | bytes] = []
    roles: list[str] = []
    for message in messages if isinstance(messages, list) else [None]:
        if not isinstance(message, dict) or message.get("role") not in ROLES or message["role"] in roles[-1:]:
            raise ValueError(f"expected messages of {', '.join(ROLES)} in turns, found {json.dumps(message):.60}")
        content = message.get("content")
        listed = [
            {"image": part["image_url"]["url"]} if isinstance(part, dict) and "image_url" in part else part
            for part in (content if isinstance(content, list) else [content])
        ]
        spoken = interleaved(listed, image)
        parts += spoken
        roles += [message["role"]] * len(spoken)
    if "assistant" not in roles:
        raise ValueError("expected a turn of the assistant, found none")
    return Raw(key, tuple(parts), roles=tuple(roles))
