"""Presets of the rivals, and files that an earlier version wrote."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import exported
from tokenizers import decoders, models

from emoji_scenes import WorldConfig
from transfuse.config import from_dict, to_dict
from transfuse.diffusion import SamplerConfig
from transfuse.errors import UserError
from transfuse.folders import atomic_dir
from transfuse.inference import Engine, Request, TextDelta
from transfuse.model import ModelConfig
from transfuse.recipes import PRESETS, Recipe, preset
from transfuse.recipes.autoencoders import AUTOENCODERS
from transfuse.runs import held, open_run, resolve, run_device
from transfuse.sequence import Document, Text, Tokenizer
from transfuse.sequence.tokenizer import SPECIAL
from transfuse.train import build_trainer, export_run
from transfuse.train_autoencoder import open_autoencoder_run
from transfuse.training import Distributed


def test_the_papers_rates() -> None:
    """Chameleon 1e-4 for Transfusion's 3e-4, with AdamW's eps 1e-5 and z-loss 1e-5; at 32 pixels the same rate."""
    for name in ("chameleon-0.76b", "llama-0.76b-stable"):
        recipe = preset(name)
        assert recipe.optimizer.learning_rate == pytest.approx(1e-4)
        assert recipe.optimizer.final_learning_rate == pytest.approx(5e-6)
        assert (recipe.optimizer.eps, recipe.objective.z_weight) == (1e-5, 1e-5)
        assert (recipe.model.qk_norm, recipe.model.norm_order) == (True, "swin")
    for name in ("0.76b", "llama-0.76b"):
        assert preset(name).optimizer.learning_rate == 3e-4
        assert not preset(name).model.qk_norm
    assert preset("chameleon-32").optimizer.learning_rate == preset("transfusion-32").optimizer.learning_rate


def test_no_preset_is_shorter_than_its_warmup() -> None:
    for made in (*(PRESETS[name]() for name in PRESETS), *(AUTOENCODERS[name]() for name in AUTOENCODERS)):
        assert made.optimizer.warmup < made.loop.steps, made.preset


def test_files_of_the_first_release_are_read() -> None:
    """It wrote the paper's U-Net channels for every network, whatever its patch size."""
    for name in ("demo", "tiny", "epsilon-32"):
        values = to_dict(preset(name))
        values["model"]["unet_channels"] = [576, 1216]
        for new in ("images", "codebook_size", "dropout"):
            del values["model"][new]
        for new in ("share_of", "autoencoder_weights"):
            del values["data"][new]
        del values["start"], values["init"]
        values["start_strict"] = True
        assert from_dict(Recipe, values, "config.json") == preset(name)
    old = ModelConfig(adapter="unet", unet_channels=(576, 1216))
    assert old == ModelConfig(adapter="unet"), "a run of the paper's resumes"
    assert ModelConfig(adapter="unet", unet_channels=(64, 128)).unet_levels == (64, 128)


def test_a_run_keeps_its_autoencoder(tmp_path: Path) -> None:
    recipe = replace(preset("tiny"), diffusion=replace(preset("tiny").diffusion, clip_x0=None))
    recipe = replace(
        recipe, model=replace(recipe.model, patch_size=2), data=replace(recipe.data, autoencoder="kl-f4-small")
    )
    run = open_run(recipe, tmp_path)
    opened = run.recipe
    assert len(opened.data.autoencoder_weights) == 12
    assert open_run(recipe, tmp_path).recipe == opened
    changed = replace(opened, data=replace(opened.data, autoencoder_weights="0" * 12))
    with pytest.raises(UserError, match="expected kl-f4-small with the weights 000000000000, as the run began, found"):
        resolve(changed)


def test_nothing_to_learn_from_is_refused() -> None:
    tiny = preset("tiny")
    for images, share in (("none", 0.0), ("latents", 1.0)):
        model = replace(tiny.model, images=images)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"data\.text_share: expected another share with model\.images"):
            resolve(replace(tiny, model=model, data=replace(tiny.data, text_share=share)))


def test_a_run_is_not_replaced_by_an_export(tmp_path: Path) -> None:
    recipe = preset("tiny")
    run = open_run(recipe, tmp_path / "run")
    trainer = build_trainer(run, tmp_path / "run")
    trainer.totals |= {"positions": 0, "images": 0}
    trainer.save()
    with pytest.raises(UserError, match="expected a folder to write export to, found a run"):
        export_run(run, trainer, tmp_path / "run")
    assert trainer.checkpoints.complete()


def test_a_folder_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "made"
    for text in ("one", "two"):
        with atomic_dir(folder, "thing") as partial:
            (partial / "config.json").write_text(text)
        assert (folder / "config.json").read_text() == text
    with pytest.raises(UserError, match="made: thing not written"), atomic_dir(folder, "thing") as partial:
        raise OSError("the disk is full")
    with pytest.raises(KeyError), atomic_dir(folder, "thing") as partial:
        raise KeyError
    assert (folder / "config.json").read_text() == "two", "what was there stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made"]
    monkeypatch.chdir(folder)
    with atomic_dir(Path("."), "thing") as partial:
        (partial / "config.json").write_text("here")
    assert (folder / "config.json").read_text() == "here"


