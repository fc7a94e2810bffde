"""Exports: the folder that users load and share.

    config.json               model_type, architectures, preset, network, diffusion process, image size, the scenes it
                              learned, fingerprints of tokenizer and autoencoder
    model.safetensors         the averaged weights
    tokenizer.json            tokenizer_config.json, for transformers, too
    autoencoder/              transfuse_generation.json        README.md (model card)
    vocabulary.json           the words it has learned to draw, if its world is not open

and the files by which transformers opens it (`hub_files`). Diffusers' layout of the same files, whose `vae` and
`scheduler` diffusers opens, loads as well (`relayout`):

    model_index.json    transformer/    vae/    scheduler/    tokenizer/

Weights are safetensors: nothing a user downloads is unpickled. The tokenizer and the autoencoder that a model was
trained with are part of the export.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .autoencoders import Autoencoder, VQTokenizer, load_autoencoder, save_autoencoder
from .autoencoders.folder import fingerprint
from .config import from_dict, nearest, read_json, to_dict
from .diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from .errors import UserError, shown
from .folders import DIFFUSERS, GENERATION, MODEL_TYPE, atomic_dir, bundled_models, find_export, places
from .hub_files import ARCHITECTURES, write_diffusers_files, write_json, write_transformers_files
from .io import sha256
from .model import ModelConfig, Transfusion
from .model.transfusion import current_name
from .sequence import Tokenizer
from .sequence.tokenizer import TOKENIZER_CONFIG, TURNS
from .version import __version__
from .vocabulary import Vocabulary

METADATA = {"format": "pt"}
"""of the weights' file; transformers opens no other"""
MAX_SCALE = 1000.0  # of a temperature or a guidance scale: beyond any use, far below overflow


@dataclass(frozen=True)
class GenerationConfig:
    """A model's default settings for generation. Raises ValueError, naming the field, for values out of range."""

    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpmpp", steps=20))
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] | None = None
    """noise levels, as shares of T, at which images are guided (`Request`); None: all"""
    temperature: float = 0.0
    """sampling temperature of text; 0 is greedy, as in the paper's evaluation"""
    top_p: float = 1.0
    code_temperature: float = 1.0
    """sampling temperature of image codes; greedy sampling draws flat images"""
    code_top_p: float = 1.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if wrong := out_of_range(self):
            raise ValueError(wrong)


def out_of_range(settings: Any) -> str:
    """Return what is wrong with a GenerationConfig or a Request (field, expected, found), or ""."""
    for name in ("temperature", "code_temperature", "guidance_scale", "top_p", "code_top_p"):
        if not isinstance(getattr(settings, name), Real):
            return f"{name}: expected a number, found {shown(getattr(settings, name))}"
    if not isinstance(settings.max_tokens, Integral):
        return f"max_tokens: expected a whole number, found {shown(settings.max_tokens)}"
    for name in ("temperature", "code_temperature", "guidance_scale"):
        if not 0 <= getattr(settings, name) <= MAX_SCALE:
            return f"{name}: expected 0 to {MAX_SCALE:g}, found {getattr(settings, name)}"
    for name in ("top_p", "code_top_p"):
        if not 0 < getattr(settings, name) <= 1:
            return f"{name}: expected a share above 0, at most 1, found {getattr(settings, name)}"
    if settings.max_tokens < 0:
        return f"max_tokens: expected at least 0, found {settings.max_tokens}"
    if (interval := settings.guidance_interval) is not None:
        shares = isinstance(interval, Sequence) and [isinstance(share, Real) for share in interval] == [True, True]
        if not shares or not 0 <= interval[0] <= interval[1] <= 1:
            return f"guidance_interval: expected shares 0 <= low <= high <= 1, found {shown(interval)}"
    return ""


@dataclass(frozen=True)
class Distilled:
    """The origin of a model that draws in few steps without guidance (`training.distillation`).

    steps           its steps
    teacher         the first 16 hexadecimal digits of the SHA-256 of its teacher's weights
    teacher_steps, guidance_scale   how its teacher drew
    """

    steps: int
    teacher: str
    teacher_steps: int
    guidance_scale: float

    def __str__(self) -> str:
        guided = "" if self.guidance_scale == 1 else f" guided by {self.guidance_scale:g}"
        return f"draws in {self.steps} steps without guidance what took its teacher {self.teacher_steps}{guided}"


