"""A data set from a source (`transfuse data build SOURCE OUT`), and the check of one (`transfuse data verify SET`).

    source ──> parts ──> [ read, filter, cut, encode, hash ] ──> in the source's order ──> shards ──> index, manifest
                              in several processes                    in this one

Documents are written in the order of the source, whichever process finishes first, and a shard is written when it is
full; so the set depends neither on the number of processes nor on when a build was killed, to the byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..config import read_json, to_dict
from ..errors import UserError
from ..io import atomic_write, sha256
from ..log import logger, progress
from ..sequence import Tokenizer
from ..version import __version__
from .dataset import DOCUMENT, FREE_FAULTS, IMAGE, SUMS, VERSION, DataSet, Manifest, Shard, to_members, to_tar
from .prefetch import parallel_map
from .prepare import BuildConfig, Dropped, Outcome, Prepared, Preparer, build_autoencoder
from .readers import Part, Reader, SetReader, open_source
from .remote import UNREADABLE, Cache, is_remote, url_name

TRAINED_ON = 300  # evenly spread parts of a source that a tokenizer is trained on
OTHERWISE = "name another folder, or remove {}, to build it again"
VERIFIED_TOGETHER = 256  # documents that a process verifies at a time


def build_set(
    source: str, out: Path, config: BuildConfig, workers: int = 2, max_errors: float = 0.01, cache: Cache | None = None
) -> dict[str, Any]:
    """Build a set, or resume where a build was stopped. Return the counts of its manifest, and seconds.

    workers: processes; 0: this one. max_errors: share of faulty documents (at least ten are let pass) above which the
    build stops. cache: for files of a source that is a URL.

    Raises UserError: no such source, another set in `out`, too many faults, nothing left, no room, a file that cannot
    be fetched.
    """
    began = time.monotonic()
    if Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise UserError(f"{out}: expected a folder outside of the source {source}, found one in it")
    reader = open_source(source, config.columns, config.size, cache)
    given = Tokenizer.adopt(config.tokenizer) if config.tokenizer else None
    autoencoder = build_autoencoder(config)
    contents = reader.contents()
    # Of a source the content counts; of an autoencoder and a tokenizer the weights, whatever their paths.
    digest = hashlib.sha256(json.dumps(sorted(contents.items())).encode()).hexdigest()
    settings = {"listing": f"content {digest}", **to_dict(config)}
    identity = {**settings, "autoencoder_weights": autoencoder and autoencoder.fingerprint}
    if given is not None:
        identity["tokenizer_fingerprint"] = given.fingerprint
    if (out / "manifest.json").exists():
        manifest = _check_built(out, identity)
        shutil.rmtree(out / "building", ignore_errors=True)
        logger.info(f"{out}: built already")
        return {**_counts(manifest), "seconds": 0.0}
    _claim(out, identity, contents)
    if not (out / "tokenizer.json").exists():
        atomic_write(out / "tokenizer.json", _new_tokenizer(reader, given, config.vocabulary).save)
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    (out / "shards").mkdir(exist_ok=True)
    preparer = Preparer(config, tokenizer, reader.text_only)
    writer = Writer(out, preparer, url_name(source) if is_remote(source) else Path(source).name or source, max_errors)
    writer.resume()
    parts = iter(reader.parts())
    done = sum(part.weight for part in islice(parts, writer.next.part))
    skipped = writer.next.document
    work = ((part, skipped if number == 0 else 0) for number, part in enumerate(parts))
    make = partial(_worker, reader, config, out / "tokenizer.json")
    most = config.columns.count or math.inf
    with (
        progress("build", reader.total, done, unit="documents") as bar,
        closing(parallel_map(make, work, workers, str(out))) as results,
    ):
        for weight, documents in results:
            for outcomes in documents:
                if writer.seen < most or writer.next.piece:  # a document that was begun is completed
                    writer.add(outcomes)
            writer.next = Place(writer.next.part + 1)
            bar.advance(weight, note=f"{writer.written} documents")
            if writer.seen >= most:
                break
    if changes := _difference(contents, reader.contents()):
        raise UserError(f"{source}: changed while the set was built ({changes}); remove {out} and build it again")
    manifest = writer.finish(settings)
    return {**_counts(manifest), "seconds": time.monotonic() - began}


def _counts(manifest: Manifest) -> dict[str, Any]:
    names = ("kind", "documents", "pictures", "tokens", "heldout", "seen", "dropped", "faulty")
    return {name: getattr(manifest, name) for name in names}


def _new_tokenizer(reader: Reader, given: Tokenizer | None, vocabulary: int) -> Tokenizer:
    """Return the given tokenizer, a source data set's, or one trained on documents evenly spread over the source."""
    if given is not None:
        return given
    if isinstance(reader, SetReader):
        return reader.data.tokenizer()

    def texts() -> Iterator[str]:
        every, done, used = reader.total / TRAINED_ON, 0, 0.0
        for part in reader.parts():
            done += part.weight
            if done > used:
                used = done + every
                for item in reader.read(part):
                    yield from (text for text in getattr(item, "parts", ()) if isinstance(text, str))

    logger.info(f"tokenizer: training one of {vocabulary} ids on the source's words")
    return Tokenizer.train(texts(), vocabulary)


