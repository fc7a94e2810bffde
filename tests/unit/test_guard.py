"""Bad steps: which steps the guard finds bad, and what the training loop does about them."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Make, Numbered, assert_equal, tensors
from hypothesis import given
from hypothesis import strategies as st

from transfuse.cli import run
from transfuse.data import StepLoader
from transfuse.sequence import Batch, SequenceFormat
from transfuse.training import DivergedError, Trainer, learning_rate, read_metrics
from transfuse.training.metrics import Average
from transfuse.training.optimizer import Guard, GuardConfig

NAN = float("nan")


def bad_steps(trainer: Trainer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.folder / "bad_steps.jsonl").read_text().splitlines()]


def strict_metrics(trainer: Trainer) -> list[dict[str, Any]]:
    """The lines as a strict reader takes them, to whom NaN is no number."""

    def refuse(name: str) -> None:
        raise AssertionError(f"metrics.jsonl holds {name}")

    text = (trainer.folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_skipped_step_is_as_if_it_had_never_updated(make: Make, grammar: SequenceFormat, log_every: int) -> None:
    trainer = make("skips", Numbered(grammar, {3: NAN}), guard=GuardConfig("skip"), log_every=log_every)
    assert trainer.run() == "finished"
    other = make("never")
    average, lines = Average(), {}
    while other.step < 8:
        if other.step == 3:
            other.step += 1
        else:
            other.train_step(average)
        if other.step % log_every == 0:
            lines[other.step], average = average.means(), Average()
    other.save()
    assert_equal(tensors(trainer), tensors(other))
    (line,) = bad_steps(trainer)
    assert {name: line[name] for name in ("step", "data_step", "kind", "action", "samples")} == {
        "step": 3, "data_step": 3, "kind": "nonfinite", "action": "skip", "samples": [7]}  # fmt: skip
    assert "text nan" not in line["reason"]
    assert "image nan" in line["reason"]
    lines_written = strict_metrics(trainer)
    assert [line["step"] for line in lines_written] == list(lines)
    for line in lines_written:
        assert {name: line[name] for name in lines[line["step"]]} == pytest.approx(lines[line["step"]])
        assert ("text" in line) == (log_every > 1 or line["step"] != 4), "no mean holds the step that was left out"
    assert lines_written[-1]["left_out"] == 1
    if log_every == 1:
        rates = [line["learning_rate"] for line in lines_written if "learning_rate" in line]
        assert rates == pytest.approx(
            [learning_rate(trainer.optimizer_config, step, 8) for step in (0, 1, 2, 4, 5, 6, 7)]
        )


def test_rollback_goes_on_behind_the_bad_data(make: Make, grammar: SequenceFormat) -> None:
    """Two bad steps: the second before the next checkpoint, so from the same one again."""
    load = Numbered(grammar, {5: NAN, 7: NAN})
    trainer = make("rolls", load, guard=GuardConfig("rollback"), checkpoint_every=2, keep=1)
    assert trainer.run() == "finished"
    assert load.asked == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert (trainer.step, trainer.data_offset) == (8, 4)
    assert [line["step"] for line in strict_metrics(trainer)] == list(range(1, 9))
    assert [(line["step"], line["data_step"], line["samples"]) for line in bad_steps(trainer)] == [
        (5, 5, [11]),
        (5, 7, [15]),
    ]
    other = make("straight", Numbered(grammar, order=[0, 1, 2, 3, 8, 9, 10, 11]))
    other.run()
    assert_equal(tensors(trainer), tensors(other))
    for name in ("positions", "images", "text_targets", "flops"):
        assert trainer.totals[name] == other.totals[name], "of what led to these weights"
    assert trainer.totals["left_out"] == 2


def test_a_run_that_was_rolled_back_goes_on_after_a_stop(make: Make, grammar: SequenceFormat) -> None:
    def load() -> Numbered:
        return Numbered(grammar, {3: NAN})

    settings: dict[str, Any] = {"guard": GuardConfig("rollback"), "checkpoint_every": 2}
    straight = make("straight", load(), **settings)
    straight.run()
    cut = make("cut", load(), **settings)
    while cut.step < 2:
        cut.train_step(Average())
    cut.save()
    while cut.step < 5:  # killed one step after the checkpoint that it rolled back from
        cut.train_step(Average())
    resumed_load = load()
    resumed = make("cut", resumed_load, **settings)
    assert resumed.run() == "finished"
    assert resumed_load.asked == [2, 3, *range(4, 10)]
    assert_equal(tensors(straight), tensors(resumed))
    assert straight.totals["positions"] == resumed.totals["positions"]
    again_load = load()
    again = make("cut", again_load, steps=10, **settings)
    again.run()
    assert again_load.asked == [10, 11], "the stretch that was left out stays left out"


def test_time_that_was_rolled_back_was_spent(make: Make, grammar: SequenceFormat) -> None:
    trainer = make("rolls", Numbered(grammar, {3: NAN}), 4, guard=GuardConfig("rollback"), checkpoint_every=2)

    class Slow(Numbered):
        def __call__(self, step: int) -> list[Batch]:
            trainer.totals["seconds"] += 100
            return super().__call__(step)

    trainer.load = Slow(grammar, {3: NAN})
    trainer.run()
    assert trainer.load.asked == [0, 1, 2, 3, 4, 5]
    assert trainer.totals["seconds"] > 600


def test_rollback_needs_a_checkpoint(make: Make, grammar: SequenceFormat) -> None:
    trainer = make("none", Numbered(grammar, {1: NAN}), guard=GuardConfig("rollback"))
    with pytest.raises(DivergedError, match="step 1: expected a checkpoint to go back to, found none"):
        trainer.run()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_bad_steps_end_a_run(make: Make, grammar: SequenceFormat, policy: Any) -> None:
    bad = {1: NAN, 2: NAN, 5: NAN}
    guard = GuardConfig(policy, most=2, window=4)
    few = make("few", Numbered(grammar, bad), 7, guard=replace(guard, window=4), checkpoint_every=1)
    assert few.run() == "finished"
    many = make("many", Numbered(grammar, bad), 7, guard=replace(guard, window=5), checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"step number 3 to be left out, more than loop\.guard\.most"):
        many.run()
    with pytest.raises(DivergedError, match=r"step number 3 to be left out"):
        make("many", Numbered(grammar, bad), 7, guard=replace(guard, window=5), checkpoint_every=1).run()


def test_raise_by_the_command_and_then_skip(tmp_path: Path, monkeypatch, capsys) -> None:
    """Code 2 and one line that names the sample, no weight changed; the guard may change when the run resumes."""
    plain = StepLoader.__call__

    def call(self: StepLoader, step: int) -> list[Batch]:
        batches = plain(self, step)
        for batch in batches if step == 6 else []:
            batch.latents[2].fill_(NAN)
        return batches

    monkeypatch.setattr(StepLoader, "__call__", call)
    monkeypatch.chdir(tmp_path)
    command = ["train", "tiny", "--run", "run", "--loop.steps", "8", "--loop.checkpoint-every", "6"]
    assert run(command) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("transfuse: ")]
    (bad,) = [json.loads(line) for line in Path("run/bad_steps.jsonl").read_text().splitlines()]
    (sample,) = bad["samples"]
    assert 48 <= sample < 56
    assert len(errors) == 1
    assert errors[0].startswith("transfuse: step 6: expected finite numbers, found ")
    assert errors[0].endswith(f"samples [{sample}]; no weight was changed")
    saved = sorted(path.name for path in Path("run/checkpoints").glob("step-*"))
    assert saved == ["step-00000006"], "what was begun is written to the end, nothing after it"
    config = Path("run/config.json").read_text()
    assert run([*command, "--loop.guard.nonfinite", "skip"]) == 0
    assert "loop.guard.nonfinite 'skip' (was 'raise')" in capsys.readouterr().err
    assert Path("run/config.json").read_text() == config
    assert read_metrics(Path("run/metrics.jsonl"))[-1]["left_out"] == 1


def test_an_error_waits_for_the_checkpoint_that_is_being_written(
    make: Make, grammar: SequenceFormat, monkeypatch
) -> None:
    plain = Path.write_text

    def slow(path: Path, text: str, **options: str) -> int:
        time.sleep(0.5 if path.name == "progress.json" else 0)
        return plain(path, text, **options)

    monkeypatch.setattr(Path, "write_text", slow)
    trainer = make("run", Numbered(grammar, {2: NAN}), checkpoint_every=2)
    with pytest.raises(DivergedError, match=r"step 2: .*samples \[5\]; no weight was changed"):
        trainer.run()
    assert [path.name for path in trainer.checkpoints.complete()] == ["step-00000002"]
    saved = tensors(trainer)["model"]
    assert all(torch.equal(weight, saved[name]) for name, weight in trainer.model.state_dict().items())


def spiking(make: Make, grammar: SequenceFormat, name: str, policy: Any, stop: int | None = None) -> Trainer:
    guard = GuardConfig(spike=policy, window=4, sigmas=8.0)
    load = Numbered(grammar, {6: 40.0})
    trainer = make(name, load, steps=9, guard=guard, checkpoint_every=3)
    if stop is not None:
        while trainer.step < stop:
            trainer.train_step(Average())
        trainer.save()
        return trainer
    trainer.run()
    return trainer


@pytest.mark.parametrize("policy", ["log", "skip", "rollback"])
@pytest.mark.parametrize("stop", [5, 6])
def test_resumed_right_before_a_spike(make: Make, grammar: SequenceFormat, policy: Any, stop: int) -> None:
    straight = spiking(make, grammar, "straight", policy)
    spiking(make, grammar, "cut", policy, stop)
    resumed = spiking(make, grammar, "cut", policy)
    assert_equal(tensors(straight), tensors(resumed))
    assert bad_steps(straight) == bad_steps(resumed)
    assert [(line["kind"], line["data_step"], line["action"]) for line in bad_steps(straight)][:1] == [
        ("spike", 6, policy)
    ]
    assert straight.guard.state() == resumed.guard.state()
    count = "spikes" if policy == "log" else "left_out"
    assert straight.totals[count] == resumed.totals[count] == len(bad_steps(straight))


def test_a_spike_is_of_one_loss_and_of_a_full_window() -> None:
    guard = Guard(GuardConfig(window=4, sigmas=6.0))
    for step, text in enumerate([1.0, 1.1, 0.9]):
        assert guard.judge(step, {"text": text, "image": 5.0 + text}, 1.0) is None
    assert guard.judge(3, {"text": 100.0}, 1.0) is None, "three steps are no window"
    guard.restore({"losses": {"text": [1.0, 1.1, 0.9, 1.0], "image": [5.0, 5.1, 4.9, 5.0]}, "left_out": []})
    deviation = math.sqrt(0.005)
    assert guard.judge(4, {"text": 1 + 5.9 * deviation, "image": 5.0}, 1.0) is None
    guard.restore({"losses": {"text": [1.0, 1.1, 0.9, 1.0], "image": [5.0, 5.1, 4.9, 5.0]}, "left_out": []})
    verdict = guard.judge(4, {"text": 1.0, "image": 5 + 6.1 * deviation}, 1.0)
    assert verdict is not None
    assert (verdict.kind, verdict.action) == ("spike", "log")
    assert verdict.reason == "image 5.431 is more than 6 deviations above 5"


@pytest.mark.parametrize(("policy", "enters"), [("log", True), ("skip", False), ("rollback", False)])
def test_what_was_left_out_is_no_measure(policy: Any, enters: bool) -> None:
    guard = Guard(GuardConfig(spike=policy, window=4))
    guard.restore({"losses": {"text": [1.0, 1.1, 0.9, 1.0]}, "left_out": []})
    assert guard.judge(4, {"text": 9.0}, 1.0) is not None
    assert list(guard.losses["text"]) == ([1.1, 0.9, 1.0, 9.0] if enters else [1.0, 1.1, 0.9, 1.0])
    assert guard.judge(5, {"text": NAN}, 1.0) is not None
    assert NAN not in guard.losses["text"]


def test_a_slow_rise_is_no_spike() -> None:
    guard = Guard(GuardConfig(window=16, sigmas=6.0))
    draw = torch.Generator().manual_seed(0)
    for step in range(400):
        noise = float(torch.randn((), generator=draw))
        assert guard.judge(step, {"text": 2 + 0.01 * step + 0.1 * noise}, 1.0) is None
    assert guard.judge(400, {"text": 12.0}, 1.0) is not None


@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=2, max_size=9),
    st.floats(0, 8),
    st.floats(0, 1),
)
def test_nothing_at_or_below_the_mean_is_a_spike(last: list[float], sigmas: float, share: float) -> None:
    guard = Guard(GuardConfig(window=len(last), sigmas=sigmas))
    guard.restore({"losses": {"text": last}, "left_out": []})
    mean = math.fsum(last) / len(last)
    value = mean - share * (mean - min(last))
    assert guard.judge(9, {"text": min(value, mean)}, 1.0) is None


def test_losses_that_never_differ_make_no_spike_of_rounding() -> None:
    guard = Guard(GuardConfig(window=10, sigmas=6.0))
    guard.restore({"losses": {"text": [0.1] * 10}, "left_out": []})
    assert guard.judge(10, {"text": 0.1 + 1e-16}, 1.0) is None
