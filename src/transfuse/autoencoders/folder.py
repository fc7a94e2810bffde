"""Folders of autoencoders: diffusers' own layout, so that each opens what the other wrote.

    config.json                              the fields of `AutoencoderKL` or `VQModel`
    diffusion_pytorch_model.safetensors      the weights

A config.json of `{"kind": "pixels"}` is the identity autoencoder. Weights are safetensors: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import from_dict, read_json
from ..errors import UserError
from ..io import atomic_dir
from .autoencoder import Autoencoder, ImageAutoencoder, VQTokenizer
from .config import AutoencoderConfig
from .pixels import Pixels

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = {"AutoencoderKL": "kl", "VQModel": "vq"}
NORMALISATION = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
FORMER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""attention names in files written before diffusers 0.17, such as Stable Diffusion's first ones"""


def bundled() -> tuple[str, ...]:
    """Return the names of the bundled autoencoders."""
    return tuple(sorted(path.name for path in _weights().iterdir() if path.is_dir())) if _weights().is_dir() else ()


def _weights() -> Path:
    return Path(str(resources.files("transfuse"))) / "autoencoders" / "weights"


def open_autoencoder(name: str, device: torch.device | str = "cpu") -> Autoencoder:
    """Open an autoencoder by name: "pixels", one of `bundled()`, or the path of a folder. Raises UserError."""
    if name == "pixels":
        return Pixels()
    if name in bundled():
        return load_autoencoder(_weights() / name, device=device)
    if not Path(name).is_dir():
        known = ", ".join(["pixels", *bundled()])
        raise UserError(f'autoencoder: expected {known} or a folder with an autoencoder, found "{name}"')
    return load_autoencoder(Path(name), device=device)


