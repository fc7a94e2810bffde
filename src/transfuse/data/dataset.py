"""A data set on disk: ordinary tars that any WebDataset reader opens, and an index that finds any document in them.

    SET/
        manifest.json               kind, counts, shards with sizes and hashes, settings, what was dropped; written last
        SHA256SUMS                  of all of it, as `sha256sum -c` reads them
        tokenizer.json              the index counts in its tokens
        documents.npy               a row a document: where it lies, its tokens, its hash; mapped, never read whole
        pictures.npy                a row a picture: rows and columns of pixels
        shards/shard-00000.tar      members KEY.png KEY.txt of a pair, KEY.0.png KEY.json of a document of several parts
        shards/shard-00000.tokens   or, of text alone: token ids, uint16 (uint32 where there are more than 65,536)
        dropped.jsonl  quarantine.jsonl        what is not in it, by name and reason: by a filter; because it is faulty

Document n lies in shard n // shard_size, so no list of shards needs to be searched. Which documents are held out from
training is decided by a shuffle of the whole set that no seed changes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tarfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import from_dict
from ..errors import UserError
from ..io import sha256
from ..sequence import Tokenizer
from .remote import Cache, MissingError, is_remote
from .shuffle import Place, Shuffle

VERSION = 2
SUMS = "SHA256SUMS"
DOCUMENT = np.dtype(
    [
        ("offset", "<u8"),
        ("bytes", "<u4"),
        ("tokens", "<u4"),
        ("first_picture", "<u8"),
        ("pair", "?"),
        ("conditional", "?"),  # text stands before its last picture
        ("hash", "u1", (16,)),
    ]
)
ROW = struct.Struct("<QIIQ??16s")
"""a row of DOCUMENT"""
PICTURE = np.dtype([("rows", "<u2"), ("columns", "<u2")])
OPEN_SHARDS = 64
"""file descriptors a process keeps"""

Kind = Literal["pictures", "text"]
Split = Literal["train", "heldout"]


class DamagedError(UserError):
    """A document of a set that can not be read, or is not what the index says."""

    def __init__(self, source: str, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{source}/{shard}: {key}: {reason}")
        self.source, self.shard, self.key, self.reason = source, shard, key, reason


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
    version: int
    kind: Kind
    documents: int
    pictures: int
    tokens: int
    longest: int
    """tokens of the document that has most"""
    heldout: int
    shard_size: int
    shards: tuple[Shard, ...]
    tokenizer: str
    """fingerprint"""
    index: dict[str, str]
    """SHA-256 of documents.npy and pictures.npy"""
    encoding: Encoding | None
    source: str
    settings: dict[str, Any]
    seen: int
    """documents of the source, whether they are in the set or not"""
    dropped: dict[str, int] = field(default_factory=dict)
    """reason: how many"""
    faulty: int = 0


@dataclass(frozen=True)
class Stored:
    """A document as it lies there: words, pictures as bytes of image files, or arrays of latents or codes."""

    key: str
    parts: tuple[str | bytes | np.ndarray, ...]
    pair: bool
    tokens: int
    """that the index says it has"""


class DataSet:
    """Opens a folder, or any URL that fsspec knows, and reads documents by number.

    Remote files come through `cache`, the manifest anew whenever a set is opened. Raises UserError where there is no
    set, or one of another version; later on, where another has taken its place.
    """

    def __init__(self, path: str, cache: Cache | None = None) -> None:
        self.path = path.rstrip("/")
        self.cache = cache or Cache()
        self._open(self.file("manifest.json").read_bytes())

    def _open(self, manifest: bytes) -> None:
        try:
            values = json.loads(manifest.decode())
        except ValueError as error:
            where = f"{self.path}/manifest.json"
            raise UserError(f"{where}: expected JSON, found something else ({error})") from None
        if not isinstance(values, dict) or values.get("version") != VERSION:
            found = values.get("version") if isinstance(values, dict) else type(values).__name__
            raise UserError(
                f"{self.path}/manifest.json: version: expected {VERSION}, found {found}; build the set again"
            )
        self.manifest = from_dict(Manifest, values, f"{self.path}/manifest.json")
        self._manifest, self.fingerprint = manifest, _fingerprint(manifest)
        self.documents = self._mapped("documents.npy", DOCUMENT, self.manifest.documents)
        self.pictures = self._mapped("pictures.npy", PICTURE, self.manifest.pictures)
        self._split = Shuffle(self.manifest.documents, "heldout") if self.manifest.documents else None
        self._files: OrderedDict[int, tuple[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.documents

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which is mapped again, and without open files, which belong to this object. With the
        manifest: elsewhere, too, it is this set, whatever has taken its place."""
        return {"path": self.path, "cache": self.cache, "manifest": self._manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.cache = state["path"], state["cache"]
        self._open(state["manifest"])

    def __del__(self) -> None:
        for descriptor, owner in getattr(self, "_files", {}).values():
            if owner == os.getpid():
                os.close(descriptor)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    def tokenizer(self) -> Tokenizer:
        """Raises UserError where it is not the one that the index was made with."""
        found = Tokenizer.load(self.file("tokenizer.json"))
        if found.fingerprint != self.manifest.tokenizer:
            raise UserError(
                f"{self.path}/tokenizer.json: expected the tokenizer {self.manifest.tokenizer}, as the set was built, "
                f"found {found.fingerprint}"
            )
        return found

    def size(self, split: Split) -> int:
        """How many documents a split has."""
        return self.manifest.heldout if split == "heldout" else len(self) - self.manifest.heldout

    def number(self, split: Split, index: Place) -> Place:
        """The document that is number `index` of a split; or of many `[n]`."""
        assert self._split is not None
        return self._split(index + (self.manifest.heldout if split == "train" else 0))

    def sizes(self, number: int) -> list[tuple[int, int]]:
        """Rows and columns, in pixels, of a document's pictures."""
        first = int(self.documents[number]["first_picture"])
        after = self.documents[number + 1]["first_picture"] if number + 1 < len(self) else len(self.pictures)
        return [(int(rows), int(columns)) for rows, columns in self.pictures[first : int(after)]]

    def image_positions(self, numbers: np.ndarray, side: int) -> np.ndarray:
        """Positions `[n]` that the pictures of documents `[n]` take in patches of `side` pixels, with their markers."""
        first, counts = self._pictures_of(numbers)
        owners = np.repeat(np.arange(len(numbers)), counts)
        places = np.arange(len(owners)) + np.repeat(first - (counts.cumsum() - counts), counts)
        return np.bincount(owners, self._positions(places, side), len(numbers)).astype(np.int64)

    def last_image_positions(self, numbers: np.ndarray, side: int) -> np.ndarray:
        """The same of each document's last picture alone; every one of the documents has a picture."""
        first, counts = self._pictures_of(numbers)
        return self._positions(first + counts - 1, side)

    def _pictures_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The place in the index of each document's first picture, and how many it has."""
        first = self.documents["first_picture"][numbers].astype(np.int64)
        last = numbers == len(self) - 1
        after = self.documents["first_picture"][np.where(last, numbers, numbers + 1)].astype(np.int64)
        return first, np.where(last, len(self.pictures), after) - first

    def _positions(self, places: np.ndarray, side: int) -> np.ndarray:
        chosen = self.pictures[places]
        return 2 + chosen["rows"].astype(np.int64) * chosen["columns"] // side**2

    def shard(self, number: int) -> str:
        """Where a document lies: the name of its shard."""
        return self.manifest.shards[number // self.manifest.shard_size].file

    def read(self, number: int) -> Stored:
        """A document of a set of pictures. Raises DamagedError where it is not what the index says."""
        data, tokens, expected = self._read(number)
        try:
            members = untar(data)
            if digest(members) != expected:
                raise self.damaged(number, "its content does not match its hash", _key(members))
            return _stored(members, tokens)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise self.damaged(number, f"unreadable ({error})") from None

    def damaged(self, number: int, reason: str, key: str = "") -> DamagedError:
        """An error that names a document by its key, where that is known, or its number."""
        return DamagedError(self.path, self.shard(number), key or f"document {number}", reason)

    def read_ids(self, number: int) -> np.ndarray:
        """Token ids of a document of a set of text. Raises DamagedError as `read`."""
        data, _, expected = self._read(number)
        if digest([("tokens", data)]) != expected:
            raise self.damaged(number, "its content does not match its hash")
        try:
            return np.frombuffer(data, self.id_type)
        except ValueError as error:
            raise self.damaged(number, f"unreadable ({error})") from None

    @property
    def id_type(self) -> np.dtype[Any]:
        count, size = int(self.documents["tokens"][0]), int(self.documents["bytes"][0])
        return np.dtype("<u2" if size == 2 * count else "<u4")

    def file(self, name: str) -> Path:
        """A file of the set, here; a remote one is brought here first. Raises UserError where there is none,
        or one of another set."""
        if is_remote(self.path):
            return self._fetched(name)
        path = Path(self.path, name)
        if not path.is_file():
            what = "a data set (transfuse data build makes one)" if name == "manifest.json" else "a whole data set"
            raise UserError(f"{path}: expected {what}, found no such file")
        return path

    def _fetched(self, name: str) -> Path:
        url = f"{self.path}/{name}"
        if name == "manifest.json":
            return self.cache.newest(url)

        def check(path: Path) -> None:
            if sha256(path) != self._sums.get(name):  # damaged, or of another set
                self._refuse_another()

        try:
            return self.cache.file(url, of=self.fingerprint, check=check)
        except MissingError:
            self._refuse_another()
            raise

    def _refuse_another(self) -> None:
        try:
            found = _fingerprint(self.file("manifest.json").read_bytes())
        except MissingError:
            found = "none"
        if found != self.fingerprint:
            wanted = f"expected the data set {self.fingerprint}, as it was opened"
            raise UserError(f"{self.path}: {wanted}, found {found}: it has changed")

    @property
    def _sums(self) -> dict[str, str]:
        return self.manifest.index | {shard.file: shard.sha256 for shard in self.manifest.shards}

    def _mapped(self, name: str, dtype: np.dtype[Any], count: int) -> np.ndarray:
        try:
            found = np.load(self.file(name), mmap_mode="r" if count else None, allow_pickle=False)
        except UserError:
            raise
        except Exception as error:  # a damaged header can make numpy raise anything: EOFError, TokenError, ...
            reason = " ".join(str(error).split())
            raise UserError(f"{self.path}/{name}: expected the index of the set, found none ({reason})") from None
        if found.dtype != dtype or found.shape != (count,):
            raise UserError(f"{self.path}/{name}: expected {count} rows, as the manifest says, found {found.shape}")
        return found.view(np.ndarray)

    def _read(self, number: int) -> tuple[bytes, int, bytes]:
        """What lies there; and, as the index has them, its tokens and its hash."""
        # unpacked at once: each field of a numpy row costs as much as all of them
        place, size, tokens, _, _, _, expected = ROW.unpack(self.documents[number].tobytes())
        try:
            data = os.pread(self._descriptor(number // self.manifest.shard_size), size, place)
        except (OSError, OverflowError) as error:  # of an index that is damaged
            raise self.damaged(number, f"unreadable ({error})") from None
        if len(data) != size:
            raise self.damaged(number, f"expected {size} bytes at {place}, found {len(data)}")
        return data, tokens, expected

    def _descriptor(self, shard: int) -> int:
        process = os.getpid()
        found = self._files.get(shard)
        if found is None or found[1] != process:
            # one of a parent's is shared with it, and closed with it: each process opens its own
            path = self.file(self.manifest.shards[shard].file)
            try:
                found = os.open(path, os.O_RDONLY), process
            except OSError as error:
                raise UserError(f"{path}: expected a file to read, found {error.strerror or error}") from None
            self._files[shard] = found
        self._files.move_to_end(shard)
        if len(self._files) > OPEN_SHARDS:
            _, (descriptor, owner) = self._files.popitem(last=False)
            if owner == process:
                os.close(descriptor)
        return found[0]


def _fingerprint(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:16]


# --- a document's members ---------------------------------------------------------------------------------------------

Members = list[tuple[str, bytes]]
"""name and content, in order; the first name up to its first dot is the document's key"""


def digest(members: Members) -> bytes:
    """16 bytes of what a document is: its kinds of members and their content, not its name."""
    pieces = []
    for name, content in members:
        kind = name.rpartition("/")[2].partition(".")[2]
        pieces += [f"{kind}\0{len(content)}\0".encode(), content]
    return hashlib.blake2b(b"".join(pieces), digest_size=16).digest()


def to_tar(members: Members) -> bytes:
    """A piece of a tar: the same members give the same bytes, whenever and by whomever they are written."""
    pieces = []
    for name, content in members:
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        pieces += [header.tobuf(tarfile.USTAR_FORMAT), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
    return b"".join(pieces)


def untar(data: bytes) -> Members:
    """The way back, of what `to_tar` wrote. Raises ValueError where it is no such piece."""
    members: Members = []
    place = 0
    while place < len(data):
        header = data[place : place + tarfile.BLOCKSIZE]
        start = place + tarfile.BLOCKSIZE
        try:
            size = int(header[124:135], 8)
            name = header[:100].rstrip(b"\0").decode()
        except ValueError:
            raise ValueError("its header in the tar is damaged") from None
        if start + size > len(data) or not name:
            raise ValueError("its header in the tar is damaged")
        members.append((name, data[start : start + size]))
        place = start + size + -size % tarfile.BLOCKSIZE
    return members


def to_members(key: str, parts: tuple[str | bytes | np.ndarray, ...], pair: bool, suffix: str) -> Members:
    """A document's members: pictures as files of kind `suffix`, arrays as .npy."""
    pictures = [part for part in parts if not isinstance(part, str)]
    contents = [part if isinstance(part, bytes) else _npy(part) for part in pictures]
    if pair:
        words = next(part for part in parts if isinstance(part, str))
        return [(f"{key}.{suffix}", contents[0]), (f"{key}.txt", words.encode())]
    numbers = iter(range(len(pictures)))
    listed = [{"text": part} if isinstance(part, str) else {"image": next(numbers)} for part in parts]
    record = json.dumps({"parts": listed}, ensure_ascii=False).encode()
    return [*((f"{key}.{i}.{suffix}", content) for i, content in enumerate(contents)), (f"{key}.json", record)]


def _stored(members: Members, tokens: int) -> Stored:
    key = _key(members)
    if members[-1][0].endswith(".txt"):
        return Stored(key, (_content(*members[0]), members[-1][1].decode()), True, tokens)
    pictures = [_content(name, content) for name, content in members[:-1]]
    parts = json.loads(members[-1][1])["parts"]
    return Stored(key, tuple(p["text"] if "text" in p else pictures[p["image"]] for p in parts), False, tokens)


def _key(members: Members) -> str:
    return members[0][0].partition(".")[0]


def _content(name: str, content: bytes) -> bytes | np.ndarray:
    return np.load(io.BytesIO(content), allow_pickle=False) if name.endswith(".npy") else content


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
