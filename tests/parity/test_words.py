"""Our words against those of Stanford's tokenizer, where Java and pycocoevalcap's jar are there."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.evaluation.captions import open_words

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captioning.json").read_text())

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs java and pip install --no-deps pycocoevalcap",
)


def test_stanford_s_words_are_the_stored_ones_and_ours() -> None:
    stanford, own = open_words("pycocoevalcap").cut, open_words("").cut
    texts = [text for text, _ in GOLDEN["tokens"]]
    assert stanford(texts) == [tokens.split() for _, tokens in GOLDEN["tokens"]]
    references = [text for of_image in GOLDEN["references"] for text in of_image]
    assert stanford(references) == [line.split() for of_image in GOLDEN["reference_tokens"] for line in of_image]
    scenes = SceneScorer(WorldConfig()).pairs(300, 16).references
    captions = [text for of_image in scenes for text in of_image]
    assert stanford(captions) == own(captions)
