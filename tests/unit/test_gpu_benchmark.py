"""`benchmarks/gpu.py` without a GPU: every row runs in small, and a row that fails loses nothing of the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("name", gpu.ROWS)
def test_every_row_runs(name: str) -> None:
    lines = list(gpu.measure(name, gpu.Settings(dry=True)))
    assert [line for line in lines if "failed" in line] == []
    skipped = {line.get("kernel", line.get("float8")) for line in lines if "skipped" in line}
    assert skipped <= {"FlexAttention, BACKEND FLASH", True}  # what an extra package brings
    assert {line["row"] for line in lines} == {name}
    assert all(json.loads(json.dumps(line)) == line for line in lines)
    expected = {"decode": {1, 8, 32}, "denoise": {"plain", "recorded", "compiled", "compiled and recorded"}}
    for kind, key in (("decode", "rows"), ("denoise", "way")):
        if name.startswith(kind):
            assert {line[key] for line in lines} == expected[kind]


def test_an_unknown_size_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu.ROWS, "train-9b", gpu.Row(5, lambda settings: gpu.train(settings, "9b")))
    (line,) = gpu.measure("train-9b", gpu.Settings(dry=True))
    assert line["row"] == "train-9b"
    assert "failed" in line


SCRIPTS = {
    "good": 'print(\'{"row": "good", "ms": 1}\')',
    "talks": 'print(\'a library says hello\'); print(7); print(\'{"row": "talks", "ms": 2}\')',
    "dies": 'print(\'{"row": "dies", "ms": 3}\', flush=True); import os; os._exit(7)',
    "hangs": 'print(\'{"row": "hangs", "ms": 4}\', flush=True); import time; time.sleep(600)',
    "late": 'print(\'{"row": "late", "ms": 5}\')',
}


def lines_of(budgets: dict[str, float], seconds: float) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    gpu.run_rows(budgets, lambda name: [sys.executable, "-c", SCRIPTS[name]], seconds, lines.append)
    return lines


def test_rows_that_fail_lose_nothing() -> None:
    lines = lines_of({"dies": 60, "hangs": 4, "talks": 60, "good": 60}, 300)
    assert [line["ms"] for line in lines if "ms" in line] == [3, 4, 2, 1]
    failed = {line["row"]: line["failed"] for line in lines if "failed" in line}
    assert failed == {"dies": "exit code 7", "hangs": "ended after 4 seconds"}


def test_the_call_has_an_end() -> None:
    lines = lines_of({"hangs": 60, "late": 60}, 4)
    assert [line["row"] for line in lines if "failed" in line] == ["hangs"]
    assert lines[-1] == {"row": "late", "skipped": "the 4 seconds of the call were over"}


def test_ratios_between_rows() -> None:
    trained = {"train-text": (20.0, 1.0), "train-0.37b": (10.0, 4.0), "train-unet": (5.0, 3.0)}
    lines = [{"row": row, "positions/s": a, "executed flop/s": b} for row, (a, b) in trained.items()]
    assert gpu.summary([*lines, {"row": "train-float8", "failed": "no"}]) == {
        "row": "summary",
        "mixed : text, time a position": 2.0,
        "U-Net : linear, operations a second": 0.75,
    }


def test_results_are_written_as_they_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--dry-run", "--only", "machine", "--out", str(tmp_path / "gpu.json")])
    lines = json.loads((tmp_path / "gpu.json").read_text())
    assert [line["row"] for line in lines] == ["machine", "summary"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
