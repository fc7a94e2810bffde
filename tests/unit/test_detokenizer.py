"""Text as it is written: whole characters, in order, none lost, whatever tokens they are cut into."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import tokenizers
from conftest import BYTES, chained, linked, of_bytes
from tokenizers import decoders, models

from transfuse.inference import Conversation, Done, Event, ImageEnd, ImageStart, Request, TextDelta, TransfusionPipeline
from transfuse.inference.sequence_state import Detokenizer
from transfuse.sequence import Document, Text, Tokenizer
from transfuse.sequence.tokenizer import SPECIAL

MERGED = Tokenizer.train(["\u20ac\u20ac\u20ac \U0001f600\U0001f600 \u00e9\u00e9 a\u00e9a\u00e9"] * 50, 300)


def streamed(detokenizer: Detokenizer, ids: Sequence[int]) -> tuple[list[int], str]:
    given = [pair for token in ids for pair in detokenizer.add(token)] + detokenizer.flush()
    return [token for token, _ in given], "".join(text for _, text in given)


@pytest.mark.parametrize("tokenizer", [BYTES, MERGED], ids=["bytes", "merged"])
def test_all_that_is_written_comes_once_and_in_order(tokenizer: Tokenizer) -> None:
    """Tokens of any kind, most of whose bytes make no characters."""
    draws = random.Random(0)
    for _ in range(300):
        ids = [draws.randrange(4, tokenizer.vocab_size) for _ in range(draws.randrange(1, 12))]
        assert streamed(Detokenizer(tokenizer), ids) == (ids, tokenizer.decode(ids))
        before = tokenizer.encode("and \u00e9")
        assert streamed(Detokenizer(tokenizer, before), ids) == (ids, tokenizer.decode(ids))


@pytest.mark.parametrize(
    "text", ["\u00e9", "\u20ac5", "\U0001f600\U0001f600", "\ufffd\ufffd", "x\ufffd", "\u65e5\u672c"]
)
def test_no_half_of_a_character_is_given(text: str) -> None:
    """After every token what is out is a beginning of the text: the text is never taken back."""
    detokenizer, said = Detokenizer(BYTES), ""
    for token in of_bytes(text.encode()):
        said += "".join(new for _, new in detokenizer.add(token))
        assert text.startswith(said)
    assert said + "".join(new for _, new in detokenizer.flush()) == text


def test_a_long_run_of_wrong_bytes_does_not_wait_for_the_end() -> None:
    detokenizer = Detokenizer(BYTES)
    given = [new for token in of_bytes(b"\x82" * 40) for _, new in detokenizer.add(token)]
    assert len("".join(given)) >= 36


def test_bytes_of_a_prompt_are_not_completed() -> None:
    """A prompt that ends in half a character was shown as such: what follows is a text of its own."""
    first, *rest = of_bytes("\u20acuro".encode())
    assert streamed(Detokenizer(BYTES, [first]), rest)[1] == "\ufffd\ufffduro"


def test_words_of_a_byte_fallback_keep_their_spaces() -> None:
    """As Llama's tokenizers: words with their spaces, bytes for what has no word."""
    names = [*SPECIAL, "\u2581a", "\u2581crab", *(f"<0x{byte:02X}>" for byte in "\u20ac".encode())]
    backend = tokenizers.Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="s"))
    backend.add_special_tokens(list(SPECIAL))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(backend)
    assert streamed(Detokenizer(tokenizer, [4]), [6, 7, 8, 5])[1] == "\u20ac crab"
    assert streamed(Detokenizer(tokenizer, [5, 6, 7, 8]), [6, 7, 8, 4])[1] == "\u20ac a"
    assert streamed(Detokenizer(tokenizer, [4]), [6, 7, 8, 6, 7, 8, 7, 5])[1] == "\u20ac\u20ac\ufffd crab"
    assert streamed(Detokenizer(tokenizer, [4]), [6, 7])[1] == "\ufffd\ufffd"


def said(events: list[Event]) -> list[str]:
    """Text and pictures in the order in which they come."""
    parts: list[str] = []
    for event in events:
        match event:
            case TextDelta(text=text):
                parts.append(text)
            case ImageStart():
                parts.append("[")
            case ImageEnd():
                parts.append("]")
    return [part for part in "".join(parts).replace("[", "\n[").replace("]", "]\n").split("\n") if part]


PROMPT = Document([Text((BYTES.encode("?")[0],))], closed=False)


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("most", [20, 5])
def test_a_cut_character_comes_before_the_picture_and_at_the_end(cut: int, most: int) -> None:
    """`ab` and part of a character, a picture, `cd` and part of another, and the end: by itself or by `max_tokens`."""
    first, second = "\U0001f600".encode()[:cut], "\u20ac".encode()[:1]
    start = PROMPT.parts[0].ids[0]
    chain = linked(b"ab" + first, BYTES.boi, start) | linked(b"cd" + second, BYTES.eos, BYTES.eoi)
    pipe = TransfusionPipeline(chained(chain))
    asked = Request(PROMPT, max_tokens=most, size=(8, 8), guidance_scale=1.0)
    written = (b"ab" + first + b"cd" + second)[:most]
    before, after = written[: 2 + cut].decode(errors="replace"), written[2 + cut :].decode(errors="replace")
    events = list(pipe.stream(asked))
    expected = list(filter(None, [before, "[]", after])) if most >= 2 + cut else [before]
    assert said(events) == expected
    tokens = [event.token for event in events if isinstance(event, TextDelta)]
    done = events[-1]
    assert isinstance(done, Done)
    assert tokens == of_bytes(written)
    assert done.text_tokens == len(written)
    reply = pipe.replies([asked])[0]
    assert [part for part in reply.parts if isinstance(part, str)] == [part for part in expected if part != "[]"]


def test_a_character_cut_at_the_end_of_a_turn_is_kept_as_it_was_written() -> None:
    start = PROMPT.parts[0].ids[0]
    pipe = TransfusionPipeline(chained(linked(b"a\xe2\x82", BYTES.eos, start)))
    talk = Conversation(pipe)
    assert said(list(talk.say(["?"], draw="never"))) == ["a\ufffd"]
    assert talk.messages[-1].parts[-1] == Text(tuple(of_bytes(b"a\xe2\x82")))
