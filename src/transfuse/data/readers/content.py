"""The content of text files: their encoding, lines, JSON; and the fields of records that have captions or images."""

from __future__ import annotations

import ast
import codecs
import csv
import gzip
import io
import json
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, BinaryIO, cast

from ...errors import UserError
from ...images import SUFFIXES
from ..remote import File
from .contract import Columns, Raw

SNIFFED = 1 << 16  # bytes at each end of a file that tell what is in it
CHUNK = 1 << 18  # bytes of lines that make a part
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # after those of UTF-32, which begin alike
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32")
ODD = re.compile(r"[\x00-\x08\x0e-\x1f]|[\x80-\uffff]{3}|\w[\xa1-\xb6\xb8\xb9\xbb-\xbf]\w")
"""what text of Western Europe does not have: control characters, three letters in a row with accents, signs in words"""
IMAGE_COLUMNS = (
    *("file_name", "image", "image_path", "filepath", "path", "file"),
    *("filename", "image_name", "image_file", "img", "jpg", "png", "picture", "photo"),
)
CAPTION_COLUMNS = (
    *("text", "caption", "TEXT", "prompt", "description"),
    *("captions", "sentences", "sentence", "comment", "alt_text", "raw"),
)
NUMBERED = re.compile(rf"({'|'.join(CAPTION_COLUMNS)})[_.]?\d+", re.IGNORECASE)  # columns of one caption each
WORDS = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")  # a string of Python
DOWNLOAD = "download them first (img2dataset writes tars, which are read as they are)"
SURPLUS: Any = object()  # in place of the column of fields that a row of a table has more than its head
SAMPLED = 100  # records that tell what a source holds
SPEAKING = re.compile(r"image|img|picture|photo|pixel|thumbnail|jpe?g|file_?name", re.IGNORECASE)
"""names of fields that speak of images"""
MARK: Any = object()  # in place of an image of the record in a turn
URLS = ("url", "urls", "uri", "link", "src")
INVISIBLE = ("Cc", "Cf", "Zl", "Zp", "Zs")  # categories of characters
BLANK = "\u034f\u115f\u1160\u2800\u3164\ufe0e\ufe0f\uffa0"  # of other categories, but not seen, either
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""roles by what messages and LLaVA's conversations call them"""


# --- files and their encodings ----------------------------------------------------------------------------------------


def encoding_of(data: bytes, whole: bool = True) -> str:
    """Return the encoding of a text by its bytes: by its mark, zero bytes as UTF-16 has them, or UTF-8 if it is that.

    Otherwise "cp1252" if it reads like Western European text: most letters are ASCII, and nothing is `ODD`. "" is none
    of these. whole: more of the text does not follow.
    """
    for mark, name in MARKS.items():
        if data.startswith(mark):
            return name
    if b"\0" in data and len(data) % 2 == 0:
        first, second = (2 * data[start::2].count(0) / len(data) for start in (0, 1))
        if max(first, second) > 0.4 and min(first, second) < 0.1:
            return "utf-16-be" if first > second else "utf-16-le"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, whole)
        return "utf-8"
    except UnicodeDecodeError:
        pass
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        return ""
    foreign = sum(char.isalpha() and not char.isascii() for char in text)
    return "" if ODD.search(text) or foreign >= sum(map(str.isalpha, text)) - foreign else "cp1252"


