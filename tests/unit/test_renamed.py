"""Names of version 0.1: its files load, and its options are answered with today's names."""

import pytest
import torch
from safetensors.torch import load_file

from transfuse.cli import run
from transfuse.config import from_dict, read_json, to_dict
from transfuse.export import load_export
from transfuse.folders import WEIGHTS
from transfuse.model import ModelConfig, Transfusion
from transfuse.model.transfusion import current_name
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


def test_the_bundled_model_is_read_whole() -> None:
    """Its files have the names of version 0.1."""
    folder = WEIGHTS / "small-64"
    assert "width" in read_json(folder / "config.json")["model"]
    stored = load_file(folder / "model.safetensors")
    loaded = load_export("small-64").model.state_dict()
    assert {current_name(name) for name in stored} == set(loaded)
    assert all(torch.equal(loaded[current_name(name)], tensor.float()) for name, tensor in stored.items())


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
