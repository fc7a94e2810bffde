"""Sentencepiece models read here give the ids and the words that sentencepiece itself gives."""

from __future__ import annotations

import io
import sys

import pytest

from emoji_scenes import World, WorldConfig, caption, glosses
from transfuse.errors import UserError
from transfuse.sequence import Tokenizer

spm = pytest.importorskip("sentencepiece")
TEXTS = [
    "a crab to the left of two balloons on a red background",
    "  two  spaces, a tab\tand a line\nbreak  ",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \ufb01ne \u2460 \u00bd",
    "\U0001f980 and \u4e2d\u6587, which no piece covers",
    "x" * 70,
    "",
    "<s> typed, and </s>",
]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request, tmp_path_factory):
    world = World(WorldConfig(size=16))
    lines = [caption(world.scene(i), i) for i in range(1000)] + glosses("heldout")
    path = tmp_path_factory.mktemp("spm") / f"{request.param}.model"
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type=request.param,
        vocab_size=700,
        byte_fallback=request.param == "bpe",
        character_coverage=0.9995,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def test_ids_and_words(trained) -> None:
    theirs, ours = spm.SentencePieceProcessor(model_file=str(trained)), Tokenizer.adopt(trained)
    for text in [*TEXTS, *glosses("heldout")[:500]]:
        assert list(ours.encode(text)) == theirs.encode(text), text
        if theirs.unk_id() not in theirs.encode(text):  # what is unknown is shown otherwise
            assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)), text
    assert ours.vocab_size == theirs.get_piece_size() + 4
    assert ours.bos >= theirs.get_piece_size()


def test_saved_as_our_own(trained, tmp_path) -> None:
    ours = Tokenizer.adopt(trained)
    ours.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint == ours.fingerprint == Tokenizer.adopt(tmp_path).fingerprint
    assert all(again.encode(text) == ours.encode(text) for text in TEXTS)


def test_no_model(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"x\.model: expected a sentencepiece model"):
        Tokenizer.adopt(path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r'pip install "sentencepiece<'):
        Tokenizer.adopt(path)
