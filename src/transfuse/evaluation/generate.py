"""Model outputs, made once, stored, and shared by all metrics. Only this layer calls the model.

    outcome = generate(folder, task, batch=32)     # makes what is missing
    outcome.records[7], outcome.image(7)

    drawings-1f0a9c3e/task.json          everything the records depend on; its hash is in the folder's name
    drawings-1f0a9c3e/items.jsonl        one line per item, in order
    drawings-1f0a9c3e/images/00000007.png

A batch is written whole: its images first, then its lines, synced. An item with a line is never made again; a killed
process loses only its current batch. A second process waits, then reads what the first one made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from filelock import FileLock
from torch import Tensor

from ..errors import UserError
from ..images import read_image
from ..io import atomic_write, sync
from ..log import progress


@dataclass(frozen=True, eq=False)
class Made:
    """The output for one item: plain JSON, and an image uint8 `[row, column, 3]` if one was drawn."""

    record: dict[str, Any]
    image: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """Work on `count` items. `work` maps item numbers to outputs, in order.

    settings   everything the records depend on: other settings go to another folder. `EvalContext.make` adds the model
    """

    name: str
    settings: dict[str, Any]
    count: int
    work: Callable[[Sequence[int]], Sequence[Made]]


@dataclass(frozen=True, eq=False)
class Outcome:
    """The records and images of a task, by item number."""

    folder: Path
    records: list[dict[str, Any]] = field(repr=False)

    def path(self, number: int) -> Path:
        return self.folder / "images" / f"{number:08d}.png"

    def image(self, number: int) -> np.ndarray:
        return read_image(self.path(number))

    def images(self) -> np.ndarray:
        """Return all images, uint8 `[image, row, column, 3]`."""
        return np.stack([self.image(number) for number in range(len(self.records))])


def generate(folder: Path, task: Task, batch: int) -> Outcome:
    """Make the missing items of a task, `batch` at a time. Raises UserError where the folder cannot be written."""
    settings = {"count": task.count, **task.settings}
    place = folder / f"{task.name}-{short_hash(settings)}"
    lines = place / "items.jsonl"
    try:
        (place / "images").mkdir(parents=True, exist_ok=True)
        records, _ = _complete_lines(lines)
        if len(records) < task.count:
            with FileLock(place / "items.lock"), lines.open("a", encoding="utf-8") as file:
                text = json.dumps({"name": task.name, **settings}, indent=2) + "\n"
                atomic_write(place / "task.json", lambda path: path.write_text(text, encoding="utf-8"))
                records, size = _complete_lines(lines)
                file.truncate(size)
                with progress(task.name, task.count, len(records), "samples") as bar:
                    while len(records) < task.count:
                        numbers = range(len(records), min(task.count, len(records) + batch))
                        records += _make(task, numbers, Outcome(place, records), file)
                        bar.advance(len(numbers))
    except OSError as error:
        raise UserError(f"{place}: expected a folder to write to, found {error.strerror or error}") from None
    return Outcome(place, records)


def _make(task: Task, numbers: Sequence[int], outcome: Outcome, file: Any) -> list[dict[str, Any]]:
    """Make a batch and write it: images first, then the lines that say they are complete. Return its records."""
    try:
        made = task.work(numbers)
    except OSError as error:  # of what it reads; `generate` reports the folder that it writes
        raise UserError(f"{task.name}: {error}") from error
    for number, item in zip(numbers, made, strict=True):
        if item.image is not None:
            PIL.Image.fromarray(item.image).save(outcome.path(number))
            sync(outcome.path(number))
    records = [item.record for item in made]
    file.write("".join(json.dumps(record) + "\n" for record in records))
    file.flush()
    os.fsync(file.fileno())
    return records


def _complete_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records so far and their size in bytes; a last line without its newline is incomplete."""
    data = path.read_bytes() if path.is_file() else b""
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()], len(whole)
    except ValueError as error:
        raise UserError(f"{path}: expected a JSON record a line, found something else ({error})") from None


# --- hashes -----------------------------------------------------------------------------------------------------------


def short_hash(value: Any) -> str:
    """Return eight hexadecimal digits of the SHA-256 of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def content_hash(parts: Iterable[bytes]) -> str:
    """Return twelve hexadecimal digits of the SHA-256 of the parts, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return eight digits of a hash of a network's weights, in order, of any dtype and on any device."""
    digest = hashlib.sha256()
    for tensor in weights.values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
