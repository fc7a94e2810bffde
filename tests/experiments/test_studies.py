"""Studies of many runs: each is done once, whatever is killed; what is said of them is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import common, evaluation
from experiments.statistics import paired, weighted_sums
from transfuse.cli import run
from transfuse.cli.tools import checkout
from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.training import DivergedError

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _few_surveyed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "SURVEYED", 2)


QUICK = ["--pictures", "2", "--definitions", "2", "--recogniser-steps", "2"]
SCALING = ["study", "scaling", "--variants", "transfusion", "llama", "--sizes", "xxs", "--budgets", "1e3", *QUICK]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}


def test_killed_between_training_and_measuring(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained is not trained again; what was measured is not measured again; the report comes from files."""
    command = [*SCALING, "--run", str(tmp_path)]
    trained: list[str] = []
    train, take = common.train, common.evaluate_run

    def counted(recipe: Any, folder: Path) -> Any:
        trained.append(folder.name)
        return train(recipe, folder)

    def killed(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "train", counted)
    monkeypatch.setattr(common, "evaluate_run", killed)
    assert run(command) == 130
    assert len(trained) == 1
    assert not results(tmp_path)
    monkeypatch.setattr(common, "evaluate_run", take)
    assert run(command) == 0
    assert sorted(trained) == sorted(results(tmp_path)) == ["llama-xxs-1k-seed0", "transfusion-xxs-1k-seed0"]
    assert not (tmp_path / "runs" / trained[0] / "checkpoints").exists(), "done: its checkpoints go"
    assert run(command) == 0
    assert len(trained) == 2
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.html").unlink()
    assert run([*command, "--report-only"]) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == report
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    capsys.readouterr()
    assert run([*command, "--list"]) == 0
    assert capsys.readouterr().out.count("  done  ") == 2
    assert run([*command, "--only", "llama-xs"]) == 2
    assert 'no run "llama-xs"' in capsys.readouterr().err
    assert run([*command, "--index", "2", "--of", "2"]) == 2
    assert "--index: expected 0 to 1 as --of is 2, without --only; found 2" in capsys.readouterr().err


def test_otherwise_measured_runs_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SCALING, "--run", str(tmp_path), "--only", "llama-*"]
    assert run(command) == 0
    assert run([*command, "--pictures", "3"]) == 2
    assert "study.json" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "glosses", lambda split: ["crab: a decapod"])  # as another version holds out
    assert run(command) == 2
    assert "study.json: expected --definitions 2, found 1" in capsys.readouterr().err


def test_a_folder_keeps_to_its_study_and_to_what_run_names_do_not_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another size, budget or study would stand in one table with what is there."""
    command = ["study", "ablations", "--rows", "llama", "--seeds", "0", "--run", str(tmp_path), *QUICK]
    asked = ["--size", "xxs", "--positions", "1e3"]
    assert run([*command, *asked]) == 0
    for other, told in (
        (["--size", "xs", "--positions", "1e3"], "expected --size xxs, found xs"),
        (["--size", "xxs", "--positions", "2e3"], "expected --positions 1000, found 2000"),
    ):
        assert run([*command, *other]) == 2
        assert told in capsys.readouterr().err
    assert run([*SCALING, "--run", str(tmp_path)]) == 2
    assert "expected --study ablations, found scaling" in capsys.readouterr().err
    assert run([*SCALING, "--run", str(tmp_path), "--report-only"]) == 2
    assert "study.json: expected the study scaling, found ablations" in capsys.readouterr().err
    assert list(results(tmp_path)) == ["llama-seed0"]


def test_a_run_of_another_plan_is_not_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even one that is trained: its folder came from elsewhere."""
    command = [*SCALING, "--run", str(tmp_path), "--only", "llama-*"]
    assert run(command) == 0
    (name,) = results(tmp_path)
    (tmp_path / "results" / f"{name}.json").unlink()
    (tmp_path / "runs" / name / "machines.jsonl").unlink()
    assert run(command) == 0
    assert results(tmp_path)[name]["machine"]["processor"] == "not known", "but measured"
    (tmp_path / "results" / f"{name}.json").unlink()
    config = tmp_path / "runs" / name / "config.json"
    facts = json.loads(config.read_text())
    config.write_text(json.dumps({**facts, "loop": {**facts["loop"], "steps": 99}}))
    assert run(command) == 2
    assert "loop.steps: this run has 99" in capsys.readouterr().err
    assert not results(tmp_path)


