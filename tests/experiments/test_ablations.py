"""Rows of the paper's tables: written once, shown in the docs as commands, held against the paper's signs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import exported

from experiments.ablations import COMPARISONS, PIECES, ROWS, ablations_page, analyse, changed, plan_ablations, summary
from experiments.evaluation import image_loss
from experiments.paper_results import ABLATIONS
from transfuse.cli import find_command
from transfuse.config import read_json
from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.report import render
from transfuse.sequence import Document, Image, ImageAttention, Text, Tokenizer, collate
from transfuse.training import ObjectiveConfig, TransfusionObjective

DOCS = Path(__file__).parents[2] / "docs" / "rivals.md"
ALL = ROWS | PIECES
ATTENTION: tuple[ImageAttention, ...] = ("causal", "bidirectional")


@pytest.mark.parametrize("name", ALL)
def test_a_row_is_the_command_that_the_docs_show(name: str) -> None:
    row = ALL[name]
    recipe = find_command(["train", row.preset, *row.words(name)[3:]]).keywords["recipe"]
    ours = row.recipe()
    assert (ours.model, ours.data, ours.objective, ours.optimizer) == (
        recipe.model,
        recipe.data,
        recipe.objective,
        recipe.optimizer,
    ), "at the preset's own size"
    shown = [re.sub(r"\s+", " ", line.split("#")[0]).strip() for line in DOCS.read_text().splitlines()]
    assert " ".join(row.words(name)) in shown


def test_every_number_of_the_paper_has_a_row_and_the_orderings_their_signs() -> None:
    assert {row for rows in ABLATIONS.values() for row in rows} == set(ROWS)
    expected = {(one.table, one.asks): one for one in COMPARISONS}
    assert {row for one in COMPARISONS for row in one.weights} == set(ALL)

    def of(table: str, part: str, measure: str) -> float:
        (found,) = [one for (name, asks), one in expected.items() if name == table and asks.startswith(part)]
        value = found.expected(measure)
        assert value is not None
        return value

    assert of("Table 5", "bidirectional attention within an image, linear", "distance") == pytest.approx(-41.0)
    assert of("Table 7", "U-Net for linear", "distance") == pytest.approx(-3.6)
    assert of("Table 6", "how much more linear", "distance") == pytest.approx(23.2 + 0.6)
    assert of("Table 8", "a noise cap", "captions") == pytest.approx(4.0)
    costs = [of("Table 4", part, "text") for part in ("what diffusion", "the stability set alone", "what learning")]
    assert all(cost > 0 for cost in costs), "Llama < Transfusion < stability set < Chameleon"
    assert expected["", "Chameleon with no-qk-norm"].expected("text") is None


def test_changes_go_where_they_are_named() -> None:
    base = preset("transfusion-32")
    found = changed(base, {"model.patch_size": 4, "data.pairs.image_first_max_timestep": None, "seed": 3})
    assert (found.model.patch_size, found.data.pairs.image_first_max_timestep, found.seed) == (4, None, 3)
    assert changed(found, {"model.patch_size": 2, "seed": 0, "data.pairs.image_first_max_timestep": 500}) == base
    for name in ("model.patchsize", "nothing", "data.pairs.nothing"):
        with pytest.raises(KeyError):
            changed(base, {name: 1})


def run(row: str, seed: int, **values: float) -> dict[str, object]:
    facts = {"theoretical_flops": 1.0, "positions": 1.0, "steps": 1, "parameters": 1, "size": "s", "budget": 1e6}
    facts |= {"text_targets": 1.0, "images": 1.0, "definition_positions": 0.5}
    return {"run": f"{row}-seed{seed}", "variant": row, "seed": seed, **facts, **values}


def test_verdicts_of_made_up_results() -> None:
    distances = {"causal": (60.0, 61.0, 59.0), "transfusion": (20.0, 22.0, 19.0), "unet": (25.0, 26.5, 24.5)}
    results = [run(row, seed, frechet=some[seed]) for row, some in distances.items() for seed in range(3)]
    results += [run("llama", seed, text_perplexity=10.0 + seed) for seed in range(2)]
    results += [run("transfusion-x", 0, text_perplexity=1.0)]
    report = analyse([one for one in results if one["variant"] != "transfusion-x"])
    found = {(one["table"], one["measure"]): one for one in report["comparisons"]}
    assert found["Table 5", "distance"]["significance"] == "reproduced"
    assert found["Table 5", "distance"]["mean"] == pytest.approx(-119 / 3)
    assert found["Table 7", "distance"]["significance"] == "not reproduced", "the paper's U-Net is nearer"
    assert ("Table 4", "text") not in found, "a row alone is compared with nothing"
    page = render(ablations_page(report, Path()))
    numbers = re.findall(r'class="label">([^<]*)</p><p class="number">(\d+)', page)
    assert dict(numbers) == {"Reproduced": "1", "Not reproduced": "1", "Undecided": "0", "No direction": "0"} | {
        "Not comparable": "0"
    }
    assert "paper -41.0; reproduced" in page
    assert summary(report).count("\n| Table") == 2


def test_rows_that_read_unequally_much_have_no_verdict_on_text() -> None:
    """Chameleon once read 2.5 times less text, and the difference was taken for the method's."""
    results = [run("llama-stable", seed, text_perplexity=100.0 + seed) for seed in range(3)]
    results += [run("chameleon", seed, text_perplexity=180.0 - seed) for seed in range(3)]
    (equal,) = analyse(results)["comparisons"]
    assert equal["significance"] == "reproduced"
    for one in results[3:]:
        one["definition_positions"] = 0.2
    (unequal,) = analyse(results)["comparisons"]
    assert unequal["significance"] == "not comparable: one reads 2.5 times the text"
    assert unequal["mean"] == equal["mean"], "the difference stays to be seen"
    for one in results:  # results of earlier versions tell by their steps
        del one["definition_positions"]
    assert analyse(results)["comparisons"][0]["significance"] == "reproduced"
    results[0]["steps"] = 3
    assert analyse(results)["comparisons"][0]["significance"] == "not comparable: one reads 3 times the text"


