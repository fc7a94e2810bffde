"""Dialogues as training documents, in a chat template: about the bundled scenes, or of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby

import numpy as np
import torch

from ..autoencoders import Autoencoder
from ..sequence import Document, Image, SequenceFormat, Text, Tokenizer, layout_document
from ..sequence.chat import Message, chat_sample
from . import bundled
from .dataset import CorruptSampleError, DataSet, StoredDocument
from .scenes import SceneSource
from .sources import StoredImages

MEASURED = 64
"""dialogues of a data set that tell what the template adds to all"""


class SceneDialogues(SceneSource):
    """Conversations about scenes: the assistant's words and images are learned, the person's words are not.

    Image `MOST_IMAGES` * n + k is the k-th of dialogue n, or of another scene where the dialogue has fewer.
    """

    name = "dialogues"

    def __init__(self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, seed: int) -> None:
        super().__init__(world, tokenizer, autoencoder, seed)
        self._turns: tuple[int, list[bundled.Turn]] = (-1, [])

    def turns(self, index: int) -> list[bundled.Turn]:
        """Return the turns of a dialogue."""
        if self._turns[0] != index:
            self._turns = index, bundled.dialogue(self.world, index)
        return self._turns[1]

    def document(self, index: int, sample: int) -> Document:
        first = bundled.MOST_IMAGES * index
        return self._written(index, sample, [self.image(first + place) for place in range(len(self._scenes(index)))])

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        side = self.world.config.size // self.autoencoder.factor
        blank = blank_image(form, self.autoencoder.channels, side, side)
        lengths = []
        for index in indices.tolist():
            written = self._written(index, 0, [blank] * len(self._scenes(index)))
            lengths.append(len(layout_document(written, form)))
        return np.array(lengths)

    def _scenes(self, index: int) -> list[bundled.Scene]:
        """Return the scenes of a dialogue's images, shown and drawn, in order."""
        both = (scene for turn in self.turns(index) for scene in (turn.shown, turn.scene))
        return [scene for scene in both if scene is not None]

    def _written(self, index: int, sample: int, images: list[Image]) -> Document:
        messages, waiting = [], iter(images)
        for turn in self.turns(index):
            shown: tuple[Image, ...] = () if turn.shown is None else (next(waiting),)
            drawn: tuple[Image, ...] = () if turn.scene is None else (next(waiting),)
            messages += [Message("user", (*shown, turn.request)), Message("assistant", (turn.reply, *drawn))]
        return chat_sample(self.tokenizer, messages, sample)

    def render(self, number: int) -> np.ndarray:
        index, place = divmod(number, bundled.MOST_IMAGES)
        scenes = self._scenes(index)
        return self.world.render(scenes[min(place, len(scenes) - 1)])


class StoredDialogues(StoredImages):
    """The dialogues of a data set: the assistant's words and images are learned, the others' are not."""

    def document(self, index: int, sample: int) -> Document:
        """Return a document. Raises CorruptSampleError."""
        number = self.number(index)
        stored = self.data.read(number)
        encoded = self.encoded(number, stored, stored.parts)
        tokens = sum(len(part.ids) for part in encoded if isinstance(part, Text))
        if tokens != stored.tokens:
            raise self.data.corrupt(number, f"{tokens} tokens, not as many as the index says", stored.key)
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
        """Return the mean positions over a pass: by the index, with what the template adds to the first `MEASURED`."""
        first = np.arange(min(MEASURED, self.epoch))
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


def blank_image(form: SequenceFormat, channels: int, rows: int, columns: int) -> Image:
    """Return an image of which only the shape counts, in latent elements: for a document whose length is asked for."""
    if form.first_code is None:
        return Image(torch.empty(channels, rows, columns, device="meta"))
    return Image(torch.zeros(rows, columns, dtype=torch.int64))
