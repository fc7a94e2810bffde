"""Incremental detokenization: the text of tokens as a model writes them, one after another."""

from __future__ import annotations

from collections.abc import Sequence

from ..sequence import Tokenizer

REPLACEMENT = "\ufffd"
"""what a decoder gives for bytes that are no character, or not yet one"""
LONGEST_PREFIX = 3
"""bytes of a character that lacks its last one, so at most as many replacements"""


class Detokenizer:
    """Turns tokens into text. A token is returned, with the text it completes, once no later token changes that text.

    before: ids of the text that the tokens continue: without it, some tokenizers drop the space of the first word.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._pending: list[int] = []
        self._window: list[int] = []
        self._given = ""
        self._restart(before)
        if self._given.endswith(REPLACEMENT):  # its last character is cut: it is not continued
            self._restart([])

    def add(self, token: int) -> list[tuple[int, str]]:
        """Return the tokens that are complete now, in order, each with its text: none while a character is cut."""
        self._pending.append(token)
        self._window.append(token)
        text = self.tokenizer.decode(self._window)
        if not text.startswith(self._given):  # some decoders give a run of bytes up whole where its last ones are wrong
            self._window, self._given = list(self._pending), ""
            text = self.tokenizer.decode(self._window)
        if not text.endswith(REPLACEMENT):
            return self._release(text)
        stable = text[: max(len(text.rstrip(REPLACEMENT)), len(text) - LONGEST_PREFIX)]
        if len(stable) <= len(self._given) or len(self._pending) == 1:
            return []
        done, self._pending = self._pending[:-1], self._pending[-1:]
        new, self._given = stable[len(self._given) :], stable
        return [*((one, "") for one in done[:-1]), (done[-1], new)]

    def flush(self) -> list[tuple[int, str]]:
        """Return all tokens that are held back, the bytes of a cut character as U+FFFD. What follows is a new text."""
        released = self._release(self.tokenizer.decode(self._window)) if self._pending else []
        self._restart([])
        return released

    def _release(self, text: str) -> list[tuple[int, str]]:
        done, new = self._pending, text[len(self._given) :]
        self._restart(done)
        self._pending = []
        return [*((one, "") for one in done[:-1]), (done[-1], new)]

    def _restart(self, window: Sequence[int]) -> None:
        self._window = list(window)
        self._given = self.tokenizer.decode(self._window)
