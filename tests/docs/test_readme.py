"""What README promises: its commands exist, its links lead somewhere, its settings are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from transfuse.cli import COMMANDS
from transfuse.cli.parsing import parse, parse_run
from transfuse.cli.study import Rivals
from transfuse.presets import PRESETS, Recipe, preset

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)?\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    runs: dict[Path, Recipe] = {}
    for line in commands(page.read_text()):
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            for target in words[1:]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if words and words[0].endswith("transfuse") and len(words) > 1:
            assert words[1] in COMMANDS, line
            if words[1] in ("train", "plan"):
                assert words[2] in PRESETS, line
            if words[1] == "train":  # every switch is one, and its value is allowed
                recipe, run, _ = parse_run("train", preset(words[2]), words[2], words[3:], None)
                if "path/to" not in line and "--data.sources" not in line:  # data sets are not there
                    assert runs.setdefault(run, recipe.settled()) == recipe.settled(), f"{line}: {run} is another run"
            if words[1:3] == ["study", "rivals"]:
                parse(Rivals, words[3:], "study rivals")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", page.read_text()):
        path = target[0] or target[1]
        if not path.startswith("http"):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_readme_python_runs_as_written() -> None:
    """The Python of the README compiles, and names only what is there."""
    import transfuse
    from transfuse.inference import TransfusionPipeline

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        for name in re.findall(r"pipe\.(\w+)\(", block):
            assert hasattr(TransfusionPipeline, name), name
        for name in re.findall(r"transfuse\.(\w+)\(", block):
            assert hasattr(transfuse, name), name