@dataclass
class Exported:
    """A model with its tokenizer, autoencoder and settings, ready to write and draw."""

    model: Transfusion
    process: Process
    autoencoder: Autoencoder
    tokenizer: Tokenizer
    image_size: int
    """pixels along a side of the images it was trained on"""
    generation: GenerationConfig
    weights: Path | None = None
    """the file it was loaded from"""
    vocabulary: Vocabulary | None = None
    """the words it has learned to draw; None: an open world"""
    distilled: Distilled | None = None
    """how it was distilled; None: it was not"""
    quantize: str | None = None
    """8-bit format of the blocks' weights; None: not quantised"""
    compiled: bool = False
    """True if the blocks are compiled"""

    @cached_property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of the weights' file; "unsaved" without a file."""
        return "unsaved" if self.weights is None else sha256(self.weights)[:16]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes of all that decides a request's result: weights, configuration, tokenizer, autoencoder."""
        config = {"model": to_dict(self.model.config), "diffusion": to_dict(self.process.config)}
        return {
            "model": self.fingerprint,
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
            "tokenizer": self.tokenizer.fingerprint,
            "autoencoder": self.autoencoder.fingerprint,
        }


def save_export(
    folder: Path,
    weights: Mapping[str, Tensor],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    tokenizer: Tokenizer,
    autoencoder: Autoencoder,
    image_size: int,
    generation: GenerationConfig,
    card: str,
    world: Mapping[str, Any] | None = None,
    preset: str = "",
    vocabulary: Vocabulary | None = None,
    distilled: Distilled | None = None,
) -> Path:
    """Write an export folder; it appears whole or not at all.

    world: settings of the bundled scenes the model learned from, for its evaluation; None: none.
    preset: the recipe's name; commands do not choose models of the presets in `folders.TRIALS`.
    vocabulary: the words it has learned to draw; None: an open world, and no file.
    distilled: how it was distilled; None: it was not.

    Raises UserError if it cannot be written.
    """
    with atomic_dir(folder, "export") as partial:
        save_autoencoder(partial / "autoencoder", autoencoder, autoencoder.name, sample_size=image_size)
        config = {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURES[model.images]],
            "transfuse_version": __version__,
            "preset": preset,
            "model": to_dict(model),
            "diffusion": to_dict(diffusion),
            "image_size": image_size,
            "tokenizer": {"fingerprint": tokenizer.fingerprint},
            "autoencoder": {"name": autoencoder.name, "fingerprint": fingerprint(partial / "autoencoder")},
            "world": world,
        } | ({} if distilled is None else {"distilled": to_dict(distilled)})
        write_transformers_files(partial, config, model, tokenizer, autoencoder.factor, generation.max_tokens)
        write_json(partial / GENERATION, to_dict(generation))
        tensors = {name: tensor.contiguous().cpu() for name, tensor in weights.items()}
        save_file(tensors, partial / "model.safetensors", METADATA)
        tokenizer.save(partial / "tokenizer.json")
        if vocabulary is not None:
            write_json(partial / "vocabulary.json", to_dict(vocabulary))
        named = tokenizer.text_format.config()
        write_json(partial / TOKENIZER_CONFIG, named | {"chat_template": named["chat_template"] or TURNS})
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Origin:
    """The tokenizer or autoencoder that a model was trained with, as recorded in config.json."""

    fingerprint: str
    name: str = ""


@dataclass(frozen=True)
class Described:
    """The configuration of an export, without its weights. place: the paths of its parts (`folders.places`)."""

    place: dict[str, Path]
    model: ModelConfig
    diffusion: DiffusionConfig
    generation: GenerationConfig
    image_size: int
    tokenizer: Origin
    autoencoder: Origin
    world: dict[str, Any] | None
    """settings of the bundled scenes it learned from; None: none"""
    distilled: Distilled | None = None


def describe(folder: Path | str) -> Described:
    """Read an export's configuration. Raises UserError for a missing file or a folder that is not an export."""
    place = places(folder)
    if not find_export(folder).exists() and (hint := nearest(str(folder), bundled_models(), "")):
        raise UserError(f"{folder}: expected an export folder, found none{hint}")
    config = read_json(place["config.json"])
    where = str(place["config.json"])
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        model_type = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f'{where}: expected model_type "{MODEL_TYPE}", found {model_type!r}')
    generation = place[GENERATION]
    return Described(
        place,
        from_dict(ModelConfig, config.get("model"), where),
        from_dict(DiffusionConfig, config.get("diffusion"), where),
        from_dict(GenerationConfig, read_json(generation), str(generation)),
        from_dict(int, config.get("image_size"), f"{where}: image_size"),
        from_dict(Origin, config.get("tokenizer"), f"{where}: tokenizer"),
        from_dict(Origin, config.get("autoencoder"), f"{where}: autoencoder"),
        config.get("world"),
        from_dict(Distilled, config["distilled"], f"{where}: distilled") if "distilled" in config else None,
    )


