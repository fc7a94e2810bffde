"""Is a data set what its manifest says, to the last byte? `transfuse data verify SET`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..io import sha256
from ..log import progress
from .ahead import ahead, processes
from .dataset import SUMS, DataSet, Stored
from .stored import decode_picture

CHUNK = 256
"""documents looked at by a process at a time"""
SHOWN = 100
"""problems named one by one"""


@dataclass
class Verified:
    """documents: that were read and decoded. problems: a line each, the first hundred; `count`: how many there are."""

    documents: int = 0
    count: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.problems.append(problem)


def verify_set(path: str, workers: int = 2) -> Verified:
    """Compare every hash, decode every picture, count every token. Raises UserError where there is no set at all."""
    found = Verified()
    data = DataSet(path)
    sums = _sums(data.file(SUMS))
    for name in ("manifest.json", "tokenizer.json", *data.manifest.index):
        expected = data.manifest.index.get(name, sums.get(name))
        if sha256(data.file(name)) != expected or sums.get(name) != expected:
            found.add(f"{path}/{name}: expected SHA-256 {expected or 'in ' + SUMS}, found another")
            if name.endswith(".json"):
                return found  # what it says of the rest is not to be trusted
    data.tokenizer()
    for shard in data.manifest.shards:
        if sums.get(shard.file) != shard.sha256:
            found.add(f"{path}/{SUMS}: {shard.file}: expected {shard.sha256}, as the manifest says, found another")
    if len(sums) != len(data.manifest.shards) + len(data.manifest.index) + 2:
        found.add(f"{path}/{SUMS}: expected a line for each file of the set, found {len(sums)}")
    chunks = [range(first, min(first + CHUNK, len(data))) for first in range(0, len(data), CHUNK)]
    steps = len(data.manifest.shards) + len(chunks)
    with progress("verify", steps, unit="checks") as bar, processes(max(1, workers), _begin, path, what=path) as pool:
        shards = data.manifest.shards
        for shard, digest in zip(shards, ahead(lambda one: pool.submit(_shard, one.file), shards, 8), strict=True):
            if digest != shard.sha256:
                found.add(f"{path}/{shard.file}: {digest if ' ' in digest else 'its bytes do not match their hash'}")
            bar.advance()
        with closing(ahead(lambda chunk: pool.submit(_documents, chunk), chunks, 8)) as results:
            for chunk, problems in zip(chunks, results, strict=True):
                found.documents += len(chunk) - len(problems)
                for problem in problems:
                    found.add(problem)
                bar.advance(note=f"{found.documents} documents whole")
    return found


def _sums(path: Path) -> dict[str, str]:
    """Name: hash, of SHA256SUMS."""
    lines = [line.split("  ", 1) for line in path.read_text(errors="replace").splitlines()]
    return {line[1]: line[0] for line in lines if len(line) == 2}


_check: Callable[[int], None]
_data: DataSet
"""of this worker process"""


def _begin(path: str) -> None:
    global _check, _data
    _data = DataSet(path)
    _check = checker(_data)


def _shard(file: str) -> str:
    try:
        return sha256(_data.file(file))
    except (OSError, UserError) as error:
        return str(error)


def _documents(numbers: range) -> list[str]:
    problems = []
    for number in numbers:
        try:
            _check(number)
        except UserError as error:  # damaged, or its file gone
            problems.append(str(error))
    return problems


def checker(data: DataSet) -> Callable[[int], None]:
    """A function that raises DamagedError for a document that is not what the index says."""
    tokenizer = data.tokenizer()

    def check(number: int) -> None:
        expected = int(data.documents[number]["tokens"])
        if data.manifest.kind == "text":
            ids = data.read_ids(number)
            if len(ids) != expected or (ids >= tokenizer.vocab_size).any():
                raise data.damaged(number, f"expected {expected} tokens of the tokenizer")
            return
        stored = data.read(number)
        tokens = sum(len(tokenizer.encode(part)) for part in stored.parts if isinstance(part, str))
        if tokens != expected:
            raise data.damaged(number, f"expected {expected} tokens, found {tokens}", stored.key)
        _check_sizes(data, number, stored, [decode_picture(data, number, stored, part) for part in _pictures(stored)])

    return check


def _pictures(stored: Stored) -> list[bytes | np.ndarray]:
    return [part for part in stored.parts if not isinstance(part, str)]


def _check_sizes(data: DataSet, number: int, stored: Stored, pictures: list[np.ndarray]) -> None:
    factor = 1 if data.manifest.encoding is None else data.manifest.encoding.factor
    # a picture is [row, column, 3], a latent [channel, row, column], codes are [row, column]
    shapes = [p.shape[:2] if p.dtype == np.uint8 else p.shape[-2:] for p in pictures]
    found = [(rows * factor, columns * factor) for rows, columns in shapes]
    if found != data.sizes(number):
        raise data.damaged(number, f"expected {data.sizes(number)} pixels, found {found}", stored.key)
