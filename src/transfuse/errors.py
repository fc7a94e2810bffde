"""The one exception a user is meant to see, and the command that mends a missing extra."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires


class UserError(Exception):
    """A mistake the user can mend: one line that names the file, field or shape, what was expected and what was found.

    The command line prints the line and exits with code 2; everything else is a defect and keeps its traceback.
    """


def install_command(extra: str) -> str:
    """Return the pip command for the packages of an extra, by their own names.

    No index knows the name transfuse: a command with it could install somebody else's package.
    """
    try:
        lines = requires("transfuse") or []
    except PackageNotFoundError:
        lines = []
    wanted = [line.partition(";")[0].strip() for line in lines if line.endswith(f'extra == "{extra}"')]
    return "pip install " + " ".join(f'"{name}"' for name in wanted or [f".[{extra}]"])
