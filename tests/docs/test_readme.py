"""What README promises: its commands exist, its links lead somewhere, its settings are real."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from transfuse.cli import COMMANDS, find_command
from transfuse.cli.options import read, run_folder
from transfuse.cli.tools import STUDIES
from transfuse.errors import UserError
from transfuse.recipes import PRESETS, Recipe
from transfuse.runs import resolve

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / f"{name}/README.md" for name in ("benchmarks", "experiments", "src/emoji_scenes")),
]
LAUNCH = ROOT / "docs" / "launch"
SCRIPTS = sorted(path for path in LAUNCH.rglob("*") if path.is_file())


def commands(page: Path) -> list[list[str]]:
    """The words of every line of a page's blocks, or of a script; what torchrun starts as if it were started alone."""
    text = page.read_text()
    if page.suffix == ".md":
        blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
        text = "\n".join(block for language, block in blocks if language in ("", "sh", "bash"))
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = re.sub(r"^\s*(\w+=\S+ +)+", "", line.split("#")[0]).split()  # without variables set for it
        if "torchrun" in words:
            words = shlex.split(re.split(r"#|\|\||&", line)[0])
            words = started(words[words.index("torchrun") + 1 :])
        found.append(words)
    return found


def started(words: list[str]) -> list[str]:
    """The command that torchrun starts, as it understands its options."""
    asked = get_args_parser().parse_args(words)
    assert asked.module, words
    assert asked.training_script == "transfuse", words
    return ["transfuse", *(word for word in asked.training_script_args if word != "--")]


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    runs: dict[Path, Recipe] = {}
    starts = 0
    for words in commands(page):
        line = " ".join(words)
        if words[:1] == ["make"]:
            for target in words[1:]:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        if "--config" in words and not (ROOT / words[words.index("--config") + 1]).is_file():
            continue  # a file of the reader
        if words and words[0].endswith("transfuse") and len(words) > 1:
            assert words[1] in COMMANDS or " ".join(words[1:3]) in COMMANDS, line
            if words[1] in ("train", "plan"):
                assert words[2] in PRESETS, line
            starts += words[1] in ("train", "study")
            if words[1] == "train":  # every switch is one, and its value is allowed
                options = find_command(words[1:]).keywords
                recipe, run = options["recipe"], run_folder(options["run"], words[2], None)
                if "path/to" not in line and "--data.sources" not in line:  # data sets are not there
                    resolved = resolve(recipe, here=False).recipe
                    assert runs.setdefault(run, resolved) == resolved, f"{line}: {run} is another run"
            if words[1] == "study":
                given = ["0" if word.startswith('"$') else word for word in words[3:] if word != '"$@"']
                assert words[2] in STUDIES, line
                options = getattr(importlib.import_module(f"experiments.{words[2]}"), words[2].capitalize())
                read(options, given, f"study {words[2]}")
    assert starts or page in PAGES, "a script that starts something"


def test_scripts_of_studies_can_be_started() -> None:
    """They are one-liners, each of another claim, and need nothing but the command."""
    scripts = [path for path in SCRIPTS if path.parent.name == "studies"]
    assert scripts
    for path in scripts:
        assert os.access(path, os.X_OK), path.name
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        assert len([words for words in commands(path) if words[:2] == ["transfuse", "study"]]) == 1


PROGRAM = re.compile(r"(?:^|[|&;])\s*(?:\w+=\S+ +)*(?:\S*/)?(?:transfuse|python)\s")


def programs(line: str) -> list[list[str]]:
    """The words of each of our programs in a line of a shell, pipes included, without variables set for it."""
    if not PROGRAM.search(line):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[list[str]] = [[]]
    for word in lexer:
        if {*word} <= {*"|&;"}:
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words for words in found if words and Path(words[0]).name in ("transfuse", "python")]


