"""Evaluation: outputs are made once, numbers repeat, missing inputs are reported before any work."""

from __future__ import annotations

import errno
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
from evaluating import WORLD, coco_file, tiny_context

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
    context,
    drawings,
    evaluate,
    named,
    registry,
)
from transfuse.evaluation import numbers as before
from transfuse.evaluation.confidence import bootstrap
from transfuse.evaluation.generate import Made, Task, generate
from transfuse.evaluation.pairs import Pairs, coco_pairs, further_pairs, ids_fingerprint
from transfuse.evaluation.speed import measure_speed
from transfuse.evaluation.text import CHOICES, continuation, read_texts, windows
from transfuse.inference import TransfusionPipeline, score
from transfuse.sequence import Document, Text, Tokenizer

# --- the first layer --------------------------------------------------------------------------------------------------


def picture_task(count: int, worked_on: list[int], stop_at: int | None = None) -> Task:
    def work(numbers):
        made = []
        for number in numbers:
            if number == stop_at:
                raise KeyboardInterrupt
            worked_on.append(number)
            made.append(Made({"number": number}, np.full((4, 4, 3), number, dtype=np.uint8)))
        return made

    return Task("pictures", {"seed": 0}, count, work)


def test_a_stopped_task_goes_on_and_makes_nothing_twice(tmp_path) -> None:
    worked_on: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, picture_task(10, worked_on, stop_at=7), batch=3)
    assert worked_on == [0, 1, 2, 3, 4, 5, 6]  # 6 was under way in the batch that was lost
    worked_on.clear()
    done = generate(tmp_path, picture_task(10, worked_on), batch=4)
    assert worked_on == [6, 7, 8, 9]
    assert [record["number"] for record in done.records] == list(range(10))
    assert [int(image[0, 0, 0]) for image in done.images()] == list(range(10))
    worked_on.clear()
    assert generate(tmp_path, picture_task(10, worked_on), batch=4).records == done.records
    assert not worked_on


def test_a_line_that_was_being_written_is_made_again(tmp_path) -> None:
    worked_on: list[int] = []
    place = generate(tmp_path, picture_task(4, worked_on), batch=2).folder
    lines = place / "items.jsonl"
    lines.write_bytes(lines.read_bytes()[:-3])
    worked_on.clear()
    assert len(generate(tmp_path, picture_task(4, worked_on), batch=2).records) == 4
    assert worked_on == [3]
    lines.write_text("no json\n")
    with pytest.raises(UserError, match=r"items\.jsonl: expected a JSON record a line"):
        generate(tmp_path, picture_task(4, worked_on), batch=2)


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
    worked_on: list[int] = []
    first = picture_task(2, worked_on)
    other = replace(first, settings={"seed": 1})
    folder = generate(tmp_path, other, 2).folder
    assert generate(tmp_path, first, 2).folder != folder
    assert json.loads((folder / "task.json").read_text()) == {
        "name": "pictures",
        "count": 2,
        "seed": 1,
    }


def test_a_file_that_a_task_cannot_read_is_not_the_folder_that_is_written(tmp_path) -> None:
    def work(numbers):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "gone.png")

    with pytest.raises(UserError, match=r"^pictures: .*No such file or directory: 'gone.png'$"):
        generate(tmp_path, Task("pictures", {}, 2, work), batch=2)


# --- all of it --------------------------------------------------------------------------------------------------------


def test_further_pairs_are_the_next_ones_in_all_their_parts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bench = tiny_context(tokenizer, tmp_path)
    both = bench.needs_scorer("drawing").pairs(7, 16)
    further = further_pairs(bench, 3)
    assert further is not None
    for n in range(3):
        assert further.ids[n] == both.ids[3 + n]
        assert further.prompts[n] == both.prompts[3 + n] in further.references[n]
        assert np.array_equal(further.picture(n), both.picture(3 + n))
        assert further.content(n) == both.content(3 + n)
    assert len(further.ids) == len(further.prompts) == len(further.references)


