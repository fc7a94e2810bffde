"""Names of version 0.1: its files load, and its options are answered with today's names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from transfuse.cli import run
from transfuse.config import from_dict, read_json, to_dict
from transfuse.export import load_export
from transfuse.folders import WEIGHTS
from transfuse.model import ModelConfig, Transfusion
from transfuse.model.transfusion import RENAMED_WEIGHTS, current_name
from transfuse.recipes import Recipe, preset


def test_a_configuration_with_earlier_names_loads() -> None:
    values = to_dict(preset("tiny"))
    earlier = {new: old for old, new in ModelConfig.renamed.items()}
    values["model"] = {earlier.get(name, name): value for name, value in values["model"].items()}
    assert {"width", "depth", "kv_heads"} <= values["model"].keys()
    assert from_dict(Recipe, values, "here") == preset("tiny")


def test_an_export_with_earlier_names_loads() -> None:
    for adapter in ("linear", "unet"):
        config = ModelConfig(
            text_vocab_size=300, d_model=16, n_layers=1, n_heads=1, adapter=adapter, unet_channels=None
        )
        if adapter == "unet":
            config = from_dict(ModelConfig, to_dict(config) | {"unet_channels": (16, 32)}, "here")
        ours = set(Transfusion.on_meta(config).state_dict())
        earlier = {"transformer.": "trunk.", "lm_head.": "head.", "image_adapter.": "patches."}
        for name in ours:
            old = next((o + name.removeprefix(n) for n, o in earlier.items() if name.startswith(n)), name)
            old = old.replace("in_proj", "enter").replace("out_proj", "leave").replace("in_norm", "enter_norm")
            old = old.replace("skip_in", "linear_enter").replace("skip_out", "linear_leave")
            assert current_name(old) == current_name(name) == name


def test_a_model_with_the_names_of_its_time_is_read_whole(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(WEIGHTS / "small-64", tmp_path / "earlier"))
    config, fields = read_json(folder / "config.json"), {new: old for old, new in ModelConfig.renamed.items()}
    config["model"] = {fields.get(name, name): value for name, value in config["model"].items()}
    assert "width" in config["model"]
    (folder / "config.json").write_text(json.dumps(config))
    stored = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        old = next((o + name.removeprefix(n) for o, n in RENAMED_WEIGHTS if name.startswith(n)), name)
        stored[old] = tensor
    assert not {name for name in stored if name.startswith(("transformer.", "image_adapter.", "lm_head."))}
    save_file(stored, folder / "model.safetensors")
    loaded, expected = (load_export(which).model.state_dict() for which in (str(folder), "small-64"))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("option", "current"),
    [
        ("--model.width", "--model.d-model"),
        ("--model.kv-heads", "--model.n-kv-heads"),
        ("--model.hidden", "--model.d-ff"),
    ],
)
def test_an_earlier_option_is_answered_with_its_name(option: str, current: str, capsys) -> None:
    assert run(["plan", "tiny", option, "32"]) == 2
    assert capsys.readouterr().err == f'transfuse: plan: "{option}" is now called "{current}"\n'
