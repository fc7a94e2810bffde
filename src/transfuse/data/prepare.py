"""A document as it was found, made into what is stored: filtered, cut to size, encoded, counted, hashed.

What becomes of a document depends on it and the settings alone, so it may be done anywhere, in any order.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import PIL.Image
import tyro

from ..autoencoders import Autoencoder, VQTokenizer, open_autoencoder
from ..errors import UserError
from ..images import decode_image, fit
from ..sequence import Tokenizer
from .dataset import Encoding, digest, to_members
from .readers import Columns, Fault, Raw
from .sources import is_conditional

MOST_SIDE = 16_384
"""pixels: the index counts to 65,535, and a bucket may be wider than `size`"""
WIDEST = 2.0
"""aspect ratio of the widest and the tallest bucket"""
QUALITY = {"jpeg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95, "method": 4}, "png": {}}


@dataclass(frozen=True)
class BuildConfig:
    """What a data set is made of and how; together with its source, it decides every byte."""

    size: int = 64
    """pixels of a side; pictures are cut to their middle square and scaled"""
    buckets: bool = False
    """keep the shape: rows and columns are the nearest of those with about size x size pixels, at most 2 : 1"""
    multiple: int = 16
    """of which rows and columns of buckets are multiples (a patch's side in pixels, or several)"""
    format: Literal["png", "jpeg", "webp"] = "png"
    """of stored pictures; png keeps every pixel"""
    autoencoder: str = ""
    """store its latents, or codes, in place of pictures: a folder, or the name of a bundled one"""
    tokenizer: str = ""
    """a tokenizer.json, a folder with one (a data set, a model), or a sentencepiece .model; none: one is trained"""
    vocabulary: int = 4096
    """ids of a tokenizer that is trained on the source"""
    min_side: int = 1
    """drop pictures whose shorter side has fewer pixels; others are enlarged where they must"""
    max_aspect: float | None = None
    """drop pictures whose longer side is more than so many times the shorter"""
    min_caption: int = 1
    """drop pairs whose caption has fewer characters"""
    max_caption: int | None = None
    """or more"""
    max_tokens: int = 500
    """drop documents with pictures that have more tokens of text; cut text alone into documents of so many"""
    duplicates: Literal["drop", "keep"] = "drop"
    """documents that are equal to an earlier one, once stored; of text alone the whole, before it is cut"""
    heldout: float = 0.01
    """share that training never sees"""
    shard_size: int = 2048
    """documents per shard"""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)

    def __post_init__(self) -> None:
        for name in ("size", "multiple", "max_tokens", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.size > MOST_SIDE:
            raise ValueError(f"size: expected at most {MOST_SIDE}, found {self.size}")
        if self.columns.count < 0:
            raise ValueError(f"count: expected at least 0, found {self.columns.count}")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout: expected a share from 0 to below 1, found {self.heldout}")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect: expected at least 1, found {self.max_aspect}")
        if self.buckets and self.size % self.multiple:
            raise ValueError(f"size: expected a multiple of {self.multiple} (multiple) with buckets, found {self.size}")


@dataclass(frozen=True)
class Prepared:
    """A document ready to be stored, `key` its name in the source: `parts` as bytes and words, or token ids alone."""

    key: str
    parts: tuple[str | bytes, ...]
    pair: bool
    conditional: bool
    """text stands before its last picture"""
    tokens: int
    sizes: tuple[tuple[int, int], ...]
    hash: bytes


@dataclass(frozen=True)
class Dropped:
    """A document that does not go in. faulty: it is damaged or incomplete, and not merely filtered; lost: as of a
    Fault."""

    key: str
    reason: str
    detail: str
    faulty: bool = False
    lost: int = 1


Outcome = Prepared | Dropped


def bucket(rows: int, columns: int, size: int, multiple: int) -> tuple[int, int]:
    """The rows and columns that a picture is cut and scaled to: multiples, at most size x size pixels in all, nearest
    in shape to its own."""
    most = size * size
    shapes = []
    for height in range(multiple, int(size * math.sqrt(WIDEST)) + 1, multiple):
        width = most // height // multiple * multiple
        if width and 1 / WIDEST <= width / height <= WIDEST:
            shapes.append((height, width))
    return min(shapes, key=lambda shape: (abs(math.log(shape[1] / shape[0]) - math.log(columns / rows)), shape))


