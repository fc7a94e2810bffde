"""The face towards lm-evaluation-harness, with a stand-in for its base class; with the package itself where it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from conftest import exported, write

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.errors import UserError
from transfuse.evaluation import EvalConfig, EvalContext, evaluate, named
from transfuse.evaluation.text import full_windows, harness_model
from transfuse.inference import TransfusionPipeline, score
from transfuse.sequence import Document, Text, Tokenizer

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def pipe(tokenizer: Tokenizer) -> TransfusionPipeline:
    return TransfusionPipeline(exported(tokenizer, max_seq_len=32))


@pytest.fixture
def model(pipe, monkeypatch):
    if not INSTALLED:
        stand_in = ModuleType("lm_eval.api.model")
        stand_in.LM = object  # type: ignore[attr-defined]
        for name in ("lm_eval", "lm_eval.api"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", stand_in)
    return harness_model(pipe, batch=2)


def requests_of(*arguments) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in arguments]


def test_log_likelihoods_add_up(model, pipe) -> None:
    """The score of a text is that of its beginning plus that of its end given the beginning."""
    text = "a crab on a red background"
    whole, begin, end = model.loglikelihood(
        requests_of(("", text), ("", "a crab on"), ("a crab on", " a red background"))
    )
    assert whole[0] == pytest.approx(begin[0] + end[0], rel=1e-4)
    ids = pipe.exported.tokenizer.encode(text)
    alone = score(pipe.exported, [Document([Text(ids)], closed=False)])[0]
    assert whole[0] == pytest.approx(-alone.nll.sum(), rel=1e-5)
    assert whole[1] == bool(alone.is_argmax.all())
    assert model.loglikelihood_rolling(requests_of((text,)))[0] == pytest.approx(whole[0], rel=1e-5)


def test_writing_is_the_pipeline_s_own_and_ends_where_it_is_told(model, pipe) -> None:
    contexts = ["a crab", "the moon", "two balloons", "hello", "red"]
    texts = model.generate_until(requests_of(*((context, {"until": [], "max_gen_toks": 20}) for context in contexts)))
    replies = [pipe.generate(context, draw="never", max_tokens=20).text for context in contexts]
    assert texts == replies
    assert any(texts)
    longest = max(texts, key=len)
    context, stop = contexts[texts.index(longest)], longest[len(longest) // 2]
    stopped = model.generate_until(requests_of((context, {"until": [stop], "max_gen_toks": 20})))[0]
    assert stopped == longest.split(stop)[0]


def test_long_contexts_lose_their_beginning(model) -> None:
    long = "two balloons " * 40
    actual = model.loglikelihood(requests_of((long, " hello"), ("boat " + long, " hello")))
    assert np.isfinite(actual[0][0])
    assert actual[0] == actual[1]
    assert np.isfinite(model.loglikelihood_rolling(requests_of((long,)))[0])
    assert isinstance(model.generate_until(requests_of((long, {"until": ["\n"]})))[0], str)


def test_a_long_context_keeps_half_of_the_room(model, pipe) -> None:
    ids = pipe.exported.tokenizer.encode("two balloons " * 40)
    room = pipe.exported.model.config.max_seq_len - 1
    for most, kept in ((1000, room // 2), (5, room - 5), (room, room // 2)):
        request = model.request("two balloons " * 40, {"max_gen_toks": most})
        assert request.document.parts[0].ids == tuple(ids[-kept:])
        assert request.max_tokens == min(most, room - kept)
    short = model.request("two", {"max_gen_toks": room - 3})
    assert short.max_tokens == room - max(3, len(pipe.exported.tokenizer.encode("two")))


def test_rolling_windows_are_the_harness_own() -> None:
    """Its example: ten tokens, four at a time; the last window is full, and two tokens of it count."""
    actual = full_windows(list(range(10)), 4)
    assert actual == [([], [0, 1, 2, 3]), ([], [4, 5, 6, 7]), ([6, 7], [8, 9])]


def test_a_missing_package_is_named(pipe, tmp_path, monkeypatch) -> None:
    bench = EvalContext(pipe, "a", tmp_path, SceneScorer(WorldConfig(size=16, nouns=4)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"expected the package lm_eval, found none; pip install"):
        list(evaluate(bench, named(["harness"])))


TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.mark.skipif(not INSTALLED, reason="needs lm_eval, of the extra [eval]")
def test_a_task_from_local_files(pipe, tmp_path) -> None:
    rows = [{"question": f"two {n}", "choices": ["red", "blue"], "answer": n % 2} for n in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write(tmp_path, {"colours.jsonl": lines, "tasks/colours.yaml": TASK.format(file=tmp_path / "colours.jsonl")})
    options = EvalConfig(tasks=("colours",), tasks_folder=tmp_path / "tasks")
    bench = EvalContext(pipe, "a", tmp_path, SceneScorer(WorldConfig(size=16, nouns=4)), options)
    actual = {result.name: result for outcome in evaluate(bench, named(["harness"])) for result in outcome}
    ours = harness_model(pipe).loglikelihood(
        requests_of(*((r["question"], " " + c) for r in rows for c in r["choices"]))
    )
    right = [ours[2 * n + n % 2][0] == max(ours[2 * n][0], ours[2 * n + 1][0]) for n in range(6)]
    assert actual["colours acc"].value == pytest.approx(np.mean(right))
    assert actual["mean acc"].value == actual["colours acc"].value
    assert actual["colours acc"].low < actual["colours acc"].high, "also where every answer is right, or none"
    with pytest.raises(UserError, match="--tasks: expected tasks"):
        list(evaluate(replace(bench, options=replace(options, tasks=("colors",))), named(["harness"])))
