"""Documents before they are a data set, from folders, tables, tars, parquet, jsonl, text, "world", or a data set.

    reader = open_source("photos/", Columns())
    for part in reader.parts():              # cheap: names and places; each part goes to one process
        for item in reader.read(part):       # Raw documents, and a Fault for each that cannot be read
            ...

Tars, parquet, jsonl, text and data sets may be at a URL. A reader skips nothing silently: whatever is not a document
is a fault, with its name and the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from ...errors import UserError
from ...images import unpad
from ...io import sha256
from ...log import logger
from .. import bundled
from ..dataset import CorruptSampleError, DataSet
from ..remote import Cache, File, MissingError, hash_files, is_remote, remote_files, url_name

PER_PART = 64  # documents in a part, where they can be counted
LOST_REST = 100  # documents that the lost rest of a file counts for, whose number is unknown
SET = ("manifest.json", "documents.npy", "tokenizer.json")  # files by which a folder is known as a data set
EXPECTED = (
    'expected "world", or pictures with captions (.txt next to each, metadata.jsonl, a .csv table), WebDataset .tar '
    "files, .parquet, .jsonl or .txt, or a data set"
)
EXPECTED_AT_URL = "expected .tar, .parquet, .jsonl or .txt files, many as {00000..00041}.tar, or a data set"


@dataclass(frozen=True)
class Raw:
    """A document as it was read: text, and images as the bytes of an image file, or as pixels.

    pair: it is an image and its captions, `(image, caption, ...)`; training shows one of them, in either order.
    weights: how often each of several captions is shown, relative to the others; none: equally often. heldout: its side
    in the data set that it comes from, if it comes from one. roles: of a dialogue, who says or shows each part.

    Raises ValueError for weights that do not go with the captions.
    """

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    pair: bool = False
    weights: tuple[float, ...] = ()
    heldout: bool | None = None
    roles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weights and (not self.pair or len(self.weights) != len(self.parts) - 1):
            raise ValueError(f"expected a weight for each of {len(self.parts) - 1} captions, found {len(self.weights)}")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"expected weights above 0, found {', '.join(f'{weight:g}' for weight in self.weights)}")


@dataclass(frozen=True)
class Fault:
    """A document that cannot be read: its name, and why. lost: the documents lost with it, such as a file's rest."""

    key: str
    reason: str
    lost: int = 1

    def __post_init__(self) -> None:
        for name in ("key", "reason"):  # names in archives, and errors of libraries, may have several lines
            object.__setattr__(self, name, " ".join(getattr(self, name).split()))


@dataclass(frozen=True)
class Part:
    """A stretch of a source. weight: its size, in the unit of the reader's `total`."""

    what: Any
    weight: int


@dataclass(frozen=True)
class Columns:
    """The names of things in a source."""

    image_column: str = ""
    """of a table, or JSON: the column or field with the file's name, or bytes; none: one of the usual names"""
    caption_column: str = ""
    """of a table, or JSON: the column or field with the caption; none: one of the usual names"""
    first_line: bool = False
    """of a caption's .txt file, take the first line alone"""
    split: Literal["file", "paragraph", "line"] = "file"
    """what is one document of plain text"""
    count: int = 0
    """take this many documents of the source, no more; 0: all. Of "world", make this many"""


class Reader(Protocol):
    """A source of documents; it is sent to other processes, and so is each part.

    text_only: documents are text alone. total: weight of all parts.
    """

    text_only: bool
    total: int

    def contents(self) -> dict[str, str]:
        """Return hashes of everything the documents are made of, by name: other content changes one of them."""

    def parts(self) -> Iterable[Part]: ...

    def read(self, part: Part) -> Iterator[Raw | Fault]: ...


class FileReader:
    """The base of readers whose source is a list of files, weighed in bytes."""

    text_only = False

    def __init__(self, files: list[File]) -> None:
        self.files = files
        self.total = sum(file.size for file in files)

    def contents(self) -> dict[str, str]:
        return hash_files(self.files)


def open_source(source: str, columns: Columns, size: int = 64, cache: Cache | None = None) -> Reader:
    """Return the reader of a path or URL, by what is there; of "world", the bundled data set, at `size` pixels.

    cache: where files of a URL are kept. Raises UserError where nothing is, or nothing known.
    """
    from .images import ImageReader, read_table

    if source == "world":
        return WorldReader(columns.count, size)
    if is_remote(source):
        return _open_url(source, columns, cache or Cache())
    path = Path(source)
    if path.is_dir():
        if all((path / name).is_file() for name in SET):
            return SetReader(DataSet(source))
        *kinds, (texts, _) = _kinds()
        archives = sorted(file for endings, _ in kinds for ending in endings for file in _visible(path, ending))
        files = [File.of(path, file) for file in archives if file.name != "metadata.jsonl"]
        if files:
            return _of_files(source, files, columns)
        for name in ("metadata.jsonl", "metadata.csv"):
            if (path / name).is_file():
                return ImageReader(path, read_table(path / name, columns), columns, whole_folder=True)
        try:
            return ImageReader.of_folder(path, columns)
        except UserError:
            files = [File.of(path, file) for file in sorted(file for end in texts for file in _visible(path, end))]
            if not files:
                raise UserError(f"{path}: {EXPECTED}, found a folder with none of these") from None
            return _of_files(source, files, columns)
    if not path.is_file():
        raise UserError(f"{path}: {EXPECTED}, found {'something that is no file' if path.exists() else 'none'}")
    name = path.name.lower()
    if name.endswith(".csv") or name == "metadata.jsonl":
        return ImageReader(path.parent, read_table(path, columns), columns)
    return _of_files(source, [File.of(path.parent, path)], columns)


