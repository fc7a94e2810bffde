"""Models that come with the package: found by name, taken where no other is there, stored in half the bytes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import transfuse
from emoji_scenes import WorldConfig, background_of, colours_in
from transfuse import folders
from transfuse.cli import run
from transfuse.cli.writing import default_model
from transfuse.config import to_dict
from transfuse.devices import for_inference, pick_device
from transfuse.errors import UserError
from transfuse.evaluate import world_of
from transfuse.evaluation import model_hash
from transfuse.export import load_export, relayout
from transfuse.folders import WEIGHTS
from transfuse.model import Transfusion
from transfuse.recipes.small import small_64


@pytest.fixture
def shelf(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and a package with one small model, of random weights, by the default's name."""
    shutil.copytree(served, tmp_path / "weights" / folders.DEFAULT)
    monkeypatch.setattr(folders, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "weights" / folders.DEFAULT


def weights(model: Transfusion) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def test_a_new_user_has_a_model(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "a crab", "--draw", "force", "--steps", "2", "--out", "pictures"]) == 0
    assert Path("pictures/seed-0-0.png").is_file()
    assert run(["caption", "pictures/seed-0-0.png"]) == 0
    assert run(["edit", "pictures/seed-0-0.png", "make it red", "--steps", "2", "--out", "pictures"]) == 0


