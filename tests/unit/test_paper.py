"""The paper's runs: each row of its tables is a preset, and a plan counts what a loader gives."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from transfuse.autoencoders import AutoencoderConfig, ImageAutoencoder, save_autoencoder
from transfuse.cli import find_command, run
from transfuse.model import SIZES
from transfuse.plan import cluster_plan, plan
from transfuse.recipes import PRESETS, Recipe, preset
from transfuse.runs import Run, open_recipe_autoencoder, open_sources, train_tokenizer
from transfuse.sequence import Tokenizer
from transfuse.train import build_loader


def table(number: int) -> list[str]:
    return [name for name in PRESETS if name.startswith(f"table{number}-")]


def test_every_row_of_the_tables_is_a_preset() -> None:
    assert [len(table(number)) for number in range(3, 10)] == [2, 4, 4, 7, 10, 4, 1]
    for name, make in PRESETS.items():
        assert make().preset == name, "its runs have their folder"


@pytest.mark.parametrize("name", [name for name in PRESETS if name[:5] == "table" or name.split("-")[0] in SIZES])
def test_noise_limit_and_guidance_are_those_of_the_section(name: str) -> None:
    """4.2 (Tables 3, 4; the sizes) guides by 5, 4.3 (Tables 5 to 8; the U-Net) by 3; the limit is Table 8's."""
    recipe = preset(name)
    ablation = name[:6] in ("table5", "table6", "table7", "table8", "table9") or name in {f"{s}-unet" for s in SIZES}
    assert recipe.generation.guidance_scale == (3 if ablation else 5)
    limited = name.endswith("-limited") or name == "table9-7b-unet"
    assert recipe.data.pairs.image_first_max_timestep == (500 if limited else None)
    assert (recipe.data.pairs.caption_first, recipe.data.text_share) == (0.8, 0.5)


@pytest.mark.parametrize(
    ("name", "positions", "steps", "rate"),
    [
        ("7b", 2**21, 250_000, 3e-4),
        ("0.16b-unet", 2**21, 250_000, 3e-4),
        ("chameleon-1.4b", 2**21, 250_000, 1e-4),
        ("table3-chameleon-7b", 2**21, 250_000, 1e-4),
        ("table6-0.76b-linear-1", 2**21, 250_000, 3e-4),
        ("llama-0.37b", 2**20, 250_000, 3e-4),
        ("table4-llama-0.76b-stable", 2**20, 250_000, 1e-4),
        ("table9-7b-unet", 2**22, 500_000, 3e-4),
    ],
)
def test_a_step_is_packed_rows(name: str, positions: int, steps: int, rate: float) -> None:
    recipe, costs = preset(name), plan(preset(name))
    assert recipe.data.row_length == recipe.model.max_seq_len == 4096
    assert costs["positions_per_step"] == recipe.data.batch_size * 4096 == positions
    assert costs["train_tokens"] == positions * steps
    assert recipe.optimizer.learning_rate == pytest.approx(rate)
    if "llama" in name:
        assert costs["images_per_step"] == 0
    else:
        assert costs["images_per_step"] * costs["patches_per_image"] == pytest.approx(positions / 2, rel=0.06)


def test_rows_differ_in_what_their_table_compares() -> None:
    models = {name: preset(name).model for name in PRESETS}
    assert {models[name].image_attention for name in table(5)} == {"causal", "bidirectional"}
    shapes = [(models[name].adapter, models[name].patch_size) for name in table(6)]
    assert shapes == [("linear", 1), ("linear", 2), ("linear", 4), ("linear", 8), ("unet", 2), ("unet", 4), ("unet", 8)]
    assert [plan(preset(name))["patches_per_image"] for name in table(6)] == [1024, 256, 64, 16, 256, 64, 16]
    assert {(models[name].n_layers, models[name].d_model) for name in table(7)} == {
        (size["n_layers"], size["d_model"]) for size in SIZES.values()
    }
    assert all(models[name].adapter == "unet" for name in table(8))
    for name in ("table5-0.76b-unet-bidirectional", "table6-0.76b-unet-2", "table8-0.76b-unet-free"):
        assert replace(preset(name), preset="") == replace(preset("table7-0.76b-unet"), preset="")


