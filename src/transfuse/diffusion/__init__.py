"""Diffusion over images: the noising process with its training targets, and the samplers that reverse it."""

from transfuse.diffusion.process import DiffusionConfig, Process
from transfuse.diffusion.samplers import (
    Sampler,
    SamplerConfig,
    SamplerState,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    euler_step,
    heun_step,
    shifted_timesteps,
    trailing_timesteps,
)

__all__ = [
    "DiffusionConfig",
    "Process",
    "Sampler",
    "SamplerConfig",
    "SamplerState",
    "ddim_step",
    "ddpm_step",
    "dpmpp_step",
    "euler_step",
    "heun_step",
    "shifted_timesteps",
    "trailing_timesteps",
]
