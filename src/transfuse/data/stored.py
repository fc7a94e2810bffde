"""A data set as a source of documents for training: shuffled anew each epoch, any document at any time.

data = DataSet("photos-64")
pairs = StoredPictures(data, data.tokenizer(), Pixels(), PairConfig(), seed=0)
pairs.document(17, sample=40)      # the 18th of the first epoch, as the mixture's sample 40
pairs.lengths(...)                 # the positions of many, from the index alone
"""

from __future__ import annotations

import numpy as np
import torch

from ..autoencoders import Autoencoder, Coded
from ..errors import UserError
from ..images import decode_image
from ..sequence import Document, Grammar, Image, Text, Tokenizer, positions
from .dataset import DataSet, Split, Stored
from .shuffle import Shuffle
from .sources import PairConfig, before_words, images_of, pair_document, pair_order

BLOCK = 512
"""numbers of documents found at once"""


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

    def _order(self, epoch: int) -> Shuffle:
        if self._shuffle is None or self._shuffle[0] != epoch:
            self._shuffle = epoch, Shuffle(self.epoch, self.seed, self.split, epoch)
        return self._shuffle[1]


class StoredPictures(StoredSource):
    """Pairs, which training puts in either order, and documents of several parts, whose order stays.

    Pictures that a text follows are capped in their noise as in captioning (Transfusion section 4.3.4).
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
        if encoding is not None and (encoding.codebook is not None) != isinstance(autoencoder, Coded):
            found = "latents" if encoding.codebook is None else "codes"
            raise UserError(f"{data.path}: expected what model.images needs, found {found}")

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: Grammar) -> np.ndarray:
        numbers = self.numbers(indices)
        tokens = self.data.documents["tokens"][numbers].astype(np.int64)
        for place in np.flatnonzero(self.data.documents["pair"][numbers]):
            if pair_order(self.config, self.seed, int(samples[place])) == "unconditional":
                tokens[place] = 0
        return positions(tokens, []) + self.data.image_positions(numbers, grammar.patch_size * self.autoencoder.factor)

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
        last_text = max((place for place, part in enumerate(parts) if isinstance(part, Text)), default=-1)
        capped = [
            before_words(part, self.config) if isinstance(part, Image) and place < last_text else part
            for place, part in enumerate(parts)
        ]
        return Document(capped, sample=sample)

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

    def lengths(self, indices: np.ndarray, samples: np.ndarray, grammar: Grammar) -> np.ndarray:
        return positions(self.data.documents["tokens"][self.numbers(indices)].astype(np.int64), [])

    def document(self, index: int, sample: int) -> Document:
        ids = self.data.read_ids(self.number(index))
        return Document([Text(tuple(ids.tolist()))], sample=sample)
