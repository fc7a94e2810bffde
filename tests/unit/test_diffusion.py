"""The diffusion process and its samplers: exact identities, no network and no other library."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfuse.diffusion import (
    DiffusionConfig,
    Process,
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

PREDICTIONS = ("epsilon", "v", "x0")
SCHEDULES = ("cosine", "flow")
SHAPE = (3, 4, 6)
SAMPLERS = [
    SamplerConfig("ddpm", steps=10),
    SamplerConfig("ddim", steps=10),
    SamplerConfig("ddim", steps=10, eta=0.7),
    SamplerConfig("dpmpp", steps=10),
]
FLOW_SAMPLERS = [SamplerConfig("euler", steps=10), SamplerConfig("heun", steps=10), SamplerConfig("heun", steps=11)]
EVERY = [(schedule, config) for schedule in SCHEDULES for config in SAMPLERS] + [("flow", c) for c in FLOW_SAMPLERS]
every_sampler = pytest.mark.parametrize(
    ("schedule", "config"), EVERY, ids=[f"{s}-{c.name}-{c.eta or c.steps}" for s, c in EVERY]
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, *SHAPE, generator=seeded(seed), dtype=dtype)


def network(x: Tensor, t: Tensor) -> Tensor:
    """A stand-in that mixes channels and depends on t; each image's answer depends on that image alone."""
    return torch.tanh(0.7 * x + 0.3 * x.roll(1, -3) - t[..., None, None, None] / 1000)


def oracle(process: Process, x0: Tensor, x_t: Tensor, t: int) -> Tensor:
    """The perfect prediction: it knows x0, and so which noise x_t holds."""
    noise = (x_t - process.signal[t].item() * x0) / process.sigma[t].item()
    return process.target(x0, noise, t)


def trajectory(sampler: Sampler, state: SamplerState) -> list[SamplerState]:
    states = [state]
    while not states[-1].done:
        states.append(sampler.step(states[-1], sampler.denoise(states[-1], network)))
    return states


# The process


@pytest.mark.parametrize("timesteps", [1, 2, 10, 1000, 4000])
def test_alpha_bar_falls_from_exactly_one_and_never_reaches_zero(timesteps):
    alpha_bar = Process(DiffusionConfig(timesteps=timesteps)).alpha_bar
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.shape == (timesteps + 1,)
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() < 0).all()
    assert 0 < alpha_bar[-1] < 2e-3


