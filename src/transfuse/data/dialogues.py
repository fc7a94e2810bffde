"""Dialogues about the bundled scenes as training documents, in a chat template."""

from __future__ import annotations

import numpy as np

from ..autoencoders import Autoencoder
from ..sequence import Document, Image, SequenceFormat, Tokenizer, layout_document
from ..sequence.chat import Message, chat_sample
from . import bundled
from .sources import SceneSource, blank_image

MEASURED = 64
"""dialogues whose length stands for all"""


class SceneDialogues(SceneSource):
    """Conversations about scenes: the assistant's words and images are learned, the person's words are not.

    Image `MOST_IMAGES` * n + k is the k-th of dialogue n, or of another scene where the dialogue has fewer.
    """

    name = "dialogues"
    epoch = None

    def __init__(self, world: bundled.World, tokenizer: Tokenizer, autoencoder: Autoencoder, seed: int) -> None:
        super().__init__(world, tokenizer, autoencoder, seed)
        self._turns: tuple[int, list[bundled.Turn]] = (-1, [])

    def turns(self, index: int) -> list[bundled.Turn]:
        """Return the turns of a dialogue."""
        if self._turns[0] != index:
            self._turns = index, bundled.dialogue(self.world, index)
        return self._turns[1]

    def document(self, index: int, sample: int) -> Document:
        drawn = [turn for turn in self.turns(index) if turn.scene is not None]
        first = bundled.MOST_IMAGES * index
        return self._written(index, sample, [self.image(first + number) for number in range(len(drawn))])

    def lengths(self, indices: np.ndarray, samples: np.ndarray, form: SequenceFormat) -> np.ndarray:
        side = self.world.config.size // self.autoencoder.factor
        blank = blank_image(form, self.autoencoder.channels, side, side)
        lengths = []
        for index in indices.tolist():
            count = sum(turn.scene is not None for turn in self.turns(index))
            lengths.append(len(layout_document(self._written(index, 0, [blank] * count), form)))
        return np.array(lengths)

    def _written(self, index: int, sample: int, images: list[Image]) -> Document:
        messages, waiting = [], iter(images)
        for turn in self.turns(index):
            messages.append(Message("user", (turn.request,)))
            reply: tuple[str | Image, ...] = (turn.reply,) if turn.scene is None else (turn.reply, next(waiting))
            messages.append(Message("assistant", reply))
        return chat_sample(self.tokenizer, messages, sample)

    def render(self, number: int) -> np.ndarray:
        index, place = divmod(number, bundled.MOST_IMAGES)
        scenes = [turn.scene for turn in self.turns(index) if turn.scene is not None]
        return self.world.render(scenes[min(place, len(scenes) - 1)])
