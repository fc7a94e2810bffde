"""The forward process: how an image is noised, what the network must predict, and how to read its answer.

Transfusion (arXiv 2408.11039), section 2.2, following DDPM (arXiv 2006.11239):

    x_t = signal_t * x0 + sigma_t * epsilon,    epsilon ~ N(0, 1)

with two schedules: the paper's "cosine", where signal and sigma are sqrt(alpha_bar) and sqrt(1 - alpha_bar), and
"flow", the straight line of rectified flow (arXiv 2209.03003), where they are 1 - t / T and t / T.

Timesteps, everywhere in Transfuse: `t` is an integer in 0..T. `t = 0` is the clean image (signal is exactly 1), `t = T`
noise: with a mere trace of the image for "cosine" (alpha_bar is 2e-9 for T = 1000), with none for "flow". Training
draws t from 1..T (`Process.sample_timestep`). Libraries that count the noisy levels from zero, diffusers' DDPM among
them, call our t by the index t - 1.

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
Schedule = Literal["cosine", "flow"]
Times = Literal["uniform", "logit-normal"]
Weighting = Literal["uniform", "v"]

COSINE_OFFSET = 0.008  # s in arXiv 2102.09672, eq. 17: keeps the first noise levels from being vanishingly small
MAX_BETA = 0.999  # ibid.: without it no signal at all is left at t = T, and epsilon cannot be turned into x0
MIN_HALF_LOG_SNR = -5.1  # where DPM-Solver (arXiv 2206.00927) enters the cosine schedule: sqrt(alpha_bar) is 0.006
# 1 / sigma^2 explodes as t -> 0, where x0 is all but given: the weight stops at 20, or for "flow" where JiT (arXiv
# 2511.13720) stops it, at sigma 0.05.
V_WEIGHT_FLOOR = {"cosine": 0.05, "flow": 0.05**2}


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule, the network's target, and the weight and frequency of each noise level.

    timesteps: T, the number of noise levels (paper: 1000).
    schedule: "cosine" (Nichol & Dhariwal, arXiv 2102.09672; the paper's) or "flow" (arXiv 2209.03003).
    prediction: what the network outputs: "epsilon" (paper), "x0", or "v", which is signal * epsilon - sigma * x0 for
        "cosine" (arXiv 2202.00512) and the velocity epsilon - x0 for "flow".
    weighting: each image's loss weight as a function of t: "uniform" is 1 (paper); "v", for x0 prediction only, makes
        an error in x0 count as the error in v that it implies, up to a ceiling.
    times: how training draws t / T: "uniform" (paper) or "logit-normal", the sigmoid of a normal variable (Stable
        Diffusion 3, arXiv 2403.03206, section 3.1) with `times_mean` and `times_std`.
    shift: above 1, moves the levels of training and of sampling towards noise: u = t / T becomes
        shift * u / (1 + (shift - 1) * u) (ibid., eq. 23).
    shift_side: side of the latent, in latent pixels, that `shift` is meant for. Images of another size get it times
        their side / shift_side, the square root of the ratio of their patches. None: one shift for all.
    clip_x0: while sampling, clip the predicted x0 to [-clip_x0, clip_x0]; 1.0 suits pixels, None never clips.

    Raises ValueError for a field out of its range.
    """

    timesteps: int = 1000
    schedule: Schedule = "cosine"
    prediction: Prediction = "epsilon"
    weighting: Weighting = "uniform"
    times: Times = "uniform"
    times_mean: float = 0.0
    times_std: float = 1.0
    shift: float = 1.0
    shift_side: int | None = None
    clip_x0: float | None = None

    def __post_init__(self) -> None:
        if self.timesteps < 1:
            raise ValueError(f"timesteps: expected at least 1, found {self.timesteps}")
        choices = {"schedule": Schedule, "prediction": Prediction, "weighting": Weighting, "times": Times}
        for field, values in choices.items():
            if getattr(self, field) not in get_args(values):
                raise ValueError(f"{field}: expected one of {get_args(values)}, found {getattr(self, field)!r}")
        if self.weighting == "v" and self.prediction != "x0":
            raise ValueError(f"weighting: expected 'uniform' for {self.prediction} prediction, found 'v'")
        if not math.isfinite(self.times_mean):
            raise ValueError(f"times_mean: expected a finite number, found {self.times_mean}")
        for field in ("times_std", "shift"):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f"{field}: expected a positive number, found {getattr(self, field)}")
        if self.times == "uniform" and (self.times_mean, self.times_std) != (0.0, 1.0):
            raise ValueError("times_mean, times_std: expected 0 and 1 for uniform times, which have neither")
        for field in ("shift_side", "clip_x0"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field}: expected None or a positive number, found {value}")


def cosine_alpha_bar(timesteps: int) -> Tensor:
    """Return alpha_bar, float64 `[T + 1]`, strictly decreasing from exactly 1 (arXiv 2102.09672, eq. 17)."""
    level = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    signal = torch.cos((level + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    beta = (1 - signal[1:] / signal[:-1]).clamp(max=MAX_BETA)
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - beta, dim=0)])