def test_device_and_precision_are_asked_for(shelf: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["generate", "a crab", "--draw", "force", "--steps", "2"]
    assert run([*drawn, "--precision", "bfloat16", "--device", "cpu", "--out", "rough"]) == 0
    assert run([*drawn, "--out", "fine"]) == 0
    rough, fine = (
        np.asarray(PIL.Image.open(Path(folder, "seed-0-0.png")), dtype=np.int16) for folder in ("rough", "fine")
    )
    assert 0 < np.abs(rough - fine).max() < 64, "other roundings, the same picture"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([*drawn, "--device", "cuda"]) == 2
    assert "device: expected a CUDA device, found none on this machine" in capsys.readouterr().err
    assert pick_device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    assert for_inference("auto", "auto") == ("cuda", torch.bfloat16)
    assert for_inference("cpu", "auto") == ("cpu", torch.float32)


def test_an_export_under_runs_comes_before_it(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/mine/export").mkdir(parents=True)
    Path("runs/mine/export/config.json").write_text('{"model_type": "transfusion", "model": 3}')
    assert run(["generate", "a crab"]) == 2
    assert "runs/mine/export" in capsys.readouterr().err
    assert run(["generate", "a crab", "--steps", "2", "--model", folders.DEFAULT]) == 0


def test_the_export_of_an_autoencoder_is_no_model(shelf: Path) -> None:
    Path("runs/kl/export").mkdir(parents=True)
    Path("runs/kl/export/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert default_model() == Path(folders.DEFAULT)
    shutil.copytree(shelf, "runs/mine/export")
    os.utime("runs/mine/export/config.json", (1, 1))
    assert default_model() == Path("runs/mine/export")


def trained(folder: str, shelf: Path, when: int, preset: str = "demo", images: str = "latents") -> None:
    """An export under runs/, as a preset writes it."""
    shutil.copytree(shelf, folder)
    config = json.loads(Path(folder, "config.json").read_text())
    config["preset"], config["model"]["images"] = preset, images
    Path(folder, "config.json").write_text(json.dumps(config))
    os.utime(Path(folder, "config.json"), (when, when))


def test_the_default_and_the_reason_are_reported(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def chosen() -> tuple[str, str]:
        return str(default_model()), capsys.readouterr().err

    model, line = chosen()
    assert model == folders.DEFAULT
    assert line.startswith(
        f"{model}: the model used, the bundled one, because there are no models under runs/; --model"
    )
    assert line.count("\n") == 1
    trained("runs/trial/export", shelf, 50, "tiny")
    trained("runs/words/export", shelf, 40, "llama-32", "none")
    model, line = chosen()
    assert model == folders.DEFAULT, "neither draws"
    assert "because there are only models that draw nothing under runs/" in line
    trained("runs/first/export", shelf, 10)
    trained("runs/second/export", shelf, 20, "small-64")
    model, line = chosen()
    assert model == "runs/second/export", "the newest of those that draw"
    assert line == f"{model}: the model used, the newest export under runs/ that draws; --model names another\n"


@pytest.mark.parametrize("command", ["generate", "caption", "edit", "chat"])
def test_json_stays_clean_where_the_default_is_reported(
    shelf: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    PIL.Image.new("RGB", (8, 8)).save("a.png")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words = {"generate": ["a crab"], "caption": ["a.png"], "edit": ["a.png", "make it red"], "chat": []}[command]
    for model in ([], ["--model", str(shelf)]):
        assert run([command, *words, *model, *(["--json"] if command != "chat" else [])]) == 0
        result = capsys.readouterr()
        assert ("the model used" in result.err) == (not model)
        assert "the model used" not in result.out
        for line in result.out.splitlines():
            json.loads(line)


def test_a_trial_is_never_the_default(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else of the preset is changed; it is used where it is named."""
    assert run(["train", "tiny", "--loop.steps", "1", "--model.n-layers", "1", "--run", "runs/mine"]) == 0
    assert default_model() == Path(folders.DEFAULT)
    assert run(["generate", "a crab", "--draw", "force", "--steps", "2", "--model", "runs/mine/export"]) == 0
    assert PIL.Image.open("out/seed-0-0.png").size == (32, 32)


def test_a_name_stands_for_it_and_an_export_of_that_name_comes_first(shelf: Path, tokenizer) -> None:
    Path(folders.DEFAULT).mkdir()
    Path(folders.DEFAULT, "config.json").write_text("{}")  # a run of that name is none
    assert transfuse.load(folders.DEFAULT).exported.weights == shelf / "model.safetensors"
    relayout(shelf, Path(folders.DEFAULT), "diffusers", torch.float16)
    assert load_export(folders.DEFAULT).weights == Path(
        folders.DEFAULT, "transformer/diffusion_pytorch_model.safetensors"
    )


def test_a_model_is_asked_about_the_world_it_knows(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever its export is, in either layout; `--world` comes first; for an unknown world a line says so."""
    known = small_64().data.world
    assert world_of(WEIGHTS / folders.DEFAULT, None, known.size) == known
    config = json.loads((shelf / "config.json").read_text())
    (shelf / "config.json").write_text(json.dumps({**config, "world": to_dict(replace(known, nouns=5))}))
    relayout(shelf, Path("elsewhere"), "diffusers")
    assert world_of(Path("elsewhere"), None, 16) == replace(known, nouns=5, size=16)
    assert world_of(Path("elsewhere"), folders.DEFAULT, 16) == replace(known, size=16)
    assert model_hash(folders.find_export(folders.DEFAULT)) == model_hash(shelf)
    assert "using all bundled ones" not in capsys.readouterr().err
    (shelf / "config.json").write_text(json.dumps({**config, "world": None}))
    assert world_of(shelf, None, 16) == WorldConfig(size=16)
    assert "using all bundled ones" in capsys.readouterr().err
    (shelf / "config.json").write_text(json.dumps({**config, "world": {"nouns": 0}}))
    with pytest.raises(UserError, match=r"config\.json: WorldConfig.nouns"):
        world_of(shelf, None, 16)


def test_without_any_it_says_what_to_do(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(folders, "WEIGHTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(["generate", "a crab"]) == 2
    assert "make demo" in capsys.readouterr().err


def test_half_precision_is_half_as_large_and_rounded_once(served: Path, tmp_path: Path) -> None:
    assert run(["export", str(served), "--out", str(tmp_path / "half"), "--dtype", "float16"]) == 0
    whole, half = load_export(served), load_export(tmp_path / "half")
    assert half.model.lm_head.weight.dtype == torch.float32, "computed in what the loader asks for"
    assert torch.equal(weights(half.model), weights(whole.model).half().float())
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (served, tmp_path / "half")]
    assert sizes[1] < 0.55 * sizes[0]
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "half" / name).read_bytes() == (served / name).read_bytes()
    modes = {path.stat().st_mode for path in (tmp_path / "half").rglob("*") if path.is_file()}
    assert len(modes) == 1, "whoever may read its config may read its weights"
    assert run(["export", str(served), "--format", "llama", "--dtype", "float16"]) == 2


@pytest.mark.long
def test_the_default_draws_what_it_is_told() -> None:
    """The bundled model, its sampler and its defaults as they are: backgrounds at least, and one caption."""
    pipe = transfuse.load(folders.DEFAULT)
    colours = ("red", "blue", "green", "white", "black", "purple", "orange", "pink")
    pictures = pipe([f"a strawberry on a {colour} background" for colour in colours], generator=0).images
    right = [background_of(np.asarray(picture)) == colour for picture, colour in zip(pictures, colours, strict=True)]
    assert sum(right) >= 7
    assert colours_in(pipe.caption(pictures[0])[0]) == {"red"}


def test_what_comes_with_the_package_is_whole_and_small() -> None:
    for name in folders.bundled_models():
        files = [path for path in (folders.WEIGHTS / name).rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= 48_000_000
        assert (folders.WEIGHTS / name / "README.md").is_file()
        assert load_export(name).generation.sampler.steps > 0


def test_the_first_image_does_not_import_torchs_compiler() -> None:
    """It costs a second of a cold start: modules on the meta device draw no initial values."""
    code = "import sys, transfuse; transfuse.load('small-64')('a crab', num_inference_steps=1); "
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
