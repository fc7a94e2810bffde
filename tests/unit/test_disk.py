"""A disk that is full, or refuses: a run stops in one line that says so, and later resumes as if nothing had been."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Make, Numbered, assert_equal, tensors

from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.sequence import Batch, SequenceFormat
from transfuse.training import Trainer, read_metrics
from transfuse.training.checkpoint import verify
from transfuse.training.metrics import MetricsLog
from transfuse.training.optimizer import GuardConfig
from transfuse.training.trainer import Sample


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: as if the disk were full, in every thread."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@dataclass
class Filling(Numbered):
    """From step 5 on the disk is full. patient: step 6 comes when the thread has noticed."""

    size: int = 10
    patient: bool = False
    trainer: Trainer | None = None
    disk: ExitStack = field(default_factory=ExitStack)

    def __call__(self, step: int) -> list[Batch]:
        assert self.trainer is not None
        if step == 5:
            self.trainer.checkpoints.settle()
            self.disk.enter_context(full_disk(self.size))
        deadline = time.monotonic() + 60
        while step == 6 and self.patient and not self.trainer.checkpoints.failed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return super().__call__(step)


def stopped(trainer: Trainer, sample: Sample | None = None) -> str:
    """Return the message of a run that the full disk stops."""
    assert isinstance(trainer.load, Filling)
    trainer.load.trainer = trainer
    with trainer.load.disk, pytest.raises(UserError) as result:
        trainer.run(sample)
    assert "\n" not in str(result.value)
    return str(result.value)


def goes_on(make: Make, trainer: Trainer, **settings: Any) -> None:
    """The newest checkpoint is whole, nothing else is left over, and the run ends as one that was not disturbed."""
    newest, complaints = trainer.checkpoints.newest()
    assert newest is not None
    assert not complaints
    assert all(verify(path) is None for path in trainer.checkpoints.complete())
    assert not list(trainer.folder.rglob("*.partial"))
    assert make(trainer.folder.name, **settings).run() == "finished"
    straight = make("straight", **settings)
    straight.run()
    assert_equal(tensors(trainer), tensors(straight))
    lines = [read_metrics(item.folder / "metrics.jsonl") for item in (trainer, straight)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    assert lines[0][-1]["positions"] == lines[1][-1]["positions"]


def test_full_while_the_thread_writes(make: Make, grammar: SequenceFormat) -> None:
    """The checkpoint of step 6 cannot be written: noticed in the step after, not at the next checkpoint."""
    load = Filling(grammar, size=50_000, patient=True)
    trainer = make("run", load, 14, checkpoint_every=3)
    line = stopped(trainer)
    assert "step-00000006: checkpoint not written ([Errno 27] File too large" in line
    assert line.endswith("earlier checkpoints are intact")
    assert load.asked == [*range(8)]
    assert [path.name for path in trainer.checkpoints.complete()] == ["step-00000003"]
    goes_on(make, trainer, steps=14, checkpoint_every=3)


def test_full_when_metrics_are_written(make: Make, grammar: SequenceFormat) -> None:
    trainer = make("run", Filling(grammar), checkpoint_every=3)
    assert stopped(trainer).endswith("metrics.jsonl: not written (File too large); checkpoints are intact")
    goes_on(make, trainer, steps=8, checkpoint_every=3)


def test_full_when_a_bad_step_is_noted(make: Make, grammar: SequenceFormat) -> None:
    settings: dict[str, Any] = {"guard": GuardConfig("skip"), "checkpoint_every": 3, "log_every": 8}
    trainer = make("run", Filling(grammar, {5: float("nan")}), **settings)
    assert stopped(trainer).endswith("bad_steps.jsonl: not written (File too large); checkpoints are intact")
    goes_on(make, trainer, steps=8, **settings)


def test_full_when_samples_are_drawn(make: Make, grammar: SequenceFormat) -> None:
    settings = {"sample_every": 6, "log_every": 7, "checkpoint_every": 5}
    trainer = make("run", Filling(grammar, size=100), **settings)

    def draw(weights: Any, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))

    assert stopped(trainer, draw).endswith("step-00000006.png: not written (File too large); checkpoints are intact")
    goes_on(make, trainer, steps=8, **settings)


def test_a_full_disk_leaves_the_metrics_there_are(tmp_path: Path) -> None:
    """Opened again, the file is written again: aside."""
    path, log = tmp_path / "metrics.jsonl", MetricsLog(tmp_path)
    for step in range(20):
        log.write({"step": step})
    before = path.read_text()
    with full_disk(100), pytest.raises(UserError, match=r"metrics\.jsonl: not written"):
        log.open(10)
    assert path.read_text() == before
    log.open(10)
    assert len(read_metrics(path)) == 11


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path, log = tmp_path / "metrics.jsonl", MetricsLog(tmp_path)
    log.write({"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "te')
    log.write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "bad_steps.jsonl", "checkpoints", "samples"])
def test_a_name_that_is_taken(make: Make, grammar: SequenceFormat, name: str) -> None:
    """Like a folder that cannot be written to, which root would not notice."""
    trainer = make(
        "run", Numbered(grammar, {3: float("nan")}), 6, GuardConfig("skip"), checkpoint_every=2, sample_every=2
    )

    def draw(weights: Any, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")

    trainer.folder.mkdir()
    if name.endswith("jsonl"):
        (trainer.folder / name).mkdir()
    else:
        (trainer.folder / name).write_text("")
    with pytest.raises(UserError, match=rf"{name}.*: .*not written \(.*(File exists|Is a directory|Not a directory)"):
        trainer.run(draw)


def test_the_tokenizer_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "tiny", "--run", "run", "--loop.steps", "1"]
    with full_disk(6_000):
        assert run(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transfuse: ")]
    assert len(lines) == 1
    assert "tokenizer.json: not written" in lines[0]
    assert sorted(path.name for path in Path("run").iterdir()) == ["config.json"]
    assert run(command) == 0
