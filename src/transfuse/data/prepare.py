"""A document as it was read, made into what is stored: filtered, cut to size, encoded, counted, hashed.

The outcome depends on the document and the settings alone, so documents may be prepared anywhere, in any order.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import PIL.Image
import tyro

from ..autoencoders import Autoencoder, VQTokenizer, open_autoencoder
from ..errors import UserError
from ..images import decode_image, fit
from ..sequence import Tokenizer
from .dataset import Encoding, digest, to_members
from .groups import Fingerprint
from .readers import Columns, Fault, Raw
from .sources import is_conditional

MOST_SIDE = 16_384  # pixels: the index counts to 65,535, and a bucket may be wider than `size`
WIDEST = 2.0  # aspect ratio of the widest and the tallest bucket
QUALITY = {"jpeg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95, "method": 4}, "png": {}}


@dataclass(frozen=True)
class BuildConfig:
    """The content of a data set and how it is stored; together with its source, it decides every byte."""

    size: int = 64
    """pixels of a side; images are cut to their middle square and scaled"""
    buckets: bool = False
    """keep the shape: rows and columns are the nearest of those with about size x size pixels, at most 2 : 1"""
    multiple: int = 16
    """of which rows and columns of buckets are multiples (a patch's side in pixels, or several)"""
    format: Literal["png", "jpeg", "webp"] = "png"
    """of stored images; png keeps every pixel"""
    autoencoder: str = ""
    """store its latents, or codes, in place of images: a folder, or the name of a bundled one"""
    tokenizer: str = ""
    """a tokenizer.json, a folder with one (a data set, a model), or a sentencepiece .model; none: one is trained"""
    vocabulary: int = 4096
    """ids of a tokenizer that is trained on the source"""
    min_side: int = 1
    """drop images whose shorter side has fewer pixels; others are enlarged where they must"""
    max_aspect: float | None = None
    """drop images whose longer side is more than this many times the shorter"""
    min_caption: int = 1
    """drop captions with fewer characters, and images without another caption"""
    max_caption: int | None = None
    """or more"""
    max_tokens: int = 500
    """drop documents with images that have more tokens of text; cut text alone into documents of this length"""
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
        if self.columns.count < 0:
            raise ValueError(f"count: expected at least 0, found {self.columns.count}")
        if self.heldout is not None and not 0 <= self.heldout < 1:
            raise ValueError(f"heldout: expected a share from 0 to below 1, found {self.heldout}")
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ValueError(f"max_aspect: expected at least 1, found {self.max_aspect}")
        if self.buckets and self.size % self.multiple:
            raise ValueError(f"size: expected a multiple of {self.multiple} (multiple) with buckets, found {self.size}")


@dataclass(frozen=True)
class Prepared:
    """A document ready to be stored.

    key: its name in the source. parts: text, and images as bytes; or token ids alone, as bytes. conditional: text
    comes before its last image. tokens: of its text; of several captions, of the longest. sizes: rows and columns of
    its images, in pixels. captions: tokens and weight of each of several captions. changed: a reason for each change
    that was made to its content. fingerprints: of its images, or of its text. heldout: its side in the data set that it
    comes from.
    """

    key: str
    parts: tuple[str | bytes, ...]
    pair: bool
    conditional: bool
    tokens: int
    sizes: tuple[tuple[int, int], ...]
    hash: bytes
    weights: tuple[float, ...] = ()
    captions: tuple[tuple[int, float], ...] = ()
    changed: tuple[str, ...] = ()
    fingerprints: tuple[Fingerprint, ...] = ()
    heldout: bool | None = None


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
    step, name = (config.multiple, "multiple") if config.buckets else (config.size, "size")
    if step % autoencoder.factor:
        raise UserError(f"{name}: expected a multiple of {autoencoder.factor} for {autoencoder.name}, found {step}")
    return autoencoder if getattr(autoencoder, "codebook_size", None) is None else VQTokenizer(autoencoder)


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

    def __call__(self, item: Raw | Fault) -> list[Outcome]:
        """Return the outcome of a document: several if it is text that is cut because it is too long.

        Raises UserError for latents that half precision cannot hold.
        """
        if isinstance(item, Fault):
            return [Dropped(item.key, "faulty", item.reason, True, item.lost)]
        try:
            for part in item.parts:
                if isinstance(part, str):
                    part.encode()
        except UnicodeEncodeError as error:  # JSON may have half a character, an emoji cut in two
            return [Dropped(item.key, "faulty", f"expected whole characters, found half of one at {error.start}", True)]
        return self._texts(item) if self.text_only else [self._images(item)]

    def _texts(self, item: Raw) -> list[Outcome]:
        dtype = "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4"
        ids = np.array(self.tokenizer.encode("\n".join(map(str, item.parts))), dtype)
        outcomes: list[Outcome] = []
        whole = (Fingerprint.of_bytes(ids.tobytes()),)  # of all pieces: they stand on one side
        for start in range(0, len(ids), self.config.max_tokens):
            piece = ids[start : start + self.config.max_tokens]
            data = piece.tobytes()
            hash_ = digest([("tokens", data)])
            outcomes.append(Prepared(item.key, (data,), False, False, len(piece), (), hash_, fingerprints=whole))
        return outcomes or [Dropped(item.key, "empty", "no tokens")]

    def _captions(self, item: Raw) -> tuple[Raw, tuple[str, ...]] | Dropped:
        """Return a pair without captions of the wrong length, and the reason for each; or why none is left."""
        config, (image, *captions) = self.config, item.parts
        kept, reasons = [], []
        for caption, weight in zip(captions, item.weights or [1.0] * len(captions), strict=True):
            assert isinstance(caption, str)
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
        return replace(item, parts=(image, *texts), weights=weights), tuple(
            f"caption left out: {r}" for r, _ in reasons
        )

    def _images(self, item: Raw) -> Outcome:
        config = self.config
        changed: tuple[str, ...] = ()
        if item.pair:
            outcome = self._captions(item)
            if isinstance(outcome, Dropped):
                return outcome
            item, changed = outcome
        parts: list[str | np.ndarray] = []
        for part in item.parts:
            if isinstance(part, str):
                parts.append(part)
                continue
            try:
                pixels = part if isinstance(part, np.ndarray) else decode_image(part, "image")
            except UserError as error:
                return Dropped(item.key, "faulty", str(error).removeprefix("image: "), faulty=True)
            rows, columns = pixels.shape[:2]
            if min(rows, columns) < config.min_side:
                return Dropped(item.key, "too small", f"{columns}x{rows} pixels")
            if config.max_aspect is not None and max(rows, columns) > config.max_aspect * min(rows, columns):
                return Dropped(item.key, "aspect ratio", f"{columns}x{rows} pixels")
            shape = bucket(rows, columns, config.size, config.multiple) if config.buckets else config.size
            parts.append(fit(pixels, shape))
        counts = [len(self.tokenizer.encode(part)) if isinstance(part, str) else None for part in parts]
        captions = [count for count in counts if count is not None] if item.pair else []
        tokens = max(captions) if captions else sum(count for count in counts if count)
        if tokens > config.max_tokens:
            return Dropped(item.key, "too many tokens", f"{tokens} of at most {config.max_tokens}")
        sizes = tuple(part.shape[:2] for part in parts if isinstance(part, np.ndarray))
        looks = tuple(Fingerprint.of_image(part) for part in parts if isinstance(part, np.ndarray))
        stored = tuple(part if isinstance(part, str) else self._encode(item.key, part) for part in parts)
        hash_ = digest(to_members("", stored, item.pair, self.suffix, item.weights))
        several = tuple(zip(captions, item.weights or [1.0] * len(captions), strict=True)) if captions[1:] else ()
        return Prepared(
            item.key,
            stored,
            item.pair,
            is_conditional(counts),
            tokens,
            sizes,
            hash_,
            weights=item.weights,
            captions=several,
            changed=changed,
            fingerprints=looks or (Fingerprint.of_bytes(hash_),),
            heldout=item.heldout,
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
