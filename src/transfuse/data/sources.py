"""Sources of documents: each is an endless list, and item i is a function of (seed, i) alone.

scenes = ScenePairs(World(WorldConfig(size=32)), tokenizer, Pixels(), PairConfig(), seed=0)
scenes[17]      # always the same document: a caption and a picture, in either order
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch

from ..autoencoders import Autoencoder, DeferredEncoder
from ..draws import Draws
from ..rng import generator_for
from ..sequence import Document, Image, SequenceFormat, Text, Tokenizer, count_positions, images_alone, unconditional
from . import bundled

BLOCK = 32
"""pictures that a network encodes together"""


class Source(Protocol):
    """Documents by number; `sample` is the number the document carries (the mixture's, not the source's)."""

    name: str

    @property
    def epoch(self) -> int | None:
        """How many documents before they come again; None: they never do."""

    def document(self, index: int, sample: int) -> Document: ...

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: SequenceFormat) -> np.ndarray:
        """Positions `[n]` that documents will take, by index and sample `[n]`, found without making their pictures."""


@runtime_checkable
class Measured(Protocol):
    """A source that knows the mean positions of its documents over one pass."""

    def mean_length(self, grammar: SequenceFormat) -> float: ...


@dataclass(frozen=True)
class PairConfig:
    """How a picture and its caption become a document (Transfusion section 4.1; the drop rate is our choice)."""

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


Order = Literal["draw", "caption", "unconditional"]


def pair_order(config: PairConfig, seed: int, sample: int) -> Order:
    """What a pair teaches, by the draw of (seed, sample): to draw, to caption, or to draw without a caption."""
    draws = Draws("pair", seed, sample)
    if not draws.chance(config.caption_first):
        return "caption"
    return "unconditional" if draws.chance(config.caption_drop) else "draw"


def before_words(image: Image, config: PairConfig) -> Image:
    """A picture that comes before its words: noised up to the limit, or shown clean and not learned."""
    cap = config.image_first_max_timestep
    return replace(image, target=False) if cap == 0 else replace(image, max_timestep=cap)


def pair_document(text: tuple[int, ...], image: Image, config: PairConfig, seed: int, sample: int) -> Document:
    """One caption and one image, ordered, capped and dropped as `pair_order` says."""
    order = pair_order(config, seed, sample)
    if order == "caption":
        return Document([before_words(image, config), Text(text)], sample=sample)
    document = Document([Text(text), image], sample=sample)
    return unconditional(document) if order == "unconditional" else document


def interleaved_document(parts: Sequence[Text | Image], config: PairConfig, seed: int, sample: int) -> Document:
    """Texts and images in the order they have, noised and dropped by that order.

    An image with text before it is drawn: it sees every level of noise, whatever follows it. An image before all text
    is shown as `before_words` says. In a document without text every image is drawn.
    Of the documents with text before their last image, the share `caption_drop` becomes `unconditional(document)`: its
    last image alone. The text after that image goes, too, because nothing follows it in the sampler's null branch.
    """
    tokens = [len(part.ids) if isinstance(part, Text) else None for part in parts]
    first_text = next((place for place, count in enumerate(tokens) if count), 0)
    shown = [
        before_words(part, config) if isinstance(part, Image) and place < first_text else part
        for place, part in enumerate(parts)
    ]
    document = Document(shown, sample=sample)
    if is_conditional(tokens) and caption_dropped(config, seed, sample):
        return unconditional(document)
    return document


def is_conditional(tokens: Sequence[int | None]) -> bool:
    """Whether a document has text before its last image; `tokens` counts those of each part, None is an image."""
    images = [place for place, count in enumerate(tokens) if count is None]
    return any(tokens[: images[-1]]) if images else False


def caption_dropped(config: PairConfig, seed: int, sample: int) -> bool:
    """Whether a document of several parts loses its text, if it may, by the draw of (seed, sample)."""
    return Draws("interleaved", seed, sample).chance(config.caption_drop)


def images_of(pictures: np.ndarray, autoencoder: Autoencoder) -> list[Image]:
    """Pictures uint8 `[image, row, column, 3]` as a document has them: encoded, or to be encoded later."""
    if not isinstance(autoencoder, DeferredEncoder):
        return [Image(latent) for latent in autoencoder.encode(pictures)]
    shape = autoencoder.channels, *(side // autoencoder.factor for side in pictures.shape[1:3])
    return [Image(torch.empty(shape, device="meta"), pixels=pixels) for pixels in torch.from_numpy(pictures)]


class _Images:
    """Pictures by number, as documents have them, in the memory of the block encoded last.

    A network encodes a block of pictures at once, always the same ones together, for speed: so a latent depends on its
    number alone, whatever was asked for before.
    """

    def __init__(self, render: Callable[[int], np.ndarray], autoencoder: Autoencoder) -> None:
        self.render, self.autoencoder = render, autoencoder
        self.block_size = 1 if autoencoder.factor == 1 or isinstance(autoencoder, DeferredEncoder) else BLOCK
        self._block: tuple[int, list[Image]] = (-1, [])

    def __getitem__(self, number: int) -> Image:
        block, place = divmod(number, self.block_size)
        if self._block[0] != block:
            first = number - place
            pictures = np.stack([self.render(other) for other in range(first, first + self.block_size)])
            self._block = block, images_of(pictures, self.autoencoder)
        image = self._block[1][place]
        return replace(image, latent=image.latent.clone())  # not the whole block with it


def _patches(world: bundled.World, factor: int, grammar: SequenceFormat) -> int:
    """Of a picture of the world, through an autoencoder of that factor."""
    return int(world.config.size // (factor * grammar.patch_size)) ** 2


class ScenePairs:
    """Pictures of a world and their captions."""

    name = "world"
    epoch = None

    def __init__(
        self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, config: PairConfig, seed: int
    ) -> None:
        self.world, self.tokenizer, self.autoencoder = world, tokenizer, autoencoder
        self.config, self.seed = config, seed
        self.images = _Images(self._render, autoencoder)

    def document(self, index: int, sample: int) -> Document:
        text = self.tokenizer.encode(bundled.caption(self.world.scene(index), index))
        return pair_document(text, self.images[index], self.config, self.seed, sample)

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: SequenceFormat) -> np.ndarray:
        patches = _patches(self.world, self.autoencoder.factor, grammar)
        tokens = [
            0
            if pair_order(self.config, self.seed, sample) == "unconditional"
            else len(self.tokenizer.encode(bundled.caption(self.world.scene(index), index)))
            for index, sample in zip(indices.tolist(), samples.tolist(), strict=True)
        ]
        return count_positions(np.array(tokens), [patches])

    def _render(self, number: int) -> np.ndarray:
        return self.world.render(self.world.scene(number))


@dataclass(frozen=True)
class EditConfig:
    """How a picture, an instruction and the picture it asks for become a document (Transfusion section 4.4).

    The first picture is shown clean, and like the words is not learned. The paper gives no drop rates; these are
    InstructPix2Pix's.
    """

    instruction_drop: float = 0.05
    """share whose instruction is left out, for guidance by the picture alone"""
    all_drop: float = 0.05
    """share whose instruction and first picture are left out, for guidance by both"""
    count: int | None = None
    """of different edits, which come again in the same order (the paper has 8,000); None: there is no end of them"""

    def __post_init__(self) -> None:
        for name in ("instruction_drop", "all_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.edits.{name}: expected a share from 0 to 1, found {getattr(self, name)}")
        if self.count is not None and self.count < 1:
            raise ValueError(f"data.edits.count: expected at least 1, found {self.count}")
        if self.instruction_drop + self.all_drop > 1:
            raise ValueError(
                f"data.edits.all_drop: expected at most 1 together with instruction_drop, found "
                f"{self.instruction_drop + self.all_drop:g}"
            )


Shown = Literal["all", "images", "nothing"]


def edit_shown(config: EditConfig, seed: int, sample: int) -> Shown:
    """What is shown before the target, by the draw of (seed, sample)."""
    ticket = Draws("edit document", seed, sample).word() / (1 << 32)
    if ticket < config.all_drop:
        return "nothing"
    return "images" if ticket < config.all_drop + config.instruction_drop else "all"


class SceneEdits:
    """Edits of a world: a picture, an instruction, the picture that it asks for."""

    name = "edits"

    def __init__(
        self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, config: EditConfig, seed: int
    ) -> None:
        self.world, self.tokenizer, self.config, self.seed = world, tokenizer, config, seed
        self.epoch, self.factor = config.count, autoencoder.factor
        self.images = _Images(self._render, autoencoder)

    def document(self, index: int, sample: int) -> Document:
        number = index % self.epoch if self.epoch else index
        source, target = self.images[2 * number], self.images[2 * number + 1]
        # Not learned: people say it. A model that learned to would begin captions of pictures with instructions.
        words = Text(self.tokenizer.encode(self.edit(number).instruction), predict=False)
        document = Document([replace(source, target=False), words, target], sample=sample)
        shown = edit_shown(self.config, self.seed, sample)
        if shown == "all":
            return document
        return images_alone(document) if shown == "images" else unconditional(document)

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: SequenceFormat) -> np.ndarray:
        patches = _patches(self.world, self.factor, grammar)
        found = []
        for index, sample in zip(indices.tolist(), samples.tolist(), strict=True):
            shown = edit_shown(self.config, self.seed, sample)
            number = index % self.epoch if self.epoch else index
            words = len(self.tokenizer.encode(self.edit(number).instruction)) if shown == "all" else 0
            found.append(int(count_positions(np.array([words]), [patches] * (1 if shown == "nothing" else 2))[0]))
        return np.array(found)

    def edit(self, number: int) -> bundled.Edit:
        """The edit of a number: a function of it and the world."""
        return bundled.edit(self.world.scene(number), self.world, number)

    def _render(self, number: int) -> np.ndarray:
        """Sources have even numbers, their targets the next ones."""
        change = self.edit(number // 2)
        return self.world.render(change.target if number % 2 else change.source)


class Texts:
    """Text-only documents: all of them in a new order each epoch."""

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

    def mean_length(self, grammar: SequenceFormat) -> float:
        """Mean positions of a document over a pass."""
        return float(count_positions(self._tokens(), []).mean())

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: SequenceFormat) -> np.ndarray:
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
