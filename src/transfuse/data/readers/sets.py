"""A data set as a source: made anew at another size, or as latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...errors import UserError
from ...sequence import Tokenizer
from ..dataset import DamagedError, DataSet
from . import PER_PART, Fault, Part, Raw


class SetReader:
    """Its documents in their order, held-out ones too, each compared with its hash; they keep the set's tokenizer."""

    text_only = False

    def __init__(self, data: DataSet) -> None:
        """Raises UserError for a set that has no pictures any more, or never had."""
        encoding = data.manifest.encoding
        if data.manifest.kind == "text" or encoding is not None:
            found = "text" if encoding is None else f"what {encoding.autoencoder} makes of them"
            raise UserError(f"{data.path}: expected a data set of pictures to build from, found one of {found}")
        self.data, self.total = data, len(data)

    def contents(self) -> dict[str, str]:
        """The manifest has the hashes of all else, and every document is compared with its own."""
        return {"manifest.json": self.data.fingerprint}

    def tokenizer(self) -> Tokenizer:
        return self.data.tokenizer()

    def parts(self) -> Iterable[Part]:
        for start in range(0, self.total, PER_PART):
            numbers = range(start, min(start + PER_PART, self.total))
            yield Part(numbers, len(numbers))

    def read(self, part: Part) -> Iterator[Raw | Fault]:
        for number in part.what:
            try:
                stored = self.data.read(number)
                yield Raw(stored.key, stored.parts, stored.pair)
            except DamagedError as error:
                yield Fault(error.key, error.reason)
