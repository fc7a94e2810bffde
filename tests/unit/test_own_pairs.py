"""`transfuse evaluate --data SET`: a model is measured on the held-out pairs, or texts, of a data set."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import exported

from transfuse.cli import run
from transfuse.data import DataSet
from transfuse.data.building import build_set
from transfuse.data.building.prepare import BuildConfig
from transfuse.errors import UserError
from transfuse.evaluate import run_evaluation
from transfuse.evaluation import Drawing, EvalConfig
from transfuse.evaluation.pairs import set_pairs
from transfuse.export import GenerationConfig, save_export
from transfuse.images import fit
from transfuse.inference import score
from transfuse.sequence import Document, Image, Text, Tokenizer

FEW = Drawing(steps=2, sampler="ddim", guidance_scale=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """30 pairs, 10 of them held out; 20 texts, 5 held out; and a model with random weights."""
    root = tmp_path_factory.mktemp("own")
    (root / "in").mkdir()
    draw = np.random.default_rng(0)
    for number in range(30):
        PIL.Image.fromarray(draw.integers(0, 256, (16, 12, 3), dtype=np.uint8)).save(root / "in" / f"{number}.png")
        (root / "in" / f"{number}.txt").write_text(f"picture {number} of a crab")
    tokenizer.save(root / "tokenizer.json")
    config = BuildConfig(size=16, fit="pad", tokenizer=str(root / "tokenizer.json"), heldout=1 / 3)
    build_set(str(root / "in"), root / "pairs", config, workers=0)
    (root / "words.txt").write_text("\n\n".join(f"text {number} about two balloons" for number in range(20)))
    texts = replace(config, heldout=0.25, columns=replace(config.columns, split="paragraph"))
    build_set(str(root / "words.txt"), root / "texts", texts, workers=0)
    one = exported(tokenizer)
    parts = (one.model.state_dict(), one.model.config, one.process.config, tokenizer, one.autoencoder)
    save_export(root / "model", *parts, 16, GenerationConfig(), "# A model")
    return root


def test_pairs_are_the_held_out_ones_without_their_padding(folder: Path) -> None:
    data = DataSet(str(folder / "pairs"))
    pairs = set_pairs(data, 50, 16)
    assert len(pairs.ids) == data.manifest.heldout == 10
    numbers = [data.number("heldout", index) for index in range(10)]
    assert list(pairs.ids) == [data.read(number).key for number in numbers]
    name = pairs.ids[3].rpartition("-")[2]
    assert pairs.references[3] == [f"picture {name} of a crab"] == [pairs.prompts[3]]
    whole = np.asarray(PIL.Image.open(folder / "in" / f"{name}.png"))
    assert np.array_equal(pairs.picture(3), fit(fit(whole, (16, 12)), 16)), "without the padding, cut to a square"
    assert not set(pairs.ids) & set(set_pairs(data, 50, 16, "train").ids)


def test_a_model_is_measured_on_own_pairs(folder: Path, tmp_path: Path) -> None:
    options = EvalConfig(data=str(folder / "pairs"), count=8)
    report = run_evaluation(folder / "model", (), tmp_path / "out", options, FEW, device="cpu")
    names = {f"{result['measure']}: {result['name']}" for result in report["results"]}
    assert {"captioning: CIDEr-D x 100", "captioning: BLEU-4 x 100", "captioning: perplexity of captions"} < names
    assert {"drawing: FD-mobilenet_v2", "drawing: KD-mobilenet_v2", "autoencoder: PSNR in dB"} < names
    page = (tmp_path / "out" / "report.html").read_text()
    pairs = set_pairs(DataSet(options.data), 8, 16)
    for prompt in pairs.prompts:
        assert prompt in page
    # The perplexity is that of the true captions after their clean images.
    one, documents = exported(DataSet(options.data).tokenizer()), []
    for n, prompt in enumerate(pairs.prompts):
        image = Image(one.autoencoder.encode(pairs.picture(n)[None])[0], target=False)
        documents.append(Document([image, Text(one.tokenizer.encode(prompt))]))
    counts = [len(document.parts[1].ids) + 1 for document in documents]
    nll = [score.nll[-count:].sum() for score, count in zip(score(one, documents), counts, strict=True)]
    (found,) = (r for r in report["results"] if r["name"] == "perplexity of captions")
    assert found["value"] == pytest.approx(math.exp(sum(nll) / sum(counts)), rel=1e-3)


def test_a_model_is_measured_on_own_texts(folder: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--model", str(folder / "model"), "--data", str(folder / "texts"), "--out", str(tmp_path)]
    assert run(words) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [result["name"] for result in results] == ["perplexity of texts", "bits per byte of texts"]
    assert "5 documents" in results[0]["data"]


@pytest.mark.parametrize(
    ("name", "suite", "message"),
    [
        ("none", (), "none/manifest.json: expected a data set"),
        ("texts", ("pairs",), "expected a data set of images, found one of text"),
        ("pairs", ("text",), "expected a data set of text with a held-out part, found one of images"),
        ("all", (), "expected held-out images with captions, found none of 30 documents; build it with a larger"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, tmp_path: Path, name: str, suite: tuple, message: str
) -> None:
    if name == "all":
        config = BuildConfig(size=16, tokenizer=str(folder / "tokenizer.json"), heldout=0.0)
        build_set(str(folder / "in"), folder / "all", config, workers=0)
    with pytest.raises(UserError, match=message):
        run_evaluation(folder / "model", suite, tmp_path, EvalConfig(data=str(folder / name)), FEW, device="cpu")


@pytest.mark.parametrize("heldout", [0.7, 0.999])
def test_a_reference_needs_as_many_other_images(folder: Path, tmp_path: Path, heldout: float) -> None:
    """A set with fewer images to learn from than held-out ones has none, and is measured all the same."""
    config = BuildConfig(size=16, tokenizer=str(folder / "tokenizer.json"), heldout=heldout)
    build_set(str(folder / "in"), tmp_path / "set", config, workers=0)
    options = EvalConfig(data=str(tmp_path / "set"), count=20)
    results = run_evaluation(folder / "model", ("drawing",), tmp_path / "out", options, FEW, device="cpu")["results"]
    assert len(results) == 4
    assert all(result.get("ceiling") is None for result in results)


def test_empty_texts_are_left_out(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a crab", "", "two balloons", "")))
    options = EvalConfig(texts=(file,))
    results = run_evaluation(folder / "model", ("text",), tmp_path / "out", options, FEW, device="cpu")["results"]
    assert "2 documents" in results[0]["data"]
    with pytest.raises(UserError, match=r"^--stride: expected --texts or --data"):
        run_evaluation(folder / "model", ("text",), tmp_path / "out", EvalConfig(stride=4), FEW, device="cpu")


def test_images_below_the_window_of_ssim_are_refused_in_a_line(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
) -> None:
    one = exported(tokenizer)
    parts = (one.model.state_dict(), one.model.config, one.process.config, tokenizer, one.autoencoder)
    save_export(tmp_path / "model", *parts, 8, GenerationConfig(), "# A model")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(folder / "pairs"), "--suite", "autoencoder"]
    for command, line in (
        (
            [*words, "--out", str(tmp_path / "out")],
            "autoencoder: expected a model of at least 11 pixels, SSIM's window",
        ),
        (["autoencoder", "inspect", "kl-f4-small", "world", "--size", "8"], "--size: expected at least 11 pixels"),
    ):
        assert run(command) == 2
        printed = capfd.readouterr().err
        assert line in printed
        assert "Traceback" not in printed
