"""From words on a command line to a call: tyro reads a function's signature, and each of its complaints is one line.

    parse(caption, ["crab.png", "--resize"], "caption")()      # caption(Path("crab.png"), resize=True)

A function with a parameter `recipe` has every setting of the recipe as an option. Their defaults are those of a preset,
the first word, changed by the file that `--config` names.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
from tyro import _errors as complaints  # structured, where the public interface only prints boxes
from tyro.conf import Positional
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..config import dataclass_in, nearest, read_settings, to_dict, updated
from ..errors import UserError

T = TypeVar("T")
Flat = tyro.conf.arg(name="")
"""in `Annotated`: a dataclass whose fields are options without a prefix"""
Preset = Annotated[str | None, tyro.conf.arg(metavar="PRESET", help="a recipe by name")]
Json = Annotated[bool, tyro.conf.arg(help="end with one line of JSON")]
Config = Annotated[
    Path | None,
    tyro.conf.arg(help="file of settings (.yaml, .toml, .json, or a run's config.json), which options change"),
]
RunFolder = Annotated[
    Path | None,
    tyro.conf.arg(help="folder of the run: checkpoints, metrics, samples, export; runs/PRESET if not given"),
]
Words = Positional[tuple[str, ...]]
"""of a function that reads the words of its command line itself"""
registry = ConstructorRegistry()


def parse(function: Callable[..., int], words: Sequence[str], name: str) -> partial[int]:
    """Return the call of a command's function that its words ask for. `--help` prints all options, then SystemExit.

    Raises UserError: one line that names the option, what was expected and what was found.
    """
    hints = get_type_hints(function)
    if "words" in hints:
        return partial(function, words)
    doc = function.__doc__
    if "options" in hints and "config" in hints:
        function = with_file(function, words)
    if "recipe" in hints:
        if words and words[0] in ("-h", "--help"):
            return partial(print_presets, function, hints["recipe"], name)
        function = partial(function, recipe=starting_recipe(hints["recipe"], words, name, "model" in hints))
    function.__doc__ = doc

    @wraps(function)
    def call(*values: Any, **options: Any) -> partial[int]:
        return partial(function, *values, **options)

    made = read(call, words, name)
    if "recipe" in hints:
        made.keywords["recipe"] = with_start(made.keywords["recipe"], words, name, "model" in hints)
    return made


def read(kind: Callable[..., T], words: Sequence[str], name: str) -> T:
    """Call a function, or make a dataclass, with the options that words give it. Raises as `parse`."""

    def refuse(event: complaints.ParseErrorEvent) -> NoReturn:
        raise UserError(f"{name}: {explain(event, kind, words)}")

    try:
        with complaints.on_parse_error(refuse):
            return tyro.cli(kind, args=list(words), prog=f"transfuse {name}", registry=registry)
    except ValueError as error:  # of a dataclass in a dataclass
        raise UserError(f"{name}: {_with_option(str(error), kind, words)}") from None


def explain(event: complaints.ParseErrorEvent, function: Callable[..., Any], words: Sequence[str]) -> str:
    """Return what is wrong with a command line, without the command's name."""
    match event:
        case complaints.MissingArgs(unrecognized_tokens=[word, *_]) | complaints.UnrecognizedArgs(tokens=[word, *_]):
            return _unknown(word, function, words)
        case complaints.MissingArgs():
            wanted = " and ".join(missing.arg.display_name() for missing in event.missing_arguments)
            return f"expected {wanted}, found none"
        case complaints.BadValue(argument=argument):
            return f"{argument.display_name()}: expected {argument.lowered.metavar}, found too few values"
        case complaints.InvalidChoice(argument=argument):
            hint = nearest(event.value, sorted(event.choices))
            return f'{argument.display_name()}: unknown value "{event.value}"{hint}'
        case complaints.InstantiationFailure(argument=argument, message=message) if argument is not None:
            return f"{argument.display_name()}: {message.splitlines()[0]}"
        case complaints.InstantiationFailure(message=message):
            return _with_option(message, function, words)
    return f"expected other options (transfuse {event.prog} --help), found {' '.join(words)}"


