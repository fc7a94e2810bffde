"""Configuration: frozen dataclasses next to the code they configure, to JSON and back without loss.

Unknown keys are refused, with the nearest known one named; so is a value of another type.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a (nested) dataclass as plain JSON values."""
    result: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return result


def from_dict(kind: type[T], values: Any, where: str) -> T:
    """Build a dataclass from JSON values, in which fields may have the names of earlier versions (`renamed`).

    Raises UserError: one line that names `where`, the field, and what is wrong.
    """
    values = _with_current_names(kind, values)
    _refuse_unknown(kind, values, where)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {place + ': ' if place else ''}{message} (found {first['input']!r:.80})") from None


def updated(config: T, changes: dict[str, Any], where: str) -> T:
    """Return a dataclass with some settings changed, nested as in its JSON. Raises UserError as `from_dict`."""

    def merged(old: Any, new: Any) -> Any:
        if not (isinstance(old, dict) and isinstance(new, dict)):
            return new
        return {**old, **{key: merged(old.get(key), value) for key, value in new.items()}}

    kind = type(config)
    return from_dict(kind, merged(to_dict(config), _with_current_names(kind, changes)), where)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError where it is missing, cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, found none") from None
    except OSError as error:
        raise UserError(f"{path}: expected a JSON file, found none that can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from None


def read_settings(path: Path) -> dict[str, Any]:
    """Read settings from a JSON, TOML or YAML file, by its ending. Raises UserError for any other content."""
    import yaml

    if path.suffix == ".json":
        values = read_json(path)
    elif path.suffix in (".toml", ".yaml", ".yml"):
        try:
            text = path.read_text(encoding="utf-8")
            values = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
        except OSError as error:
            raise UserError(f"{path}: expected a file of settings, found none ({error.strerror})") from None
        except (ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: expected {path.suffix[1:].upper()}, found something else ({reason})") from None
    else:
        raise UserError(f"{path}: expected a file of settings (.yaml, .toml or .json), found {path.suffix or 'none'}")
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected settings by name, found {values!r:.80}")
    return values


def nearest(name: str, known: typing.Iterable[str], otherwise: str | None = None) -> str:
    """Return a hint such as `; did you mean "demo"?`; without a close match, `otherwise` or the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; there are {', '.join(known)}" if otherwise is None else otherwise


def dataclass_in(kind: Any) -> Any:
    """Return the dataclass in a type such as `Config | None`, or the type itself."""
    options = typing.get_args(kind) or (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), kind)


def _with_current_names(kind: Any, values: Any) -> Any:
    kind = dataclass_in(kind)
    if not (dataclasses.is_dataclass(kind) and isinstance(values, dict)):
        return values
    values = kind.upgraded(values) if hasattr(kind, "upgraded") else values
    types, renamed = typing.get_type_hints(kind), getattr(kind, "renamed", {})
    named = {renamed.get(key, key): value for key, value in values.items()}
    return {key: _with_current_names(types.get(str(key)), value) for key, value in named.items()}


def _refuse_unknown(kind: Any, values: Any, where: str, prefix: str = "") -> None:
    kind = dataclass_in(kind)
    if not (dataclasses.is_dataclass(kind) and isinstance(values, dict)):
        return
    types = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in fields:
            raise UserError(f'{where}: unknown setting "{prefix}{key}"{nearest(str(key), fields)}')
        _refuse_unknown(types[key], value, where, f"{prefix}{key}.")
