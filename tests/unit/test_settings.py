"""The settings in a PNG settle the picture: equal settings are equal pixels, and they draw the same bytes again."""

from __future__ import annotations

import io
import json
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import BYTES, chained, exported, linked
from engines import coded, packed

import transfuse
from transfuse.cli import run
from transfuse.diffusion import DiffusionConfig, Process, SamplerConfig
from transfuse.errors import UserError
from transfuse.export import Exported, GenerationConfig, save_export
from transfuse.images import read_settings
from transfuse.inference import ImageEnd, Request, TransfusionPipeline
from transfuse.inference.settings import parse_settings, request_again, settings_of
from transfuse.sequence import Document, Text, Tokenizer


def pixels(seed: int, rows: int = 8, columns: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["latents", "codes"])
def pipe(tokenizer: Tokenizer, request: pytest.FixtureRequest) -> TransfusionPipeline:
    return TransfusionPipeline(packed((exported if request.param == "latents" else coded)(tokenizer)))


def drawn(pipe: TransfusionPipeline, request: Request) -> list[bytes]:
    return [event.latent.numpy().tobytes() for event in pipe.stream(request) if isinstance(event, ImageEnd)]


def again(pipe: TransfusionPipeline, settings: dict[str, Any], **given: Any) -> Request:
    """The request of settings that were in a file."""
    kept = parse_settings(json.loads(json.dumps(settings)), "a.png")
    return request_again(kept, pipe.exported, where="a.png", **given)


def base(pipe: TransfusionPipeline, **changes: Any) -> Request:
    steps = 3 if pipe.exported.model.config.images == "latents" else None
    request = replace(pipe.request(["a crab"], steps), draw="force", max_tokens=0, seed=5)
    if steps is not None:
        request = replace(request, sampler=SamplerConfig("ddim", 3, 0.5))
    return replace(request, **changes)


def changes(pipe: TransfusionPipeline) -> dict[str, list[Any]]:
    """Other values of every field of a request."""
    shown, other = pixels(1), pixels(2)
    parts = [["a boat"], ["a ", "crab"], ["", "a crab"], [shown, "a crab"], [other, "a crab"], ["a crab", shown], []]
    every: dict[str, list[Any]] = {
        "document": [pipe.request(parts_given).document for parts_given in parts],
        "draw": ["auto", "never"],
        "max_tokens": [1, 9],
        "max_images": [2, 3],
        "size": [(8, 4), (4, 8), (12, 8)],
        "sampler": [],
        "guidance_scale": [1.0, 0.0, 2],
        "image_guidance_scale": [1.5],
        "guidance_interval": [],
        "start": [],
        "negative": [],  # in test_negative_prompt: not every scale goes with it
        "temperature": [1.3],
        "top_p": [0.6],
        "presence_penalty": [1.5],
        "frequency_penalty": [1.5, -1.0],
        "stop": [("a",), ("zz", "b")],
        "logprobs": [2],
        "code_temperature": [0.0, 0.4],
        "code_top_p": [0.5],
        "seed": [6, 2**62],
        "preview_every": [1],
        "reuse": [True],
    }
    if pipe.exported.model.config.images == "latents":
        mask, another = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
        mask[:, :4], another[2:, :] = True, True
        every["sampler"] = [
            *(SamplerConfig("ddim", steps, eta, first) for steps, eta, first in
              ((4, 0.5, None), (3, 0.0, None), (3, 0.25, None), (3, 0.5, 700), (3, 0.5, 650))),
            SamplerConfig("dpmpp", 3), SamplerConfig("ddpm", 3),
        ]  # fmt: skip
        every["guidance_interval"] = [(0.0, 0.5), (0.3, 0.8)]
        every["start"] = [
            pipe.start(each, share, area)
            for each in (shown, other) for share in (0.7, 1.0) for area in (None, mask, another)
        ]  # fmt: skip
    return every


def test_whatever_changes_pixels_is_in_the_settings(pipe: TransfusionPipeline) -> None:
    """Every field of a request, one at a time and in threes: other pixels, other settings."""
    every = changes(pipe)
    assert every.keys() == {field.name for field in fields(Request)}, "a new field: say here what it changes"
    first = base(pipe)
    words = replace(first, max_tokens=12, temperature=1.0, max_images=3)
    seen: dict[str, list[bytes]] = {}
    draws = random.Random(0)
    requests = [first, words]
    requests += [replace(start, **{name: value}) for start in (first, words) for name in every for value in every[name]]
    for _ in range(20):
        names = draws.sample([name for name in every if every[name]], 3)
        requests.append(replace(words, **{name: draws.choice(every[name]) for name in names}))
    count = 0
    for request in requests:
        if request.start is not None and request.size != (8, 8):
            continue
        for number, latent in enumerate(drawn(pipe, request)):
            key = json.dumps(settings_of(request, pipe.exported, number))
            assert seen.setdefault(key, [latent]) == [latent]
            count += 1
    assert count > 80
    assert len({value[0] for value in seen.values()}) > 30, "most of it does change pixels"