def test_alpha_bar_is_the_closed_form_of_the_cosine_schedule_except_where_beta_is_clipped():
    alpha_bar = Process(DiffusionConfig()).alpha_bar
    level = torch.arange(1001, dtype=torch.float64) / 1000
    closed = torch.cos((level + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alpha_bar[:-1], closed[:-1], rtol=1e-9, atol=0)
    assert alpha_bar[1000] / alpha_bar[999] == pytest.approx(1 - 0.999)


@pytest.mark.parametrize("timesteps", [1, 10, 1000])
def test_flow_is_the_straight_line_from_image_to_noise(timesteps):
    process = Process(DiffusionConfig(timesteps=timesteps, schedule="flow", prediction="v"))
    x0, noise = images(1), images(1, 1)
    for t in {0, timesteps // 3, timesteps}:
        x_t = process.add_noise(x0, noise, torch.tensor([t]))
        torch.testing.assert_close(x_t, torch.lerp(x0, noise, t / timesteps), rtol=0, atol=1e-12)
    assert torch.equal(process.add_noise(x0, noise, torch.tensor([timesteps])), noise), "nothing of the image is left"
    assert torch.equal(process.target(x0, noise, torch.tensor([timesteps])), noise - x0), "its derivative"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_t_zero_is_the_clean_image_exactly(schedule, prediction, dtype):
    process, x0, noise, t = (
        Process(DiffusionConfig(schedule=schedule, prediction=prediction)),
        images(2),
        images(2, 1),
        torch.zeros(2).long(),
    )
    x0, noise = x0.to(dtype), noise.to(dtype)
    x_t = process.add_noise(x0, noise, t)
    assert torch.equal(x_t, x0)
    target = process.target(x0, noise, t)
    assert torch.equal(process.predicted_x0(target, x_t, t), x0)
    epsilon = process.predicted_epsilon(target, x_t, t)
    expected = torch.zeros_like(noise) if prediction == "x0" else noise
    if schedule == "flow" and prediction == "v":  # there v is noise - x0, and x0 is added again: rounded twice
        torch.testing.assert_close(epsilon, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    else:
        assert torch.equal(epsilon, expected)


@settings(max_examples=60, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    prediction=st.sampled_from(PREDICTIONS),
    t=st.lists(st.integers(1, 999), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_x0_and_noise_come_back_from_the_target(schedule, prediction, t, seed):
    process = Process(DiffusionConfig(schedule=schedule, prediction=prediction))
    x0, noise, timesteps = images(len(t), seed), images(len(t), seed + 1), torch.tensor(t)
    x_t = process.add_noise(x0, noise, timesteps)
    target = process.target(x0, noise, timesteps)
    torch.testing.assert_close(process.predicted_x0(target, x_t, timesteps), x0, rtol=0, atol=1e-9)
    torch.testing.assert_close(process.predicted_epsilon(target, x_t, timesteps), noise, rtol=0, atol=1e-9)
    # Each image goes its own way, whatever is beside it in the batch.
    alone = process.add_noise(x0[0], noise[0], t[0])
    assert torch.equal(alone, x_t[0])
    assert torch.equal(
        process.predicted_x0(target[0], alone, timesteps[0]), process.predicted_x0(target, x_t, timesteps)[0]
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_noisiest_level_is_finite_in_every_precision(prediction):
    process = Process(DiffusionConfig(prediction=prediction))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x_t, output = images(1, 0, dtype), images(1, 1, dtype)
        t = torch.tensor([1000])
        found = (process.predicted_x0(output, x_t, t), process.predicted_epsilon(output, x_t, t))
        for value in found:
            assert value.dtype == dtype
        if dtype != torch.float16:  # whose largest number is 65,504, three deviations away for epsilon
            assert all(value.isfinite().all() for value in found)


@pytest.mark.parametrize("t", [torch.tensor(300), torch.tensor([300, 7])])
def test_bfloat16_images_are_mixed_in_float32(t):
    process = Process(DiffusionConfig())
    x0, noise = images(2, 0, torch.bfloat16), images(2, 1, torch.bfloat16)
    if not t.dim():
        x0, noise = x0[0], noise[0]
    expected = process.add_noise(x0.float(), noise.float(), t).bfloat16()
    assert torch.equal(process.add_noise(x0, noise, t), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_results_are_on_the_device_of_the_images(prediction):
    process, t = Process(DiffusionConfig(prediction=prediction)), torch.tensor([1, 1000])
    x, other = images(2).to("meta"), images(2, 1).to("meta")
    for method in (process.add_noise, process.target, process.predicted_x0, process.predicted_epsilon):
        assert method(x, other, t).device.type == "meta"
        assert method(x, other, t.to("meta")).device.type == "meta"
    assert process.weight(t.to("meta")).device.type == "meta"


def test_a_process_first_used_in_inference_mode_can_train():
    process = Process(DiffusionConfig())
    with torch.inference_mode():
        process.add_noise(images(1), images(1, 1), torch.tensor([5]))
    output = images(1, 2).requires_grad_()
    process.predicted_x0(output, images(1), torch.tensor([5])).sum().backward()
    assert output.grad is not None


def test_weights():
    t = torch.tensor([0, 1, 250, 1000])
    assert torch.equal(Process(DiffusionConfig()).weight(t), torch.ones(4))
    process = Process(DiffusionConfig(prediction="x0", weighting="v"))
    assert process.weight(t).dtype == torch.float32
    assert process.weight(250).shape == ()
    expected = 1 / (1 - process.alpha_bar[t]).clamp(min=0.05)
    torch.testing.assert_close(process.weight(t).double(), expected, rtol=1e-6, atol=0)
    assert process.weight(0).item() == pytest.approx(20)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_v_weight_makes_an_x0_error_count_as_a_v_error(schedule):
    by_v = Process(DiffusionConfig(schedule=schedule, prediction="v"))
    by_x0 = Process(DiffusionConfig(schedule=schedule, prediction="x0", weighting="v"))
    x0, noise, t = images(1), images(1, 1), torch.tensor([600])
    x_t, output = by_v.add_noise(x0, noise, t), images(1, 2)
    error_v = (output - by_v.target(x0, noise, t)).square().mean()
    error_x0 = (by_v.predicted_x0(output, x_t, t) - x0).square().mean()
    assert (by_x0.weight(t)[0] * error_x0).item() == pytest.approx(error_v.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps": 0}, "timesteps: expected at least 1, found 0"),
        ({"schedule": "linear"}, "schedule: expected one of .*cosine.*, found 'linear'"),
        ({"prediction": "noise"}, "prediction: expected one of .*, found 'noise'"),
        ({"weighting": "snr"}, "weighting: expected one of .*, found 'snr'"),
        ({"weighting": "v"}, "weighting: expected 'uniform' for epsilon prediction, found 'v'"),
        ({"times": "beta"}, "times: expected one of .*logit-normal.*, found 'beta'"),
        ({"times": "logit-normal", "times_std": 0.0}, "times_std: expected a positive number, found 0.0"),
        ({"times_mean": 1.0}, "times_mean, times_std: expected 0 and 1 for uniform times"),
        ({"shift": -1.0}, "shift: expected a positive number, found -1.0"),
        ({"shift": math.inf}, "shift: expected a positive number, found inf"),
        ({"shift_side": 0}, "shift_side: expected None or a positive number, found 0"),
        ({"clip_x0": 0.0}, "clip_x0: expected None or a positive number, found 0.0"),
        ({"clip_x0": math.nan}, "clip_x0: expected None or a positive number, found nan"),
    ],
)
def test_a_bad_diffusion_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        DiffusionConfig(**fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([1, 1001]), "t: expected 0..1000, found 1..1001"),
        (torch.tensor([-1, 1]), "t: expected 0..1000, found -1..1"),
        (torch.tensor([1.0, 2.0]), "t: expected int64, found float32"),
        (torch.tensor([1]), r"t: expected one timestep per image of \[2, 3, 4, 6\], found shape \[1\]"),
        (5, r"t: expected one timestep per image of \[2, 3, 4, 6\], found shape \[\]"),
    ],
)
def test_bad_timesteps_are_refused(t, message):
    with pytest.raises(ValueError, match=message):
        Process(DiffusionConfig()).add_noise(images(2), images(2, 1), t)


def test_images_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"images: expected two of one shape, found \[2, 3, 4, 6\] and \[1, 3, 4, 6\]"):
        Process(DiffusionConfig()).add_noise(images(2), images(1), torch.tensor([1, 2]))


# Levels


@given(first=st.integers(1, 1200), share=st.floats(0, 1))
def test_levels_are_distinct_and_run_from_the_first_to_above_zero(first, share):
    steps = max(1, round(first * share))
    levels = trailing_timesteps(first, steps)
    assert len(levels) == steps
    assert levels[0] == first
    assert levels[-1] >= 1
    assert all(a > b for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize(
    ("prediction", "config", "first", "last"),
    [
        ("v", SamplerConfig(), 1000, 4),
        ("x0", SamplerConfig("dpmpp", steps=20), 1000, 50),
        ("epsilon", SamplerConfig(), 996, 4),  # epsilon prediction starts where x0 can be read off it
        ("epsilon", SamplerConfig(steps=1000), 1000, 1),  # there being only so many levels
        ("epsilon", SamplerConfig(first=1000), 1000, 4),
        ("v", SamplerConfig(steps=50, first=500), 500, 10),
    ],
)
def test_where_the_chain_starts(prediction, config, first, last):
    sampler = Sampler(Process(DiffusionConfig(prediction=prediction)), config)
    assert (sampler.timesteps[0], sampler.timesteps[-1]) == (first, last)


@pytest.mark.parametrize("config", [SamplerConfig("ddim", steps=50), SamplerConfig("dpmpp", steps=25)])
def test_epsilon_from_a_network_in_bfloat16_still_samples_the_data(config):
    """Why `first_timestep` is below T. Data N(0.5, 0.5): the exact answer, rounded to bfloat16, must give it back."""
    process = Process(DiffusionConfig(prediction="epsilon"))

    def deviation(config: SamplerConfig) -> float:
        sampler = Sampler(process, config)
        state = sampler.prepare((4, 32, 32), seeded(0))
        while not state.done:
            alpha_bar = process.alpha_bar[state.t].item()
            noise_share = (1 - alpha_bar) / (1 - alpha_bar + alpha_bar * 0.25)
            epsilon = noise_share * (state.x - math.sqrt(alpha_bar) * 0.5) / math.sqrt(1 - alpha_bar)
            state = sampler.step(state, epsilon.bfloat16())
        return sampler.finish(state).std().item()

    assert deviation(config) == pytest.approx(0.5, abs=0.03)
    assert deviation(dataclasses.replace(config, first=1000)) > 0.65


@given(first=st.integers(1, 1000), share=st.floats(0, 1), shift=st.floats(0.1, 10))
def test_shifted_levels_are_distinct_and_run_from_the_first_to_above_zero(first, share, shift):
    steps = max(1, round(first * share))
    levels = shifted_timesteps(first, steps, 1000, shift)
    assert len(levels) == steps
    assert levels[0] == first
    assert levels[-1] >= 1
    assert all(a > b for a, b in itertools.pairwise(levels))


def test_a_shift_moves_the_levels_towards_noise_and_larger_images_further():
    config = DiffusionConfig(schedule="flow", prediction="v", shift=3.0, shift_side=16)
    sampler = Sampler(Process(config), SamplerConfig("euler", steps=4))
    # u is 1, 3/4, 1/2, 1/4; 3 u / (1 + 2 u) of 1,000
    assert sampler.timesteps_for(16, 16) == (1000, 900, 750, 500)
    assert sampler.timesteps_for(8, 32) == (1000, 900, 750, 500), "as many patches"
    assert sampler.timesteps_for(32, 32) == (1000, 947, 857, 667), "twice the side, twice the shift"
    for side, levels in ((16, (1000, 900, 750, 500)), (32, (1000, 947, 857, 667))):
        assert sampler.prepare((4, side, side), seeded(0)).timesteps == levels


def drawn_levels(count: int = 4000, most: int | None = None, side: int = 8, **fields) -> Tensor:
    process, generator = Process(DiffusionConfig(**fields)), seeded(0)
    return torch.tensor([process.sample_timestep(generator, side, side, most) for _ in range(count)])


def test_training_times_have_the_distributions_that_they_name():
    uniform = drawn_levels()
    assert (uniform.min(), uniform.max()) == (1, 1000)
    assert uniform.double().mean() == pytest.approx(500.5, abs=15)
    normal = drawn_levels(times="logit-normal", times_mean=0.8, times_std=0.5)
    logit = torch.logit((normal.double() - 0.5) / 1000)
    assert logit.mean() == pytest.approx(0.8, abs=0.03)
    assert logit.std() == pytest.approx(0.5, abs=0.03)
    moved = drawn_levels(shift=3.0).double() / 1000
    assert (moved <= 0.75).double().mean() == pytest.approx(0.5, abs=0.03), "half of u is below 1/2, moved to 3/4"
    larger = drawn_levels(shift=3.0, shift_side=8, side=16).double() / 1000
    assert (larger <= 6 / 7).double().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("fields", [{}, {"times": "logit-normal"}, {"shift": 3.0}])
def test_training_times_stop_at_the_cap(fields):
    capped = drawn_levels(most=500, **fields)
    assert 1 <= capped.min() < 100
    assert 400 < capped.max() <= 500
    assert drawn_levels(count=100, most=5000, **fields).max() > 500, "a cap beyond the last level is none"


# Samplers


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 250])
@every_sampler
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_oracle_is_followed_to_x0(prediction, schedule, config, steps):
    process = Process(DiffusionConfig(schedule=schedule, prediction=prediction))
    sampler = Sampler(process, dataclasses.replace(config, steps=steps))
    # In one step epsilon goes through a division by 0.006, so there its own float32 rounding would show.
    dtype = torch.float64 if steps == 1 else torch.float32
    x0 = images(1, 3, dtype)[0]
    state = sampler.prepare(SHAPE, seeded(4), start=images(1, 4, dtype)[0])
    while not state.done:
        state = sampler.step(state, oracle(process, x0, state.x, state.t))
    torch.testing.assert_close(sampler.finish(state), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("schedule", "name"), [(s, n) for s in SCHEDULES for n in ("ddim", "dpmpp")] + [("flow", "euler"), ("flow", "heun")]
)
def test_a_perfect_oracle_walks_the_forward_process_back(schedule, name, prediction):
    """Without fresh noise, every x on the way is the one that add_noise makes of the same x0 and noise."""
    process = Process(DiffusionConfig(schedule=schedule, prediction=prediction))
    sampler = Sampler(process, SamplerConfig(name, steps=20))
    x0, noise = images(2, 5)
    state = sampler.prepare(SHAPE, seeded(0), start=process.add_noise(x0, noise, sampler.timesteps[0]))
    while not state.done:
        torch.testing.assert_close(state.x, process.add_noise(x0, noise, state.t), rtol=0, atol=1e-9)
        state = sampler.step(state, oracle(process, x0, state.x, state.t))
    assert state.t == 0


@pytest.mark.parametrize("steps", [1, 2, 7, 15, 250, 1000])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp", "euler", "heun"])
def test_n_steps_are_n_evaluations(name, steps):
    calls = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == ()
        calls.append(int(t))
        return torch.zeros_like(x)

    sampler = Sampler(Process(DiffusionConfig(schedule="flow", prediction="v")), SamplerConfig(name, steps=steps))
    state = sampler.prepare((1, 2, 2), seeded(0))
    while not state.done:
        assert (state.index, state.total) == (len(calls), steps)
        state = sampler.step(state, sampler.denoise(state, predict))
    assert tuple(calls) == sampler.timesteps
    assert len(calls) == steps
    assert sampler.finish(state).isfinite().all()


@every_sampler
def test_a_step_leaves_its_state_alone_and_can_be_replayed(schedule, config):
    sampler = Sampler(Process(DiffusionConfig(schedule=schedule, prediction="v", clip_x0=2.0)), config)
    states = trajectory(sampler, sampler.prepare(SHAPE, seeded(1)))
    for state, after in itertools.pairwise(states):
        kept = copy.deepcopy(state)
        prediction = sampler.denoise(state, network)
        for replayed in (sampler.step(state, prediction), sampler.step(kept, prediction)):
            assert torch.equal(replayed.x, after.x)
            assert torch.equal(replayed.rng, after.rng)
        assert torch.equal(kept.x, state.x)
        assert torch.equal(kept.rng, state.rng)
        assert kept.index == state.index
        assert after.index == state.index + 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            state.index = 0
    assert after.x0 is not None
    assert torch.equal(after.x0, after.x)  # the last step lands on the last estimate of x0, exactly


def test_images_in_one_batch_are_the_images_alone():
    """Different samplers, step counts and sizes of step, one network call for all that are still on their way."""
    process = Process(DiffusionConfig(prediction="v"))
    samplers = [Sampler(process, dataclasses.replace(c, steps=3 + 2 * i)) for i, c in enumerate(SAMPLERS)]
    alone = [trajectory(s, s.prepare(SHAPE, seeded(i)))[-1] for i, s in enumerate(samplers)]
    states = [s.prepare(SHAPE, seeded(i)) for i, s in enumerate(samplers)]
    while live := [i for i, state in enumerate(states) if not state.done]:
        answer = network(torch.stack([states[i].x for i in live]), torch.tensor([states[i].t for i in live]))
        for i, row in zip(live, answer, strict=True):
            states[i] = samplers[i].step(states[i], row)
    for state, expected in zip(states, alone, strict=True):
        torch.testing.assert_close(state.x, expected.x, rtol=0, atol=1e-6)


def test_a_seed_fixes_the_noise_and_one_generator_serves_many_images():
    process = Process(DiffusionConfig())
    samplers = [Sampler(process, config) for config in SAMPLERS]
    generator = seeded(7)
    first, second, third, _ = (s.prepare(SHAPE, generator) for s in samplers)
    again = seeded(7)
    for state in (first, second, third):  # the draws do not depend on the sampler, nor on how far others have got
        trajectory(samplers[0], state)
        twin = samplers[0].prepare(SHAPE, again)
        assert torch.equal(twin.x, state.x)
        assert torch.equal(twin.rng, state.rng)
    assert not torch.equal(first.x, second.x)
    # Step noise is nobody's starting noise.
    step_noise = torch.Generator()
    step_noise.set_state(first.rng)
    assert not torch.equal(torch.randn(SHAPE, generator=step_noise), second.x)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_ddim_is_ddpm_at_eta_one_and_dpmpp_of_first_order_at_eta_zero(clip):
    x_t, x0, noise = images(3)
    if clip:
        x0 = x0.clamp(-clip, clip)
    for alpha_bar_t, alpha_bar_s in [(1e-9, 0.01), (0.2, 0.5), (0.9, 0.99), (0.9, 1.0)]:
        levels = (x_t, x0, alpha_bar_t, alpha_bar_s)
        torch.testing.assert_close(ddim_step(*levels, 1.0, noise), ddpm_step(*levels, noise), rtol=0, atol=1e-12)
        torch.testing.assert_close(ddim_step(*levels, 0.0, None), dpmpp_step(*levels), rtol=0, atol=1e-12)


def test_on_flow_ddim_is_the_rule_of_euler():
    """Both keep x0 and the noise that x_t implies; they share no line of code."""
    process = Process(DiffusionConfig(schedule="flow", prediction="v"))
    paths = []
    for name in ("ddim", "euler"):
        sampler = Sampler(process, SamplerConfig(name, steps=12))
        paths.append(trajectory(sampler, sampler.prepare(SHAPE, seeded(3), start=images(1, 3)[0])))
    for ddim, euler in zip(*paths, strict=True):
        torch.testing.assert_close(ddim.x, euler.x, rtol=0, atol=1e-9)


def test_heun_is_of_second_order():
    """Data N(0, 1/4) has a velocity in closed form; twice the steps leave a quarter of the error, Euler's a half."""
    process = Process(DiffusionConfig(timesteps=100_000, schedule="flow", prediction="v"))
    start, first, last = images(1, 6)[0], 90_000, 30_000

    def velocity(x: Tensor, t: float) -> Tensor:
        signal, sigma = 1 - t, t
        return (sigma - signal / 4) / (signal**2 / 4 + sigma**2) * x

    def error(rule: str, steps: int) -> float:
        x = start
        levels = torch.linspace(first, last, steps + 1, dtype=torch.float64) / 100_000
        for t, s in itertools.pairwise(levels.tolist()):
            x0 = process.predicted_x0(velocity(x, t), x, round(t * 100_000))
            there = euler_step(x, x0, t, s)
            x = there if rule == "euler" else heun_step(x, velocity(x, t), velocity(there, s), t, s)
        deviation = [math.hypot((1 - t) / 2, t) for t in (0.9, 0.3)]
        return (x - start * deviation[1] / deviation[0]).abs().max().item()

    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, abs=0.2)
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4, abs=0.4)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_the_rules_of_flow_refuse_another_schedule(name):
    with pytest.raises(ValueError, match=f"name: expected ddpm, ddim or dpmpp for the cosine schedule, found '{name}'"):
        Sampler(Process(DiffusionConfig()), SamplerConfig(name))


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
@every_sampler
def test_what_a_mask_keeps_is_kept_exactly_whatever_the_rule_and_strength(schedule, config, strength):
    sampler = Sampler(Process(DiffusionConfig(schedule=schedule, prediction="v")), config)
    image, mask = images(1, 8, torch.float32)[0], torch.zeros(SHAPE[1:], dtype=torch.bool)
    mask[1:3, 2:] = True
    state = trajectory(sampler, sampler.prepare_from(image, seeded(5), strength, mask))[-1]
    assert torch.equal(sampler.finish(state)[:, ~mask], image[:, ~mask])
    assert torch.equal(sampler.finish(state)[:, mask], image[:, mask]) == (strength == 0)


