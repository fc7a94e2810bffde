"""Sources of documents: each is an endless list, and document i is a function of (seed, i) alone.

pairs = StoredImages(DataSet("photos-64"), tokenizer, Pixels(), PairConfig(), seed=0)
pairs.document(17, sample=40)           # the 18th of the first epoch, as the mixture's sample 40
pairs.lengths(...)                      # the positions of many, from the index alone
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from ..autoencoders import Autoencoder, DeferredEncoder, VQTokenizer
from ..errors import UserError
from ..rng import Draws, generator_for
from ..sequence import Document, Image, SequenceFormat, Text, Tokenizer, count_positions, layout_document, unconditional
from ..sequence.chat import Message, chat_sample
from .dataset import CorruptSampleError, DataSet, Split, StoredDocument, as_latent
from .packing import Shuffle

CHUNK = 1 << 20  # documents whose lengths are added up at once
SAMPLED = 2_000  # documents measured of a source that never ends
MOST_MEASURED = 100_000  # documents measured of a source that does not know its mean length
MEASURED_DIALOGUES = 64  # of a data set: they tell what the template adds to all


class Source(Protocol):
    """Documents by number. `sample` is the number a document carries: the mixture's, not the source's."""

    name: str

    @property
    def epoch(self) -> int | None:
        """The number of documents before they repeat; None: they never do."""

    def document(self, index: int, sample: int) -> Document: ...

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        """Return the positions `[n]` that documents will take, by index and sample `[n]`, without making images."""


@runtime_checkable
class Measured(Protocol):
    """A source that knows the mean positions of its documents over one pass."""

    def mean_length(self, form: SequenceFormat) -> float: ...


def mean_length(source: Source, form: SequenceFormat) -> float:
    """Return the mean positions of a document over a pass, or over the first `SAMPLED` of a source that never ends."""
    if isinstance(source, Measured):
        return source.mean_length(form)
    count = SAMPLED if source.epoch is None else min(MOST_MEASURED, source.epoch)
    return float(source.lengths(np.arange(count), np.arange(count), form).mean())


# --- pairs and interleaved documents ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairConfig:
    """Order, noise limit and caption drop of image-caption pairs (Transfusion section 4.1; the drop rate is ours)."""

    caption_first: float = 0.8
    """share of pairs in which the caption comes first: the model draws; in the rest it captions"""
    image_first_max_timestep: int | None = 500
    """largest timestep of an image that comes before its caption (section 4.3.4); None: no limit; 0: it is shown clean,
    as a sampler shows it, and not learned"""
    caption_drop: float = 0.1
    """share of the caption-first pairs, and of documents of several parts whose last image has text before it, that
    lose their text, for guidance; captioning documents keep theirs"""

    def __post_init__(self) -> None:
        for name in ("caption_first", "caption_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.pairs.{name}: expected a share from 0 to 1, found {getattr(self, name)}")
        if self.image_first_max_timestep is not None and self.image_first_max_timestep < 0:
            raise ValueError(
                f"data.pairs.image_first_max_timestep: expected at least 0, found {self.image_first_max_timestep}"
            )


def pair_order(config: PairConfig, seed: int, sample: int) -> Literal["draw", "caption", "unconditional"]:
    """Return what a pair teaches, by (seed, sample): to draw, to caption, or to draw without a caption."""
    draws = Draws("pair", seed, sample)
    if not draws.chance(config.caption_first):
        return "caption"
    return "unconditional" if draws.chance(config.caption_drop) else "draw"


def pair_document(text: tuple[int, ...], image: Image, config: PairConfig, seed: int, sample: int) -> Document:
    """Return the document of one caption and one image, ordered, capped and dropped as `pair_order` says."""
    order = pair_order(config, seed, sample)
    if order == "caption":
        return Document([_before_text(image, config), Text(text)], sample=sample)
    document = Document([Text(text), image], sample=sample)
    return unconditional(document) if order == "unconditional" else document


def _before_text(image: Image, config: PairConfig) -> Image:
    """Return an image that comes before its text: noised up to the limit, or shown clean and not learned."""
    cap = config.image_first_max_timestep
    return replace(image, target=False) if cap == 0 else replace(image, max_timestep=cap)


def interleaved_document(parts: Sequence[Text | Image], config: PairConfig, seed: int, sample: int) -> Document:
    """Return the document of texts and images in their order, noised and dropped by that order.

    An image with text before it is drawn: it sees every level of noise, whatever follows it. An image before all text
    has capped noise, or is shown clean. In a document without text every image is drawn.
    Of the documents with text before their last image, the share `caption_drop` becomes `unconditional(document)`: its
    last image alone. The text after that image goes, too, because nothing follows it in the sampler's null branch.
    """
    tokens = [len(part.ids) if isinstance(part, Text) else None for part in parts]
    first_text = next((place for place, count in enumerate(tokens) if count), 0)
    capped = [
        _before_text(part, config) if isinstance(part, Image) and place < first_text else part
        for place, part in enumerate(parts)
    ]
    document = Document(capped, sample=sample)
    if is_conditional(tokens) and caption_dropped(config, seed, sample):
        return unconditional(document)
    return document


def is_conditional(tokens: Sequence[int | None]) -> bool:
    """Return True if a document has text before its last image. tokens: of each part; None: an image."""
    images = [place for place, count in enumerate(tokens) if count is None]
    return any(tokens[: images[-1]]) if images else False


def caption_dropped(config: PairConfig, seed: int, sample: int) -> bool:
    """Return True if a conditional document of several parts loses its text, by (seed, sample)."""
    return Draws("interleaved", seed, sample).chance(config.caption_drop)


def document_images(pixels: np.ndarray, autoencoder: Autoencoder) -> list[Image]:
    """Return pixels, uint8 `[image, row, column, 3]`, as images of a document: encoded, or to be encoded later."""
    if not isinstance(autoencoder, DeferredEncoder):
        return [Image(latent) for latent in autoencoder.encode(pixels)]
    shape = autoencoder.channels, *(side // autoencoder.factor for side in pixels.shape[1:3])
    return [Image(torch.empty(shape, device="meta"), pixels=image) for image in torch.from_numpy(pixels)]


def blank_image(form: SequenceFormat, channels: int, rows: int, columns: int) -> Image:
    """Return an image of which only the shape counts, in latent elements: for a document whose length is asked for."""
    if form.first_code is None:
        return Image(torch.empty(channels, rows, columns, device="meta"))
    return Image(torch.zeros(rows, columns, dtype=torch.int64))


class Texts:
    """Text-only documents: all of them, in a new order each epoch."""

    name = "glosses"
    _counted: ClassVar[dict[tuple[str, tuple[str, ...]], np.ndarray]] = {}
    """tokens of each text, by tokenizer: several sources of a process read the same texts"""

    def __init__(self, texts: Sequence[str], tokenizer: Tokenizer, seed: int) -> None:
        if not texts:
            raise ValueError("texts: expected at least one, found none")
        self.texts, self.tokenizer, self.seed = tuple(texts), tokenizer, seed
        self.epoch = len(texts)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def document(self, index: int, sample: int) -> Document:
        return Document([Text(self.tokenizer.encode(self.texts[self._place(index)]))], sample=sample)

    def mean_length(self, form: SequenceFormat) -> float:
        return float(count_positions(self._tokens(), []).mean())

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        return count_positions(self._tokens()[[self._place(index) for index in indices.tolist()]], [])

    def _tokens(self) -> np.ndarray:
        key = self.tokenizer.fingerprint, self.texts
        if key not in self._counted:
            self._counted[key] = np.array([len(self.tokenizer.encode(text)) for text in self.texts])
        return self._counted[key]

    def _place(self, index: int) -> int:
        epoch, place = divmod(index, len(self.texts))
        if self._order[0] != epoch:
            order = torch.randperm(len(self.texts), generator=generator_for(self.seed, "texts", epoch))
            self._order = (epoch, order.numpy())
        return int(self._order[1][place])


# --- data sets on disk ------------------------------------------------------------------------------------------------


class StoredTexts:
    """Documents of a data set's token ids: each once an epoch, in a new order each epoch."""

    def __init__(self, data: DataSet, seed: int, split: Split = "train") -> None:
        self.data, self.seed, self.split, self.name = data, seed, split, data.path
        self.epoch = data.size(split)
        if not self.epoch:
            raise UserError(f"{data.path}: expected documents to {split} on, found none of {len(data)}")

    def document(self, index: int, sample: int) -> Document:
        """Return a document. Raises CorruptSampleError."""
        ids = self.data.read_ids(self.number(index))
        return Document([Text(tuple(ids.tolist()))], sample=sample)

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        return self._expected_lengths(self.numbers(indices), form)

    def mean_length(self, form: SequenceFormat) -> float:
        total = 0.0
        for start in range(0, self.epoch, CHUNK):
            numbers = self.data.number(self.split, np.arange(start, min(start + CHUNK, self.epoch)))
            total += float(self._expected_lengths(numbers, form).sum())
        return total / self.epoch

    def number(self, index: int) -> int:
        """Return which document of the set is number `index` of the stream."""
        epoch, place = divmod(index, self.epoch)
        return self.data.number(self.split, Shuffle(self.epoch, self.seed, self.split, epoch)(place))

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """Return which documents of the set are numbers `[n]` of the stream."""
        epochs, places = np.divmod(indices, self.epoch)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            places[chosen] = Shuffle(self.epoch, self.seed, self.split, epoch)(places[chosen])
        return self.data.number(self.split, places)

    def _expected_lengths(self, numbers: np.ndarray, form: SequenceFormat) -> np.ndarray:
        """Return the positions of documents of the set, in the mean over everything that is drawn at random."""
        return count_positions(self.data.documents["tokens"][numbers].astype(np.int64), [])


