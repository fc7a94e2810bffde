"""The baselines study, with tiny variants: budgets, equal data, one report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import baselines, common
from transfuse.errors import UserError
from transfuse.recipes import PRESETS, Recipe
from transfuse.recipes import preset as real_preset
from transfuse.recipes.paper import by_codes, text_only
from transfuse.report import render
from transfuse.runs import resolve
from transfuse.train import build_loader

VARIANTS = ("ours", "codes", "text")
SIZE = ("--pictures", "6", "--definitions", "2", "--recogniser-steps", "3")


def variants(name: str) -> Recipe:
    if name not in VARIANTS:
        return real_preset(name)
    base = real_preset("tiny")
    base = replace(base, preset=name, data=replace(base.data, share_of="documents", text_share=0.5))
    if name == "codes":
        return by_codes(replace(base, model=replace(base.model, patch_positions="none")), "vq-f4-small", 1024)
    return text_only(base) if name == "text" else base


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "preset", variants)
    monkeypatch.setattr(common, "SURVEYED", 4)


@pytest.mark.long
def test_equal_compute_one_table(tmp_path: Path) -> None:
    flops = 3e9

    def study(*words: str, flops: float = flops) -> tuple[int, dict[str, Any]]:
        return baselines.main(["--run", str(tmp_path), "--flops", str(flops), "--presets", *VARIANTS, *SIZE, *words])

    code, report = study("--only", "codes")
    assert (code, len(report["results"])) == (0, 1)
    began = (tmp_path / "runs" / "codes" / "export" / "config.json").stat().st_mtime
    code, report = study()
    assert code == 0
    with pytest.raises(UserError, match=r"study\.json: expected --flops 3e"):
        study(flops=2 * flops)
    assert (tmp_path / "runs" / "codes" / "export" / "config.json").stat().st_mtime == began, "what is finished stays"
    ours, codes, text = (baselines.variants_of(report)[name] for name in VARIANTS)
    for variant in (ours, codes):
        assert variant["theoretical_flops"] == pytest.approx(flops, rel=0.25), "whole steps of a few samples"
        assert variant["executed_flops"] > 0
        for name in ("noun", "noun_strict", "background", "both", "caption_noun", "caption_background"):
            low, high = variant[f"{name}_interval"]
            assert 0 <= low <= variant[name] <= high <= 1
        assert variant["frechet"] > 0
    assert ours["images"] > codes["images"], "64 codes cost more than 16 patches"
    assert text["steps"] == ours["steps"], "the same texts"
    assert "noun" not in text
    assert text["images"] == 0
    assert text["text_targets"] < ours["text_targets"], "captions are left out with the images"
    table = baselines.table(report)
    assert len({line.count("|") for line in table.splitlines()}) == 1, "every row has every column"
    assert "6 N D" in table
    assert (tmp_path / "report.html").read_text().count("<img") == 8 + 2 * 6, "the scenes, and the drawings of both"


@pytest.mark.long
def test_arms_read_equally_much_text_at_equal_positions(tmp_path: Path) -> None:
    """A Chameleon that read 2.5 times less text was once taken for one that writes worse."""
    read = {}
    for name in ("transfusion-32", "chameleon-32", "llama-32"):
        load = build_loader(resolve(real_preset(name)), tmp_path)
        counted = [batch.quantities for step in range(40) for batch in load(step)]
        read[name] = {key: sum(one.get(key, 0) for one in counted) for key in ("positions", "positions of glosses")}
    ours, theirs, alone = read.values()
    assert ours["positions"] == pytest.approx(theirs["positions"], rel=0.01), "equally many steps"
    for arm in (ours, theirs):
        assert arm["positions of glosses"] == pytest.approx(arm["positions"] / 2, rel=0.08), "half is text"
    assert alone["positions"] == alone["positions of glosses"] == pytest.approx(ours["positions"] / 2, rel=0.01)


def test_a_report_of_before_variants_makes_a_table() -> None:
    committed = json.loads((Path(__file__).parents[2] / "docs" / "reports" / "rivals.json").read_text())
    assert "| transfusion-32 | chameleon-32 | llama-32 |" in baselines.table(committed)
    old = {"noun": 0.5, "noun_interval": [0.25, 0.75]}
    new = {**old, "noun_strict": 0.125, "noun_strict_interval": [0.0, 0.5]}
    rows = [line for line in baselines.table({"arms": {"old": old, "new": new}}).splitlines() if "noun right" in line]
    assert "|  | 12.5% (0.0% to 50.0%) |" in rows[0]
    assert rows[1].count("50.0% (25.0% to 75.0%)") == 2


@pytest.mark.parametrize(("more", "noted"), [(1.06, True), (1.04, False)])
def test_the_page_says_who_reads_more_text(tmp_path: Path, more: float, noted: bool) -> None:
    """At equal 6 N D a smaller network has more positions, and so more text."""
    results = [
        {"variant": "ours", "positions": 2000 * more, "steps": 10, "definition_positions": 1000 * more},
        {"variant": "codes", "positions": 2000, "steps": 10, "definition_positions": 1000},
    ]
    html = render(baselines.baselines_page(baselines.analyse(results), tmp_path))
    assert ("reads 1.06 times the text of another: their perplexities of text do not compare" in html) == noted


def test_presets_that_do_not_compare(tmp_path: Path) -> None:
    assert "latent-64" in PRESETS
    with pytest.raises(UserError, match="presets of one world, mixture, vocabulary and seed"):
        baselines.plan_baselines(tmp_path, 1e9, ("ours", "latent-64"))
    with pytest.raises(UserError, match="expected a budget"):
        baselines.plan_baselines(tmp_path, 0, VARIANTS)
