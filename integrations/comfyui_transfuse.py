"""Transfuse in ComfyUI: load a model, draw, edit and caption. Copy or link this file into ComfyUI/custom_nodes.

The package transfuse must be installed in ComfyUI's Python (`pip install .` in a checkout of its repository).
Images are ComfyUI's: float32 `[image, row, column, 3]`, 0 to 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import transfuse
from transfuse.images import fit

SAMPLING = {
    "seed": ("INT", {"default": 0, "min": 0, "max": 2**31 - 1}),
    "steps": ("INT", {"default": 0, "min": 0, "max": 1000}),
    "guidance": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 100.0, "step": 0.1}),
}
"""the inputs that every drawing has; 0 steps, or a guidance of 0, are the model's own"""


def to_comfy(pipe: Any, prompts: list[str], seed: int, steps: int, guidance: float, **options: Any) -> torch.Tensor:
    """Draw prompts and return ComfyUI's images; 0 steps, or a guidance of 0, are the model's own."""
    options |= {"num_inference_steps": steps or None, "guidance_scale": guidance or None}
    images = pipe(prompts, generator=seed, output_type="pt", **options).images
    return torch.stack(images).permute(0, 2, 3, 1)


def from_comfy(pipe: Any, images: torch.Tensor) -> list[np.ndarray]:
    """Return uint8 images of the model's size: the middle square, resized."""
    pixels = (images.cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [fit(image, pipe.exported.image_size) for image in pixels]


class Node:
    """The attributes that ComfyUI reads of every node."""

    CATEGORY, FUNCTION = "transfuse", "run"


class LoadModel(Node):
    """Open a bundled model by name, an export folder, or `org/name` on the Hub."""

    RETURN_TYPES = ("TRANSFUSE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        kinds = (["cpu", "cuda", "mps"], {"default": "cuda" if torch.cuda.is_available() else "cpu"})
        return {"required": {"model": ("STRING", {"default": "small-64"}), "device": kinds}}

    def run(self, model: str, device: str) -> tuple[Any]:
        return (transfuse.load(model, device=device),)


class Draw(Node):
    """Draw a prompt `count` times, with consecutive seeds; an empty negative prompt is none."""

    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"prompt": ("STRING", {"multiline": True}), "negative": ("STRING", {"default": ""})}
        count = {"count": ("INT", {"default": 1, "min": 1, "max": 64})}
        return {"required": {"model": ("TRANSFUSE",), **text, **SAMPLING, **count}}

    def run(
        self, model: Any, prompt: str, negative: str, seed: int, steps: int, guidance: float, count: int
    ) -> tuple[Any]:
        return (to_comfy(model, [prompt] * count, seed, steps, guidance, negative_prompt=negative or None),)


class Edit(Node):
    """Change each image as an instruction says."""

    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        inputs = {"image": ("IMAGE",), "instruction": ("STRING", {"multiline": True})}
        return {"required": {"model": ("TRANSFUSE",), **inputs, **SAMPLING}}

    def run(
        self, model: Any, image: torch.Tensor, instruction: str, seed: int, steps: int, guidance: float
    ) -> tuple[Any]:
        images = from_comfy(model, image)
        edited = [to_comfy(model, [instruction], seed, steps, guidance, image=pixels) for pixels in images]
        return (torch.cat(edited),)


class Caption(Node):
    """Describe each image, a line each."""

    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("TRANSFUSE",), "image": ("IMAGE",)}}

    def run(self, model: Any, image: torch.Tensor) -> tuple[str]:
        return ("\n".join(model.caption(from_comfy(model, image))),)


NODE_CLASS_MAPPINGS = {f"Transfuse{node.__name__}": node for node in (LoadModel, Draw, Edit, Caption)}
NODE_DISPLAY_NAME_MAPPINGS = {name: f"Transfuse: {name.removeprefix('Transfuse')}" for name in NODE_CLASS_MAPPINGS}
