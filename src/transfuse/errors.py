"""The one exception a user is meant to see, a check of arguments, and the command that mends a missing extra."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line that names the file, field or shape, what was expected and what was found.

    The command line prints the line and exits with code 2; everything else is a defect and keeps its traceback.
    """


def shown(value: Any) -> str:
    """Return a value as Python writes it, on one line, at most 80 characters: arrays have many."""
    return " ".join(repr(value)[:800].split())[:80]


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


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, tuple[Any, str]]) -> None:
    """Raise UserError for the first value, by name, that is not of its types (types, these in words).

    True and False are no numbers.
    """
    for name, (types, wanted) in kinds.items():
        if not isinstance(values[name], types) or isinstance(values[name], bool):
            raise UserError(f"{name}: expected {wanted}, found {shown(values[name])}")