def _kinds() -> list[tuple[tuple[str, ...], Callable[[list[File], Columns], Reader]]]:
    """Return the endings and the reader of each kind of file, the preferred kind first."""
    from .images import ParquetReader, TarReader
    from .texts import JsonReader, TextReader

    return [
        ((".tar",), TarReader),
        ((".parquet",), ParquetReader),
        ((".jsonl", ".jsonl.gz"), JsonReader),
        ((".txt", ".txt.gz", ".md"), TextReader),
    ]


def _of_files(source: str, files: list[File], columns: Columns, expected: str = EXPECTED) -> Reader:
    """Return the reader of the files of the first kind that occurs."""
    for endings, reader in _kinds():
        chosen = [file for file in files if file.name.lower().endswith(endings)]
        if chosen:
            if len(chosen) < len(files) or Path(source).is_dir():
                logger.info(f"{source}: taking its {len(chosen)} {endings[0]} files; what else is there is left aside")
            return reader(chosen, columns)
    raise UserError(f"{source}: {expected}, found {'a file' if len(files) == 1 else 'files'} of another kind")


def _open_url(source: str, columns: Columns, cache: Cache) -> Reader:
    """Return the reader of a URL: a data set has a manifest below it; otherwise it is a file, or a pattern of files."""
    if not url_name(source).lower().endswith(tuple(end for ends, _ in _kinds() for end in ends)) and "*" not in source:
        try:
            cache.newest(f"{source.rstrip('/')}/{SET[0]}")
            return SetReader(DataSet(source, cache))
        except MissingError:
            pass
    try:
        files = remote_files(source, cache)
    except MissingError as error:
        raise UserError(f"{source}: {EXPECTED_AT_URL}, found none ({error})") from None
    if not files:
        raise UserError(f"{source}: {EXPECTED_AT_URL}, found none")
    return _of_files(source, files, columns, EXPECTED_AT_URL)


def _visible(folder: Path, ending: str) -> list[Path]:
    """Return the files in a folder and its folders, hidden ones left out."""
    return [
        path
        for path in folder.rglob(f"*{ending}")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


# --- a data set, and the bundled one ----------------------------------------------------------------------------------


def parts_of(items: Sequence[Any]) -> Iterator[Part]:
    """Yield `PER_PART` items at a time, each of weight 1."""
    for start in range(0, len(items), PER_PART):
        some_items = items[start : start + PER_PART]
        yield Part(some_items, len(some_items))


class CountedReader:
    """The base of readers whose documents have numbers, each of weight 1."""

    text_only = False
    total: int

    def parts(self) -> Iterable[Part]:
        return parts_of(range(self.total))


class SetReader(CountedReader):
    """A data set's documents in their order, held-out ones too, each compared with its hash; they keep its tokenizer.

    Raises UserError for a set without images, or of latents.
    """

    def __init__(self, data: DataSet) -> None:
        encoding = data.manifest.encoding
        if data.manifest.kind == "text" or encoding is not None:
            kind = "text" if encoding is None else f"what {encoding.autoencoder} makes of them"
            raise UserError(f"{data.path}: expected a data set of pictures to build from, found one of {kind}")
        self.data, self.total = data, len(data)

    def contents(self) -> dict[str, str]:
        return {"manifest.json": self.data.fingerprint}  # which has the hashes of everything else

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        heldout = set(self.data.heldout.tolist())
        for number in part.what:
            try:
                stored = self.data.read(number)
                parts = stored.parts
                if self.data.manifest.padded:  # a new set pads them again, or crops what is not padding
                    insides = iter(self.data.insides(number))
                    parts = tuple(
                        part if isinstance(part, str) else unpad(self.data.decode(number, stored, part), next(insides))
                        for part in parts
                    )
                yield Raw(stored.key, parts, stored.pair, stored.weights, number in heldout, stored.roles)
            except CorruptSampleError as error:
                yield Fault(error.sample.key, error.sample.reason)


class WorldReader(CountedReader):
    """Scenes of the bundled data set's training part, from number 0. Raises UserError without a count."""

    def __init__(self, count: int, size: int) -> None:
        if count < 1:
            raise UserError("world: expected how many documents to make (--count N), found none; it never ends")
        self.size, self.total = size, count

    def contents(self) -> dict[str, str]:
        return {bundled.SPRITE_FILE.name: sha256(bundled.SPRITE_FILE)}  # count and size are settings of the build

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        world = bundled.World(bundled.WorldConfig(size=self.size))
        for number in part.what:
            scene = world.scene(number)
            yield Raw(f"scene-{number}", (world.render(scene), bundled.caption(scene, number)), pair=True)


# --- shared by readers ------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises ValueError where it is no JSON, or nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("expected JSON, found brackets in brackets without end") from None
    except ValueError as error:
        raise ValueError(f"expected JSON, found something else ({error})") from None


def decode_text(data: bytes, what: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises ValueError that names the first wrong byte."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what}: expected UTF-8, found something else at byte {error.start}") from None


def captions(value: Any) -> list[str]:
    """Return the captions of one image: a text, or a list of texts. Raises ValueError for anything else."""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a caption or a list of them, found {json.dumps(value, default=str):.60}")
    return texts


def interleaved(parts: list[Any], image: Callable[[Any], bytes]) -> tuple[str | bytes, ...]:
    """Return strings, `{"text": text}` and `{"image": name}` as parts of a document. Raises ValueError."""
    converted: list[str | bytes] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            converted.append(text.strip())
        elif isinstance(part, dict) and "image" in part and text is None:
            converted.append(image(part["image"]))
        else:
            raise ValueError(f"expected parts that are words or pictures, found {json.dumps(part):.60}")
    if not converted:
        raise ValueError("expected parts, found none")
    return tuple(converted)