def shifted(u: float, shift: float) -> float:
    """Return the share u = t / T of the way to noise, 0..1, moved by `shift` (arXiv 2403.03206, eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


class Process:
    """The process of one `DiffusionConfig`; no weights.

    signal, sigma: amplitudes of image and noise at each t, float64 `[T + 1]`, on the CPU.
    alpha_bar: signal^2 / (signal^2 + sigma^2), the level of the DDPM that x_t / sqrt(signal^2 + sigma^2) belongs to;
        for "cosine", whose squares add up to 1, that is x_t itself.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        if config.schedule == "cosine":
            self.alpha_bar = cosine_alpha_bar(config.timesteps)
            self.signal, self.sigma = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        else:
            self.sigma = torch.arange(config.timesteps + 1, dtype=torch.float64) / config.timesteps
            self.signal = 1 - self.sigma
            self.alpha_bar = self.signal**2 / (self.signal**2 + self.sigma**2)
        # One copy per device and precision: moving it at every step would make an accelerator wait for the host.
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def first_timestep(self) -> int:
        """The level from which sampling starts: T, except that epsilon prediction starts just below (996 of 1000).

        To find x0 from epsilon is to divide by signal, 5e-5 at t = T for "cosine" and 0 for "flow": there an error of
        1e-3, no more than bfloat16 rounds away, becomes 20 in x0, and few steps never make up for it. A little below T
        the image is as good as gone (its amplitude is 0.006), yet the factor is only 160. v and x0 have no such place.
        """
        if self.config.prediction != "epsilon":
            return self.config.timesteps
        return int((0.5 * torch.logit(self.alpha_bar) >= MIN_HALF_LOG_SNR).sum()) - 1

    def shift_for(self, rows: int, columns: int) -> float:
        """Return the shift of an image whose latent has `rows` and `columns`."""
        if self.config.shift_side is None:
            return self.config.shift
        return self.config.shift * math.sqrt(rows * columns) / self.config.shift_side

    def sample_timestep(self, generator: torch.Generator, rows: int, columns: int, most: int | None = None) -> int:
        """Draw the training timestep of an image whose latent has `rows` and `columns`, in 1..`most` (None: T)."""
        config = self.config
        most = config.timesteps if most is None else min(most, config.timesteps)
        shift = self.shift_for(rows, columns)
        if config.times == "uniform" and shift == 1:
            return int(torch.randint(1, most + 1, (), generator=generator))
        if config.times == "uniform":
            u = torch.rand((), generator=generator, dtype=torch.float64)
        else:
            u = torch.randn((), generator=generator, dtype=torch.float64)
            u = torch.sigmoid(config.times_mean + config.times_std * u)
        return max(1, math.ceil(most * shifted(u.item(), shift)))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return x_t; at t = 0 it is x0."""
        signal, sigma = self._amplitudes(x0, noise, t)
        return (signal * x0 + sigma * noise).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """Return what the network must predict: noise, x0, or v (`DiffusionConfig.prediction`)."""
        signal, sigma = self._amplitudes(x0, noise, t)
        match self.config.prediction:
            case "epsilon":
                return noise.to(x0.dtype)
            case "v" if self.config.schedule == "flow":
                return (noise - x0).to(x0.dtype)
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
            case "v" if self.config.schedule == "flow":
                return (x_t - sigma * prediction).to(x_t.dtype)
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
            case "v" if self.config.schedule == "flow":
                return (x_t + signal * prediction).to(x_t.dtype)
            case "v":
                return (signal * prediction + sigma * x_t).to(x_t.dtype)
            case "x0":
                per_sigma = torch.where(sigma > 0, 1 / sigma, 0)
                return ((x_t - signal * prediction) * per_sigma).to(x_t.dtype)

    def step(self, x0: Tensor, x_t: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """Return x_s, s < t, with the noise that x0 and x_t imply: DDIM without noise, Euler for "flow"."""
        return self.add_noise(x0, self.implied_noise(x0, x_t, t), s)

    def implied_noise(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """Return the noise with which x0 becomes x_t, t > 0."""
        signal, sigma = self._amplitudes(x0, x_t, t)
        return ((x_t - signal * x0) / sigma).to(x_t.dtype)

    def x0_of_step(self, x_s: Tensor, x_t: Tensor, t: Tensor | int, s: Tensor | int) -> Tensor:
        """Return the x0 for which `step` leads from x_t to x_s (arXiv 2202.00512, appendix G)."""
        (signal_t, sigma_t), (signal_s, sigma_s) = (self._amplitudes(x_t, x_s, level) for level in (t, s))
        ratio = sigma_s / sigma_t
        return ((x_s - ratio * x_t) / (signal_s - ratio * signal_t)).to(x_t.dtype)

    def weight(self, t: Tensor | int) -> Tensor:
        """Return each image's loss weight, float32, shaped and placed as t.

        "v": with x_t given, an error e in x0 is an error of size e / sigma in v, so squares weigh 1 / sigma^2, up to
        the ceiling of the schedule.
        """
        t = self._timesteps(t)
        if self.config.weighting == "uniform":
            return torch.ones(t.shape, dtype=torch.float32, device=t.device)
        sigma = self._look_up(t, torch.float32)[1]
        return 1 / (sigma**2).clamp(min=V_WEIGHT_FLOOR[self.config.schedule])

    def _amplitudes(self, x: Tensor, other: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """Return signal and sigma as `[image, 1, 1, 1]` or `[1, 1, 1]`."""
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
        """Return signal and sigma, stacked: `[2, *t.shape]`."""
        if (t.device, dtype) not in self._tables:
            with torch.inference_mode(False):  # a table first needed while sampling must serve training too
                both = torch.stack([self.signal, self.sigma])
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
