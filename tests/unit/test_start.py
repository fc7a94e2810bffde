"""A run that starts from an export takes its network, its words and its pictures' language, and learns on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import exported

from emoji_scenes import WorldConfig
from transfuse.cli import find_command
from transfuse.data import EditConfig
from transfuse.diffusion import DiffusionConfig
from transfuse.errors import UserError
from transfuse.export import load_export, save_export
from transfuse.recipes import InitConfig, Recipe
from transfuse.recipes.small import tiny
from transfuse.runs import read_recipe, resolve
from transfuse.sequence import Tokenizer
from transfuse.train import build_trainer, train
from transfuse.training import Distributed


def recipe(start: Path, **changes: object) -> Recipe:
    base = tiny()
    world = WorldConfig(size=8 * 2, nouns=4, max_objects=1)
    data = replace(base.data, world=world, sources=("world", "edits,weight=2", "glosses"), edits=EditConfig(count=16))
    loop = replace(base.loop, steps=3, checkpoint_every=2, ema_decay=0.0)
    return replace(base, device="cpu", start=str(start), data=data, loop=loop, **changes)


def test_begins_with_the_exports_weights_words_and_process(served: Path, tmp_path: Path) -> None:
    run = resolve(recipe(served, precision="float32"))
    resolved = run.recipe
    export = load_export(served)
    assert resolved.model == export.model.config
    assert resolved.diffusion == export.process.config
    assert resolved.generation == export.generation
    (tmp_path / "run").mkdir()
    trainer = build_trainer(run, tmp_path / "run", Distributed(torch.device("cpu")))
    assert run.tokenizer.fingerprint == export.tokenizer.fingerprint
    for ours, original in zip(trainer.model.parameters(), export.model.parameters(), strict=True):
        assert torch.equal(ours, original)


@pytest.mark.parametrize("kept", ["patch", "hidden", None])
def test_an_export_keeps_where_its_timestep_enters(kept: str | None, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A file that does not name the place was written when there was one: after the linear map."""
    made = exported(tokenizer, timestep_at=kept or "hidden")
    weights, model = made.model.state_dict(), made.model.config
    folder = save_export(
        tmp_path / "x", weights, model, made.process.config, tokenizer, made.autoencoder, 8, made.generation, ""
    )
    if kept is None:
        config = json.loads((folder / "config.json").read_text())
        del config["model"]["timestep_at"]
        (folder / "config.json").write_text(json.dumps(config))
    resolved = resolve(replace(recipe(folder), model=replace(model, timestep_at="patch"))).recipe
    assert resolved.model == load_export(folder).model.config == model


def test_what_fits_another_network_is_taken_on_asking(served: Path, tmp_path: Path) -> None:
    """Other patch layers, the same trunk: the network stays the recipe's; its trunk, its words and the vectors of rows
    and columns are the export's."""
    base = recipe(served, precision="float32", init=InitConfig(("network",)))
    export = load_export(served)
    config = replace(export.model.config, adapter="unet", patch_size=2, unet_channels=(8, 8))
    run = resolve(replace(base, model=config))
    resolved = run.recipe
    assert resolved.model.adapter == "unet"
    (tmp_path / "run").mkdir()
    trainer = build_trainer(run, tmp_path / "run", Distributed(torch.device("cpu")))
    assert run.tokenizer.fingerprint == export.tokenizer.fingerprint
    original = dict(export.model.named_parameters())
    ours = dict(trainer.model.named_parameters())
    shared = {name for name in ours.keys() & original.keys() if ours[name].shape == original[name].shape}
    assert all(torch.equal(ours[name], original[name]) for name in shared)
    assert len(shared) == 3 + 6 * config.n_layers + 2  # rows and columns
    assert ours.keys() - shared, "its own patch layers"


def test_a_network_that_takes_nothing_is_refused(served: Path, tmp_path: Path) -> None:
    config = replace(load_export(served).model.config, d_model=48, n_heads=3, d_ff=40)
    run = resolve(replace(recipe(served, init=InitConfig(("network",))), model=config, precision="float32"))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="found none of"):
        build_trainer(run, tmp_path / "run", Distributed(torch.device("cpu")))


def test_a_fine_tuned_export_is_another_one_and_goes_on(served: Path, tmp_path: Path) -> None:
    """Learning changes every weight that documents reach; what was exported can be started from again."""
    first = train(recipe(served), tmp_path / "one")
    assert first.outcome == "finished"
    assert first.export is not None
    before, after = load_export(served), load_export(first.export)
    assert before.tokenizer.fingerprint == after.tokenizer.fingerprint
    weights = dict(after.model.named_parameters())
    unchanged = [name for name, weight in before.model.named_parameters() if torch.equal(weight, weights[name])]
    assert not unchanged
    assert "instructions to change scenes" in (first.export / "README.md").read_text()
    assert train(recipe(first.export), tmp_path / "two").outcome == "finished"


