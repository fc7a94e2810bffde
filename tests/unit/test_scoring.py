"""How likely words are behind pictures; and candidates: of several drawings the one its prompt likeliest describes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import exported, latent
from engines import ARMS, coded

from transfuse.errors import UserError
from transfuse.inference import Request, TextDelta, TransfusionPipeline, score
from transfuse.inference.pipeline import CANDIDATE
from transfuse.sequence import Document, Image, Text, Tokenizer

PROMPTS = ["a crab on a red background", "the moon above a small boat"]
QUICK = {"num_inference_steps": 2}


@pytest.fixture(params=["linear", "unet", "codes"])
def pipe(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> TransfusionPipeline:
    return TransfusionPipeline(ARMS[request.param](tokenizer))


def settings(pipe: TransfusionPipeline) -> dict[str, int]:
    return QUICK if pipe.exported.model.config.images == "latents" else {}


def shown(pipe: TransfusionPipeline, seed: int) -> Image:
    """A picture as the model takes it."""
    side = pipe.exported.image_size
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    part = pipe.part(PIL.Image.fromarray(pixels))
    assert isinstance(part, Image)
    return part


@pytest.mark.parametrize("arm", ["linear", "unet", "codes"])
def test_what_is_written_behind_a_picture_is_the_likeliest_there(tokenizer: Tokenizer, arm: str) -> None:
    """Token by token, greedily; and elsewhere it is not as likely."""
    pipe = TransfusionPipeline(coded(tokenizer) if arm == "codes" else exported(tokenizer, adapter=arm))
    with torch.no_grad():  # what the engine would never choose is never the likeliest
        pipe.exported.model.lm_head.weight[pipe.engine.runner.logit_mask.isinf()] = 0
        pipe.exported.model.lm_head.weight[tokenizer.boi] = 0
    pictures = [shown(pipe, seed) for seed in (0, 1)]
    request = Request(Document([pictures[0]], closed=False), draw="never", max_tokens=12)
    ids = tuple(event.token for event in pipe.stream(request) if isinstance(event, TextDelta))
    assert len(ids) > 1
    here, there = score(pipe.exported, [Document([picture, Text(ids)], closed=False) for picture in pictures])
    assert len(here.nll) == len(there.nll) == 1 + len(ids)  # BOI is learned, too
    assert here.is_argmax[1:].all()
    assert abs(here.nll - there.nll)[1:].min() > 1e-5


def test_documents_are_foretold_in_a_batch_as_alone(pipe: TransfusionPipeline) -> None:
    words = [Text(pipe.exported.tokenizer.encode(prompt)) for prompt in PROMPTS]
    documents = [
        Document([words[0]]),
        Document([shown(pipe, 0), words[1]], closed=False),
        Document([words[1], shown(pipe, 1), words[0]]),
        Document([replace(words[0], predict=False), words[1]], closed=False),
    ]
    for one, found in zip(documents, score(pipe.exported, documents), strict=True):
        (alone,) = score(pipe.exported, [one])
        np.testing.assert_allclose(found.nll, alone.nll, rtol=1e-4)


def test_the_best_candidate_is_kept_and_its_seed_draws_it_again(pipe: TransfusionPipeline) -> None:
    kept = pipe(PROMPTS, candidates=4, generator=5, output_type="latent", **settings(pipe))
    for number, prompt in enumerate(PROMPTS):
        seeds = [5 + number + one * CANDIDATE for one in range(4)]
        drawn = [pipe(prompt, generator=seed, output_type="latent", **settings(pipe)).images[0] for seed in seeds]
        words = Text(pipe.exported.tokenizer.encode(prompt))
        said = [Document([Image(one, target=False), words], closed=False) for one in drawn]
        best = int(np.argmin([one.nll.sum() for one in score(pipe.exported, said)]))
        assert kept.seeds[number] == seeds[best]
        assert torch.equal(kept.images[number], drawn[best])


def test_answers_with_a_picture_come_before_those_without(pipe: TransfusionPipeline) -> None:
    first = replace(pipe.request([PROMPTS[0]], *settings(pipe).values()), max_tokens=16, temperature=1.0)
    kept = pipe.replies([replace(first, seed=seed) for seed in range(6)], candidates=6)
    every = pipe.replies([replace(first, seed=seed + n * CANDIDATE) for seed in range(6) for n in range(6)])
    assert any(reply.images for reply in every)
    for seed, reply in enumerate(kept):
        assert bool(reply.images) == any(candidate.images for candidate in every[6 * seed : 6 * seed + 6])
        assert reply.images or reply.seed == seed
    never = pipe.replies([replace(first, draw="never", seed=3)], candidates=2)[0]
    assert (never.seed, never.images) == (3, [])


def test_where_there_is_no_telling_it_is_said(pipe: TransfusionPipeline) -> None:
    with pytest.raises(UserError, match="candidates: expected a whole number of at least 1, found 0"):
        pipe(PROMPTS[0], candidates=0)
    picture = PIL.Image.new("RGB", (pipe.exported.image_size,) * 2)
    for asked in (lambda: pipe("make it red", image=picture, candidates=2), lambda: pipe("", candidates=2)):
        with pytest.raises(UserError, match="candidates: expected 1 where a prompt is not of words alone"):
            asked()


def test_variations_have_candidates_too(tokenizer: Tokenizer) -> None:
    pipe = TransfusionPipeline(ARMS["linear"](tokenizer))
    picture = PIL.Image.fromarray(((latent(8, 8, 7).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).numpy())
    found = pipe(PROMPTS[0], image=picture, strength=0.5, candidates=3, generator=1, **QUICK)
    again = pipe(PROMPTS[0], image=picture, strength=0.5, generator=found.seeds[0], **QUICK)
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(again.images[0]))
