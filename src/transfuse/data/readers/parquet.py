"""Parquet with the bytes of images in it, as the Hugging Face hub exports data sets. Needs the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ...errors import UserError
from . import Columns, Fault, Part, Raw
from .files import File, contents
from .pictures import CAPTION_COLUMNS, IMAGE_COLUMNS, column


class ParquetReader:
    """Documents are rows: an image column (bytes, or `{"bytes", "path"}`) and a caption column; or text alone."""

    def __init__(self, files: list[File], columns: Columns) -> None:
        self.files = files
        opened = [self._open(file) for file in files]
        schema = opened[0].schema_arrow
        names, where = list(schema.names), files[0].place
        kinds = {name: str(schema.field(name).type) for name in names}
        bytes_ = [name for name in names if kinds[name].startswith(("binary", "large_binary", "struct"))]
        self.caption = column(where, names, "caption", columns.caption_column, CAPTION_COLUMNS)
        self.text_only = not columns.image_column and not set(IMAGE_COLUMNS) & set(bytes_)
        self.image = ""
        if not self.text_only:
            known = names if columns.image_column else bytes_
            self.image = column(where, known, "image", columns.image_column, IMAGE_COLUMNS)
        for file, found in zip(files, opened, strict=True):
            for name in filter(None, (self.image, self.caption)):
                if name not in found.schema_arrow.names:
                    raise UserError(f'{file.place}: expected the column "{name}", as {files[0].name} has, found none')
        groups = [(found.metadata, range(found.metadata.num_row_groups)) for found in opened]
        self.rows = [[metadata.row_group(number).num_rows for number in some] for metadata, some in groups]
        self.sizes = [[metadata.row_group(number).total_byte_size for number in some] for metadata, some in groups]
        self.total = sum(map(sum, self.sizes))

    def contents(self) -> dict[str, str]:
        return contents(self.files)

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
        except Exception as error:  # pyarrow's own kinds, which may not be named without it
            found = f"expected a readable row group, found a damaged one ({error})"
            yield Fault(f"{file.name}/{group}", found, max(1, self.rows[number][group]))
            return
        for place, row in enumerate(rows):
            key = f"{file.name}/{group}/{place}"
            words = row[self.caption]
            if not isinstance(words, str) or not words.strip():
                yield Fault(key, f"expected a caption in {self.caption}, found {'none' if not words else 'no text'}")
            elif self.text_only:
                yield Raw(key, (words,))
            else:
                data = row[self.image]
                data = data.get("bytes") if isinstance(data, dict) else data
                if isinstance(data, bytes):
                    yield Raw(key, (data, words.strip()), pair=True)
                else:
                    yield Fault(key, f"expected bytes of an image in {self.image}, found {type(data).__name__}")

    def _open(self, file: File) -> Any:
        try:
            import pyarrow.parquet
        except ImportError:
            needed = "expected the extra that reads it, found none: pip install 'transfuse[parquet]'"
            raise UserError(f"{file.place}: {needed}") from None
        path = file.here()
        try:
            return pyarrow.parquet.ParquetFile(path)
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file.place}: expected a parquet file, found something else ({reason})") from None