def load_autoencoder(
    folder: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """Load a folder, ours or diffusers'. Raises UserError for files that are missing or do not fit."""
    folder = Path(folder)
    values = read_json(folder / "config.json")
    where = folder / "config.json"
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected the fields of an autoencoder, found a {type(values).__name__}")
    if values.get("kind") == "pixels":
        return Pixels()
    if values.get("_class_name") not in tuple(CLASSES):
        raise UserError(f"{where}: _class_name: expected {' or '.join(CLASSES)}, found {values.get('_class_name')!r}")
    try:
        with torch.device("meta"):
            autoencoder = ImageAutoencoder(from_diffusers(values, str(where)))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: expected an autoencoder that can be built, found none ({reason})") from None
    load_weights(autoencoder, folder / WEIGHTS)
    autoencoder.name = _name(folder)
    autoencoder.fingerprint = fingerprint(folder)
    autoencoder = autoencoder.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def save_autoencoder(
    folder: Path, autoencoder: Autoencoder, name: str, dtype: torch.dtype | None = None, sample_size: int = 256
) -> None:
    """Write an autoencoder's folder; it appears whole or not at all.

    dtype: dtype of the stored weights; None keeps theirs. sample_size: side of its training images, in pixels.

    Raises UserError if it cannot be written.
    """
    with atomic_dir(folder, "autoencoder") as partial:
        values: dict[str, Any] = {"kind": "pixels"}
        autoencoder = autoencoder.inner if isinstance(autoencoder, VQTokenizer) else autoencoder
        if not isinstance(autoencoder, Pixels):
            assert isinstance(autoencoder, ImageAutoencoder)
            state = autoencoder.state_dict().items()
            tensors = {key: value.detach().cpu().to(dtype or value.dtype).contiguous() for key, value in state}
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt", "name": name})
            values = to_diffusers(autoencoder.config, sample_size)
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _name(folder: Path) -> str:
    """Return the name stored with the weights, which a copied folder keeps, or the folder's name."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return (file.metadata() or {}).get("name", folder.resolve().name)


def fingerprint(folder: Path) -> str:
    """Return 12 hexadecimal digits of the hash of a folder's weights and statistics; "pixels" without weights."""
    path = folder / WEIGHTS
    if not path.is_file():
        return "pixels"
    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:  # tensors, not bytes, because the header's order varies
        for name in sorted(file.keys()):
            digest.update(name.encode())
            digest.update(file.get_tensor(name).contiguous().view(-1).view(torch.uint8).numpy())
    values = read_json(folder / "config.json")
    digest.update(json.dumps([values.get(name) for name in NORMALISATION]).encode())
    return digest.hexdigest()[:12]


def from_diffusers(values: dict[str, Any], where: str) -> AutoencoderConfig:
    """Return the configuration for diffusers' fields. Raises UserError for networks that ours cannot be."""
    kind = CLASSES[values["_class_name"]]
    for name in ("block_out_channels", "down_block_types", "up_block_types", "latents_mean", "latents_std"):
        if not isinstance(values.get(name, []), list | None):
            raise UserError(f"{where}: {name}: expected a list, found {values[name]!r:.80}")
    widths = tuple(values.get("block_out_channels", (64,)))
    for field, expected in (("in_channels", 3), ("out_channels", 3), ("act_fn", "silu"), ("norm_type", "group")):
        if values.get(field, expected) != expected:
            raise UserError(f"{where}: {field}: expected {expected!r}, found {values[field]!r}")
    ends = {
        "down": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    }
    attended = {}
    for way, known in ends.items():
        types = values.get(f"{way}_block_types", known[:1])
        if len(types) != len(widths) or any(name not in known for name in types):
            raise UserError(
                f"{where}: {way}_block_types: expected {len(widths)} of {' or '.join(known)}, found {types}"
            )
        numbers = [number for number, name in enumerate(types) if name == known[1]]
        attended[way] = sorted(numbers if way == "down" else [len(widths) - 1 - number for number in numbers])
    if attended["down"] != attended["up"]:
        raise UserError(
            f"{where}: up_block_types: expected attention at the levels of down_block_types, found it elsewhere"
        )
    latent_channels = values.get("latent_channels", 4 if kind == "kl" else 3)
    fields = {
        "kind": kind,
        "widths": widths,
        "blocks": values.get("layers_per_block", 1),
        "latent_channels": latent_channels,
        "groups": values.get("norm_num_groups", 32),
        "attended": attended["down"],
        "middle_attention": values.get("mid_block_add_attention", True),
        "quant_conv": values.get("use_quant_conv", True),
        "post_quant_conv": values.get("use_post_quant_conv", True),
        "codebook_size": values.get("num_vq_embeddings", 256),
        "code_channels": values.get("vq_embed_dim") or latent_channels,
        "scaling_factor": values.get("scaling_factor", 0.18215),
        "shift_factor": values.get("shift_factor") or 0.0,
        "latents_mean": values.get("latents_mean"),
        "latents_std": values.get("latents_std"),
    }
    return from_dict(AutoencoderConfig, fields, where)


def to_diffusers(config: AutoencoderConfig, sample_size: int) -> dict[str, Any]:
    """Return diffusers' fields for a configuration."""
    levels = range(len(config.widths))
    down = ["AttnDownEncoderBlock2D" if level in config.attended else "DownEncoderBlock2D" for level in levels]
    up = ["AttnUpDecoderBlock2D" if level in config.attended else "UpDecoderBlock2D" for level in reversed(levels)]
    fields = {
        "_class_name": "AutoencoderKL" if config.kind == "kl" else "VQModel",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": down,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "mid_block_add_attention": config.middle_attention,
        "norm_num_groups": config.groups,
        "out_channels": 3,
        "sample_size": sample_size,
        "scaling_factor": config.scaling_factor,
        "up_block_types": up,
    }
    statistics = {
        name: None if getattr(config, name) is None else list(getattr(config, name))
        for name in ("latents_mean", "latents_std")
    }
    if config.kind == "vq":
        return {
            **fields,
            "num_vq_embeddings": config.codebook_size,
            "vq_embed_dim": config.code_channels,
            "norm_type": "group",
            "shift_factor": config.shift_factor or None,
            **statistics,
        }
    return {
        **fields,
        "force_upcast": False,
        "shift_factor": config.shift_factor or None,
        "use_post_quant_conv": config.post_quant_conv,
        "use_quant_conv": config.quant_conv,
        **statistics,
    }


def load_weights(autoencoder: ImageAutoencoder, path: Path) -> None:
    """Load a file's weights into a network on the meta device. Raises UserError unless names and shapes match."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise UserError(
            f"{path}: expected safetensors weights, found {'only a pickled .bin' if pickled else 'no file'}"
        )
    expected = {name: tuple(value.shape) for name, value in autoencoder.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {_present_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None
    for name in sorted(expected.keys() | tensors.keys()):
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape is not None and len(shape) == 4 and len(expected.get(name, ())) == 2 and shape[2:] == (1, 1):
            tensors[name] = tensors[name][:, :, 0, 0]  # attention as 1 x 1 convolutions, in converted files
            shape = shape[:2]
        if shape != expected.get(name):
            raise UserError(f"{path}: tensor {name}: expected {expected.get(name, 'none')}, found {shape or 'none'}")
        if not tensors[name].is_floating_point():
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise UserError(f"{path}: tensor {name}: expected floating point, found {dtype}")
    autoencoder.load_state_dict({name: tensors[name] for name in expected}, assign=True)


def _present_name(name: str) -> str:
    for former, present in FORMER_NAMES.items():
        name = name.replace(former, present)
    return name
