"""The three layers: what is made is made once, numbers are the same again, what is missing is said before any work."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from conftest import evaluation_html, exported, write

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer, definition_questions
from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.evaluation import (
    SUITES,
    Drawing,
    EvalConfig,
    EvalContext,
    MetricResult,
    Result,
    all_metrics,
    evaluate,
    named,
)
from transfuse.evaluation import numbers as before
from transfuse.evaluation.confidence import bootstrap
from transfuse.evaluation.generate import Made, Task, generate
from transfuse.evaluation.pairs import Pairs, coco_pairs, ids_fingerprint
from transfuse.evaluation.speed import measure_speed
from transfuse.evaluation.text import CHOICES, continuation, read_texts, windows
from transfuse.inference import TransfusionPipeline, score
from transfuse.sequence import Document, Text, Tokenizer

WORLD = WorldConfig(size=16, nouns=4, max_objects=1, max_count=1)


# --- the first layer --------------------------------------------------------------------------------------------------


def picture_task(count: int, asked: list[int], stop_at: int | None = None) -> Task:
    def work(numbers):
        made = []
        for number in numbers:
            if number == stop_at:
                raise KeyboardInterrupt
            asked.append(number)
            made.append(Made({"number": number}, np.full((4, 4, 3), number, dtype=np.uint8)))
        return made

    return Task("pictures", {"seed": 0}, count, work)


def test_a_stopped_task_goes_on_and_makes_nothing_twice(tmp_path) -> None:
    asked: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, picture_task(10, asked, stop_at=7), batch=3)
    assert asked == [0, 1, 2, 3, 4, 5, 6]  # 6 was under way in the batch that was lost
    asked.clear()
    done = generate(tmp_path, picture_task(10, asked), batch=4)
    assert asked == [6, 7, 8, 9]
    assert [record["number"] for record in done.records] == list(range(10))
    assert [int(image[0, 0, 0]) for image in done.images()] == list(range(10))
    asked.clear()
    assert generate(tmp_path, picture_task(10, asked), batch=4).records == done.records
    assert not asked


def test_a_line_that_was_being_written_is_made_again(tmp_path) -> None:
    asked: list[int] = []
    place = generate(tmp_path, picture_task(4, asked), batch=2).folder
    lines = place / "items.jsonl"
    lines.write_bytes(lines.read_bytes()[:-3])
    asked.clear()
    assert len(generate(tmp_path, picture_task(4, asked), batch=2).records) == 4
    assert asked == [3]
    lines.write_text("no json\n")
    with pytest.raises(UserError, match=r"items\.jsonl: expected a JSON record a line"):
        generate(tmp_path, picture_task(4, asked), batch=2)


def test_two_processes_at_once_make_one_set(tmp_path) -> None:
    """The second waits, and reads: no line twice, none cut off."""
    context = multiprocessing.get_context("fork")
    turns = [context.Process(target=generate, args=(tmp_path, slow_task(6), size)) for size in (1, 2, 3)]
    for turn in turns:
        turn.start()
    for turn in turns:
        turn.join(60)
        assert turn.exitcode == 0
    made = generate(tmp_path, slow_task(6), 1)
    assert [record["number"] for record in made.records] == list(range(6))
    assert len({record["by"] for record in made.records}) == 1


def slow_task(count: int) -> Task:
    def work(numbers):
        time.sleep(0.1)
        return [Made({"number": number, "by": os.getpid()}) for number in numbers]

    return Task("slow", {}, count, work)


def test_another_setting_is_another_folder(tmp_path) -> None:
    asked: list[int] = []
    first = picture_task(2, asked)
    other = replace(first, settings={"seed": 1})
    folder = generate(tmp_path, other, 2).folder
    assert generate(tmp_path, first, 2).folder != folder
    assert json.loads((folder / "task.json").read_text()) == {
        "name": "pictures",
        "count": 2,
        "seed": 1,
    }


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tokenizer: Tokenizer, tmp_path: Path) -> EvalContext:
    loaded = exported(tokenizer)
    loaded.image_size = 16
    options = EvalConfig(count=6, judge_steps=2)
    drawing = Drawing(sampler="ddim", steps=2)
    return EvalContext(
        TransfusionPipeline(loaded), "a model", tmp_path / "first", SceneScorer(WORLD), options, drawing, batch=4
    )


def numbers(found: list[MetricResult]) -> dict[str, float]:
    return {f"{some.measure} {result.name}": result.value for some in found for result in some}


def test_numbers_are_equal_again_and_with_another_batch_size(bench: EvalContext, tmp_path, monkeypatch) -> None:
    measures = named(["text", "choice", "captioning", "drawing"])
    monkeypatch.setattr(SceneScorer, "texts", lambda scorer: ["a crab: an animal", "two: 1 and 1"] * 3)
    first = list(evaluate(bench, measures))
    again = list(evaluate(replace(bench, folder=tmp_path / "again"), measures))
    assert numbers(again) == numbers(first)
    other = list(evaluate(replace(bench, folder=tmp_path / "other", batch=3), measures))
    assert numbers(other) == pytest.approx(numbers(first), rel=1e-4, abs=1e-9)
    assert all(isinstance(result, Result) and result.measure and result.model for some in first for result in some)
    drawn = next(some for some in first if some.measure == "drawing")
    assert drawn.results[0].drawing == Drawing("ddim", 2, 3.0)
    page = evaluation_html(measures, first)
    assert page.count("<img") == 2 * 6 + 6
    assert "FD-recogniser" in page


def test_candidates_are_drawn_and_one_is_measured(bench: EvalContext, monkeypatch) -> None:
    several = replace(bench, drawing=replace(bench.drawing, candidates=3))
    (found,) = evaluate(several, named(["drawing"]))
    assert all(result.drawing == Drawing("ddim", 2, 3.0, candidates=3) for result in found.results)
    assert "seed 0, the best of 3 by the model's own score" in unescape(evaluation_html(named(["drawing"]), [found]))
    with pytest.raises(UserError, match="editing: --candidates: expected 1, as edits have no others, found 3"):
        list(evaluate(several, named(["editing"])))
    sweep = Drawing.sweep("candidates=1,3", bench.drawing)
    monkeypatch.setattr(bench.pipe.engine, "run", lambda requests: pytest.fail("work was done"))
    with pytest.raises(UserError, match="editing: --candidates: expected 1"):
        list(evaluate(bench, named(["editing"]), sweep))
    monkeypatch.undo()
    prompts = [exhibit.text for exhibit in found.exhibits]
    kept = bench.pipe(
        prompts, num_inference_steps=2, sampler="ddim", candidates=3, generator=0, output_type="np"
    ).images
    assert len(prompts) == 6
    assert all(np.array_equal(a, exhibit.pictures[0][0]) for a, exhibit in zip(kept, found.exhibits, strict=True))


@pytest.mark.parametrize("name", ["text", "choice", "captioning", "drawing", "composition", "editing", "autoencoder"])
def test_the_names_of_numbers_are_known_before(bench: EvalContext, name: str, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(SceneScorer, "texts", lambda scorer: ["a crab: an animal", "two: 1 and 1"] * 3)
    monkeypatch.setattr("emoji_scenes.metrics.FEWEST_JUDGED", 6)
    write(tmp_path, {"novel.txt": "a crab is a small animal " * 20})
    for changes in ({}, {"texts": (tmp_path / "novel.txt",)}):
        asked = replace(bench, options=replace(bench.options, **changes))
        (found,) = evaluate(asked, named([name]))
        assert before(asked, named([name])) == [f"{name}/{result.name}" for result in found]


def once(work, device) -> list[float]:
    """Time nothing, and run the work once."""
    work()
    return [1.0, 1.0, 1.0]


@pytest.mark.parametrize("images", ["latents", "none"])
def test_the_names_of_paces_are_known_before(bench: EvalContext, tokenizer: Tokenizer, images: str) -> None:
    asked = bench
    if images == "none":
        words = exported(tokenizer, images="none")
        words.image_size = 16
        asked = replace(bench, pipe=TransfusionPipeline(words), drawing=Drawing())
    found = measure_speed(asked.resolved(), once)
    assert before(asked, named(["speed"])) == [f"speed/{result.name}" for result in found]
    assert any("pictures" in result.name for result in found) is (images == "latents")


def test_the_pace_of_drawing_is_that_of_all_candidates(bench: EvalContext, monkeypatch) -> None:
    steps: list[int] = []
    drawn = bench.pipe.engine.run
    for candidates in (1, 3):
        steps.append(0)

        def counted(requests, drawn=drawn):
            steps[-1] += sum(request.draw == "force" for request in requests)
            return drawn(requests)

        monkeypatch.setattr(bench.pipe.engine, "run", counted)
        several = replace(bench, drawing=replace(bench.drawing, candidates=candidates))
        found = measure_speed(several.resolved(), once)
        assert ("each the best of 3" in found.results[3].data) is (candidates == 3)
    assert steps == [5, 15]


def test_nothing_is_drawn_twice(bench: EvalContext, monkeypatch) -> None:
    list(evaluate(bench, named(["drawing"])))
    monkeypatch.setattr(bench.pipe.engine, "run", lambda requests: pytest.fail("drawn again"))
    list(evaluate(bench, named(["drawing"])))


def test_a_sweep_draws_with_each_value(bench: EvalContext) -> None:
    sweep = Drawing.sweep("guidance_scale=1,3", bench.drawing)
    found = list(evaluate(bench, named(["drawing", "captioning"]), sweep))
    assert [some.measure for some in found] == ["drawing", "drawing", "captioning"]
    scales = [some.results[0].drawing.guidance_scale for some in found[:2] if some.results[0].drawing]
    assert scales == [1.0, 3.0]
    assert found[0].results[0].value != found[1].results[0].value
    assert "<svg" in evaluation_html(named(["drawing"]), found)
    with pytest.raises(ValueError, match="expected one of sampler, steps, guidance_scale, candidates, seed"):
        Drawing.sweep("guidance=1", bench.drawing)


def test_what_is_missing_is_said_before_any_work(bench: EvalContext, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench.pipe.engine, "run", lambda requests: pytest.fail("work was done"))
    with pytest.raises(UserError, match="--features: expected"):
        list(evaluate(replace(bench, options=EvalConfig(features="nowhere.pth")), named(["captioning", "drawing"])))
    with pytest.raises(UserError, match=r"open_clip|--clip"):
        list(evaluate(bench, named(["captioning", "clip"])))
    captions = tmp_path / "captions_val2014.json"
    options = replace(bench.options, captions=captions, images=tmp_path)
    with pytest.raises(UserError, match=r"captions_val2014\.json.*found none; from https://cocodataset\.org"):
        list(evaluate(replace(bench, options=options), named(["captioning"])))
    with pytest.raises(UserError, match="at least 4 pictures, found 3"):
        list(evaluate(replace(bench, options=EvalConfig(count=3)), named(["drawing"])))
    for name in ("count", "judge_steps", "stride"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}: expected at least 1, found 0"):
            EvalConfig(**{name: 0})
    with pytest.raises(UserError, match='unknown measure "drawings"; did you mean "drawing"'):
        named(["drawings"])
    with pytest.raises(UserError, match=r"--texts, found none"):
        list(evaluate(replace(bench, options=EvalConfig(texts=(tmp_path / "c4.jsonl",))), named(["text"])))


def test_suites_name_measures() -> None:
    assert set().union(*SUITES.values()) <= set(all_metrics())
    assert [measure.name for measure in named(["choice", "quick"])].count("choice") == 1
    assert all(measure.about for measure in all_metrics().values())


def test_a_text_model_is_not_asked_to_draw(tokenizer: Tokenizer, tmp_path) -> None:
    bench = EvalContext(
        TransfusionPipeline(exported(tokenizer, images="none")), "a", tmp_path, SceneScorer(WORLD), EvalConfig(count=3)
    )
    assert [some.measure for some in evaluate(bench, named(["choice"]))] == ["choice"]
    with pytest.raises(UserError, match="drawing: expected a model that knows images"):
        list(evaluate(bench, named(["choice", "drawing"])))


# --- text -------------------------------------------------------------------------------------------------------------


def test_windows_cover_every_token_once() -> None:
    tokens = list(range(23))
    for room, stride in ((5, 5), (5, 2), (8, 1), (40, 40)):
        cut = list(windows(tokens, room, stride))
        assert [token for _, some in cut for token in some] == tokens
        assert all(len(context) + len(some) <= room for context, some in cut)
        assert all(context == tokens[some[0] - len(context) : some[0]] for context, some in cut)
        assert all(len(context) == room - stride for context, _ in cut[1:])
    with pytest.raises(ValueError, match="stride: expected 1 to 5"):
        list(windows(tokens, 5, 6))


def test_a_long_text_is_measured_in_blocks_or_slides(bench: EvalContext, tmp_path) -> None:
    text = "a crab on a red background and the moon above a small boat on blue, hello, world. " * 60
    path = write(tmp_path / "in", {"prose.txt": text}) / "prose.txt"
    found = {}
    for stride, batch in ((None, 4), (None, 1), (50, 4)):
        options = replace(bench.options, texts=(path,), stride=stride)
        one = replace(bench, options=options, batch=batch, folder=tmp_path / f"{stride}-{batch}")
        found[stride, batch] = {result.name: result for some in evaluate(one, named(["text"])) for result in some}
    blocked, slid = found[None, 4], found[50, 4]
    alone = found[None, 1]["bits per byte of prose"].value
    assert blocked["bits per byte of prose"].value == pytest.approx(alone, rel=1e-6)
    assert f"{len(text.strip().encode())} bytes" in blocked["perplexity of prose"].data
    assert "blocked, 255 tokens" in blocked["perplexity of prose"].implementation
    assert "sliding by 50, 255 tokens" in slid["perplexity of prose"].implementation
    exported_model = bench.pipe.exported
    ids = exported_model.tokenizer.encode(text.strip())
    blocks = [Document([Text(ids[start : start + 255])], closed=False) for start in range(0, len(ids), 255)]
    nats = sum(one.nll.sum() for one in score(exported_model, blocks))
    assert blocked["perplexity of prose"].value == pytest.approx(np.exp(nats / len(ids)), rel=1e-6)
    with pytest.raises(UserError, match="--stride: expected 1 to 255"):
        list(evaluate(replace(bench, options=replace(bench.options, stride=256)), named(["text"])))


def test_texts_of_files(tmp_path) -> None:
    files = write(tmp_path, {"a.jsonl": '{"text": "one"}\n{"text": "two"}\n', "b.txt": "three\n"})
    assert read_texts(files / "a.jsonl") == ["one", "two"]
    assert read_texts(files / "b.txt") == ["three"]
    write(tmp_path, {"bad.jsonl": '{"text": "one"}\n{"words": "two"}\n'})
    with pytest.raises(UserError, match=r"bad\.jsonl.*:2: expected a document"):
        read_texts(files / "bad.jsonl")


def test_foretold_tokens_are_those_learned_and_context_counts(bench: EvalContext) -> None:
    loaded = bench.pipe.exported
    whole = loaded.tokenizer.encode("a crab on a red background")
    parts = Document([Text(whole[:3], predict=False), Text(whole[3:])], closed=False)
    together = score(loaded, [Document([Text(whole)], closed=False), parts])
    np.testing.assert_allclose(together[1].nll, together[0].nll[3:], rtol=1e-4)
    assert len(score(loaded, [Document([Text(whole)])])[0].nll) == len(whole) + 1


def test_questions_have_one_true_ending_of_like_length() -> None:
    asked = definition_questions(200)
    assert asked == definition_questions(300)[:200]
    assert all(len(set(question.choices)) == CHOICES for question in asked)
    lengths = np.array([[len(text) for text in question.choices] for question in asked])
    answers = np.array([question.answer for question in asked])
    assert 0.12 < (lengths.argmax(1) == answers).mean() < 0.45  # the longest is no hint
    assert set(answers.tolist()) == set(range(CHOICES))


def test_a_continuation_is_cut_where_the_text_is(tokenizer: Tokenizer) -> None:
    document = continuation(tokenizer, "a crab on", " a red background")
    known, rest = document.parts
    assert tokenizer.decode(known.ids + rest.ids) == "a crab on a red background"
    assert tokenizer.decode(known.ids) == "a crab on"
    assert not known.predict
    across = continuation(tokenizer, "a crab on a re", "d background").parts
    assert tokenizer.decode(across[0].ids) == "a crab on a", "the token across the border is foretold, no other"
    empty = continuation(tokenizer, "", "a crab")
    assert tokenizer.decode(empty.parts[1].ids) == "a crab"


# --- data -------------------------------------------------------------------------------------------------------------


def test_coco_and_karpathy_files(tmp_path) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for number in range(6):
        Image.new("RGB", (20 + number, 30), (10 * number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    said = [{"id": 10 * n + k, "image_id": n, "caption": f"caption {k} of {n}"} for n in range(6) for k in range(2)]
    coco = {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(6)], "annotations": said}
    sentences = [[{"raw": f"caption {k} of {n}"} for k in range(2)] for n in range(6)]
    karpathy = {
        "images": [
            {"cocoid": n, "filename": f"{n}.png", "filepath": "val", "split": "test" if n else "val", "sentences": some}
            for n, some in enumerate(sentences)
        ]
    }
    write(tmp_path, {"coco.json": json.dumps(coco), "karpathy.json": json.dumps(karpathy)})
    few, all_of = (coco_pairs(tmp_path / "coco.json", tmp_path / "pictures", count, 16) for count in (3, 6))
    assert few.ids == all_of.ids[:3]  # fewer are the first of more
    assert few.prompts == all_of.prompts[:3]
    assert sorted(all_of.ids) == [str(n) for n in range(6)]
    assert all(prompt in some for prompt, some in zip(all_of.prompts, all_of.references, strict=True))
    number = all_of.ids.index("5")
    assert all_of.picture(number).shape == (16, 16, 3)
    assert all_of.picture(number)[0, 0, 0] == 50
    assert sorted(coco_pairs(tmp_path / "karpathy.json", tmp_path / "pictures", 9, 16).ids) == list("12345")
    write(tmp_path, {"other.json": '{"images": [{"split": 1}]}'})
    with pytest.raises(UserError, match="expected COCO's or Karpathy's captions"):
        coco_pairs(tmp_path / "other.json", tmp_path, 1, 16)


def coco(folder: Path, ids: list[int]) -> dict[str, list[str]]:
    """captions.json of as many pictures, and the captions of each by its id; the pictures are one pixel files."""
    said = [{"id": 3 * n + k, "image_id": n, "caption": f" caption {k}  of {n}\n"} for n in ids for k in range(3)]
    images = [{"id": n, "file_name": f"{n}.png"} for n in ids]
    write(folder, {"captions.json": json.dumps({"images": images, "annotations": said})})
    return {str(n): [f"caption {k}  of {n}" for k in range(3)] for n in ids}


def test_the_rule_for_coco_is_frozen(tmp_path, monkeypatch) -> None:
    """As many ids as val2014 has: by the rule as its words have it, and to the fingerprints it always gave."""
    ids = [7 * n + 42 for n in range(40_504)]
    said = coco(tmp_path, ids)
    monkeypatch.setattr(Path, "is_file", lambda path: True)

    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    order = sorted(said, key=digest)
    for count, fingerprint in ((5_000, "9eb10cde17b4"), (30_000, "8c78e89b84ef")):
        pairs = coco_pairs(tmp_path / "captions.json", tmp_path, count, 16)
        assert pairs.ids == order[:count]
        assert pairs.prompts == [min(said[n], key=lambda text, n=n: digest(f"{n}:{text}")) for n in order[:count]]
        written = "".join(f"{n}\n" for n in order[:count]).encode()
        assert ids_fingerprint(pairs.ids) == hashlib.sha256(written).hexdigest()[:12] == fingerprint
        assert pairs.label.startswith(f"captions by rule 1, {count} pictures, ids {fingerprint}, prompts ")


def test_a_list_of_ids_is_followed(tmp_path) -> None:
    said = coco(tmp_path, [3, 5, 8, 13])
    write(tmp_path, {f"{n}.png": b"" for n in said})
    write(
        tmp_path,
        {
            "ids.txt": "13\n000005\n\n8\n",
            "list.csv": '\ufeffnumber,image_id,text\n0,8,"caption 1 of 8"\n1,3,caption 2 of 3\n',
        },
    )

    def pairs(name: str, count: int = 9) -> Pairs:
        return coco_pairs(tmp_path / "captions.json", tmp_path, count, 16, tmp_path / name)

    assert pairs("ids.txt").ids == ["13", "5", "8"]
    assert pairs("ids.txt", 2).ids == ["13", "5"]
    by_rule = coco_pairs(tmp_path / "captions.json", tmp_path, 9, 16)
    assert (
        dict(zip(pairs("ids.txt").ids, pairs("ids.txt").prompts, strict=True)).items()
        <= dict(zip(by_rule.ids, by_rule.prompts, strict=True)).items()
    )
    assert (pairs("list.csv").ids, pairs("list.csv").prompts) == (["8", "3"], ["caption 1  of 8", "caption 2  of 3"])
    assert pairs("list.csv").label.startswith("captions by list.csv, 2 pictures, ids ")
    labels = {pairs("ids.txt").label, pairs("ids.txt", 2).label, pairs("list.csv").label, by_rule.label}
    assert len(labels) == 4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("3\n99\n77\n", r"ids\.txt: expected pictures of .*captions\.json, found 2 it has not, the first 99"),
        ("3\nfive\n", "line 2: expected a picture's id, found five"),
        ("3\n5\n3\n", "line 3: expected each picture once, found 3 again"),
        ("", "expected pictures' ids, found an empty list"),
        ("name,words\n3,x\n", "line 1: expected an id a line, or a column image_id or .*, found name, words"),
        ("image_id,text\n3,another\n", r"expected a caption of picture 3 in .*captions\.json, found 'another'"),
        (None, r"ids\.txt: expected a list of pictures' ids, found none"),
        ("3\n5\n8\n", r"5\.png: expected a picture that .*captions\.json names, found none, nor of 1 others; from"),
    ],
)
def test_lists_that_do_not_fit_are_one_line(bench: EvalContext, tmp_path, text: str | None, line: str) -> None:
    coco(tmp_path, [3, 5, 8])
    write(tmp_path, {"3.png": b""} | ({} if text is None else {"ids.txt": text}))
    options = replace(bench.options, captions=tmp_path / "captions.json", images=tmp_path, ids=tmp_path / "ids.txt")
    with pytest.raises(UserError, match=line) as caught:
        list(evaluate(replace(bench, options=options), named(["drawing"])))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--ids: expected --captions"):
        list(evaluate(replace(bench, options=replace(options, captions=None)), named(["drawing"])))


def test_interval_of_many_items_takes_little_memory() -> None:
    values = np.random.default_rng(0).normal(30, 4, 900)
    assert bootstrap(values, at_once=5000) == bootstrap(values)


def test_the_paper_s_suite_falls_back_on_nothing(tmp_path, capsys) -> None:
    for options, missing in (
        ([], "--texts: expected held-out C4"),
        (["--texts", "c4.jsonl"], "--captions: expected captions_val2014.json"),
        (["--texts", "c4.jsonl", "--captions", "a", "--images", "b", "--clip", "c", "--geneval", "d"], "--features"),
    ):
        assert run(["evaluate", "--model", str(tmp_path), "--suite", "paper", *options]) == 2
        said = capsys.readouterr().err
        assert missing in said
        assert "from https://" in said


def test_command_line_names_mistakes(tmp_path, capsys) -> None:
    assert run(["evaluate", "--model", str(tmp_path), "--count", "0"]) == 2
    assert "--count: expected at least 1" in capsys.readouterr().err
    assert run(["evaluate", "--model", str(tmp_path), "--suite", "fast"]) == 2
    assert 'unknown measure "fast"' in capsys.readouterr().err
    assert run(["evaluate", "--model", str(tmp_path), "--sweep", "colour=1"]) == 2
    assert "--sweep: expected one of" in capsys.readouterr().err
