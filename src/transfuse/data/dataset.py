"""A data set on disk: ordinary tars that any WebDataset reader opens, and an index that finds any document in them.

    SET/
        manifest.json               kind, counts, shards with sizes and hashes, settings, what was dropped; written last
        SHA256SUMS                  of all files, as `sha256sum -c` reads them
        tokenizer.json              the index counts in its tokens
        documents.npy               a row a document: its place, its tokens, its hash; mapped, never read whole
        pictures.npy                a row an image: rows and columns of pixels; if padded, also those of its inside
        captions.npy                a row each caption of an image with several: its document, tokens and weight
        heldout.npy                 the documents that are held out from training, in ascending order
        groups.npy                  a row each near duplicate: the first document of its group, and itself
        shards/shard-00000.tar      members KEY.png KEY.txt of a pair (KEY.json if it has several captions), KEY.0.png
                                    KEY.json of a document of several parts
        shards/shard-00000.tokens   or, of text alone: token ids, uint16 (uint32 where there are more than 65,536)
        dropped.jsonl  quarantine.jsonl        what is not in it, by name and reason: by a filter; because it is faulty
        left_out.jsonl              files of the source that no document is made of, and why

Document n is in shard n // shard_size, so no list of shards needs to be searched. Whole groups of documents are held
out: near duplicates, and pieces of one text, never stand on both sides (`groups`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from ..config import from_dict
from ..errors import UserError
from ..images import decode_image
from ..io import sha256
from ..sequence import Tokenizer
from .members import digest, untar
from .packing import Place, Shuffle
from .remote import Cache, MissingError, is_remote

VERSION = 3
SUMS = "SHA256SUMS"
DOCUMENT = np.dtype(
    [
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("tokens", "<u4"),
        ("first_picture", "<u8"),
        ("pair", "?"),
        ("conditional", "?"),  # text comes before its last image
        ("followed", "?"),  # text comes after its last image
        ("hash", "u1", (16,)),
    ]
)
ROW = struct.Struct("<QIIQ???16s")  # of documents.npy: numpy takes as long for one field of a row as this for all
IMAGE = np.dtype([("rows", "<u2"), ("columns", "<u2")])
PADDED = np.dtype([*IMAGE.descr, ("inner_rows", "<u2"), ("inner_columns", "<u2")])
GROUP = np.dtype([("first", "<u8"), ("document", "<u8")])
CAPTION = np.dtype([("document", "<u8"), ("tokens", "<u4"), ("weight", "<f4")])
OPEN_SHARDS = 64  # files that a process keeps open
FREE_FAULTS = 10  # faulty documents of a source that are always let pass, whatever their share

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class CorruptSample:
    """A corrupt document: its source, its shard, its name, and what is wrong with it."""

    source: str
    shard: str
    key: str
    reason: str


class CorruptSampleError(UserError):
    """A document of a set cannot be read, or is not what the index says."""

    def __init__(self, sample: CorruptSample) -> None:
        super().__init__(f"{sample.source}/{sample.shard}: {sample.key}: {sample.reason}")
        self.sample = sample


@dataclass(frozen=True)
class Shard:
    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Encoding:
    """The autoencoder whose latents (float16) or codes (uint16 or int32) are in the tars in place of pixels."""

    autoencoder: str
    fingerprint: str
    factor: int
    codebook: int | None


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    tokens: of all texts; of an image with several captions, all of them. longest: tokens of the longest document.
    tokenizer: its fingerprint. index: SHA-256 of each .npy file. seen: documents of the source, whether they are in
    the set or not. dropped, changed: counts by reason, of documents left out and of changes made to content.
    captions, grouped: rows of captions.npy and groups.npy, which a set lacks where there are none. split: what decided
    which documents are held out. padded: images are padded to a square, and pictures.npy is of dtype PADDED. files:
    those of the source that were found, read, and left out (left_out.jsonl).
    """

    version: int
    kind: Literal["pictures", "text"]
    documents: int
    pictures: int
    tokens: int
    longest: int
    heldout: int
    shard_size: int
    shards: tuple[Shard, ...]
    tokenizer: str
    index: dict[str, str]
    encoding: Encoding | None
    source: str
    settings: dict[str, Any]
    seen: int
    dropped: dict[str, int] = field(default_factory=dict)
    faulty: int = 0
    captions: int = 0
    grouped: int = 0
    split: Literal["content"] = "content"
    padded: bool = False
    changed: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredDocument:
    """A document as it is stored: text, images as bytes of image files, or arrays of latents or codes.

    pair: `parts` is an image and its captions, of which a sample shows one. tokens: the number that the index says it
    has; of several captions, that of the longest. weights: of several captions, relative; none: they are equal.
    roles: of a dialogue, who says or shows each part.
    """

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    pair: bool
    tokens: int
    weights: tuple[float, ...] = ()
    roles: tuple[str, ...] = ()


