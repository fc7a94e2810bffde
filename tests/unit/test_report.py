"""The demo and its page: every number there, nothing from elsewhere, nothing done twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from emoji_scenes import scene_classifier as recogniser_module
from transfuse import demo as demo_module
from transfuse.charts import ACCENT, WARM, has_charts, histogram, line_chart
from transfuse.data import StepLoader
from transfuse.demo import Effort, demo_page, fit, run_demo
from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.report import Bar, Bars, Card, Cards, Charts, Page, Section, Table, render
from transfuse.training import RESUMABLE, read_metrics

pytestmark = pytest.mark.xdist_group("report")  # its fixtures are made once

EFFORT = Effort(pictures=6, definitions=6, recogniser_steps=4)
NEEDED = (
    "train_seconds",
    "background_accuracy",
    "noun_accuracy",
    "noun_strict_accuracy",
    "noun_strict_accuracy_interval",
    "real_noun_strict_accuracy",
    "chance_noun_strict_accuracy",
    "strict_judge_digest",
    "frechet_distance",
    "caption_noun_accuracy",
    "caption_background_accuracy",
    "heldout_text_perplexity",
    "bits_per_byte",
    "tokens_per_second",
    "images_per_second",
    "recogniser_accuracy",
    "real_noun_accuracy",
    "background_accuracy_interval",
    "noun_accuracy_interval",
    "steps",
    "images_seen",
    "parameters",
    "nouns",
    "chance_noun_accuracy",
    "machine",
    "version",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole demo of seconds: its folder, report and what there was to see."""
    kept = {}
    original = demo_module.demo_page

    def keeping(report, exhibits, recipe, metrics):
        kept.update(report=report, exhibits=exhibits, recipe=recipe, metrics=metrics)
        return original(report, exhibits, recipe, metrics)

    folder = tmp_path_factory.mktemp("demo") / "run"
    demo_module.demo_page = keeping
    try:
        code, report = run_demo(folder, 1.0, preset("tiny"), EFFORT)
    finally:
        demo_module.demo_page = original
    assert code == 0
    assert report == kept["report"]
    return folder, kept


