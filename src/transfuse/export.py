"""Exports: the folder that users load and share.

    config.json               model_type, architectures, preset, network, diffusion process, image size, what world it
                              knows, fingerprints of tokenizer and autoencoder
    model.safetensors         the averaged weights
    tokenizer.json            autoencoder/        generation_config.json        README.md (model card)

The same files in diffusers' layout, whose `vae` and `scheduler` diffusers opens, are a model, too (`relayout`):

    model_index.json    transformer/    vae/    scheduler/    tokenizer/

safetensors only: nothing a user downloads is unpickled. The tokenizer and the autoencoder a model was trained with
travel with it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .autoencoders import Autoencoder, Coded, load_autoencoder, save_autoencoder
from .autoencoders.folder import fingerprint
from .configuration import from_dict, read_json, to_dict
from .diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from .errors import UserError
from .folders import DIFFUSERS, INDEX, MODEL_TYPE, places
from .io import atomic_dir, sha256
from .log import logger
from .model import ModelConfig, Transfusion
from .model.transfusion import current_name
from .sequence import Tokenizer
from .version import __version__

ARCHITECTURES = {
    "latents": "TransfusionForConditionalGeneration",
    "codes": "TransfusionChameleon",
    "none": "TransfusionForCausalLM",
}
"""by what the model's images are made of"""
MOST = 1000.0
"""of a temperature or a guidance: beyond any use, and far from where numbers end"""


@dataclass(frozen=True)
class GenerationConfig:
    """What a model does unless told otherwise."""

    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpmpp", steps=20))
    guidance_scale: float = 3.0
    guidance_interval: tuple[float, float] | None = None
    """noise levels at which a drawing is guided, as in `Request`; None: at all"""
    temperature: float = 0.0
    """of the text; 0 is greedy, as in the paper's evaluation"""
    top_p: float = 1.0
    code_temperature: float = 1.0
    """of an image's codes, for a model that draws by codes; a greedy picture is a flat one"""
    code_top_p: float = 1.0
    max_tokens: int = 64

    def __post_init__(self) -> None:
        """Raises ValueError, naming the field, for a value that no request may have."""
        wrong = out_of_range(self)
        if wrong:
            raise ValueError(wrong)


def out_of_range(ways: Any) -> str:
    """What can not be of a GenerationConfig, or of a Request, whose fields have the same names: the field, what was
    expected and found; "" where all can."""
    for name in ("temperature", "code_temperature", "guidance_scale"):
        if not 0 <= getattr(ways, name) <= MOST:
            return f"{name}: expected 0 to {MOST:g}, found {getattr(ways, name)}"
    for name in ("top_p", "code_top_p"):
        if not 0 < getattr(ways, name) <= 1:
            return f"{name}: expected a share above 0, at most 1, found {getattr(ways, name)}"
    if ways.max_tokens < 0:
        return f"max_tokens: expected at least 0, found {ways.max_tokens}"
    if (interval := ways.guidance_interval) is not None and not 0 <= interval[0] <= interval[1] <= 1:
        return f"guidance_interval: expected shares 0 <= low <= high <= 1, found {interval}"
    return ""


@dataclass
class Exported:
    """A model with all it needs to write and draw."""

    model: Transfusion
    process: Process
    autoencoder: Autoencoder
    tokenizer: Tokenizer
    image_size: int
    """pixels along a side of the images it was trained on"""
    generation: GenerationConfig
    weights: Path | None = None
    """the file it was loaded from"""
    quantize: str | None = None
    """the eight bits that the blocks' weights were put into; None: they are as loaded"""
    compiled: bool = False
    """whether the blocks are compiled"""

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits of the hash of its weights' file; "unsaved" where there is none."""
        return "unsaved" if self.weights is None else sha256(self.weights)[:16]

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Of everything that decides what the model makes of a request: its weights ("model"), its configuration and
        that of its diffusion process, its tokenizer, its autoencoder."""
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
) -> Path:
    """Write an export folder; it appears whole or not at all. world: the settings of the bundled world's scenes that it
    learned from, so that it is asked about them; None: of none. preset: the recipe's name, by which commands know a
    model that was only tried (`folders.TRIALS`). Raises UserError where it can not be written."""
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
        }
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", to_dict(generation))
        save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, partial / "model.safetensors")
        tokenizer.save(partial / "tokenizer.json")
        (partial / "README.md").write_text(card)
    return folder


@dataclass(frozen=True)
class Origin:
    """The tokenizer or the autoencoder that a model was trained with, as the export's config.json records it."""

    fingerprint: str
    name: str = ""


@dataclass(frozen=True)
class Described:
    """What an export's files say of it, its weights apart. place: where each of them is (`folders.places`)."""

    place: dict[str, Path]
    model: ModelConfig
    diffusion: DiffusionConfig
    generation: GenerationConfig
    image_size: int
    tokenizer: Origin | None
    """None: the export was written before this was recorded"""
    autoencoder: Origin
    world: dict[str, Any] | None
    """settings of the bundled world that it learned from; None: of none, or not said"""


def describe(folder: Path | str) -> Described:
    """Read an export's configuration. Raises UserError, one line, for what is missing or no export."""
    place = places(Path(folder))
    config = read_json(place["config.json"])
    where = str(place["config.json"])
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise UserError(f'{where}: expected model_type "{MODEL_TYPE}", found {found!r}')
    generation = place["generation_config.json"]
    return Described(
        place,
        from_dict(ModelConfig, config.get("model"), where),
        from_dict(DiffusionConfig, config.get("diffusion"), where),
        from_dict(GenerationConfig, read_json(generation), str(generation)),
        from_dict(int, config.get("image_size"), f"{where}: image_size"),
        from_dict(Origin | None, config.get("tokenizer"), f"{where}: tokenizer"),  # type: ignore[arg-type]
        from_dict(Origin, config.get("autoencoder"), f"{where}: autoencoder"),
        config.get("world"),
    )


