"""A folder of pictures, encoded once to what a model trains on.

    OUT/
        config.json                        what was asked: autoencoder, size, source; a second call must ask the same
        shards/shard-00000.safetensors     "latents" `[image, channel, row, column]`, or "codes" `[image, row, column]`
        shards/shard-00000.json            its files in order, those rejected and why, its sums; written last
        rejected.jsonl  statistics.json    at the end, from the records of the shards

A shard is a fixed stretch of the sorted source files, and batches never cross from one into the next. So a shard does
not depend on where an earlier call was killed, and what is resumed equals what ran through, to the bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..autoencoders import Autoencoder, CodeAutoencoder
from ..configuration import read_json
from ..console import Steps, progress
from ..errors import UserError
from ..files import whole_file
from ..images import fit, image_files, read_image
from .ahead import ahead

VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def encode_images(
    autoencoder: Autoencoder,
    source: Path,
    out: Path,
    size: int,
    batch_size: int = 32,
    shard_size: int = 1024,
    workers: int = 1,
    dtype: Literal["float32", "float16"] = "float32",
) -> dict[str, float]:
    """Encode the pictures of a folder (or one file), cut to squares of `size` pixels; carry on where a call stopped.

    shard_size: source files per shard. workers: threads that read, decode and fit ahead of the network. dtype: of
    latents in the files; codes are int32. Pictures whose shorter side is below `factor` are rejected, as are files
    that can not be read; smaller ones than `size` are enlarged.

    Returns images and rejected (of all shards), encoded (images of this call), seconds, images_per_second,
    network_seconds and network_share (of the seconds). Raises UserError where OUT was begun with other settings.
    """
    _check(autoencoder, size, batch_size, shard_size, workers, dtype)
    began = time.monotonic()
    files = image_files(source)
    root = source if source.is_dir() else source.parent
    names = [path.relative_to(root).as_posix() for path in files]
    config = _config(autoencoder, files, names, size, shard_size, dtype)
    shards = _Shards(out, config)
    shards.begin()
    parts = [names[start : start + shard_size] for start in range(0, len(names), shard_size)]
    records = {number: record for number in range(len(parts)) if (record := shards.record(number)) is not None}
    waiting = [number for number in range(len(parts)) if number not in records]
    work = _Work(autoencoder, size, batch_size, shards.key, DTYPES.get(dtype, torch.float32))

    def read(name: str) -> np.ndarray | str:
        return _fitted(root / name, size, autoencoder.factor)

    names_ahead = (name for number in waiting for name in parts[number])
    done = sum(len(parts[number]) for number in records)
    with (
        progress("encode", len(names), done) as steps,
        ThreadPoolExecutor(workers, thread_name_prefix="read") as pool,
        closing(ahead(lambda name: pool.submit(read, name), names_ahead, 2 * batch_size + workers)) as pictures,
    ):
        for number in waiting:
            tensor, record = work.encode(parts[number], pictures, steps)
            shards.write(number, tensor, record)
            records[number] = record
    total = _finish(out, [records[number] for number in range(len(parts))])
    seconds = time.monotonic() - began
    return {
        "images": total["images"],
        "rejected": total["rejected"],
        "encoded": work.encoded,
        "seconds": seconds,
        "images_per_second": work.encoded / seconds,
        "network_seconds": work.seconds,
        "network_share": work.seconds / seconds,
    }


def read_encoded(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The file names, relative to the source, and latents `[channel, row, column]` or codes `[row, column]`, in order.

    Raises UserError where the folder is not whole.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("version") != VERSION:
        raise UserError(f"{folder / 'config.json'}: expected an encoded data set of version {VERSION}, found another")
    shards = _Shards(folder, config)
    for number in range(math.ceil(config["files"] / config["shard_size"])):
        record = shards.record(number)
        if record is None:
            raise UserError(f"{shards.path(number)}: expected a whole shard, found none; encode again to complete it")
        tensor = load_file(shards.path(number))[shards.key]
        for name, item in zip(record["files"], tensor, strict=True):
            yield name, item.clone()  # a view would keep the whole shard in memory


# --- shards -----------------------------------------------------------------------------------------------------------


@dataclass
class _Shards:
    """The files of OUT. A shard is there once its record is: its tensor takes its place first, its record last."""

    out: Path
    config: dict[str, Any]

    @property
    def key(self) -> str:
        return "latents" if self.config["codebook_size"] is None else "codes"

    def path(self, number: int) -> Path:
        return self.out / "shards" / f"shard-{number:05d}.safetensors"

    def begin(self) -> None:
        """Write config.json, or compare with the one that is there."""
        path = self.out / "config.json"
        if path.exists():
            self._compare(path, read_json(path))
        elif (self.out / "shards").exists():
            raise UserError(f"{path}: expected the settings of the shards beside it, found none")
        try:
            (self.out / "shards").mkdir(parents=True, exist_ok=True)
            for left in (self.out / "shards").glob("*.partial"):
                left.unlink()
        except OSError as error:
            raise UserError(f"{self.out}: expected a folder to write to, found none ({error})") from None
        if not path.exists():
            whole_file(path, lambda partial: partial.write_text(json.dumps(self.config, indent=2) + "\n"))

    def record(self, number: int) -> dict[str, Any] | None:
        """What a shard's JSON says; None where the shard is missing, or its tensor is not what it says."""
        path = self.path(number)
        try:
            record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
            with safe_open(path, "pt") as file:  # which compares the file's size with its header
                count = file.get_slice(self.key).get_shape()[0]
            return record if count == len(record["files"]) else None
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def write(self, number: int, tensor: Tensor, record: dict[str, Any]) -> None:
        path = self.path(number)
        whole_file(path, lambda partial: save_file({self.key: tensor}, partial))
        whole_file(path.with_suffix(".json"), lambda partial: partial.write_text(json.dumps(record) + "\n"))

    def _compare(self, path: Path, found: Any) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{path}: expected the settings of an encoded data set, found a {type(found).__name__}")
        differences = [
            f"{name}: expected {json.dumps(value)}, found {json.dumps(found.get(name))}"
            for name, value in self.config.items()
            if found.get(name) != value
        ]
        if differences:
            raise UserError(f"{path}: {'; '.join(differences)}; name another folder to encode anew")