def _worker(
    reader: Reader, config: BuildConfig, tokenizer: Path
) -> Callable[[tuple[Part, int]], tuple[int, list[list[Outcome]]]]:
    """Return a function from (part, documents to skip) to (its weight, the outcomes of each other document)."""
    prepare = Preparer(config, Tokenizer.load(tokenizer), reader.text_only)
    return lambda work: (work[0].weight, [prepare(item) for item in islice(reader.read(work[0]), work[1], None)])


# --- is the set in a folder, finished or half built, the wanted one? --------------------------------------------------


def _difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Return in words which files have changed; "" for none."""
    changed = [name for name, content in before.items() if now.get(name) != content]
    changed += [name for name in now if name not in before]
    if not changed:
        return ""
    name = changed[0]
    what = "is new" if name not in before else "is gone" if now.get(name) in (None, UNREADABLE) else "has other content"
    more = f", and {len(changed) - 1} more changed" if changed[1:] else ""
    return f"{' '.join(name.split())} {what}{more}"


def _check_built(out: Path, identity: dict[str, Any]) -> Manifest:
    """Return the manifest of a finished set. Raises UserError where other settings or another source made it."""
    try:
        manifest = DataSet(str(out)).manifest
    except UserError as error:
        raise UserError(f"{error}; {OTHERWISE.format(out)}") from None
    weights = manifest.encoding and manifest.encoding.fingerprint
    stored = {**manifest.settings, "autoencoder_weights": weights, "tokenizer_fingerprint": manifest.tokenizer}
    _compare(out, out / "manifest.json", stored, identity)
    return manifest


def _claim(out: Path, identity: dict[str, Any], contents: dict[str, str]) -> None:
    """Begin a build. Raises UserError where another one was begun, or the folder holds something else."""
    identity = identity | {"transfuse": __version__}  # another version may decode images otherwise
    path, files = out / "building" / "settings.json", out / "building" / "source.json"
    if path.exists():
        changes = _difference(read_json(files), contents) if files.exists() else ""
        _compare(out, path, read_json(path), identity, changes)
        return
    if out.exists() and (not out.is_dir() or any(entry.name != "building" for entry in out.iterdir())):
        raise UserError(f"{out}: expected an empty folder, or a data set begun before, found something else")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write to, found none ({error.strerror})") from None
    atomic_write(files, lambda partial: partial.write_text(json.dumps(contents) + "\n"))
    atomic_write(path, lambda partial: partial.write_text(json.dumps(identity, indent=2) + "\n"))


def _compare(out: Path, path: Path, stored: dict[str, Any], wanted: dict[str, Any], changes: str = "") -> None:
    for name, value in wanted.items():
        if stored.get(name) != value:
            expected, actual = json.dumps(value), json.dumps(stored.get(name))
            if name == "listing":
                expected, actual = "the same source", "another source, or one that has changed"
                actual += f" ({changes})" if changes else ""
            raise UserError(f"{path}: {name}: expected {expected}, found {actual}; {OTHERWISE.format(out)}")


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """The place in a source at which a build resumes: part, document of the part, piece of a text that was cut."""

    part: int = 0
    document: int = 0
    piece: int = 0


@dataclass
class Unwritten:
    """The documents since the last shard. texts: hashes of whole texts. dropped: those left out meanwhile."""

    pieces: list[bytes] = field(default_factory=list)
    documents: list[tuple[Any, ...]] = field(default_factory=list)
    images: list[tuple[int, int]] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    bytes: int = 0


class Writer:
    """Writes shards in order, and for each a record of what the index will say about it, so that a build can resume."""

    def __init__(self, out: Path, preparer: Preparer, source: str, max_errors: float) -> None:
        self.out, self.preparer, self.source, self.max_errors = out, preparer, source, max_errors
        self.config, self.text_only = preparer.config, preparer.text_only
        self.next = Place()
        self.seen = self.faulty = self.written = self.images = 0
        self.shards: list[Shard] = []
        self.unwritten = Unwritten()
        self._hashes: set[bytes] = set()

    def resume(self) -> None:
        """Continue after the last whole shard."""
        while (path := self._record(len(self.shards))).exists():
            try:
                record, arrays = _load_record(path)
                shard, documents = Shard(**record["shard"]), arrays["documents"]
            except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # cut short: that shard is made again
                break
            file = self.out / shard.file
            if documents.dtype != DOCUMENT or (
                shard.bytes and not (file.is_file() and file.stat().st_size == shard.bytes)
            ):
                break
            self.shards.append(shard)
            self._hashes.update(row.tobytes() for row in (arrays["texts"] if self.text_only else documents["hash"]))
            self.images += len(arrays["pictures"])
            self.next = Place(**record["next"])
            self.seen, self.faulty, self.written = record["seen"], record["faulty"], record["written"]
        if self.shards:
            logger.info(f"{self.out}: going on after {self.written} documents")

    def add(self, outcomes: list[Outcome]) -> None:
        """Add the outcomes of one document, in its turn. Raises UserError where faults are too many."""
        begun = self.next.piece
        if not begun:
            self.seen += 1
            hashes = [outcome.hash for outcome in outcomes if isinstance(outcome, Prepared)]
            if self.config.duplicates == "drop" and hashes:  # a text counts as a whole, before it is cut into pieces
                whole = hashes[0] if len(hashes) == 1 else hashlib.blake2b(b"".join(hashes), digest_size=16).digest()
                if whole in self._hashes:
                    outcomes = [Dropped(outcomes[0].key, "duplicate", "equal to an earlier document")]
                else:
                    self._hashes.add(whole)
                    if self.text_only:  # the index has those of documents with images
                        self.unwritten.texts.append(whole)
        for piece, outcome in enumerate(outcomes[begun:], begun + 1):
            last = piece == len(outcomes)
            self.next = replace(self.next, document=self.next.document + last, piece=0 if last else piece)
            if isinstance(outcome, Prepared):
                self._write(outcome)
                continue
            self.unwritten.dropped.append(outcome)
            if outcome.faulty:
                self.faulty += outcome.lost
                self.seen += outcome.lost - 1
                self._check_budget(outcome)

    def _write(self, document: Prepared) -> None:
        new = self.unwritten
        if self.text_only:
            (piece,) = document.parts
            assert isinstance(piece, bytes)
        else:
            stem, _, ending = document.key.rpartition(".")
            stem = stem if stem and "/" not in ending else document.key
            # In a tar a dot would end the key.
            name = f"{self.written:09d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[-48:]}"
            piece = to_tar(to_members(name, document.parts, document.pair, self.preparer.suffix))
        kind = document.pair, document.conditional
        new.documents.append((new.bytes, len(piece), document.tokens, len(new.images), *kind, document.hash))
        new.images.extend(document.sizes)
        new.pieces.append(piece)
        new.bytes += len(piece)
        self.written += 1
        self.images += len(document.sizes)
        if len(new.documents) == self.config.shard_size:
            self._flush()

    def _check_budget(self, last: Dropped) -> None:
        if self.faulty > max(FREE_FAULTS, self.max_errors * self.seen):
            self._list_left_out("quarantine.jsonl", faulty=True)
            raise UserError(
                f"{self.source}: {self.faulty} of {self.seen} documents are faulty, more than the share "
                f"{self.max_errors} that is let pass; the last: {last.key}: {last.detail}; all: "
                f"{self.out / 'quarantine.jsonl'}; mend them, or go on with a larger --max-errors"
            )

    def _flush(self) -> None:
        """Write a shard, and after it its record."""
        new, number = self.unwritten, len(self.shards)
        data = b"".join(new.pieces)
        if data and not self.text_only:
            data += bytes(1024)  # the end of a tar
        file = f"shards/shard-{number:05d}.{'tokens' if self.text_only else 'tar'}"
        shard = Shard(file, len(data), hashlib.sha256(data).hexdigest())
        if data:
            atomic_write(self.out / file, lambda partial: partial.write_bytes(data))
        documents = np.zeros(len(new.documents), DOCUMENT)
        for place, (*numbers, hash_) in enumerate(new.documents):
            documents[place] = (*numbers, np.frombuffer(hash_, "u1"))
        record = {
            "shard": to_dict(shard),
            "next": to_dict(self.next),
            "seen": self.seen,
            "faulty": self.faulty,
            "written": self.written,
            "dropped": [to_dict(outcome) for outcome in new.dropped],
        }
        arrays = {
            "documents": documents,
            "pictures": np.array(new.images, IMAGE) if new.images else np.zeros(0, IMAGE),
            "texts": np.array(new.texts, "V16"),
            "record": np.frombuffer(json.dumps(record).encode(), "u1"),
        }

        def save(partial: Path) -> None:
            with partial.open("wb") as file:  # by name, numpy would append a suffix
                np.savez(file, **arrays)  # type: ignore[arg-type]

        atomic_write(self._record(number), save)
        self.shards.append(shard)
        self.unwritten = Unwritten()

    def finish(self, settings: dict[str, Any]) -> Manifest:
        """Write the rest, the index, and last the manifest. Raises UserError for a set without documents."""
        if self.unwritten.documents or self.unwritten.dropped:
            self._flush()
        self._list_left_out("dropped.jsonl", faulty=False)
        self._list_left_out("quarantine.jsonl", faulty=True)
        if not self.written:
            raise UserError(
                f"{self.source}: expected documents, found {self.seen}, none of which can be used; why, is in "
                f"{self.out / 'dropped.jsonl'} and {self.out / 'quarantine.jsonl'}"
            )
        index = {
            "documents.npy": self._write_index("documents", DOCUMENT, self.written),
            "pictures.npy": self._write_index("pictures", IMAGE, self.images),
        }
        tokens = np.load(self.out / "documents.npy", mmap_mode="r")["tokens"]
        manifest = Manifest(
            version=VERSION,
            kind="text" if self.text_only else "pictures",
            documents=self.written,
            pictures=self.images,
            tokens=int(tokens.sum()),
            longest=int(tokens.max()),
            heldout=round(self.written * self.config.heldout),
            shard_size=self.config.shard_size,
            shards=tuple(shard for shard in self.shards if shard.bytes),
            tokenizer=self.preparer.tokenizer.fingerprint,
            index=index,
            encoding=self.preparer.encoding,
            source=self.source,
            settings=settings,
            seen=self.seen,
            dropped=dict(sorted(Counter(d.reason for d in self._left_out() if not d.faulty).items())),
            faulty=self.faulty,
        )
        text = json.dumps(to_dict(manifest), indent=1) + "\n"
        sums = {shard.file: shard.sha256 for shard in manifest.shards} | index
        sums["tokenizer.json"] = sha256(self.out / "tokenizer.json")
        sums["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        atomic_write(self.out / SUMS, lambda partial: partial.write_text(lines))
        atomic_write(self.out / "manifest.json", lambda partial: partial.write_text(text))
        shutil.rmtree(self.out / "building", ignore_errors=True)
        return manifest

    def _record(self, number: int) -> Path:
        return self.out / "building" / f"shard-{number:05d}.npz"

    def _left_out(self) -> Iterator[Dropped]:
        """Yield all documents left out so far, in order."""
        for number in range(len(self.shards)):
            yield from (Dropped(**values) for values in _load_record(self._record(number))[0]["dropped"])
        yield from self.unwritten.dropped

    def _list_left_out(self, name: str, faulty: bool) -> None:
        """Write dropped.jsonl or quarantine.jsonl, a line at a time: millions of a text's lines may be dropped."""

        def write(partial: Path) -> None:
            with partial.open("w") as file:
                for dropped in self._left_out():
                    if dropped.faulty == faulty:
                        reason = dropped.detail if faulty else f"{dropped.reason}: {dropped.detail}"
                        file.write(json.dumps({"key": dropped.key, "reason": reason}) + "\n")

        atomic_write(self.out / name, write)

    def _write_index(self, name: str, dtype: np.dtype[Any], total: int) -> str:
        """Write the index of all shards as one array, a shard at a time; return its hash."""
        path = self.out / f"{name}.npy"

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (total,)}
                np.lib.format.write_array_header_1_0(file, header)
                images = 0
                for number in range(len(self.shards)):
                    _, arrays = _load_record(self._record(number))
                    rows = arrays[name]
                    if name == "documents":
                        rows["first_picture"] += images
                    file.write(rows.tobytes())
                    images += len(arrays["pictures"])

        atomic_write(path, write)
        return sha256(path)