def load_export(folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Exported:
    """Load an export folder, ours or in diffusers' layout, or a bundled model by its name. Raises UserError, one line,
    for what is missing or does not fit."""
    found = describe(folder)
    place = found.place
    tokenizer = _its_tokenizer(found)
    autoencoder = _its_autoencoder(found, device)
    try:
        model, process = Transfusion.on_meta(found.model, compute_dtype=dtype), Process(found.diffusion)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{place['config.json']}: model: expected one that can be built, found none ({reason})"
        ) from None
    if found.model.images == "latents":
        try:
            Sampler(process, found.generation.sampler)
        except ValueError as error:
            raise UserError(f"{place['generation_config.json']}: sampler: {error}") from None
    load_weights(model, place["model.safetensors"])
    return Exported(
        model.to(device=device, dtype=dtype).eval().requires_grad_(False),
        process,
        autoencoder,
        tokenizer,
        found.image_size,
        found.generation,
        place["model.safetensors"],
    )


def _its_tokenizer(export: Described) -> Tokenizer:
    """The tokenizer of an export, which must be the one its model was trained with: another one's ids mean nothing."""
    path, ids, expected = export.place["tokenizer.json"], export.model.text_vocab_size, export.tokenizer
    found = Tokenizer.load(path)
    if expected is not None and found.fingerprint != expected.fingerprint:
        raise UserError(
            f"{path}: expected the tokenizer the model was trained with ({expected.fingerprint}), "
            f"found another ({found.fingerprint}, {found.vocab_size} ids)"
        )
    if found.vocab_size > ids:
        raise UserError(f"{path}: expected at most the model's {ids} ids, found {found.vocab_size}")
    if expected is None and found.vocab_size < ids:
        logger.info(
            f"{path}: {found.vocab_size} ids for the model's {ids}; config.json does not record the right tokenizer"
        )
    return found


def _its_autoencoder(export: Described, device: torch.device | str) -> Autoencoder:
    """The autoencoder beside a model, which must be the one it was trained with: another one's latents mean nothing."""
    folder, model, expected = export.place["autoencoder"], export.model, export.autoencoder
    found = load_autoencoder(folder, device=device)
    coded = model.images == "codes"
    wanted, there = model.latent_channels, found.channels
    if coded:
        wanted, there = model.codebook_size, getattr(found, "codebook_size", None) or 0
    if found.fingerprint != expected.fingerprint or (wanted != there and model.images != "none"):
        unit = "codes" if coded else "channels"
        raise UserError(
            f'{folder}: expected the autoencoder the model was trained with, "{expected.name}" '
            f"({expected.fingerprint}, {wanted} {unit}), "
            f'found "{found.name}" ({found.fingerprint}, {there} {unit})'
        )
    return Coded(found) if coded else found


def load_weights(model: Transfusion, path: Path, strict: bool = True) -> int:
    """Put a safetensors file's weights, in its dtype, in place of a model's; how many.

    Every name must match, and every shape; or, where not strict, those are left out that do not, and the others put
    into the model's own, in its dtype.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not path.is_file():
        raise UserError(f"{path}: expected the model's weights, found no file")
    try:
        with safe_open(path, framework="pt") as file:
            stored = {current_name(name): name for name in file.keys()}  # noqa: SIM118
            found = {name: tuple(file.get_slice(key).get_shape()) for name, key in stored.items()}
            fitting = [name for name, shape in expected.items() if found.get(name) == shape]
            for name in sorted(expected.keys() | found.keys()) if strict else ():
                if expected.get(name) != found.get(name):
                    raise UserError(
                        f"{path}: tensor {name}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
                    )
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
    """Write an export in the other layout, or the same: the very files, under other names, so that there and back
    nothing changes; but for the network's weights where they are to have another dtype. Raises UserError where it is
    none, or can not be written."""
    found = load_export(source)  # what can not be loaded is not passed on
    with atomic_dir(folder, "export") as partial:
        for name, path in places(source).items():
            target = partial / (DIFFUSERS[name] if layout == "diffusers" else name)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            if name == "model.safetensors" and dtype is not None:
                save_file({key: value.to(dtype) for key, value in load_file(path).items()}, target)
            elif path.exists():
                copy(path, target)
        if layout == "diffusers":
            (partial / "scheduler").mkdir()
            _write_json(partial / INDEX, _model_index(ARCHITECTURES[found.model.config.images], partial / "vae"))
            _write_json(partial / "scheduler" / "scheduler_config.json", _scheduler(found.process.config))
    return folder


def _model_index(architecture: str, vae: Path) -> dict[str, Any]:
    own = json.loads((vae / "config.json").read_text()).get("_class_name")
    return {
        "_class_name": "TransfusionPipeline",
        "transformer": ["transfuse", architecture],
        "vae": ["diffusers", own] if own else ["transfuse", "Pixels"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["tokenizers", "Tokenizer"],
    }


def _scheduler(config: DiffusionConfig) -> dict[str, Any]:
    """The process as diffusers' schedulers know it: any of them can be made of this."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": config.timesteps,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}[config.prediction],
        "timestep_spacing": "trailing",
        "clip_sample": config.clip_x0 is not None,
        "clip_sample_range": config.clip_x0 or 1.0,
        "set_alpha_to_one": True,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
