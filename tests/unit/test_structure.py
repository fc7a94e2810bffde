"""The house: imports point one way, files fit in a sitting, the core needs none of the extras."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "transfuse"
EVERYWHERE = {
    "errors",
    "io",
    "config",
    "devices",
    "log",
    "folders",
    "images",
    "rng",
    "version",
    "report",
    "charts",
    "vocabulary",
}
MAY_IMPORT: dict[str, set[str]] = {
    "sequence": set(),
    "diffusion": set(),
    "autoencoders": set(),
    "model": {"sequence"},
    "data": {"sequence", "autoencoders"},
    "model_card": set(),
    "hub_files": {"sequence", "model", "diffusion"},
    "remote_code": {"sequence", "model", "autoencoders", "export", "inference"},
    "export": {"sequence", "model", "diffusion", "autoencoders", "hub_files"},
    "convert": {"sequence", "model"},
    "training": {"sequence", "model", "diffusion", "autoencoders", "data"},
    "inference": {"sequence", "model", "diffusion", "autoencoders", "export"},
    "serving": {"inference", "model", "sequence"},
    "evaluation": {"sequence", "model", "diffusion", "autoencoders", "data", "export", "inference"},
    "recipes": {"sequence", "model", "diffusion", "autoencoders", "data", "export", "training"},
}
MAY_IMPORT["runs"] = {*MAY_IMPORT} - {"serving"}
MAY_IMPORT["plan"] = {*MAY_IMPORT} - {"serving"}
MAY_IMPORT["train"] = {*MAY_IMPORT} - {"serving", "plan"}
MAY_IMPORT["train_autoencoder"] = {*MAY_IMPORT} - {"serving", "plan"}
for entry in ("evaluate", "tune", "demo", "inspect_data", "inspect_autoencoder"):
    MAY_IMPORT[entry] = {*MAY_IMPORT}
MAY_IMPORT["cli"] = {*MAY_IMPORT, ""}


def imported_rooms(path: Path) -> set[str]:
    package = path.relative_to(SOURCE.parent).with_suffix("").parts
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = list(package[: -node.level]) if node.level else []
            module = [*base, *(node.module or "").split(".")]
            names = [".".join([*filter(None, module), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "transfuse" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms


def test_imports_point_one_way() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room in EVERYWHERE or room in ("__init__", "__main__"):
            continue
        assert room in MAY_IMPORT, f"a new room, {room}: say in this table what it may import"
        allowed = MAY_IMPORT[room] | EVERYWHERE | {room, "load"}
        wrong += [f"{path.relative_to(SOURCE)} imports {other}" for other in imported_rooms(path) - allowed]
    assert not wrong


def test_the_rule_can_fail(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path / "transfuse")
    (tmp_path / "transfuse" / "sequence").mkdir(parents=True)
    (tmp_path / "transfuse" / "sequence" / "bad.py").write_text("from ..model.layers import Linear\n")
    with pytest.raises(AssertionError, match="imports model"):
        test_imports_point_one_way()


def test_sequence_holds_no_network() -> None:
    for path in (SOURCE / "sequence").glob("*.py"):
        assert "nn" not in {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }, path


def test_one_module_alone_imports_emoji_scenes() -> None:
    """Everything else reaches the bundled data set by its name in `data.bundled`."""
    importers = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.split(".")[0] == "emoji_scenes" for name in names):
                importers.add(path.relative_to(SOURCE).as_posix())
    assert importers == {"data/bundled.py"}


def test_evaluation_works_without_emoji_scenes() -> None:
    """Metrics for any data set remain; those of the bundled data set are not offered."""
    code = """
import sys
sys.modules["emoji_scenes"] = None
from transfuse.evaluation import EvalConfig, all_metrics, named
assert "composition" not in all_metrics() and "clip" in all_metrics()
assert [metric.name for metric in named(["captioning", "drawing"])] == ["captioning", "drawing"]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_files_and_functions_fit_in_a_sitting() -> None:
    long = []
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if text.count("\n") > 500:
            long.append(f"{path.name}: more than 500 lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno > 70:
                long.append(f"{path.name}: {node.name} has more than 70 lines")
    assert not long
    assert not list(SOURCE.rglob("utils.py"))


def test_the_core_imports_no_extra() -> None:
    """Nothing on the default path may need an optional package."""
    extras = "transfusion_pytorch torchvision triton transformers diffusers tensorboard wandb trackio"
    extras += " torchao open_clip lm_eval matplotlib"
    code = f"""
import sys
for name in {extras.split()!r}: sys.modules[name] = None
import transfuse.cli, transfuse.train, transfuse.inference, transfuse.runs.monitor, transfuse.evaluation
import transfuse.evaluate
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_imports_without_what_only_unix_has() -> None:
    """All commands start on Windows, too. SIGKILL stays: torch asks the platform before it uses it."""
    code = """
import importlib, pkgutil, signal, sys
for name in ("fcntl", "resource", "termios", "pwd", "grp"): sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM"): delattr(signal, name)
import transfuse
for module in pkgutil.walk_packages(transfuse.__path__, "transfuse."):
    if module.name != "transfuse.__main__": importlib.import_module(module.name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_fast_and_needs_no_torch() -> None:
    code = "import sys, transfuse.cli as c; c.run(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
