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
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...config import read_json, to_dict
from ...errors import UserError
from ...io import atomic_write, sha256
from ...log import logger, progress
from ...sequence import Tokenizer
from ...version import __version__
from ..dataset import SUMS, DataSet, Manifest, Shard
from ..prefetch import parallel_map
from ..readers import Part, Reader, SetReader, open_source
from ..readers.listing import UNNAMED
from ..remote import UNREADABLE, Cache, is_remote, url_name
from .prepare import BuildConfig, Outcome, Preparer, build_autoencoder
from .writer import Place, Writer

TRAINED_ON = 300  # evenly spread parts of a source that a tokenizer is trained on
BEGUN = ("tokenizer.json", "dropped.jsonl", "quarantine.jsonl", "left_out.jsonl")  # files of a build that has not ended
COUNTS = (  # of a manifest, that a build reports
    *("kind", "documents", "pictures", "captions", "tokens", "heldout", "seen"),
    *("dropped", "faulty", "changed", "files"),
)
OTHERWISE = "name another folder, or remove {}, to build it again"
VERIFIED_TOGETHER = 256  # documents that a process verifies at a time


def build_set(
    source: str, out: Path, config: BuildConfig, workers: int = 2, max_errors: float = 0.01, cache: Cache | None = None
) -> dict[str, Any]:
    """Build a set, or resume where a build was stopped. Return the counts of its manifest, and seconds.

    workers: processes; 0: this one. max_errors: share of faulty documents (at least ten are let pass) above which the
    build stops. cache: for files of a source that is a URL.

    Raises UserError: no such source, another set in `out`, or another process that builds there, too many faults,
    nothing left, no room, a file that cannot be fetched.
    """
    _check_paths(source, out)
    with _locked(out):
        return _build(source, out, config, workers, max_errors, cache)


def _build(
    source: str, out: Path, config: BuildConfig, workers: int, max_errors: float, cache: Cache | None
) -> dict[str, Any]:
    began = time.monotonic()
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
        return {name: getattr(manifest, name) for name in COUNTS} | {"seconds": 0.0}
    _claim(out, identity, contents)
    if not (out / "tokenizer.json").exists():
        atomic_write(out / "tokenizer.json", _new_tokenizer(reader, given, config.vocabulary).save)
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    (out / "shards").mkdir(exist_ok=True)
    preparer = Preparer(config, tokenizer, reader.text_only)
    name = url_name(source) if is_remote(source) else Path(source).name or source
    sides_of = reader.data if isinstance(reader, SetReader) and config.heldout is None else None
    writer = Writer(out, preparer, name, max_errors, sides_of)
    writer.resume()
    parts = iter(reader.parts())
    done = sum(part.weight for part in islice(parts, writer.next.part))
    skipped = writer.next.document
    work = ((part, skipped if number == 0 else 0) for number, part in enumerate(parts))
    make = partial(_worker, reader, config, out / "tokenizer.json")
    most = config.columns.count or math.inf
    with (
        progress("build", reader.total, done, unit=reader.unit) as bar,
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
        raise UserError(f"{source}: changed while the set was built ({changes}); the same command builds it again")
    left_out = {} if reader.listing is None else reader.listing.left_out({*contents, *reader.names})
    unnamed = sum(reason == UNNAMED for reason in left_out.values())
    if unnamed:
        of = f" of the split {reader.source_split}" if reader.source_split else ""
        logger.info(
            f"{source}: {unnamed} images are named by no document{of} (left_out.jsonl); --reader images reads images"
        )
    manifest = writer.finish(settings, 0 if reader.listing is None else reader.listing.n_files, left_out)
    return {name: getattr(manifest, name) for name in COUNTS} | {"seconds": time.monotonic() - began}


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Let no other process build in a folder meanwhile. Raises UserError if one does."""
    lock, new = FileLock(out / ".lock"), [folder for folder in (out, *out.parents) if not folder.exists()]
    with suppress(OSError, NotImplementedError):  # a place without locks, or where nothing can be written
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            wanted = "expected a folder that nobody else builds in, found another build at it"
            raise UserError(f"{out}: {wanted}; wait for it, or name another folder") from None
    try:
        yield
    finally:
        with suppress(OSError):
            if lock.is_locked:
                lock.release()
                (out / ".lock").unlink(missing_ok=True)
            for folder in new:  # the innermost first; what is not empty stays
                folder.rmdir()


def _check_paths(source: str, out: Path) -> None:
    """Raise UserError for a folder inside of the source, and for paths that no file can have."""
    try:
        inside = Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve())
        out.exists()
    except (OSError, RuntimeError) as error:  # names too long, links in a circle
        raise UserError(f"{source:.80}, {str(out)[:80]}: expected paths, found others ({str(error)[:80]})") from None
    if inside:
        raise UserError(f"{out}: expected a folder outside of the source {source}, found one in it")


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
                    words = (text for text in getattr(item, "parts", ()) if isinstance(text, str))
                    yield from (text.encode(errors="ignore").decode() for text in words)  # half characters are faults

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
    """Begin a build. Raises UserError where another one was begun, or the folder holds something else.

    A build of the same source, some of which has changed, is begun again; and one that failed before it stored a
    document does not stand in the way of another.
    """
    identity = identity | {"transfuse": __version__}  # another version may decode images otherwise
    path, files = out / "building" / "settings.json", out / "building" / "source.json"
    if path.exists():
        begun, stored = read_json(path), any((out / "shards").glob("*"))
        before = read_json(files) if files.exists() else {}
        before = before if isinstance(before, dict) else {}
        changes = _difference(before, contents)
        kept = sum(name in contents for name in before) >= max(1, len(before) / 2)  # or it is another source
        if stored and not (changes and kept and begun | {"listing": identity["listing"]} == identity):
            _compare(out, path, begun, identity, changes)
            return
        if stored:
            logger.info(f"{out}: begun again, because the source has changed ({changes})")
        for name in ("building", "shards"):
            shutil.rmtree(out / name, ignore_errors=True)
        for file in [*(out / name for name in BEGUN), *out.glob("*.partial")]:
            file.unlink(missing_ok=True)
    if out.exists() and (not out.is_dir() or any(entry.name not in ("building", ".lock") for entry in out.iterdir())):
        raise UserError(f"{out}: expected an empty folder, or a data set begun before, found something else")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: expected a folder to write to, found none ({error.strerror})") from None
    atomic_write(files, lambda partial: partial.write_text(json.dumps(contents) + "\n", encoding="utf-8"))
    atomic_write(path, lambda partial: partial.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8"))


def _compare(out: Path, path: Path, stored: dict[str, Any], wanted: dict[str, Any], changes: str = "") -> None:
    for name, value in wanted.items():
        if stored.get(name) != value:
            expected, actual = json.dumps(value), json.dumps(stored.get(name))
            if name == "listing":
                expected, actual = "the same source", "another source, or one that has changed"
                actual += f" ({changes})" if changes else ""
            raise UserError(f"{path}: {name}: expected {expected}, found {actual}; {OTHERWISE.format(out)}")


# --- `transfuse data verify` ------------------------------------------------------------------------------------------


def verify_set(path: str, workers: int = 2) -> tuple[int, list[str]]:
    """Compare every hash, decode every image, count every token. Return the number of whole documents, and problems.

    workers: processes; 0: this one. Raises UserError where there is no set at all.
    """
    problems: list[str] = []
    data, documents = DataSet(path), 0
    lines = [line.split("  ", 1) for line in data.file(SUMS).read_bytes().decode(errors="replace").split("\n")]
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
