"""The files of a data set as it is built: a shard when it is full, with a record of it, then the index and manifest.

A record (`building/shard-00000.npz`) has what the index will say about its shard, and the place in the source at which
a build resumes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np

from ...config import to_dict
from ...errors import UserError
from ...io import atomic_write, sha256
from ...log import logger
from ..dataset import CAPTION, DOCUMENT, FREE_FAULTS, GROUP, IMAGE, PADDED, SUMS, VERSION, DataSet, Manifest, Shard
from ..members import to_members, to_tar
from .groups import FINGERPRINT, group, held_out
from .prepare import Dropped, Outcome, Prepared, Preparer

HELD_OUT = 0.01  # share that is held out where none is given


@dataclass(frozen=True)
class Place:
    """The place in a source at which a build resumes: part, document of the part, piece of a text that was cut."""

    part: int = 0
    document: int = 0
    piece: int = 0


@dataclass
class Unwritten:
    """The documents since the last shard. texts: hashes of whole texts. dropped: those left out meanwhile.

    captions: (document, tokens, weight) of each caption of an image with several. fingerprints: rows of FINGERPRINT.
    heldout: documents that are held out in the data set that this one is built from.
    """

    pieces: list[bytes] = field(default_factory=list)
    documents: list[tuple[Any, ...]] = field(default_factory=list)
    images: list[tuple[int, ...]] = field(default_factory=list)
    captions: list[tuple[int, int, float]] = field(default_factory=list)
    fingerprints: list[tuple[Any, ...]] = field(default_factory=list)
    heldout: list[int] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    bytes: int = 0


class Writer:
    """Writes shards in order, and for each a record of what the index will say about it, so that a build can resume.

    sides_of: the data set whose sides documents keep; None: their content decides.
    """

    def __init__(
        self, out: Path, preparer: Preparer, source: str, max_errors: float, sides_of: DataSet | None = None
    ) -> None:
        self.out, self.preparer, self.source, self.max_errors = out, preparer, source, max_errors
        self.sides_of = sides_of
        self.config, self.text_only = preparer.config, preparer.text_only
        self.padded = self.config.fit == "pad" and not self.text_only
        self.image_dtype = PADDED if self.padded else IMAGE
        self.next = Place()
        self.seen = self.faulty = self.written = self.images = self.captions = 0
        self.changed: Counter[str] = Counter()
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
            if shard.bytes and not (file.is_file() and file.stat().st_size == shard.bytes):
                break
            self.shards.append(shard)
            self._hashes.update(row.tobytes() for row in (arrays["texts"] if self.text_only else documents["hash"]))
            self.images += len(arrays["pictures"])
            self.captions += len(arrays["captions"])
            self.next = Place(**record["next"])
            self.seen, self.faulty, self.written = record["seen"], record["faulty"], record["written"]
            self.changed = Counter(record["changed"])
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
                if self.faulty > max(FREE_FAULTS, self.max_errors * self.seen):
                    self._list_left_out("quarantine.jsonl", faulty=True)
                    raise UserError(
                        f"{self.source}: {self.faulty} of {self.seen} documents are faulty, more than the share "
                        f"{self.max_errors} that is let pass; the last: {outcome.key}: {outcome.detail}; all: "
                        f"{self.out / 'quarantine.jsonl'}; mend them, or go on with a larger --max-errors"
                    )

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
            parts, suffix = document.parts, self.preparer.suffix
            members = to_members(name, parts, document.pair, suffix, document.weights, document.roles)
            piece = to_tar(members)
        kind, hash_ = (document.pair, document.conditional, document.followed), np.frombuffer(document.hash, "u1")
        new.documents.append((new.bytes, len(piece), document.tokens, len(new.images), *kind, hash_))
        new.images.extend(document.sizes)
        new.captions.extend((self.written, *caption) for caption in document.captions)
        new.fingerprints.extend(
            (self.written, *mark[:3], np.frombuffer(mark.colour, "u1")) for mark in document.fingerprints
        )
        new.heldout += [self.written] if document.heldout else []
        new.pieces.append(piece)
        new.bytes += len(piece)
        self.written += 1
        self.images += len(document.sizes)
        self.captions += len(document.captions)
        self.changed.update(document.changed)
        if len(new.documents) == self.config.shard_size:
            self._flush()

    def _flush(self) -> None:
        """Write a shard, and after it its record."""
        new = self.unwritten
        data = b"".join(new.pieces)
        if data and not self.text_only:
            data += bytes(1024)  # the end of a tar
        file = f"shards/shard-{len(self.shards):05d}.{'tokens' if self.text_only else 'tar'}"
        shard = Shard(file, len(data), hashlib.sha256(data).hexdigest())
        if data:
            atomic_write(self.out / file, lambda aside: aside.write_bytes(data))
        record = {
            "shard": to_dict(shard),
            "next": to_dict(self.next),
            "seen": self.seen,
            "faulty": self.faulty,
            "written": self.written,
            "changed": self.changed,
            "dropped": [to_dict(outcome) for outcome in new.dropped],
        }
        arrays = {
            "documents": np.array(new.documents, DOCUMENT),
            "pictures": np.array(new.images, self.image_dtype),
            "captions": np.array(new.captions, CAPTION),
            "fingerprints": np.array(new.fingerprints, FINGERPRINT),
            "heldout": np.array(new.heldout, "<u8"),
            "texts": np.array(new.texts, "V16"),
            "record": np.frombuffer(json.dumps(record).encode(), "u1"),
        }
        _write_file(self._record(len(self.shards)), lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
        self.shards.append(shard)
        self.unwritten = Unwritten()

    def finish(self, settings: dict[str, Any], files: int, left_out: Mapping[str, str]) -> Manifest:
        """Write the rest, the index, and last the manifest. Raises UserError for a set without documents.

        files: those found in the source. left_out: why each that no document is made of is left out, by name.
        """
        if self.unwritten.documents or self.unwritten.dropped:
            self._flush()
        self._list_left_out("dropped.jsonl", faulty=False)
        self._list_left_out("quarantine.jsonl", faulty=True)
        listed = "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in left_out.items())
        _write_file(self.out / "left_out.jsonl", lambda file: file.write(listed.encode()))
        if not self.written:
            raise UserError(
                f"{self.source}: expected documents, found {self.seen}, none of which can be used{self._most_often()}; "
                f"all: {self.out / 'dropped.jsonl'} and {self.out / 'quarantine.jsonl'}"
            )
        heldout, groups = self._sides()
        parts: dict[str, Callable[[BinaryIO], object]] = {
            "documents.npy": partial(self._write_index, "documents", DOCUMENT, self.written),
            "pictures.npy": partial(self._write_index, "pictures", self.image_dtype, self.images),
        }
        if self.captions:
            parts["captions.npy"] = partial(self._write_index, "captions", CAPTION, self.captions)
        parts["heldout.npy"] = partial(np.save, arr=heldout)
        if len(groups):
            parts["groups.npy"] = partial(np.save, arr=groups)
        for name, write in parts.items():
            _write_file(self.out / name, write)
        index = {name: sha256(self.out / name) for name in parts}
        tokens = np.load(self.out / "documents.npy", mmap_mode="r")["tokens"]
        total = int(tokens.sum())
        if self.captions:
            captions = np.load(self.out / "captions.npy", mmap_mode="r")
            # A document counts for its longest caption.
            total += int(captions["tokens"].sum()) - int(tokens[np.unique(captions["document"])].sum())
        manifest = Manifest(
            version=VERSION,
            kind="text" if self.text_only else "pictures",
            documents=self.written,
            pictures=self.images,
            tokens=total,
            longest=int(tokens.max()),
            heldout=len(heldout),
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
            captions=self.captions,
            grouped=len(groups),
            padded=self.padded,
            changed=dict(sorted(self.changed.items())),
            files={"found": files, "read": files - len(left_out), "left out": len(left_out)} if files else {},
        )
        text = json.dumps(to_dict(manifest), indent=1) + "\n"
        sums = {shard.file: shard.sha256 for shard in manifest.shards} | index
        sums["tokenizer.json"] = sha256(self.out / "tokenizer.json")
        sums["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        _write_file(self.out / SUMS, lambda file: file.write(lines.encode()))
        _write_file(self.out / "manifest.json", lambda file: file.write(text.encode()))
        shutil.rmtree(self.out / "building", ignore_errors=True)
        return manifest

    def _sides(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents that are held out, and a row of GROUP for each document that shares an image."""
        names = ("fingerprints", "heldout")
        records = [_load_record(self._record(number), names)[1] for number in range(len(self.shards))]
        fingerprints = np.concatenate([arrays["fingerprints"] for arrays in records])
        labels = group(fingerprints, self.written)
        if self.sides_of:
            heldout = np.concatenate([arrays["heldout"] for arrays in records])
        else:
            target = round(self.written * (HELD_OUT if self.config.heldout is None else self.config.heldout))
            heldout = held_out(labels, fingerprints, target)
            if len(heldout) < target:
                reason = "the others come in groups too large for it: near duplicates, or pieces of one text"
                logger.info(f"{self.out}: {len(heldout)} documents held out instead of {target}; {reason}")
        several = np.bincount(labels)[labels] > 1 if not self.text_only else np.zeros(0, bool)
        groups = np.zeros(several.sum(), GROUP)
        groups["document"] = np.flatnonzero(several)
        groups["first"] = labels[groups["document"].astype(np.int64)]
        return heldout.astype("<u8"), np.sort(groups)

    def _record(self, number: int) -> Path:
        return self.out / "building" / f"shard-{number:05d}.npz"

    def _left_out(self) -> Iterator[Dropped]:
        """Yield all documents left out so far, in order."""
        for number in range(len(self.shards)):
            yield from (Dropped(**values) for values in _load_record(self._record(number))[0]["dropped"])
        yield from self.unwritten.dropped

    def _most_often(self) -> str:
        """Return the commonest reason that documents are left out for, with its count and an example."""
        counts, first = Counter[str](), dict[str, Dropped]()
        for dropped in self._left_out():
            stem = dropped.key.rpartition("/")[2].partition(".")[0]
            kind = re.sub(r"\d+", "0", dropped.detail.replace(stem, "")) if dropped.faulty else dropped.reason
            counts[kind] += dropped.lost
            first.setdefault(kind, dropped)
        if not counts:
            return ""
        ((kind, count),) = counts.most_common(1)
        what = f"{first[kind].detail}" if first[kind].faulty else f"{first[kind].reason} ({first[kind].detail})"
        return f": {count} for one reason, such as {first[kind].key}: {what}"

    def _list_left_out(self, name: str, faulty: bool) -> None:
        """Write dropped.jsonl or quarantine.jsonl, a line at a time: millions of a text's lines may be dropped."""

        def write(file: BinaryIO) -> None:
            for dropped in self._left_out():
                if dropped.faulty == faulty:
                    reason = dropped.detail if faulty else f"{dropped.reason}: {dropped.detail}"
                    file.write(json.dumps({"key": dropped.key, "reason": reason}).encode() + b"\n")

        _write_file(self.out / name, write)

    def _write_index(self, name: str, dtype: np.dtype[Any], total: int, file: BinaryIO) -> None:
        """Write the index of all shards as one array, a shard at a time."""
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


def _write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file, whole or not at all. It is open for `write`: to a name, numpy would append a suffix."""

    def into(aside: Path) -> None:
        with aside.open("wb") as file:
            write(file)

    atomic_write(path, into)


def _load_record(
    path: Path, names: tuple[str, ...] = ("documents", "pictures", "captions", "texts", "fingerprints", "heldout")
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what a build noted about a shard, and its arrays of these names."""
    with np.load(path, allow_pickle=False) as archive:
        return json.loads(bytes(archive["record"])), {name: archive[name] for name in names}
