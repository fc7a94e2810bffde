"""The diffusion process and every sampler against diffusers' schedulers: each x on the way, on the same noise.

diffusers keeps its tables in float32, where 1 - beta at t = T (beta is 0.999) is off by 1e-5 and 1 - alpha_bar near
t = 1 is the difference of nearly equal numbers; over hundreds of steps that adds up. So a path is compared three times:
with diffusers as it is (`stock`), and with diffusers in float64 on our table, against which our float64 path shows that
the rules are the same (`EXACT`) and our float32 path what float32 costs (`FLOAT32`). Tolerances are relative to the
largest |x|, at least 1: near t = T, epsilon unclipped makes x of the order of 1,000.

Where we differ on purpose, a test says so: `test_unlike_diffusers_...`.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from transfuse.diffusion import DiffusionConfig, Process, Sampler, SamplerConfig, SamplerState

diffusers = pytest.importorskip("diffusers")

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SHAPE = (3, 4, 6)
FLOAT32, EXACT = 1e-5, 1e-9


def stock(steps: int) -> float:
    return 1e-5 if steps <= 50 else 5e-4


def scheduler(kind: str, process: Process, **settings):
    """A diffusers scheduler with the settings that correspond to ours."""
    config = process.config
    settings = {
        "num_train_timesteps": config.timesteps,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": PREDICTIONS[config.prediction],
        "timestep_spacing": "trailing",
    } | settings
    if kind != "DPMSolverMultistepScheduler":
        settings |= {"clip_sample": config.clip_x0 is not None, "clip_sample_range": config.clip_x0 or 1.0}
    return getattr(diffusers, kind)(**settings)


def network(x: Tensor, t: int) -> Tensor:
    """A fixed smooth function of one image and t; bounded, so that it never makes two close paths part."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, 0) - 0.2 * x.roll(1, 2) + t / 1000 - 0.5)


def ours(sampler: Sampler, state: SamplerState) -> list[Tensor]:
    path = []
    while not state.done:
        state = sampler.step(state, network(state.x, state.t))
        path.append(state.x)
    assert torch.equal(sampler.finish(state), path[-1])
    return path


def theirs(
    reference, state: SamplerState, predict: Callable[[Tensor, int], Tensor] = network, **options
) -> list[Tensor]:
    """Walk diffusers' scheduler from the same x, its noise drawn from the state's own stream."""
    options["generator"] = torch.Generator()
    options["generator"].set_state(state.rng)
    x, path = state.x[None], []
    for index in reference.timesteps:
        x = reference.step(predict(x[0], int(index) + 1)[None], index, x, **options).prev_sample
        path.append(x[0])
    return path


def assert_same_path(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for x, reference in zip(found, expected, strict=True):
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(x.double(), reference.double(), rtol=0, atol=tolerance * scale)


def compare(kind: str, sampler: Sampler, **options) -> None:
    """Assert that the three comparisons hold for a DDPM or DDIM scheduler."""
    reference = scheduler(kind, sampler.process)
    reference.set_timesteps(sampler.config.steps)
    assert sampler.timesteps == tuple((reference.timesteps + 1).tolist())
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(sampler.config.steps))
    path = ours(sampler, state)
    assert_same_path(path, theirs(reference, state, **options), stock(sampler.config.steps))
    reference.alphas_cumprod = sampler.process.alpha_bar[1:].clone()
    precise = replace(state, x=state.x.double())
    expected = theirs(reference, precise, **options)
    assert_same_path(ours(sampler, precise), expected, EXACT)
    assert_same_path(path, expected, FLOAT32)