def test_settings_make_the_same_request_again(pipe: TransfusionPipeline) -> None:
    """Through JSON and back, with the images given again in another order: the same settings, the same images."""
    every, draws = changes(pipe), random.Random(1)
    given, tried = [pixels(2), pixels(1)], 0
    for _ in range(20):
        names = draws.sample([name for name in every if every[name]], 4)
        request = replace(base(pipe), **{name: draws.choice(every[name]) for name in names})
        if request.start is not None:
            mask = request.start.mask
            request = replace(request, size=(8, 8))
        else:
            mask = None
        settings = settings_of(request, pipe.exported)
        wanted = {part["image"] for part in settings["parts"] if "image" in part} | {settings.get("start")} - {None}
        images = [each for each in given if wanted & fingerprints(pipe, each)]
        same = again(pipe, settings, images=images, mask=None if mask is None else mask.numpy())
        assert settings_of(same, pipe.exported) == settings
        assert drawn(pipe, same) == drawn(pipe, request)
        tried += bool(images)
    assert tried > 3


def fingerprints(pipe: TransfusionPipeline, image: np.ndarray) -> set[str]:
    (part,) = settings_of(pipe.request([image]), pipe.exported)["parts"]
    return {part["image"]}


def test_words_are_told_as_the_model_reads_them(pipe: TransfusionPipeline) -> None:
    settings = settings_of(pipe.request(["two ", "bal", "loons"]), pipe.exported)
    assert settings["prompt"] == "two balloons"
    assert [part["text"] for part in settings["parts"]] == ["two ", "bal", "loons"]
    drawing = base(pipe, document=Document([Text((9, 9, 77)), Text(BYTES.encode("\u20ac")[:2])], closed=False))
    same = again(pipe, settings_of(drawing, pipe.exported))
    assert [part.ids for part in same.document.parts] == [part.ids for part in drawing.document.parts]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "0" * 16}, "a.png: model: expected 0000000000000000, as it was drawn with, found unsaved"),
        ({"config": "0"}, "a.png: config: expected 0, as it was drawn with, found"),
        ({"tokenizer": "0"}, "a.png: tokenizer: expected 0"),
        ({"autoencoder": "0"}, "a.png: autoencoder: expected 0"),
        ({"temperature": None}, "a.png: expected all settings of a drawing, found none for temperature"),
        ({"size": [8]}, "a.png: size"),
        ({"parts": "a crab"}, "a.png: parts"),
        (
            {"parts": [{"image": "7", "size": [8, 8]}]},
            r"a.png: images: expected those it was drawn from \(7\), found none",
        ),
        ({"mask": "7"}, "a.png: mask: expected 7, as it was drawn with, found none"),
        ({"colour": "red"}, 'a.png: unknown setting "colour"'),
    ],
)
def test_settings_that_do_not_fit(pipe: TransfusionPipeline, change: dict[str, Any], says: str) -> None:
    settings = {**settings_of(base(pipe), pipe.exported), **change}
    with pytest.raises(UserError, match=says) as caught:
        again(pipe, {name: value for name, value in settings.items() if value is not None})
    assert "\n" not in str(caught.value)


def test_images_and_masks_must_be_those_it_was_drawn_from(tokenizer: Tokenizer) -> None:
    pipe = TransfusionPipeline(packed(exported(tokenizer)))
    mask, other = np.zeros((8, 8), bool), np.ones((8, 8), bool)
    mask[:4] = True
    drawing = base(pipe, start=pipe.start(pixels(1), 0.8, mask))
    settings = settings_of(drawing, pipe.exported)
    whole = {"images": [pixels(1)], "mask": mask}
    for change, says in (
        ({"images": [pixels(3)]}, "images: expected those it was drawn from .*, found others"),
        ({"images": [pixels(1), pixels(3)]}, "images: expected 1, as it was drawn from, found 2"),
        ({"mask": other}, "mask: expected .*, as it was drawn with, found"),
        ({"mask": None}, "mask: expected .*, as it was drawn with, found none"),
    ):
        with pytest.raises(UserError, match=says):
            again(pipe, settings, **{**whole, **change})
    assert drawn(pipe, again(pipe, settings, **whole)) == drawn(pipe, drawing)


