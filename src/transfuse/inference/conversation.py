"""A conversation with a model: turns of text and images in one sequence.

talk = Conversation(transfuse.load("small-64"))
for event in talk.say(["draw a crab"]): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Unpack

from ..log import logger
from ..sequence import Document, Image, Part, Text, layout_document
from ..sequence.chat import Message, chat_prompt
from .arguments import ReplySettings
from .engine import Engine
from .events import Done, Event, Failed, ImageEnd, TextDelta
from .sequence_state import Request

if TYPE_CHECKING:
    from .pipeline import PromptPart, TransfusionPipeline

ROOM = 64  # positions that are left for a reply's words, on top of those of an image

Turns = list[tuple[Message, Message]]  # what the person and the model said


class Conversation:
    """Turns of text and images in one sequence, whose cache stays from one turn to the next.

    The sequence is the conversation in the model's chat template, or, without one, its texts and images in order, as in
    a training document. A turn reads only what is new; its result is that of reading everything, up to rounding. The
    cache is as long as the model's max_seq_len: where a turn and a reply with an image would not fit, the oldest turns
    are forgotten, and a line says so. system: the system prompt; None: the template's own, if it has one.
    """

    def __init__(self, pipe: TransfusionPipeline, system: str | None = None) -> None:
        self.pipe = pipe
        self.engine = Engine(pipe.engine.runner, slots=1)
        self.system = [] if system is None else [Message("system", (system,))]
        self.turns: Turns = []

    @property
    def messages(self) -> list[Message]:
        """The system prompt, if there is one, and all turns that are remembered."""
        return [*self.system, *chain.from_iterable(self.turns)]

    def request(self, parts: Sequence[PromptPart], **settings: Unpack[ReplySettings]) -> Request:
        """Return the request of a turn that begins with `parts`; settings are fields of `Request`."""
        document, _ = fitting(self.pipe, self.system, self.turns, self.pipe.message("user", parts))
        return replace(self.pipe.request([]), document=document, reuse=True, **settings)

    def say(self, parts: Sequence[PromptPart], **settings: Unpack[ReplySettings]) -> Iterator[Event]:
        """Take a turn, and yield the reply's events. A turn that is left before its end is dropped whole.

        Raises UserError, and nothing is added or forgotten, where the turn does not fit.
        """
        turn = self.pipe.message("user", parts)
        document, kept = fitting(self.pipe, self.system, self.turns, turn)
        number = self.engine.submit(replace(self.pipe.request([]), document=document, reuse=True, **settings))
        if forgotten := len(self.turns) - len(kept):
            logger.warning(f"conversation: longer than the model reads; its first {forgotten} turns are forgotten")
        reply: list[Part] = []
        tokens: list[int] = []
        try:
            while self.engine.busy:
                for event in self.engine.step():
                    match event:
                        case TextDelta(token=token):
                            tokens.append(token)
                        case ImageEnd(latent=latent):
                            reply += [Text(tuple(tokens)), Image(latent, target=False)]
                            tokens = []
                        case Failed(reason=reason):
                            raise MemoryError(reason)
                        case Done():
                            answer = Message("assistant", (*reply, Text(tuple(tokens))))
                            self.turns = [*kept, (turn, answer)]
                    yield event
        finally:
            self.engine.cancel(number)


def fitting(
    pipe: TransfusionPipeline, system: Sequence[Message], turns: Turns, turn: Message
) -> tuple[Document, Turns]:
    """Return the prompt of a turn after all earlier ones, or the latest that leave room for a reply; and those."""
    runner, size = pipe.engine.runner, pipe.exported.image_size
    room = runner.config.max_seq_len - runner.latent_shape((size, size))[1] - ROOM
    for first in range(len(turns) + 1):
        kept = turns[first:]
        document = chat_prompt(pipe.exported.tokenizer, [*system, *chain.from_iterable(kept), turn])
        if len(layout_document(document, runner.grammar)) <= room:
            break
    return document, kept
