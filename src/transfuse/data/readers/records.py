"""Documents that are records: lines of jsonl, items of a JSON list, rows of parquet and of HF's saved arrow tables.

{"text": "words"}
{"image": "a.png", "text": "a crab"}                                     a pair; captions may be a list
{"image": {"bytes": ..., "path": ...}, "label": 3}                       a class, whose name the table's schema has
{"parts": [{"text": "first"}, {"image": "a.png"}, {"text": "then"}]}     images by path, or as "data:...;base64,..."
{"texts": ["first", null, "then"], "images": [null, "a.png", null]}      as OBELICS writes them
{"text_list": ["first", "then"], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]}       as MMC4 does
{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nwhat is it?"}, ...]}         as LLaVA does
{"messages": [{"role": "user", "content": "draw a crab"}, ...]}          a dialogue; content may be a list of parts
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError, install_command
from ..remote import File, hash_files
from .contract import (
    CAPTION_COLUMNS,
    CHUNK,
    DOWNLOAD,
    IMAGE_COLUMNS,
    Columns,
    Fault,
    FileReader,
    Listing,
    Part,
    Raw,
    caption_columns,
    captions_in,
    chunks,
    column,
    decode_text,
    dialogue,
    interleaved,
    is_image_name,
    parse_json,
    sniff,
    worded,
)
from .images import SAMPLED, check_text

DATA = "data:"  # begins an image that is in the record itself
ROWS = 64  # of a table, read at a time
LISTS = ("parts", "texts", "text_list", "conversations", "messages")  # fields of documents of several parts
Image = Callable[[Any], bytes]


def document(key: str, record: Any, columns: Columns, image: Image) -> Raw:
    """Return the document of a record; `image` returns the bytes of what stands for an image.

    Raises ValueError where it is none, or images would be left aside.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}")
    if isinstance(record.get("parts"), list):
        return Raw(key, interleaved(record["parts"], image))
    if isinstance(record.get("texts"), list) and isinstance(record.get("images"), list):
        both = list(zip(record["texts"], record["images"], strict=True))
        if any(text and name for text, name in both):
            raise ValueError("words and a picture in one place")
        return Raw(key, interleaved([{"image": name} if name else text for text, name in both if text or name], image))
    if isinstance(record.get("text_list"), list):
        return Raw(key, interleaved(_mmc4_parts(record), image))
    if "messages" in record:
        return dialogue(key, record["messages"], image)
    turns = record.get("conversations")
    if isinstance(turns, list):
        return Raw(key, interleaved(_conversation_parts(record, turns), image))
    texts = [columns.caption_column] if columns.caption_column else [name for name in CAPTION_COLUMNS if name in record]
    text = next((name for name in texts if name in record), None)
    if text is None:
        raise ValueError(f"neither parts, nor texts and images, nor {columns.caption_column or 'text'}")
    field = image_field(record, columns)
    if columns.reader != "text":
        for other in ("image", "images"):
            if field != other and record.get(other):
                raise ValueError(f"{other} next to {text}: expected one picture in {field or 'image'}, or parts")
    if field is None:
        return Raw(key, interleaved([record[text]], image))
    captions = captions_in(record[text], text)
    if not captions:
        raise ValueError(f"a picture, and no caption in {text}")
    return Raw(key, (image(record[field]), *dict.fromkeys(captions)), pair=True)


def image_field(record: dict[str, Any], columns: Columns) -> str | None:
    """Return the field that has a record's image; fields of any files count only where they name an image."""
    if columns.reader == "text":
        return None
    for field in (columns.image_column,) if columns.image_column else IMAGE_COLUMNS:
        value = record.get(field)
        named = not isinstance(value, str) or is_image_name(value) or value.startswith(DATA)
        if value and (named or field == columns.image_column or field not in ("path", "file", "filepath")):
            return field
    return None


def _mmc4_parts(record: dict[str, Any]) -> list[Any]:
    """Return sentences, each after the images that are matched with it. Raises ValueError."""
    images: dict[int, list[Any]] = {}
    for info in record.get("image_info") or []:
        if not isinstance(info, dict) or not isinstance(info.get("matched_text_index"), int):
            raise ValueError("an image without matched_text_index")
        images.setdefault(info["matched_text_index"], []).append({"image": info.get("image_name")})
    beyond = [number for number in images if not 0 <= number < len(record["text_list"])]
    if beyond:
        raise ValueError(f"an image matched with sentence {beyond[0]} of {len(record['text_list'])}")
    return [part for number, text in enumerate(record["text_list"]) for part in (*images.get(number, []), text)]