def test_another_network_or_process_of_the_same_weights_is_another_model(tokenizer: Tokenizer) -> None:
    each = packed(exported(tokenizer))
    settings = settings_of(base(TransfusionPipeline(each)), each)
    other = replace(each, process=Process(DiffusionConfig(prediction="x0", weighting="v", clip_x0=0.5)))
    with pytest.raises(UserError, match="config: expected"):
        request_again(parse_settings(settings, "a.png"), other)
    rough = settings_of(base(TransfusionPipeline(each)), replace(each, quantize="int8"))
    assert (settings.get("quantize"), rough["quantize"]) == (None, "int8")


# --- the commands ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Runs of a Transfusion, a Chameleon, and one that writes, draws, and writes again."""
    home = tmp_path_factory.mktemp("home")
    start = BYTES.encode("?")[0]
    for name, each in {
        "plain": exported(tokenizer),
        "codes": coded(tokenizer),
        "chain": chained(linked(b"ab", BYTES.boi, start) | linked(b"cd\xc3", BYTES.eos, BYTES.eoi)),
    }.items():
        export(home / "runs" / name / "export", each)
    for number in (1, 2):
        PIL.Image.fromarray(pixels(number)).save(home / f"{number}.png")
    PIL.Image.fromarray(pixels(1, 11, 15)).save(home / "wide.png")
    for name, shape in (("mask", (8, 8)), ("wide-mask", (11, 15))):
        mask = np.zeros(shape, np.uint8)
        mask[:, shape[1] // 2 :] = 255
        PIL.Image.fromarray(mask).save(home / f"{name}.png")
    return home


def export(place: Path, each: Exported) -> None:
    place.parent.mkdir(parents=True)
    weights, defaults = each.model.state_dict(), GenerationConfig(SamplerConfig("ddim", 3, 0.5, 700), 2.0)
    save_export(
        place, weights, each.model.config, each.process.config, each.tokenizer, each.autoencoder, 8, defaults, ""
    )


FORCED = ("a crab", "--draw", "force")
MASKED = ("edit", "1.png", "x", "--mask", "mask.png", "--seed", "4")
DRAWINGS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "a picture": ("plain", ("generate", *FORCED, "--seed", "7"), ()),
    "of several": ("plain", ("generate", *FORCED, "--candidates", "3", "--max-tokens", "0"), ()),
    "settings": (
        "plain",
        ("generate", *FORCED, "--steps", "2", "--guidance-scale", "1.25", "--temperature", "0.7", "--max-tokens", "3"),
        (),
    ),
    "words before it": ("chain", ("generate", "?"), ()),
    "codes": ("codes", ("generate", *FORCED, "--seed", "3"), ()),
    "bfloat16": ("plain", ("generate", *FORCED, "--precision", "bfloat16"), ()),
    "an edit": ("plain", ("edit", "1.png", "red", "--image-guidance-scale", "1.5"), ("--images", "1.png")),
    "an edit by codes": ("codes", ("edit", "2.png", "red"), ("--images", "2.png")),
    "resized": ("plain", ("edit", "wide.png", "red", "--resize"), ("--images", "wide.png")),
    "a variation": ("plain", ("edit", "2.png", "red", "--strength", "0.7"), ("--images", "2.png")),
    "a mask": ("plain", MASKED, ("--images", "1.png", "--mask", "mask.png")),
    "a mask, resized": (
        "plain",
        ("edit", "wide.png", "red", "--mask", "wide-mask.png", "--resize", "--strength", "0.9"),
        ("--images", "wide.png", "--mask", "wide-mask.png"),
    ),
}


