"""A data set as a source of documents for training: shuffled anew each epoch, any document at any time.

data = DataSet("photos-64")
pairs = StoredPictures(data, data.tokenizer(), Pixels(), PairConfig(), seed=0)
pairs.document(17, sample=40)      # the 18th of the first epoch, as the mixture's sample 40
pairs.lengths(...)                 # the positions of many, from the index alone
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..autoencoders import Autoencoder, VQTokenizer
from ..errors import UserError
from ..images import decode_image
from ..sequence import Document, Image, SequenceFormat, Text, Tokenizer, count_positions
from .dataset import DataSet, Split, Stored
from .shuffle import Shuffle
from .sources import PairConfig, caption_dropped, images_of, interleaved_document, pair_document, pair_order

BLOCK = 512
"""numbers of documents found at once"""
CHUNK = 1 << 20
"""documents whose lengths are added up at once"""


class StoredSource:
    """What both kinds share: number `index` of the stream is a document of the set, each once an epoch."""

    def __init__(self, data: DataSet, seed: int, split: Split = "train") -> None:
        self.data, self.seed, self.split, self.name = data, seed, split, data.path
        self.epoch = data.size(split)
        if not self.epoch:
            raise UserError(f"{data.path}: expected documents to {split} on, found none of {len(data)}")
        self._shuffle: tuple[int, Shuffle] | None = None
        self._block: tuple[int, list[int]] = (-1, [])

    def number(self, index: int) -> int:
        """The document of the set."""
        block, place = divmod(index, BLOCK)
        if self._block[0] != block:  # a stream asks in order, and many numbers at once cost little more than one
            self._block = block, self.numbers(np.arange(block * BLOCK, (block + 1) * BLOCK)).tolist()
        return self._block[1][place]

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """As `number`, of many `[n]`."""
        epochs, places = np.divmod(indices, self.epoch)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            places[chosen] = self._order(int(epoch))(places[chosen])
        return self.data.number(self.split, places)

    def _pass(self) -> Iterator[np.ndarray]:
        """The documents of the set that one pass has, many at a time."""
        for start in range(0, self.epoch, CHUNK):
            yield self.data.number(self.split, np.arange(start, min(start + CHUNK, self.epoch)))

    def _order(self, epoch: int) -> Shuffle:
        if self._shuffle is None or self._shuffle[0] != epoch:
            self._shuffle = epoch, Shuffle(self.epoch, self.seed, self.split, epoch)
        return self._shuffle[1]


class StoredPictures(StoredSource):
    """Pairs, which training puts in either order, and documents of several parts, whose order stays."""

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
            found = "latents" if encoding.codebook is None else "codes"
            raise UserError(f"{data.path}: expected what model.images needs, found {found}")

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: SequenceFormat) -> np.ndarray:
        numbers = self.numbers(indices)
        side = grammar.patch_size * self.autoencoder.factor
        documents = self.data.documents[numbers]
        tokens = documents["tokens"].astype(np.int64)
        images = self.data.image_positions(numbers, side)
        for place in np.flatnonzero(documents["pair"]):
            if pair_order(self.config, self.seed, int(samples[place])) == "unconditional":
                tokens[place] = 0
        conditional = np.flatnonzero(documents["conditional"])
        dropped = [i for i in conditional if caption_dropped(self.config, self.seed, int(samples[i]))]
        tokens[dropped] = 0
        images[dropped] = self.data.last_image_positions(numbers[dropped], side)
        return count_positions(tokens, []) + images

    def mean_length(self, grammar: SequenceFormat) -> float:
        """Mean positions of a document over a pass; of one that may lose its text, the expected ones."""
        side, total = grammar.patch_size * self.autoencoder.factor, 0.0
        for numbers in self._pass():
            documents = self.data.documents[numbers]
            tokens, images = documents["tokens"].astype(np.int64), self.data.image_positions(numbers, side)
            total += count_positions(tokens, []).sum() + images.sum()
            total -= self.config.caption_first * self.config.caption_drop * tokens[documents["pair"]].sum()
            conditional = documents["conditional"]
            lost = (
                tokens[conditional] + images[conditional] - self.data.last_image_positions(numbers[conditional], side)
            )
            total -= self.config.caption_drop * lost.sum()
        return total / self.epoch

    def document(self, index: int, sample: int) -> Document:
        """Raises DamagedError where the set is damaged there."""
        number = self.number(index)
        stored = self.data.read(number)
        parts: list[Text | Image] = []
        for part in stored.parts:
            if isinstance(part, str):
                parts.append(Text(self.tokenizer.encode(part)))
            else:
                parts.append(self._image(number, stored, part))
        tokens = sum(len(part.ids) for part in parts if isinstance(part, Text))
        if tokens != stored.tokens:
            raise self.data.damaged(number, f"{tokens} tokens, not as many as the index says", stored.key)
        if stored.pair:
            image, text = parts
            assert isinstance(image, Image)
            assert isinstance(text, Text)
            return pair_document(text.ids, image, self.config, self.seed, sample)
        return interleaved_document(parts, self.config, self.seed, sample)

    def _image(self, number: int, stored: Stored, part: bytes | np.ndarray) -> Image:
        picture = decode_picture(self.data, number, stored, part)
        if self.data.manifest.encoding is None:
            return images_of(picture[None], self.autoencoder)[0]
        return Image(as_latent(picture))


def as_latent(stored: np.ndarray) -> torch.Tensor:
    """Latents (float16) or codes (uint16 or int32) of a set as a model takes them: float32, or int64."""
    return torch.from_numpy(stored.astype(np.int64 if stored.dtype.kind in "iu" else np.float32))


def decode_picture(data: DataSet, number: int, stored: Stored, part: bytes | np.ndarray) -> np.ndarray:
    """uint8 `[row, column, 3]`, or latents or codes as they are stored. Raises DamagedError."""
    if isinstance(part, np.ndarray):
        return part
    try:
        return decode_image(part, "picture")
    except UserError as error:
        raise data.damaged(number, str(error).removeprefix("picture: "), stored.key) from None


class StoredTexts(StoredSource):
    """Documents of token ids."""

    def mean_length(self, grammar: SequenceFormat) -> float:
        """Mean positions of a document over a pass."""
        return sum(int(count_positions(self._tokens(numbers), []).sum()) for numbers in self._pass()) / self.epoch

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: SequenceFormat) -> np.ndarray:
        return count_positions(self._tokens(self.numbers(indices)), [])

    def _tokens(self, numbers: np.ndarray) -> np.ndarray:
        return self.data.documents["tokens"][numbers].astype(np.int64)

    def document(self, index: int, sample: int) -> Document:
        ids = self.data.read_ids(self.number(index))
        return Document([Text(tuple(ids.tolist()))], sample=sample)