def _load_record(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a build noted about a shard, and its arrays."""
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(bytes(archive["record"])), {n: archive[n] for n in ("documents", "pictures", "texts")}


# --- `transfuse data verify` ------------------------------------------------------------------------------------------


def verify_set(path: str, workers: int = 2) -> tuple[int, list[str]]:
    """Compare every hash, decode every image, count every token. Return the number of whole documents, and problems.

    workers: processes; 0: this one. Raises UserError where there is no set at all.
    """
    problems: list[str] = []
    data, documents = DataSet(path), 0
    lines = [line.split("  ", 1) for line in data.file(SUMS).read_text(errors="replace").splitlines()]
    sums = {line[1]: line[0] for line in lines if len(line) == 2}
    for name in ("manifest.json", "tokenizer.json", *data.manifest.index):
        expected = data.manifest.index.get(name, sums.get(name))
        if sha256(data.file(name)) != expected or sums.get(name) != expected:
            problems.append(f"{path}/{name}: expected SHA-256 {expected or 'in ' + SUMS}, found another")
            if name.endswith(".json"):
                return 0, problems  # what it says about the rest is not to be trusted
    data.tokenizer()
    shards = data.manifest.shards
    for shard in shards:
        if sums.get(shard.file) != shard.sha256:
            expected = f"expected {shard.sha256}, as the manifest says, found another"
            problems.append(f"{path}/{SUMS}: {shard.file}: {expected}")
    if len(sums) != len(shards) + len(data.manifest.index) + 2:
        problems.append(f"{path}/{SUMS}: expected a line for each file of the set, found {len(sums)}")
    chunks = [range(n, min(n + VERIFIED_TOGETHER, len(data))) for n in range(0, len(data), VERIFIED_TOGETHER)]
    work: list[Shard | range] = [*shards, *chunks]
    with (
        progress("verify", len(work), unit="checks") as bar,
        closing(parallel_map(partial(_verifier, path), work, workers, path)) as results,
    ):
        for item, found_problems in zip(work, results, strict=True):
            if isinstance(item, range):
                documents += len(item) - len(found_problems)
            problems += found_problems
            bar.advance(note=f"{documents} documents whole")
    return documents, problems


def _verifier(path: str) -> Callable[[Shard | range], list[str]]:
    """Return a function that lists the problems of a shard's bytes, or of a range of documents."""
    data = DataSet(path)
    tokenizer = data.tokenizer()

    def verify(item: Shard | range) -> list[str]:
        if isinstance(item, Shard):
            try:
                whole = sha256(data.file(item.file)) == item.sha256
            except (OSError, UserError) as error:
                return [f"{path}/{item.file}: {error}"]
            return [] if whole else [f"{path}/{item.file}: its bytes do not match their hash"]
        problems = []
        for number in item:
            try:
                data.check(number, tokenizer)
            except UserError as error:  # corrupt, or its file gone
                problems.append(str(error))
        return problems

    return verify
