"""A plug-in for vLLM-Omni, which then serves exports in diffusers' layout (`transfuse export --format diffusers`).

vLLM-Omni finds `register` by the entry point group `vllm_omni.general_plugins` and calls it in each of its processes.
Its scheduler runs one whole request at a time; its engine's caches and parallel modes are not used. Written for the
interface of vLLM-Omni 0.30: `register_diffusion_model`, `OmniDiffusionRequest`, `DiffusionOutput`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..inference import TransfusionPipeline

ARCHITECTURE = "TransfusionPipeline"  # `_class_name` in an export's model_index.json


def register() -> None:
    """Make the architecture known to vLLM-Omni, if it is installed. May be called any number of times."""
    try:
        from vllm_omni.diffusion.registry import register_diffusion_model
    except ImportError:
        return
    register_diffusion_model(ARCHITECTURE, __name__, OmniTransfusion.__name__)


class OmniTransfusion(nn.Module):
    """The pipeline as vLLM-Omni builds and calls it. It loads the export itself, so it has no parameters to load."""

    supports_step_execution = False
    dummy_run_num_frames = 0
    """its engine's warm-up draws 512 x 512 pixels, more positions than a small model has: 0 skips it"""
    weights_sources: tuple[object, ...] = ()

    def __init__(self, *, od_config: Any, prefix: str = "") -> None:
        super().__init__()
        device = torch.get_default_device()  # vLLM-Omni makes the model's device the default while it builds it
        with torch.device("cpu"):
            self.pipe = TransfusionPipeline.from_pretrained(od_config.model, od_config.dtype, device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]] = ()) -> set[str]:
        """Load nothing: all is loaded."""
        return set()

    def forward(self, req: Any) -> Any:
        """Draw each prompt of a request, or change the image in it; the output holds PIL images, in order.

        A user's mistake is the output's `error`, one line, with status 400.
        """
        from vllm_omni.diffusion.data import DiffusionOutput

        sampling, images = req.sampling_params, []
        try:
            for prompt in req.prompts:
                fields: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
                given = (fields.get("multi_modal_data") or {}).get("image") or []
                given = given if isinstance(given, list) else [given]
                if len(given) > 1:
                    raise UserError(f"image: expected one to change, found {len(given)}")
                images += self.pipe(
                    fields.get("prompt") or "",
                    image=given[0] if given else None,
                    negative_prompt=fields.get("negative_prompt"),
                    height=sampling.height,
                    width=sampling.width,
                    num_inference_steps=sampling.num_inference_steps,
                    # Its default of 1 means "not given" where `guidance_scale_provided` is false.
                    guidance_scale=sampling.guidance_scale if sampling.guidance_scale_provided else None,
                    num_images_per_prompt=max(1, sampling.num_outputs_per_prompt),
                    generator=sampling.generator or sampling.seed,
                ).images
        except UserError as error:
            return DiffusionOutput(error=str(error), error_status_code=400)
        return DiffusionOutput(output=images)