def test_a_resumed_run_does_not_start_anew(served: Path, tmp_path: Path) -> None:
    straight = train(recipe(served), tmp_path / "straight").trainer
    short = train(replace(recipe(served), loop=replace(recipe(served).loop, session_seconds=1e-9)), tmp_path / "cut")
    assert short.outcome == "stopped"
    resumed = train(recipe(served), tmp_path / "cut").trainer
    for ours, original in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, original)


def test_a_relative_path_is_the_same_folder_from_elsewhere(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(served.parent)
    resolved = resolve(recipe(Path(served.name))).recipe
    monkeypatch.chdir("/")
    assert resolved == resolve(recipe(served)).recipe == resolve(resolved).recipe


@pytest.mark.parametrize("autoencoder", ["pixels", "kl-f4-small"])
def test_image_layers_of_other_latents_and_noise_are_named(served: Path, capsys, autoencoder: str) -> None:
    """The export learned pixels by x0 prediction; its layers fit a network for anything of their shapes."""
    base = recipe(served, precision="float32", init=InitConfig(("network",)))
    export = load_export(served)
    same = replace(base, model=export.model.config, diffusion=export.process.config)
    resolve(same)
    assert "warning" not in capsys.readouterr().err
    other = replace(same, diffusion=DiffusionConfig(prediction="v"), data=replace(same.data, autoencoder=autoencoder))
    resolve(other)
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    learned = f"by which the image layers of {served} learned, found prediction v, weighting uniform, clip_x0 None"
    assert warned[-1] == f"warning: diffusion: expected prediction x0, weighting v, clip_x0 1.0, {learned}"
    first = f"data.autoencoder: expected pixels, whose images the layers of {served} learned, found kl-f4-small"
    assert warned[:-1] == [f"warning: {first}"] * (autoencoder != "pixels")


def command(served: Path, *options: str) -> Recipe:
    made: Recipe = find_command(["train", "tiny", "--start", str(served), *options]).keywords["recipe"]
    return made


def test_a_longer_sequence_is_taken_if_it_was_typed(served: Path, tmp_path: Path) -> None:
    """Neither a preset's default nor a shorter one changes an export's."""
    export = load_export(served)
    assert export.model.config.max_seq_len == 256
    plain = recipe(served, precision="float32")
    longer_preset = replace(plain, model=replace(plain.model, max_seq_len=1024))
    assert resolve(longer_preset).recipe.model.max_seq_len == 256
    typed = replace(plain, model=command(served, "--model.max-seq-len", "1024").model)
    typed = replace(typed, init=command(served, "--model.max-seq-len=1024").init)
    trained = train(typed, tmp_path / "run")
    assert trained.recipe.model == replace(export.model.config, max_seq_len=1024)
    assert resolve(read_recipe(tmp_path / "run" / "config.json", Recipe)).recipe == trained.recipe
    assert trained.export is not None
    assert load_export(trained.export).model.config.max_seq_len == 1024
    with pytest.raises(UserError, match=r"--model\.max-seq-len: expected at least 256, as .* decides, found 128"):
        command(served, "--model.max-seq-len", "128")


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--diffusion.shift", "3"], "--diffusion.shift: expected 1.0, as EXPORT decides, found 3.0"),
        (["--model.d_model=32"], "--model.d-model: expected 64, as EXPORT decides, found 32"),
        (["--model.no-tie-embeddings", "--model.qk-norm"], "--model.qk-norm: expected False, as EXPORT decides, found"),
        (["--generation.sampler.steps", "7"], "--generation.sampler.steps: expected 20, as EXPORT decides, found 7"),
        (["--data.autoencoder", "kl-f4-small"], "--data.autoencoder: expected pixels, as EXPORT decides, found kl-f"),
    ],
)
def test_an_option_that_the_export_decides_is_refused(served: Path, options: list[str], refused: str) -> None:
    with pytest.raises(UserError) as raised:
        command(served, *options)
    message = str(raised.value).replace(str(served), "EXPORT")
    assert message.startswith(f"train: {refused}")
    assert "\n" not in message
    assert command(served, "--init.allow-changes", "network", *options).start == str(served)


def test_an_option_that_says_the_same_is_not_refused(served: Path) -> None:
    same = ["--model.d-model", "64", "--data.autoencoder", "pixels", "--model.experts", "ffn", "--loop.steps", "9"]
    assert command(served, *same).loop.steps == 9


def test_what_is_no_model_is_refused(served: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        resolve(recipe(tmp_path))
    config = json.loads((served / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "d_model": 60}}))
    with pytest.raises(UserError):
        resolve(recipe(tmp_path))
