"""Settings to JSON and back; what is misspelt or of another type is refused in one line. Presets. Exports."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import exported, latent, open_tiny, tiny

import transfuse
from transfuse.config import from_dict, read_json, to_dict
from transfuse.diffusion import DiffusionConfig
from transfuse.errors import UserError
from transfuse.export import GenerationConfig, load_export, save_export
from transfuse.plan import plan
from transfuse.recipes import PRESETS, Recipe, preset
from transfuse.runs import open_run, resolve
from transfuse.sequence import Tokenizer
from transfuse.training.optimizer import GuardConfig


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    recipe = preset(name)
    assert from_dict(Recipe, json.loads(json.dumps(to_dict(recipe))), "here") == recipe
    assert recipe.preset == name


def test_mistakes_are_one_line() -> None:
    values = to_dict(preset("tiny"))
    values["optimizer"]["learning_rat"] = 1
    with pytest.raises(
        UserError, match=r'^here: unknown setting "optimizer.learning_rat"; did you mean "learning_rate"\?$'
    ):
        from_dict(Recipe, values, "here")
    values = to_dict(preset("tiny"))
    values["model"]["d_model"] = "wide"
    with pytest.raises(UserError, match=r"^here: model.d_model: .*found 'wide'\)$"):
        from_dict(Recipe, values, "here")
    values = to_dict(preset("tiny"))
    values["model"]["d_model"] = 63
    with pytest.raises(UserError, match=r"model\.d_model: expected a multiple of"):
        from_dict(Recipe, values, "here")
    with pytest.raises(UserError, match='preset: unknown name "demu"; did you mean "demo"'):
        preset("demu")


def test_json_files(tmp_path) -> None:
    with pytest.raises(UserError, match=r"none\.json: expected a JSON file, found none"):
        read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"a"')
    with pytest.raises(UserError, match=r"bad\.json: expected JSON, found something else"):
        read_json(tmp_path / "bad.json")
    (tmp_path / "bin.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bin\.json: expected JSON"):
        read_json(tmp_path / "bin.json")


def test_a_run_folder_belongs_to_its_recipe(tmp_path) -> None:
    recipe = open_tiny(preset("tiny"), tmp_path).recipe
    assert recipe.precision != "auto"
    assert open_run(preset("tiny"), tmp_path).recipe == recipe
    other = replace(preset("tiny"), seed=3)
    with pytest.raises(UserError, match=r"config\.json: seed: this run has 0, the command asks for 3"):
        open_run(other, tmp_path)


def test_what_may_be_another_when_a_run_goes_on(tmp_path, capsys) -> None:
    """Changed settings apply and are logged; config.json keeps those that the run began with."""
    recipe = open_tiny(preset("tiny"), tmp_path).recipe
    written = (tmp_path / "config.json").read_text()
    assert capsys.readouterr().err == ""
    loop = replace(recipe.loop, keep=7, profile=2, session_seconds=9.0, guard=GuardConfig("skip", most=3))
    changed = replace(
        recipe,
        loop=loop,
        data=replace(recipe.data, workers=2, accumulate=4),
        parallel=replace(recipe.parallel, activation_checkpointing="full"),
    )
    assert open_run(changed, tmp_path).recipe == changed
    assert capsys.readouterr().err == (
        f"{tmp_path}: resumes with changed settings: data.accumulate 4 (was 1), "
        "data.workers 2 (was 0), loop.keep 7 (was 2), loop.session_seconds 9.0 (was None), "
        "loop.guard.nonfinite 'skip' (was 'raise'), "
        "loop.guard.most 3 (was 10), loop.profile 2 (was 0), parallel.activation_checkpointing 'full' (was 'none')\n"
    )
    assert (tmp_path / "config.json").read_text() == written


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("data", "batch_size", 16),
        ("data", "max_errors", 0.1),
        ("optimizer", "betas", (0.9, 0.99)),
        ("loop", "steps", 31),
        ("loop", "max_seconds", 3.0),
        ("loop", "ema_decay", 0.9),
        ("generation", "guidance_scale", 1.0),
        ("parallel", "float8", True),
    ],
)
def test_what_may_not(tmp_path, part: str, name: str, value: object) -> None:
    recipe = open_tiny(preset("tiny"), tmp_path).recipe
    changed = replace(recipe, **{part: replace(getattr(recipe, part), **{name: value})})
    before, now = (to_dict(settings)[part][name] for settings in (recipe, changed))
    message = f"config.json: {part}.{name}: this run has {before!r}, the command asks for {now!r}; give the same"
    with pytest.raises(UserError, match=re.escape(message)):
        open_run(changed, tmp_path)


def test_a_run_goes_on_in_its_own_precision_or_not_at_all(tmp_path) -> None:
    begun = open_tiny(replace(preset("tiny"), precision="bfloat16"), tmp_path).recipe
    assert open_run(preset("tiny"), tmp_path).recipe == begun, "auto is what it is"
    with pytest.raises(UserError, match="precision: this run has 'bfloat16', the command asks for 'float32'"):
        open_run(replace(begun, precision="float32"), tmp_path)


def test_recipes_that_do_not_fit_are_refused_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(UserError, match=r'"kl-f8" is a preset, to be trained first'):
        open_run(preset("7b"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    recipe = preset("tiny")
    with pytest.raises(UserError, match=r'autoencoder: expected pixels.*found "nowhere"'):
        resolve(replace(recipe, data=replace(recipe.data, autoencoder="nowhere")))
    with pytest.raises(UserError, match=r"data\.world\.size: expected a multiple of 8 .*found 36"):
        resolve(replace(recipe, data=replace(recipe.data, world=replace(recipe.data.world, size=36))))


def test_channels_follow_the_autoencoder(capsys) -> None:
    recipe = preset("tiny")
    settled = resolve(replace(recipe, model=replace(recipe.model, latent_channels=4))).recipe
    assert settled.model.latent_channels == 3
    assert "model.latent_channels: 3, as the autoencoder pixels has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("0.16b", 162.4e6), ("0.37b", 373.9e6), ("0.76b", 777.9e6), ("1.4b", 1364.3e6), ("7b", 6738.4e6)],
)
def test_plan_of_the_paper(name: str, parameters: float) -> None:
    linear, unet = plan(preset(name)), plan(preset(f"{name}-unet"))
    assert linear["parameters"] == pytest.approx(parameters, rel=0.005)
    assert unet["adapter_parameters"] == pytest.approx(0.27e9, rel=0.05)
    assert linear["train_flops"] == pytest.approx(6 * parameters * 0.524e12, rel=0.02)
    assert linear["patches_per_image"] == 256


def save(folder, tokenizer: Tokenizer, **changes):
    original = exported(tokenizer, **changes)
    weights = dict(original.model.named_parameters())
    save_export(
        folder,
        weights,
        original.model.config,
        original.process.config,
        tokenizer,
        original.autoencoder,
        original.image_size,
        GenerationConfig(),
        "# card\n",
    )
    return original


def test_export_round_trip(tmp_path, tokenizer: Tokenizer) -> None:
    original = save(tmp_path / "export", tokenizer)
    loaded = load_export(tmp_path / "export")
    assert loaded.model.config == original.model.config
    assert loaded.process.config == original.process.config
    assert loaded.generation == GenerationConfig()
    for (name, a), (_, b) in zip(original.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    config = read_json(tmp_path / "export" / "config.json")
    assert config["model_type"] == "transfusion"
    assert config["architectures"] == ["TransfusionForConditionalGeneration"]
    assert {p.name for p in (tmp_path / "export").iterdir()} == {
        "config.json", "transfuse_generation.json", "model.safetensors", "tokenizer.json", "autoencoder", "README.md",
        "generation_config.json", "processor_config.json", "modeling_transfusion.py", "tokenizer_config.json",
    }  # fmt: skip
    images = [
        p("a crab", num_inference_steps=2, generator=3).images[0] for p in (transfuse.load(tmp_path / "export"),) * 2
    ]
    assert images[0].tobytes() == images[1].tobytes()


def test_bfloat16_export_stays_close(tmp_path, tokenizer: Tokenizer) -> None:
    save(tmp_path / "export", tokenizer)
    exact, rough = (transfuse.load(tmp_path / "export", dtype=d) for d in (torch.float32, torch.bfloat16))
    options = {"num_inference_steps": 3, "generator": 1, "output_type": "latent"}
    difference = exact("a crab", **options).images[0] - rough("a crab", **options).images[0]
    assert rough.exported.model.embedding.weight.dtype == torch.bfloat16
    assert float(difference.abs().mean()) < 0.1


def test_broken_exports_name_what_is_wrong(tmp_path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "export"
    with pytest.raises(UserError, match=r"config\.json: expected a JSON file, found none"):
        load_export(folder)
    save(folder, tokenizer)
    (folder / "model.safetensors").rename(folder / "gone")
    with pytest.raises(UserError, match="expected the model's weights, found no file"):
        load_export(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="expected a safetensors file"):
        load_export(folder)
    (folder / "gone").rename(folder / "model.safetensors")
    config = read_json(folder / "config.json")
    for change, message in [
        ({"model_type": "llama"}, "expected model_type \"transfusion\", found 'llama'"),
        (
            {"model": {**config["model"], "d_model": 128}},
            r"tensor embedding\.weight: expected \(320, 128\), found \(320, 64\)",
        ),
        ({"model": {**config["model"], "hight": 1}}, 'unknown setting "hight"; there are images, text_vocab_size'),
        ({"model": {**config["model"], "text_vocab_size": 100}}, "expected at most the model's 100 ids"),
    ]:
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_export(folder)


def test_diffusion_defaults_are_the_papers() -> None:
    assert preset("0.16b").diffusion == DiffusionConfig(timesteps=1000, prediction="epsilon")
    assert preset("0.16b").objective.image_weight == 5
    assert preset("epsilon-32").objective.image_weight == 5, "the demo's own lambda is not the paper's"
    assert preset("0.16b").data.pairs.caption_first == 0.8
    assert preset("0.16b").data.pairs.image_first_max_timestep is None
    assert tiny() == tiny()
    assert latent(2, 2).shape == (3, 2, 2)
