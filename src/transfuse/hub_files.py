"""Files of an export that only other libraries read: transformers opens its layout, diffusers the other.

config.json                    also auto_map, and ids by transformers' names
modeling_transfusion.py        the model and processor that auto_map names (`remote_code`)
generation_config.json         transformers' own; ours is transfuse_generation.json
processor_config.json

model_index.json  scheduler/   diffusers'; its `vae` is our autoencoder
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .diffusion import DiffusionConfig
from .errors import UserError
from .folders import DIFFUSERS, INDEX, MODELLING, PIPELINE
from .io import sha256
from .model import ModelConfig
from .sequence import Tokenizer

ARCHITECTURES = {
    "latents": "TransfusionForConditionalGeneration",
    "codes": "TransfusionChameleon",
    "none": "TransfusionForCausalLM",
}
"""by `ModelConfig.images`"""
REMOTE_CODE = Path(__file__).with_name("remote_code")
AUTO_MAP = {
    "AutoConfig": "modeling_transfusion.TransfusionConfig",
    "AutoProcessor": "modeling_transfusion.TransfusionProcessor",
    "AutoModel": "modeling_transfusion.TransfusionForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_transfusion.TransfusionForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_transfusion.TransfusionForConditionalGeneration",
}
"""module and class of `remote_code` by transformers' class"""


def write_transformers_files(
    folder: Path, config: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer, factor: int, max_tokens: int
) -> None:
    """Write config.json, with transformers' fields next to ours, and the other files that transformers reads.

    factor: pixels per latent element along a side. max_tokens: the model's own number of tokens to write.
    """
    ends = list(tokenizer.ends) if len(tokenizer.ends) > 1 else tokenizer.eos
    names = {"bos_token_id": tokenizer.bos, "eos_token_id": ends, "pad_token_id": tokenizer.eos}
    images = {"boi_token_id": tokenizer.boi, "eoi_token_id": tokenizer.eoi}
    write_json(folder / "config.json", config | {"auto_map": AUTO_MAP} | names | images)
    unwritten = {tokenizer.bos, tokenizer.eoi, *range(tokenizer.vocab_size, model.vocab_size)}
    unwritten -= {*tokenizer.ends}  # some models' texts begin with a token that also ends them
    if model.images == "none":
        unwritten.add(tokenizer.boi)
    else:  # where this model would draw, transformers' `generate` stops
        names = names | {"eos_token_id": [*tokenizer.ends, tokenizer.boi]}
    generation = names | {"max_new_tokens": max_tokens, "do_sample": False, "suppress_tokens": sorted(unwritten)}
    write_json(folder / "generation_config.json", generation)
    grid = config["image_size"] // factor // (1 if model.images == "codes" else model.patch_size)
    processor = {
        "processor_class": "TransfusionProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        "image_size": config["image_size"],
        "image_grid": grid,
        "begin_token": tokenizer.text_format.bos,
    }
    write_json(folder / "processor_config.json", processor)
    shutil.copyfile(REMOTE_CODE / MODELLING, folder / MODELLING)


def write_diffusers_files(folder: Path, images: str, diffusion: DiffusionConfig) -> None:
    """Write model_index.json and the scheduler into a folder that has its other parts.

    images: `ModelConfig.images`. Raises UserError for a process that no scheduler of diffusers describes.
    """
    scheduler = _scheduler(diffusion)
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8")).get("_class_name")
    index = {
        "_class_name": "TransfusionPipeline",
        "transformer": ["transfuse", ARCHITECTURES[images]],
        "vae": ["diffusers", vae] if vae else ["transfuse", "Pixels"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "tokenizer": ["tokenizers", "Tokenizer"],
        "weights": sha256(folder / DIFFUSERS["model.safetensors"])[:16],  # `pipeline.py` compares it
    }
    (folder / "scheduler").mkdir()
    shutil.copyfile(REMOTE_CODE / PIPELINE, folder / PIPELINE)
    write_json(folder / INDEX, index)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)


def _scheduler(config: DiffusionConfig) -> dict[str, Any]:
    """Return the process as a configuration of diffusers' schedulers.

    Raises UserError for a flow schedule whose network does not predict the velocity, which none of them can read.
    """
    if config.schedule == "flow":
        if config.prediction != "v":
            raise UserError(f"prediction: expected v for diffusers' flow schedulers, found {config.prediction!r}")
        name = "FlowMatchEulerDiscreteScheduler"
        return {"_class_name": name, "num_train_timesteps": config.timesteps, "shift": config.shift}
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


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
