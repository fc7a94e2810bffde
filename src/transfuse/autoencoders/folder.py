"""Folders of autoencoders: diffusers' own layout, so that each opens what the other wrote.

    config.json                              the fields of `AutoencoderKL` or `VQModel`
    diffusion_pytorch_model.safetensors      the weights; or of a variant, diffusion_pytorch_model.fp16.safetensors

A whole model's folder serves, too: its autoencoder is in `vae/` (diffusers' layout) or `autoencoder/` (an export). A
config.json of `{"kind": "pixels"}` is the identity autoencoder. Weights are safetensors: nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import from_dict, read_json
from ..devices import on_meta
from ..errors import UserError
from ..folders import atomic_dir
from .autoencoder import Autoencoder, ImageAutoencoder, Pixels, VQTokenizer
from .network import AutoencoderConfig

BUNDLED = Path(__file__).with_name("weights")
WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS = ("", ".fp32", ".bf16", ".fp16")
"""of one autoencoder's weights, the most exact first; any other comes after these, in the order of names"""
CLASSES = {"AutoencoderKL": "kl", "VQModel": "vq"}
FORMER_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
"""attention names in files written before diffusers 0.17, such as Stable Diffusion's first ones"""
FIELDS: dict[str, tuple[str, Any]] = {
    "blocks": ("layers_per_block", 1),
    "groups": ("norm_num_groups", 32),
    "middle_attention": ("mid_block_add_attention", True),
    "scaling_factor": ("scaling_factor", 0.18215),
    "latents_mean": ("latents_mean", None),
    "latents_std": ("latents_std", None),
}
"""our fields: the name in diffusers, and the value where a file has none"""
KL_FIELDS = {"quant_conv": ("use_quant_conv", True), "post_quant_conv": ("use_post_quant_conv", True)}
FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
"""fields of diffusers that have one value here"""
PLAIN = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
ATTENDED = {"down": "AttnDownEncoderBlock2D", "up": "AttnUpDecoderBlock2D"}
"""block types of diffusers, without and with attention"""


def bundled() -> tuple[str, ...]:
    """Return the names of the bundled autoencoders."""
    return tuple(sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())) if BUNDLED.is_dir() else ()


def open_autoencoder(name: str) -> Autoencoder:
    """Open an autoencoder by name: "pixels", one of `bundled()`, or the path of a folder. Raises UserError."""
    if name == "pixels":
        return Pixels()
    folder = BUNDLED / name if name in bundled() else Path(name)
    if not folder.is_dir():
        known = ", ".join(["pixels", *bundled()])
        raise UserError(f'autoencoder: expected {known} or a folder with an autoencoder, found "{name}"')
    return load_autoencoder(folder)


def load_autoencoder(folder: Path | str, device: torch.device | str = "cpu") -> Autoencoder:
    """Load a folder, ours or diffusers', of an autoencoder or of a model that has one; weights of any floating dtype.

    Raises UserError for files that are missing or do not fit. The name is the one stored with the weights, which a
    copied folder keeps, or the folder's.
    """
    folder = Path(folder)
    usual_name, own = folder.resolve().name, folder / "config.json"
    values = read_json(own) if own.is_file() else {}
    if not isinstance(values, dict) or not ("kind" in values or values.get("_class_name") in tuple(CLASSES)):
        parts = [folder / name for name in ("vae", "autoencoder")]  # a whole model's folder
        folder = next((part for part in parts if (part / "config.json").is_file()), folder)
    path, where = _weights_file(folder), folder / "config.json"
    values = read_json(where)
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected the fields of an autoencoder, found a {type(values).__name__}")
    if values.get("kind") == "pixels":
        return Pixels()
    try:
        config = from_diffusers(values, str(where))
        tensors, metadata = _read_weights(path)
        with on_meta():
            name = metadata.get("name", usual_name)
            autoencoder = ImageAutoencoder(config, name, _digest(tensors, values))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: expected an autoencoder that can be built, found none ({reason})") from None
    expected = {name: tuple(value.shape) for name, value in autoencoder.state_dict().items()}
    fitted = {}
    for name, tensor in tensors.items():
        for former, present in FORMER_NAMES.items():
            name = name.replace(former, present)
        if tensor.dim() == 4 and len(expected.get(name, ())) == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]  # attention as 1 x 1 convolutions, in converted files
        fitted[name] = tensor
    for name in sorted(expected.keys() | fitted.keys()):
        shape = tuple(fitted[name].shape) if name in fitted else None
        if shape != expected.get(name):
            raise UserError(f"{path}: tensor {name}: expected {expected.get(name, 'none')}, found {shape or 'none'}")
        if not fitted[name].is_floating_point():
            dtype = str(fitted[name].dtype).removeprefix("torch.")
            raise UserError(f"{path}: tensor {name}: expected floating point, found {dtype}")
    autoencoder.load_state_dict(fitted, assign=True)
    autoencoder = autoencoder.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
    return autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _weights_file(folder: Path) -> Path:
    """Return the path of a folder's weights, of the most exact variant there is; it may not exist."""
    stem, _, ending = WEIGHTS.rpartition(".")
    variants = [f".{path.name[len(stem) + 1 : -len(ending) - 1]}" for path in folder.glob(f"{stem}.*.{ending}")]
    names = [f"{stem}{variant}.{ending}" for variant in (*VARIANTS, *sorted(variants))]
    return next((folder / name for name in names if (folder / name).is_file()), folder / WEIGHTS)


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
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def fingerprint(folder: Path) -> str:
    """Return 12 hexadecimal digits of the hash of a folder's weights and statistics; "pixels" without weights."""
    path = _weights_file(folder)
    return _digest(_read_weights(path)[0], read_json(folder / "config.json")) if path.is_file() else "pixels"


