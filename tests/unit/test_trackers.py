"""Trackers get what metrics.jsonl gets, resume where a run resumes, and never stop a run."""

from __future__ import annotations

import contextlib
import json
import sys
import types
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from conftest import open_tiny

from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.runs import open_run
from transfuse.train import build_trainer
from transfuse.training import Distributed, LoopConfig, Trainer, read_metrics


def run_tracked(folder: Path, *names: str, steps: int = 6, stop_at: int | None = None, sample: bool = False) -> Trainer:
    """A run of `steps`, or the part of it that a stop leaves: lines every 2 steps, a checkpoint every 4."""
    recipe = preset("tiny")
    loop = replace(recipe.loop, steps=steps, log_every=2, checkpoint_every=4, sample_every=4 if sample else 0)
    trainer = build_trainer(open_tiny(replace(recipe, loop=replace(loop, trackers=names)), folder), folder)
    trainer.restore()
    if stop_at is not None:
        advance = trainer.train_step

        def step(average: Any, asks: Any) -> Any:
            if trainer.step == stop_at:
                raise KeyboardInterrupt
            return advance(average, asks)

        trainer.train_step = step  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run(draw if sample else None)
    trainer.checkpoints.wait()
    return trainer


def draw(weights: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((8, 12, 3), 200, np.uint8)).save(path)
    path.with_suffix(".txt").write_text("a crab\na boat\n")


@pytest.fixture
def stubs(monkeypatch) -> list[tuple[Any, ...]]:
    """Modules in place of wandb and trackio that record every call."""
    calls: list[tuple[Any, ...]] = []
    for name in ("wandb", "trackio"):
        module: Any = types.ModuleType(name)
        run = types.SimpleNamespace(
            log=lambda numbers, step=None, name=name: calls.append((name, "log", step, numbers)),
            define_metric=lambda *given, name=name, **named: calls.append((name, "define_metric", given, named)),
            finish=lambda exit_code=None, name=name: calls.append((name, "finish", exit_code)),
        )

        module.init = partial(_init, calls, name, run)
        module.Image = lambda path, caption: ("image", path, caption)
        module.finish = lambda name=name: calls.append((name, "finish", None))
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def _init(calls: list[tuple[Any, ...]], module: str, run: Any, *given: Any, **named: Any) -> Any:
    calls.append((module, "init", given, named))
    return run


def numbers(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step"}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_others_get_every_line_and_go_on(tmp_path: Path, stubs: list[tuple[Any, ...]], name: str) -> None:
    folder = tmp_path / "my run"
    run_tracked(folder, name, stop_at=5, sample=True)
    run_tracked(folder, name, sample=True)
    starts = [call for call in stubs if call[1] == "init"]
    assert len(starts) == 2
    given = starts[0][3]
    assert given["config"] == json.loads((folder / "config.json").read_text())
    assert given["config"]["preset"] == "tiny"
    assert given["resume"] == "allow"
    key = "id" if name == "wandb" else "name"
    assert given[key].startswith("my-run-")
    assert starts[1][3][key] == given[key], "the same run, gone on with"
    logged = [call for call in stubs if call[1] == "log"]
    steps = [call[2] if name == "trackio" else call[3]["step"] for call in logged]
    assert steps == [2, 4, 4, 6], "two lines, a picture, a line"
    assert numbers(logged[-1][3]) == numbers(read_metrics(folder / "metrics.jsonl")[-1])
    picture = next(call[3]["samples"] for call in logged if "samples" in call[3])
    assert picture == ("image", str(folder / "samples" / "step-00000004.png"), "a crab\na boat\n")
    ends = [call[2] for call in stubs if call[1] == "finish"]
    assert ends == ([1, 0] if name == "wandb" else [None, None])


def test_tensorboard_holds_what_metrics_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_tracked(tmp_path, "tensorboard", steps=10, stop_at=7, sample=True)  # the line of step 6 is in no checkpoint
    before = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in before] == [2, 4, 6]
    run_tracked(tmp_path, "tensorboard", steps=10, sample=True)
    recorded = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for name in ("text", "image", "gradient_norm", "seconds", "positions_per_second"):
        events = recorded.Scalars(name)
        assert [event.step for event in events] == [2, 4, 6, 8, 10], "what was trained twice is there once"
        assert [event.value for event in events] == pytest.approx([line[name] for line in lines])
    assert lines[2]["seconds"] != before[2]["seconds"]
    assert [(image.step, image.width, image.height) for image in recorded.Images("samples")] == [
        (4, 12, 8),
        (8, 12, 8),
    ]
    text = recorded.Tensors("prompts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.split() == ["a", "crab", "a", "boat"]
    config = recorded.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"preset": "tiny"' in config


def test_a_failure_is_said_once_and_the_run_goes_on(tmp_path: Path, stubs, monkeypatch, capsys) -> None:

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    run = sys.modules["wandb"].init()  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "log", broken)
    monkeypatch.setattr(sys.modules["trackio"], "init", broken)
    assert run_tracked(tmp_path, "wandb", "trackio", sample=True).step == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("loop.trackers")]
    assert lines == [
        f"loop.trackers: {name}: ConnectionError: no route to host; metrics.jsonl has everything"
        for name in ("trackio", "wandb")
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_one_line_and_no_folder(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f'loop.trackers: expected {name}, found none; pip install "{name}<'):
        open_run(replace(preset("tiny"), loop=LoopConfig(trackers=(name,))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_with_others(tmp_path: Path, stubs) -> None:
    run_tracked(tmp_path, stop_at=5)
    assert run_tracked(tmp_path, "wandb").step == 6


def test_one_rank_speaks(tmp_path: Path, stubs) -> None:
    recipe = preset("tiny")
    recipe = open_run(replace(recipe, loop=replace(recipe.loop, trackers=("wandb",))), tmp_path)
    build_trainer(recipe, tmp_path)
    trainer = build_trainer(recipe, tmp_path, Distributed(rank=1, count=2))
    trainer.metrics.open(0)
    trainer.metrics.write({"step": 1, "text": 1.0})
    assert not stubs
