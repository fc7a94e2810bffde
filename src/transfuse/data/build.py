"""A data set from a source: `transfuse data build SOURCE OUT`.

    source ──> parts ──> [ read, filter, cut, encode, hash ] ──> in the source's order ──> shards ──> index, manifest
                              in several processes                    in this one

Documents are written in the order of the source, whatever process was done first, and a shard is written when it is
full; so the set depends neither on the number of processes nor on when a build was killed: to the byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..config import to_dict
from ..errors import UserError
from ..io import atomic_write, sha256
from ..log import logger, progress
from ..sequence import Tokenizer
from .ahead import ahead, processes
from .dataset import DOCUMENT, PICTURE, SUMS, VERSION, Encoding, Manifest, Shard, to_members, to_tar
from .faults import FREE_FAULTS
from .prepare import BuildConfig, Dropped, Outcome, Prepared, Preparer, encoding_of, slug
from .readers import Part, Reader, open_source
from .readers.sets import SetReader
from .remote import Cache, is_remote, url_name
from .resume import check_built, claim, difference, listing, not_told

TRAINED_ON = 300
"""parts of a source, evenly spread, that a tokenizer is trained on"""


def build_set(
    source: str,
    out: Path,
    config: BuildConfig,
    workers: int = 2,
    max_errors: float = 0.01,
    cache: Cache | None = None,
) -> dict[str, Any]:
    """Build the set, or go on where a build was stopped. Returns what the manifest counts, and seconds.

    workers: processes; 0: this one. max_errors: share of faulty documents (at least ten are let pass) above which the
    build stops. cache: for files of a source that is a URL. Raises UserError: no such source, another set in OUT, too
    many faults, nothing left, no room, a file that can not be fetched.
    """
    began = time.monotonic()
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"{out}: expected a folder outside of the source {source}, found one in it")
    reader = open_source(source, config.columns, config.size, cache)
    encoding = encoding_of(config)
    adopted = Tokenizer.adopt(config.tokenizer) if config.tokenizer else None
    contents = reader.contents()
    settings = {"listing": listing(contents), **to_dict(config)}
    named = settings | not_told(encoding, None if adopted is None else adopted.fingerprint)
    name = url_name(source) if is_remote(source) else Path(source).name or source
    if (out / "manifest.json").exists():
        manifest = check_built(out, named)
        shutil.rmtree(out / "building", ignore_errors=True)
        logger.info(f"{out}: built already")
        return {**_counts(manifest), "seconds": 0.0}
    claim(out, named, contents)
    tokenizer = _tokenizer(reader, adopted, config.vocabulary, out)
    (out / "shards").mkdir(exist_ok=True)
    preparer = Preparer(config, tokenizer)
    writer = Writer(out, config, reader.text_only, preparer.suffix, name, max_errors)
    writer.resume()
    most = config.columns.count or math.inf
    left = iter(reader.parts())
    passed = sum(part.weight for part in islice(left, writer.next.part))
    prepared = _prepared(reader, left, config, out, preparer, workers, writer.next.document)
    with progress("build", reader.total, passed, unit="documents") as bar, prepared as parts:
        for part, found in parts:
            for outcomes in found:
                if writer.seen < most or writer.next.piece:  # a document that was begun is brought to its end
                    writer.add(outcomes)
            writer.end_of_part()
            bar.advance(part.weight, note=f"{writer.written} documents")
            if writer.seen >= most:
                break
    if changes := difference(contents, reader.contents()):
        raise UserError(f"{source}: changed while the set was built ({changes}); remove {out} and build it again")
    manifest = writer.finish(tokenizer, settings, encoding)
    return {**_counts(manifest), "seconds": time.monotonic() - began}


def _counts(manifest: Manifest) -> dict[str, Any]:
    names = ("kind", "documents", "pictures", "tokens", "heldout", "seen", "dropped", "faulty")
    return {name: getattr(manifest, name) for name in names}


# --- before the work --------------------------------------------------------------------------------------------------


def _tokenizer(reader: Reader, adopted: Tokenizer | None, vocabulary: int, out: Path) -> Tokenizer:
    path = out / "tokenizer.json"
    if not path.exists():
        if adopted is not None:
            tokenizer = adopted
        elif isinstance(reader, SetReader):
            tokenizer = reader.tokenizer()
        else:
            logger.info(f"tokenizer: training one of {vocabulary} ids on the source's words")
            tokenizer = Tokenizer.train(_words(reader), vocabulary)
        atomic_write(path, tokenizer.save)
    return Tokenizer.load(path)


def _words(reader: Reader) -> Iterator[str]:
    """Of documents evenly spread over the source."""
    every, done, taken = reader.total / TRAINED_ON, 0, 0.0
    for part in reader.parts():
        done += part.weight
        if done > taken:
            taken = done + every
            for item in reader.read(part):
                yield from (words for words in getattr(item, "parts", ()) if isinstance(words, str))


# --- the work, in several processes -----------------------------------------------------------------------------------

_work: Callable[[Part, int], list[list[Outcome]]]
"""of this worker process"""


def _begin(reader: Reader, config: BuildConfig, tokenizer: Path) -> None:
    global _work
    _work = _worker(reader, Preparer(config, Tokenizer.load(tokenizer)))


def _worker(reader: Reader, preparer: Preparer) -> Callable[[Part, int], list[list[Outcome]]]:
    """A function that gives of each document of a part what becomes of it, but for the first so many."""
    prepare = preparer.texts if reader.text_only else preparer.pictures
    return lambda part, skip: list(prepare(islice(reader.read(part), skip, None)))


def _done(part: Part, skip: int) -> tuple[Part, list[list[Outcome]]]:
    return replace(part, what=None), _work(part, skip)


@contextmanager
def _prepared(
    reader: Reader, left: Iterable[Part], config: BuildConfig, out: Path, preparer: Preparer, workers: int, skip: int
) -> Iterator[Iterable[tuple[Part, list[list[Outcome]]]]]:
    """The parts that are left, in order, with what became of their documents, but for the first `skip` of them."""
    parts = ((part, skip if number == 0 else 0) for number, part in enumerate(left))
    if not workers:
        work = _worker(reader, preparer)
        yield ((part, work(part, skip)) for part, skip in parts)
        return
    with (
        processes(workers, _begin, reader, config, out / "tokenizer.json", what=str(out)) as pool,
        closing(ahead(lambda one: pool.submit(_done, *one), parts, 2 * workers)) as found,
    ):
        yield found


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a build goes on: part of the source, document of the part, and piece of a text that was cut."""

    part: int = 0
    document: int = 0
    piece: int = 0


