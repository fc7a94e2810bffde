"""The command line: parses, calls, prints. `transfuse COMMAND --help` shows a working example of each."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from .configuration import nearest
from .console import say
from .errors import UserError
from .version import __version__

if TYPE_CHECKING:
    import PIL.Image

    from .inference import TransfusionPipeline
    from .presets import Recipe

T = TypeVar("T")


def main() -> None:
    """Entry point: exit code 0 done, 2 a mistake of the user's, 75 stopped and saved, 130 interrupted."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
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
    lines = [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["transfuse COMMAND [OPTIONS]", "", *lines, "", "transfuse COMMAND --help shows an example."])


def _parse(kind: Callable[..., T], arguments: Sequence[str], name: str, default: Any = tyro.MISSING) -> T:
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
        known = [f"--{field}" for field in _fields(kind if dataclasses.is_dataclass(kind) else type(parsed), parsed)]
        raise UserError(f'{name}: unknown argument "{unknown[0]}"{nearest(unknown[0].split("=")[0], known)}')
    return parsed


def _fields(kind: Any, value: Any, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        inner = getattr(value, field.name)
        flag = prefix + field.name.replace("_", "-")
        inside = "" if flag == "recipe" else flag + "."
        names += _fields(type(inner), inner, inside) if dataclasses.is_dataclass(inner) else [flag]
    return names


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


# --- train, demo ------------------------------------------------------------------------------------------------------


def train(arguments: Sequence[str]) -> int:
    """Train a preset, or go on with a run.

    transfuse train demo --run runs/mine --loop.steps 500

    Every setting of the recipe is an option. The same command goes on from the newest checkpoint; Ctrl-C saves
    and exits with code 75.
    """
    from .presets import PRESETS, Recipe, preset

    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            print(f"{train.__doc__}\npresets: {', '.join(PRESETS)}\nsettings: transfuse train demo --help")
            return 0
        raise UserError(
            f"train: expected a preset, found {'none' if not arguments else arguments[0]}; "
            f"there are {', '.join(PRESETS)}"
        )
    name, *rest = arguments
    recipe = preset(name)

    # Built here, so that the command line starts without importing torch.
    fields = [
        ("recipe", Annotated[Recipe, tyro.conf.arg(name="")]),
        ("run", Annotated[Path, tyro.conf.arg(help="folder of the run: checkpoints, metrics, samples, export")]),
        ("json", Annotated[bool, tyro.conf.arg(help="end with one line of JSON")]),
    ]
    kind = dataclasses.make_dataclass("Train", fields, frozen=True, namespace={"__doc__": train.__doc__})
    asked = _parse(kind, rest, "train", kind(recipe, Path("runs") / name, False))
    return _train(asked.recipe, asked.run, asked.json)


def _train(recipe: Recipe, folder: Path, as_json: bool) -> int:
    from .studies.training import train_run
    from .training import RESUMABLE

    trained = train_run(recipe, folder)
    if trained.export is None:
        return RESUMABLE
    say(f"{trained.export}: exported; try: transfuse generate 'a crab on a blue background' --model {trained.export}")
    if as_json:
        step, totals = trained.trainer.step, trained.trainer.totals
        _print_json({"run": str(folder), "step": step, "export": str(trained.export), **totals})
    return 0


@dataclass(frozen=True)
class Demo:
    """Train a small Transfusion on this machine, then draw, caption and write with it, and report.

    transfuse demo --run runs/demo
    """

    run: Path = Path("runs/demo")
    """folder for the run and its report; a finished part is not done again"""
    minutes: float = 8.0
    """most minutes of training"""
    json: bool = False
    """end with one line of JSON"""


def demo(arguments: Sequence[str]) -> int:
    """Train a small model on this machine, draw, caption, write, report (about 9 minutes)."""
    from .studies.demo import run_demo

    asked = _parse(Demo, arguments, "demo")
    code, report = run_demo(asked.run, asked.minutes)
    if asked.json:
        _print_json(report)
    return code


# --- generate, caption ------------------------------------------------------------------------------------------------


def newest_export() -> Path:
    """The export that `--model` means when it is not given."""
    found = sorted(Path("runs").glob("*/export/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("--model: expected an export folder, found none under runs/: train one first (make demo)")
    return found[-1].parent


def _load(model: Path | None) -> TransfusionPipeline:
    from . import load

    return load(str(model or newest_export()))


@dataclass(frozen=True)
class Generate:
    """Go on from a prompt, in words and pictures: the model itself decides when to draw.

    transfuse generate "a crab on a blue background" --seed 7 --out pictures
    """

    prompt: tyro.conf.Positional[str]
    model: Path | None = None
    """export folder; the newest under runs/ if not given"""
    out: Path = Path("out")
    """folder for the pictures"""
    seed: int = 0
    steps: int | None = None
    """denoising steps; the model's own default if not given"""
    guidance_scale: float | None = None
    draw: Literal["auto", "force", "never"] = "auto"
    """force: a picture comes first; never: words only"""
    max_tokens: int | None = None
    """most tokens of text"""
    temperature: float | None = None
    """of the text; 0 is greedy"""
    json: bool = False
    """end with one line of JSON"""


def generate(arguments: Sequence[str]) -> int:
    """Go on from a prompt, in words and pictures."""
    asked = _parse(Generate, arguments, "generate")
    if not asked.prompt.strip():
        raise UserError("generate: prompt: expected some text, found an empty one")
    pipe = _load(asked.model)
    from dataclasses import replace

    request = replace(pipe.request([asked.prompt], asked.steps, asked.guidance_scale), seed=asked.seed, draw=asked.draw)
    if asked.max_tokens is not None:
        request = replace(request, max_tokens=asked.max_tokens)
    if asked.temperature is not None:
        request = replace(request, temperature=asked.temperature)
    reply = pipe.replies([request])[0]
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        parts: list[dict[str, str]] = []
        for part in reply.parts:
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
            else:
                path = asked.out / f"seed-{asked.seed}-{sum(p['type'] == 'image' for p in parts)}.png"
                part.save(path)
                parts.append({"type": "image", "path": str(path)})
    except OSError as error:
        raise UserError(f"{asked.out}: expected a folder to write to, found {error.strerror or error}") from None
    if asked.json:
        _print_json(
            {
                "parts": parts,
                "seed": asked.seed,
                "steps": request.sampler.steps,
                "guidance_scale": request.guidance_scale,
                "stop": reply.done.reason,
                "text_tokens": reply.done.text_tokens,
            }
        )
    else:
        print("\n".join(part.get("text") or part["path"] for part in parts))
    return 0


@dataclass(frozen=True)
class Caption:
    """Describe a picture.

    transfuse caption picture.png
    """

    image: tyro.conf.Positional[Path]
    model: Path | None = None
    """export folder; the newest under runs/ if not given"""
    resize: bool = False
    """crop the middle square, resize it to the model's size and convert it to RGB, instead of refusing it"""
    max_tokens: int = 64
    json: bool = False
    """end with one line of JSON"""


def caption(arguments: Sequence[str]) -> int:
    """Describe a picture."""
    asked = _parse(Caption, arguments, "caption")
    picture = _open_image(asked.image)
    pipe = _load(asked.model)
    side = pipe.exported.image_size
    if asked.resize:
        import PIL.ImageOps

        picture = PIL.ImageOps.fit(picture.convert("RGB"), (side, side))
    if picture.mode != "RGB":
        raise UserError(f"{asked.image}: expected an RGB image, found mode {picture.mode}; --resize converts it")
    if picture.size != (side, side):
        width, height = picture.size
        raise UserError(f"{asked.image}: expected {side}x{side} pixels, found {width}x{height}; --resize fits it")
    text = pipe.caption(picture, max_tokens=asked.max_tokens)[0]
    if asked.json:
        _print_json({"caption": text, "image": str(asked.image)})
    else:
        print(text)
    return 0


def _open_image(path: Path) -> PIL.Image.Image:
    """Read a PNG, JPEG or WebP file whole. Raises UserError for anything else."""
    import warnings

    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
                image.load()
                return image.copy()
    except FileNotFoundError:
        raise UserError(f"{path}: expected an image file, found none") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        PIL.Image.DecompressionBombError,
        PIL.Image.DecompressionBombWarning,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: expected a PNG, JPEG or WebP image, found something else ({reason})") from None


# --- plan, export, doctor ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a preset costs: parameters, operations, memory.

    transfuse plan 0.76b-unet
    """

    name: tyro.conf.Positional[str]
    json: bool = False
    """end with one line of JSON"""


def plan(arguments: Sequence[str]) -> int:
    """Parameters, operations and memory of a preset."""
    from .presets import preset
    from .presets.plan import plan as figures

    asked = _parse(Plan, arguments, "plan")
    found = figures(preset(asked.name))
    if asked.json:
        _print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:<32} {value:,}" if isinstance(value, int | float) else f"{name:<32} {value}")
    return 0


@dataclass(frozen=True)
class Export:
    """Write the averaged weights of a run's newest checkpoint as a folder to load and share.

    transfuse export runs/demo --out my-model
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None
    """the run's own export/ if not given"""
    json: bool = False
    """end with one line of JSON"""


def export(arguments: Sequence[str]) -> int:
    """Write a run's newest checkpoint as a model folder."""
    from .presets.recipe import build_trainer, export_run, read_recipe

    asked = _parse(Export, arguments, "export")
    if not asked.run.is_dir():
        raise UserError(f"{asked.run}: expected a run folder, found {'a file' if asked.run.exists() else 'nothing'}")
    recipe = read_recipe(asked.run / "config.json")
    trainer, tokenizer = build_trainer(recipe, asked.run)
    if not trainer.restore():
        raise UserError(f"{asked.run / 'checkpoints'}: expected a complete checkpoint, found none")
    path = export_run(recipe, trainer, tokenizer, asked.out or asked.run / "export")
    if asked.json:
        _print_json({"export": str(path), "step": trainer.step})
    else:
        print(path)
    return 0


@dataclass(frozen=True)
class Doctor:
    """Look at this machine: versions, threads, bfloat16, CUDA, disk, and what is missing.

    transfuse doctor
    """

    json: bool = False
    """end with one line of JSON"""


def doctor(arguments: Sequence[str]) -> int:
    """Check this machine for what Transfuse needs."""
    import importlib.util
    import os
    import platform
    import shutil

    import torch

    from .presets.recipe import Recipe, resolve

    asked = _parse(Doctor, arguments, "doctor")
    extras = {name: importlib.util.find_spec(name) is not None for name in ("diffusers", "transformers")}
    found: dict[str, Any] = {
        "transfuse": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "precision": resolve(Recipe()).precision,
        "free_disk_gigabytes": round(shutil.disk_usage(".").free / 2**30, 1),
        "folder_writable": os.access(".", os.W_OK),
        "optional": extras,
    }
    problems = []
    if found["free_disk_gigabytes"] < 2:
        problems.append(f"disk: expected at least 2 GB free, found {found['free_disk_gigabytes']}")
    if not found["folder_writable"]:
        problems.append("folder: expected to be writable, found read-only")
    found["problems"] = problems
    if asked.json:
        _print_json(found)
    else:
        for name, value in found.items():
            print(f"{name:<22} {value}")
        print("everything needed is here" if not problems else "\n".join(problems))
    return 2 if problems else 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "demo": demo,
    "train": train,
    "generate": generate,
    "caption": caption,
    "plan": plan,
    "export": export,
    "doctor": doctor,
}