class Links(HTMLParser):
    """Everything the page would fetch, and every tag it has."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str | None] = []

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        self.found += [values[name] for name in ("src", "href", "srcset", "data", "poster") if values.get(name)]
        if tag == "img":
            self.alts.append(values.get("alt"))


def leaves(value):
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def test_report_holds_every_number_measured(done) -> None:
    folder, kept = done
    report = json.loads((folder / "report.json").read_text())
    assert report == kept["report"]
    assert not [name for name in NEEDED if name not in report]
    assert report["steps"] == report["planned_steps"] == 30
    assert report["images_seen"] == read_metrics(folder / "metrics.jsonl")[-1]["images"]
    assert report["nouns"] == 4


def test_page_contains_every_number_of_the_report(done) -> None:
    folder, kept = done
    text = unescape((folder / "report.html").read_text())
    for value in leaves(kept["report"]):
        assert (value if isinstance(value, str) else json.dumps(value)) in text


def test_page_needs_nothing_from_elsewhere(done) -> None:
    folder, _ = done
    html = (folder / "report.html").read_text()
    links = Links()
    links.feed(html)
    assert links.found
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links.found)
    assert not {"script", "link", "iframe", "object", "embed"} & set(links.tags)
    assert not re.search(r"https?://|@import|url\((?!#)", html)
    assert links.alts
    assert all(links.alts)


def test_page_escapes_what_models_and_people_write(done) -> None:
    _, kept = done
    evil = "<script>alert('x')</script>\"&"
    seen = kept["exhibits"]
    drawings = replace(seen.drawings, prompts=[evil] * 6, named=[evil] * 6, noun_right=np.zeros(6, dtype=bool))
    captions = replace(seen.captions, captions=[evil] * 6, truths=[evil] * 6)
    interleaved = [(evil, replace(reply, parts=[evil, *reply.parts])) for _, reply in seen.interleaved]
    exhibits = replace(
        seen, drawings=drawings, captions=captions, continuations=[(evil, evil)], interleaved=interleaved
    )
    report = {**kept["report"], "command": evil, "preset": evil}
    html = render(demo_page(report, exhibits, kept["recipe"], kept["metrics"]))
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    links = Links()
    links.feed(html)
    assert evil in links.alts


def test_finished_demo_is_not_done_again(done, monkeypatch) -> None:
    folder, kept = done
    for name in ("train", "keep_scene_classifier", "measure", "fit"):
        monkeypatch.setattr(demo_module, name, lambda *_: pytest.fail("done again"))
    assert run_demo(folder, 1.0, effort=EFFORT) == (0, kept["report"])


def test_only_what_is_missing_is_done_again(done, monkeypatch) -> None:
    folder, kept = done
    (folder / "report.html").unlink()
    for module, name in ((demo_module, "train"), (demo_module, "fit"), (recogniser_module, "train_scene_classifier")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("done again"))
    code, report = run_demo(folder, 1.0, effort=EFFORT)
    assert code == 0
    assert (folder / "report.html").is_file()
    same = ("noun_accuracy", "heldout_text_perplexity", "recogniser_seconds", "train_seconds", "steps")
    assert {name: report[name] for name in same} == {name: kept["report"][name] for name in same}


def test_another_model_or_effort_is_measured_again(done, tmp_path) -> None:
    """The files' times say nothing: a model may be put back with an old one."""
    folder = tmp_path / "run"
    shutil.copytree(done[0], folder)
    _, report = run_demo(folder, 1.0, effort=replace(EFFORT, pictures=5))
    assert report["pictures_measured"] == 5
    path = folder / "export" / "model.safetensors"
    before = path.stat()
    save_file({name: 0.5 * value for name, value in load_file(path).items()}, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    _, other = run_demo(folder, 1.0, effort=replace(EFFORT, pictures=5))
    assert other["heldout_text_perplexity"] != report["heldout_text_perplexity"]


def test_stopped_training_exits_with_75_and_goes_on(tmp_path, monkeypatch) -> None:
    recipe = preset("tiny")
    recipe = replace(recipe, loop=replace(recipe.loop, steps=3, checkpoint_every=0))
    plain = StepLoader.__call__

    def call(self: StepLoader, step: int):
        if signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # while training, which handles it
            signal.raise_signal(signal.SIGTERM)
        return plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(StepLoader, "__call__", call)
        assert run_demo(tmp_path / "run", 1.0, recipe, EFFORT) == (RESUMABLE, {})
    with pytest.raises(UserError, match=r"minutes: expected 1, with which .* was started, found 5; use another --run"):
        run_demo(tmp_path / "run", 5.0, effort=EFFORT)
    code, report = run_demo(tmp_path / "run", 1.0, effort=replace(EFFORT, pictures=2))
    assert (code, report["steps"], report["preset"]) == (0, 3, "tiny")


def test_steps_fit_the_time_and_the_preset() -> None:
    recipe = preset("tiny")
    assert fit(recipe, 60.0).loop.steps == recipe.loop.steps
    assert fit(recipe, 60.0).loop.max_seconds == 3600
    assert 1 <= fit(recipe, 1e-3).loop.steps < recipe.loop.steps
    with pytest.raises(UserError, match="minutes: expected more than 0"):
        run_demo(None, 0.0)  # type: ignore[arg-type]


def test_bars_place_their_numbers() -> None:
    share = Bar("accuracy", 0.5, 0.4, 0.6, chance=0.1, reference=1.0)
    assert (share.text, share.at(share.value), share.at(0.1)) == ("50.0\u202f%", 50.0, 10.0)
    assert share.describe() == "40.0\u202f% to 60.0\u202f%, chance 10.0\u202f%, reference 100.0\u202f%"
    distance = Bar("distance", 20.0, reference=5.0, better="lower")
    assert distance.at(5.0) * 4 == pytest.approx(distance.at(20.0), abs=0.05)
    wide = Bar("perplexity", 10.0, chance=8192.0, better="lower")
    assert wide.describe() == "chance 8,192.0, lower is better, log scale"
    assert 0 < wide.at(10.0) < wide.at(8192.0) < 100
    assert Bar("nothing", 0.0, better="lower").at(0.0) == 0.0


def test_bars_of_differences_start_at_zero_and_those_of_a_scale_compare() -> None:
    below = Bar("difference", -2.0, -4.0, 1.0, better="", note="undecided")
    assert (below.text, below.describe()) == ("-2", "-4 to +1, undecided")
    assert below.at(0.0) == 50.0
    assert below.fill == (below.at(-2.0), 50.0)
    ratios = [Bar("ratio", value, 0.001, 1e300, reference=1.0, better="lower", scale=(0.01, 100)) for value in (0.1, 1)]
    assert [bar.at(1.0) for bar in ratios] == [50.0, 50.0]
    assert [bar.fill for bar in ratios] == [(0.0, 25.0), (0.0, 50.0)]
    assert (ratios[0].at(0.001), ratios[0].at(1e300)) == (0.0, 100.0)
    assert ratios[0].describe("parity") == "below 0.01 to above 100.0, parity 1"
    html = render(Page("m", "", [Bars([below], "", title="Differences <b>")]))
    assert "Differences &lt;b&gt;" in html
    assert 'class="zero"' in html
    assert 'class="legend"' not in html, "no label, no legend"


def test_a_page_shows_its_summary_first_and_folds_what_is_long() -> None:
    cards = Cards([Card(f"card {n}", marks=[("noun", n > 0, "a <b>")]) for n in range(3)], "Group <i>", shown=2)
    page = Page("m", "lead", [Bars([Bar("x", 0.2)])], [Section("S & T", "", [cards])], [Table(["a"], [["b"]])])
    html = render(page)
    assert html.index('class="bars"') < html.index("S &amp; T") < html.index("How this was made")
    assert "The other 1</summary>" in html
    assert html.count("found a &lt;b&gt;") == 1
    assert "Group &lt;i&gt;" in html


def test_charts_follow_the_theme_and_need_nothing_from_elsewhere() -> None:
    assert line_chart([("a", [(1, 2.0)], ACCENT)], "step") == ""
    svg = line_chart([("<a>", [(1, 2.0), (5, 3.0)], ACCENT), ("b", [(1, 0.0), (2, 1.0), (3, 9.0)], WARM)], "step", True)
    assert "&lt;a&gt;" in svg
    assert "var(--accent)" in svg
    assert not re.search(r"#17706a|http|<style|nan", svg)
    assert histogram([], "dB") == ""
    for values in ([25.0], [1.0, 1.0 + 1e-12], [0.8, 0.9, 1.0], [-3.0, 4.0], range(1, 334)):
        assert histogram(list(values), "dB").startswith("<svg")


def test_without_matplotlib_a_page_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    has_charts.cache_clear()
    svg = line_chart([("a", [(1, 2.0), (5, 3.0)], ACCENT)], "step")
    has_charts.cache_clear()
    assert svg == ""
    assert "pip install &#34;matplotlib&lt;" in render(Page("m", "", [Charts([("Loss", svg)])]))
