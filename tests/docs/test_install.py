"""What is packaged: metadata, absolute links of the package page, the source distribution, and no unregistered name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from transfuse.errors import install_command
from transfuse.version import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMAND = r"(?:pip|pipx|uv|uvx)\b[^\n`&|;]*\b(?:install|add|run)\b[^\n`&|;]*?"
BY_NAME = re.compile(COMMAND + r"[ \t'\"]transfuse(?:\[|==|>|['\"\s.,`)]|$)")
"""a command that asks an index for the name"""


def script(path: str) -> ModuleType:
    """A file of the repository that no package holds."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_script", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "line",
    ["pip install transfuse", "pip install -U 'transfuse[serve]'", "uv tool install transfuse.", 'uv add "transfuse"'],
)
def test_asking_by_name_is_seen(line: str) -> None:
    assert BY_NAME.search(line)
    assert not BY_NAME.search("pip install . && transfuse doctor")


def test_nobody_is_told_to_install_an_unregistered_name() -> None:
    files = [path for kind in ("md", "py", "jinja", "yml", "html") for path in ROOT.glob(f"*.{kind}")]
    for folder in ("docs", "src", "experiments", "benchmarks", "tools", "integrations", "examples", ".github"):
        files += [path for kind in ("md", "py", "jinja", "yml", "ipynb") for path in (ROOT / folder).rglob(f"*.{kind}")]
    assert len(files) > 100
    wrong = [f"{path}: {found[0]}" for path in files if (found := BY_NAME.search(path.read_text(encoding="utf-8")))]
    assert not wrong


def test_a_missing_extra_names_its_packages() -> None:
    assert install_command("gguf") == 'pip install "gguf<1,>=0.17"'
    assert install_command("no-such-extra") == 'pip install ".[no-such-extra]"'
    for extra in PROJECT["optional-dependencies"]:
        assert not BY_NAME.search(install_command(extra))


@pytest.mark.parametrize("repository", [None, "https://example.org/me/transfuse", "https://example.org/me/transfuse/"])
def test_links_of_a_package_page_are_absolute(repository: str | None) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = script("setup.py").package_page(readme, repository, "1.2")
    targets = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)\"", page)
    assert targets
    assert all("".join(target).startswith("https://") for target in targets)
    assert ("https://example.org/me/transfuse/blob/v1.2/docs/data.md" in page) is (repository is not None)
    assert ("https://example.org/me/transfuse/raw/v1.2/docs/images/demo.png" in page) is (repository is not None)
    if repository is None:
        assert "<img" not in page
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|<[^>]*>", r"\1", readme).split()
        assert re.sub(r"!?\[([^\]]*)\]\([^)]*\)|<[^>]*>", r"\1", page).split() == words


def test_a_link_whose_text_is_its_target() -> None:
    absolute = script("setup.py").package_page
    line = "[docs/a.md](docs/a.md) ![x](b.png) [here](#here) [out](https://o.org)"
    assert absolute(line, None, "1") == "docs/a.md  here [out](https://o.org)"
    linked = absolute(line, "https://h/o", "1")
    assert linked.startswith("[docs/a.md](https://h/o/blob/v1/docs/a.md) ![x](https://h/o/raw/v1/b.png)")
    assert "[here](https://h/o#here) [out](https://o.org)" in linked


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == PROJECT["license"]
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


def test_the_workflow_tries_both_ends_of_torch() -> None:
    (torch,) = (line for line in PROJECT["dependencies"] if line.startswith("torch>"))
    oldest, above = re.findall(r"\d+\.\d+", torch)
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["wheel"]["strategy"]["matrix"]
    tried = {
        str(version).rpartition(".")[0] for version in [*matrix["torch"], *(row["torch"] for row in matrix["include"])]
    }
    assert oldest in tried
    newest = max(tried, key=lambda version: tuple(map(int, version.split("."))))
    assert above == f"2.{int(newest.split('.')[1]) + 1}"
    table = (ROOT / "docs/releasing.md").read_text()
    for line in PROJECT["classifiers"]:  # none that was not tried
        if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", line):
            version = line.rpartition(" ")[2]
            assert version in matrix["python"]
            assert f"| {version}." in table
    assert f"| {oldest}." in table
    assert f"| {newest}." in table


def test_the_oldest_torch_is_tried_with_each_python_that_it_has() -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["wheel"]["strategy"]["matrix"]
    assert {(row["python"], row["torch"]) for row in matrix["include"]} >= {
        (version, "2.11.0") for version in ("3.11", "3.12", "3.13")
    }


def test_hooks_of_commits_use_the_environment_that_is_active() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in local["hooks"]:
        assert "/" not in hook["entry"].split()[0], hook["id"]


def test_readmes_first_lines_are_found() -> None:
    commands, code = script("tools/try_install.py").first_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [words[0] for words in commands] == ["generate", "caption", "edit", "chat"]
    assert commands[0][1] == '"a strawberry on a blue background"'
    assert "green.png" in code


@pytest.mark.long
def test_the_source_distribution_holds_its_tests(tmp_path: Path) -> None:
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("transfuse-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split(
        "\n"
    )
    assert not {name for name in tracked if name} - names
