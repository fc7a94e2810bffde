"""An export in diffusers' layout: there and back to the byte, drawn from to the byte, its parts opened by diffusers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import transfuse
from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.export import load_export, relayout


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def theirs(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return relayout(served, tmp_path_factory.mktemp("theirs") / "model", "diffusers")


def test_there_and_back(served: Path, theirs: Path, tmp_path: Path) -> None:
    assert run(["export", str(theirs), "--out", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == files(served)
    assert run(["export", str(served), "--format", "diffusers", "--out", str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == files(theirs)


def test_draws_the_same(served: Path, theirs: Path) -> None:
    ours, other = (transfuse.load(str(folder))("a crab", generator=3).images[0] for folder in (served, theirs))
    assert np.array_equal(ours, other)


def test_diffusers_opens_the_scheduler(theirs: Path) -> None:
    process = load_export(theirs).process
    for kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler = kind.from_pretrained(theirs, subfolder="scheduler")
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), process.alpha_bar[1:], atol=1e-6, rtol=1e-4)
        assert scheduler.config.prediction_type == "sample"


def test_diffusers_opens_the_autoencoder(tmp_path: Path, tokenizer) -> None:
    from conftest import randomised, tiny

    from transfuse.autoencoders import open_autoencoder
    from transfuse.diffusion import DiffusionConfig
    from transfuse.export import GenerationConfig, save_export

    autoencoder = open_autoencoder("kl-f4-small")
    model = randomised(tiny(latent_channels=8))
    settings = (
        model.config,
        DiffusionConfig(prediction="v"),
        tokenizer,
        autoencoder,
        64,
        GenerationConfig(),
        "a model",
    )
    export = save_export(tmp_path / "export", model.state_dict(), *settings)
    theirs = relayout(export, tmp_path / "theirs", "diffusers")
    opened = diffusers.AutoencoderKL.from_pretrained(theirs, subfolder="vae")
    for name, weight in opened.state_dict().items():
        assert torch.equal(weight, autoencoder.state_dict()[name]), name
    index = transfuse.export.read_json(theirs / "model_index.json")
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_mistakes(served: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        relayout(tmp_path, tmp_path / "out", "diffusers")
    assert run(["export", str(served), "--format", "diffusers"]) == 2
    assert "expected --out" in capsys.readouterr().err
    assert run(["export", str(served), "--format", "llama", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "out").exists()
