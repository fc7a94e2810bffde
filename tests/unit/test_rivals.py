"""The study of the rivals, with tiny arms: budgets, equal data, one report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from transfuse.errors import UserError
from transfuse.presets import PRESETS, Recipe
from transfuse.presets import preset as real_preset
from transfuse.presets.recipe import build_loader, train_tokenizer
from transfuse.presets.rivals import by_codes, text_only
from transfuse.presets.runs import resolve
from transfuse.presets.sources import open_sources
from transfuse.studies import arms as arms_module
from transfuse.studies import rivals
from transfuse.studies.arms import Effort

ARMS = ("ours", "codes", "text")
EFFORT = Effort(pictures=6, definitions=2, recogniser_steps=3)


def arms(name: str) -> Recipe:
    if name not in ARMS:
        return real_preset(name)
    base = real_preset("tiny")
    base = replace(base, preset=name, data=replace(base.data, share_of="documents", text_share=0.5))
    if name == "codes":
        return by_codes(replace(base, model=replace(base.model, patch_positions="none")), "vq-f4-small", 1024)
    return text_only(base) if name == "text" else base


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "preset", arms)
    monkeypatch.setattr(arms_module, "SURVEYED", 4)


def test_equal_compute_one_table(tmp_path: Path) -> None:
    flops = 3e9
    code, report = rivals.run_rivals(tmp_path, flops, ARMS, EFFORT, only="codes")
    assert (code, report) == (0, {}), "the others are still to be trained"
    began = (tmp_path / "codes" / "export" / "config.json").stat().st_mtime
    code, report = rivals.run_rivals(tmp_path, flops, ARMS, EFFORT)
    assert code == 0
    assert report["flops"] == flops
    with pytest.raises(UserError, match=r"budget\.json: expected --flops 3e"):
        rivals.run_rivals(tmp_path, 2 * flops, ARMS, EFFORT)
    assert (tmp_path / "codes" / "export" / "config.json").stat().st_mtime == began, "what is finished stays"
    ours, codes, text = (report["arms"][name] for name in ARMS)
    for arm in (ours, codes):
        assert arm["theoretical_flops"] == pytest.approx(flops, rel=0.25), "whole steps of a few samples"
        assert arm["executed_flops"] > 0
        for name in ("noun", "noun_strict", "background", "both", "caption_noun", "caption_background"):
            low, high = arm[f"{name}_interval"]
            assert 0 <= low <= arm[name] <= high <= 1
        assert arm["frechet"] > 0
    assert ours["images"] > codes["images"], "64 codes cost more than 16 patches"
    assert text["steps"] == ours["steps"], "the same texts"
    assert "noun" not in text
    assert text["images"] == 0
    assert text["text_targets"] < ours["text_targets"], "captions are left out with the pictures"
    table = (tmp_path / "report.md").read_text()
    assert len({line.count("|") for line in table.splitlines()}) == 1, "every row has every column"
    assert "6 N D" in table
    assert PIL.Image.open(tmp_path / "drawings.png").size[1] >= 3 * 96


def test_arms_read_equally_much_text_at_equal_positions(tmp_path: Path) -> None:
    """A Chameleon that read 2.5 times less text was once taken for one that writes worse."""
    read = {}
    for name in ("transfusion-32", "chameleon-32", "llama-32"):
        recipe = resolve(real_preset(name).settled())
        load = build_loader(recipe, open_sources(recipe.data), train_tokenizer(recipe), tmp_path)
        counted = [batch.quantities for step in range(40) for batch in load(step)]
        read[name] = {key: sum(one.get(key, 0) for one in counted) for key in ("positions", "positions of glosses")}
    ours, theirs, alone = read.values()
    assert ours["positions"] == pytest.approx(theirs["positions"], rel=0.01), "equally many steps"
    for arm in (ours, theirs):
        assert arm["positions of glosses"] == pytest.approx(arm["positions"] / 2, rel=0.08), "half is text"
    assert alone["positions"] == alone["positions of glosses"] == pytest.approx(ours["positions"] / 2, rel=0.01)


def test_results_of_before_the_strict_judge_make_a_table() -> None:
    old = {"noun": 0.5, "noun_interval": [0.25, 0.75]}
    new = {**old, "noun_strict": 0.125, "noun_strict_interval": [0.0, 0.5]}
    rows = [line for line in rivals.table({"arms": {"old": old, "new": new}}).splitlines() if "noun right" in line]
    assert "|  | 12.5% (0.0% to 50.0%) |" in rows[0]
    assert rows[1].count("50.0% (25.0% to 75.0%)") == 2


def test_arms_that_do_not_go_together(tmp_path: Path) -> None:
    assert "latent-64" in PRESETS
    with pytest.raises(UserError, match="presets of one world, mixture, vocabulary and seed"):
        rivals.run_rivals(tmp_path, 1e9, ("ours", "latent-64"), EFFORT)
    with pytest.raises(UserError, match='--only: expected one of ours, found "codes"'):
        rivals.run_rivals(tmp_path, 1e9, ("ours",), EFFORT, only="codes")
    with pytest.raises(UserError, match="expected a budget"):
        rivals.run_rivals(tmp_path, 0, ARMS, EFFORT)