def _conversation_parts(record: dict[str, Any], turns: list[Any]) -> list[Any]:
    """Return the turns' words, a line each, and images where `<image>` stands, or else first. Raises ValueError."""
    named = record.get("image", record.get("images")) or []
    images = [{"image": name} for name in (named if isinstance(named, list) else [named])]
    pieces: list[Any] = []
    for turn in turns:
        words = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(words, str):
            raise ValueError(f"expected turns with words, found {json.dumps(turn, default=str):.60}")
        pieces += re.split("(<image>)", words if not pieces else f"\n{words}")
    marks = pieces.count("<image>")
    if marks and marks != len(images):
        raise ValueError(f"{marks} marks <image> and {len(images)} pictures")
    left = iter(images)
    parts = [next(left) if piece == "<image>" else piece for piece in pieces]
    merged: list[Any] = [] if marks else [*images]
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif not isinstance(part, str) or part.strip():
            merged.append(part)
    return merged


def has_images(record: Any, columns: Columns) -> bool:
    """Return True for a record that names an image, or has one."""
    if not isinstance(record, dict):
        return False
    listed = [record.get("images"), record.get("image_info"), record.get("parts")]
    parts = [part for values in listed if isinstance(values, list) for part in values]
    return image_field(record, columns) is not None or any(
        part and (not isinstance(part, dict) or "text" not in part) and not isinstance(part, list) for part in parts
    )


# --- jsonl, and lists in JSON -----------------------------------------------------------------------------------------


