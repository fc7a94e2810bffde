"""The command line: `transfuse COMMAND`. Each command is a function whose signature declares its options."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from ..config import nearest
from ..devices import keep_freed_memory
from ..errors import UserError
from ..log import logger, set_level
from ..version import __version__

if os.environ.get("NO_COLOR"):
    os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")  # read when tyro is imported

COMMANDS: dict[str, tuple[str, str]] = {
    "generate": ("writing", "Continue a prompt in words and images, or draw an image again"),
    "caption": ("writing", "Describe an image"),
    "edit": ("writing", "Change an image by an instruction, or redraw part of it"),
    "chat": ("chat", "Talk with a model in words and images"),
    "serve": ("serving", "Serve a model over HTTP, with a page to try it"),
    "demo": ("training", "Train a small model on this machine and report (about 9 minutes)"),
    "train": ("training", "Train a preset, or resume a run"),
    "tune": ("training", "Teach a model your own images, with a page of before and after"),
    "distil": ("training", "Teach a model to draw in few steps without guidance"),
    "plan": ("training", "Show what a preset costs: parameters, operations, memory, time"),
    "evaluate": ("evaluation", "Measure a model and write a report"),
    "export": ("tools", "Write a run's newest checkpoint as a model folder"),
    "convert": ("tools", "Unpack a GGUF file into a folder that a run can start from"),
    "data build": ("data", "Make a data set of captioned images or text"),
    "data inspect": ("data", "Show what is in data sets and what a run would learn from them"),
    "data verify": ("data", "Compare every hash of a data set, decode every image"),
    "autoencoder train": ("autoencoder", "Train an image autoencoder"),
    "autoencoder inspect": ("autoencoder", "Reconstruct images and report how well"),
    "study": ("tools", "Run the paper's experiments, from a checkout of the repository"),
    "doctor": ("tools", "Check this machine for what Transfuse needs"),
    "completion": ("tools", "Print a script that completes commands and options in a shell"),
}
"""module and summary of each command; the module has a function of the command's last word"""

GLOBAL = """\
options of every command:
  --quiet              only results and errors
  --verbose            messages with times, and the traceback of an error
  --help               an example, and every option
environment: NO_COLOR=1 shows no colours"""
HELP = ("-h", "--help")
LEVELS = {"--quiet": logging.ERROR, "--verbose": logging.DEBUG}
SEE = "; transfuse --help lists them"


def main() -> None:
    """Run the command line: exit code 0 done, 2 the user's mistake, 75 stopped and saved, 130 interrupted."""
    keep_freed_memory()
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        code = 0
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    words = list(arguments)
    if words[:1] == ["--"]:  # torchrun passes it on; without it, torchrun would take --run as its option
        words = words[1:]
    end = words.index("--") if "--" in words else len(words)
    levels = [LEVELS[word] for word in words[:end] if word in LEVELS]
    words = [word for word in words[:end] if word not in LEVELS] + words[end:]
    set_level(levels[-1] if levels else logging.INFO)
    try:
        return find_command(words)()
    except UserError as error:
        if logger.isEnabledFor(logging.DEBUG):
            traceback.print_exc()
        print(f"transfuse: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = max(str(error.filename).split("/"), key=len)
        print(f"transfuse: {name:.60}...: expected names of at most 255 bytes, found {len(name)}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # of --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return 130


def find_command(words: Sequence[str]) -> Callable[[], int]:
    """Return the call that words ask for: of a command, of the version or of a list of commands."""
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in HELP:
        return partial(show, overview())
    if name == "--version":
        return partial(show, f"transfuse {__version__}")
    known = [command for command in COMMANDS if command.startswith(f"{name} ")]
    if known and (not rest or rest[0] in HELP):
        return partial(show, overview(f"{name} "))
    choices = [command.split()[-1] for command in known] or [*(command.split()[0] for command in COMMANDS), "--version"]
    if known:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        raise UserError(f'unknown command "{name}"{nearest(name.split()[-1], choices, SEE)}')
    from .options import parse

    module = importlib.import_module(f".{COMMANDS[name][0]}", __name__)
    return parse(getattr(module, name.split()[-1]), rest, name)


def show(text: str) -> int:
    """Print a text and return the exit code 0."""
    print(text)
    return 0


def overview(group: str = "") -> str:
    """Return the list of commands, or of those in a group such as "data "."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{about}" for name, (_, about) in COMMANDS.items() if name.startswith(group)]
    return "\n".join([f"transfuse {group}COMMAND [OPTIONS]", "", *lines, "", GLOBAL])