class Preparer:
    """Prepares documents one after another."""

    def __init__(self, config: BuildConfig, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.autoencoder = _opened(config)
        kind = "codes" if isinstance(self.autoencoder, VQTokenizer) else "latent"
        self.suffix = f"{kind}.npy" if self.autoencoder else {"jpeg": "jpg"}.get(config.format, config.format)
        self.id_type = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"

    def texts(self, items: Iterable[Raw | Fault]) -> Iterator[list[Outcome]]:
        """Of each document that is words alone what becomes of it: several, where it is cut because it is too long."""
        for item in map(_writable, items):
            if isinstance(item, Fault):
                yield [Dropped(item.key, "faulty", item.reason, True, item.lost)]
                continue
            ids = np.array(self.tokenizer.encode("\n".join(map(str, item.parts))), self.id_type)
            found: list[Outcome] = []
            for start in range(0, len(ids), self.config.max_tokens):
                piece = ids[start : start + self.config.max_tokens]
                data = piece.tobytes()
                found.append(Prepared(item.key, (data,), False, False, len(piece), (), digest([("tokens", data)])))
            yield found or [Dropped(item.key, "empty", "no tokens")]

    def pictures(self, items: Iterable[Raw | Fault]) -> Iterator[list[Outcome]]:
        """Of each document with pictures what becomes of it."""
        for found in map(self._cut, map(_writable, items)):
            if isinstance(found, Dropped):
                yield [found]
                continue
            sizes = tuple(part.shape[:2] for part in found.parts if isinstance(part, np.ndarray))
            counts = [len(self.tokenizer.encode(part)) if isinstance(part, str) else None for part in found.parts]
            tokens = sum(count for count in counts if count)
            if tokens > self.config.max_tokens:
                yield [Dropped(found.key, "too many tokens", f"{tokens} of at most {self.config.max_tokens}")]
                continue
            parts = tuple(
                self._encoded(found.key, part) if isinstance(part, np.ndarray) else part for part in found.parts
            )
            members = to_members("", parts, found.pair, self.suffix)
            stored = tuple(part for part in parts if isinstance(part, str | bytes))
            yield [Prepared(found.key, stored, found.pair, is_conditional(counts), tokens, sizes, digest(members))]

    def _cut(self, item: Raw | Fault) -> Raw | Dropped:
        """With its pictures as pixels of the size they are stored in."""
        if isinstance(item, Fault):
            return Dropped(item.key, "faulty", item.reason, True, item.lost)
        config = self.config
        if item.pair:
            words = next(len(part) for part in item.parts if isinstance(part, str))
            if words < config.min_caption or (config.max_caption is not None and words > config.max_caption):
                return Dropped(item.key, "caption length", f"{words} characters")
        parts: list[str | bytes | np.ndarray] = []
        for part in item.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                pixels = part if isinstance(part, np.ndarray) else decode_image(part, "picture")
            except UserError as error:
                return Dropped(item.key, "faulty", str(error).removeprefix("picture: "), faulty=True)
            rows, columns = pixels.shape[:2]
            if min(rows, columns) < config.min_side:
                return Dropped(item.key, "too small", f"{columns}x{rows} pixels")
            if config.max_aspect is not None and max(rows, columns) > config.max_aspect * min(rows, columns):
                return Dropped(item.key, "aspect ratio", f"{columns}x{rows} pixels")
            shape = bucket(rows, columns, config.size, config.multiple) if config.buckets else config.size
            parts.append(fit(pixels, shape))
        return Raw(item.key, tuple(parts), item.pair)

    def _encoded(self, key: str, picture: np.ndarray) -> bytes:
        """An image file, or latents or codes as .npy. Each picture alone: it must not depend on who came along.

        Raises UserError for latents that half precision can not hold.
        """
        stream = io.BytesIO()
        if self.autoencoder is None:
            PIL.Image.fromarray(picture).save(stream, self.config.format, **QUALITY[self.config.format])
            return stream.getvalue()
        latent = self.autoencoder.encode(picture[None])[0].cpu().numpy()
        if isinstance(self.autoencoder, VQTokenizer):
            latent = latent.astype("<u2" if self.autoencoder.codebook_size <= 1 << 16 else "<i4")
        else:
            with np.errstate(over="ignore"):
                latent = latent.astype("<f2")
            if not np.isfinite(latent).all():
                raise UserError(f"{key}: expected finite latents of {self.autoencoder.name} in float16, found others")
        np.save(stream, latent, allow_pickle=False)
        return stream.getvalue()


def encoding_of(config: BuildConfig) -> Encoding | None:
    """What a set is encoded with; None: it has pixels. Raises UserError for no such autoencoder, or no fit."""
    found = _opened(config)
    if found is None:
        return None
    codebook = found.codebook_size if isinstance(found, VQTokenizer) else None
    return Encoding(found.name, found.fingerprint, found.factor, codebook)


def _opened(config: BuildConfig) -> Autoencoder | None:
    """The autoencoder that a set is encoded with: as codes where it has a codebook. Raises UserError for no fit."""
    if not config.autoencoder:
        return None
    found = open_autoencoder(config.autoencoder)
    if found.factor == 1:
        raise UserError(f"autoencoder: expected one that encodes, found {found.name}")
    step, name = (config.multiple, "multiple") if config.buckets else (config.size, "size")
    if step % found.factor:
        raise UserError(f"{name}: expected a multiple of {found.factor} for {found.name}, found {step}")
    return found if getattr(found, "codebook_size", None) is None else VQTokenizer(found)


def _writable(item: Raw | Fault) -> Raw | Fault:
    """JSON may have half a character, an emoji cut in two, which no file of text can hold."""
    try:
        for part in getattr(item, "parts", ()):
            if isinstance(part, str):
                part.encode()
    except UnicodeEncodeError as error:
        return Fault(item.key, f"expected whole characters, found half of one at {error.start}")
    return item


def slug(key: str) -> str:
    """What of a name can stand in that of a member: no dot, which would end the key, and not long."""
    stem, _, ending = key.rpartition(".")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem if stem and "/" not in ending else key)[-48:]
