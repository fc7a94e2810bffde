"""What every switch beyond the paper must keep: exact resumption, an export that draws the same, checked settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Numbered, assert_equal, randomised, tensors, tiny

import transfuse
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.model import ModelConfig
from transfuse.recipes import Recipe, preset
from transfuse.sequence import Tokenizer
from transfuse.train import train
from transfuse.training import LoopConfig, ObjectiveConfig, OptimizerConfig, Trainer, TransfusionObjective

SWITCHES: dict[str, dict[str, Any]] = {
    "2-D positions": {"model": {"positions": "2d"}},
    "adaLN": {"model": {"timestep": "adaln"}},
    "Muon": {"optimizer": {"name": "muon"}},
    "Muon, two towers": {"model": {"experts": "all", "qk_norm": True}, "optimizer": {"name": "muon"}},
    "no timestep": {"model": {"timestep": "none", "adapter": "unet"}},
}
"""fields of a recipe's parts, by the name of the switch"""
TOGETHER: dict[str, Any] = {
    "model": {"positions": "2d", "timestep": "adaln", "patch_size": 4, "qk_norm": True, "qk_norm_type": "rms"},
    "diffusion": {"schedule": "flow", "prediction": "v", "weighting": "uniform", "times": "logit-normal"},
    "optimizer": {"name": "muon"},
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_a_run_resumes_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer, switch: dict[str, Any]) -> None:
    """Weights, averages and moments of four steps are those of two, a checkpoint, and two more."""
    config = tiny(**switch.get("model", {}))
    goal = TransfusionObjective(
        ObjectiveConfig(**switch.get("objective", {})), Process(DiffusionConfig(prediction="x0")), 11
    )
    optimizer = OptimizerConfig(1e-2, warmup=2, **switch.get("optimizer", {}))
    found = []
    for sessions in ((4,), (2, 4)):
        folder = tmp_path / str(len(sessions))
        for steps in sessions:
            loop = LoopConfig(4, sample_every=0, checkpoint_every=0, ema_decay=0.9)
            load = Numbered(config.sequence_format(tokenizer))
            trainer = Trainer(randomised(config), goal, load, folder, loop, optimizer)
            assert trainer.restore() == (steps != sessions[0])
            while trainer.step < steps:
                trainer.train_step(trainer.average)
            trainer.save()
        found.append(tensors(trainer))
    assert_equal(*found)


def test_all_together_resume_and_their_export_draws_the_same(tmp_path: Path) -> None:
    base = preset("tiny")
    parts = {name: replace(getattr(base, name), **fields) for name, fields in TOGETHER.items()}

    def recipe(**loop: Any) -> Recipe:
        return replace(base, **parts, loop=replace(base.loop, steps=2, checkpoint_every=1, **loop))

    train(recipe(), tmp_path / "straight")
    for outcome in ("stopped", "finished"):  # too short a session for a second step
        session = {"session_seconds": 1e-9} if outcome == "stopped" else {}
        assert train(recipe(**session), tmp_path / "resumed").outcome == outcome
    straight, resumed = (transfuse.load(tmp_path / name / "export") for name in ("straight", "resumed"))
    for part, fields in TOGETHER.items():
        opened = {"model": straight.exported.model.config, "diffusion": straight.exported.process.config}
        for name, value in fields.items():
            assert part not in opened or getattr(opened[part], name) == value
    for name, tensor in straight.exported.model.state_dict().items():
        assert torch.equal(tensor, resumed.exported.model.state_dict()[name]), name
    images = [pipe("a crab", generator=3, height=32, width=16).images[0] for pipe in (straight, resumed)]
    assert images[0].tobytes() == images[1].tobytes()


WRONG = [
    ({"positions": "2d", "images": "none"}, 'positions: expected raster with images "none", found 2d'),
    ({"positions": "2d", "d_head": 4}, "positions: expected raster with heads of 4 channels"),
    ({"timestep": "adaln", "images": "none"}, 'timestep: expected added with images "none"'),
    ({"timestep": "none", "timestep_at": "patch"}, 'timestep_at: expected hidden with timestep "none"'),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_settings_that_no_network_can_have_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^model.{message}"):
        ModelConfig(**fields)
