"""Runs that end before their last step: the exit code says whether to call again, and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from transfuse.cli import run
from transfuse.data import StepLoader
from transfuse.training import CheckpointFolder, Trainer, read_metrics
from transfuse.training.checkpoint import Groups, read, step_of

pytestmark = pytest.mark.xdist_group("stops")  # its fixtures are made once

COMMAND = [
    "train",
    "tiny",
    "--run",
    "run",
    "--loop.steps",
    "8",
    "--loop.checkpoint-every",
    "6",
    "--loop.log-every",
    "2",
]


def saved(folder: Path) -> tuple[int, Groups]:
    path, _ = CheckpointFolder(folder / "checkpoints").newest()
    assert path is not None
    return step_of(path), read(path).tensors


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Groups:
    folder = tmp_path_factory.mktemp("straight")
    assert run([*COMMAND, "--run", str(folder / "run")]) == 0
    return saved(folder / "run")[1]


@pytest.fixture
def at_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """In a new folder: have signals come while a step's data is made. None may come through to us."""
    monkeypatch.chdir(tmp_path)
    through: list[int] = []
    kinds = (signal.SIGUSR1, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, frame: through.append(number)) for kind in kinds]
    plain = StepLoader.__call__

    def send(at: int, *numbers: int) -> None:
        def call(self: StepLoader, step: int):
            for number in numbers if step == at else ():
                os.kill(os.getpid(), number)
            return plain(self, step)

        monkeypatch.setattr(StepLoader, "__call__", call)

    yield send
    for kind, handler in zip(kinds, before, strict=True):
        signal.signal(kind, handler)
    assert not through


def assert_goes_on(straight: Groups, *settings: str) -> None:
    """The same command ends with what a run has that was not stopped."""
    assert run([*COMMAND, *settings]) == 0
    step, tensors = saved(Path("run"))
    assert step == 8
    for kind, expected in straight.items():
        for name, tensor in expected.items():
            assert torch.equal(tensor, tensors[kind][name]), (kind, name)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]


def test_a_signal_ends_the_step_and_saves(straight: Groups, at_step) -> None:
    """And what may change when a run resumes changes nothing that is learned."""
    at_step(3, signal.SIGUSR1)
    assert run(COMMAND) == 75
    assert saved(Path("run"))[0] == 5, "asked for in step 3, agreed upon in the next"
    assert not Path("run/export").exists()
    others = ["--data.workers", "1", "--loop.keep", "3", "--loop.checkpoint-every", "7", "--loop.guard.most", "1"]
    assert_goes_on(straight, *others)


def test_a_session_is_over(straight: Groups, at_step, capsys) -> None:
    assert run([*COMMAND, "--loop.session-seconds", "0"]) == 75
    assert "run: stopped at step 1 and saved; the same command resumes it" in capsys.readouterr().err
    assert_goes_on(straight)


def test_a_second_signal_does_not_cut_the_saving_short(straight: Groups, at_step, monkeypatch) -> None:
    """A scheduler may send SIGUSR1 and soon SIGTERM."""
    plain = Trainer.save

    def save(self: Trainer) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    monkeypatch.setattr(Trainer, "save", save)
    at_step(1, signal.SIGUSR1)
    assert run(COMMAND) == 75
    assert saved(Path("run"))[0] == 3
    assert_goes_on(straight)


@pytest.mark.long
def test_a_second_interrupt_is_at_once(straight: Groups, at_step) -> None:
    at_step(7, signal.SIGINT, signal.SIGINT)
    assert run(COMMAND) == 130
    at_step(-1)
    assert_goes_on(straight)


def test_a_worker_that_is_killed(straight: Groups, at_step, capfd) -> None:
    """A system that is short of memory kills a worker."""
    at_step(-1)
    plain = StepLoader.__call__

    def call(self: StepLoader, step: int):
        for worker in multiprocessing.active_children() if step == 7 else ():
            os.kill(worker.pid, signal.SIGKILL)
            time.sleep(60)  # torch notices, and that ends it
        return plain(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepLoader, "__call__", call)
        assert run([*COMMAND, "--data.workers", "1"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("transfuse: ")]
    assert line.startswith("transfuse: data.workers: DataLoader worker")
    assert line.endswith("memory ran out; the same command resumes the run")
    assert_goes_on(straight)


def test_time_in_all_finishes_a_run(at_step, capsys) -> None:
    """Once over, it stays so: called again, the command trains no further. An export there is, and code 0, also where a
    signal came besides."""
    at_step(1, signal.SIGTERM)
    limited = [*COMMAND, "--loop.max-seconds", "1e-9", "--loop.log-every", "5"]
    for _ in range(2):
        assert run(limited) == 0
        assert read_metrics(Path("run/metrics.jsonl"))[-1]["step"] == 2, "all steps are logged"
        assert saved(Path("run"))[0] == 2
        assert "0 s are over at step 2 of 8" in capsys.readouterr().err
    assert Path("run/export/model.safetensors").is_file()
    assert run(COMMAND) == 2
    assert "loop.max_seconds: this run has 1e-09, the command asks for None" in capsys.readouterr().err
