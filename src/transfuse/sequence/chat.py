"""Conversations as documents, in the chat template of the model that a run started from.

messages = [Message("user", ("Draw a crab.",)), Message("assistant", ("Here it is:", image))]
chat_prompt(tokenizer, messages)        # an open document that ends where the assistant's next turn begins
chat_sample(tokenizer, messages)        # a training document: the assistant's turns are learned, and no others

The ids of a conversation without images are those of transformers' `apply_chat_template`; an image stands in
its place within the content. A special token that a person typed stays plain characters; an added token that is not
special (<think>) is that token. Without a template turns follow each other, with nothing between them.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UserError
from .layout import Document, Image, Part, Text
from .tokenizer import Tokenizer

SECONDS = 3.0  # for one rendering, which takes milliseconds
IMAGE, TYPED, LEARNED, END_LEARNED = "\ufdd0", "\ufdd3", "\ufdd1", "\ufdd2"
"""noncharacters of Unicode: where an image is; inside a special token's name that was typed; `render.LEARNED`"""
OURS = re.compile(f"[{IMAGE}{TYPED}{LEARNED}{END_LEARNED}]")
TRAINING_DATE = "2025-01-01"  # what `strftime_now` says in training documents, which depend on no clock


@dataclass(frozen=True)
class Message:
    """One turn: who speaks ("system", "user", "assistant"), and texts (or their ids) and images in order."""

    role: str
    parts: tuple[str | Text | Image, ...]

    @property
    def images(self) -> list[Image]:
        """The images, in order."""
        return [part for part in self.parts if isinstance(part, Image)]


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> Document:
    """Return an open document that ends where the assistant is to speak.

    Raises UserError where the template fails.
    """
    if tokenizer.text_format.chat_template is None:
        parts = [_plain(tokenizer, part, False) for message in messages for part in message.parts]
        return Document(parts, closed=False)
    (text,) = _render(tokenizer, [(messages, True)])
    images = [replace(image, target=False) for message in messages for image in message.images]
    first, parts = _parts(tokenizer, _without_marks(text), [], images)
    return Document(parts, closed=False, first=first)


def chat_sample(tokenizer: Tokenizer, messages: Sequence[Message], sample: int = 0) -> Document:
    """Return a training document, of which the assistant's turns are learned: words, markers of images, and images.

    A turn is what the template marks ({% generation %}), or else what it adds after the prompt for it, up to the first
    token that ends a text.

    Raises UserError where the template fails, or renders the beginning of a conversation in another way than the whole.
    """
    if tokenizer.text_format.chat_template is None:
        turns = [_plain(tokenizer, part, m.role == "assistant") for m in messages for part in m.parts]
        return Document(turns, sample=sample)
    places = [place for place, message in enumerate(messages) if message.role == "assistant"]
    calls = [(messages[:place], True) for place in places] + [(messages[: place + 1], False) for place in places]
    marked, *others = _render(tokenizer, [(messages, False), *calls], TRAINING_DATE)
    spans, whole = _marked(marked), _without_marks(marked)
    if not spans:
        others = [_without_marks(other) for other in others]
        ends = [tokenizer.text_format.eos, *tokenizer.text_format.other_ends]
        for prompt, turn in zip(others[: len(places)], others[len(places) :], strict=True):
            if not whole.startswith(prompt):
                wanted = "the beginning of a conversation rendered as in the whole"
                hint = "mark the turns with {% generation %}"
                raise UserError(f"chat_template: expected {wanted}, found another; {hint}")
            limit = len(turn) if whole.startswith(turn) else len(whole)
            after = [place + len(end) for end in ends if (place := whole.find(end, len(prompt), limit)) >= 0]
            spans.append((len(prompt), min(after, default=limit)))  # the end token is a part of the turn
    if not spans:
        raise UserError("messages: expected a turn of the assistant, which is learned, found none")
    images = [
        replace(image, target=message.role == "assistant", predict=message.role == "assistant")
        for message in messages
        for image in message.images
    ]
    if IMAGE in whole[spans[-1][1] :]:  # images that come after everything that is learned
        images = images[: whole[: spans[-1][1]].count(IMAGE)]
    first, parts = _parts(tokenizer, whole[: spans[-1][1]], spans, images)
    last = parts[-1]
    if isinstance(last, Text) and last.ids[-1:] == (tokenizer.eos,):  # the document's own end
        parts[-1] = replace(last, ids=last.ids[:-1])
        return Document(parts, sample=sample, first=first)
    return Document(parts, sample=sample, closed=False, first=first)


def _without_marks(text: str) -> str:
    return text.replace(LEARNED, "").replace(END_LEARNED, "")


