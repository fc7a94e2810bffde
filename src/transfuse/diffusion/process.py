"""The forward process: how an image is noised, what the network must predict, and how to read its answer.

Transfusion (arXiv 2408.11039), section 2.2, following DDPM (arXiv 2006.11239):

    x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * epsilon,    epsilon ~ N(0, 1)

Timesteps, everywhere in Transfuse: `t` is an integer in 0..T. `t = 0` is the clean image (`alpha_bar[0]` is exactly 1),
`t = T` noise with a mere trace of it (`alpha_bar[T]` is 2e-9 for T = 1000). Training draws t uniformly from 1..T.
Libraries that count the noisy levels from zero, diffusers among them, call our t by the index t - 1.

Images are `[image, channel, row, column]` with `t` an int64 `[image]`, or one `[channel, row, column]` with a scalar t.
Results have the shape, dtype and device of x0 or x_t; arithmetic is in float32 at least, with coefficients worked out
in float64. Shapes that differ, and a t outside 0..T, raise ValueError.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v", "x0"]
Schedule = Literal["cosine"]
Weighting = Literal["uniform", "v"]

COSINE_OFFSET = 0.008  # s in arXiv 2102.09672, eq. 17: keeps the first noise levels from being vanishingly small
MAX_BETA = 0.999  # ibid.: without it no signal at all is left at t = T, and epsilon cannot be turned into x0
MIN_HALF_LOG_SNR = -5.1  # where DPM-Solver (arXiv 2206.00927) enters the cosine schedule: sqrt(alpha_bar) is 0.006
V_WEIGHT_FLOOR = 0.05  # 1 / (1 - alpha_bar) explodes as t -> 0, where x0 is all but given: the weight stops at 20


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, the network's target, and the weight of each noise level.

    timesteps: T, the number of noise levels (paper: 1000).
    schedule: "cosine" (Nichol & Dhariwal, arXiv 2102.09672; the paper's).
    prediction: what the network outputs: "epsilon" (paper), "v" (arXiv 2202.00512) or "x0".
    weighting: each image's loss weight as a function of t: "uniform" is 1 (paper); "v", for x0 prediction only, makes
        an error in x0 count as the error in v that it implies, up to a ceiling.
    clip_x0: while sampling, clip the predicted x0 to [-clip_x0, clip_x0]; 1.0 suits pixels, None never clips.

    Raises ValueError for a field out of its range.
    """

    timesteps: int = 1000
    schedule: Schedule = "cosine"
    prediction: Prediction = "epsilon"
    weighting: Weighting = "uniform"
    clip_x0: float | None = None

    def __post_init__(self) -> None:
        if self.timesteps < 1:
            raise ValueError(f"timesteps: expected at least 1, found {self.timesteps}")
        for field, choices in (("schedule", Schedule), ("prediction", Prediction), ("weighting", Weighting)):
            if getattr(self, field) not in get_args(choices):
                raise ValueError(f"{field}: expected one of {get_args(choices)}, found {getattr(self, field)!r}")
        if self.weighting == "v" and self.prediction != "x0":
            raise ValueError(f"weighting: expected 'uniform' for {self.prediction} prediction, found 'v'")
        if self.clip_x0 is not None and not self.clip_x0 > 0:
            raise ValueError(f"clip_x0: expected None or a positive number, found {self.clip_x0}")


