"""Rectified flow from training to the engine: a run, its resumption and export, and every rule against an oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import exported, latent

import transfuse
from transfuse.diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from transfuse.errors import UserError
from transfuse.export import GenerationConfig, relayout
from transfuse.inference import Engine, ImageEnd, ImageProgress, Request, Start, TransfusionPipeline
from transfuse.model import dense
from transfuse.recipes import Recipe, preset
from transfuse.rng import generator_for
from transfuse.runs import resolve
from transfuse.sequence import Document, Image, Text, Tokenizer, collate
from transfuse.train import train

FLOW = DiffusionConfig(schedule="flow", prediction="v", times="logit-normal", shift=2.0, shift_side=16)
RULES = [SamplerConfig("euler", 3), SamplerConfig("heun", 4), SamplerConfig("dpmpp", 3), SamplerConfig("ddpm", 3)]
PROMPT = Document([Text((10, 11, 12))], closed=False)


@pytest.fixture(scope="module")
def engine(tokenizer: Tokenizer) -> Engine:
    return Engine(replace(exported(tokenizer), process=Process(FLOW)))


def request(sampler: SamplerConfig, **changes: object) -> Request:
    base = Request(PROMPT, draw="force", max_tokens=0, size=(8, 8), sampler=sampler, guidance_scale=1.0, seed=5)
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("steps", "first", "named"), [(20, None, "steps"), (4, 20, "first")])
def test_a_network_that_predicts_noise_does_not_begin_at_noise_alone(steps: int, first: int | None, named: str) -> None:
    process = Process(DiffusionConfig(schedule="flow", prediction="epsilon", timesteps=20))
    for name in ("ddim", "euler"):
        with pytest.raises(ValueError, match=f"^{named}: expected less than 20.*found 20$"):
            Sampler(process, SamplerConfig(name, steps=steps, first=first))
        sampler = Sampler(process, SamplerConfig(name, steps=4 if first else 19, first=first and 19))
        state = sampler.prepare((3, 8, 8), generator_for(0, "image", 0))
        while not state.done:
            state = sampler.step(state, torch.ones(3, 8, 8))
        assert sampler.finish(state).isfinite().all()
    Sampler(Process(DiffusionConfig(schedule="flow", prediction="v", timesteps=20)), SamplerConfig("ddim", steps=20))


def images(engine: Engine, *requests: Request) -> list[torch.Tensor]:
    found = {event.request_id: event.latent for event in engine.run(requests) if isinstance(event, ImageEnd)}
    return [found[row] for row in range(len(requests))]


def uncached_image(engine: Engine, sampler: SamplerConfig, seed: int) -> torch.Tensor:
    """The same drawing by whole forward passes with a dense mask and no cache."""
    rule = Sampler(engine.exported.process, sampler)
    state = rule.prepare((3, 8, 8), generator_for(seed, "image", 0))
    while not state.done:
        batch = collate([replace(PROMPT, parts=[*PROMPT.parts, Image(state.x)])], engine.grammar)
        out = engine.exported.model(
            batch.input_ids,
            batch.position_ids,
            dense(batch),
            batch.loss_positions,
            batch.patches,
            batch.latents,
            torch.tensor([state.t]),
        )
        state = rule.step(state, out.predictions[-1])
    return rule.finish(state)


@pytest.mark.parametrize("sampler", RULES, ids=lambda sampler: sampler.name)
def test_the_engine_draws_what_whole_forward_passes_draw(engine: Engine, sampler: SamplerConfig) -> None:
    (found,) = images(engine, request(sampler))
    torch.testing.assert_close(found, uncached_image(engine, sampler, 5), rtol=1e-4, atol=1e-4)


def test_rules_share_a_batch_and_change_nothing_for_each_other(engine: Engine) -> None:
    requests = [request(sampler, seed=number) for number, sampler in enumerate(RULES)]
    alone = [images(engine, one)[0] for one in requests]
    for together, single in zip(images(engine, *requests), alone, strict=True):
        torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", RULES, ids=lambda sampler: sampler.name)
def test_guidance_counts_within_its_interval_alone(engine: Engine, sampler: SamplerConfig) -> None:
    guided = request(sampler, guidance_scale=3.0)
    intervals = [None, (0.0, 1.0), (0.0, 0.0), (0.7, 1.0)]
    everywhere, whole, nowhere, early = (
        images(engine, replace(guided, guidance_interval=interval))[0] for interval in intervals
    )
    (plain,) = images(engine, request(sampler))
    assert torch.equal(whole, everywhere)
    torch.testing.assert_close(nowhere, plain, rtol=1e-4, atol=1e-4)
    for other in (plain, everywhere):
        assert not torch.allclose(early, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sampler", RULES, ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_masks_strength_and_previews(engine: Engine, sampler: SamplerConfig, strength: float) -> None:
    source, mask = latent(8, 8), torch.zeros(8, 8, dtype=torch.bool)
    mask[:4] = True
    events = list(
        engine.run([request(sampler, start=Start(source, strength, mask), preview_every=1, guidance_scale=2.0)])
    )
    (image,) = [event.latent for event in events if isinstance(event, ImageEnd)]
    assert torch.equal(image[:, 4:], source[:, 4:])
    assert torch.equal(image, source) == (strength == 0)
    steps = [event for event in events if isinstance(event, ImageProgress)]
    assert all(event.preview is not None for event in steps)
    assert [event.step for event in steps] == list(range(1, len(steps) + 1))
    assert len(steps) <= round(strength * sampler.steps)


def recipe(steps: int = 5, **loop: object) -> Recipe:
    base = preset("tiny")
    return replace(
        base,
        diffusion=replace(FLOW, clip_x0=1.0),
        generation=GenerationConfig(SamplerConfig("heun", steps=3)),
        loop=replace(base.loop, steps=steps, checkpoint_every=2, log_every=2, **loop),  # type: ignore[arg-type]
    )


def test_a_run_resumes_bit_for_bit_and_its_export_draws(tmp_path: Path) -> None:
    train(recipe(), tmp_path / "straight")
    # Too short a session for a second step: the same command again and again.
    hurried = recipe(session_seconds=1e-9)
    outcomes = []
    while not outcomes or outcomes[-1] != "finished":
        outcomes.append(train(hurried, tmp_path / "resumed").outcome)
    assert len(outcomes) > 3
    straight, resumed = (transfuse.load(tmp_path / name / "export") for name in ("straight", "resumed"))
    for name, tensor in straight.exported.model.state_dict().items():
        assert torch.equal(tensor, resumed.exported.model.state_dict()[name]), name
    assert straight.exported.process.config == hurried.diffusion
    assert straight.exported.generation.sampler == SamplerConfig("heun", steps=3)
    for sampler in (None, "euler", "dpmpp"):
        images = [pipe("a crab", generator=3, sampler=sampler).images[0] for pipe in (straight, resumed)]
        assert images[0].tobytes() == images[1].tobytes()


def test_a_rule_that_the_schedule_has_not_is_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="sampler: name: expected ddpm, ddim or dpmpp for the cosine schedule"):
        TransfusionPipeline(exported(tokenizer))("a crab", sampler="euler")
    base = preset("tiny")
    with pytest.raises(UserError, match=r"generation.sampler: name: expected ddpm, ddim or dpmpp"):
        resolve(replace(base, generation=GenerationConfig(SamplerConfig("heun", steps=3))))


def test_diffusers_opens_the_scheduler_of_an_export(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    folder = train(recipe(), tmp_path / "run").export
    assert folder is not None
    relayout(folder, tmp_path / "diffusers", "diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "diffusers" / "scheduler")
    assert scheduler.config.num_train_timesteps == 1000
    by_epsilon = replace(recipe(steps=1), diffusion=DiffusionConfig(schedule="flow", clip_x0=1.0))
    folder = train(by_epsilon, tmp_path / "epsilon").export
    with pytest.raises(UserError, match="prediction: expected v for diffusers' flow schedulers, found 'epsilon'"):
        relayout(folder, tmp_path / "none", "diffusers")
    assert not (tmp_path / "none").exists()
