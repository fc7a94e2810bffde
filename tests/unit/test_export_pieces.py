"""An export whose pieces are damaged, or another model's: one line says which, and nothing is computed with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from transfuse.errors import UserError
from transfuse.export import load_export, relayout
from transfuse.folders import DIFFUSERS, WEIGHTS
from transfuse.sequence import Tokenizer

PIECES = ("config.json", "transfuse_generation.json", "tokenizer.json", "model.safetensors", "autoencoder/config.json")


@pytest.fixture
def folder(served: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served, tmp_path / "export"))


def refused(folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        load_export(folder)
    assert "\n" not in str(caught.value)


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("layout", ["transfuse", "diffusers"])
def test_another_tokenizer_is_refused(served: Path, tmp_path: Path, layout: str) -> None:
    """A tokenizer of fewer or as many ids gives them other meanings."""
    folder = relayout(served, tmp_path / "export", layout)  # type: ignore[arg-type]
    file = folder / (DIFFUSERS["tokenizer.json"] if layout == "diffusers" else "tokenizer.json")
    load_export(folder)
    for texts, ids in ((["four balloons over the sea"] * 4, 280), (["the sun, a cup, a house and a tree"] * 9, 320)):
        Tokenizer.train(texts, ids).save(file)
        refused(folder, r"tokenizer\.json: expected the tokenizer the model was trained with \([0-9a-f]{16}\), found")


def test_a_tokenizer_that_was_saved_again_is_the_same(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert load_export(folder).tokenizer.decode(load_export(folder).tokenizer.encode("a crab")) == "a crab"


def test_the_bundled_models_record_their_tokenizers(tmp_path: Path) -> None:
    for config in WEIGHTS.glob("*/config.json"):
        recorded = json.loads(config.read_text())["tokenizer"]["fingerprint"]
        assert Tokenizer.load(config.with_name("tokenizer.json")).fingerprint == recorded


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[3]", b"null", b'"a"', b"\x00\xff" * 90, b"[" * 90_000, None], ids=lambda c: str(c)[:12]
)
def test_pieces_of_another_kind(folder: Path, piece: str, content: bytes | None) -> None:
    """None: a folder is in its place."""
    (folder / piece).unlink()
    if content is None:
        (folder / piece).mkdir()
    else:
        (folder / piece).write_bytes(content)
    if (piece, content) == ("transfuse_generation.json", b"{}"):
        load_export(folder)  # all of it has defaults
    else:
        refused(folder, Path(piece).name)


@pytest.mark.parametrize(
    ("piece", "change", "says"),
    [
        ("config.json", lambda c: c.update(tokenizer="f4"), r"config\.json: tokenizer"),
        ("config.json", lambda c: c.pop("tokenizer"), r"config\.json: tokenizer"),
        ("config.json", lambda c: c.update(autoencoder=["pixels"]), r"config\.json: autoencoder"),
        ("config.json", lambda c: c.pop("autoencoder"), r"config\.json: autoencoder"),
        ("config.json", lambda c: c["autoencoder"].update(fingerprint="0"), "expected the autoencoder the model was"),
        ("config.json", lambda c: c["model"].update(n_layers=10**30), r"model\.n_layers: expected at most 1000"),
        ("config.json", lambda c: c["model"].update(d_model=10**30), r"config\.json: model"),
        ("config.json", lambda c: c["diffusion"].update(timesteps=10**30), r"config\.json: model"),
        (
            "transfuse_generation.json",
            lambda c: c["sampler"].update(steps=4000),
            r"transfuse_generation\.json: sampler",
        ),
        ("transfuse_generation.json", lambda c: c["sampler"].update(first=2), r"transfuse_generation\.json: sampler"),
    ],
)
def test_values_that_cannot_be(folder: Path, piece: str, change: Callable[..., object], says: str) -> None:
    changed(folder / piece, change)
    refused(folder, says)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_numbers_of_a_network(folder: Path, dtype: torch.dtype) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    refused(folder, r"model\.safetensors: tensor \S+: expected floating point, found (int|bool|complex)")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_class_name", ["AutoencoderKL"]),
        ("block_out_channels", 64),
        ("down_block_types", None),
        ("latent_channels", "eight"),
        ("layers_per_block", 10**9),
        ("layers_per_block", {}),
        ("scaling_factor", []),
        ("latents_mean", 3),
        ("norm_num_groups", None),
    ],
)
def test_an_autoencoder_with_values_that_cannot_be(tmp_path: Path, name: str, value: object) -> None:
    folder = Path(shutil.copytree(WEIGHTS / "small-64", tmp_path / "export"))
    changed(folder / "autoencoder/config.json", lambda config: config.update({name: value}))
    refused(folder, r"autoencoder/config\.json: ")


def test_an_autoencoder_with_weights_of_whole_numbers(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(WEIGHTS / "small-64", tmp_path / "export"))
    file = folder / "autoencoder/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.to(torch.int16) for name, tensor in load_file(file).items()}, file)
    refused(folder, "autoencoder/.*: tensor .*: expected floating point, found int16")
