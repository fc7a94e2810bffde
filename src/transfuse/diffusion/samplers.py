"""The reverse process: from noise to an image in N steps, N evaluations of the network.

    sampler = Sampler(process, SamplerConfig("dpmpp", steps=20))
    state = sampler.prepare((channels, rows, columns), torch.Generator().manual_seed(0))
    while not state.done:
        prediction = sampler.denoise(state, network)     # or batch many states' x and t, run the network once,
        state = sampler.step(state, prediction)          # and step each with its own row
    image = sampler.finish(state)

One state per image, and no state anywhere else: images with different samplers, step counts and guidance share a batch,
and a step can be replayed. The step rules are free functions of x_t, the predicted x0 and the noise levels; t is the
noisier level, s the level stepped to (s < t). Each returns x0 itself, exactly, when s = 0.

The rules of DDPM, DDIM and DPM-Solver++ are written for signal^2 + sigma^2 = 1. The "flow" schedule divides x_t by the
root of that sum before such a rule, and multiplies x_s after it. Euler's and Heun's are those of rectified flow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from transfuse.diffusion.process import Process, shifted

SamplerName = Literal["ddpm", "ddim", "dpmpp", "euler", "heun"]
FLOW_ONLY = ("euler", "heun")


@dataclass(frozen=True)
class SamplerConfig:
    """The sampler and its number of steps.

    name: "ddpm" (ancestral, arXiv 2006.11239; most likely the paper's), "ddim" (arXiv 2010.02502), "dpmpp"
        (DPM-Solver++ 2M, arXiv 2211.01095: good images in the fewest steps), or, for the "flow" schedule alone, "euler"
        or "heun" (second order, two evaluations a step; arXiv 2206.00364, algorithm 1).
    steps: evaluations of the network, 1..T (paper: 250).
    eta: noise of "ddim", 0 (none) to 1 (as much as "ddpm").
    first: the level to start from, steps..T. None: `Process.first_timestep`, or `steps` where that is more.

    Raises ValueError for a field out of its range, or an eta that the sampler would ignore.
    """

    name: SamplerName = "ddpm"
    steps: int = 250
    eta: float = 0.0
    first: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(SamplerName):
            raise ValueError(f"name: expected one of {get_args(SamplerName)}, found {self.name!r}")
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, found {self.steps}")
        if not 0 <= self.eta <= (1 if self.name == "ddim" else 0):
            raise ValueError(f"eta: expected 0..1 for ddim and 0 otherwise, found {self.eta} for {self.name}")


@dataclass(frozen=True)
class SamplerState:
    """The state of one image during sampling; immutable.

    x: x_t, `[channel, row, column]`. timesteps: the levels at which the network is evaluated, descending; "heun"
    evaluates most of them twice. rng: state of the CPU generator of this image's step noise. index: evaluations so far.
    x0: the latest estimate of the clean image (None at first), used by the 2M rule and as a preview. given: a clean
    image, and bool `[row, column]`, True where it is redrawn; the rest of it is kept (None: the whole image is drawn).
    halfway: x and the velocity at the beginning of a step of "heun" that lacks its second evaluation.
    """

    x: Tensor
    timesteps: tuple[int, ...]
    rng: Tensor
    index: int = 0
    x0: Tensor | None = None
    given: tuple[Tensor, Tensor] | None = None
    halfway: tuple[Tensor, Tensor] | None = None

    @property
    def t(self) -> int:
        """The noise level of x, 0..T, and the network's timestep; 0 once done, because the image is clean."""
        return 0 if self.done else self.timesteps[self.index]

    @property
    def total(self) -> int:
        """The number of evaluations of the whole chain."""
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        """True if x is the finished image."""
        return self.index == self.total


def trailing_timesteps(first: int, steps: int) -> tuple[int, ...]:
    """Return `steps` distinct levels, evenly spaced down from `first`, which is the first of them; the last is above 0.

    The "trailing" spacing of arXiv 2305.08891, table 2, which shows that pure noise must be given to the network as the
    noisiest level, not as a later one. Raises ValueError unless 1 <= steps <= first.
    """
    if not 1 <= steps <= first:
        raise ValueError(f"steps: expected 1..{first} (the levels to step down), found {steps}")
    return tuple(round(first * (steps - i) / steps) for i in range(steps))


def shifted_timesteps(first: int, steps: int, levels: int, shift: float) -> tuple[int, ...]:
    """Return `trailing_timesteps` moved towards noise by `shift`, out of 1..levels; still distinct, from `first` on."""
    even = trailing_timesteps(first, steps)
    if shift == 1:
        return even
    start = shifted(first / levels, 1 / shift)  # its own inverse: the share that `shift` moves to `first`
    timesteps = [first]
    for i in range(1, steps):
        level = round(levels * shifted(start * (steps - i) / steps, shift))
        timesteps.append(min(max(level, steps - i), timesteps[-1] - 1))
    return tuple(timesteps)


def ddpm_step(x_t: Tensor, x0: Tensor, alpha_bar_t: float, alpha_bar_s: float, noise: Tensor | None) -> Tensor:
    """Draw x_s from q(x_s | x_t, x0), whose variance is the "fixed small" one (arXiv 2006.11239, eqs. 6-7).

    Between respaced levels alpha is the ratio of the two alpha_bar (arXiv 2102.09672, section 4). noise: unit normal,
    shaped as x_t; None for the mean.
    """
    alpha = alpha_bar_t / alpha_bar_s
    mean_x0 = math.sqrt(alpha_bar_s) * (1 - alpha) / (1 - alpha_bar_t)
    mean_x_t = math.sqrt(alpha) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    x_s = mean_x0 * x0 + mean_x_t * x_t
    if noise is None:
        return x_s
    return x_s + math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha)) * noise