@pytest.fixture(autouse=True)
def float32_noise(monkeypatch):
    """Let diffusers draw its noise in float32 whatever the precision of x, as we do: else float64 is other noise."""
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm

    def draw(shape, generator, device, dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", draw)
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", draw)


# The process


@pytest.mark.parametrize("timesteps", [10, 100, 1000])
def test_alpha_bar(timesteps):
    process = Process(DiffusionConfig(timesteps=timesteps))
    expected = scheduler("DDPMScheduler", process).alphas_cumprod
    torch.testing.assert_close(process.alpha_bar[1:].float(), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noising_and_targets(prediction):
    process = Process(DiffusionConfig(prediction=prediction))
    reference = scheduler("DDPMScheduler", process)
    t = torch.tensor([1, 2, 20, 500, 999, 1000])
    x0, noise = torch.randn(2, len(t), *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = {
        "epsilon": noise,
        "v": reference.get_velocity(x0, noise, t - 1),
        "x0": x0,
    }[prediction]
    torch.testing.assert_close(
        process.add_noise(x0, noise, t), reference.add_noise(x0, noise, t - 1), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(process.target(x0, noise, t), expected, rtol=0, atol=1e-5)


# The samplers


@pytest.mark.parametrize("clip", [None, 1.0, 0.4])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 50, 250])
def test_ddpm(prediction, steps, clip):
    process = Process(DiffusionConfig(prediction=prediction, clip_x0=clip))
    compare("DDPMScheduler", Sampler(process, SamplerConfig("ddpm", steps=steps, first=1000)))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_at_every_level(prediction):
    compare(
        "DDPMScheduler", Sampler(Process(DiffusionConfig(prediction=prediction)), SamplerConfig("ddpm", steps=1000))
    )


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 20, 50, 250])
def test_ddim(prediction, steps, eta, clip):
    process = Process(DiffusionConfig(prediction=prediction, clip_x0=clip))
    sampler = Sampler(process, SamplerConfig("ddim", steps=steps, eta=eta, first=1000))
    compare("DDIMScheduler", sampler, eta=eta, use_clipped_model_output=clip is not None)


def multistep(process: Process, steps: int, **settings):
    """diffusers' 2M solver, its last step of first order to a clean image: as ours."""
    reference = scheduler("DPMSolverMultistepScheduler", process, solver_order=2, final_sigmas_type="zero", **settings)
    reference.set_timesteps(steps)
    return reference


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 15, 20, 25])
def test_dpmpp(prediction, steps):
    process = Process(DiffusionConfig(prediction=prediction))
    sampler = Sampler(process, SamplerConfig("dpmpp", steps=steps, first=1000))
    reference = multistep(process, steps)
    assert sampler.timesteps == tuple((reference.timesteps + 1).tolist())
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(steps))
    path = ours(sampler, state)
    assert_same_path(path, theirs(reference, state), stock(steps))
    # The solver casts x to float32 whatever it is given: only its coefficients can be made exact.
    alpha_bar = process.alpha_bar[[*sampler.timesteps, 0]]
    reference = multistep(process, steps)
    reference.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert_same_path(path, theirs(reference, state), FLOAT32)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dpmpp_clipped(prediction):
    """The solver of diffusers cannot clip: so it is given x0 already found and clipped."""
    process = Process(DiffusionConfig(prediction=prediction, clip_x0=0.4))
    sampler = Sampler(process, SamplerConfig("dpmpp", steps=20, first=1000))
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(0))

    def clipped_x0(x: Tensor, t: int) -> Tensor:
        return process.predicted_x0(network(x, t), x, t).clamp(-0.4, 0.4)

    expected = theirs(multistep(process, 20, prediction_type="sample"), state, clipped_x0)
    assert_same_path(ours(sampler, state), expected, stock(20))


# Where epsilon prediction starts


@pytest.mark.parametrize("steps", [1, 25, 250])
def test_epsilon_by_default_starts_where_the_solver_of_diffusers_would_with_its_limit_for_the_cosine_schedule(steps):
    process = Process(DiffusionConfig(prediction="epsilon"))
    reference = multistep(process, steps, lambda_min_clipped=-5.1)
    assert int(reference.timesteps[0]) + 1 == Sampler(process, SamplerConfig("dpmpp", steps=steps)).timesteps[0]


@pytest.mark.parametrize(("name", "steps"), [("ddpm", 250), ("dpmpp", 25)])
def test_epsilon_by_default(name, steps):
    """The paper's own setting, on the same levels."""
    process = Process(DiffusionConfig())
    sampler = Sampler(process, SamplerConfig(name, steps=steps))
    reference = scheduler("DDPMScheduler" if name == "ddpm" else "DPMSolverMultistepScheduler", process)
    reference.set_timesteps(timesteps=[t - 1 for t in sampler.timesteps])
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(0))
    assert_same_path(ours(sampler, state), theirs(reference, state), stock(steps))


# Rectified flow, whose timesteps are ours: sigma is t / T