def test_machines_are_those_that_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained in two sittings on two processors, measured on a third: seconds are of the first two."""
    command = [*SCALING, "--run", str(tmp_path), "--only", "llama-*"]
    train, take = common.train, common.evaluate_run
    for name, at in (("one", "train"), ("two", "take"), ("three", "")):
        monkeypatch.setattr(common, "processor_name", lambda name=name: name)
        monkeypatch.setattr(common, "train", _interrupted if at == "train" else train)
        monkeypatch.setattr(common, "evaluate_run", _interrupted if at == "take" else take)
        assert run(command) == (130 if at else 0)
    (result,) = results(tmp_path).values()
    assert result["machine"]["processor"] == "one, then two"
    assert result["machine"]["device"] == "cpu"


def _interrupted(*arguments: Any) -> Any:
    raise KeyboardInterrupt


def test_drawings_of_a_study_have_one_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Results are taken elsewhere without the recogniser: the one trained anew is refused, and nothing is measured."""
    command = [*SCALING, "--run", str(tmp_path), "--only", "transfusion-*"]
    assert run(command) == 0
    (result,) = (tmp_path / "results").glob("*.json")
    facts = json.loads(result.read_text())
    result.with_stem("elsewhere").write_text(json.dumps({**facts, "judge": "01234567"}))
    result.unlink()
    assert run(command) == 2
    assert f"expected the judge of the results there, 01234567, found {facts['judge']}" in capsys.readouterr().err
    assert not result.exists()


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    code = "import sys; from transfuse.cli import run; sys.exit(run(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *SCALING, "--run", str(folder), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)