@pytest.mark.parametrize("other", ["thesis.txt", "photos/one.jpg", "config.json.bak"])
def test_only_an_earlier_export_is_replaced(tmp_path: Path, other: str) -> None:
    """Not a folder of the user's, nor an export that now contains something else."""
    folder = tmp_path / "made"
    (folder / other).parent.mkdir(parents=True)
    (folder / other).write_text("years of work")
    for _ in range(2):
        with (
            pytest.raises(UserError, match=f"made: expected a folder for thing alone, found {other[:6]}"),
            atomic_dir(folder, "thing"),
        ):
            pytest.fail("written")
        assert (folder / other).read_text() == "years of work"
        (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="found thesis there"), atomic_dir(_file(tmp_path), "thing"):
        pytest.fail("written")


def _file(folder: Path) -> Path:
    (folder / "thesis").write_text("years of work")
    return folder / "thesis"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backgrounds": ("white",)}, r"data\.world: .*held-out combination, found none"),
        ({"kinds": ("pair",), "max_objects": 1}, r"data\.world: .*kinds"),
    ],
)
def test_a_world_that_can_not_be_is_refused_before_the_run(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    tiny = preset("tiny")
    data = replace(tiny.data, world=replace(tiny.data.world, **changes))
    with pytest.raises(UserError, match=told):
        open_run(replace(tiny, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_commands_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """A job that was submitted twice must not write over the checkpoints of the one that runs. A worker that outlives
    its run does not hold the lock."""
    recipe, context = preset("tiny"), multiprocessing.get_context("fork")

    def other() -> int:
        child = context.Process(target=_claim, args=(tmp_path,))
        child.start()
        child.join(60)
        assert child.exitcode is not None
        return child.exitcode

    opened = open_run(recipe, tmp_path).recipe
    with held(tmp_path, Distributed()):
        assert other() == 3
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
        assert opened == open_run(recipe, tmp_path).recipe
    assert other() == 0, "it was let go"
    worker.kill()
    worker.join()


def _claim(folder: Path) -> None:
    try:
        with held(folder, Distributed()):
            pass
    except UserError as error:
        os._exit(3 if "expected a run that nobody else trains, found another process at it" in str(error) else 1)


def settings_that_can_not_be() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"optimizer": {"betas": (1.5, 0.95)}}, "optimizer.betas: expected numbers from 0"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate: expected at least 0"),
        ({"optimizer": {"clip": 0.0}}, "optimizer.clip: expected a number above 0"),
        ({"objective": {"image_weight": -1.0}}, "objective.image_weight: expected at least 0"),
        ({"objective": {"timestep_bins": 0}}, "objective.timestep_bins: expected at least 1"),
        ({"loop": {"max_seconds": -1.0}}, "loop.max_seconds: expected at least 0"),
        ({"loop": {"ema_decay": 1.0}}, "loop.ema_decay: expected a number from 0"),
        ({"model": {"d_ff": -5}}, "model.d_ff: expected a positive number"),
        ({"generation": {"sampler": SamplerConfig(steps=2000)}}, "generation.sampler: steps"),
        (
            {"generation": {"sampler": SamplerConfig("ddim", 10, first=3000)}},
            "generation.sampler: first: expected 1..1000",
        ),
        ({"data": {"world": WorldConfig(size=520), "row_length": None}}, r"data.world.size: expected at most \d+"),
    ]


@pytest.mark.parametrize(("changes", "told"), settings_that_can_not_be())
def test_settings_that_can_not_be_are_one_line_before_the_run(
    tmp_path: Path, changes: dict[str, dict[str, Any]], told: str
) -> None:
    recipe = preset("tiny")
    recipe = replace(recipe, model=replace(recipe.model, patch_positions="learned"))
    with pytest.raises((ValueError, UserError), match=f"^{told}"):
        open_run(
            replace(recipe, **{part: replace(getattr(recipe, part), **values) for part, values in changes.items()}),
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_s_run_does_not_take_measures_of_models(tmp_path: Path) -> None:
    recipe = next(iter(AUTOENCODERS.values()))()
    with pytest.raises(UserError, match=r"loop\.measure_every: expected 0 for an autoencoder"):
        open_autoencoder_run(replace(recipe, loop=replace(recipe.loop, measure_every=1)), tmp_path)


def test_bytes_that_are_no_utf8_are_one_line(tokenizer: Tokenizer) -> None:
    text = b"a \xff crab".decode(errors="surrogateescape")
    with pytest.raises(UserError, match=r"text: expected UTF-8, found '\\udcff' in 'a \\udcff crab'"):
        tokenizer.encode(text)


def test_a_run_of_another_machines_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    opened = open_run(preset("tiny"), tmp_path).recipe
    assert opened.device == run_device(preset("tiny"), tmp_path) == "cuda"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="device: expected a CUDA device, found none"):
        run_device(preset("tiny"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("guidance_scale", float("nan")),
        ("top_p", 0.0),
        ("code_top_p", 2.0),
        ("max_tokens", -1),
        ("guidance_interval", (0.9, 0.1)),
    ],
)
def test_ways_of_drawing_that_no_request_may_have(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        replace(preset("tiny").generation, **{name: value})


def test_words_keep_their_spaces() -> None:
    """Sentencepiece-like tokenizers take the first space of what they decode away."""
    words = {name: number for number, name in enumerate([*SPECIAL, "\u2581a", "\u2581crab", "s"])}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="s"))
    backend.add_special_tokens(list(SPECIAL))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    engine = Engine(exported(tokenizer))
    request = Request(Document([Text((4,))], closed=False), draw="never", max_tokens=12, temperature=3.0)
    for seed in range(4):
        tokens, text = [], ""
        for event in engine.run([replace(request, seed=seed)]):
            if isinstance(event, TextDelta):
                tokens.append(event.token)
                text += event.text
        assert "a" + text == tokenizer.decode([4, *tokens]).rstrip()
