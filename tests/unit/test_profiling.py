"""Traces of a few steps."""

from __future__ import annotations

import json

import pytest
from conftest import Make, Numbered

from transfuse.sequence import SequenceFormat


@pytest.mark.parametrize(("steps", "traced"), [(12, 2), (8, 1)])
def test_a_trace_of_steps(make: Make, capsys, steps: int, traced: int) -> None:
    """A run that ends within has what there was."""
    trainer = make("run", steps=steps, profile=2)
    trainer.run()
    path = trainer.folder / "profile" / "rank-0.json"
    assert f"rank-0.json: {traced} steps, open it" in capsys.readouterr().err
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= traced
    assert any("addmm" in name or "mm" in name for name in names)
    assert any("AdamW" in name for name in names)


@pytest.mark.parametrize("steps", [3, 7])
def test_a_run_too_short_for_a_trace_says_so(make: Make, grammar: SequenceFormat, capsys, steps: int) -> None:
    trainer = make("run", Numbered(grammar), steps, profile=2)
    trainer.run()
    messages = [line for line in capsys.readouterr().err.splitlines() if "trace" in line]
    (line,) = messages
    assert line.endswith(f"rank-0.json: no trace: it begins after 7 steps, and the run had only {steps}")
    assert not (trainer.folder / "profile").exists()