@pytest.mark.slow
def test_killed_while_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kill -9`: the system releases the lock, and the run resumes from its checkpoint."""
    long = ("--variants", "transfusion", "--budgets", "4e5")
    child = started(tmp_path, *long)
    checkpoints = tmp_path / "runs" / "transfusion-xxs-400k-seed0" / "checkpoints"
    until = time.monotonic() + 240
    while not list(checkpoints.glob("step-????????")) and time.monotonic() < until:
        assert child.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.05)
    child.kill()
    child.communicate()
    assert not results(tmp_path)
    assert run([*SCALING, *long, "--run", str(tmp_path)]) == 0
    said = capsys.readouterr().err
    assert "resumed from step" in said
    assert len(results(tmp_path)) == 1


def test_a_run_that_diverges_does_not_hold_the_others_up(tmp_path: Path, monkeypatch, capsys) -> None:
    command = [*SCALING, "--run", str(tmp_path)]
    train = common.train

    def diverging(recipe: Any, folder: Path) -> Any:
        if folder.name.startswith("llama"):
            raise DivergedError("step 2: a loss is nan")
        return train(recipe, folder)

    monkeypatch.setattr(common, "train", diverging)
    assert run(command) == 0
    assert list(results(tmp_path)) == ["transfusion-xxs-1k-seed0"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(one["run"], one["why"]) for one in report["failures"]] == [("llama-xxs-1k-seed0", "step 2: a loss is nan")]
    monkeypatch.setattr(common, "train", train)
    assert run(command) == 0
    assert len(results(tmp_path)) == 1, "not by itself"
    (tmp_path / "failures" / "llama-xxs-1k-seed0.json").rename(tmp_path / "aside")
    lock = common.try_lock

    def fails_meanwhile(folder: Path, name: str) -> Any:
        """Another process fails, between this one's plan and its turn."""
        if (tmp_path / "aside").exists():
            (tmp_path / "aside").rename(tmp_path / "failures" / "llama-xxs-1k-seed0.json")
        return lock(folder, name)

    monkeypatch.setattr(common, "try_lock", fails_meanwhile)
    assert run(command) == 0
    assert len(results(tmp_path)) == 1, "not again by each process"
    monkeypatch.setattr(common, "try_lock", lock)
    assert run([*command, "--only", "llama-*"]) == 0
    assert len(results(tmp_path)) == 2
    assert not json.loads((tmp_path / "report.json").read_text())["failures"]


def test_torchruns_processes_are_refused(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "positions.json").write_text("{}")
    monkeypatch.setattr(common, "surveyed", lambda folder, recipe: 900.0)
    assert run([*SCALING, "--run", str(tmp_path)]) == 2
    assert "start the command several times instead" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_do_each_run_once(tmp_path: Path) -> None:
    both = [started(tmp_path, "--budgets", "1e3", "2e3") for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert len(results(tmp_path)) == 4
    assert sum(text.count(": measuring") for text in said) == 4


@pytest.mark.slow
def test_the_smoke_script_runs_end_to_end(tmp_path: Path) -> None:
    """All arms, three budgets, as a user starts it; twice, and the second time nothing is left to do."""
    script = Path(__file__).parents[2] / "docs" / "launch" / "studies" / "smoke.sh"
    (tmp_path / "transfuse").write_text(f'#!/bin/bash\nexec {sys.executable} -m transfuse "$@"\n')
    (tmp_path / "transfuse").chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run([script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    first, folder = start(), tmp_path / "runs" / "smoke"
    assert first.returncode == 0, first.stderr
    assert len(results(folder)) == 4 * 3
    assert "| Perplexity of unseen definitions | transfusion |" in first.stdout
    assert len(list((folder / "figures").glob("*.svg"))) >= 3
    second = start()
    assert second.returncode == 0
    assert "measuring" not in second.stderr
    assert second.stdout == first.stdout


def test_the_papers_points(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["study", "scaling", "--paper"]) == 0
    assert "FID" in capsys.readouterr().out


def test_verdicts() -> None:
    same = paired([0.3, 0.3, 0.3])
    assert (same.mean, same.low, same.high) == pytest.approx((0.3, 0.3, 0.3))
    found = paired([1.0, 2.0, 3.0])
    margin = 4.302653 * 1.0 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2 - margin, 2 + margin))
    assert found.significance(1.0) == "undecided", "the interval holds 0"
    assert paired([1.0, 1.1, 0.9]).significance(0.4) == "reproduced"
    assert paired([1.0, 1.1, 0.9]).significance(-0.4) == "not reproduced"
    assert paired([1.0, 1.1, 0.9]).significance(0.1, rounding=0.1) == "no direction"
    assert paired([1.0]).significance(1.0) == "undecided", "one seed says nothing"
    values = {"a": {0: 1.0, 1: 2.0}, "b": {1: 5.0, 2: 7.0}}
    assert weighted_sums({"a": -1, "b": 1}, values) == [3.0], "of the seeds that both have"
    assert weighted_sums({"a": 1, "c": 1}, values) == []


def test_ablations_differ_by_what_they_are_named_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["study", "ablations", "--size", "xxs", "--positions", "1e3", "--seeds", "0", "--run", str(tmp_path)]
    assert run([*asked, *QUICK, "--rows", "transfusion", "causal"]) == 0
    plain, causal = (
        json.loads((tmp_path / "runs" / f"{name}-seed0" / "config.json").read_text())
        for name in ("transfusion", "causal")
    )
    assert plain["model"].pop("image_attention") == "bidirectional"
    assert causal["model"].pop("image_attention") == "causal"
    assert {**plain, "preset": ""} == {**causal, "preset": ""}, "in nothing else"
    report = json.loads((tmp_path / "report.json").read_text())
    assert {result["run"] for result in report["results"]} == {"transfusion-seed0", "causal-seed0"}
    verdicts = capsys.readouterr().out
    assert "undecided" in verdicts
    assert " reproduced" not in verdicts, "one seed decides nothing"


def test_image_editing_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["train", "tiny", "--run", str(tmp_path / "run"), "--loop.steps", "2", "--data.world.max-objects", "2"]
    assert run(tiny) == 0
    asked = ["study", "editing", "--start", str(tmp_path / "run" / "export"), "--run", str(tmp_path / "study")]
    asked += ["--triples", "8", "--epochs", "1", "--batch", "4", "--count", "6", "--judge-steps", "2"]
    assert run(asked) == 0
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert report["study"] == "image-editing"
    kept = (
        (tmp_path / "study" / "report.json").read_text(),
        (tmp_path / "study" / "tuning" / "metrics.jsonl").read_text(),
    )
    assert run(asked) == 0
    again = (
        (tmp_path / "study" / "report.json").read_text(),
        (tmp_path / "study" / "tuning" / "metrics.jsonl").read_text(),
    )
    assert again == kept, "what is done is not done again"
    capsys.readouterr()
    assert run([*asked, "--rate", "1e-3"]) == 2
    assert "study.json: expected --rate 0.0005, found 0.001" in capsys.readouterr().err
    (tmp_path / "run" / "export" / "transfuse_generation.json").write_text('{"guidance_scale": 2.0}')
    assert run(asked) == 2
    assert "study.json: expected --start " in capsys.readouterr().err


def test_a_lock_is_held_by_one_and_released(tmp_path: Path) -> None:
    with common.try_lock(tmp_path, "a") as first, common.try_lock(tmp_path, "a") as second:
        assert (first, second) == (True, False)
        with common.try_lock(tmp_path, "ab") as other:
            assert other, "names that begin alike are two"
    with common.try_lock(tmp_path, "a") as again:
        assert again
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder to write to"):
        common.lock(tmp_path / "file", "a")


def test_jobs_of_an_array_share_the_runs(tmp_path: Path) -> None:
    runs = [common.StudyRun(f"run-{n}", preset("tiny"), {}, 1.0) for n in range(5)]
    study = common.Study(tmp_path, runs, common.EvalSize(), {})
    jobs = [{run.name for run in study.chosen(index=index, of=2)} for index in range(2)]
    assert jobs[0] | jobs[1] == {run.name for run in runs}
    assert not jobs[0] & jobs[1]
    with pytest.raises(UserError, match="--index: expected 0 to 1"):
        study.chosen(only=("run-1",), index=0, of=2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rivals"], "rivals is now called baselines"),
        (["image-editing"], "image-editing is now called editing"),
        (["scaling", "--arms", "llama"], '"--arms" is now called "--variants"'),
    ],
)
def test_old_names_are_refused_with_the_new_ones(words: list[str], told: str, capsys) -> None:
    assert run(["study", *words]) == 2
    assert told in capsys.readouterr().err


def test_outside_a_checkout_the_command_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"study: .*clone the repository"):
        checkout(tmp_path / "a" / "b" / "c" / "tools.py")
