"""Configuration: frozen dataclasses next to the code they configure, to JSON and back without loss.

Unknown keys are refused, with the nearest known one named; so is a value of another type.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from .errors import UserError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a (nested) dataclass."""
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


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError where it is missing, cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: expected a JSON file, found none") from None
    except OSError as error:
        raise UserError(f"{path}: expected a JSON file, found none that can be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, found something else ({error})") from None


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return a hint such as `; did you mean "demo"?`, or the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f'; did you mean "{close[0]}"?' if close else f"; there are {', '.join(known)}"


def _dataclass_of(kind: Any) -> Any:
    """Return the dataclass in a type such as `Config | None`, or the type itself."""
    options = typing.get_args(kind) or (kind,)
    return next((option for option in options if dataclasses.is_dataclass(option)), kind)


def _with_current_names(kind: Any, values: Any) -> Any:
    kind = _dataclass_of(kind)
    if not (dataclasses.is_dataclass(kind) and isinstance(values, dict)):
        return values
    types, renamed = typing.get_type_hints(kind), getattr(kind, "renamed", {})
    named = {renamed.get(key, key): value for key, value in values.items()}
    return {key: _with_current_names(types.get(str(key)), value) for key, value in named.items()}


def _refuse_unknown(kind: Any, values: Any, where: str, prefix: str = "") -> None:
    kind = _dataclass_of(kind)
    if not (dataclasses.is_dataclass(kind) and isinstance(values, dict)):
        return
    types = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if key not in fields:
            raise UserError(f'{where}: unknown setting "{prefix}{key}"{nearest(key, fields)}')
        _refuse_unknown(types[key], value, where, f"{prefix}{key}.")