def ddim_step(
    x_t: Tensor, x0: Tensor, alpha_bar_t: float, alpha_bar_s: float, eta: float, noise: Tensor | None
) -> Tensor:
    """Return x_s with the share eta of its noise drawn again (arXiv 2010.02502, eqs. 12 and 16); eta = 1 is DDPM.

    The noise kept is the one that x_t and x0 imply, so that a clipped x0 and x_t still agree. noise: as in `ddpm_step`.
    """
    epsilon = (x_t - math.sqrt(alpha_bar_t) * x0) / math.sqrt(1 - alpha_bar_t)
    fresh = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    # At eta = 1 and neighbouring levels rounding may put the difference a hair below zero.
    x_s = math.sqrt(alpha_bar_s) * x0 + math.sqrt(max(1 - alpha_bar_s - fresh, 0.0)) * epsilon
    return x_s if noise is None else x_s + math.sqrt(fresh) * noise


def dpmpp_step(
    x_t: Tensor, x0: Tensor, alpha_bar_t: float, alpha_bar_s: float, before: tuple[Tensor, float] | None = None
) -> Tensor:
    """Return x_s by DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2, the midpoint form).

    before: x0 and alpha_bar of the evaluation before this one; without it the step is of first order, which is DDIM's
    with eta = 0. So is the last: at s = 0 log SNR is infinite, and x0 itself is the formula's limit.
    """
    if alpha_bar_s == 1:
        return x0
    h = _half_log_snr(alpha_bar_s) - _half_log_snr(alpha_bar_t)
    if before is not None:
        x0_before, alpha_bar_before = before
        h_before = _half_log_snr(alpha_bar_t) - _half_log_snr(alpha_bar_before)
        x0 = x0 + (x0 - x0_before) * (h / (2 * h_before))
    return math.sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) * x_t - math.sqrt(alpha_bar_s) * math.expm1(-h) * x0


def euler_step(x_t: Tensor, x0: Tensor, sigma_t: float, sigma_s: float) -> Tensor:
    """Return x_s along the straight line from x_t to x0, where "flow" has x_t = (1 - sigma) * x0 + sigma * epsilon."""
    return x0 + (x_t - x0) * (sigma_s / sigma_t)


def heun_step(x_t: Tensor, velocity_t: Tensor, velocity_s: Tensor, sigma_t: float, sigma_s: float) -> Tensor:
    """Return x_s by the mean of the velocities at x_t and at the point that Euler's step reached from it."""
    return x_t + (sigma_s - sigma_t) * (velocity_t + velocity_s) / 2


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar)) if alpha_bar else -math.inf


