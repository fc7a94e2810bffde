"""Install the built wheel in an empty environment, without any extra, and run README's first lines there.

    python tools/try_install.py
    python tools/try_install.py --python python3.13 --torch 2.15.0 --keep build/try-3.13

The folder that the lines run in is empty, so that nothing of the repository can stand in for the wheel. The test
tools and their extras are not installed; `--keep` leaves the environment for running tests by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = "Scripts" if os.name == "nt" else "bin"


def first_lines(readme: str) -> tuple[list[list[str]], str]:
    """Return the words of each command in README's first sh block, without their program, and its first Python."""
    shell, python = (re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)[0] for language in ("sh", "python"))
    lines = re.findall(r"^\.venv/bin/transfuse (.*?)(?:  #.*)?$", shell, re.MULTILINE)
    return [re.findall(r'"[^"]*"|\S+', line) for line in lines], python


def try_install(python: str, torch: str | None, folder: Path) -> None:
    """Build, install and run. Raises CalledProcessError for what fails."""
    wheels, environment, empty = folder / "wheels", folder / "env", folder / "empty"
    empty.mkdir(parents=True)
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # of an earlier build: its files would be in the wheel

    def run(*words: object, cwd: Path = empty, **options: object) -> None:
        print("+", *words, flush=True)
        began = time.perf_counter()
        subprocess.run([str(word) for word in words], cwd=cwd, check=True, **options)  # type: ignore[call-overload]
        print(f"  {time.perf_counter() - began:.1f} s", flush=True)

    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT)
    run(python, "-m", "venv", environment)
    ours = environment / BIN
    (wheel,) = wheels.glob("transfuse-*.whl")
    run(ours / "python", "-m", "pip", "install", "-q", *([f"torch=={torch}"] if torch else []), wheel)
    run(
        ours / "python", "-c", "import sys, torch, transfuse; print(sys.version, torch.__version__, transfuse.__file__)"
    )
    commands, code = first_lines((ROOT / "README.md").read_text(encoding="utf-8"))
    for words in commands:
        run(ours / "transfuse", *(word.strip('"') for word in words), input="two crabs\n/quit\n", text=True)
    run(ours / "python", "-c", code)
    assert (empty / "green.png").is_file(), "README's Python ran, and wrote no green.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the new environment")
    parser.add_argument("--torch", help="a version of torch, such as 2.11.0; the newest that fits otherwise")
    parser.add_argument("--keep", type=Path, help="a new folder for the environment, which then stays")
    options = parser.parse_args()
    if options.keep is not None:
        try_install(options.python, options.torch, options.keep.resolve())
    else:
        with tempfile.TemporaryDirectory() as folder:
            try_install(options.python, options.torch, Path(folder).resolve())


if __name__ == "__main__":
    main()