class StoredImages(StoredTexts):
    """Documents of a data set with images: pairs, which training puts in either order, and interleaved documents.

    Raises UserError for a set of another autoencoder's latents, or of latents where codes are needed.
    """

    def __init__(
        self,
        data: DataSet,
        tokenizer: Tokenizer,
        autoencoder: Autoencoder,
        config: PairConfig,
        seed: int,
        split: Split = "train",
    ) -> None:
        super().__init__(data, seed, split)
        self.tokenizer, self.autoencoder, self.config = tokenizer, autoencoder, config
        encoding = data.manifest.encoding
        if encoding is not None and encoding.fingerprint != autoencoder.fingerprint:
            raise UserError(
                f"{data.path}: expected latents of {autoencoder.name} ({autoencoder.fingerprint}), as data.autoencoder "
                f"says, found those of {encoding.autoencoder} ({encoding.fingerprint})"
            )
        if encoding is not None and (encoding.codebook is not None) != isinstance(autoencoder, VQTokenizer):
            stored = "latents" if encoding.codebook is None else "codes"
            raise UserError(f"{data.path}: expected what model.images needs, found {stored}")

    def document(self, index: int, sample: int) -> Document:
        """Return a document. Raises CorruptSampleError."""
        number = self.number(index)
        stored = self.data.read(number)
        shown, expected = stored.parts, stored.tokens
        first, count = (int(values[0]) for values in self.data.captions_of(np.array([number])))
        if count:
            drawn = self._drawn_caption(number, index // self.epoch, first, count)
            shown, expected = (shown[0], shown[1 + drawn]), int(self.data.captions["tokens"][first + drawn])
        parts = self.encoded(number, stored, shown, expected)
        if stored.pair:
            image, text = parts
            assert isinstance(image, Image)
            assert isinstance(text, Text)
            return pair_document(text.ids, image, self.config, self.seed, sample)
        return interleaved_document(parts, self.config, self.seed, sample)

    def encoded(self, number: int, stored: StoredDocument, shown: Sequence[Any], expected: int) -> list[Text | Image]:
        """Return parts of a stored document as a model reads them. Raises CorruptSampleError.

        expected: tokens of their texts, by the index.
        """
        parts: list[Text | Image] = []
        areas = self._areas(number)
        for part in shown:
            if isinstance(part, str):
                parts.append(Text(self.tokenizer.encode(part)))
            elif isinstance(part, bytes):
                pixels = self.data.decode(number, stored, part)
                parts.append(replace(document_images(pixels[None], self.autoencoder)[0], content=next(areas)))
            else:
                parts.append(Image(as_latent(part), content=next(areas)))
        tokens = sum(len(part.ids) for part in parts if isinstance(part, Text))
        if tokens != expected:
            raise self.data.corrupt(number, f"{tokens} tokens, not as many as the index says", stored.key)
        return parts

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        numbers, side = self.numbers(indices), form.patch_size * self.autoencoder.factor
        documents = self.data.documents[numbers]
        tokens = documents["tokens"].astype(np.int64)
        images = self.data.image_positions(numbers, side)
        first, counts = self.data.captions_of(numbers)
        for place in np.flatnonzero(counts):
            epoch, several = int(indices[place]) // self.epoch, (int(first[place]), int(counts[place]))
            drawn = self._drawn_caption(int(numbers[place]), epoch, *several)
            tokens[place] = self.data.captions["tokens"][several[0] + drawn]
        copies = self.data.copy_positions(numbers, side) if form.clean_copy else np.zeros_like(images)
        for place in np.flatnonzero(documents["pair"]):
            order = pair_order(self.config, self.seed, int(samples[place]))
            if order == "unconditional":
                tokens[place] = 0
            if order != "caption" or not tokens[place]:
                copies[place] = 0
        conditional = np.flatnonzero(documents["conditional"])
        dropped = [i for i in conditional if caption_dropped(self.config, self.seed, int(samples[i]))]
        tokens[dropped] = copies[dropped] = 0
        images[dropped] = self.data.image_positions(numbers[dropped], side, last_only=True)
        return count_positions(tokens, []) + images + copies

    def _expected_lengths(self, numbers: np.ndarray, form: SequenceFormat) -> np.ndarray:
        documents, side = self.data.documents[numbers], form.patch_size * self.autoencoder.factor
        tokens, images = self.data.expected_tokens(numbers), self.data.image_positions(numbers, side)
        copies = self.data.copy_positions(numbers, side) if form.clean_copy else np.zeros_like(images)
        lengths = count_positions(tokens, []) + images + copies
        pair, conditional = documents["pair"], documents["conditional"]
        lengths[pair] -= self.config.caption_first * (self.config.caption_drop * tokens[pair] + copies[pair])
        last = self.data.image_positions(numbers[conditional], side, last_only=True)
        left_out = tokens[conditional] + images[conditional] + copies[conditional] - last
        lengths[conditional] -= self.config.caption_drop * left_out
        return lengths

    def _areas(self, number: int) -> Iterator[tuple[int, int, int, int] | None]:
        """Yield (top, bottom, left, right) of what is not padding in a document's latents or codes; None: all of it."""
        if not self.data.manifest.padded:
            yield from repeat(None)
        factor = self.autoencoder.factor
        for whole, inside in zip(self.data.sizes(number), self.data.insides(number), strict=True):
            begins = [(w - i) // 2 for w, i in zip(whole, inside, strict=True)]
            sides = [(b // factor, -(-(b + i) // factor)) for b, i in zip(begins, inside, strict=True)]
            yield (*sides[0], *sides[1]) if inside != whole else None

    def _drawn_caption(self, number: int, epoch: int, first: int, count: int) -> int:
        """Return which of a document's captions an epoch shows, by (seed, document, epoch) and the captions' weights.

        first, count: its rows in the index of captions.
        """
        ends = self.data.captions["weight"][first : first + count].astype(np.float64).cumsum()
        drawn = Draws("caption", self.seed, number, epoch).word() / (1 << 32)
        return int(np.searchsorted(ends, drawn * ends[-1], side="right"))


class StoredDialogues(StoredImages):
    """The dialogues of a data set: the assistant's words and images are learned, the others' are not."""

    def document(self, index: int, sample: int) -> Document:
        """Return a document. Raises CorruptSampleError."""
        number = self.number(index)
        stored = self.data.read(number)
        encoded = self.encoded(number, stored, stored.parts, stored.tokens)
        images = (part for part in encoded if isinstance(part, Image))
        return self._written(stored, images, sample)

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        lengths = super().lengths(indices, samples, form)
        factor = self.autoencoder.factor
        for row, number in enumerate(self.numbers(indices).tolist()):
            sides = ((rows // factor, columns // factor) for rows, columns in self.data.sizes(number))
            blanks = (blank_image(form, self.autoencoder.channels, *shape) for shape in sides)
            with suppress(CorruptSampleError):  # which `document` reports
                lengths[row] = len(layout_document(self._written(self.data.read(number), blanks, 0), form))
        return lengths

    def mean_length(self, form: SequenceFormat) -> float:
        """Return the mean positions over a pass: by the index, with what the template adds to the first few."""
        first = np.arange(min(MEASURED_DIALOGUES, self.epoch))
        added = self.lengths(first, first, form) - self._expected_lengths(self.numbers(first), form)
        return super().mean_length(form) + float(added.mean())

    def _written(self, stored: StoredDocument, images: Iterator[Image], sample: int) -> Document:
        spoken = (part if isinstance(part, str) else next(images) for part in stored.parts)
        turns = groupby(zip(stored.roles, spoken, strict=True), key=lambda pair: pair[0])
        messages = [Message(role, tuple(part for _, part in turn)) for role, turn in turns]
        return chat_sample(self.tokenizer, messages, sample)


def has_dialogues(data: DataSet) -> bool:
    """Return True for a data set of dialogues: all of its documents are, or none is, so the first sound one tells."""
    for number in range(len(data) if data.manifest.kind == "pictures" else 0):
        with suppress(CorruptSampleError):
            return bool(data.read(number).roles)
    return False