def test_the_list_of_presets_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "plan"):
        assert run([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in ("table3-7b", "table8-7b-unet-limited", "table9-7b-unet"))


# --- a plan and a loader ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    """A small autoencoder of the shape of kl-f8."""
    folder = tmp_path_factory.mktemp("kl")
    config = AutoencoderConfig(widths=(4, 4, 4, 4), blocks=1, groups=2, middle_attention=False)
    save_autoencoder(folder, ImageAutoencoder(config).initialise(0), "kl")
    return str(folder)


def measured(recipe: Recipe, tokenizer: Tokenizer, folder: Path, steps: int) -> tuple[float, float, float]:
    """Mean positions and images of a step, and the share of positions in text alone."""
    run = Run(recipe, open_sources(recipe.data), open_recipe_autoencoder(recipe), tokenizer)
    loader = build_loader(run, folder)
    positions = images = text = 0
    for step in range(steps):
        for batch in loader(step):
            positions += batch.quantities["positions"]
            images += batch.image_targets
            text += batch.quantities.get("positions of glosses", 0)
    return positions / steps, images / steps, text / positions


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"row_length": 1024, "batch_size": 2}, 25), ({"row_length": 2048, "text_share": 0.6}, 4), ({}, 120)],
)
def test_a_plan_counts_what_a_loader_gives(changes: dict, steps: int, own: Tokenizer, tmp_path: Path) -> None:
    """Packed into rows, or documents by the lengths that they have in the run's own tokens."""
    base = preset("tiny")
    recipe = replace(base, data=replace(base.data, **changes))
    positions, images, text = measured(recipe, own, tmp_path, steps)
    costs = plan(recipe)
    assert positions == pytest.approx(costs["positions_per_step"], rel=0.02)
    assert images == pytest.approx(costs["images_per_step"], rel=0.2), "which is an estimate"
    assert text == pytest.approx(recipe.data.text_share, abs=0.03)


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train_tokenizer(preset("tiny"))


def test_a_plan_counts_what_the_papers_loader_gives(autoencoder: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Fewer rows, to be quick; each as long as the paper's."""
    base = preset("0.76b")
    recipe = replace(base, data=replace(base.data, autoencoder=autoencoder, batch_size=2))
    positions, images, text = measured(recipe, tokenizer, tmp_path, 2)
    costs = plan(recipe)
    assert positions == pytest.approx(costs["positions_per_step"], rel=0.02)
    assert costs["positions_per_step"] * 256 == plan(base)["positions_per_step"]
    assert images == pytest.approx(costs["images_per_step"], rel=0.2)
    assert text == pytest.approx(0.5, abs=0.1)


# --- options ----------------------------------------------------------------------------------------------------------


def test_a_plan_takes_the_options_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--data.batch-size 1024 --model.patch-size 4 --parallel.compile --data.pairs.image-first-max-timestep 250"
    words += " --optimizer.betas 0.8 0.9 --init.allow-changes network"
    assert run(["plan", "1.4b", *words.split(), "--gpu", "h100", "--gpus", "8", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert (costs["positions_per_step"], costs["patches_per_image"]) == (2**22, 64)
    recipe = find_command(["train", "1.4b", *words.split()]).keywords["recipe"]
    assert costs == {**plan(recipe), **json.loads(json.dumps(cluster_plan(recipe, 8, "h100")))}
    _, _, launch = costs["launch"].partition(" train 1.4b ")
    launched = find_command(["train", "1.4b", *shlex.split(launch)]).keywords["recipe"]
    assert launched.data.batch_size == 1024
    for part in ("model", "optimizer", "loop", "init", "diffusion"):
        assert getattr(launched, part) == getattr(recipe, part), part
    assert launched.data.pairs == recipe.data.pairs
    assert launched.parallel.compile


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["7b", "--model.patch-size", "3"], "model.patch_size: expected 1, 2, 4 or 8, found 3"),
        (["7b", "--data.world.size", "200"], "divides 200 pixels, as images have, times the autoencoder's factor 8"),
        (["7b", "--data.batchsize", "8"], 'unknown option "--data.batchsize"; did you mean "--data.batch-size"?'),
        (["tabel3-7b"], 'unknown name "tabel3-7b"; did you mean "table3-7b"?'),
        ([], "expected a preset, found none"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *words]) == 2
    assert message in capsys.readouterr().err
