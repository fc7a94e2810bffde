"""A conversation: turns of words and pictures in one sequence, whose cache stays from one turn to the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..sequence import Document, Image, Part, Text
from .engine import Engine
from .events import Done, Event, Failed, ImageEnd, TextDelta
from .pipeline import PromptPart, TransfusionPipeline
from .sequence_state import Request


class Conversation:
    """`parts` is all that was said, in order, one behind another as in a training document: there are no markers of
    turns. A turn reads only what is new; its result is that of reading all of it, but for rounding. It has a cache of
    its own, as long as the model's context.
    """

    def __init__(self, pipe: TransfusionPipeline) -> None:
        self.pipe = pipe
        self.engine = Engine(pipe.engine.runner, slots=1)
        self.parts: list[Part] = []

    def request(self, parts: Sequence[PromptPart], **settings: Any) -> Request:
        """What a turn that says `parts` asks of the engine; settings are fields of `Request`."""
        said = [*self.parts, *(self.pipe.part(part) for part in parts)]
        return replace(self.pipe.request([]), document=Document(said, closed=False), reuse=True, **settings)

    def say(self, parts: Sequence[PromptPart], **settings: Any) -> Iterator[Event]:
        """Say something, and hear the reply as it comes. A turn that is left before its end is forgotten whole.

        Raises UserError, and nothing is said, where the turn does not fit.
        """
        asked = self.request(parts, **settings)
        number = self.engine.submit(asked)
        said: list[Part] = list(asked.document.parts)
        words: list[int] = []
        try:
            while self.engine.busy:
                for event in self.engine.step():
                    match event:
                        case TextDelta(token=token):
                            words.append(token)
                        case ImageEnd(latent=latent):
                            said += [Text(tuple(words)), Image(latent, target=False)]
                            words = []
                        case Failed(reason=reason):
                            raise MemoryError(reason)
                        case Done():
                            self.parts = [*said, Text(tuple(words))]
                    yield event
        finally:
            self.engine.cancel(number)
