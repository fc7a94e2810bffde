"""From words on a command line to a dataclass, and back to one line of JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from ..config import nearest
from ..errors import UserError

T = TypeVar("T")


def parse(kind: Callable[..., T], arguments: Sequence[str], name: str, default: Any = tyro.MISSING) -> T:
    """Parse with tyro; its complaints become one line."""
    shown = io.StringIO()
    options: dict[str, Any] = {"args": list(arguments), "prog": f"transfuse {name}", "return_unknown_args": True}
    if default is not tyro.MISSING:
        options["default"] = default
    try:
        with contextlib.redirect_stderr(shown):
            parsed, unknown = tyro.cli(kind, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = " ".join(re.sub(r"[\u2500-\u257f]+", " ", shown.getvalue()).split())
        text = re.sub(
            r"^Value error |Error parsing (recipe\.)?\S+: (?=\S+: )|(Argument helptext|For full helptext).*", "", text
        )
        raise UserError(f"{name}: {text.strip()}") from None
    except ValueError as error:  # a dataclass refuses a value
        raise UserError(f"{name}: {error}") from None
    if unknown:
        option = unknown[0].split("=")[0]
        current = current_option(parsed, option)
        if current is not None:
            raise UserError(f'{name}: "{option}" is now called "{current}"')
        known = [f"--{field}" for field in _fields(kind if dataclasses.is_dataclass(kind) else type(parsed), parsed)]
        raise UserError(f'{name}: unknown argument "{unknown[0]}"{nearest(option, known)}')
    return parsed


def current_option(value: Any, option: str) -> str | None:
    """Return today's name of an option that had another one in version 0.1, given what was parsed; None for others."""
    *sections, name = option.removeprefix("--").replace("-", "_").split(".")
    for section in sections:
        value = getattr(value, section, getattr(getattr(value, "recipe", None), section, None))
    renamed = getattr(value, "renamed", {}).get(name)
    return None if renamed is None else "--" + ".".join([*sections, renamed]).replace("_", "-")


def _fields(kind: Any, value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        inner = getattr(value, field.name)
        flag = prefix + field.name.replace("_", "-")
        inside = "" if flag == "recipe" else flag + "."
        names += _fields(type(inner), inner, inside) if dataclasses.is_dataclass(inner) else [flag]
    return names


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def parse_recipe(
    command: str, recipe: Any, options: dict[str, tuple[Any, Any, str]], arguments: Sequence[str], summary: str | None
) -> Any:
    """A recipe with every setting as an option, next to the command's own.

    options: type, default and help of each by name. Returns an object with `recipe` and each of them as attributes.
    """
    # Built here, so that the command line starts without importing torch.
    fields = [("recipe", Annotated[type(recipe), tyro.conf.arg(name="")])]
    fields += [(name, Annotated[kind, tyro.conf.arg(help=text)]) for name, (kind, _, text) in options.items()]
    kind = dataclasses.make_dataclass(command.title(), fields, frozen=True, namespace={"__doc__": summary})
    defaults = {name: default for name, (_, default, _) in options.items()}
    return parse(kind, arguments, command, kind(recipe=recipe, **defaults))


def parse_run(
    command: str, recipe: Any, preset: str, arguments: Sequence[str], summary: str | None
) -> tuple[Any, Path, bool]:
    """A recipe with every setting as an option, with --run and --json. Returns the recipe, the run's folder, json."""
    options = {
        "run": (Path, Path("runs") / preset, "folder of the run: checkpoints, metrics, samples, export"),
        "json": (bool, False, JSON),
    }
    parsed = parse_recipe(command, recipe, options, arguments, summary)
    return parsed.recipe, parsed.run, parsed.json


JSON = "end with one line of JSON"


def act(
    command: str, arguments: Sequence[str], actions: dict[str, Callable[[Sequence[str]], int]], summary: str | None
) -> int:
    """Call the action that a command's first word names; without one, list the actions."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(summary)
        return 0
    name, *rest = arguments
    if name not in actions:
        raise UserError(f'{command}: unknown action "{name}"{nearest(name, actions)}')
    return actions[name](rest)


def preset_name(
    command: str, arguments: Sequence[str], presets: Iterable[str], summary: str | None
) -> tuple[str, list[str]] | None:
    """The preset a command starts with, and the rest; None where help was asked for and given."""
    known = ", ".join(presets)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{summary}\npresets: {known}\nsettings: transfuse {command} PRESET --help")
        return None
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            f"{command}: expected a preset, found {'none' if not arguments else arguments[0]}; there are {known}"
        )
    return arguments[0], list(arguments[1:])