def test_the_cards_of_a_page_count_every_difference() -> None:
    for study in ("ablations", "ablations-patches"):
        folder = Path(__file__).parents[2] / "docs" / "reports" / study
        report = read_json(folder / "report.json")
        page = render(ablations_page(report, folder))
        numbers = re.findall(r'class="number">(\d+)</p><small>of (\d+) differences', page)
        assert sum(int(count) for count, _ in numbers) == len(report["comparisons"]) == int(numbers[0][1])


def test_results_of_two_sizes_or_budgets_are_not_compared() -> None:
    results = [run("causal", 0, frechet=1.0), {**run("transfusion", 0, frechet=1.0), "size": "m"}]
    with pytest.raises(UserError, match="expected results of one size, found m, s"):
        analyse(results)
    with pytest.raises(UserError, match="expected results of one budget"):
        analyse([results[0], {**results[1], "size": "s", "budget": 2e6}])


def test_names_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='--rows: unknown name "casual"; did you mean "causal"'):
        plan_ablations(tmp_path, ("casual",), "xs", 1e3, (0,))
    with pytest.raises(UserError, match="--rows: expected at least one, and each once"):
        plan_ablations(tmp_path, ("unet", "unet"), "xs", 1e3, (0,))


@pytest.mark.parametrize("attention", ATTENTION)
def test_the_image_loss_is_by_the_models_own_attention(tokenizer: Tokenizer, attention: ImageAttention) -> None:
    made = exported(tokenizer, image_attention=attention)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    document = Document([Text(tuple(tokenizer.encode("a crab"))), Image(made.autoencoder.encode(pixels)[0])], sample=0)
    form = made.model.config.sequence_format(tokenizer)
    objective = TransfusionObjective(ObjectiveConfig(), made.process, seed=0)
    losses = {way: float(objective.loss(made.model, collate([document], form, way)).losses[1]) for way in ATTENTION}
    assert image_loss(made, ["a crab"], pixels).value == pytest.approx(losses[attention])
    assert losses["causal"] != pytest.approx(losses["bidirectional"])
