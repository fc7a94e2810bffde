"""Sources of the bundled data set: scenes with captions, edits of scenes, and dialogues about them.

scenes = ScenePairs(World(WorldConfig(size=32)), tokenizer, Pixels(), PairConfig(), seed=0)
scenes.document(17, sample=40)          # the 18th scene, as the mixture's sample 40
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, repeat
from typing import Literal

import numpy as np

from ..autoencoders import Autoencoder, DeferredEncoder
from ..rng import Draws
from ..sequence import (
    Document,
    Image,
    SequenceFormat,
    Text,
    Tokenizer,
    count_positions,
    images_alone,
    layout_document,
    unconditional,
)
from ..sequence.chat import Message, chat_sample
from . import bundled
from .sources import PairConfig, blank_image, document_images, pair_document, pair_order

IMAGE_BLOCK = 32  # images that a network encodes together


class SceneSource:
    """The images of scenes, by number. A subclass renders them and makes documents of them.

    A network encodes a block of images at once, always the same ones together, for speed: so a latent depends on its
    number alone, whatever was read before. The block encoded last is kept in memory.
    """

    epoch: int | None = None

    def __init__(self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, seed: int) -> None:
        self.world, self.tokenizer, self.autoencoder, self.seed = world, tokenizer, autoencoder, seed
        self._block: tuple[int, list[Image]] = (-1, [])

    def render(self, number: int) -> np.ndarray:
        """Return the pixels of an image, uint8 `[row, column, 3]`."""
        raise NotImplementedError

    def image(self, number: int) -> Image:
        """Return an image, encoded or to be encoded later."""
        alone = self.autoencoder.factor == 1 or isinstance(self.autoencoder, DeferredEncoder)
        block_size = 1 if alone else IMAGE_BLOCK
        block, place = divmod(number, block_size)
        if self._block[0] != block:
            pixels = np.stack([self.render(other) for other in range(number - place, number - place + block_size)])
            self._block = block, document_images(pixels, self.autoencoder)
        image = self._block[1][place]
        return replace(image, latent=image.latent.clone())  # without the rest of the block

    def patches(self, form: SequenceFormat) -> int:
        """Return the number of patches of an image."""
        return int(self.world.config.size // (self.autoencoder.factor * form.patch_size)) ** 2


class ScenePairs(SceneSource):
    """Scenes of the bundled data set and their captions."""

    name = "world"

    def __init__(
        self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, config: PairConfig, seed: int
    ) -> None:
        super().__init__(world, tokenizer, autoencoder, seed)
        self.config = config

    def document(self, index: int, sample: int) -> Document:
        return pair_document(self._caption(index), self.image(index), self.config, self.seed, sample)

    def _caption(self, index: int) -> tuple[int, ...]:
        return self.tokenizer.encode(bundled.caption(self.world.scene(index), index))

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        tokens, copied = np.zeros((2, len(indices)), dtype=np.int64)
        for place, (index, sample) in enumerate(zip(indices.tolist(), samples.tolist(), strict=True)):
            order = pair_order(self.config, self.seed, sample)
            if order != "unconditional":
                tokens[place] = len(self._caption(index))
            copied[place] = form.clean_copy and order == "caption"
        return count_positions(tokens, [self.patches(form)]) + copied * self.patches(form)

    def render(self, number: int) -> np.ndarray:
        return self.world.render(self.world.scene(number))


@dataclass(frozen=True)
class EditConfig:
    """Drop rates and number of edits: an image, an instruction, the image it asks for (Transfusion section 4.4).

    The first image is shown clean, and like the instruction is not learned. The paper gives no drop rates; these are
    InstructPix2Pix's.
    """

    instruction_drop: float = 0.05
    """share whose instruction is left out, for guidance by the image alone"""
    all_drop: float = 0.05
    """share whose instruction and first image are left out, for guidance by both"""
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


class SceneEdits(SceneSource):
    """Edits of the bundled data set's scenes: an image, an instruction, the image that it asks for.

    Images of even numbers are scenes, those of odd numbers the targets of the scenes before them.
    """

    name = "edits"

    def __init__(
        self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, config: EditConfig, seed: int
    ) -> None:
        super().__init__(world, tokenizer, autoencoder, seed)
        self.config, self.epoch = config, config.count

    def document(self, index: int, sample: int) -> Document:
        number = index % self.epoch if self.epoch else index
        before, after = self.image(2 * number), self.image(2 * number + 1)
        # Not learned: a model that learned to write instructions would begin captions with them.
        words = Text(self.tokenizer.encode(self.edit(number).instruction), predict=False)
        document = Document([replace(before, target=False), words, after], sample=sample)
        kept = self._kept(sample)
        if kept == "all":
            return document
        return images_alone(document) if kept == "images" else unconditional(document)

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        lengths, patches = [], self.patches(form)
        for index, sample in zip(indices.tolist(), samples.tolist(), strict=True):
            kept = self._kept(sample)
            number = index % self.epoch if self.epoch else index
            words = len(self.tokenizer.encode(self.edit(number).instruction)) if kept == "all" else 0
            lengths.append(int(count_positions(np.array([words]), [patches] * (1 if kept == "target" else 2))[0]))
        return np.array(lengths)

    def _kept(self, sample: int) -> Literal["all", "images", "target"]:
        """Return what is left of a document, by (seed, sample)."""
        draw = Draws("edit document", self.seed, sample).word() / (1 << 32)
        if draw < self.config.all_drop:
            return "target"
        return "images" if draw < self.config.all_drop + self.config.instruction_drop else "all"

    def edit(self, number: int) -> bundled.Edit:
        """Return the edit of a number: a function of it and the world."""
        return bundled.edit(self.world.scene(number), self.world, number)

    def render(self, number: int) -> np.ndarray:
        change = self.edit(number // 2)
        return self.world.render(change.target if number % 2 else change.source)


class SceneDialogues(SceneSource):
    """Conversations about scenes: the assistant's words and images are learned, the person's words are not.

    Image `MOST_IMAGES` * n + k is the k-th of dialogue n, or of another scene where the dialogue has fewer.
    """

    name = "dialogues"

    def document(self, index: int, sample: int) -> Document:
        return self._written(index, sample, map(self.image, count(bundled.MOST_IMAGES * index)))

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        side = self.world.config.size // self.autoencoder.factor
        blank = blank_image(form, self.autoencoder.channels, side, side)
        documents = (self._written(index, 0, repeat(blank)) for index in indices.tolist())
        return np.array([len(layout_document(document, form)) for document in documents])

    def _written(self, index: int, sample: int, images: Iterator[Image]) -> Document:
        """Return a dialogue in the chat template, with as many of the images as its turns show and draw."""
        messages: list[Message] = []
        for turn in dialogue(self.world, index):
            shown: tuple[Image, ...] = () if turn.shown is None else (next(images),)
            drawn: tuple[Image, ...] = () if turn.scene is None else (next(images),)
            messages += [Message("user", (*shown, turn.request)), Message("assistant", (turn.reply, *drawn))]
        return chat_sample(self.tokenizer, messages, sample)

    def render(self, number: int) -> np.ndarray:
        index, place = divmod(number, bundled.MOST_IMAGES)
        both = (scene for turn in dialogue(self.world, index) for scene in (turn.shown, turn.scene))
        scenes = [scene for scene in both if scene is not None]
        return self.world.render(scenes[min(place, len(scenes) - 1)])


@lru_cache(maxsize=4)
def dialogue(world: bundled.World, index: int) -> list[bundled.Turn]:
    """Return the turns of a dialogue, which are needed again for each of its images."""
    return bundled.dialogue(world, index)
