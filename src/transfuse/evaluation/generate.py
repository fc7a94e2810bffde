"""The first layer: what a model is asked to do is done once, written down, and read by as many measures as like.

    drawn = generate(folder, task, batch=32)       # draws what is not there yet
    drawn.records[7], drawn.image(7)

    drawings-1f0a9c3e/task.json          everything that the records depend on; its hash is in the folder's name
    drawings-1f0a9c3e/items.jsonl        a line for each item, in order
    drawings-1f0a9c3e/images/00000007.png

A batch is written whole: its pictures first, then its lines, synced. What has a line is never done again; of a process
that was killed the batch under way is lost, nothing else. Of two processes the second waits, and reads what the first
has made. Only this layer calls the model.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..errors import UserError
from ..images import read_image
from ..io import atomic_write, sync
from ..log import progress


@dataclass(frozen=True, eq=False)
class Made:
    """What the model made of one item: plain JSON, and a picture uint8 `[row, column, 3]` if it drew one."""

    record: dict[str, Any]
    image: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """Something to do `count` times. `work`: numbers of items -> what was made of each, in order.

    settings   everything that the records depend on: another setting, another folder; `EvalContext.make` adds the model
    """

    name: str
    settings: dict[str, Any]
    count: int
    work: Callable[[Sequence[int]], Sequence[Made]]

    @property
    def folder(self) -> str:
        return f"{self.name}-{short_hash({'count': self.count, **self.settings})}"


@dataclass(frozen=True, eq=False)
class Outcome:
    """The records of a task, by number of the item."""

    folder: Path
    records: list[dict[str, Any]] = field(repr=False)

    def path(self, number: int) -> Path:
        return _picture(self.folder, number)

    def image(self, number: int) -> np.ndarray:
        return read_image(self.path(number))

    def images(self, numbers: Sequence[int] | None = None) -> np.ndarray:
        """uint8 `[image, row, column, 3]` of all items, or of some."""
        return np.stack([self.image(n) for n in (range(len(self.records)) if numbers is None else numbers)])


def short_hash(value: Any) -> str:
    """Eight hexadecimal digits of the SHA-256 of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def content_hash(parts: Iterable[bytes]) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the parts, each behind its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def generate(folder: Path, task: Task, batch: int) -> Outcome:
    """Do what is not done yet of a task, `batch` items at a time. Raises UserError where it can not be written."""
    place = folder / task.folder
    lines = place / "items.jsonl"
    try:
        (place / "images").mkdir(parents=True, exist_ok=True)
        records, _ = _whole_lines(lines)
        if len(records) < task.count:
            with lines.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                text = json.dumps({"name": task.name, "count": task.count, **task.settings}, indent=2) + "\n"
                atomic_write(place / "task.json", lambda path: path.write_text(text))
                records, size = _whole_lines(lines)
                file.truncate(size)
                with progress(task.name, task.count, len(records)) as bar:
                    while len(records) < task.count:
                        numbers = range(len(records), min(task.count, len(records) + batch))
                        made = task.work(numbers)
                        _keep(place, numbers, made, file)
                        records += [one.record for one in made]
                        bar.advance(len(made))
    except OSError as error:
        raise UserError(f"{place}: expected a folder to write to, found {error.strerror or error}") from None
    return Outcome(place, records)


def _keep(place: Path, numbers: Sequence[int], made: Sequence[Made], file: Any) -> None:
    if len(made) != len(numbers):
        raise ValueError(f"{place.name}: expected {len(numbers)} things made, found {len(made)}")
    for number, one in zip(numbers, made, strict=True):
        if one.image is not None:
            path = _picture(place, number)
            PIL.Image.fromarray(one.image).save(path)
            sync(path)
    file.write("".join(json.dumps(one.record) + "\n" for one in made))
    file.flush()
    os.fsync(file.fileno())


def _whole_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records so far, and the bytes that they take. A last line without its end is being written, or was when the
    process died: it is none."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON record a line, found something else ({error})") from None


def _picture(place: Path, number: int) -> Path:
    return place / "images" / f"{number:08d}.png"
