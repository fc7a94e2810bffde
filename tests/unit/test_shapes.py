"""Images of any shape and text of any origin: cropped, padded, in buckets; cleaned and cut; each change counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import exported, randomised, tiny
from engines import PROMPT, coded
from hypothesis import given, settings
from hypothesis import strategies as st

from transfuse.autoencoders import Pixels
from transfuse.data import DataSet, PairConfig, StoredImages
from transfuse.data.building import build_set, verify_set
from transfuse.data.building.prepare import BuildConfig, Dropped, Prepared, Preparer, clean
from transfuse.data.readers import Raw
from transfuse.diffusion import DiffusionConfig, Process, SamplerConfig
from transfuse.errors import UserError
from transfuse.folders import WEIGHTS
from transfuse.images import busiest, decode_image, fit, pad, unpad
from transfuse.inference import Engine, ImageEnd, Request
from transfuse.sequence import Document, Image, Text, Tokenizer, collate, layout_document
from transfuse.training import ObjectiveConfig, TransfusionObjective

CONFIG = BuildConfig(size=16, vocabulary=300, heldout=0.0)
WORDS = ["a crab on a red stone by the sea", "two balloons", "it is a very long way to the other side of the moon"]


def noise(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(WORDS * 4, 300)


def folder_of(root: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    root.mkdir()
    for number, (name, shape) in enumerate(shapes.items()):
        PIL.Image.fromarray(noise(*shape, number)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(f"{name}, a picture")
    return root


# --- where an image is cropped ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("place", [0, 37, 300, 540])
def test_a_smart_crop_keeps_the_only_thing_in_the_image(place: int, turned: bool) -> None:
    image = np.full((60, 600, 3), 200, np.uint8)
    image[10:50, place : place + 60] = noise(40, min(60, 600 - place))
    image = image.transpose(1, 0, 2) if turned else image
    top, left = busiest(np.ascontiguousarray(image), 60, 60)
    along, across = (top, left) if turned else (left, top)
    assert across == 0
    assert abs(along - place) <= 3
    assert np.array_equal(fit(np.ascontiguousarray(image), 60, smart=True), image[top : top + 60, left : left + 60])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_every_crop_is_inside_and_of_the_target_shape(rows: int, columns: int, height: int, width: int, flat) -> None:
    image = np.full((rows, columns, 3), 7, np.uint8) if flat else noise(rows, columns)
    smart, centred = fit(image, (height, width), smart=True), fit(image, (height, width))
    assert smart.shape == centred.shape == (height, width, 3)
    if flat or rows * width == columns * height:
        assert np.array_equal(smart, centred), "nothing is to be gained: the centre"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 64))
def test_padding_keeps_the_whole_image_in_the_middle(rows: int, columns: int, size: int) -> None:
    image = noise(rows, columns)
    square, inside = pad(image, size, "#ff0010")
    assert square.shape == (size, size, 3)
    assert max(inside) == size
    assert np.array_equal(unpad(square, inside), fit(image, inside))
    top, left = (size - inside[0]) // 2, (size - inside[1]) // 2
    around = np.ones((size, size), bool)
    around[top : top + inside[0], left : left + inside[1]] = False
    assert (square[around] == (255, 0, 16)).all()
    assert abs(inside[0] * columns - inside[1] * rows) <= max(rows, columns), "its shape, to half a pixel"


def test_what_is_transparent_shows_the_background() -> None:
    image = PIL.Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    for background, colour in (("white", (255, 255, 255)), ("#00ff80", (0, 255, 128)), ("black", (0, 0, 0))):
        pixels = decode_image(image, background=background)
        assert tuple(pixels[0, 0]) == colour
        assert tuple(pixels[1, 1]) == (10, 20, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background": "whiteish"}, "background: expected a colour"),
        ({"min_side": 40, "max_side": 30}, "max_side: expected at least min_side, 40, found 30"),
    ],
)
def test_settings_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BuildConfig(**changes)


def test_images_that_are_too_small_or_too_large_are_left_out_and_counted(tmp_path: Path) -> None:
    shapes = {"small": (9, 40), "fits": (20, 40), "large": (20, 41)}
    config = replace(CONFIG, min_side=10, max_side=40)
    counts = build_set(str(folder_of(tmp_path / "in", shapes)), tmp_path / "out", config, workers=0)
    assert counts["dropped"] == {"too large": 1, "too small": 1}
    assert counts["documents"] == 1


# --- padding is stored, and not learned -------------------------------------------------------------------------------

SHAPES = {"wide": (20, 60), "tall": (50, 20), "square": (24, 24), "thin": (3, 64)}


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("padded")
    build_set(
        str(folder_of(root / "in", SHAPES)), root / "set", replace(CONFIG, fit="pad", background="grey"), workers=0
    )
    return root


def test_a_padded_set_knows_what_is_padding(padded: Path) -> None:
    data = DataSet(str(padded / "set"))
    names = [data.read(number).key.partition("-")[2] for number in range(4)]
    for number, name in enumerate(names):
        square, inside = pad(noise(*SHAPES[name], list(SHAPES).index(name)), 16, "grey")
        assert np.array_equal(decode_image(data.read(number).parts[0]), square)
        assert (data.sizes(number), data.insides(number)) == ([(16, 16)], [inside])
    assert verify_set(str(padded / "set"), workers=0) == (4, [])


def test_a_set_built_of_a_padded_one_has_the_same_images(padded: Path, tmp_path: Path) -> None:
    for name, config in (
        ("pad", replace(CONFIG, fit="pad", background="grey")),
        ("bucket", replace(CONFIG, fit="bucket", multiple=4)),
    ):
        build_set(str(padded / "set"), tmp_path / name, config, workers=0)
    first, again, bucket = (DataSet(str(path)) for path in (padded / "set", tmp_path / "pad", tmp_path / "bucket"))
    assert first.documents["hash"].tolist() == again.documents["hash"].tolist()
    assert not bucket.manifest.padded
    assert not any((decode_image(bucket.read(n).parts[0]) == 128).all(-1).mean() > 0.02 for n in range(4))


def test_padding_has_no_loss_and_everything_else_has_the_same(padded: Path) -> None:
    data = DataSet(str(padded / "set"))
    source = StoredImages(data, data.tokenizer(), Pixels(), PairConfig(caption_first=1.0, caption_drop=0.0), seed=0)
    documents = [source.document(index, index) for index in range(4)]
    model = randomised(tiny(patch_positions="none"))
    objective = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), seed=0)
    form = data.tokenizer().sequence_format(2)
    for index, document in enumerate(documents):
        (image,) = document.images
        rows, columns = data.insides(source.number(index))[0]
        top, bottom, left, right = image.content or (0, 16, 0, 16)
        assert (bottom - top, right - left) == (rows, columns)
        batch = objective.sample_noise(collate([document], form))
        whole = replace(batch, content=())
        noised = objective.noise(batch)
        predictions = objective._forward(model, batch, noised).predictions
        errors = (predictions[0] - noised.targets[0]).square()
        assert objective.loss(model, whole).losses[1].item() == pytest.approx(errors.mean().item(), rel=1e-5)
        expected = errors[:, top:bottom, left:right].mean().item()
        assert objective.loss(model, batch).losses[1].item() == pytest.approx(expected, rel=1e-5)
    together = objective.loss(model, objective.sample_noise(collate(documents, form))).losses[1].item()
    apart = sum(objective.loss(model, objective.sample_noise(collate([d], form))).losses[1].item() for d in documents)
    assert together == pytest.approx(apart, rel=1e-4)


def test_codes_of_padding_are_not_predicted() -> None:
    codes, form = torch.arange(16).reshape(4, 4), Tokenizer.train([], 260).sequence_format(1)
    form = replace(form, first_code=300)
    for content, expected in ((None, 16), ((1, 3, 0, 4), 8), ((0, 4, 1, 2), 4)):
        layout = layout_document(Document([Text((5,)), Image(codes, content=content)]), form)
        (span,) = layout.spans
        assert layout.loss_mask[span.start - 1 : span.end - 1].sum() == expected
        assert layout.loss_mask.sum() == expected + 3, "the word, BOI and EOS as ever"


# --- drawing at the shapes of buckets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["patches", "codes"])
def test_a_model_draws_at_every_shape_of_a_set_of_buckets(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    """Shapes together in one batch of the engine give what each gives alone."""
    shapes = {"a": (64, 64), "b": (40, 100), "c": (99, 60), "d": (30, 32)}
    config = replace(CONFIG, fit="bucket", multiple=4)
    build_set(str(folder_of(tmp_path / "in", shapes)), tmp_path / "set", config, workers=0)
    data = DataSet(str(tmp_path / "set"))
    sizes = [data.sizes(number)[0] for number in range(4)]
    assert len(set(sizes)) == 3
    engine = Engine(exported(tokenizer, patch_positions="none") if kind == "patches" else coded(tokenizer))
    base = Request(PROMPT, draw="force", max_tokens=0, sampler=SamplerConfig("ddim", 2), code_temperature=0.0)
    requests = [replace(base, size=size, seed=number) for number, size in enumerate(sizes)]

    def drawn(*some: Request) -> list[torch.Tensor]:
        ends = {event.request_id: event.latent for event in engine.run(some) if isinstance(event, ImageEnd)}
        return [ends[number] for number in range(len(some))]

    factor = engine.exported.autoencoder.factor
    for request, image, (rows, columns) in zip(requests, drawn(*requests), sizes, strict=True):
        assert tuple(image.shape[-2:]) == (rows // factor, columns // factor)
        torch.testing.assert_close(image, drawn(request)[0], atol=1e-4, rtol=1e-4)


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "names"),
    [
        ("a crab", "a crab", ""),
        ("cafe\u0301", "caf\u00e9", "composed (NFC)"),
        ("Tom &amp; Jerry&#39;s &lt;b&gt;", "Tom & Jerry's <b>", "HTML entities decoded"),
        ("&amp;amp;quot;twice&quot;", '"twice"', "HTML entities decoded"),
        ("AT&T, ?a=1&copy=2 &unknown; &", "AT&T, ?a=1&copy=2 &unknown; &", ""),
        ("a\x00b\x1b[0m\u200b\x85c\ufeff", "ab[0mc", "control characters removed"),
        ("one\r\ntwo\rthree\tfour", "one\ntwo\nthree\tfour", "control characters removed"),
        ("e&#769;\x07", "\u00e9", "HTML entities decoded, control characters removed, composed (NFC)"),
        ("\U0001f469\u200d\U0001f680", "\U0001f469\u200d\U0001f680", ""),
    ],
)
def test_text_is_cleaned_and_each_change_named(text: str, expected: str, names: str) -> None:
    changed: list[str] = []
    assert clean(text, changed) == expected
    assert ", ".join(changed) == names


@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_clean_text_stays_as_it_is(text: str) -> None:
    changed: list[str] = []
    once = clean(text, [])
    assert clean(once, changed) == once
    assert not changed


def test_entities_stay_in_text_without_images(words: Tokenizer) -> None:
    prepare = Preparer(CONFIG, words, text_only=True)
    (document,) = prepare(Raw("a", ("&lt;b&gt; is bold\x00",)))
    assert isinstance(document, Prepared)
    ids = np.frombuffer(document.parts[0], "<u2")
    assert words.decode(ids.tolist()) == "&lt;b&gt; is bold"
    assert document.changed == ("control characters removed",)


@settings(max_examples=30, deadline=None)
@given(st.text("ab é\n🦀", min_size=1, max_size=60), st.integers(1, 40), st.integers(1, 12))
def test_a_long_caption_is_cut_between_words(words: Tokenizer, text: str, most: int, tokens: int) -> None:
    text = text.strip() or "a"
    config = replace(CONFIG, long="cut", max_caption=most, max_tokens=tokens, size=4)
    (outcome,) = Preparer(config, words, text_only=False)(Raw("k", (noise(4, 4), text), True))
    if isinstance(outcome, Dropped):  # not even one character fits
        assert len(words.encode(text[0])) > tokens
        return
    caption = outcome.parts[1]
    assert text.startswith(caption)
    assert len(caption) <= most
    assert len(words.encode(caption)) <= tokens
    fits = len(text) <= most and len(words.encode(text)) <= tokens
    assert (caption == text) == fits
    assert outcome.changed == (() if fits else ("caption cut",))
    assert caption == text or text[len(caption)].isspace() or not caption.split()[1:], "whole words, or a part of one"


def test_changes_are_counted_in_the_manifest(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", dict.fromkeys("abc", (20, 20)))
    (source / "a.txt").write_text("one &amp; two")
    (source / "b.txt").write_text("bell\x07 &lt;3")
    (source / "c.txt").write_text("word " * 100)
    counts = build_set(str(source), tmp_path / "out", replace(CONFIG, long="cut", max_tokens=20), workers=0)
    expected = {"HTML entities decoded": 2, "caption cut": 1, "control characters removed": 1}
    assert counts["changed"] == expected == DataSet(str(tmp_path / "out")).manifest.changed
    kept = build_set(str(source), tmp_path / "raw", replace(CONFIG, clean=False), workers=0)
    assert kept["changed"] == {}


# --- a tokenizer by a model's name, and builds that failed ------------------------------------------------------------


def test_a_tokenizer_may_be_a_bundled_model_s(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", {"a": (20, 20)})
    for name in ("small-64", str(WEIGHTS / "small-64")):
        build_set(str(source), tmp_path / name.replace("/", "_"), replace(CONFIG, tokenizer=name), workers=0)
        tokenizer = DataSet(str(tmp_path / name.replace("/", "_"))).tokenizer()
        assert tokenizer.fingerprint == Tokenizer.load(WEIGHTS / "small-64" / "tokenizer.json").fingerprint


def test_a_build_that_stored_nothing_does_not_block_its_folder(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "in", dict.fromkeys("abc", (20, 20)))
    with pytest.raises(UserError, match="none of which can be used"):
        build_set(str(source), tmp_path / "out", replace(CONFIG, min_side=100), workers=0)
    with pytest.raises(UserError, match=r"expected a tokenizer\.json"):
        build_set(str(source), tmp_path / "out", replace(CONFIG, tokenizer="small-99"), workers=0)
    counts = build_set(str(source), tmp_path / "out", CONFIG, workers=0)
    assert counts["documents"] == 3
    build_set(str(source), tmp_path / "straight", CONFIG, workers=0)
    for path in (tmp_path / "straight").rglob("*"):
        assert (
            path.is_dir()
            or path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "straight")).read_bytes()
        )
    assert not (tmp_path / "out" / "building").exists()