# --- the work ---------------------------------------------------------------------------------------------------------


@dataclass
class _Work:
    """Runs the network; counts images, and the seconds it took."""

    autoencoder: Autoencoder
    size: int
    batch_size: int
    key: str
    dtype: torch.dtype
    encoded: int = 0
    seconds: float = 0.0

    def encode(
        self, names: list[str], pictures: Iterator[np.ndarray | str], steps: Steps
    ) -> tuple[Tensor, dict[str, Any]]:
        """One shard: its tensor and its record. `pictures` gives one for each name, or why there is none."""
        side = self.size // self.autoencoder.factor
        shape = (side, side) if self.key == "codes" else (self.autoencoder.channels, side, side)
        parts = [torch.empty(0, *shape, dtype=torch.int32 if self.key == "codes" else self.dtype)]
        files: list[str] = []
        rejected: list[dict[str, str]] = []
        batch: list[np.ndarray] = []
        for name in names:
            picture = next(pictures)
            if isinstance(picture, str):
                rejected.append({"file": name, "reason": picture})
            else:
                files.append(name)
                batch.append(picture)
            if len(batch) == self.batch_size:
                parts.append(self._run(batch, files[-len(batch) :], shape))
                batch = []
            steps.advance()
        if batch:
            parts.append(self._run(batch, files[-len(batch) :], shape))
        tensor = torch.cat(parts)
        return tensor, {"files": files, "rejected": rejected, **(_sums(tensor) if self.key == "latents" else {})}

    def _run(self, batch: list[np.ndarray], names: list[str], shape: tuple[int, ...]) -> Tensor:
        images = np.stack(batch)
        began = time.monotonic()
        if self.key == "codes":
            result = cast(CodeAutoencoder, self.autoencoder).codes(images).cpu().to(torch.int32)
        else:
            result = self.autoencoder.encode(images).cpu().to(self.dtype)
        self.seconds += time.monotonic() - began
        self.encoded += len(batch)
        if result.shape != (len(batch), *shape):
            raise ValueError(f"{self.key}: expected {(len(batch), *shape)}, found {tuple(result.shape)}")
        finite = result.isfinite().flatten(1).all(1)
        if not finite.all():
            name = names[int(finite.int().argmin())]
            raise UserError(f"{name}: expected finite latents of {self.autoencoder.name} in {result.dtype}, found none")
        return result


