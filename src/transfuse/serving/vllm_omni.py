"""A plug-in for vLLM-Omni, which then serves exports in diffusers' layout (`transfuse export --format diffusers`).

vLLM-Omni finds `register` by the entry point group `vllm_omni.general_plugins` and calls it in each of its processes;
`cpu_platform` lets it run where vLLM is a CPU build. Its scheduler runs one whole request at a time; its engine's
caches and parallel modes are not used. Written for the interface of vLLM-Omni 0.30: `register_diffusion_model`,
`OmniDiffusionRequest`, `DiffusionOutput`, `OmniPlatform`.
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


def cpu_platform() -> str | None:
    """Return the class of the platform to use, if vLLM is a CPU build; None leaves the choice to vLLM-Omni.

    vLLM-Omni calls it by the entry point group `vllm_omni.platform_plugins`. Version 0.30 has no platform for CPUs.
    """
    from vllm.platforms import current_platform

    return f"{__name__}.OmniCpuPlatform" if current_platform.is_cpu() else None


class CpuMethods:
    """The methods that vLLM-Omni's worker calls and vLLM's CPU platform lacks. One device, no compilation."""

    @classmethod
    def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def get_device_count(cls) -> int:
        return 1

    @classmethod
    def get_device_version(cls) -> str | None:
        return None

    @classmethod
    def supports_torch_inductor(cls) -> bool:
        return False

    @classmethod
    def max_memory_reserved(cls) -> int:
        """Return the most memory in bytes that this process has had."""
        import resource  # which Windows lacks

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    @classmethod
    def synchronize(cls) -> None:
        """Do nothing: a CPU's work is done when a call returns, it has no cache, and its peak cannot be reset."""

    max_memory_allocated, empty_cache, reset_peak_memory_stats = max_memory_reserved, synchronize, synchronize


def __getattr__(name: str) -> Any:
    """Make the platform's class when it is looked up: its bases are in packages that may be absent."""
    if name != "OmniCpuPlatform":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.platforms.cpu import CpuPlatform
    from vllm_omni.platforms.interface import OmniPlatform, OmniPlatformEnum

    return type(name, (CpuMethods, OmniPlatform, CpuPlatform), {"_omni_enum": OmniPlatformEnum.OOT})


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
        """Draw the prompt of a request, change the image in it, or write; the output holds PIL images, or a text.

        A prompt whose `modalities` name "text" is answered in words: an image alone is described. A user's mistake is
        the output's `error`, one line, with status 400.
        """
        from vllm_omni.diffusion.data import DiffusionOutput

        (prompt,), sampling = req.prompts, req.sampling_params  # more than one only where `supports_request_batch`
        fields: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        media, text = dict(fields.get("multi_modal_data") or {}), fields.get("prompt") or ""
        mask = media.pop("mask_image", None)
        images = [media.pop(name, None) for name in ("image", "img2img")]  # either name is in use there
        images = [image for given in images for image in (given if isinstance(given, list) else [given])]
        images = [image for image in images if image is not None]
        try:
            if media:
                raise UserError(f"multi_modal_data: expected image or mask_image, found {', '.join(media)}")
            if len(images) > 1:
                raise UserError(f"image: expected one, found {len(images)}")
            if "text" in (fields.get("modalities") or []):
                if mask is not None:
                    raise UserError("mask_image: expected none where text is asked for, found one")
                reply = self.pipe.generate([*images, text] if text else images, draw="never", seed=sampling.seed or 0)
                return DiffusionOutput(output={"payload": {"text": reply.text.strip()}})
            drawn = self.pipe(
                text,
                image=images[0] if images else None,
                mask_image=mask,
                strength=sampling.strength,
                negative_prompt=fields.get("negative_prompt"),
                height=sampling.height,
                width=sampling.width,
                num_inference_steps=sampling.num_inference_steps,
                # Its default of 1 means "not given" where `guidance_scale_provided` is false.
                guidance_scale=sampling.guidance_scale if sampling.guidance_scale_provided else None,
                num_images_per_prompt=max(1, sampling.num_outputs_per_prompt),
                generator=sampling.generator if sampling.seed is None else sampling.seed,
            )
        except UserError as error:
            return DiffusionOutput(error=str(error), error_status_code=400)
        return DiffusionOutput(output=drawn.images)