def flow_path(reference, state: SamplerState) -> list[Tensor]:
    """Walk a flow-match scheduler of diffusers from the same x."""
    x, path = state.x[None], []
    reference.set_begin_index(0)
    for t in reference.timesteps:
        x = reference.step(network(x[0], round(t.item()))[None], t, x).prev_sample
        path.append(x[0])
    return path


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 250])
def test_euler(steps, shift, clip):
    process = Process(DiffusionConfig(schedule="flow", prediction="v", shift=shift, clip_x0=None))
    sampler = Sampler(process, SamplerConfig("euler", steps=steps))
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    reference.set_timesteps(sigmas=[(steps - i) / steps for i in range(steps)])
    # Ours are whole levels, one of a thousand apart; many steps of a small shift are moved up to stay distinct.
    levels = torch.tensor(sampler.timesteps)
    torch.testing.assert_close(levels.float(), reference.timesteps, rtol=0, atol=0.51 if shift >= 1 else 10)
    reference = diffusers.FlowMatchEulerDiscreteScheduler()
    reference.set_timesteps(sigmas=(levels.double() / 1000).tolist())
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(steps))
    assert_same_path(ours(sampler, state), flow_path(reference, state), FLOAT32)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("evaluations", [1, 3, 7, 19, 99])
def test_heun(evaluations, shift):
    process = Process(DiffusionConfig(schedule="flow", prediction="v", shift=shift))
    sampler = Sampler(process, SamplerConfig("heun", steps=evaluations))
    reference = diffusers.FlowMatchHeunDiscreteScheduler()
    reference.set_timesteps((evaluations + 1) // 2)
    assert len(reference.timesteps) == evaluations
    levels = torch.tensor([*sampler.timesteps, 0], dtype=torch.float64)
    reference.timesteps, reference.sigmas = levels[:-1], (levels / 1000).float()
    # Theirs lists each level of `sigmas` as ours does, once where it is predicted, once where it begins the next step.
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(evaluations))
    assert_same_path(ours(sampler, state), flow_path(reference, state), FLOAT32)


def test_noise_of_flow():
    process, reference = Process(DiffusionConfig(schedule="flow")), diffusers.FlowMatchEulerDiscreteScheduler()
    t = torch.tensor([1, 20, 500, 1000])
    x0, noise = torch.randn(2, len(t), *SHAPE, generator=torch.Generator().manual_seed(0))
    expected = reference.scale_noise(x0, t.float(), noise)
    torch.testing.assert_close(process.add_noise(x0, noise, t), expected, rtol=0, atol=1e-6)


# On purpose


def test_unlike_diffusers_ddim_goes_to_the_level_that_it_evaluates_next():
    """diffusers steps down by T // steps whatever the spacing: 15 steps of 66 fall short of 1000. Ours is exact, as the
    first-order solver confirms, which is DDIM too."""
    process = Process(DiffusionConfig(prediction="v"))
    sampler = Sampler(process, SamplerConfig("ddim", steps=15))
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(0))
    solver = scheduler("DPMSolverMultistepScheduler", process, solver_order=1, final_sigmas_type="zero")
    ddim = scheduler("DDIMScheduler", process)
    for reference in (solver, ddim):
        reference.set_timesteps(15)
        assert sampler.timesteps == tuple((reference.timesteps + 1).tolist())
    path = ours(sampler, state)
    assert_same_path(path, theirs(solver, state), stock(20))
    with pytest.raises(AssertionError):
        assert_same_path(path, theirs(ddim, state), 1e-3)


def test_unlike_diffusers_by_default_ddim_clips_x0_and_noise_together():
    """Else x_t would no longer be made of the two, and DDIM would not be the solver of first order."""
    process = Process(DiffusionConfig(prediction="v", clip_x0=0.4))
    sampler = Sampler(process, SamplerConfig("ddim", steps=20))
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(0))
    reference = scheduler("DDIMScheduler", process)
    reference.set_timesteps(20)
    assert_same_path(ours(sampler, state), theirs(reference, state, use_clipped_model_output=True), stock(20))
    with pytest.raises(AssertionError):
        assert_same_path(ours(sampler, state), theirs(reference, state), 1e-2)


def test_unlike_diffusers_the_last_ddpm_step_adds_no_noise_at_all():
    """diffusers keeps a variance of 1e-20 there; ours is the estimate of x0 to the last bit."""
    sampler = Sampler(Process(DiffusionConfig(prediction="v")), SamplerConfig("ddpm", steps=1))
    state = sampler.prepare(SHAPE, torch.Generator().manual_seed(0))
    prediction = network(state.x, state.t)
    done = sampler.step(state, prediction)
    assert torch.equal(sampler.finish(done), sampler.process.predicted_x0(prediction, state.x, 1000))
    assert torch.equal(done.rng, state.rng)
