"""CIDEr-D and BLEU-4 against stored numbers of the original package, and in the direction they must go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from transfuse.data.world import WorldConfig
from transfuse.evaluation.captioning import bleu_4, cider_d, tokenize
from transfuse.evaluation.pairs import world_pairs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captioning.json").read_text())


def test_words_are_those_of_the_penn_treebank_tokenizer() -> None:
    for texts, tokens in zip(GOLDEN["references"], GOLDEN["reference_tokens"], strict=True):
        assert [tokenize(text) for text in texts] == [line.split() for line in tokens]
    for text, tokens in GOLDEN["tokens"]:
        assert tokenize(text) == tokens.split(), text
    assert tokenize("") == []


def test_cider_d_equals_the_original() -> None:
    words = [tokenize(text) for text in GOLDEN["captions"]]
    references = [[tokenize(text) for text in some] for some in GOLDEN["references"]]
    found = cider_d(words, references)
    np.testing.assert_allclose(found, 100 * np.array(GOLDEN["cider_by_image"]), atol=1e-9)
    assert found.mean() == pytest.approx(100 * GOLDEN["cider"])


def test_bleu_4_equals_the_original() -> None:
    words = [tokenize(text) for text in GOLDEN["captions"]]
    references = [[tokenize(text) for text in some] for some in GOLDEN["references"]]
    found = bleu_4(words, references)
    assert found.value == pytest.approx(100 * GOLDEN["bleu"][3])
    assert found.low < found.value < found.high


def test_worse_captions_score_less() -> None:
    """A true one, one of another wording, one with another noun, another picture's, none: in this order."""
    pairs = world_pairs(WorldConfig(size=16, nouns=8, max_objects=1, max_count=1), 60)
    references = [[tokenize(text) for text in some[1:]] for some in pairs.references]
    true = [tokenize(some[0]) for some in pairs.references]
    nouns = [name for name in WorldConfig(nouns=8).noun_names if " " not in name]
    after = dict(zip(nouns, [*nouns[1:], nouns[0]], strict=True))
    swapped = [[after.get(word, word) for word in words] for words in true]
    same = [some[0] for some in references]
    said = [same, true, swapped, [*true[1:], true[0]], [["nothing"]] * len(true)]
    ciders = [cider_d(words, references).mean() for words in said]
    assert ciders == sorted(ciders, reverse=True)
    assert len(set(ciders)) == len(ciders)
    assert ciders[1] > 1.5 * ciders[2]
    bleus = [bleu_4(words, references).value for words in said]
    assert bleus == sorted(bleus, reverse=True)
    assert bleus[0] == pytest.approx(100)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="expected captions, and references for each"):
        cider_d([], [])
    with pytest.raises(ValueError, match="found 1 captions"):
        bleu_4([["a"]], [[]])
