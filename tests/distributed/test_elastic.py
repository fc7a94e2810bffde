"""Ranks killed at random moments: torchrun starts all of them again, and the run ends as an undisturbed one does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from processes import finished, torchrun
from safetensors.torch import load_file

from transfuse.training import CheckpointFolder, read_metrics
from transfuse.training.checkpoint import step_of

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("elastic")]

STEPS = 60
SETTINGS = (
    "--data.batch-size",
    "4",
    "--loop.steps",
    str(STEPS),
    "--loop.checkpoint-every",
    "1",
    "--loop.log-every",
    "1",
)


def start(run: Path, *options: str) -> subprocess.Popen[str]:
    command = ("-m", "transfuse", "--", "train", "tiny", "--run", str(run), *SETTINGS)
    return torchrun(2, *command, options=("--monitor-interval", "0.1", *options))


def workers(agent: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(start(run))
    return run


@pytest.mark.parametrize("kills", [2, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_ranks(tmp_path: Path, undisturbed: Path, kills: int) -> None:
    """One rank of two, at any moment: in a step, in a save, while it starts. Nothing that was saved is lost."""
    run, draw = tmp_path / "run", random.Random(0)
    store = CheckpointFolder(run / "checkpoints")
    agent = start(run, "--max-restarts", str(kills))
    reached, killed = 0, 0
    while killed < kills and agent.poll() is None:
        deadline = time.monotonic() + 60
        # Until it has got ahead, so that it ends one day; then a little longer, into any part of a step or save.
        while (not store.complete() or step_of(store.complete()[-1]) <= reached) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        newest, complaints = store.newest()
        assert not complaints, "what is visible under its final name is whole"
        assert newest is not None
        assert step_of(newest) >= reached
        reached = step_of(newest)
        alive = workers(agent)
        if not alive or reached >= STEPS - 1:
            break
        os.kill(draw.choice(alive), signal.SIGKILL)
        killed += 1
    finished(agent)
    assert killed >= min(3, kills)
    ours, expected = exported(run), exported(undisturbed)
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.items())
    assert not list((run / "checkpoints").glob("*.partial"))
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    same = ("text", "image", "gradient_norm", "positions", "images")
    for ours_line, theirs_line in zip(lines, read_metrics(undisturbed / "metrics.jsonl"), strict=True):
        assert [ours_line.get(name) for name in same] == [theirs_line.get(name) for name in same]


def test_asked_to_stop_all_ranks_save_and_go_on_later(tmp_path: Path, undisturbed: Path) -> None:
    """SIGTERM to one rank only: all agree; to torchrun that is no failure, and the same command resumes."""
    run = tmp_path / "run"
    store = CheckpointFolder(run / "checkpoints")
    agent = start(run)
    while not store.complete():
        assert agent.poll() is None
        time.sleep(0.02)
    os.kill(workers(agent)[1], signal.SIGTERM)
    output = finished(agent)
    assert "stopped at step" in output
    assert not (run / "export").exists()
    assert step_of(store.complete()[-1]) < STEPS
    finished(start(run))
    ours, expected = exported(run), exported(undisturbed)
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.items())


def test_a_mistake_is_said_once(tmp_path: Path) -> None:
    agent = torchrun(
        2, "-m", "transfuse", "--", "train", "tiny", "--run", str(tmp_path / "run"), "--parallel.tensor", "3"
    )
    output, _ = agent.communicate(timeout=120)
    assert agent.returncode != 0
    assert output.count("transfuse: parallel: expected a multiple of 3 processes (replicate x tensor), found 2") == 1
    assert "transfuse/cli" not in output, "no traceback of ours"