def _digest(tensors: dict[str, Tensor], values: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):  # tensors, not the file, because the order in its header varies
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    statistics = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    digest.update(json.dumps([values.get(name) for name in statistics]).encode())
    return digest.hexdigest()[:12]


def from_diffusers(values: dict[str, Any], where: str) -> AutoencoderConfig:
    """Return the configuration for diffusers' fields. Raises UserError for networks that ours cannot be."""
    if values.get("_class_name") not in tuple(CLASSES):
        raise UserError(f"{where}: _class_name: expected {' or '.join(CLASSES)}, found {values.get('_class_name')!r}")
    kind = CLASSES[values["_class_name"]]
    for name in ("block_out_channels", "down_block_types", "up_block_types", "latents_mean", "latents_std"):
        if not isinstance(values.get(name, []), list | None):
            raise UserError(f"{where}: {name}: expected a list, found {values[name]!r:.80}")
    widths = tuple(values.get("block_out_channels", (64,)))
    for name, expected in {**FIXED, "norm_type": "group"}.items():
        if values.get(name, expected) != expected:
            raise UserError(f"{where}: {name}: expected {expected!r}, found {values[name]!r}")
    attended = {}
    for way in ("down", "up"):
        types = values.get(f"{way}_block_types", [PLAIN[way]])
        known = PLAIN[way], ATTENDED[way]
        if len(types) != len(widths) or any(name not in known for name in types):
            raise UserError(
                f"{where}: {way}_block_types: expected {len(widths)} of {' or '.join(known)}, found {types}"
            )
        finest_first = types if way == "down" else types[::-1]
        attended[way] = [level for level, name in enumerate(finest_first) if name == ATTENDED[way]]
    if attended["down"] != attended["up"]:
        raise UserError(
            f"{where}: up_block_types: expected attention at the levels of down_block_types, found it elsewhere"
        )
    latent_channels = values.get("latent_channels", 4 if kind == "kl" else 3)
    fields = {
        "kind": kind,
        "widths": widths,
        "attended": attended["down"],
        "latent_channels": latent_channels,
        "codebook_size": values.get("num_vq_embeddings", 256),
        "code_channels": values.get("vq_embed_dim") or latent_channels,
        "shift_factor": values.get("shift_factor") or 0.0,
        **{field: values.get(name, default) for field, (name, default) in {**FIELDS, **KL_FIELDS}.items()},
    }
    return from_dict(AutoencoderConfig, fields, where)


def to_diffusers(config: AutoencoderConfig, sample_size: int) -> dict[str, Any]:
    """Return diffusers' fields for a configuration, in the order of their names."""
    levels = [ATTENDED if level in config.attended else PLAIN for level in range(len(config.widths))]
    fields = {name: getattr(config, field) for field, (name, _) in FIELDS.items()}
    fields |= {
        **FIXED,
        "block_out_channels": config.widths,
        "down_block_types": [types["down"] for types in levels],
        "up_block_types": [types["up"] for types in reversed(levels)],
        "latent_channels": config.latent_channels,
        "sample_size": sample_size,
        "shift_factor": config.shift_factor or None,
    }
    if config.kind == "kl":
        fields |= {name: getattr(config, field) for field, (name, _) in KL_FIELDS.items()}
        fields |= {"_class_name": "AutoencoderKL", "force_upcast": False}
    else:
        fields |= {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.code_channels}
        fields |= {"_class_name": "VQModel", "norm_type": "group"}
    return dict(sorted(fields.items()))


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and metadata. Raises UserError where it is missing or no safetensors."""
    if not path.is_file():
        given = "only a pickled .bin" if path.with_suffix(".bin").is_file() else "no file"
        raise UserError(f"{path}: expected safetensors weights, found {given}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: expected a safetensors file, found something else ({error})") from None
