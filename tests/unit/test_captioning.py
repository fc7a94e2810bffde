"""CIDEr-D and BLEU-4 against stored numbers of the original package, and in the direction they must go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.errors import UserError
from transfuse.evaluation.captions import JAR, MAIN, bleu_4, cider_d, open_words, tokenize
from transfuse.io import sha256

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "captioning.json").read_text())


def test_words_are_those_of_the_penn_treebank_tokenizer() -> None:
    for texts, tokens in zip(GOLDEN["references"], GOLDEN["reference_tokens"], strict=True):
        assert [tokenize(text) for text in texts] == [line.split() for line in tokens]
    for text, tokens in GOLDEN["tokens"]:
        assert tokenize(text) == tokens.split(), text
    assert tokenize("") == []


def test_cider_d_equals_the_original() -> None:
    words = [tokenize(text) for text in GOLDEN["captions"]]
    references = [[tokenize(text) for text in of_image] for of_image in GOLDEN["references"]]
    actual = cider_d(words, references)
    np.testing.assert_allclose(actual, 100 * np.array(GOLDEN["cider_by_image"]), atol=1e-9)
    assert actual.mean() == pytest.approx(100 * GOLDEN["cider"])


def test_bleu_4_equals_the_original() -> None:
    words = [tokenize(text) for text in GOLDEN["captions"]]
    references = [[tokenize(text) for text in of_image] for of_image in GOLDEN["references"]]
    actual = bleu_4(words, references)
    assert actual.value == pytest.approx(100 * GOLDEN["bleu"][3])
    assert actual.low < actual.value < actual.high


def test_worse_captions_score_less() -> None:
    """A true one, one of another wording, one with another noun, another picture's, none: in this order."""
    pairs = SceneScorer(WorldConfig(nouns=8, max_objects=1, max_count=1)).pairs(60, 16)
    references = [[tokenize(text) for text in of_image[1:]] for of_image in pairs.references]
    true = [tokenize(of_image[0]) for of_image in pairs.references]
    nouns = [name for name in WorldConfig(nouns=8).noun_names if " " not in name]
    after = dict(zip(nouns, [*nouns[1:], nouns[0]], strict=True))
    swapped = [[after.get(word, word) for word in words] for words in true]
    same = [of_image[0] for of_image in references]
    candidates = [same, true, swapped, [*true[1:], true[0]], [["nothing"]] * len(true)]
    ciders = [cider_d(words, references).mean() for words in candidates]
    assert ciders == sorted(ciders, reverse=True)
    assert len(set(ciders)) == len(ciders)
    assert ciders[1] > 1.5 * ciders[2]
    bleus = [bleu_4(words, references).value for words in candidates]
    assert bleus == sorted(bleus, reverse=True)
    assert bleus[0] == pytest.approx(100)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="expected captions, and references for each"):
        cider_d([], [])
    with pytest.raises(ValueError, match="found 1 captions"):
        bleu_4([["a"]], [[]])


# --- Stanford's words, by java ----------------------------------------------------------------------------------------

FAKE_JAVA = """#!{python}
import json, pathlib, sys
lines = sys.stdin.buffer.read().decode().split("\\n")[:-1]
pathlib.Path({said!r}).write_text(json.dumps([sys.argv[1:], lines]))
answers = json.loads(pathlib.Path({answers!r}).read_text())
sys.stdout.buffer.write("".join(answers[line] + "\\n" for line in lines if line in answers).encode())
sys.stderr.write("PTBTokenizer: something is wrong\\nand more")
sys.exit({code})
"""


def java(folder: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], code: int = 0) -> Path:
    """A stand-in on the PATH, which keeps what it was called with and answers lines it knows; gives a jar for it."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "answers.json").write_text(json.dumps(answers))
    places = {"said": str(folder / "said.json"), "answers": str(folder / "answers.json")}
    script = folder / "bin" / "java"
    script.write_text(FAKE_JAVA.format(python=sys.executable, code=code, **places))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    with ZipFile(folder / JAR, "w") as archive:
        archive.writestr(f"{MAIN.replace('.', '/')}.class", b"")
    return folder / JAR


def test_java_is_called_as_the_original_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line a text, whatever is in it; punctuation goes, brackets in small letters stay, as there."""
    texts = ["A dog\ncan't RUN.", "", "Two (caf\u00e9s) -- \u201cyes\u201d;\u2028no"]
    answers = {
        "A dog can't RUN.": "a dog ca n't run .",
        "": "",
        "Two (caf\u00e9s) -- \u201cyes\u201d; no": "two -lrb- caf\u00e9s -rrb- -- `` yes '' ; no",
    }
    jar = java(tmp_path, monkeypatch, answers)
    cut = open_words(str(jar))
    assert cut.cut(texts) == [
        ["a", "dog", "ca", "n't", "run"],
        [],
        ["two", "-lrb-", "caf\u00e9s", "-rrb-", "yes", "no"],
    ]
    arguments, lines = json.loads((tmp_path / "said.json").read_text())
    assert arguments == ["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    assert lines == list(answers)
    assert cut.name == f"Stanford PTBTokenizer ({JAR}@{sha256(jar)[:8]})"


def test_java_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jar = java(tmp_path, monkeypatch, {}, code=3)
    with pytest.raises(
        UserError, match=r"java: expected words, found exit code 3 \(PTBTokenizer: something is wrong\)$"
    ):
        open_words(str(jar)).cut(["a"])
    jar = java(tmp_path, monkeypatch, {"a": "a"})
    with pytest.raises(UserError, match="expected a line of words for each of 2, found 1"):
        open_words(str(jar)).cut(["a", "b"])


def test_what_is_missing_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jar = java(tmp_path, monkeypatch, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "other.jar").write_bytes(b"no archive")
    with ZipFile(tmp_path / "empty.jar", "w"):
        pass
    for path, line in (
        ("pycocoevalcap", "--ptb-jar: expected the package pycocoevalcap, found none"),
        (str(tmp_path / "none.jar"), r"--ptb-jar: expected stanford-corenlp-3.4.1.jar .*, found no .*none\.jar"),
        (str(tmp_path / "other.jar"), r"found something else in .*other\.jar"),
        (str(tmp_path / "empty.jar"), r"found something else in .*empty\.jar"),
    ):
        with pytest.raises(UserError, match=line):
            open_words(path)
    open_words(str(jar))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--ptb-jar: expected java on the PATH, found none"):
        open_words(str(jar))
    open_words("")


def test_the_jar_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pycocoevalcap"
    java(package / "tokenizer", monkeypatch, {"A cat": "a cat"})
    (package / "__init__.py").write_text("raise ImportError('it wants further packages')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert open_words("pycocoevalcap").cut(["A cat"]) == [["a", "cat"]]