def _plain(tokenizer: Tokenizer, part: str | Text | Image, learned: bool) -> Part:
    if isinstance(part, Image):
        return replace(part, target=learned, predict=learned)
    return Text(part.ids if isinstance(part, Text) else tokenizer.encode(part), predict=learned)


def _parts(
    tokenizer: Tokenizer, text: str, spans: Sequence[tuple[int, int]], images: Sequence[Image]
) -> tuple[int | None, list[Part]]:
    """Return the first id of a rendered text, and the rest as parts; tokens that begin inside `spans` are learned.

    Raises UserError unless every image occurs once, or if there is no text.
    """
    parts: list[Part] = []
    waiting = iter(images)
    if text.count(IMAGE) != len(images) or not text:
        wanted = f"a text with each of the conversation's {len(images)} images once"
        raise UserError(f"chat_template: expected {wanted}, found {text.count(IMAGE)} in {len(text)} characters")
    for match in re.finditer(f"[^{IMAGE}{TYPED}]+|{IMAGE}", text):
        if match[0] == IMAGE:
            parts.append(next(waiting))
            continue
        encoded = tokenizer.marked.encode(match[0], add_special_tokens=False)
        learned = [any(a <= match.start() + begin < b for a, b in spans) for begin, _ in encoded.offsets]
        for predict, group in groupby(zip(encoded.ids, learned, strict=True), lambda pair: pair[1]):
            parts.append(Text(tuple(number for number, _ in group), predict))
    start = parts[0]
    if not isinstance(start, Text):
        return None, parts
    return start.ids[0], [replace(start, ids=start.ids[1:]), *parts[1:]]


def _marked(text: str) -> list[tuple[int, int]]:
    """Return the spans between marks, in characters of the text without the marks."""
    spans, length, begin = [], 0, 0
    for piece in re.split(f"([{LEARNED}{END_LEARNED}])", text):
        if piece == LEARNED:
            begin = length
        elif piece == END_LEARNED:
            spans.append((begin, length))
        else:
            length += len(piece)
    return spans


# --- rendering --------------------------------------------------------------------------------------------------------


def _render(tokenizer: Tokenizer, calls: Sequence[tuple[Sequence[Message], bool]], now: str | None = None) -> list[str]:
    """Render conversations, each with or without the prompt for the next turn. Raises UserError, one line."""
    names = "|".join(re.escape(token) for token in tokenizer.special_tokens)

    def content(message: Message) -> str:
        texts = (
            IMAGE
            if isinstance(part, Image)
            else OURS.sub("", part if isinstance(part, str) else tokenizer.decode(part.ids))
            for part in message.parts
        )
        return re.sub(names, lambda name: name[0][0] + TYPED + name[0][1:], "".join(texts))

    text_format = tokenizer.text_format
    variables = {**dict(text_format.named), "eos_token": text_format.eos, "tools": None, "documents": None}
    if text_format.bos_token is not None:
        variables["bos_token"] = text_format.bos_token
    request = {
        "template": text_format.chat_template,
        "variables": variables,
        "now": now,
        "calls": [
            {
                "messages": [{"role": message.role, "content": content(message)} for message in messages],
                "add_generation_prompt": prompt,
            }
            for messages, prompt in calls
        ],
    }
    answer = _renderer(os.getpid()).ask(request)
    if "error" in answer:
        raise UserError(f"chat_template: {' '.join(str(answer['error']).split()):.300}")
    texts: list[str] = answer["texts"]
    return texts


class Renderer:
    """The process that renders (`render`), started at the first request and again after one that was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; `{"error": reason}` where there is none in time."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.close()  # it ended since the last request
            process = self._process = self._process or self._start()
            late = threading.Event()

            def end() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(SECONDS, end)
            timer.start()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                answer: dict[str, Any] = json.loads(process.stdout.readline())
            except (OSError, ValueError):  # it was ended, by the timer or by its own template
                self.close()
                reason = (
                    f"one that took more than {SECONDS:g} seconds" if late.is_set() else "one that did not end well"
                )
                return {"error": f"expected a template that renders, found {reason}"}
            except BaseException:  # Ctrl-C: the answer would be taken for that to the next request
                self.close()
                raise
            finally:
                timer.cancel()
            return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # -P: the files next to it are not modules to import.
        command = [sys.executable, "-P", str(Path(__file__).with_name("render.py"))]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        assert process.stdout is not None
        process.stdout.readline()  # it has started: what follows is the template's time
        return process


@cache
def _renderer(process: int) -> Renderer:
    """Return the renderer of a process, for all of its tokenizers: one that was forked has its own."""
    return Renderer()