def _unknown(word: str, function: Callable[..., Any], words: Sequence[str]) -> str:
    """Explain a word that no option takes."""
    if word.startswith("-"):
        option, names = word.partition("=")[0].replace("_", "-"), option_names(function)
        if names.get(option, option) != option:
            return f'"{option}" is now called "{names[option]}"'
        return f'unknown option "{option}"{nearest(option, names.values(), "; --help lists them")}'
    if "prompt" not in inspect.signature(function).parameters:
        return f'unexpected word "{word}"; --help shows an example'
    first = words.index(word) - 1
    last = next((n for n in range(first, len(words)) if words[n].startswith("-")), len(words))
    return f'unexpected word "{word}"; a prompt of several words needs quotes: "{" ".join(words[first:last])}"'


def _with_option(message: str, function: Callable[..., Any], words: Sequence[str]) -> str:
    """Name the option in a dataclass's "field: expected ..., found ...", where the field has no full name."""
    field, _, rest = message.partition(": ")
    for option in {word.partition("=")[0].replace("_", "-") for word in words} & option_names(function).keys():
        name = option.removeprefix("--").replace("-", "_")
        if name != field and name.split(".")[-1] == field.split(".")[-1]:
            return f"{option}: {rest}"
    return message


def option_names(owner: Any, prefix: str = "--") -> dict[str, str]:
    """Return every option of a function or dataclass, and every earlier name of one, with today's name."""
    owner = inspect.unwrap(owner)
    owner = owner.func if isinstance(owner, partial) else owner
    hints = get_type_hints(owner, include_extras=True)
    fields = [field.name for field in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else [*hints]
    names: dict[str, str] = {}
    for name in fields:
        hint = hints[name]
        if get_origin(hint) is Annotated:
            given = [mark.name for mark in hint.__metadata__ if getattr(mark, "name", None) is not None]
            hint, name = hint.__origin__, (given or [name])[0]
        inner = dataclass_in(hint)
        if dataclasses.is_dataclass(inner):
            names |= option_names(inner, f"{prefix}{name}." if name else prefix)
        else:
            names[prefix + name] = prefix + name
    names |= {prefix + old: prefix + new for old, new in getattr(owner, "renamed", {}).items()}
    return {old.replace("_", "-"): new.replace("_", "-") for old, new in names.items()}


# --- values -----------------------------------------------------------------------------------------------------------


@registry.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read numbers; 1e3 and 1_000 are whole ones, too."""
    if info.type not in (int, float):
        return None
    kind, what = info.type, "a whole number" if info.type is int else "a number"

    def read(values: list[str]) -> float:
        try:
            number = float(values[0]) if kind is float or "e" in values[0].lower() else int(values[0])
            if kind is int and number != int(number):
                raise ValueError
        except (ValueError, OverflowError):
            raise ValueError(f"expected {what}, found {values[0]}") from None
        return kind(number)

    return PrimitiveConstructorSpec(
        1, kind.__name__.upper(), read, lambda value: isinstance(value, int | kind), lambda value: [str(value)]
    )


@registry.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read "None", or the one other type of a union, whose complaints then stay as they are."""
    kinds = [kind for kind in get_args(info.type) if kind is not type(None)]
    if info.type_origin not in (Union, UnionType) or len(kinds) != 1 or len(get_args(info.type)) != 2:
        return None
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
    if not isinstance(spec, PrimitiveConstructorSpec) or spec.nargs != 1:
        return None
    return PrimitiveConstructorSpec(
        1,
        f"{spec.metavar}|None",
        lambda values: None if values == ["None"] else spec.instance_from_str(values),
        lambda value: value is None or spec.is_instance(value),
        lambda value: ["None"] if value is None else spec.str_from_instance(value),
        choices=None if spec.choices is None else (*spec.choices, "None"),
    )


def with_file(function: Callable[..., int], words: Sequence[str]) -> Callable[..., int]:
    """Return a function whose dataclasses have the settings of the file that `--config` names as their defaults."""
    files = config_files(words)
    if not files:
        return function
    values, hints = read_settings(Path(files[-1])), get_type_hints(function)
    kinds: dict[str, Any] = {option: kind for option, kind in hints.items() if dataclasses.is_dataclass(kind)}
    own = {option: {field.name for field in dataclasses.fields(kind)} for option, kind in kinds.items()}
    known = [field for fields in own.values() for field in fields]
    if unknown := [key for key in values if key not in known]:
        raise UserError(f'{files[-1]}: unknown setting "{unknown[0]}"{nearest(unknown[0], known)}')
    defaults = {
        option: updated(kind(), {key: value for key, value in values.items() if key in own[option]}, files[-1])
        for option, kind in kinds.items()
    }
    return partial(function, **defaults)


def config_files(words: Sequence[str]) -> list[str]:
    """Return the files that `--config` names."""
    files = [value for word, value in pairwise(words) if word == "--config"]
    return files + [word.partition("=")[2] for word in words if word.startswith("--config=")]


# --- recipes ----------------------------------------------------------------------------------------------------------


def starting_recipe(kind: type[Any], words: Sequence[str], name: str, of_model: bool = False) -> Any:
    """Return a recipe before the options of a command line: a preset, changed by the file that `--config` names.

    of_model: the first word is an export, to be distilled, and needed

    A file without a preset's name next to it may name one itself. Raises UserError where there is neither.
    """
    from ..recipes import VERSION, preset

    chosen = words[0] if words and not words[0].startswith("-") else None
    files = config_files(words)
    if chosen is None and (of_model or not files):
        word, wanted = words[0] if words else "none", "an export folder" if of_model else "a preset"
        raise UserError(f"{name}: expected {wanted}, found {word}; transfuse {name} --help lists them")
    if of_model:
        from ..runs import student_of

        recipe = student_of(str(chosen))
        return updated(recipe, read_settings(Path(files[-1])), files[-1]) if files else recipe
    if not files:
        return preset(str(chosen), kind)
    values = read_settings(Path(files[-1]))
    if values.get("version", VERSION) != VERSION:
        raise UserError(f"{files[-1]}: version: expected {VERSION}, found {values['version']}")
    if chosen is None and "version" not in values:  # without it the file of a run, which has every setting
        chosen = str(values.get("preset", ""))
    return updated(preset(chosen, kind) if chosen else kind(), values, files[-1])


def with_start(recipe: Any, words: Sequence[str], name: str, of_model: bool = False) -> Any:
    """Return a recipe that starts from an export with the longer sequences that were typed next to it, if any were.

    of_model: it is distilled, and its teacher's sequences are not longer

    Raises UserError for any other option that was typed although the export decides it.
    """
    from ..autoencoders import open_autoencoder
    from ..export import describe
    from ..folders import fetched, is_export
    from ..recipes import Recipe
    from ..runs.start import decided_by

    if not isinstance(recipe, Recipe) or not recipe.start or not is_export(folder := fetched(recipe.start)):
        return recipe
    export, init = describe(folder), recipe.init
    parts = {part: _leaves(to_dict(values), f"{part}.") for part, values in decided_by(export, recipe).items()}
    decided, own = {k: v for leaves in parts.values() for k, v in leaves.items()}, _leaves(to_dict(recipe))
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        field = option.removeprefix("--").replace("-", "_").replace(".no_", ".")
        if not option.startswith("--") or own.get(field) == decided.get(field, own.get(field)):
            continue
        expected = str(decided[field])
        if field == "model.max_seq_len" and not of_model and not recipe.distil.steps:
            if own[field] > decided[field]:
                recipe = replace(recipe, init=replace(init, allow_changes=(*init.allow_changes, "max_seq_len")))
                continue
            expected = f"at least {expected}"
        if field == "data.autoencoder":
            if open_autoencoder(own[field]).fingerprint == export.autoencoder.fingerprint:
                continue
            expected = export.autoencoder.name
        hint = (
            "" if of_model or "network" in init.allow_changes else " (--init.allow-changes network keeps the recipe's)"
        )
        raise UserError(f"{name}: {option}: expected {expected}, as {recipe.start} decides, found {own[field]}{hint}")
    return recipe


def _leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their full names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def print_presets(function: Callable[..., int], kind: type[Any], name: str) -> int:
    """Print a command's help without the settings, which depend on the first word; return the exit code 0."""
    from ..recipes import NAMED

    text, of_model = inspect.getdoc(function) or "", "model" in get_type_hints(function)
    print(text.partition("\nArgs:")[0] + "\n")
    if not of_model:
        print(fill(f"presets: {', '.join(NAMED[kind])}", 100, break_on_hyphens=False))
    print(f"settings: transfuse {name} {'MODEL' if of_model else 'PRESET'} --help")
    return 0


def print_json(value: dict[str, Any]) -> None:
    """Print one line of JSON."""
    print(json.dumps(value))


def print_result(as_json: bool, report: dict[str, Any], text: object) -> int:
    """Print a command's result, as JSON or as text for people; return the exit code 0."""
    print(json.dumps(report) if as_json else text)
    return 0


def run_folder(given: Path | None, preset: str, config: Path | None) -> Path:
    """Return the folder of a run, by default one under runs/ with the name of its preset, or of its file."""
    return given or Path("runs") / (preset or (config.stem if config else "run"))