def load_export(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Exported:
    """Load an export folder, in either layout, or a bundled model by name.

    Raises UserError for missing files and parts that do not fit together.
    """
    export = describe(folder)
    place = export.place
    tokenizer = _load_tokenizer(export)
    autoencoder = _load_autoencoder(export, device)
    try:
        model, process = Transfusion.on_meta(export.model, compute_dtype=dtype), Process(export.diffusion)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{place['config.json']}: model: expected one that can be built, found none ({reason})"
        ) from None
    if export.model.images == "latents":
        try:
            Sampler(process, export.generation.sampler)
        except ValueError as error:
            raise UserError(f"{place[GENERATION]}: sampler: {error}") from None
    load_weights(model, place["model.safetensors"])
    return Exported(
        model.to(device=device, dtype=dtype).eval().requires_grad_(False),
        process,
        autoencoder,
        tokenizer,
        export.image_size,
        export.generation,
        place["model.safetensors"],
        Vocabulary.load(place["vocabulary.json"]),
        export.distilled,
    )


def _load_tokenizer(export: Described) -> Tokenizer:
    """Load an export's tokenizer, which must be the one its model was trained with."""
    path, ids, expected = export.place["tokenizer.json"], export.model.text_vocab_size, export.tokenizer
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != expected.fingerprint:
        raise UserError(
            f"{path}: expected the tokenizer the model was trained with ({expected.fingerprint}), "
            f"found another ({tokenizer.fingerprint}, {tokenizer.vocab_size} ids)"
        )
    if tokenizer.vocab_size > ids:
        raise UserError(f"{path}: expected at most the model's {ids} ids, found {tokenizer.vocab_size}")
    return tokenizer


def _load_autoencoder(export: Described, device: torch.device | str) -> Autoencoder:
    """Load an export's autoencoder, which must be the one its model was trained with."""
    folder, model, expected = export.place["autoencoder"], export.model, export.autoencoder
    autoencoder = load_autoencoder(folder, device=device)
    codes = model.images == "codes"
    wanted, size = model.latent_channels, autoencoder.channels
    if codes:
        wanted, size = model.codebook_size, getattr(autoencoder, "codebook_size", None) or 0
    if autoencoder.fingerprint != expected.fingerprint or (wanted != size and model.images != "none"):
        unit = "codes" if codes else "channels"
        raise UserError(
            f'{folder}: expected the autoencoder the model was trained with, "{expected.name}" '
            f"({expected.fingerprint}, {wanted} {unit}), "
            f'found "{autoencoder.name}" ({autoencoder.fingerprint}, {size} {unit})'
        )
    return VQTokenizer(autoencoder) if codes else autoencoder


def load_weights(model: Transfusion, path: Path, strict: bool = True) -> int:
    """Load a safetensors file's weights into a model and return their number.

    strict: every name and shape must match, and the weights keep the file's dtype. Otherwise weights that do not match
    are skipped, and the others are copied into the model's dtype.

    Raises UserError for a file that is missing, damaged or does not match.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not path.is_file():
        raise UserError(f"{path}: expected the model's weights, found no file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {current_name(name): name for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in stored.items()}
            fitting = [name for name, shape in expected.items() if shapes.get(name) == shape]
            for name in sorted(expected.keys() | shapes.keys()) if strict else ():
                shape, stored_shape = expected.get(name, "none"), shapes.get(name, "none")
                if shape != stored_shape:
                    raise UserError(f"{path}: tensor {name}: expected {shape}, found {stored_shape}")
            tensors = {name: file.get_tensor(stored[name]) for name in fitting}
    except SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{path}: tensor {name}: expected floating point, found {tensor.dtype}".replace("torch.", "")
            )
    model.load_state_dict(tensors, strict=strict, assign=strict)
    return len(tensors)


def relayout(
    source: Path, folder: Path, layout: Literal["transfuse", "diffusers"], dtype: torch.dtype | None = None
) -> Path:
    """Write an export in either layout, with the files that other libraries read; an older one gets those it lacks.

    Parts are copied under the layout's names, so that a round trip changes no byte; `dtype` converts the network's
    weights. Raises UserError for a folder that is not an export or cannot be written.
    """
    export = load_export(source)  # refuses what cannot be loaded
    model = export.model.config
    with atomic_dir(folder, "export") as partial:
        for name, path in places(source).items():
            target = partial / (DIFFUSERS[name] if layout == "diffusers" else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if name == "model.safetensors":
                _copy_weights(path, target, dtype)
            elif path.is_dir():
                shutil.copytree(path, target)
            elif path.exists():
                shutil.copyfile(path, target)
        config, most = read_json(places(source)["config.json"]), export.generation.max_tokens
        if layout == "diffusers":
            write_diffusers_files(partial, model.images, export.process.config)
        else:
            write_transformers_files(partial, config, model, export.tokenizer, export.autoencoder.factor, most)
    return folder


def _copy_weights(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy a file of weights, converted to `dtype`, with today's names and the metadata that transformers needs."""
    with safe_open(source, framework="pt") as file:
        current = file.metadata() == METADATA and all(name == current_name(name) for name in file.keys())  # noqa: SIM118
    if dtype is None and current:
        shutil.copyfile(source, target)
    else:
        tensors = {current_name(name): tensor.to(dtype or tensor.dtype) for name, tensor in load_file(source).items()}
        save_file(tensors, target, METADATA)