def decode_text(data: bytes, what: str, changed: list[str], encoding: str = "") -> str:
    """Decode a text by its byte order mark, or as `encoding`; none: by its bytes, as `encoding_of`.

    changed: what it was read as is added, unless it is UTF-8. Raises ValueError that names the first wrong byte.
    """
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), "")
    name = marked or encoding or encoding_of(data) or "utf-8"
    try:
        text = data.decode(name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        wanted = name if encoding and not marked else "UTF-8 (or --encoding NAME)" if name == "utf-8" else name
        raise ValueError(f"{what}: expected {wanted}, found something else at byte {error.start}") from None
    if not name.startswith("utf-8"):
        changed.append(f"read as {name}")
    return text


def sniff(file: File) -> bytes:
    """Return both ends of a file, in UTF-8 where its encoding is known.

    Raises UserError like `File.here`; an unreadable file is empty.
    """
    path = file.here()
    try:
        with path.open("rb") as opened:
            head = opened.read(SNIFFED)
            opened.seek(max(len(head), path.stat().st_size - SNIFFED))
            data = head + opened.read(SNIFFED)
    except OSError:
        return b""
    name = encoding_of(head, whole=len(head) < SNIFFED)
    return data.decode(name, "ignore").encode() if name in WIDE else data.removeprefix(codecs.BOM_UTF8)


def open_file(file: File) -> BinaryIO:
    """Open a file, decompressed if its name ends in .gz. Raises OSError, UserError."""
    path = file.here()
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def file_encoding(file: File, wanted: str) -> str:
    """Return the encoding of a file of lines, by its beginning if none is wanted; "" for UTF-8.

    Raises UserError for a file that cannot be read.
    """
    try:
        with open_file(file) as opened:
            head = opened.read(SNIFFED)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file.place}: expected a readable file, found an unreadable one ({error})") from None
    marked = next((name for mark, name in MARKS.items() if head.startswith(mark)), "")
    name = marked or wanted or encoding_of(head, whole=len(head) < SNIFFED)
    return "" if codecs.lookup(name or "utf-8").name.startswith("utf-8") else name