def cosine_alpha_bar(timesteps: int) -> Tensor:
    """Return alpha_bar, float64 `[T + 1]`, strictly decreasing from exactly 1 (arXiv 2102.09672, eq. 17)."""
    level = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    signal = torch.cos((level + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    beta = (1 - signal[1:] / signal[:-1]).clamp(max=MAX_BETA)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


class Process:
    """The process of one `DiffusionConfig`; no weights. `alpha_bar` is its table, float64 `[T + 1]`, on the CPU."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.alpha_bar = cosine_alpha_bar(config.timesteps)
        # One copy per device and precision: moving it at every step would make an accelerator wait for the host.
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def first_timestep(self) -> int:
        """The level from which sampling starts: T, except that epsilon prediction starts just below (996 of 1000).

        To find x0 from epsilon is to divide by sqrt(alpha_bar), 5e-5 at t = T: there an error of 1e-3, no more than
        bfloat16 rounds away, becomes 20 in x0, and few steps never make up for it. A little below T the image is as
        good as gone (its amplitude is 0.006), yet the factor is only 160. v and x0 have no such place.
        """
        if self.config.prediction != "epsilon":
            return self.config.timesteps
        return int((0.5 * torch.logit(self.alpha_bar) >= MIN_HALF_LOG_SNR).sum()) - 1

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return x_t; at t = 0 it is x0."""
        signal, sigma = self._amplitudes(x0, noise, t)
        return (signal * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return what the network must predict: noise, x0, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0."""
        signal, sigma = self._amplitudes(x0, noise, t)
        match self.config.prediction:
            case "epsilon":
                return noise.to(x0.dtype)
            case "v":
                return (signal * noise - sigma * x0).to(x0.dtype)
            case "x0":
                return x0

    def predicted_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Return the clean image that the prediction implies, unclipped."""
        signal, sigma = self._amplitudes(x_t, prediction, t)
        match self.config.prediction:
            case "epsilon":
                return ((x_t - sigma * prediction) / signal).to(x_t.dtype)
            case "v":
                return (signal * x_t - sigma * prediction).to(x_t.dtype)
            case "x0":
                return prediction.to(x_t.dtype)

    def predicted_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Return the noise that the prediction implies, zeros where there is none (t = 0, x0 prediction)."""
        signal, sigma = self._amplitudes(x_t, prediction, t)
        match self.config.prediction:
            case "epsilon":
                return prediction.to(x_t.dtype)
            case "v":
                return (signal * prediction + sigma * x_t).to(x_t.dtype)
            case "x0":
                per_sigma = torch.where(sigma > 0, 1 / sigma, 0)
                return ((x_t - signal * prediction) * per_sigma).to(x_t.dtype)

    def weight(self, t: Tensor | int) -> Tensor:
        """Return each image's loss weight, float32, shaped and placed as t.

        "v": with x_t given, an error e in x0 is an error of size e / sqrt(1 - alpha_bar) in v, so squares weigh
        1 / (1 - alpha_bar), here at most 1 / 0.05.
        """
        t = self._timesteps(t)
        if self.config.weighting == "uniform":
            return torch.ones(t.shape, dtype=torch.float32, device=t.device)
        sigma = self._look_up(t, torch.float32)[1]
        return 1 / (sigma**2).clamp(min=V_WEIGHT_FLOOR)

    def _amplitudes(self, x: Tensor, other: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar) as `[image, 1, 1, 1]` or `[1, 1, 1]`."""
        t = self._timesteps(t)
        if x.shape != other.shape:
            raise ValueError(f"images: expected two of one shape, found {list(x.shape)} and {list(other.shape)}")
        if x.dim() < 3 or t.shape != x.shape[:-3]:
            raise ValueError(f"t: expected one timestep per image of {list(x.shape)}, found shape {list(t.shape)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        # Not 0-dim even for one image: such tensors do not promote, and bfloat16 images would be mixed in bfloat16.
        signal, sigma = self._look_up(t.to(x.device), dtype)[..., None, None, None]
        return signal, sigma

    def _look_up(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Return sqrt(alpha_bar) and sqrt(1 - alpha_bar), stacked: `[2, *t.shape]`."""
        if (t.device, dtype) not in self._tables:
            with torch.inference_mode(False):  # a table first needed while sampling must serve training too
                both = torch.stack([self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()])
                # Rounded before it moves: some accelerators have no float64.
                self._tables[t.device, dtype] = both.to(dtype).to(t.device)
        # index_select, unlike [], refuses a negative t on an accelerator too.
        return self._tables[t.device, dtype].index_select(1, t.reshape(-1)).reshape(2, *t.shape)

    def _timesteps(self, t: Tensor | int) -> Tensor:
        t = torch.as_tensor(t)
        if t.dtype != torch.int64:
            raise ValueError(f"t: expected int64, found {str(t.dtype).removeprefix('torch.')}")
        # On the host only: elsewhere the host would have to wait, and the look-up asserts the range anyway.
        if t.device.type == "cpu" and t.numel() and not 0 <= t.min() <= t.max() <= self.config.timesteps:
            raise ValueError(f"t: expected 0..{self.config.timesteps}, found {t.min().item()}..{t.max().item()}")
        return t