@dataclass
class Writer:
    """Writes shards in order, and beside each what the index will say of it, so that a build can go on."""

    out: Path
    config: BuildConfig
    text_only: bool
    suffix: str
    source: str
    max_errors: float
    next: Place = Place()
    seen: int = 0
    faulty: int = 0
    written: int = 0
    shards: list[Shard] = field(default_factory=list)
    _hashes: set[bytes] = field(default_factory=set)
    _texts: list[bytes] = field(default_factory=list)
    _pieces: list[bytes] = field(default_factory=list)
    _offset: int = 0
    _documents: list[tuple[int, int, int, int, bool, bool, bytes]] = field(default_factory=list)
    _pictures: list[tuple[int, int]] = field(default_factory=list)
    _dropped: list[Dropped] = field(default_factory=list)

    @property
    def building(self) -> Path:
        return self.out / "building"

    def resume(self) -> None:
        """Take up after the last whole shard."""
        while (path := self._record(len(self.shards))).exists():
            try:
                with np.load(path, allow_pickle=False) as found:
                    record = json.loads(bytes(found["record"]))
                    documents, _ = found["documents"], found["pictures"]
                    hashes = found["texts"] if self.text_only else documents["hash"]
                if documents.dtype != DOCUMENT:  # of an earlier version
                    break
                shard = Shard(**record["shard"])
            except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # cut short: that shard is made again
                break
            file = self.out / shard.file
            if shard.bytes and (not file.is_file() or file.stat().st_size != shard.bytes):
                break
            self.shards.append(shard)
            self._hashes.update(one.tobytes() for one in hashes)
            self.next = Place(**record["next"])
            self.seen, self.faulty, self.written = record["seen"], record["faulty"], record["written"]
        if self.shards:
            logger.info(f"{self.out}: going on after {self.written} documents")

    def add(self, outcomes: list[Outcome]) -> None:
        """What became of one document, in its turn. Raises UserError where faults are too many."""
        begun = self.next.piece
        if not begun:
            self.seen += 1
            outcomes = self._unlike_earlier(outcomes)
        for piece, outcome in enumerate(outcomes[begun:], begun + 1):
            last = piece == len(outcomes)
            self.next = replace(self.next, document=self.next.document + last, piece=0 if last else piece)
            self._add(outcome)

    def end_of_part(self) -> None:
        self.next = Place(self.next.part + 1)

    def _unlike_earlier(self, outcomes: list[Outcome]) -> list[Outcome]:
        """A document as it is, or that it is dropped: a text in whole, before it is cut into pieces."""
        hashes = [one.hash for one in outcomes if isinstance(one, Prepared)]
        if self.config.duplicates == "keep" or not hashes:
            return outcomes
        whole = hashes[0] if len(hashes) == 1 else hashlib.blake2b(b"".join(hashes), digest_size=16).digest()
        if whole in self._hashes:
            return [Dropped(outcomes[0].key, "duplicate", "equal to an earlier document")]
        self._hashes.add(whole)
        if self.text_only:  # of pictures, the index has it
            self._texts.append(whole)
        return outcomes

    def _add(self, outcome: Outcome) -> None:
        if isinstance(outcome, Dropped):
            self._dropped.append(outcome)
            if outcome.faulty:
                self.faulty += outcome.lost
                self.seen += outcome.lost - 1
                self._check_budget(outcome)
            return
        if self.text_only:
            piece = outcome.parts[0]
            assert isinstance(piece, bytes)
        else:
            name = f"{self.written:09d}-{slug(outcome.key)}"
            piece = to_tar(to_members(name, outcome.parts, outcome.pair, self.suffix))
        kind = outcome.pair, outcome.conditional
        row = (self._offset, len(piece), outcome.tokens, len(self._pictures), *kind, outcome.hash)
        self._documents.append(row)
        self._pictures.extend(outcome.sizes)
        self._pieces.append(piece)
        self._offset += len(piece)
        self.written += 1
        if len(self._documents) == self.config.shard_size:
            self._flush()

    def finish(self, tokenizer: Tokenizer, settings: dict[str, Any], encoding: Encoding | None) -> Manifest:
        """Write what is left, the index, and last the manifest."""
        if self._documents or self._dropped:
            self._flush()
        self._list("dropped.jsonl", faulty=False)
        self._list("quarantine.jsonl", faulty=True)
        if not self.written:
            raise UserError(
                f"{self.source}: expected documents, found {self.seen}, none of which can be used; why, is in "
                f"{self.out / 'dropped.jsonl'} and {self.out / 'quarantine.jsonl'}"
            )
        index = {
            "documents.npy": self._gather("documents", DOCUMENT),
            "pictures.npy": self._gather("pictures", PICTURE),
        }
        documents = np.load(self.out / "documents.npy", mmap_mode="r")
        dropped = Counter(one["reason"] for one in self._left_out() if not one["faulty"])
        manifest = Manifest(
            version=VERSION,
            kind="text" if self.text_only else "pictures",
            documents=len(documents),
            pictures=len(np.load(self.out / "pictures.npy", mmap_mode="r")) if not self.text_only else 0,
            tokens=int(documents["tokens"].sum()),
            longest=int(documents["tokens"].max()),
            heldout=round(len(documents) * self.config.heldout),
            shard_size=self.config.shard_size,
            shards=tuple(shard for shard in self.shards if shard.bytes),
            tokenizer=tokenizer.fingerprint,
            index=index,
            encoding=encoding,
            source=self.source,
            settings=settings,
            seen=self.seen,
            dropped=dict(sorted(dropped.items())),
            faulty=self.faulty,
        )
        text = json.dumps(to_dict(manifest), indent=1) + "\n"
        self._sum(manifest, text)
        atomic_write(self.out / "manifest.json", lambda partial: partial.write_text(text))
        shutil.rmtree(self.building, ignore_errors=True)
        return manifest

    def _sum(self, manifest: Manifest, text: str) -> None:
        """Write SHA256SUMS, as `sha256sum -c` reads it: what vouches for the manifest itself, and for all else."""
        sums = {shard.file: shard.sha256 for shard in manifest.shards} | manifest.index
        sums["tokenizer.json"] = sha256(self.out / "tokenizer.json")
        sums["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        atomic_write(self.out / SUMS, lambda partial: partial.write_text(lines))

    def _list(self, name: str, faulty: bool) -> None:
        """Write dropped.jsonl or quarantine.jsonl."""

        def write(partial: Path) -> None:
            chosen = (one for one in self._left_out() if one["faulty"] == faulty)
            with partial.open("w") as file:  # line by line: of a text's lines, millions may be dropped
                file.writelines(json.dumps({"key": one["key"], "reason": _reason(one)}) + "\n" for one in chosen)

        atomic_write(self.out / name, write)

    def _flush(self) -> None:
        number = len(self.shards)
        data = b"".join(self._pieces)
        if not self.text_only and data:
            data += bytes(1024)  # the end of a tar
        file = f"shards/shard-{number:05d}.{'tokens' if self.text_only else 'tar'}"
        shard = Shard(file, len(data), hashlib.sha256(data).hexdigest())
        if data:
            atomic_write(self.out / file, lambda partial: partial.write_bytes(data))
        documents = np.zeros(len(self._documents), DOCUMENT)
        for place, (*numbers, hash_) in enumerate(self._documents):
            documents[place] = (*numbers, np.frombuffer(hash_, "u1"))
        pictures = np.array(self._pictures, dtype=PICTURE) if self._pictures else np.zeros(0, PICTURE)
        record = {
            "shard": to_dict(shard),
            "next": to_dict(self.next),
            "seen": self.seen,
            "faulty": self.faulty,
            "written": self.written,
            "dropped": [to_dict(one) for one in self._dropped],
        }
        texts = np.array(self._texts, "V16")
        arrays = {"documents": documents, "pictures": pictures, "texts": texts}
        packed = np.frombuffer(json.dumps(record).encode(), "u1")
        atomic_write(self._record(number), lambda partial: _save(partial, {**arrays, "record": packed}))
        self.shards.append(shard)
        self._pieces, self._documents, self._pictures, self._dropped, self._offset = [], [], [], [], 0
        self._texts = []

    def _record(self, number: int) -> Path:
        return self.building / f"shard-{number:05d}.npz"

    @property
    def _records(self) -> list[Path]:
        return [self._record(number) for number in range(len(self.shards))]

    def _left_out(self) -> Iterator[dict[str, Any]]:
        """All so far, in order."""
        for path in self._records:
            yield from _read(path)["dropped"]
        yield from map(to_dict, self._dropped)

    def _gather(self, name: str, dtype: np.dtype[Any]) -> str:
        """Write the index of all shards as one array, a shard at a time; give its hash."""
        counts = []
        for path in self._records:
            with np.load(path, allow_pickle=False) as found:
                counts.append((len(found["documents"]), len(found["pictures"])))
        total = sum(count[name == "pictures"] for count in counts)

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (total,)}
                np.lib.format.write_array_header_1_0(file, header)
                before = 0
                for path, (_, pictures) in zip(self._records, counts, strict=True):
                    with np.load(path, allow_pickle=False) as found:
                        rows = found[name]
                    if name == "documents":
                        rows["first_picture"] += before
                    file.write(rows.tobytes())
                    before += pictures

        atomic_write(self.out / f"{name}.npy", write)
        return sha256(self.out / f"{name}.npy")

    def _check_budget(self, last: Dropped) -> None:
        if self.faulty <= max(FREE_FAULTS, self.max_errors * self.seen):
            return
        self._list("quarantine.jsonl", faulty=True)
        raise UserError(
            f"{self.source}: {self.faulty} of {self.seen} documents are faulty, more than the share {self.max_errors} "
            f"that is let pass; the last: {last.key}: {last.detail}; all: {self.out / 'quarantine.jsonl'}; mend them, "
            "or go on with a larger --max-errors"
        )


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:  # by name, numpy would append a suffix
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as found:
        record: dict[str, Any] = json.loads(bytes(found["record"]))
    return record


def _reason(one: dict[str, Any]) -> str:
    detail: str = one["detail"]
    return detail if one["faulty"] else f"{one['reason']}: {detail}"