def _fitted(path: Path, size: int, smallest: int) -> np.ndarray | str:
    """The picture, uint8 `[size, size, 3]`, or why there is none."""
    try:
        return fit(read_image(path), size, smallest)
    except (UserError, ValueError) as error:
        return str(error).removeprefix(f"{path}: ")


# --- statistics -------------------------------------------------------------------------------------------------------


def _sums(latents: Tensor) -> dict[str, Any]:
    """Of `[image, channel, row, column]`, as they are stored: float64 sums by channel, and numbers per channel.

    Image by image: the result depends neither on the batch size nor on the number of threads.
    """
    total = squares = np.zeros(latents.shape[1])
    for image in latents.numpy():
        total = total + image.sum(axis=(1, 2), dtype=np.float64)
        squares = squares + np.square(image, dtype=np.float64).sum(axis=(1, 2))
    elements = latents.shape[0] * latents.shape[2] * latents.shape[3]
    return {"elements": elements, "sum": total.tolist(), "sum_of_squares": squares.tolist()}


def _finish(out: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write rejected.jsonl and statistics.json from the records of all shards, in order. Returns the statistics."""
    rejected = [one for record in records for one in record["rejected"]]
    lines = "".join(json.dumps(one) + "\n" for one in rejected)
    whole_file(out / "rejected.jsonl", lambda path: path.write_text(lines))
    images = sum(len(record["files"]) for record in records)
    statistics: dict[str, Any] = {"images": images, "rejected": len(rejected)}
    if images and "sum" in records[0]:
        elements = sum(record["elements"] for record in records)
        mean = sum(np.array(record["sum"]) for record in records) / elements
        square = sum(np.array(record["sum_of_squares"]) for record in records) / elements
        statistics |= {
            "channel_mean": mean.tolist(),
            "channel_std": np.sqrt(np.maximum(0, square - mean**2)).tolist(),
            "mean": float(mean.mean()),
            "std": float(np.sqrt(max(0.0, square.mean() - mean.mean() ** 2))),
        }
    whole_file(out / "statistics.json", lambda path: path.write_text(json.dumps(statistics, indent=2) + "\n"))
    return statistics


# --- settings ---------------------------------------------------------------------------------------------------------


def _check(autoencoder: Autoencoder, size: int, batch_size: int, shard_size: int, workers: int, dtype: str) -> None:
    for name, value in {"batch_size": batch_size, "shard_size": shard_size, "workers": workers}.items():
        if value < 1:
            raise UserError(f"{name}: expected at least 1, found {value}")
    if size < 1 or size % autoencoder.factor:
        raise UserError(f"size: expected a multiple of {autoencoder.factor} (of {autoencoder.name}), found {size}")
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected {' or '.join(DTYPES)}, found {dtype}")
    if not autoencoder.fingerprint:
        raise ValueError(f"autoencoder {autoencoder.name}: expected a fingerprint, found none; save and load it first")


def _config(
    autoencoder: Autoencoder, files: list[Path], names: list[str], size: int, shard_size: int, dtype: str
) -> dict[str, Any]:
    """The settings that make a data set what it is. Batch size and workers change nothing in it."""
    codebook_size = getattr(autoencoder, "codebook_size", None)
    return {
        "version": VERSION,
        "autoencoder": autoencoder.name,
        "fingerprint": autoencoder.fingerprint,
        "factor": autoencoder.factor,
        "channels": autoencoder.channels,
        "codebook_size": codebook_size,
        "size": size,
        "shard_size": shard_size,
        "dtype": dtype if codebook_size is None else "int32",
        "files": len(names),
        "source": _listing(files, names),
    }


def _listing(files: list[Path], names: list[str]) -> str:
    """A hash of names and sizes: files that change under way change the data set. Not of times, which copies lose."""
    digest = hashlib.sha256()
    for path, name in zip(files, names, strict=True):
        try:
            bytes_ = path.stat().st_size
        except OSError:  # gone, or a link to nothing: reading it will say so
            bytes_ = -1
        digest.update(json.dumps([name, bytes_]).encode())
    return digest.hexdigest()
