"""Rows of parquet as the Hugging Face hub exports data sets, and of the arrow tables that `datasets` saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import UserError, install_command
from ..remote import File, hash_files
from .content import IMAGE_COLUMNS, SAMPLED, caption_columns, captions_in, check_text, column, weighted, worded
from .contract import LOST_REST, Columns, Fault, FileReader, Item, Part, Raw
from .listing import Listing
from .records import DIALOGUES, LISTS, ROWS, Image, NamedImages, document, image_loader, names_in
from .splits import FIELDS, choose_split, split_in

SPLIT_ROWS = 1 << 16  # of the column "split", read at a time


class ParquetReader(FileReader):
    """Rows with images and captions, as the Hugging Face hub exports data sets; documents of several parts; or text.

    The caption may be a list, several columns (caption_0, ...), or a class whose name the schema has. Raises UserError
    without the extra `parquet`, for a damaged file, where columns are missing, and for images by URL.
    """

    holds = "a parquet file"
    schema: Callable[[Any], Any] = staticmethod(attrgetter("schema_arrow"))  # of an opened table

    def __init__(self, listing: Listing, files: list[File], columns: Columns) -> None:
        super().__init__(listing, files)
        self.columns = columns
        opened = [self.open(file) for file in self.files]
        schema, where = self.schema(opened[0]), self.files[0].place
        names = list(schema.names)
        self.classes = _class_names(schema)
        self.field = next((name for field in FIELDS for name in names if name.strip().lower() == field), "")
        self.image, self.captions = "", list[str]()
        self.wanted = [name for name in ("images", *LISTS, "image_info", *IMAGE_COLUMNS) if name in names]
        self.several = bool({*LISTS, "image_info"} & set(self.wanted))
        holding = [name for name in names if _holds_images(schema.field(name).type)]
        dialogues = columns.reader != "text" and not {*DIALOGUES}.isdisjoint(self.wanted)
        self.text_only = columns.reader == "text" or not (holding or columns.image_column or dialogues)
        if not self.several or columns.image_column or columns.caption_column:
            self.several = False
            self._choose_columns(where, names, holding)
            self.wanted = [*filter(None, [self.image]), *self.captions]
            self.wanted += ["weights"] if self.image and "weights" in names else []
        if self.text_only:
            first: list[dict[str, Any]] = []
            with suppress(Exception):  # a damaged group is a fault, once it is read
                first = next(self.batches(self.open(self.files[0]), None, names, SAMPLED), [])
            check_text(where, first, columns)
        for file, table in zip(self.files, opened, strict=True):
            for name in self.wanted:
                if name not in self.schema(table).names:
                    raise UserError(
                        f'{file.place}: expected the column "{name}", as {self.files[0].name} has, found none'
                    )
        self.groups = [self.sizes(table) for table in opened]
        self.total = sum(size for groups in self.groups for _, size in groups)
        self.by_field = False
        if self.field and all(self.field in self.schema(table).names for table in opened):
            chosen = choose_split(listing.split, where, self._splits(), columns.source_split)
            self.by_field, self.source_split = chosen is not None, chosen or listing.split
            self.wanted += [self.field] if self.by_field else []

    def _splits(self) -> Iterator[dict[str, Any]]:
        """Yield every row's split by its field, but none of damaged groups: those are faults, once they are read."""
        for file, groups in zip(self.files, self.groups, strict=True):
            for group in range(len(groups)):
                with suppress(Exception):
                    for rows in self.batches(self.open(file), group, [self.field], SPLIT_ROWS):
                        yield from ({"split": self._named(self.field, row[self.field])} for row in rows)

    def _split(self, row: dict[str, Any]) -> str | None:
        return split_in({"split": self._named(self.field, row[self.field])}) if self.by_field else None

    def _is_taken(self, row: dict[str, Any]) -> bool:
        return self._split(row) in (self.source_split, None)

    def _named(self, column: str, value: Any) -> Any:
        """Return the name of a class where the schema has one, and any other value as it is."""
        names = self.classes.get(column, ())
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    def _choose_columns(self, where: str, names: list[str], holding: list[str]) -> None:
        if not self.text_only:
            known = names if self.columns.image_column else holding
            usual = (*IMAGE_COLUMNS, *holding[:1]) if len(holding) == 1 else IMAGE_COLUMNS
            self.image = column(where, known, "image", self.columns.image_column, usual)
        try:
            self.captions = caption_columns(where, names, self.columns.caption_column)
        except UserError:
            labels = [name for name in self.classes if name != self.field]
            if self.columns.caption_column or len(labels) != 1:
                raise
            self.captions = labels

    def contents(self) -> dict[str, str]:
        """Return hashes, also of image files that rows name; of a table whose first rows name none, no others do."""
        hashes = super().contents()
        if self.text_only or self.listing is None:
            return hashes
        named = NamedImages(replace(self.listing, ambiguous=()))
        for file, groups in zip(self.files, self.groups, strict=True):
            if file.cache is not None:
                continue
            below = str(PurePosixPath(file.name).parent)
            for group in [None, *range(len(groups))]:
                names: list[str] = []
                with suppress(Exception):  # a damaged group is a fault, once it is read
                    for rows in self.batches(self.open(file), group, self.wanted, SAMPLED):
                        for row in rows:
                            shown = names_in(row, partial(self._document, ""))
                            if self._is_taken(row):
                                names += shown
                            else:
                                named.pass_over(shown, below, self._split(row) or "")
                        if group is None:  # of the first rows, which are read again
                            break
                if not names and group is None:
                    break
                named.add(names, below)
        self.listing = named.checked()
        return hashes | hash_files(named.files())

    def parts(self) -> Iterable[Part]:
        for number, groups in enumerate(self.groups):
            for group, (_, size) in enumerate(groups):
                yield Part((number, group), size)

    def read(self, part: Part) -> Iterator[Item]:
        number, group = part.what
        file, place = self.files[number], 0
        image = image_loader(file, self.listing)
        try:
            for rows in self.batches(self.open(file), group, self.wanted, ROWS):
                for row in rows:
                    key = f"{file.name}/{group}/{place}"
                    place += 1
                    if not self._is_taken(row):
                        continue
                    try:
                        yield self._document(key, row, image)
                    except (OSError, ValueError) as error:
                        yield Fault(key, str(error))
        except Exception as error:  # pyarrow's kinds, which may not be named without it
            reason = f"expected a readable row group, found a damaged one ({error})"
            yield Fault(f"{file.name}/{group}", reason, max(1, self.groups[number][group][0] - place))

    def _document(self, key: str, row: dict[str, Any], image: Image) -> Raw:
        if self.several:
            return document(key, row, self.columns, image)
        text = row[self.captions[0]]
        if self.text_only and len(self.captions) == 1 and isinstance(text, str) and text.strip():
            return Raw(key, (text,))  # byte for byte
        captions = []
        for name in self.captions:
            value = self._named(name, row[name])
            captions += [worded(value, self.columns)] if value is not row[name] else captions_in(value, name)
        if not captions:
            raise ValueError(f"expected a caption in {', '.join(self.captions)}, found none")
        if self.text_only:
            return Raw(key, tuple(captions))
        try:
            picture = image(row[self.image])
        except (OSError, ValueError) as error:
            raise ValueError(f"expected bytes of an image in {self.image}, found none ({error})") from None
        captions, weights = weighted(captions, row.get("weights"))
        return Raw(key, (picture, *captions), True, weights)

    def open(self, file: File) -> Any:
        """Open a file. Raises UserError."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            needed = f"expected the extra that reads it, found none: {install_command('parquet')}"
            raise UserError(f"{file.place}: {needed}") from None
        try:
            table = self.opened(pyarrow, file.here())
            names = list(self.schema(table).names)  # a damaged one shows when it is looked at
            if twice := [name for number, name in enumerate(names) if name in names[:number]]:
                raise ValueError(f'two columns "{twice[0]}"')
            return table
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file.place}: expected {self.holds}, found something else ({reason})") from None

    def opened(self, arrow: Any, path: Path) -> Any:
        return arrow.parquet.ParquetFile(path)

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

    holds = "a stream of arrow tables"
    schema = staticmethod(attrgetter("schema"))

    def opened(self, arrow: Any, path: Path) -> Any:
        return arrow.ipc.open_stream(arrow.memory_map(str(path)))

    def sizes(self, table: Any) -> list[tuple[int, int]]:
        sizes = []
        try:
            for batch in table:
                sizes.append((batch.num_rows, batch.get_total_buffer_size()))
        except Exception:  # of a stream that is damaged or cut short: reading the rest reports it
            sizes.append((LOST_REST, 0))
        return sizes

    def batches(self, table: Any, group: int | None, names: list[str], rows: int) -> Iterator[list[dict[str, Any]]]:
        for whole in islice(table, group or 0, None if group is None else group + 1):
            batch = whole.select(names)
            batch.validate(full=True)  # what is damaged may end the process otherwise
            for start in range(0, batch.num_rows, rows):
                yield batch.slice(start, rows).to_pylist()


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
    """Claim the tables that a state.json next to them lists, or all where it lists none: others are caches of `map`.

    Raises UserError for a table that is listed and not there.
    """
    claimed: list[File] = []
    for state in listing.ending("state.json"):
        folder = PurePosixPath(state.name).parent
        if PurePosixPath(state.name).name != "state.json":
            continue
        tables = [file for file in listing.ending(".arrow") if PurePosixPath(file.name).parent == folder]
        names: list[str] = []  # of a state.json that lists none, or is of something else
        with suppress(OSError, ValueError, KeyError, TypeError):
            names = [str(entry["filename"]) for entry in json.loads(Path(state.place).read_bytes())["_data_files"]]
        there = {PurePosixPath(file.name).name for file in tables}
        if missing := [name for name in names if name not in there]:
            raise UserError(f"{state.place}: expected the tables it lists, found no {', '.join(missing[:3])}")
        claimed += [file for file in tables if not names or PurePosixPath(file.name).name in names]
    return claimed
