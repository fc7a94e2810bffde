"""A document as it was read, made into what is stored: filtered, cut to size, encoded, counted, hashed.

The outcome depends on the document and the settings alone, so documents may be prepared anywhere, in any order.
"""

from __future__ import annotations

import html
import io
import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Annotated, Literal

import numpy as np
import PIL.Image
import PIL.ImageColor
import tyro

from ...autoencoders import Autoencoder, VQTokenizer, open_autoencoder
from ...errors import UserError
from ...images import decode_image, fit, is_animated, pad, unpad
from ...sequence import Tokenizer
from ..dataset import Encoding
from ..members import digest, to_members
from ..readers import Columns, Fault, Item, LeftOut, Raw
from ..sources import is_conditional
from .groups import Fingerprint

MOST_SIDE = 16_384  # pixels: the index counts to 65,535, and a bucket may be wider than `size`
WIDEST = 2.0  # aspect ratio of the widest and the tallest bucket
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\ufeff\ufffe\uffff]")  # not tab and line feed
QUALITY = {"jpeg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95, "method": 4}, "png": {}}


@dataclass(frozen=True)
class BuildConfig:
    """The content of a data set and how it is stored; together with its source, it decides every byte."""

    size: int = 64
    """pixels of a side"""
    fit: Literal["crop", "smart", "pad", "bucket"] = "crop"
    """crop: the middle square; smart: the square that loses fewest edges; pad: all of it on a square, whose rest is not
    learned; bucket: keep the shape: the nearest rows and columns with about size x size pixels, at most 2 : 1"""
    background: str = "white"
    """colour that shows through what is transparent, and around what is padded, as CSS writes it: white, #ffcc00"""
    multiple: int = 16
    """of which rows and columns of buckets are multiples (a patch's side in pixels, or several)"""
    format: Literal["png", "jpeg", "webp"] = "png"
    """of stored images; png keeps every pixel"""
    autoencoder: str = ""
    """store its latents, or codes, in place of images: a folder, or the name of a bundled one"""
    tokenizer: str = ""
    """a tokenizer.json, a folder with one (a data set, a model), a bundled model's name, or a sentencepiece .model; not
    given: one is trained"""
    vocabulary: int = 4096
    """ids of a tokenizer that is trained on the source"""
    min_side: int = 1
    """drop images whose shorter side has fewer pixels; others are enlarged where they must"""
    max_side: int | None = None
    """drop images whose longer side has more pixels"""
    max_aspect: float | None = None
    """drop images whose longer side is more than this many times the shorter"""
    min_caption: int = 1
    """drop captions with fewer characters, and images without another caption"""
    max_caption: int | None = None
    """or more"""
    max_tokens: int = 500
    """drop captions, or documents with images, that have more tokens of text; cut text alone into documents of this
    length"""
    long: Literal["drop", "cut"] = "drop"
    """what becomes of a caption that is too long: cut keeps the words that fit"""
    clean: bool = True
    """write text in composed characters (NFC) without control characters; next to images also & for &amp;"""
    duplicates: Literal["drop", "keep"] = "drop"
    """documents that are equal to an earlier one, once stored; of text alone the whole, before it is cut"""
    heldout: float | None = None
    """share that training never sees, near duplicates together; none: 0.01, or what a set that this one is built from
    holds out"""
    shard_size: int = 2048
    """documents per shard"""
    columns: Annotated[Columns, tyro.conf.arg(name="")] = field(default_factory=Columns)

    def __post_init__(self) -> None:
        for name in ("size", "multiple", "max_tokens", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.size > MOST_SIDE:
            raise ValueError(f"size: expected at most {MOST_SIDE}, found {self.size}")
        if self.heldout is not None and not 0 <= self.heldout < 1:
            raise ValueError(f"heldout: expected a share from 0 to below 1, found {self.heldout}")
        if self.max_aspect is not None and not self.max_aspect >= 1:
            raise ValueError(f"max_aspect: expected at least 1, found {self.max_aspect}")
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(f"max_side: expected at least min_side, {self.min_side}, found {self.max_side}")
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ValueError(
                f"max_caption: expected at least min_caption, {self.min_caption}, found {self.max_caption}"
            )
        try:
            PIL.ImageColor.getrgb(self.background)
        except ValueError:
            raise ValueError(f'background: expected a colour (white, "#ffcc00"), found {self.background!r}') from None
        if self.fit == "bucket" and self.size % self.multiple:
            raise ValueError(f"size: expected a multiple of {self.multiple} (multiple) with buckets, found {self.size}")


@dataclass(frozen=True)
class Prepared:
    """A document ready to be stored.

    key: its name in the source. parts: text, and images as bytes; or token ids alone, as bytes. conditional, followed:
    text comes before, or after, its last image. tokens: of its text; of several captions, of the longest. sizes: rows
    and columns of its images, in pixels, and, where they are padded, of what is not padding. roles: who says or shows
    each part of a dialogue. captions: tokens and weight of each of several captions. changed: the name of each change
    that was made to its text. fingerprints: of its images, or of its text. heldout: its side in the data set that it
    comes from.
    """

    key: str
    parts: tuple[str | bytes, ...]
    pair: bool
    conditional: bool
    tokens: int
    sizes: tuple[tuple[int, ...], ...]
    hash: bytes
    weights: tuple[float, ...] = ()
    roles: tuple[str, ...] = ()
    captions: tuple[tuple[int, float], ...] = ()
    changed: tuple[str, ...] = ()
    fingerprints: tuple[Fingerprint, ...] = ()
    heldout: bool | None = None
    followed: bool = False


@dataclass(frozen=True)
class Dropped:
    """A document that is left out.

    faulty: it is damaged or incomplete, and not merely filtered. lost: the documents that a fault counts for.
    """

    key: str
    reason: str
    detail: str
    faulty: bool = False
    lost: int = 1


Outcome = Prepared | Dropped


def bucket(rows: int, columns: int, size: int, multiple: int) -> tuple[int, int]:
    """Return the rows and columns that an image is cut and scaled to.

    They are multiples, at most size x size pixels in all, and nearest in shape to the image's own.
    """
    most = size * size
    shapes = []
    for height in range(multiple, int(size * math.sqrt(WIDEST)) + 1, multiple):
        width = most // height // multiple * multiple
        if width and 1 / WIDEST <= width / height <= WIDEST:
            shapes.append((height, width))
    return min(shapes, key=lambda shape: (abs(math.log(shape[1] / shape[0]) - math.log(columns / rows)), shape))


def build_autoencoder(config: BuildConfig) -> Autoencoder | None:
    """Open the autoencoder that a set is encoded with: as codes if it has a codebook. Raises UserError for no fit."""
    if not config.autoencoder:
        return None
    autoencoder = open_autoencoder(config.autoencoder)
    if autoencoder.factor == 1:
        raise UserError(f"autoencoder: expected one that encodes, found {autoencoder.name}")
    step, name = (config.multiple, "multiple") if config.fit == "bucket" else (config.size, "size")
    if step % autoencoder.factor:
        raise UserError(f"{name}: expected a multiple of {autoencoder.factor} for {autoencoder.name}, found {step}")
    return autoencoder if getattr(autoencoder, "codebook_size", None) is None else VQTokenizer(autoencoder)


def clean(text: str, changed: list[str], entities: bool = True) -> str:
    """Return a text in composed characters (NFC), without control characters, and without HTML entities.

    changed: the name of each change is added. entities: False leaves them as they are, for text about HTML.
    """
    steps: dict[str, Callable[[str], str]] = {
        "HTML entities decoded": _unescape if entities else str,
        "control characters removed": lambda text: CONTROL.sub("", re.sub("\r\n?", "\n", text)),
        "composed (NFC)": partial(unicodedata.normalize, "NFC"),
    }
    for name, step in steps.items():
        if (after := step(text)) != text:
            text = after
            changed.append(name)
    return text


def _unescape(text: str) -> str:
    """Decode entities, also of text that was escaped twice (&amp;quot;); "AT&T" and "?a=1&copy=2" stay."""
    while (after := ENTITY.sub(lambda match: html.unescape(match.group()), text)) != text:
        text = after
    return text


class Preparer:
    """Prepares documents one after another."""

    def __init__(self, config: BuildConfig, tokenizer: Tokenizer, text_only: bool) -> None:
        self.config, self.tokenizer, self.text_only = config, tokenizer, text_only
        self.autoencoder = build_autoencoder(config)
        kind = "codes" if isinstance(self.autoencoder, VQTokenizer) else "latent"
        self.suffix = f"{kind}.npy" if self.autoencoder else {"jpeg": "jpg"}.get(config.format, config.format)

    @property
    def encoding(self) -> Encoding | None:
        """The autoencoder in a manifest's words; None: the set has pixels."""
        if self.autoencoder is None:
            return None
        codebook = self.autoencoder.codebook_size if isinstance(self.autoencoder, VQTokenizer) else None
        return Encoding(self.autoencoder.name, self.autoencoder.fingerprint, self.autoencoder.factor, codebook)

    def __call__(self, item: Item) -> list[Outcome]:
        """Return the outcome of a document: several if it is text that is cut because it is too long.

        Raises UserError for latents that half precision cannot hold.
        """
        if isinstance(item, Fault):
            return [Dropped(item.key, "faulty", item.reason, True, item.lost)]
        if isinstance(item, LeftOut):
            return [Dropped(item.key, item.reason, item.detail)]
        try:
            for part in item.parts:
                if isinstance(part, str):
                    part.encode()
        except UnicodeEncodeError as error:  # JSON may have half a character, an emoji cut in two
            return [Dropped(item.key, "faulty", f"expected whole characters, found half of one at {error.start}", True)]
        changed = [*item.changed]
        if self.config.clean:
            parts = [clean(part, changed, not self.text_only) if isinstance(part, str) else part for part in item.parts]
            item = replace(item, parts=tuple(parts))
        return self._texts(item, changed) if self.text_only else [self._images(item, changed)]

    def _texts(self, item: Raw, changed: list[str]) -> list[Outcome]:
        dtype = "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4"
        ids = np.array(self.tokenizer.encode("\n".join(map(str, item.parts))), dtype)
        outcomes: list[Outcome] = []
        whole = (Fingerprint.of_bytes(ids.tobytes()),)  # of all pieces: they stand on one side
        for start in range(0, len(ids), self.config.max_tokens):
            piece = ids[start : start + self.config.max_tokens]
            data = piece.tobytes()
            hash_ = digest([("tokens", data)])
            document = Prepared(item.key, (data,), False, False, len(piece), (), hash_, fingerprints=whole)
            outcomes.append(document if start else replace(document, changed=tuple(changed)))
        return outcomes or [Dropped(item.key, "empty", "no tokens")]

    def _captions(self, item: Raw, changed: list[str]) -> Raw | Dropped:
        """Return a pair without captions of the wrong length, whose reasons are added; or why none is left."""
        config, (image, *captions) = self.config, item.parts
        kept, reasons = [], []
        for caption, weight in zip(captions, item.weights or [1.0] * len(captions), strict=True):
            assert isinstance(caption, str)
            if config.long == "cut" and (fits := self._cut(caption)) != caption:
                caption = fits
                changed.append("caption cut")
            if not config.min_caption <= len(caption) <= (config.max_caption or math.inf):
                reasons.append(("caption length", f"{len(caption)} characters"))
            elif (tokens := len(self.tokenizer.encode(caption))) > config.max_tokens:
                reasons.append(("too many tokens", f"{tokens} of at most {config.max_tokens}"))
            else:
                kept.append((caption, weight))
        if not kept:
            return Dropped(item.key, *reasons[0])
        texts, weights = zip(*kept, strict=True)
        weights = weights if len(set(weights)) > 1 else ()
        changed += [f"caption left out: {reason}" for reason, _ in reasons]
        return replace(item, parts=(image, *texts), weights=weights)

    def _cut(self, caption: str) -> str:
        """Return the whole words of a caption that fit; of a single word, the characters."""
        fits = caption[: self.config.max_caption]
        while len(ids := self.tokenizer.encode(fits)) > self.config.max_tokens:
            fits = self.tokenizer.decode(list(ids[: self.config.max_tokens])).rstrip("\ufffd")[: len(fits) - 1]
        if fits == caption:
            return caption
        words = re.match(r".*\S(?=\s)", caption[: len(fits) + 1], re.DOTALL)
        return words.group() if words else fits

    def _images(self, item: Raw, changed: list[str]) -> Outcome:
        config = self.config
        if item.pair:
            outcome = self._captions(item, changed)
            if isinstance(outcome, Dropped):
                return outcome
            item = outcome
        parts: list[str | np.ndarray] = []
        sizes: list[tuple[int, ...]] = []
        looks: list[Fingerprint] = []
        for part in item.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                decoded = part if isinstance(part, np.ndarray) else decode_image(part, background=config.background)
            except UserError as error:
                return Dropped(item.key, "faulty", str(error).removeprefix("image: "), faulty=True)
            changed += ["first of several frames"] if isinstance(part, bytes) and is_animated(part) else []
            rows, columns = decoded.shape[:2]
            if min(rows, columns) < config.min_side:
                return Dropped(item.key, "too small", f"{columns}x{rows} pixels")
            if config.max_side is not None and max(rows, columns) > config.max_side:
                return Dropped(item.key, "too large", f"{columns}x{rows} pixels")
            if config.max_aspect is not None and max(rows, columns) > config.max_aspect * min(rows, columns):
                return Dropped(item.key, "aspect ratio", f"{columns}x{rows} pixels")
            if config.fit == "pad":
                image, inside = pad(decoded, config.size, config.background)
                sizes.append((config.size, config.size, *inside))
                looks.append(Fingerprint.of_image(unpad(image, inside)))
            else:
                shape = bucket(rows, columns, config.size, config.multiple) if config.fit == "bucket" else config.size
                image = fit(decoded, shape, smart=config.fit == "smart")
                share = image.shape[0] * columns / (rows * image.shape[1])
                changed += ["cropped by more than a quarter"] if min(share, 1 / share) < 0.75 else []
                sizes.append(image.shape[:2])
                looks.append(Fingerprint.of_image(image))
            parts.append(image)
        counts = [len(self.tokenizer.encode(part)) if isinstance(part, str) else None for part in parts]
        captions = [count for count in counts if count is not None] if item.pair else []
        tokens = max(captions) if captions else sum(count for count in counts if count)
        if tokens > config.max_tokens:
            return Dropped(item.key, "too many tokens", f"{tokens} of at most {config.max_tokens}")
        stored = tuple(part if isinstance(part, str) else self._encode(item.key, part) for part in parts)
        hash_ = digest(to_members("", stored, item.pair, self.suffix, item.weights, item.roles))
        several = tuple(zip(captions, item.weights or [1.0] * len(captions), strict=True)) if captions[1:] else ()
        return Prepared(
            item.key,
            stored,
            item.pair,
            is_conditional(counts),
            tokens,
            tuple(sizes),
            hash_,
            weights=item.weights,
            roles=item.roles,
            captions=several,
            changed=tuple(changed),
            fingerprints=tuple(looks) or (Fingerprint.of_bytes(hash_),),
            heldout=item.heldout,
            followed=any(takewhile(lambda count: count is not None, reversed(counts))) and None in counts,
        )

    def _encode(self, key: str, pixels: np.ndarray) -> bytes:
        """Return an image file, or latents or codes as .npy. Each image alone: it must not depend on its neighbours."""
        stream = io.BytesIO()
        if self.autoencoder is None:
            PIL.Image.fromarray(pixels).save(stream, self.config.format, **QUALITY[self.config.format])
            return stream.getvalue()
        latent = self.autoencoder.encode(pixels[None])[0].cpu().numpy()
        if isinstance(self.autoencoder, VQTokenizer):
            latent = latent.astype("<u2" if self.autoencoder.codebook_size <= 1 << 16 else "<i4")
        else:
            with np.errstate(over="ignore"):
                latent = latent.astype("<f2")
            if not np.isfinite(latent).all():
                raise UserError(f"{key}: expected finite latents of {self.autoencoder.name} in float16, found others")
        np.save(stream, latent, allow_pickle=False)
        return stream.getvalue()