def test_clipping_bounds_every_estimate_and_the_image():
    sampler = Sampler(Process(DiffusionConfig(clip_x0=0.3)), SamplerConfig("ddpm", steps=8))
    states = trajectory(sampler, sampler.prepare(SHAPE, seeded(0)))
    assert all(state.x0.abs().max() <= 0.3 for state in states[1:])
    assert sampler.finish(states[-1]).abs().max() <= 0.3


def test_x_keeps_its_precision_and_low_precision_is_raised_to_float32():
    sampler = Sampler(Process(DiffusionConfig(prediction="v")), SAMPLERS[0])
    for dtype, kept in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        state = sampler.prepare(SHAPE, seeded(0), start=images(1, 0, dtype)[0])
        assert sampler.step(state, images(1, 1, torch.bfloat16)[0]).x.dtype == kept


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "rk4"}, "name: expected one of .*, found 'rk4'"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"eta": 0.5}, "eta: expected 0..1 for ddim and 0 otherwise, found 0.5 for ddpm"),
        ({"name": "ddim", "eta": 1.5}, "eta: expected 0..1 for ddim and 0 otherwise, found 1.5 for ddim"),
    ],
)
def test_a_bad_sampler_config_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SamplerConfig(steps=101), r"steps: expected 1..100 \(the levels to step down\), found 101"),
        (SamplerConfig(steps=11, first=10), r"steps: expected 1..10 \(the levels to step down\), found 11"),
        (SamplerConfig(steps=1, first=101), r"first: expected 1..100 \(the training timesteps\), found 101"),
        (SamplerConfig(steps=1, first=0), r"first: expected 1..100 \(the training timesteps\), found 0"),
    ],
)
def test_more_steps_than_levels_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Sampler(Process(DiffusionConfig(timesteps=100)), config)


def test_steps_out_of_turn_and_misshapen_tensors_are_refused():
    sampler = Sampler(Process(DiffusionConfig()), SamplerConfig(steps=1))
    state = sampler.prepare(SHAPE, seeded(0))
    with pytest.raises(ValueError, match="state: expected all 1 steps taken, found 0"):
        sampler.finish(state)
    with pytest.raises(ValueError, match="images: expected two of one shape"):
        sampler.step(state, torch.zeros(3, 4, 5))
    done = sampler.step(state, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="state: expected a step left to take, found all 1 taken"):
        sampler.step(done, torch.zeros(SHAPE))
    with pytest.raises(ValueError, match=r"start: expected shape \[3, 4, 6\], found \[3, 4, 5\]"):
        sampler.prepare(SHAPE, seeded(0), start=torch.zeros(3, 4, 5))
