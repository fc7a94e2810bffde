"""The command line: parses, calls, prints. `transfuse COMMAND --help` shows a working example of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ..config import nearest
from ..devices import keep_freed_memory
from ..errors import UserError
from ..version import __version__
from .autoencoder import autoencoder
from .chat import chat
from .data import data
from .editing import edit
from .evaluation import evaluate
from .planning import plan
from .serving import serve
from .study import study
from .tools import doctor, export
from .training import demo, train
from .writing import caption, generate


def main() -> None:
    """Entry point: exit code 0 done, 2 a mistake of the user's, 75 stopped and saved, 130 interrupted."""
    keep_freed_memory()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "--":  # torchrun passes it on; without it, torchrun would take --run as its option
        arguments = arguments[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"transfuse {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UserError(f'unknown command "{name}"{nearest(name, COMMANDS)}')
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"transfuse: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _overview() -> str:
    lines = [f"  {name:<12} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["transfuse COMMAND [OPTIONS]", "", *lines, "", "transfuse COMMAND --help shows an example."])


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "caption": caption,
    "evaluate": evaluate,
    "edit": edit,
    "chat": chat,
    "serve": serve,
    "data": data,
    "study": study,
    "autoencoder": autoencoder,
    "plan": plan,
    "export": export,
    "doctor": doctor,
}