def _unit_normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Always float32 on the CPU: another precision or device would be other noise from the same seed.
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


class Sampler:
    """A step rule over the levels of one process; immutable, to be shared by any number of images.

    timesteps: the levels of an image of no particular size (`timesteps_for`).

    Raises ValueError if the process has too few levels for the configuration's steps, or none called `first`, or if its
    schedule is not the one that the rule is for.
    """

    def __init__(self, process: Process, config: SamplerConfig) -> None:
        self.process = process
        self.config = config
        levels, first = process.config.timesteps, config.first
        if config.name in FLOW_ONLY and process.config.schedule != "flow":
            raise ValueError(f"name: expected ddpm, ddim or dpmpp for the cosine schedule, found {config.name!r}")
        if first is None:  # levels being distinct, a chain of very many steps has to start higher
            first = min(max(process.first_timestep, config.steps), levels)
        if not 1 <= first <= levels:
            raise ValueError(f"first: expected 1..{levels} (the training timesteps), found {first}")
        if process.config.prediction == "epsilon" and process.signal[first] == 0:
            name = "steps" if config.first is None else "first"
            raise ValueError(
                f"{name}: expected less than {first}, as a network that predicts noise cannot begin at pure noise, "
                f"found {first}"
            )
        self.first = first
        self.timesteps = self._evaluated(process.config.shift)

    def timesteps_for(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the levels at which the network is evaluated for an image whose latent has `rows` and `columns`."""
        if self.process.config.shift_side is None:
            return self.timesteps
        return self._evaluated(self.process.shift_for(rows, columns))

    def _evaluated(self, shift: float) -> tuple[int, ...]:
        steps, levels = self.config.steps, self.process.config.timesteps
        if self.config.name != "heun":
            return shifted_timesteps(self.first, steps, levels, shift)
        # Every step but the last is evaluated again where it ends. An even number leaves one more step without.
        points = shifted_timesteps(self.first, steps // 2 + 1, levels, shift)
        twice = points[1 : (steps + 1) // 2]
        return (points[0], *(t for point in twice for t in (point, point)), *points[1 + len(twice) :])

    def prepare(
        self,
        shape: tuple[int, int, int],
        generator: torch.Generator,
        start: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplerState:
        """Return the state of an image `[channel, row, column]` still to be drawn, float32 on `device`.

        Noise comes from `generator`, on the CPU, so that a seed gives one image on every device and in every batch;
        one generator may prepare many images, whatever their samplers. start: x at the first level, in place of drawn
        noise; it stays where it is, in float32 at least. Raises ValueError for a generator elsewhere, or a start of
        another shape.
        """
        if generator.device.type != "cpu":
            raise ValueError(f"generator: expected one on cpu, found {generator.device}")
        if start is None:
            start = _unit_normal(shape, generator).to(device)
        elif start.shape != shape:
            raise ValueError(f"start: expected shape {list(shape)}, found {list(start.shape)}")
        x = start.to(torch.promote_types(start.dtype, torch.float32))
        # Step noise has a separate stream, or one image's would be the next image's x.
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        return SamplerState(x, self.timesteps_for(*shape[1:]), torch.Generator().manual_seed(seed).get_state())

    def prepare_from(
        self, image: Tensor, generator: torch.Generator, strength: float = 1.0, mask: Tensor | None = None
    ) -> SamplerState:
        """Return the state of an image that begins as another, clean one: noised, with a share of the steps left.

        strength: that share, 0..1; 1 begins from noise alone, the same as `prepare`'s, 0 is the image, and done; above
        0 at least one step is taken.
        mask: bool `[row, column]`, True where it is redrawn. The rest is the image, as noisy as each level says, and
        in the end the image itself, exactly.

        Raises ValueError for a strength out of its range or a mask of another size.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: expected 0..1, found {strength}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != image.shape[1:]):
            raise ValueError(f"mask: expected bool {list(image.shape[1:])}, found {mask.dtype} {list(mask.shape)}")
        channels, rows, columns = image.shape
        state = self.prepare((channels, rows, columns), generator, device=image.device)
        image = image.to(state.x.dtype)
        steps = max(round(strength * self.config.steps), int(strength > 0))
        left = state.timesteps[self.config.steps - steps :]
        if left[:1] == left[1:2]:  # the second evaluation of a step of "heun" whose first is not among them
            left = left[1:]
        state = replace(state, timesteps=left)
        noised = self.process.add_noise(image, state.x, state.t)
        if steps < self.config.steps:
            state = replace(state, x=noised)
        if mask is None:
            return state
        mask = mask.to(image.device)
        return replace(state, x=torch.where(mask, state.x, noised), given=(image, mask))

    def denoise(self, state: SamplerState, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return `predict(x_t, t)`, t a scalar int64 on x_t's device: the one evaluation that a step needs."""
        return predict(state.x, torch.tensor(state.t, device=state.x.device))

    def step(self, state: SamplerState, prediction: Tensor) -> SamplerState:
        """Return the state at the next level, given the network's prediction for this one; `state` stays as it was.

        prediction: shaped as x, any floating dtype. Raises ValueError for another shape or a state that is done.
        """
        if state.done:
            raise ValueError(f"state: expected a step left to take, found all {state.total} taken")
        x0 = self.process.predicted_x0(prediction, state.x, state.t)
        if (limit := self.process.config.clip_x0) is not None:
            x0 = x0.clamp(-limit, limit)
        if state.given is not None:
            # With x0 known every rule below gives x_s as the forward process would from the image itself.
            image, mask = state.given
            x0 = torch.where(mask, x0, image)
        after = replace(state, index=state.index + 1, x0=x0)
        if self.config.name in FLOW_ONLY:
            return self._flow_step(state, after, x0)
        if self.process.config.schedule == "cosine":
            return self._variance_preserving_step(state, after, x0)
        scale_t, scale_s = (math.hypot(self.process.signal[t], self.process.sigma[t]) for t in (state.t, after.t))
        after = self._variance_preserving_step(replace(state, x=state.x / scale_t), after, x0)
        return replace(after, x=after.x * scale_s)

    def finish(self, state: SamplerState) -> Tensor:
        """Return the finished image, `[channel, row, column]`. Raises ValueError while steps are left."""
        if not state.done:
            raise ValueError(f"state: expected all {state.total} steps taken, found {state.index}")
        return state.x

    def _variance_preserving_step(self, state: SamplerState, after: SamplerState, x0: Tensor) -> SamplerState:
        """Take a step of "ddpm", "ddim" or "dpmpp"; `after` is the state that it leads to, without its x."""
        levels = self.process.alpha_bar
        alpha_bar_t, alpha_bar_s = levels[state.t].item(), levels[after.t].item()
        if self.config.name == "dpmpp":
            before = None
            if state.x0 is not None:
                before = state.x0, levels[state.timesteps[state.index - 1]].item()
            return replace(after, x=dpmpp_step(state.x, x0, alpha_bar_t, alpha_bar_s, before))
        noise = None
        if not after.done and (self.config.name == "ddpm" or self.config.eta > 0):
            generator = torch.Generator()
            generator.set_state(state.rng)
            noise = _unit_normal(state.x.shape, generator).to(state.x)
            after = replace(after, rng=generator.get_state())
        if self.config.name == "ddpm":
            return replace(after, x=ddpm_step(state.x, x0, alpha_bar_t, alpha_bar_s, noise))
        return replace(after, x=ddim_step(state.x, x0, alpha_bar_t, alpha_bar_s, self.config.eta, noise))

    def _flow_step(self, state: SamplerState, after: SamplerState, x0: Tensor) -> SamplerState:
        """Take a step of "euler", or half of one of "heun"; `after` is the state that it leads to, without its x."""
        sigma_t, sigma_s = self.process.sigma[state.t].item(), self.process.sigma[after.t].item()
        velocity = (state.x - x0) / sigma_t
        if state.halfway is not None:
            x, before = state.halfway
            sigma_before = self.process.sigma[state.timesteps[state.index - 1]].item()
            return replace(after, x=heun_step(x, before, velocity, sigma_before, sigma_t), halfway=None)
        is_half = self.config.name == "heun" and state.timesteps[after.index : after.index + 2] == (after.t, after.t)
        x_s = euler_step(state.x, x0, sigma_t, sigma_s)
        return replace(after, x=x_s, halfway=(state.x, velocity) if is_half else None)