class DataSet:
    """A folder, or any URL that fsspec knows, whose documents are read by number.

    Remote files come through `cache`; the manifest is fetched whenever a set is opened. Raises UserError where there is
    no set, or one of another version; later on, where another has taken its place.
    """

    def __init__(self, path: str, cache: Cache | None = None) -> None:
        self.path = path.rstrip("/")
        self.cache = cache or Cache()
        self._open(self.file("manifest.json").read_bytes())

    def _open(self, manifest: bytes) -> None:
        where = f"{self.path}/manifest.json"
        try:
            values = json.loads(manifest.decode())
        except ValueError as error:
            raise UserError(f"{where}: expected JSON, found something else ({error})") from None
        if not isinstance(values, dict) or values.get("version") != VERSION:
            other = values.get("version") if isinstance(values, dict) else type(values).__name__
            raise UserError(f"{where}: version: expected {VERSION}, found {other}; build the set again")
        self.manifest = from_dict(Manifest, values, where)
        self._manifest, self.fingerprint = manifest, _fingerprint(manifest)
        self.documents = self._mapped("documents.npy", DOCUMENT, self.manifest.documents)
        self.images = self._mapped("pictures.npy", PADDED if self.manifest.padded else IMAGE, self.manifest.pictures)
        captions, grouped = self.manifest.captions, self.manifest.grouped
        self.captions = self._mapped("captions.npy", CAPTION, captions) if captions else np.zeros(0, CAPTION)
        self.groups = self._mapped("groups.npy", GROUP, grouped) if grouped else np.zeros(0, GROUP)
        count = self.manifest.heldout
        self._shuffle = Shuffle(count or 1, "heldout")
        self.heldout = self._mapped("heldout.npy", np.dtype("<u8"), count).astype(np.int64)
        self._skipped = self.heldout - np.arange(count)
        self._shards: OrderedDict[tuple[int, int], BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.documents

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which is mapped again; with the manifest, so that a copy is this set and no later one."""
        return {"path": self.path, "cache": self.cache, "manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.cache = state["path"], state["cache"]
        self._open(state["manifest"])

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    def index(self) -> tuple[np.ndarray, ...]:
        """Return the arrays of its index that are on disk."""
        return self.documents, self.images, self.captions, self.groups, self.heldout

    def tokenizer(self) -> Tokenizer:
        """Return the set's tokenizer. Raises UserError where it is not the one that the index was made with."""
        tokenizer = Tokenizer.load(self.file("tokenizer.json"))
        if tokenizer.fingerprint != self.manifest.tokenizer:
            raise UserError(
                f"{self.path}/tokenizer.json: expected the tokenizer {self.manifest.tokenizer}, as the set was built, "
                f"found {tokenizer.fingerprint}"
            )
        return tokenizer

    def size(self, split: Split) -> int:
        """Return the number of documents of a split."""
        return self.manifest.heldout if split == "heldout" else len(self) - self.manifest.heldout

    def number(self, split: Split, index: Place) -> Place:
        """Return which document is number `index` of a split; or which are numbers `[n]`."""
        if split == "heldout":
            numbers = self.heldout[self._shuffle(index)]
        else:
            numbers = index + np.searchsorted(self._skipped, index, "right")
        return numbers if isinstance(index, np.ndarray) else int(numbers)

    def sizes(self, number: int, rows: str = "rows", columns: str = "columns") -> list[tuple[int, int]]:
        """Return rows and columns, in pixels, of a document's images."""
        first, counts = self._images_of(np.array([number]))
        images = self.images[first[0] : first[0] + counts[0]]
        return list(zip(images[rows].tolist(), images[columns].tolist(), strict=True))

    def insides(self, number: int) -> list[tuple[int, int]]:
        """Return rows and columns, in pixels, of what is not padding in a document's images: in the middle of each."""
        return self.sizes(number, "inner_rows", "inner_columns") if self.manifest.padded else self.sizes(number)

    def image_positions(self, numbers: np.ndarray, side: int, last_only: bool = False) -> np.ndarray:
        """Return positions `[n]` of the images of documents `[n]` in patches of `side` pixels, with their markers.

        last_only: of each document's last image alone; every one of the documents has an image.
        """
        first, counts = self._images_of(numbers)
        if last_only:
            first, counts = first + counts - 1, np.ones_like(counts)
        owners = np.repeat(np.arange(len(numbers)), counts)
        images = self.images[np.arange(len(owners)) + np.repeat(first - (counts.cumsum() - counts), counts)]
        positions = 2 + images["rows"].astype(np.int64) * images["columns"] // side**2
        return np.bincount(owners, positions, len(numbers)).astype(np.int64)

    def copy_positions(self, numbers: np.ndarray, side: int) -> np.ndarray:
        """Return the patches `[n]`, of `side` pixels, of documents' images `[n]` that text or an image follows."""
        counts = self._images_of(numbers)[1]
        patches = self.image_positions(numbers, side) - 2 * counts
        bare = (counts > 0) & ~self.documents["followed"][numbers]
        patches[bare] -= self.image_positions(numbers[bare], side, last_only=True) - 2
        return patches

    def _images_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place in the index of each document's first image, and the number of its images."""
        first = self.documents["first_picture"][numbers].astype(np.int64)
        last = numbers == len(self) - 1
        after = self.documents["first_picture"][np.where(last, numbers, numbers + 1)].astype(np.int64)
        return first, np.where(last, len(self.images), after) - first

    def captions_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place in `captions` of documents' first captions `[n]`, and how many they have: 0 for one."""
        first, last = (np.searchsorted(self.captions["document"], numbers, side) for side in ("left", "right"))
        return first, last - first

    def expected_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Return the tokens of documents `[n]`, float64; of several captions the mean, by their weights."""
        tokens = self.documents["tokens"][numbers].astype(np.float64)
        first, counts = self.captions_of(numbers)
        for place in np.flatnonzero(counts):
            rows = self.captions[first[place] : first[place] + counts[place]]
            tokens[place] = np.average(rows["tokens"], weights=rows["weight"])
        return tokens

    def shard(self, number: int) -> str:
        """Return the file of the shard that a document is in."""
        return self.manifest.shards[number // self.manifest.shard_size].file

    def read(self, number: int) -> StoredDocument:
        """Return a document of a set of images. Raises CorruptSampleError where it is not what the index says."""
        data, tokens, expected = self._read(number)
        try:
            members = untar(data)
            key = members[0][0].partition(".")[0]
            if digest(members) != expected:
                raise self.corrupt(number, "its content does not match its hash", key)
            *images, (name, text) = members
            contents = [
                np.load(io.BytesIO(content), allow_pickle=False) if file.endswith(".npy") else content
                for file, content in images
            ]
            if name.endswith(".txt"):
                return StoredDocument(key, (contents[0], text.decode()), True, tokens)
            record = json.loads(text)
            if "captions" in record:
                parts = contents[0], *record["captions"]
                return StoredDocument(key, parts, True, tokens, tuple(record.get("weights", ())))
            parts = record["parts"]
            contents_in_order = tuple(part["text"] if "text" in part else contents[part["image"]] for part in parts)
            roles = tuple(part["role"] for part in parts if "role" in part)
            return StoredDocument(key, contents_in_order, False, tokens, roles=roles)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise self.corrupt(number, f"unreadable ({error})") from None

    def decode(self, number: int, stored: StoredDocument, part: bytes | np.ndarray) -> np.ndarray:
        """Return an image part as uint8 `[row, column, 3]`, or its latents or codes. Raises CorruptSampleError."""
        if isinstance(part, np.ndarray):
            return part
        try:
            return decode_image(part, "image")
        except UserError as error:
            raise self.corrupt(number, str(error).removeprefix("image: "), stored.key) from None

    def read_ids(self, number: int) -> np.ndarray:
        """Return token ids of a document of a set of text. Raises CorruptSampleError like `read`."""
        data, _, expected = self._read(number)
        if digest([("tokens", data)]) != expected:
            raise self.corrupt(number, "its content does not match its hash")
        first_tokens, first_bytes = int(self.documents["tokens"][0]), int(self.documents["bytes"][0])
        try:
            return np.frombuffer(data, "<u2" if first_bytes == 2 * first_tokens else "<u4")
        except ValueError as error:
            raise self.corrupt(number, f"unreadable ({error})") from None

    def corrupt(self, number: int, reason: str, key: str = "") -> CorruptSampleError:
        """Return an error that names a document by its key, where that is known, or its number."""
        return CorruptSampleError(CorruptSample(self.path, self.shard(number), key or f"document {number}", reason))

    def check(self, number: int, tokenizer: Tokenizer) -> None:
        """Read and decode a document. Raises CorruptSampleError where it is not what the index says."""
        expected = int(self.documents[number]["tokens"])
        if self.manifest.kind == "text":
            ids = self.read_ids(number)
            if len(ids) != expected or (ids >= tokenizer.vocab_size).any():
                raise self.corrupt(number, f"expected {expected} tokens of the tokenizer")
            return
        stored = self.read(number)
        counts = [len(tokenizer.encode(part)) for part in stored.parts if isinstance(part, str)]
        tokens = max(counts) if stored.pair else sum(counts)
        if tokens != expected:
            raise self.corrupt(number, f"expected {expected} tokens, found {tokens}", stored.key)
        first, several = (int(values[0]) for values in self.captions_of(np.array([number])))
        captions = self.captions[first : first + several]
        weights = np.array(stored.weights or [1.0] * several, "f4")
        if several and (captions["tokens"].tolist() != counts or not np.array_equal(captions["weight"], weights)):
            raise self.corrupt(number, "its captions are not those of the index", stored.key)
        factor = 1 if self.manifest.encoding is None else self.manifest.encoding.factor
        images = [self.decode(number, stored, part) for part in stored.parts if not isinstance(part, str)]
        # Pixels are [row, column, 3], a latent [channel, row, column], codes [row, column].
        shapes = [image.shape[:2] if image.dtype == np.uint8 else image.shape[-2:] for image in images]
        sizes = [(rows * factor, columns * factor) for rows, columns in shapes]
        if sizes != self.sizes(number):
            raise self.corrupt(number, f"expected {self.sizes(number)} pixels, found {sizes}", stored.key)

    def file(self, name: str) -> Path:
        """Return a local path of a file of the set, after fetching a remote one.

        Raises:
            UserError: there is no such file, or it is of another set.
        """
        if not is_remote(self.path):
            path = Path(self.path, name)
            if not path.is_file():
                what = "a data set (transfuse data build makes one)" if name == "manifest.json" else "a whole data set"
                raise UserError(f"{path}: expected {what}, found no such file")
            return path
        url = f"{self.path}/{name}"
        if name == "manifest.json":
            return self.cache.newest(url)
        sums = self.manifest.index | {shard.file: shard.sha256 for shard in self.manifest.shards}

        def check(path: Path) -> None:
            if sha256(path) != sums.get(name):
                self._refuse_another_set()

        try:
            return self.cache.file(url, part_of=self.fingerprint, check=check)
        except MissingError:
            self._refuse_another_set()
            raise

    def _refuse_another_set(self) -> None:
        """Raise UserError if another set has taken the place of this one; a damaged file is of this set."""
        try:
            fingerprint = _fingerprint(self.cache.newest(f"{self.path}/manifest.json").read_bytes())
        except MissingError:
            fingerprint = "none"
        if fingerprint != self.fingerprint:
            wanted = f"expected the data set {self.fingerprint}, as it was opened"
            raise UserError(f"{self.path}: {wanted}, found {fingerprint}: it has changed")

    def _mapped(self, name: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        try:
            index = np.load(self.file(name), mmap_mode="r" if count else None, allow_pickle=False)
        except UserError:
            raise
        except Exception as error:  # a damaged header can make numpy raise anything: EOFError, TokenError, ...
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}/{name}: expected the index of the set, found none ({reason})") from None
        if index.dtype != dtype or index.shape != (count,):
            raise UserError(f"{self.path}/{name}: expected {count} rows, as the manifest says, found {index.shape}")
        return index.view(np.ndarray)

    def _read(self, number: int) -> tuple[bytes, int, bytes]:
        """Return the bytes of a document; and, from the index, its tokens and its hash."""
        place, size, tokens, *_, expected = ROW.unpack(self.documents[number].tobytes())
        try:
            with self._lock:
                file = self._shard_file(number // self.manifest.shard_size)
                file.seek(place)
                data = file.read(size)
        except (OSError, OverflowError) as error:  # of an index that is damaged
            raise self.corrupt(number, f"unreadable ({error})") from None
        if len(data) != size:
            raise self.corrupt(number, f"expected {size} bytes at {place}, found {len(data)}")
        return data, tokens, expected

    def _shard_file(self, shard: int) -> BinaryIO:
        """Return an open shard of this process; one opened by a parent shares its place with the parent."""
        key = os.getpid(), shard
        if key not in self._shards:
            path = self.file(self.manifest.shards[shard].file)
            try:
                self._shards[key] = path.open("rb", buffering=0)
            except OSError as error:
                raise UserError(f"{path}: expected a file to read, found {error.strerror or error}") from None
            if len(self._shards) > OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
        self._shards.move_to_end(key)
        return self._shards[key]


def _fingerprint(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:16]


def as_latent(stored: np.ndarray) -> torch.Tensor:
    """Return latents (float16) or codes (uint16 or int32) of a set as a model takes them: float32, or int64."""
    return torch.from_numpy(stored.astype(np.int64 if stored.dtype.kind in "iu" else np.float32))