def mistake(words: list[str]) -> str:
    """What is wrong with a command, by the parser that would read it; of a script by the options in its text."""
    try:
        if Path(words[0]).name == "transfuse" or words[1:3] == ["-m", "transfuse"]:
            words = words[3:] if words[1] == "-m" else words[1:]
            if words[:1] != ["study"] and not {"--config", "--help"} & {*words}:
                find_command(words)
        elif words[1] == "-m" and words[2].startswith("experiments."):
            name = words[2].removeprefix("experiments.")
            options = getattr(importlib.import_module(words[2]), name.capitalize())
            read(options, words[3:], f"study {name}")
        elif words[1].split("/")[0] in ("tools", "benchmarks", "integrations"):
            script = (ROOT / words[1]).read_text()
            unknown = [word for word in words if word.startswith("--") and f'"{word.partition("=")[0]}"' not in script]
            return f"unknown option {unknown[0]}" if unknown else ""
    except (UserError, OSError, ImportError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=lambda page: page.name)
def test_every_option_in_a_page_is_known(page: Path) -> None:
    """Each line of a block is parsed as a shell would give it; of one in a sentence only its options are."""
    text = page.read_text()
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    shell = "\n".join(block for kind, block in blocks if kind in ("", "sh"))
    lines = shell.replace("\\\n", " ").splitlines()
    sentences = re.findall(
        r"`((?:transfuse|python) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL).replace("\n", " ")
    )
    for line in [*lines, *sentences]:
        for words in programs(line):
            wrong = mistake(words) if len(words) > 1 else ""
            if line in sentences and not re.search("unknown (option|command)|No such file", wrong):
                continue  # it may leave out what it does not speak of
            if re.match(r"runs/\S+: expected .* found none$", wrong):
                continue  # a run of the reader
            assert not wrong, f"{page.name}: {line}: {wrong}"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('echo "a | b" | transfuse chat --modle x', "--modle"),
        ("python tools/results.py --chek  # all cards", "--chek"),
        ("A=1 .venv/bin/python tools/nowhere.py", "nowhere.py"),
        ("make setup && python -m experiments.scaling --sizes s --budget 3", "--budget"),
        ("python -m transfuse plan tiny --loop.stepz 3", "loop.stepz"),
    ],
)
def test_a_wrong_option_is_found_wherever_the_command_stands(line: str, wrong: str) -> None:
    (words,) = programs(line)
    assert wrong in mistake(words)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", page.read_text()):
        path, _, anchor = (target[0] or target[1]).partition("#")
        if path.startswith("http"):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {path}"
        assert not anchor or file.suffix != ".md" or anchor in anchors(file), f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_pages_compiles(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")


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


def test_torchrun_needs_the_dashes() -> None:
    words = ["--nproc-per-node", "8", "-m", "transfuse", "--", "train", "demo", "--run", "runs/a"]
    assert started(words) == ["transfuse", "train", "demo", "--run", "runs/a"]
    words.remove("--")
    with pytest.raises(SystemExit):
        started(words)


SLURM = {
    "scontrol": '[ "$1" = show ] && echo "a b" || echo "$*" >> called',
    "srun": "mkdir -p runs/mine/checkpoints; $DOES; exit 1",
}


@pytest.mark.parametrize(
    ("does", "code", "queued"),
    [
        ("cp step runs/mine/checkpoints/latest", 0, True),
        ("mkdir -p runs/mine/export", 0, False),
        ("true", 1, False),
    ],
    ids=["stopped", "finished", "broken"],
)
def test_slurm_queues_again_what_is_not_done(tmp_path: Path, does: str, code: int, queued: bool) -> None:
    """With stand-ins for srun, whose code tells nothing, and scontrol."""
    (tmp_path / "step").write_text("step-00000010")
    for name, script in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "2", "DOES": does, "PATH": path}
    found = subprocess.run(["bash", str(LAUNCH / "slurm.sh")], cwd=tmp_path, env=job, capture_output=True, text=True)
    assert found.returncode == code, found.stderr
    assert (tmp_path / "called").exists() is queued
    if queued:
        assert (tmp_path / "called").read_text() == "requeue 7\n"


def test_kubernetes_gives_the_processes_time_to_save() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    (container,) = pod["containers"]
    script = container["args"][0]
    assert subprocess.run(["bash", "-n", "-c", script], check=False).returncode == 0
    words = shlex.split(script.split("&")[0].replace("\\\n", " "))
    given = dict(pairwise(words))
    assert int(given["--nnodes"]) == spec["completions"] == spec["parallelism"]
    assert int(given["--nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert given["--rdzv-endpoint"].startswith(f"{job['metadata']['name']}-0.{pod['subdomain']}:")
    assert int(given["--shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