def test_equal_reconstructions_have_no_distance_and_no_doubt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The images are pairs: their resamples are of the same ones."""
    (outcome,) = evaluate(tiny_context(tokenizer, tmp_path), named(["autoencoder"]))
    (distance,) = (result for result in outcome if result.name.startswith("rFD"))
    assert distance.value == pytest.approx(0, abs=1e-9)
    assert distance.high == pytest.approx(0, abs=1e-6)


@pytest.fixture
def bench(tokenizer: Tokenizer, tmp_path: Path) -> EvalContext:
    return tiny_context(tokenizer, tmp_path / "first")


def numbers(outcomes: list[MetricResult]) -> dict[str, float]:
    return {f"{each.measure} {result.name}": result.value for each in outcomes for result in each}


def test_numbers_are_equal_again_and_with_another_batch_size(bench: EvalContext, tmp_path) -> None:
    measures = named(["text", "choice", "captioning", "drawing"])
    first = list(evaluate(bench, measures))
    again = list(evaluate(replace(bench, folder=tmp_path / "again"), measures))
    assert numbers(again) == numbers(first)
    other = list(evaluate(replace(bench, folder=tmp_path / "other", batch=3), measures))
    assert numbers(other) == pytest.approx(numbers(first), rel=1e-4, abs=1e-9)
    assert all(isinstance(result, Result) and result.measure and result.model for each in first for result in each)
    drawn = next(each for each in first if each.measure == "drawing")
    assert drawn.results[0].drawing == Drawing("ddim", 2, 3.0)
    page = evaluation_html(measures, first)
    assert page.count("<img") == 2 * 6 + 6
    assert "FD-recogniser" in page


def test_candidates_are_drawn_and_one_is_measured(bench: EvalContext, monkeypatch) -> None:
    several = replace(bench, drawing=replace(bench.drawing, candidates=3))
    (outcome,) = evaluate(several, named(["drawing"]))
    assert all(result.drawing == Drawing("ddim", 2, 3.0, candidates=3) for result in outcome.results)
    assert "seed 0, the best of 3 by the model's own score" in unescape(evaluation_html(named(["drawing"]), [outcome]))
    with pytest.raises(UserError, match="editing: --candidates: expected 1, as edits have no others, found 3"):
        list(evaluate(several, named(["editing"])))
    sweep = Drawing.sweep("candidates=1,3", bench.drawing)
    monkeypatch.setattr(bench.pipe.engine, "run", lambda requests: pytest.fail("work was done"))
    with pytest.raises(UserError, match="editing: --candidates: expected 1"):
        list(evaluate(bench, named(["editing"]), sweep))
    monkeypatch.undo()
    prompts = [example.text for example in outcome.examples]
    kept = bench.pipe(
        prompts, num_inference_steps=2, sampler="ddim", candidates=3, generator=0, output_type="np"
    ).images
    assert len(prompts) == 6
    assert all(np.array_equal(a, example.pictures[0][0]) for a, example in zip(kept, outcome.examples, strict=True))


@pytest.mark.parametrize("name", ["text", "choice", "captioning", "drawing", "composition", "editing", "autoencoder"])
def test_a_metric_names_its_numbers_titles_its_examples_and_explains_its_marks(
    bench: EvalContext, name: str, monkeypatch
) -> None:
    monkeypatch.setattr("emoji_scenes.metrics.FEWEST_JUDGED", 6)
    (metric,) = named([name])
    (outcome,) = evaluate(bench, [metric])
    assert before(bench, [metric]) == [f"{name}/{result.name}" for result in outcome]
    assert outcome.examples
    assert all(example.group for example in outcome.examples)
    assert all("Chance" in metric.compared for result in outcome if result.floor is not None)
    assert all("eference" in metric.compared for result in outcome if result.ceiling is not None)


def test_numbers_of_texts_carry_the_file_s_name(bench: EvalContext, tmp_path) -> None:
    write(tmp_path, {"novel.txt": "a crab is a small animal " * 20})
    wanted = replace(bench, options=replace(bench.options, texts=(tmp_path / "novel.txt",)))
    (outcome,) = evaluate(wanted, named(["text"]))
    assert before(wanted, named(["text"])) == [f"text/{result.name}" for result in outcome]


def once(work, device) -> list[float]:
    """Time nothing, and run the work once."""
    work()
    return [1.0, 1.0, 1.0]


@pytest.mark.parametrize("images", ["latents", "none"])
def test_the_names_of_paces_are_known_before(bench: EvalContext, tokenizer: Tokenizer, images: str) -> None:
    wanted = bench
    if images == "none":
        words = exported(tokenizer, images="none")
        words.image_size = 16
        wanted = replace(bench, pipe=TransfusionPipeline(words), drawing=Drawing())
    outcome = measure_speed(wanted.resolved(), once)
    assert before(wanted, named(["speed"])) == [f"speed/{result.name}" for result in outcome]
    assert any("pictures" in result.name for result in outcome) is (images == "latents")


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
        outcome = measure_speed(several.resolved(), once)
        assert ("each the best of 3" in outcome.results[3].data) is (candidates == 3)
    assert steps == [5, 15]


def test_nothing_is_drawn_twice(bench: EvalContext, monkeypatch) -> None:
    list(evaluate(bench, named(["drawing"])))
    monkeypatch.setattr(bench.pipe.engine, "run", lambda requests: pytest.fail("drawn again"))
    list(evaluate(bench, named(["drawing"])))


def test_a_sweep_draws_with_each_value(bench: EvalContext) -> None:
    sweep = Drawing.sweep("guidance_scale=1,3", bench.drawing)
    outcome = list(evaluate(bench, named(["drawing", "captioning"]), sweep))
    assert [each.measure for each in outcome] == ["drawing", "drawing", "captioning"]
    scales = [each.results[0].drawing.guidance_scale for each in outcome[:2] if each.results[0].drawing]
    assert scales == [1.0, 3.0]
    assert outcome[0].results[0].value != outcome[1].results[0].value
    assert "<svg" in evaluation_html(named(["drawing"]), outcome)
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


def test_the_registry_s_worked_example_works(bench: EvalContext) -> None:
    """The code of its docstring, run as it is printed."""
    lines = [line[4:] for line in (registry.__doc__ or "").splitlines() if line.startswith("    ")]
    example = "\n".join(line for line in lines if not line.startswith("for result in"))
    names = {**vars(context), **vars(drawings), "bootstrap": bootstrap}
    exec(example, names)
    (outcome,) = evaluate(bench, [names["BRIGHTNESS"]])
    (level,) = outcome
    assert 0 < level.low < level.value < level.high < 255
    assert before(bench, [names["BRIGHTNESS"]]) == ["brightness/level"]
    assert "brightness: level" in evaluation_html([names["BRIGHTNESS"]], [outcome])


def test_suites_name_measures() -> None:
    assert set().union(*SUITES.values()) <= set(all_metrics())
    assert [measure.name for measure in named(["choice", "quick"])].count("choice") == 1
    assert all(measure.about for measure in all_metrics().values())


def test_a_text_model_is_not_asked_to_draw(tokenizer: Tokenizer, tmp_path) -> None:
    bench = EvalContext(
        TransfusionPipeline(exported(tokenizer, images="none")), "a", tmp_path, SceneScorer(WORLD), EvalConfig(count=3)
    )
    assert [each.measure for each in evaluate(bench, named(["choice"]))] == ["choice"]
    with pytest.raises(UserError, match="drawing: expected a model that knows images"):
        list(evaluate(bench, named(["choice", "drawing"])))


# --- text -------------------------------------------------------------------------------------------------------------


def test_windows_cover_every_token_once() -> None:
    tokens = list(range(23))
    for room, stride in ((5, 5), (5, 2), (8, 1), (40, 40)):
        cut = list(windows(tokens, room, stride))
        assert [token for _, each in cut for token in each] == tokens
        assert all(len(context) + len(each) <= room for context, each in cut)
        assert all(context == tokens[each[0] - len(context) : each[0]] for context, each in cut)
        assert all(len(context) == room - stride for context, _ in cut[1:])
    with pytest.raises(ValueError, match="stride: expected 1 to 5"):
        list(windows(tokens, 5, 6))


def test_a_long_text_is_measured_in_blocks_or_slides(bench: EvalContext, tmp_path) -> None:
    text = "a crab on a red background and the moon above a small boat on blue, hello, world. " * 60
    path = write(tmp_path / "in", {"prose.txt": text}) / "prose.txt"
    outcome = {}
    for stride, batch in ((None, 4), (None, 1), (50, 4)):
        options = replace(bench.options, texts=(path,), stride=stride)
        context = replace(bench, options=options, batch=batch, folder=tmp_path / f"{stride}-{batch}")
        outcome[stride, batch] = {result.name: result for each in evaluate(context, named(["text"])) for result in each}
    blocked, slid = outcome[None, 4], outcome[50, 4]
    alone = outcome[None, 1]["bits per byte of prose"].value
    assert blocked["bits per byte of prose"].value == pytest.approx(alone, rel=1e-6)
    assert f"{len(text.strip().encode())} bytes" in blocked["perplexity of prose"].data
    assert "blocked, 255 tokens" in blocked["perplexity of prose"].implementation
    assert "sliding by 50, 255 tokens" in slid["perplexity of prose"].implementation
    exported_model = bench.pipe.exported
    ids = exported_model.tokenizer.encode(text.strip())
    blocks = [Document([Text(ids[start : start + 255])], closed=False) for start in range(0, len(ids), 255)]
    nats = sum(scores.nll.sum() for scores in score(exported_model, blocks))
    assert blocked["perplexity of prose"].value == pytest.approx(np.exp(nats / len(ids)), rel=1e-6)
    with pytest.raises(UserError, match="--stride: expected 1 to 255"):
        list(evaluate(replace(bench, options=replace(bench.options, texts=(path,), stride=256)), named(["text"])))


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
    questions = definition_questions(200)
    assert questions == definition_questions(300)[:200]
    assert all(len(set(question.choices)) == CHOICES for question in questions)
    lengths = np.array([[len(text) for text in question.choices] for question in questions])
    answers = np.array([question.answer for question in questions])
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
    captions = [{"id": 10 * n + k, "image_id": n, "caption": f"caption {k} of {n}"} for n in range(6) for k in range(2)]
    coco = {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(6)], "annotations": captions}
    sentences = [[{"raw": f"caption {k} of {n}"} for k in range(2)] for n in range(6)]
    karpathy = {
        "images": [
            {"cocoid": n, "filename": f"{n}.png", "filepath": "val", "split": "test" if n else "val", "sentences": each}
            for n, each in enumerate(sentences)
        ]
    }
    write(tmp_path, {"coco.json": json.dumps(coco), "karpathy.json": json.dumps(karpathy)})
    few, all_of = (coco_pairs(tmp_path / "coco.json", tmp_path / "pictures", count, 16) for count in (3, 6))
    assert few.ids == all_of.ids[:3]  # fewer are the first of more
    assert few.prompts == all_of.prompts[:3]
    assert sorted(all_of.ids) == [str(n) for n in range(6)]
    assert all(prompt in each for prompt, each in zip(all_of.prompts, all_of.references, strict=True))
    number = all_of.ids.index("5")
    assert all_of.picture(number).shape == (16, 16, 3)
    assert all_of.picture(number)[0, 0, 0] == 50
    assert sorted(coco_pairs(tmp_path / "karpathy.json", tmp_path / "pictures", 9, 16).ids) == list("12345")
    write(tmp_path, {"other.json": '{"images": [{"split": 1}]}'})
    with pytest.raises(UserError, match="expected COCO's or Karpathy's captions"):
        coco_pairs(tmp_path / "other.json", tmp_path, 1, 16)


def coco(folder: Path, ids: list[int]) -> dict[str, list[str]]:
    """Write captions.json of as many pictures, and return the captions of each by its id."""
    coco_file(folder, ids, [[f" caption {k}  of {n}\n" for k in range(3)] for n in ids])
    return {str(n): [f"caption {k}  of {n}" for k in range(3)] for n in ids}


def test_the_rule_for_coco_is_frozen(tmp_path, monkeypatch) -> None:
    """Forty thousand ids, as in val2014: ordered by the rule as written, with the fingerprints it always gave."""
    ids = [7 * n + 42 for n in range(40_504)]
    captions = coco(tmp_path, ids)
    monkeypatch.setattr(Path, "is_file", lambda path: True)

    def digest(text: str) -> bytes:
        return hashlib.sha256(text.encode()).digest()

    order = sorted(captions, key=digest)
    for count, fingerprint in ((5_000, "9eb10cde17b4"), (30_000, "8c78e89b84ef")):
        pairs = coco_pairs(tmp_path / "captions.json", tmp_path, count, 16)
        assert pairs.ids == order[:count]
        assert pairs.prompts == [min(captions[n], key=lambda text, n=n: digest(f"{n}:{text}")) for n in order[:count]]
        written = "".join(f"{n}\n" for n in order[:count]).encode()
        assert ids_fingerprint(pairs.ids) == hashlib.sha256(written).hexdigest()[:12] == fingerprint
        assert pairs.label.startswith(f"captions by rule 1, {count} pictures, ids {fingerprint}, prompts ")


def test_a_list_of_ids_is_followed(tmp_path) -> None:
    captions = coco(tmp_path, [3, 5, 8, 13])
    write(tmp_path, {f"{n}.png": b"" for n in captions})
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
        captions = capsys.readouterr().err
        assert missing in captions
        assert "from https://" in captions


def test_command_line_names_mistakes(tmp_path, capsys) -> None:
    assert run(["evaluate", "--model", str(tmp_path), "--count", "0"]) == 2
    assert "--count: expected at least 1" in capsys.readouterr().err
    assert run(["evaluate", "--model", str(tmp_path), "--suite", "fast"]) == 2
    assert 'unknown measure "fast"' in capsys.readouterr().err
    assert run(["evaluate", "--model", str(tmp_path), "--sweep", "colour=1"]) == 2
    assert "--sweep: expected one of" in capsys.readouterr().err
