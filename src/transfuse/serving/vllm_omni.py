"""A plug-in for vLLM-Omni, which then serves exports in diffusers' layout (`transfuse export --format diffusers`).

vLLM-Omni finds `register` by the entry point group `vllm_omni.general_plugins` and calls it in each of its processes.
Its scheduler takes a request at a time through the pipeline, whole; nothing of its engine's caches or parallel modes is
used. After the interface of vLLM-Omni 0.30: `register_diffusion_model`, `OmniDiffusionRequest`, `DiffusionOutput`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..inference import TransfusionPipeline

ARCHITECTURE = "TransfusionPipeline"
"""`_class_name` in an export's model_index.json"""


def register() -> None:
    """Make the architecture known; nothing where vLLM-Omni is not installed. May be called any number of times."""
    try:
        from vllm_omni.diffusion.registry import register_diffusion_model
    except ImportError:
        return
    register_diffusion_model(ARCHITECTURE, __name__, OmniTransfusion.__name__)


class OmniTransfusion(nn.Module):
    """The pipeline as vLLM-Omni builds and calls it. It loads the export itself, and has no parameters to be filled."""

    supports_step_execution = False
    weights_sources: tuple[object, ...] = ()

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        device = torch.get_default_device()  # it builds its models with the device they are for as the default
        with torch.device("cpu"):
            self.pipe = TransfusionPipeline.from_pretrained(od_config.model, od_config.dtype, device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]] = ()) -> set[str]:
        """Nothing is left to load."""
        return set()

    def forward(self, req: Any) -> Any:
        """Draw each prompt of a request, a picture in it being one to change; PIL images, in order.

        A mistake of the user's is the output's `error`, one line, with status 400.
        """
        from vllm_omni.diffusion.data import DiffusionOutput

        try:
            images = [image for prompt in req.prompts for image in self._draw(prompt, req.sampling_params)]
        except UserError as error:
            return DiffusionOutput(error=str(error), error_status_code=400)
        return DiffusionOutput(output=images)

    def _draw(self, prompt: str | Mapping[str, Any], sampling: Any) -> list[Any]:
        asked: Mapping[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else prompt
        if asked.get("negative_prompt"):
            raise UserError("negative_prompt: expected none, for the model has no such branch, found one")
        pictures = (asked.get("multi_modal_data") or {}).get("image") or []
        pictures = pictures if isinstance(pictures, list) else [pictures]
        if len(pictures) > 1:
            raise UserError(f"image: expected one to change, found {len(pictures)}")
        return self.pipe(
            asked.get("prompt") or "",
            image=pictures[0] if pictures else None,
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=sampling.num_inference_steps,
            # Its default, 1, stands for "not said" where this is false.
            guidance_scale=sampling.guidance_scale if sampling.guidance_scale_provided else None,
            num_images_per_prompt=max(1, sampling.num_outputs_per_prompt),
            generator=sampling.generator or sampling.seed,
        ).images