class JsonReader(FileReader):
    """A document a line, or an item of a list; the first hundred tell whether there are images. chunk: bytes of a part.

    Raises UserError for an empty file, for images by URL, and for text alone with fields that speak of images.
    """

    def __init__(self, listing: Listing, files: list[File], columns: Columns, chunk: int = CHUNK) -> None:
        super().__init__(listing, files)
        self.columns, self.chunk = columns, chunk
        first = list(islice(self._first_records(), SAMPLED))
        if not first:
            raise UserError(f"{self.files[0].place}: expected a JSON document a line, found an empty file")
        self.dialogues = isinstance(first[0], dict) and "messages" in first[0]
        images = self.dialogues or any(has_images(record, columns) for record in first)
        self.text_only = columns.reader == "text" or not images
        records = [record for record in first if isinstance(record, dict)]
        if self.text_only:
            check_text(self.files[0].place, records, columns)
        else:
            self._check_urls(records)

    def _first_records(self) -> Iterator[Any]:
        file = self.files[0]
        if _is_list(file):
            yield from _items(file.place)
            return
        for line in next(iter(chunks(file, self.chunk, b"\n")), (0, b""))[1].split(b"\n"):
            if line.strip():
                try:
                    yield parse_json(decode_text(line, "line"))
                except ValueError:  # a fault, once it is read
                    yield None

    def _check_urls(self, records: list[dict[str, Any]]) -> None:
        """Raise UserError if all images of the first records are URLs."""
        names: list[Any] = []

        def image(name: Any) -> bytes:
            names.append(name)
            return b""

        for record in records:
            with suppress(ValueError):
                document("", record, self.columns, image)
        if names and all(isinstance(name, str) and re.match(r"https?://", name) for name in names):
            raise UserError(
                f"{self.files[0].place}: expected images, found their URLs (the first: {names[0]:.80}); {DOWNLOAD}, or "
                "write the names of their files in place of the URLs"
            )

    def contents(self) -> dict[str, str]:
        """Return hashes, also of the image files that documents name; at a URL these go by the version of the jsonl."""
        return super().contents() | ({} if self.text_only else hash_files(self._image_files()))

    def _image_files(self) -> Iterator[File]:
        assert self.listing is not None
        for part in self.parts():
            file, _, data = part.what
            if file.cache is not None:
                continue
            names: list[str] = []

            def image(name: Any, names: list[str] = names) -> bytes:
                if isinstance(name, str) and not name.startswith(DATA):
                    names.append(name)
                return b""

            for _, record in self._records(file, data, 0):
                with suppress(ValueError):  # a fault, once it is read
                    document("", record, self.columns, image)
            below = str(PurePosixPath(file.name).parent)
            for name in names:
                with suppress(ValueError):
                    path = self.listing.find(name, below) or str(PurePosixPath(below, name))
                    yield File(path, str(self.listing.root / path), 0)

    def parts(self) -> Iterable[Part]:
        for file in self.files:
            if _is_list(file):
                count = len(_items(file.place))
                for start in range(0, count, ROWS):
                    yield Part((file, start, None), file.size * ROWS // max(ROWS, count))
            else:
                for lines, data in chunks(file, self.chunk, b"\n"):
                    yield Part((file, lines, data), len(data))

    def _records(self, file: File, data: bytes | None, before: int) -> Iterator[tuple[int, Any]]:
        """Yield the number of each record of a part, and the record, or the ValueError of a line that is none."""
        if data is None:
            yield from enumerate(_items(file.place)[before : before + ROWS], before + 1)
            return
        for number, line in enumerate(data.split(b"\n"), before + 1):
            if line.strip():
                try:
                    yield number, parse_json(decode_text(line, "line"))
                except ValueError as error:
                    yield number, error

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        file, before, data = part.what
        image = image_loader(file, self.listing)
        for number, record in self._records(file, data, before):
            key = f"{file.name}:{number}"
            try:
                if isinstance(record, ValueError):
                    raise record
                if isinstance(record, dict) and ("messages" in record) != self.dialogues:
                    there = "a dialogue, where the first line has none"
                    raise ValueError("no messages" if self.dialogues else there)
                raw = document(key, record, self.columns, image)
                if self.text_only and not all(isinstance(part, str) for part in raw.parts):
                    raise ValueError("pictures, where the first lines have none")
                yield raw
            except (OSError, ValueError) as error:
                yield Fault(key, f"expected a document, found none ({error})")


def image_loader(file: File, listing: Listing | None) -> Image:
    """Return a function from what a record of `file` has for an image to its bytes; it raises OSError or ValueError."""
    below = str(PurePosixPath(file.name).parent)

    def image(value: Any) -> bytes:
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if not isinstance(value, str):
            raise ValueError(f"image: a {type(value).__name__}")
        if value.startswith(DATA):
            return base64.b64decode(value.partition(",")[2], validate=True)
        path = listing.find(value, below) if listing is not None and file.cache is None else None
        return file.sibling(value) if path is None or listing is None else (listing.root / path).read_bytes()

    return image


def _is_list(file: File) -> bool:
    return file.name.lower().endswith(".json")


@lru_cache(maxsize=1)
def _items(place: str) -> list[Any]:
    """Return the items of a list in JSON. Raises UserError for anything else."""
    try:
        items = parse_json(decode_text(Path(place).read_bytes(), place))
    except (OSError, ValueError) as error:
        raise UserError(f"{place}: expected a list of documents in JSON, found something else ({error})") from None
    if not isinstance(items, list):
        raise UserError(f"{place}: expected a list of documents in JSON, found a {type(items).__name__}")
    return items


def claim_json(listing: Listing, columns: Columns) -> list[File]:
    """Claim .jsonl files, and .json files of lists, whose first record has a field of a document."""
    fields = {*LISTS, *CAPTION_COLUMNS, *IMAGE_COLUMNS, columns.caption_column, columns.image_column}
    lines = listing.ending(".jsonl", ".jsonl.gz", ".ndjson")
    if listing.whole:
        marks = tuple(f'"{field}"'.encode() for field in fields if field)
        lines = [f for f in lines if f.name.endswith(".gz") or f.size == 0 or any(mark in sniff(f) for mark in marks)]
    images = {file.name.rpartition(".")[0] for file in listing.images()}
    lists = [file for file in listing.ending(".json") if file.name.rpartition(".")[0] not in images]
    return [*lines, *(file for file in lists if re.match(rb"\s*\[\s*\{", sniff(file)))]


# --- parquet, and arrow -----------------------------------------------------------------------------------------------


class ParquetReader(FileReader):
    """Rows with images and captions, as the Hugging Face hub exports data sets; documents of several parts; or text.

    The caption may be a list, several columns (caption_0, ...), or a class whose name the schema has. Raises UserError
    without the extra `parquet`, for a damaged file, where columns are missing, and for images by URL.
    """

    def __init__(self, listing: Listing, files: list[File], columns: Columns) -> None:
        super().__init__(listing, files)
        self.columns = columns
        opened = [self.open(file) for file in self.files]
        schema, where = self.schema(opened[0]), self.files[0].place
        names = list(schema.names)
        self.classes = _class_names(schema)
        self.image, self.captions = "", list[str]()
        self.wanted = [name for name in ("texts", "images", *LISTS, "image_info", "image") if name in names]
        self.several = bool({*LISTS, "image_info"} & set(self.wanted))
        holding = [name for name in names if _holds_images(schema.field(name).type)]
        self.text_only = columns.reader == "text" or not (holding or columns.image_column)
        if not self.several or columns.image_column or columns.caption_column:
            self.several = False
            self._choose_columns(where, names, holding)
            self.wanted = [*filter(None, [self.image]), *self.captions]
        if self.text_only:
            with suppress(OSError):  # a damaged group is a fault, once it is read
                check_text(where, next(self.batches(opened[0], None, names, SAMPLED), []), columns)
        for file, table in zip(self.files, opened, strict=True):
            for name in self.wanted:
                if name not in self.schema(table).names:
                    raise UserError(
                        f'{file.place}: expected the column "{name}", as {self.files[0].name} has, found none'
                    )
        self.groups = [self.sizes(table) for table in opened]
        self.total = sum(size for groups in self.groups for _, size in groups)

    def _choose_columns(self, where: str, names: list[str], holding: list[str]) -> None:
        if not self.text_only:
            known = names if self.columns.image_column else holding
            usual = (*IMAGE_COLUMNS, *holding[:1]) if len(holding) == 1 else IMAGE_COLUMNS
            self.image = column(where, known, "image", self.columns.image_column, usual)
        try:
            self.captions = caption_columns(where, names, self.columns.caption_column)
        except UserError:
            if self.columns.caption_column or len(self.classes) != 1:
                raise
            self.captions = [*self.classes]

    def parts(self) -> Iterable[Part]:
        for number, groups in enumerate(self.groups):
            for group, (_, size) in enumerate(groups):
                yield Part((number, group), size)

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        number, group = part.what
        file, place = self.files[number], 0
        image = image_loader(file, self.listing)
        try:
            for rows in self.batches(self.open(file), group, self.wanted, ROWS):
                for row in rows:
                    key = f"{file.name}/{group}/{place}"
                    try:
                        yield self._document(key, row, image)
                    except (OSError, ValueError) as error:
                        yield Fault(key, str(error))
                    place += 1
        except Exception as error:  # pyarrow's kinds, which may not be named without it
            reason = f"expected a readable row group, found a damaged one ({error})"
            yield Fault(f"{file.name}/{group}", reason, max(1, self.groups[number][group][0] - place))

    def _document(self, key: str, row: dict[str, Any], image: Image) -> Raw:
        if self.several:
            return document(key, row, self.columns, image)
        captions = []
        for name in self.captions:
            value = row[name]
            if name in self.classes and isinstance(value, int) and 0 <= value < len(self.classes[name]):
                value = worded(self.classes[name][value], self.columns)
            captions += captions_in(value, name)
        if not captions:
            raise ValueError(f"expected a caption in {', '.join(self.captions)}, found none")
        if self.text_only:
            return Raw(key, (row[self.captions[0]],))
        try:
            return Raw(key, (image(row[self.image]), *dict.fromkeys(captions)), pair=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"expected bytes of an image in {self.image}, found none ({error})") from None

    def open(self, file: File) -> Any:
        """Open a file. Raises UserError."""
        arrow = _pyarrow(file)
        try:
            return arrow.parquet.ParquetFile(file.here())
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file.place}: expected a parquet file, found something else ({reason})") from None

    def schema(self, table: Any) -> Any:
        return table.schema_arrow

    def sizes(self, table: Any) -> list[tuple[int, int]]:
        """Return rows and bytes of each group of rows that is read on its own."""
        groups = (table.metadata.row_group(number) for number in range(table.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]

    def batches(self, table: Any, group: int | None, names: list[str], rows: int) -> Iterator[list[dict[str, Any]]]:
        """Yield rows of a group, or of the file, a few at a time: a group of images may be larger than memory."""
        groups = None if group is None else [group]
        for batch in table.iter_batches(rows, row_groups=groups, columns=names, use_threads=False):
            yield batch.to_pylist()


class ArrowReader(ParquetReader):
    """Tables as `datasets.save_to_disk` writes them."""

    def open(self, file: File) -> Any:
        arrow = _pyarrow(file)
        try:
            return arrow.ipc.open_stream(arrow.memory_map(str(file.here())))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{file.place}: expected a stream of arrow tables, found something else ({reason})"
            ) from None

    def schema(self, table: Any) -> Any:
        return table.schema

    def sizes(self, table: Any) -> list[tuple[int, int]]:
        return [(batch.num_rows, batch.nbytes) for batch in table]

    def batches(self, table: Any, group: int | None, names: list[str], rows: int) -> Iterator[list[dict[str, Any]]]:
        for batch in islice(table, group or 0, None if group is None else group + 1):
            for start in range(0, batch.num_rows, rows):
                yield batch.select(names).slice(start, rows).to_pylist()


def _pyarrow(file: File) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        needed = f"expected the extra that reads it, found none: {install_command('parquet')}"
        raise UserError(f"{file.place}: {needed}") from None
    return pyarrow


def _holds_images(kind: Any) -> bool:
    """Return True for bytes, {"bytes", "path"}, and lists of these."""
    text = str(kind)
    return text.startswith(("binary", "large_binary")) or ("bytes: binary" in text or "bytes: large_binary" in text)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of classes by column, from the features that `datasets` keeps in a table's schema."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return {name: value["names"] for name, value in features.items() if value.get("_type") == "ClassLabel"}
    return {}


def claim_arrow(listing: Listing, columns: Columns) -> list[File]:
    """Claim the tables next to a state.json that lists them."""
    folders = {str(PurePosixPath(file.name).parent) for file in listing.files if file.name.endswith("state.json")}
    return [file for file in listing.ending(".arrow") if str(PurePosixPath(file.name).parent) in folders]