@pytest.mark.parametrize("case", DRAWINGS)
@pytest.mark.parametrize("named", [True, False])
def test_a_picture_is_drawn_again_to_the_same_bytes(
    case: str, named: bool, folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a command that names the model, and by one that finds it by its weights."""
    monkeypatch.chdir(folder)
    model, command, files = DRAWINGS[case]
    options = ["--model", f"runs/{model}/export"]
    assert run([*command, *options, "--out", str(tmp_path / "first")]) == 0
    (first,) = (tmp_path / "first").iterdir()
    capsys.readouterr()
    drawing = ["generate", "--again", str(first), "--out", str(tmp_path / "second"), *files]
    assert run([*drawing, *(options if named else [])]) == 0
    output = capsys.readouterr()
    second = tmp_path / "second" / first.name
    assert output.out == f"{second}\n"
    assert second.read_bytes() == first.read_bytes()
    assert "other pixels" not in output.err
    assert (f"runs/{model}/export: the model used, whose weights drew" in output.err) == (not named)


def test_every_turn_of_a_chat_says_how_it_was_drawn(
    folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first turn is drawn again; a later one was drawn from a picture that the model drew, which no file holds."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("/image 1.png\na crab\na boat\n"))
    options = ["--model", "runs/plain/export", "--out", str(tmp_path)]
    assert run(["chat", "--draw", "force", *options]) == 0
    first, second = tmp_path / "chat-0.png", tmp_path / "chat-1.png"
    whole = first.read_bytes()
    assert run(["generate", "--again", str(first), "--images", "1.png", *options]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["chat-0.png", "chat-1.png"]
    assert first.read_bytes() == whole
    assert run(["generate", "--again", str(second), "--images", "1.png", str(first), *options]) == 2
    assert "images: expected those it was drawn from" in capsys.readouterr().err


def test_mistakes_with_again(folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder)
    assert run(["generate", *FORCED, "--model", "runs/plain/export", "--out", str(tmp_path)]) == 0
    made = str(tmp_path / "seed-0-0.png")
    for words, says in (
        (["--again", made, "--seed", "1"], "--again: expected no seed, for the file's own is used, found one"),
        (["a crab", "--again", made], "--again: expected no prompt"),
        (["--again", "1.png"], "1.png: expected a PNG with the settings it was drawn with, found none"),
        (["--again", "nothing.png"], "nothing.png: expected a PNG with the settings"),
        (["--again", made, "--images", "2.png"], "images: expected 0, as it was drawn from, found 1"),
        (["--again", made, "--mask", "mask.png"], "mask: expected none, as it was drawn with, found another"),
        (["--again", made, "--model", "runs/codes/export"], f"{made}: model: expected"),
        (["a crab", "--images", "1.png"], "--images: expected --again with it, found none"),
        ([], "prompt: expected some text, found an empty one"),
    ):
        capsys.readouterr()
        assert run(["generate", *words]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transfuse: ")]
        assert len(lines) == 1
        assert says in lines[0]
    (folder / "runs/plain").rename(folder / "elsewhere")
    try:
        assert run(["generate", "--again", made]) == 2
        assert "under runs/ or in the package, found none; --model names it" in capsys.readouterr().err
    finally:
        (folder / "elsewhere").rename(folder / "runs/plain")


def test_no_picture_is_ever_replaced(
    folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal seeds and folders, other prompts, other steps; the same request is the same file."""
    monkeypatch.chdir(folder)
    options = ["--model", "runs/plain/export", "--out", str(tmp_path)]
    kept: dict[Path, bytes] = {}
    for words in (["a crab"], ["a boat"], ["a crab"], ["a crab", "--steps", "2"], ["a boat"]):
        assert run(["generate", *words, "--draw", "force", "--seed", "7", *options]) == 0
        for path, content in kept.items():
            assert path.read_bytes() == content
        kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(path.name for path in kept) == ["seed-7-0-2.png", "seed-7-0-3.png", "seed-7-0.png"]
    assert read_settings(tmp_path / "seed-7-0.png")["prompt"] == "a crab"
    assert read_settings(tmp_path / "seed-7-0-2.png")["prompt"] == "a boat"
    for words in (["1.png", "red"], ["1.png", "blue"], ["1.png", "red"]):
        assert run(["edit", *words, *options]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        str(tmp_path / name) for name in ("1-seed-0.png", "1-seed-0-2.png", "1-seed-0.png")
    ]
    for turn in ("a crab\n", "a boat\n/save\n", f"a crab\n/save {tmp_path}/mine.txt\n/save {tmp_path}\n"):
        (tmp_path / "mine.txt").write_text("a diary")
        monkeypatch.setattr("sys.stdin", io.StringIO(turn))
        assert run(["chat", "--draw", "force", *options]) == 0
        assert (tmp_path / "mine.txt").read_text() == "a diary"
    output = capsys.readouterr()
    assert f"{tmp_path}: expected a file to write, found a folder" in output.err
    assert [Path(line).name for line in output.out.splitlines() if line.startswith(str(tmp_path))] == [
        "chat-0.png", "chat-0-2.png", "chat-0-2.png", "chat-0.png", "mine-2.txt"
    ]  # fmt: skip


def test_pictures_of_python_are_those_of_the_command(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """`pipe(...)` draws what the settings of `generate` say."""
    monkeypatch.chdir(folder)
    assert run(["generate", *FORCED, "--seed", "9", "--model", "runs/plain/export", "--out", str(tmp_path)]) == 0
    pipe = transfuse.load("runs/plain/export")
    settings = read_settings(tmp_path / "seed-9-0.png")
    (image,) = pipe("a crab", generator=9).images
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "seed-9-0.png")), np.asarray(image))
    drawing = {"sampler": "ddim", "steps": 3, "eta": 0.5, "first": 700, "size": [8, 8], "draw": "force"}
    drawing["image_index"] = 0
    assert drawing.items() <= settings.items()
    assert torch.get_num_threads() == 1
