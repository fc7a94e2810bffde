"""Ways of guidance: the same bytes, and the faster one is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import PIL.Image
import pytest
import torch
from conftest import exported

from transfuse.inference import Engine, TransfusionPipeline
from transfuse.inference.model_runner import GUIDANCE, ModelRunner, StepInput
from transfuse.inference.optimize import pack
from transfuse.sequence import Tokenizer


@pytest.fixture
def pipe(tokenizer: Tokenizer) -> TransfusionPipeline:
    made = exported(tokenizer)
    pack(made.model)
    return TransfusionPipeline(made)


def test_both_ways_give_the_same_bytes(pipe: TransfusionPipeline) -> None:
    """Rows with one, two and three branches, and one whose guidance begins on the way, together."""
    picture = PIL.Image.new("RGB", (8, 8), "red")
    plain = replace(pipe.request(["a crab"], 5, 3.0), draw="force", max_tokens=0, seed=1)
    edited = replace(pipe.request([picture, "a moon"], 5, 2.0), draw="force", max_tokens=0, image_guidance_scale=1.5)
    requests = [
        plain,
        replace(plain, guidance_scale=1.0, seed=2),
        edited,
        replace(plain, guidance_interval=(0.2, 0.6), seed=3),
        replace(edited, image_guidance_scale=1.0, seed=4),
    ]
    found = {}
    for way in GUIDANCE:
        pipe.engine.runner.guidance = way
        found[way] = pipe.latents(requests)
    for one, other in zip(found["packed"], found["sequential"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("cost", "faster"), [("call", "packed"), ("feeds", "sequential")])
def test_the_faster_way_is_kept(pipe: TransfusionPipeline, monkeypatch, cost: str, faster: str) -> None:
    """On a clock that counts calls, or that a pass of several branches takes long, whatever this machine does."""
    clock, plain = [0.0], ModelRunner.forward

    def forward(self: ModelRunner, cache: Any, feeds: list[StepInput], predict: Any) -> Any:
        denoising = bool(feeds[0].patches)
        clock[0] += 1.0 if cost == "call" else float(denoising and len(feeds) > 1) * 3
        return plain(self, cache, feeds, predict)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    monkeypatch.setattr("transfuse.inference.pipeline.time.perf_counter", lambda: clock[0])
    before = pipe("a crab", num_inference_steps=3, guidance_scale=3.0, generator=5, output_type="latent").images[0]
    seconds = pipe.warm_up()
    assert min(seconds, key=seconds.__getitem__) == faster == pipe.engine.runner.guidance
    after = pipe("a crab", num_inference_steps=3, guidance_scale=3.0, generator=5, output_type="latent").images[0]
    assert torch.equal(before, after)


def test_what_is_not_timed(tokenizer: Tokenizer, pipe: TransfusionPipeline) -> None:
    assert pipe.warm_up(guidance="sequential") == {}
    assert pipe.engine.runner.guidance == "sequential"
    words = TransfusionPipeline(exported(tokenizer, images="none"))
    assert words.warm_up() == {}
    pipe.exported.generation = replace(pipe.exported.generation, guidance_scale=1.0)
    assert pipe.warm_up() == {}, "there is one branch alone"


def test_it_leaves_a_running_engine_alone(pipe: TransfusionPipeline) -> None:
    engine = Engine(pipe.engine.runner, slots=1)
    engine.submit(replace(pipe.request(["a crab"], 3), draw="force", max_tokens=0))
    engine.step()
    pipe.warm_up(rows=2)
    while engine.busy:
        events = engine.step()
    assert type(events[-1]).__name__ == "Done"
