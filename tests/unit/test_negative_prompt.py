"""A negative prompt: identities of guidance, batches, and drawing again from the record."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import exported
from engines import coded

from transfuse.errors import UserError
from transfuse.inference import TransfusionPipeline
from transfuse.inference.settings import parse_settings, request_again, settings_of
from transfuse.sequence import Tokenizer


@pytest.fixture(params=["latents", "codes"])
def pipe(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> TransfusionPipeline:
    return TransfusionPipeline(exported(tokenizer) if request.param == "latents" else coded(tokenizer))


def draw(pipe: TransfusionPipeline, prompt: str | list[str] = "a crab", **options: object) -> list[torch.Tensor]:
    steps = {} if pipe.exported.model.config.images == "codes" else {"num_inference_steps": 4}
    return pipe(prompt, generator=3, output_type="latent", **steps, **options).images  # type: ignore[arg-type]


def test_identities_of_guidance(pipe: TransfusionPipeline) -> None:
    plain, unguided, away = draw(pipe), draw(pipe, guidance_scale=1.0), draw(pipe, negative_prompt="two balloons")
    assert torch.allclose(draw(pipe, negative_prompt="")[0], plain[0], atol=1e-5), "empty: the null branch of training"
    assert torch.allclose(draw(pipe, negative_prompt="a crab")[0], unguided[0], atol=1e-5), "away from itself: nowhere"
    assert not torch.allclose(away[0].float(), plain[0].float(), atol=1e-3)


def test_each_prompt_has_its_own_in_a_batch(pipe: TransfusionPipeline) -> None:
    together = draw(pipe, ["a crab", "the moon"], negative_prompt=["two balloons", ""])
    (alone,) = draw(pipe, negative_prompt="two balloons")
    assert torch.allclose(together[0].float(), alone.float(), atol=1e-5)


@pytest.mark.parametrize("words", [150, 400])
def test_a_long_one_is_one_line(pipe: TransfusionPipeline, words: int) -> None:
    with pytest.raises(
        UserError, match=r"^request: negative: expected at most \d+ positions with an image, found \d+$"
    ):
        draw(pipe, negative_prompt="two balloons " * words)
    assert len(draw(pipe, negative_prompt="two balloons " * 4)) == 1


def test_it_is_part_of_the_record(pipe: TransfusionPipeline) -> None:
    request = replace(pipe.request(["a crab"]), draw="force", max_tokens=0, negative=pipe.request(["moon"]).document)
    settings = settings_of(request, pipe.exported)
    assert settings["negative_prompt"] == "moon"
    again = request_again(parse_settings(settings, "a.png"), pipe.exported)
    assert torch.equal(pipe.latents([again])[0], pipe.latents([request])[0])