def chunks(source: File, chunk: int, encoding: str, *separators: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield stretches of a file that end after a separator, and the number of lines before each.

    encoding: of the file, if it is not UTF-8; the stretches are UTF-8, but for bytes that it does not have.
    """
    lines, rest = 0, bytearray()
    try:
        with open_file(source) as opened:
            file: Any = codecs.EncodedFile(opened, "utf-8", encoding, "surrogateescape") if encoding else opened
            while block := file.read(chunk):
                begin = max(0, len(rest) - max(map(len, separators)) + 1)  # a separator may have begun in the rest
                rest += block
                ends = [(rest.rfind(separator, begin), len(separator)) for separator in separators]
                cut = max((place + length for place, length in ends if place >= 0), default=0)
                if cut:
                    yield lines, bytes(rest[:cut])
                    lines += rest.count(b"\n", 0, cut)
                    del rest[:cut]
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise UserError(f"{source.place}: expected a readable file, found an unreadable one ({error})") from None
    if rest:
        yield lines, bytes(rest)


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError where it is no JSON, is nested too deep, or a field has two values.
    """
    try:
        return json.loads(text, object_pairs_hook=_fields)
    except RecursionError:
        raise ValueError("expected JSON, found brackets in brackets without end") from None
    except ValueError as error:
        raise ValueError(f"expected JSON, found something else ({error})") from None


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    for name, value in pairs if len(fields) < len(pairs) else ():
        if value != fields[name]:
            raise ValueError(f"two values of {json.dumps(name):.60}")
    return fields


def interleaved(parts: list[Any], image: Callable[[Any], bytes]) -> tuple[str | bytes, ...]:
    """Return strings, `{"text": text}` and `{"image": name}` as parts of a document; other fields may be null.

    Raises ValueError for a part that is neither, or both.
    """
    converted: list[str | bytes] = []
    for part in parts:
        text, shown = (part.get("text"), part.get("image")) if isinstance(part, dict) else (part, None)
        if shown == "" or (isinstance(shown, dict) and not any(shown.values())):
            shown = None
        if shown is not None and text in (None, ""):
            converted.append(image(shown))
        elif shown is None and isinstance(text, str):
            converted.append(text.strip())
        else:
            raise ValueError(f"expected parts that are words or pictures, found {json.dumps(part, default=str):.60}")
    if not converted:
        raise ValueError("expected parts, found none")
    return tuple(converted)


def dialogue(key: str, messages: Any, image: Callable[[Any], bytes]) -> Raw:
    """Return a dialogue of OpenAI's messages: content is a text, or a list of texts and images.

    Raises ValueError for other messages, two turns of one role after another, or no turn of the assistant.
    """
    parts: list[str | bytes] = []
    roles: list[str] = []
    for message in messages if isinstance(messages, list) else [None]:
        fields = message if isinstance(message, dict) else {}
        role, content = ROLES.get(str(fields.get("role"))), fields.get("content")
        if role is None or role in roles[-1:]:
            known = ", ".join(dict.fromkeys(ROLES.values()))
            raise ValueError(f"expected messages of {known} in turns, found {json.dumps(message, default=str):.60}")
        spoken = interleaved(content if isinstance(content, list) else [content], image)
        parts += spoken
        roles += [role] * len(spoken)
    if "assistant" not in roles:
        raise ValueError("expected a turn of the assistant, found none")
    return Raw(key, tuple(parts), roles=tuple(roles))


def conversation(turns: Any, names: list[Any]) -> list[dict[str, Any]]:
    """Return turns, of messages (role, content) or LLaVA's and ShareGPT's (from, value), as messages with images.

    names: the images of the record, which are where `<image>` or {"type": "image"} stands. Without a mark they come
    first in the first turn that is no system's. Raises ValueError.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns if isinstance(turns, list) else [turns]:
        content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(content, str | list):
            raise ValueError(f"expected turns with words, found {json.dumps(turn, default=str):.60}")
        pieces = [piece for part in (content if isinstance(content, list) else [content]) for piece in _pieces(part)]
        messages.append({"role": turn.get("from", turn.get("role")), "content": pieces or [""]})
    order = count()
    marks = [next(order) if mark is MARK else mark for turn in messages for mark in turn["content"] if _is_mark(mark)]
    shown = [piece["image"] for turn in messages for piece in turn["content"] if isinstance(piece, dict)]
    if shown and names and shown != names:
        raise ValueError("pictures in the turns, and others next to them")
    names = [] if shown else names
    if marks and sorted(marks) != [*range(len(names))]:
        raise ValueError(f"{len(marks)} marks <image> and {len(names)} pictures")
    waiting = [{"image": names[place]} for place in marks or range(len(names))]
    for turn in messages:
        if not marks and turn["role"] != "system":
            turn["content"], waiting = [*waiting, *turn["content"]], []
        turn["content"] = [waiting.pop(0) if _is_mark(piece) else piece for piece in turn["content"]]
    return messages


def _is_mark(piece: Any) -> bool:
    return piece is MARK or isinstance(piece, int)


def _pieces(part: Any) -> list[Any]:
    """Return the words and images of a part of a turn; an image of the record is `MARK`, or its number.

    Tables give every part all fields: the image of a text is null. "image_url" is a name, or {"url": name}.
    """
    fields = part if isinstance(part, dict) else {"text": part}
    name = fields.get("image_url") or fields.get("image")
    name = name.get("url", name) if isinstance(name, dict) else name
    if any(name.values()) if isinstance(name, dict) else name:
        return [{**fields, "image": name}]
    if fields.get("type") == "image":
        return [fields["index"] if isinstance(fields.get("index"), int) else MARK]
    if not isinstance(fields.get("text"), str):
        raise ValueError(f"expected parts that are words or pictures, found {json.dumps(part, default=str):.60}")
    pieces = [piece.strip() for piece in re.split("(<image>)", fields["text"])]
    return [MARK if piece == "<image>" else piece for piece in pieces if piece]


# --- tables of text ---------------------------------------------------------------------------------------------------


def csv_records(text: str, strict: bool = True) -> list[dict[str, Any]]:
    """Return rows by column; a column that the head has several times has lists.

    Of a list whose first line names an image, the columns are image and caption: the other fields, but for numbers and
    names of images.
    strict: quotes are to be as in CSV, except in lines with tabs, where they may be characters of the text. Raises
    csv.Error.
    """
    named = re.match(r"sep=(.)\r?\n?", text)  # Excel's first line
    first = re.split("[\r\n]", text[named.end() if named else 0 :], maxsplit=1)[0]
    delimiter = named[1] if named else next((mark for mark in "\t|" if mark in first), max(",;", key=first.count))
    plain = [field.strip() for field in first.split(delimiter)]
    fields = plain if any(map(is_image_name, plain)) else next(csv.reader([first.strip("\r")], delimiter=delimiter), [])
    at_image = next((place for place, field in enumerate(fields) if is_image_name(field)), None)
    quoted = delimiter != "|" and (delimiter != "\t" or at_image is None or fields is not plain)
    try:
        rows = _csv_rows(text, delimiter, quoted, strict)
    except csv.Error:
        if delimiter != "\t":
            raise
        rows = _csv_rows(text, delimiter, False, strict)
    rows = rows[1:] if named else rows
    if at_image is not None:
        return _listed(rows, -1 if at_image and at_image == len(fields) - 1 else at_image, delimiter)
    heads = [head.strip() for head in rows[0]] if rows else []
    records = []
    for row in rows[1:]:
        record: dict[str, Any] = dict.fromkeys(heads)
        for head, field in zip(heads, row, strict=False):
            record[head] = field if heads.count(head) == 1 else [*(record[head] or []), field]
        surplus = "".join(delimiter + field for field in row[len(heads) :])
        records.append(record | ({SURPLUS: surplus} if surplus else {}))
    return records


def _csv_rows(text: str, delimiter: str, quoted: bool, strict: bool) -> list[list[str]]:
    """Return rows of fields. Raises csv.Error with the line of a quote that stays open, or has text after it."""
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=strict)
    rows, line = list[list[str]](), 1
    try:
        for row in reader:
            later = (words for field in row for words in field.split("\n")[1:] if delimiter in words)
            if strict and any(is_image_name(part) for words in later for part in words.split(delimiter)):
                raise csv.Error("rows in quotes")
            rows += [row] if row else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise csv.Error(f"line {line}: {error}; a quote inside of quotes is written twice") from None
    return rows


def _listed(rows: list[list[str]], at_image: int, delimiter: str) -> list[dict[str, Any]]:
    """Return the images and captions of rows without a head.

    Fields that are numbers, or images, in most rows are no captions.
    """
    others = [[field for place, field in enumerate(row) if place != at_image % len(row)] for row in rows]
    counts = Counter(place for row in others for place, field in enumerate(row) if _is_number(field))
    numbers = {place for place, count in counts.items() if 2 * count > len(rows)}
    records: list[dict[str, Any]] = []
    for row, fields in zip(rows, others, strict=True):
        words = [field for place, field in enumerate(fields) if place not in numbers]
        whole = len(row) > at_image and all(place < len(fields) and _is_number(fields[place]) for place in numbers)
        captions = words if delimiter == "\t" else [delimiter.join(words)]
        records.append({"image": row[at_image].strip(), "caption": captions} if whole else {"image": row[0]})
    return records


def _is_number(field: str) -> bool:
    return bool(re.fullmatch(r"\s*[-+]?\d*\.?\d+\s*", field)) or is_image_name(field.strip())


# --- fields and their names -------------------------------------------------------------------------------------------


def column(where: str, known: Iterable[str], what: str, wanted: str, usual: tuple[str, ...]) -> str:
    """Return the name of a column: the wanted one, or the first usual one, in upper or lower case.

    Raises UserError that lists the columns.
    """
    known = [str(name) for name in known]
    for name in (wanted,) if wanted else usual:
        if name in known:
            return name
    lower = {name.lower(): name for name in reversed(known)}
    for name in () if wanted else usual:
        if name.lower() in lower:
            return lower[name.lower()]
    expected = f'"{wanted}"' if wanted else f"one of {', '.join(usual)} (or --{what}-column)"
    raise UserError(f"{where}: {what} column: expected {expected}, found {', '.join(known)}")


def caption_columns(where: str, known: Iterable[str], wanted: str) -> list[str]:
    """Return the caption column as `column` does, and those with a number after its name; or all of caption_0, ...

    Of a wanted column it is the only one. Raises UserError.
    """
    known = list(known)
    numbered = {name: match[1] for name in known if not wanted and (match := NUMBERED.fullmatch(str(name)))}
    try:
        first = column(where, known, "caption", wanted, CAPTION_COLUMNS)
    except UserError:
        if not numbered:
            raise
        return [*numbered]
    return [first, *(name for name, base in numbered.items() if base.lower() == first.lower())]


def captions_in(value: Any, where: str) -> list[str]:
    """Return the captions of a field: words, or a list of words or of records that have them. Raises ValueError."""
    values = value if isinstance(value, list | tuple) else _list_in(value) if isinstance(value, str) else [value]
    captions = []
    for item in values:
        if isinstance(item, dict):
            item = next((item[name] for name in ("raw", *CAPTION_COLUMNS) if isinstance(item.get(name), str)), item)
        if item is not None and not isinstance(item, str):
            raise ValueError(f"expected words in {where}, found {json.dumps(item, default=str):.60}")
        captions.append(stripped(item or ""))
    return list(filter(None, captions))


def weighted(captions: list[str], weights: Any) -> tuple[list[str], tuple[float, ...]]:
    """Return captions and their weights; without weights, each caption once. Raises ValueError for other weights."""
    if not (weights := weights or []):
        return list(dict.fromkeys(captions)), ()
    if not isinstance(weights, list) or not all(isinstance(weight, int | float) for weight in weights):
        raise ValueError(f"expected weights that are a list of numbers, found {json.dumps(weights, default=str):.60}")
    return captions, tuple(weights)


def _list_in(field: str) -> list[str]:
    """Return the words of a list that a table's field has as JSON, Python or numpy write it, or else the field."""
    if re.fullmatch(r"\[[\s,]*\]", WORDS.sub("", field.strip())):
        with suppress(ValueError):
            return list(parse_json(field))
        with suppress(ValueError, SyntaxError):
            return [ast.literal_eval(words) for words in WORDS.findall(field)]
    return [field]


def worded(class_name: str, columns: Columns) -> str:
    """Return the caption of a class, by the template `columns.caption`."""
    words = class_name.replace("_", " ").strip()
    return columns.caption.replace("{class}", words) if columns.caption else words


def is_image_name(field: str) -> bool:
    """Return True for the name or URL of an image, with the number of its caption (#0) or without."""
    return len(field) < 300 and re.sub(r"[#?].*$", "", field).lower().endswith(SUFFIXES)


def caption_text(text: str, first_line: bool) -> str:
    """Return the caption in a text file: all of it, or its first line."""
    text = stripped(re.sub("\r\n?", "\n", text))
    return text.split("\n", 1)[0].strip() if first_line else text


def stripped(text: str) -> str:
    """Return a text without white space around it, "" if nothing of it is visible."""
    return text.strip() if not all(char in BLANK or unicodedata.category(char) in INVISIBLE for char in text) else ""


def check_text(where: str, records: Sequence[Mapping[str, Any]], columns: Columns) -> None:
    """Raise UserError if records that would be read as text alone have fields that speak of images.

    Such fields are named so (image_url, file_name), or hold names or URLs of images, or URLs next to captions or sizes
    in pixels. A set of text may have URLs of its pages, and paths of its files.
    """
    if columns.reader == "text" or not records:
        return
    names = [str(name) for name in records[0] if name != columns.caption_column]
    lower = {name.lower() for name in names}
    of_images = {"caption", "alt", "alt_text", "width", "height", "similarity"} & lower or "TEXT" in names
    for name in names:
        values = [record.get(name) for record in records[:SAMPLED]]
        words = [value for value in values if isinstance(value, str) and value]
        ends = sum(re.sub(r"[?#].*$", "", value).lower().endswith(SUFFIXES) for value in words)
        if SPEAKING.search(name) and name.lower() not in CAPTION_COLUMNS and any(values):
            speaks = True
        elif name.lower() in URLS:
            speaks = bool(words) and (bool(of_images) or 2 * ends > len(words))
        else:
            speaks = bool(words) and 2 * ends > len(words) and max(map(len, words)) < 300
        if speaks:
            kind = "their URLs" if any(re.match(r"https?://", value) for value in words) else "their names"
            what = DOWNLOAD if kind == "their URLs" else "name the column of their bytes or files (--image-column)"
            raise UserError(
                f'{where}: expected images, found {kind} in "{name}", and no images: {what}, or take the text alone '
                "with --reader text"
            )
