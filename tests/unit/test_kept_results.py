"""Kept results depend on their very inputs: pictures, weights, ways of drawing, version."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import evaluation_html, exported, write
from evaluating import WORLD, QuickScorer, coco_file, tiny_context

from emoji_scenes import World, WorldConfig, caption
from emoji_scenes.scene_classifier import keep_scene_classifier
from emoji_scenes.scene_detector import keep_scene_detector
from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.evaluation import (
    EvalConfig,
    EvalContext,
    Example,
    MetricResult,
    Result,
    evaluate,
    named,
)
from transfuse.evaluation.captions import cider_d
from transfuse.evaluation.confidence import Estimate
from transfuse.evaluation.context import extremes, first_of
from transfuse.inference import TransfusionPipeline
from transfuse.runs.monitor import is_best
from transfuse.sequence import Tokenizer
from transfuse.version import __version__

COUNT = 5


def coco(folder: Path, captions: list[list[str]] | None = None) -> Path:
    """A COCO file and its pictures: scenes of the world, all of one size in bytes."""
    world = World(WorldConfig(size=64, nouns=COUNT, max_objects=1, max_count=1))
    scenes = [world.scene(number) for number in range(COUNT)]
    captions = captions or [[caption(scene, number, seed) for seed in range(3)] for number, scene in enumerate(scenes)]
    folder.mkdir()
    for number, scene in enumerate(scenes):
        PIL.Image.fromarray(world.render(scene)).save(folder / f"{number}.bmp")
    coco_file(folder, range(len(captions)), captions, "bmp")
    return folder


def overwrite(path: Path, data: bytes) -> None:
    """Other bytes, as many, and the old times."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def scored(capsys: pytest.CaptureFixture[str], data: Path, out: Path, suite: str) -> dict[str, float]:
    files = ["--captions", str(data / "captions.json"), "--images", str(data), "--count", str(COUNT)]
    features = ["--features", "imagenet-mobilenet"]
    assert (
        run(["evaluate", "--model", "small-64", "--suite", suite, *files, *features, "--out", str(out), "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {each["name"]: each["value"] for each in report["results"]}


@pytest.mark.parametrize("suite", ["captioning", "autoencoder"])
def test_other_pixels_in_files_of_the_same_size_and_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suite: str
) -> None:
    data = coco(tmp_path / "data")
    first = scored(capsys, data, tmp_path / "out", suite)
    for number in range(COUNT):
        before = (data / f"{number}.bmp").read_bytes()
        overwrite(data / f"{number}.bmp", before[:54] + bytes(reversed(before[54:])))  # after the header, upside down
    again = scored(capsys, data, tmp_path / "out", suite)
    assert again == scored(capsys, data, tmp_path / "new", suite)
    assert again != first


def test_other_references_are_another_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bench: EvalContext
) -> None:
    data = coco(tmp_path / "data", [[f"a thing {n}", f"one thing {n}"] for n in range(COUNT)])
    wanted = replace(bench, options=EvalConfig(count=COUNT, captions=data / "captions.json", images=data))
    (first,) = evaluate(wanted, named(["captioning"]))
    write(data, {"captions.json": (data / "captions.json").read_text().replace("one thing", "two things")})
    (other,) = evaluate(wanted, named(["captioning"]))
    assert first.results[0].data != other.results[0].data


@pytest.fixture
def bench(tokenizer: Tokenizer, tmp_path: Path) -> EvalContext:
    return tiny_context(tokenizer, tmp_path / "out", options=EvalConfig(count=4))


def test_files_of_the_user_need_no_scorer(bench: EvalContext, tmp_path: Path) -> None:
    data = coco(tmp_path / "data", [[f"a thing {n}", f"one thing {n}"] for n in range(COUNT)])
    files = EvalConfig(count=COUNT, captions=data / "captions.json", images=data)
    (result,) = evaluate(replace(bench, scorer=None, options=files), named(["captioning"]))
    assert [number.name for number in result] == ["CIDEr-D x 100", "BLEU-4 x 100"]
    for name in ("text", "choice", "captioning"):
        with pytest.raises(UserError, match="expected a data set with a scorer, found none"):
            list(evaluate(replace(bench, scorer=None), named([name])))
    for name in ("composition", "editing"):
        with pytest.raises(UserError, match="expected a model of the bundled scenes"):
            list(evaluate(replace(bench, scorer=None), named([name])))


def drawn(bench: EvalContext) -> list[np.ndarray]:
    (outcome,) = evaluate(bench, named(["drawing"]))
    return [example.pictures[0][0] for example in outcome.examples]


def test_other_weights_of_the_same_name(bench: EvalContext, tokenizer: Tokenizer, tmp_path: Path) -> None:
    first = drawn(bench)
    other = exported(tokenizer)
    other.image_size = 16
    with_other = dict(other.model.named_parameters())
    for weight in with_other.values():
        weight.data.mul_(1.5)
    changed = replace(bench, pipe=TransfusionPipeline(other))
    outcome = drawn(changed)
    assert np.array_equal(outcome, drawn(replace(changed, folder=tmp_path / "new")))
    assert not np.array_equal(outcome, first)
    assert np.array_equal(drawn(bench), first)


@pytest.mark.parametrize("change", ["version", "prompts", "seed", "guidance"])
def test_what_a_drawing_depends_on_is_drawn_again(
    bench: EvalContext, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(bench)
    calls: list[int] = []
    work = bench.pipe.engine.run
    monkeypatch.setattr(bench.pipe.engine, "run", lambda requests: (calls.append(len(requests)), work(requests))[1])
    drawn(bench)
    assert not calls
    changes = {
        "version": {"version": "transfuse of tomorrow"},
        "prompts": {"scorer": QuickScorer(replace(WORLD, seed=7))},
        "seed": {"drawing": replace(bench.drawing, seed=1)},
        "guidance": {"drawing": replace(bench.drawing, guidance_scale=1.5)},
    }
    drawn(replace(bench, **changes[change]))  # type: ignore[arg-type]
    assert calls


@pytest.mark.parametrize("keep", [keep_scene_classifier, keep_scene_detector])
def test_a_judge_of_another_version_is_trained_again(tmp_path: Path, keep) -> None:
    path = tmp_path / "judge.safetensors"
    judge = keep(path, WORLD, 2)
    judge.identity = judge.identity.replace(__version__, "0.0.1")
    judge.save(path)
    assert keep(path, WORLD, 2).identity != judge.identity
    assert type(judge).load(path).identity != judge.identity


@pytest.mark.parametrize("change", ["implementation", "data"])
def test_the_best_by_another_judge_or_data_does_not_count(tmp_path: Path, change: str) -> None:
    result = Result("x", 1.0, None, None, 1, "higher", "judge@1", "world, 32 pictures")
    note = {"measure": "m/x", "value": 2.0, "step": 1, "implementation": "judge@1", "data": "world, 32 pictures"}
    write(tmp_path, {"best.json": json.dumps(note)})
    assert not is_best(tmp_path / "best.json", "m/x", result)
    assert is_best(tmp_path / "best.json", "m/x", replace(result, **{change: "another"}))


# --- too few ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "count", "least"), [("captioning", 1, 2), ("clip", 1, 2), ("drawing", 3, 4), ("autoencoder", 1, 4)]
)
@pytest.mark.parametrize("own", [False, True])
def test_too_few_pictures_are_refused(
    bench: EvalContext, tmp_path: Path, measure: str, count: int, least: int, own: bool
) -> None:
    options = EvalConfig(count=count)
    if own:
        data = coco(tmp_path / "data")
        options = replace(options, captions=data / "captions.json", images=data)
    line = rf"^{measure}: expected at least {least} pictures, found {count} \(--count, --ids\)$"
    with pytest.raises(UserError, match=line):
        list(evaluate(replace(bench, options=options), named([measure])))


def test_references_that_are_all_the_same(bench: EvalContext, tmp_path: Path) -> None:
    data = coco(tmp_path / "data", [["a photo", "a picture"], ["a picture", "a photo"], ["a photo", "a picture"]])
    options = EvalConfig(count=3, captions=data / "captions.json", images=data)
    with pytest.raises(UserError, match="captioning: expected references that tell pictures apart, found the same"):
        list(evaluate(replace(bench, options=options), named(["captioning"])))


def test_cider_needs_two_pictures() -> None:
    with pytest.raises(ValueError, match="cider_d: expected at least 2 images, found 1"):
        cider_d([["a", "crab"]], [[["a", "crab"]]])
    assert cider_d([["crab"], ["star"]], [[["crab"]], [["star"]]]).min() > 0


def test_one_item_has_no_interval(bench: EvalContext, tmp_path: Path) -> None:
    write(tmp_path, {"novel.txt": "a crab is a small animal"})
    (outcome,) = evaluate(replace(bench, options=EvalConfig(texts=(tmp_path / "novel.txt",))), named(["text"]))
    assert [(each.count, each.low, each.high) for each in outcome] == [(1, None, None)] * 2
    assert "novel" in evaluation_html(named(["text"]), [outcome])
    sure = Result.of("x", Estimate(0.0, 0.0, 1.0, 1), "higher", "", "")
    assert (sure.low, sure.high) == (0.0, 1.0)


# --- titles -----------------------------------------------------------------------------------------------------------


def test_titles_say_which_examples_are_shown() -> None:
    assert first_of(6, 12, "edits") == "All 6 edits, in order"
    assert first_of(2000, 12, "edits") == "The first 12 of 2,000 edits, in order"
    scores = [3.0, 9.0, 1.0, 5.0, 7.0]
    high, low = (f"The 2 with the {end} CIDEr-D of 5 captions" for end in ("highest", "lowest"))
    assert extremes(scores, 2, "captions", "CIDEr-D") == [(1, high), (4, high), (2, low), (0, low)]
    title = "All 5 captions, the highest CIDEr-D first"
    assert extremes(scores, 3, "captions", "CIDEr-D") == [(n, title) for n in (1, 4, 3, 0, 2)]


def test_the_page_has_each_group_under_its_title_and_says_what_it_compares_with() -> None:
    examples = [Example(f"said {n}", group="The first 13") for n in range(13)] + [
        Example("last", group="The worst & last")
    ]
    result = Result("CIDEr-D x 100", 457.0, 400.0, 500.0, 9, "higher", "", "", floor=8.0, ceiling=424.0)
    outcome = MetricResult([result], examples, measure="captioning")
    page = evaluation_html(named(["captioning"]), [outcome])
    assert "<h3>The first 13</h3>" in page
    assert "<h3>The worst &amp; last</h3>" in page
    assert "The other 1<" in page
    assert (
        "the first reference caption of each picture against its others, which a model&#39;s captions can pass" in page
    )
    assert ">reference</th>" in page
    assert ">best</th>" not in page
    assert "perfect" not in page


def test_the_page_opens_with_a_bar_per_metric_then_drawings_then_numbers() -> None:
    """Edits come later, in whatever order the metrics were asked for; a column that no row fills is left out."""
    image = np.zeros((8, 8, 3), np.uint8)
    outcome = []
    for name in ("editing", "text", "drawing"):
        result = Result(f"a number of {name}", 0.5, 0.4, 0.6, 9, "higher", f"code of {name}", "", ceiling=0.9)
        example = Example(f"an example of {name}", [(image, "drawn")] if name != "text" else [], group="All")
        outcome.append(MetricResult([result, replace(result, name=f"more of {name}")], [example], measure=name))
    page = evaluation_html(named(["editing", "text", "drawing"]), outcome)
    order = [
        "<h1>m</h1>",
        *(f"{name}: a number of {name}</span>" for name in ("drawing", "editing", "text")),
        *(f"an example of {name}</p>" for name in ("drawing", "editing", "text")),
        "<h2>Every number</h2>",
        *(f">more of {name}</th>" for name in ("drawing", "editing", "text")),
        "<details><summary>Code, settings and data of each number</summary>",
        "code of editing",
    ]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    assert page.count('class="track"') == 3
    assert ">reference</th>" in page
    assert ">chance</th>" not in page
