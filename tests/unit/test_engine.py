"""The engine: cached = uncached = batched, on forced scripts; never on the hope that a random model emits BOI."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import exported, latent

from transfuse.diffusion import Sampler, SamplerConfig
from transfuse.errors import UserError
from transfuse.inference import (
    Done,
    Engine,
    ImageEnd,
    ImageProgress,
    ImageStart,
    Request,
    TextDelta,
    TransfusionPipeline,
)
from transfuse.inference.image_decoding import sample
from transfuse.inference.model_runner import ModelRunner
from transfuse.model import dense
from transfuse.rng import generator_for
from transfuse.sequence import Document, Image, Text, Tokenizer, collate, unconditional

STEPS = 3
PROMPT = Document([Text((10, 11, 12))], closed=False)


def request(document: Document = PROMPT, **changes) -> Request:
    base = Request(document, draw="force", max_tokens=0, size=(8, 8), sampler=SamplerConfig("ddim", STEPS), seed=5)
    return replace(base, **changes)


def images(engine: Engine, *requests: Request) -> list[torch.Tensor]:
    found = {e.request_id: e.latent for e in engine.run(requests) if isinstance(e, ImageEnd)}
    return [found[row] for row in range(len(requests))]


def uncached_image(
    engine: Engine, document: Document, seed: int, number: int, scale: float, shape=(3, 8, 8)
) -> torch.Tensor:
    """The same drawing by whole forward passes: dense mask, no cache, no batching, the null branch its own document."""
    model, process = engine.exported.model, engine.exported.process
    sampler = Sampler(process, SamplerConfig("ddim", STEPS))
    state = sampler.prepare(shape, generator_for(seed, "image", number))

    def predict(doc: Document, t: int) -> torch.Tensor:
        batch = collate([doc], engine.grammar, model.config.image_attention)
        times = torch.zeros(len(batch.latents), dtype=torch.int64)
        times[-1] = t
        out = model(
            batch.input_ids,
            batch.position_ids,
            dense(batch, model.config),
            batch.loss_positions,
            batch.patches,
            batch.latents,
            times,
        )
        return out.predictions[-1]

    while not state.done:
        whole = replace(document, parts=[*document.parts, Image(state.x)])
        conditional, null = predict(whole, state.t), predict(unconditional(whole), state.t)
        state = sampler.step(state, null + scale * (conditional - null))
    return sampler.finish(state)


class Script:
    """Forces the tokens a row chooses, so that every seam between text and image is crossed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: dict[int, list[int]]) -> None:
        self.logits: list[torch.Tensor] = []
        original = Engine._choose

        def choose(engine: Engine, row, logits, likeliest):
            self.logits.append(logits.clone())
            script = tokens[row.number]
            if script:
                yield from original(engine, row, logits, script.pop(0))
            else:
                yield from engine._finish(row, "stop")

        monkeypatch.setattr(Engine, "_choose", choose)


VARIANTS = [
    {},
    {"adapter": "unet"},
    {"image_attention": "causal"},
    {"n_kv_heads": 2},
    {"timestep_at": "patch"},
    {"experts": "ffn"},
    {"sliding_window": 7, "full_attention_layers": (1,), "n_kv_heads": 1},
    {"sliding_window": 3, "image_attention": "causal", "tie_embeddings": True},
    {"experts": "all", "image_d_ff": 96},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_script_with_cache_equals_whole_recomputation(tokenizer: Tokenizer, monkeypatch, variant) -> None:
    """text, BOI, image, EOI, text, BOI, image: latents and every logit equal those of passes without a cache."""
    engine = Engine(exported(tokenizer, **variant))
    boi = engine.grammar.boi
    script = Script(monkeypatch, {0: [30, 31, boi, 32, boi, 33]})
    asked = request(draw="auto", max_tokens=20, max_images=2, guidance_scale=2.0)
    events = list(engine.run([asked]))
    drawn = [e.latent for e in events if isinstance(e, ImageEnd)]
    assert len(drawn) == 2

    first = uncached_image(engine, Document([Text((10, 11, 12, 30, 31))], closed=False), 5, 0, 2.0)
    torch.testing.assert_close(drawn[0], first, atol=1e-4, rtol=1e-4)
    before = [Text((10, 11, 12, 30, 31)), Image(drawn[0], target=False), Text((32,))]
    second = uncached_image(engine, Document(before, closed=False), 5, 1, 2.0)
    torch.testing.assert_close(drawn[1], second, atol=1e-4, rtol=1e-4)

    document = Document([*before, Image(drawn[1], target=False), Text((33,))], closed=False)
    batch = collate([document], engine.grammar, engine.exported.model.config.image_attention)
    every = torch.arange(batch.positions)
    zero = torch.zeros(2, dtype=torch.int64)
    whole = engine.exported.model(
        batch.input_ids, batch.position_ids, dense(batch, engine.config), every, batch.patches, batch.latents, zero
    ).logits
    # logits were asked for after: 12, 30, 31, EOI, 32, EOI, 33
    at = [3, 4, 5, 5 + 1 + 16 + 1, 5 + 1 + 16 + 2, 5 + 1 + 16 + 2 + 1 + 16 + 1, 5 + 1 + 16 + 2 + 1 + 16 + 2]
    assert [int(batch.input_ids[p]) for p in at] == [12, 30, 31, engine.grammar.eoi, 32, engine.grammar.eoi, 33]
    found, allowed = torch.stack(script.logits), engine.runner.logit_mask == 0
    allowed[boi] = False  # barred, too, once no more images are allowed
    torch.testing.assert_close(found[:, allowed], whole[at][:, allowed], atol=1e-4, rtol=1e-4)
    assert (found[:, engine.runner.logit_mask != 0] == -torch.inf).all()
    assert found[-1, boi] == -torch.inf
    assert found[0, boi] > -torch.inf


def test_cache_after_an_image_equals_a_fresh_prefill(tokenizer: Tokenizer, monkeypatch) -> None:
    engine = Engine(exported(tokenizer))
    Script(monkeypatch, {0: [engine.grammar.boi, 33]})
    caches = []
    original = ModelRunner.cache

    def keep(self, slots, positions):
        caches.append(original(self, slots, positions))
        return caches[-1]

    monkeypatch.setattr(ModelRunner, "cache", keep)
    events = list(engine.run([request(draw="auto", max_tokens=9)]))
    drawn = next(e.latent for e in events if isinstance(e, ImageEnd))
    document = Document([Text((10, 11, 12)), Image(drawn, target=False), Text((33,))], closed=False)
    used, caches[:] = caches[0], []
    Script(monkeypatch, {0: []})
    list(engine.run([request(document, draw="never")]))
    length = 1 + 3 + 1 + 16 + 1 + 1
    for kind in ("keys", "values"):
        fresh, after = (getattr(cache, kind)[:, 0, :, :length] for cache in (caches[0], used))
        torch.testing.assert_close(after, fresh, atol=1e-5, rtol=1e-4)
        assert fresh.abs().amax((0, 1, 3)).min() > 0, "every position was written"


@pytest.mark.parametrize("kv_heads", [1, 2, None])
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_images_of_a_few_patches(tokenizer: Tokenizer, kv_heads: int | None, attention: str) -> None:
    """One to six patches, alone, with others and in pairs of one shape: as drawn without a cache."""
    engine = Engine(exported(tokenizer, n_kv_heads=kv_heads, image_attention=attention))
    sizes = [(2, 2), (2, 4), (6, 2), (4, 4), (4, 6)]  # patches of two by two pixels
    requests = [request(size=size, guidance_scale=2.0, seed=seed) for size in sizes for seed in (1, 2)]
    for asked, found in zip(requests, images(engine, *requests), strict=True):
        expected = uncached_image(engine, PROMPT, asked.seed, 0, 2.0, (3, *asked.size))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        (alone,) = images(engine, asked)
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)


def test_batched_equals_alone(tokenizer: Tokenizer) -> None:
    """Different prompts, lengths, phases, sizes, steps and samplers in one go; each row equals the same row alone."""
    engine = Engine(exported(tokenizer))
    picture = Image(latent(8, 8, 3), target=False)
    requests = [
        request(),
        request(Document([Text((40,) * 17)], closed=False), seed=6, guidance_scale=1.0),
        request(Document([], closed=False), seed=7, size=(4, 8), sampler=SamplerConfig("dpmpp", 5)),
        request(Document([picture], closed=False), draw="never", max_tokens=6),
        request(
            Document([Text((9,)), picture, Text((8, 7))], closed=False), draw="never", max_tokens=9, temperature=1.0
        ),
        request(seed=8, sampler=SamplerConfig("ddpm", 4), max_tokens=4),
    ]

    def outcome(events, row):
        those = [event for event in events if event.request_id == row]
        tokens = [event.token for event in those if isinstance(event, TextDelta)]
        return tokens, [e.latent for e in those if isinstance(e, ImageEnd)], those[-1]

    together = list(engine.run(requests))
    for row, one in enumerate(requests):
        tokens, drawn, done = outcome(together, row)
        alone_tokens, alone_drawn, alone_done = outcome(list(engine.run([one])), 0)
        assert tokens == alone_tokens
        assert len(drawn) == len(alone_drawn)
        for a, b in zip(drawn, alone_drawn, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        assert replace(done, request_id=0) == alone_done


def test_guidance_identities(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer))
    document = Document([Text((10, 11, 12))], closed=False)
    for scale in (0.0, 1.0, 3.0):
        drawn = images(engine, request(guidance_scale=scale))[0]
        torch.testing.assert_close(drawn, uncached_image(engine, document, 5, 0, scale), atol=1e-4, rtol=1e-4)
    null = Document([], closed=False)
    unguided = images(engine, request(null, guidance_scale=1.0))[0]
    for scale in (0.0, 2.0, 7.5):
        drawn = images(engine, request(null, guidance_scale=scale))[0]
        torch.testing.assert_close(drawn, unguided, atol=1e-4, rtol=1e-4, msg="a null prompt makes guidance a no-op")
    torch.testing.assert_close(images(engine, request(guidance_scale=0.0))[0], unguided, atol=1e-4, rtol=1e-4)


def test_prompt_and_seed_matter_and_nothing_else_does(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer))
    other = Document([Text((50, 51))], closed=False)
    one, two = images(engine, request(), request(other))
    assert (one - two).abs().max() > 1e-3, "two prompts with one seed differ"
    assert (one - images(engine, request(seed=6))[0]).abs().max() > 1e-3
    assert torch.equal(one, images(engine, request(), request(other))[0]), "the same call gives the same bytes"


def test_denoising_never_grows_the_cache_and_costs_only_patches(tokenizer: Tokenizer, sizes: list[int]) -> None:
    engine = Engine(exported(tokenizer))
    list(engine.run([request(Document([Text((9,) * 50)], closed=False))]))
    # prompt; null prefix (BOS, BOI), once; BOI; then the patches of both branches, every step
    assert sizes == [51, 2, 1, *[2 * 16] * STEPS]
    sizes.clear()
    list(engine.run([request(Document([Text((9,) * 50)], closed=False), guidance_scale=1.0)]))
    assert sizes == [51, 1, *[16] * STEPS], "the null prefix is shared; scale 1 runs one branch"


def test_events_in_order(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer))
    events = list(engine.run([request(preview_every=1)]))
    kinds = [type(event) for event in events]
    assert kinds == [ImageStart, *[ImageProgress] * STEPS, ImageEnd, Done]
    progress = [event for event in events if isinstance(event, ImageProgress)]
    assert [p.step for p in progress] == [1, 2, 3]
    assert all(p.total == STEPS and p.preview is not None and p.preview.shape == (3, 8, 8) for p in progress)
    assert events[-1] == Done(0, "images", 0, 1, STEPS, 16)


def test_further_images_follow_without_text_and_the_end_says_why(tokenizer: Tokenizer) -> None:
    """`max_tokens` counts text alone: a model that goes on with BOI draws as many images as may follow."""
    ends = set()
    for seed in range(12):
        one = exported(tokenizer)
        with torch.no_grad():
            one.model.lm_head.weight.zero_()
            one.model.lm_head.weight[tokenizer.boi].normal_(generator=torch.Generator().manual_seed(seed))
        for draw in ("force", "auto"):
            *_, done = Engine(one).run([request(draw=draw, max_images=2)])
            assert isinstance(done, Done)
            ends.add((draw, done.images, done.reason))
    assert ends <= {(draw, n, "images" if n == 2 else "length") for draw in ("force", "auto") for n in range(3)}
    assert {("force", 2, "images"), ("force", 1, "length"), ("auto", 2, "images"), ("auto", 0, "length")} <= ends
    *_, done = Engine(exported(tokenizer)).run([request(draw="never")])
    assert (done.images, done.reason) == (0, "length")


def test_writing_never_emits_markers_and_stops(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer))
    hidden = {engine.grammar.bos, engine.grammar.eoi, engine.grammar.boi}
    requests = [request(draw="never", max_tokens=40, temperature=3.0, seed=seed) for seed in range(12)]
    events = list(engine.run(requests))
    assert not hidden & {event.token for event in events if isinstance(event, TextDelta)}
    ends = [event for event in events if isinstance(event, Done)]
    assert len(ends) == len(requests)
    assert all(end.reason in ("stop", "length") and end.text_tokens <= 40 for end in ends)
    assert len({end.text_tokens for end in ends}) > 1, "rows end on their own"


def test_model_decides_to_draw_and_goes_on_writing(tokenizer: Tokenizer) -> None:
    one = exported(tokenizer)
    with torch.no_grad():  # a head that always prefers BOI, then whatever comes next
        one.model.lm_head.weight[tokenizer.boi] = 0
        one.model.lm_head.weight[tokenizer.boi] += one.model.lm_head.weight.abs().sum(0)
    events = list(Engine(one).run([request(draw="auto", max_tokens=5, max_images=1, temperature=5.0)]))
    done = events[-1]
    assert isinstance(done, Done)
    assert done.images <= 1


def test_pipeline_like_diffusers(tokenizer: Tokenizer) -> None:
    pipe = TransfusionPipeline(exported(tokenizer))
    out = pipe(
        ["a crab", "two balloons"],
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    again = pipe(
        ["a crab", "two balloons"],
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert [image.size for image in out.images] == [(8, 8)] * 2
    assert out.seeds == again.seeds
    assert [i.tobytes() for i in out.images] == [i.tobytes() for i in again.images]
    one = pipe(
        "two balloons", num_inference_steps=2, guidance_scale=2.0, generator=out.seeds[1], output_type="np"
    ).images[0]
    assert abs(one.astype(int) - __import__("numpy").asarray(out.images[1]).astype(int)).max() <= 1
    assert len(pipe("a crab", num_inference_steps=1, num_images_per_prompt=3).images) == 3
    captions = pipe.caption(out.images, max_tokens=4)
    assert len(captions) == 2
    with pytest.raises(UserError, match="expected 8x8 pixels, found 4x4"):
        pipe.caption(out.images[0].resize((4, 4)))
    with pytest.raises(UserError, match="steps: expected at"):
        pipe("a crab", num_inference_steps=0)


def test_bad_requests_are_refused_before_any_work(tokenizer: Tokenizer) -> None:
    engine = Engine(exported(tokenizer))
    with pytest.raises(UserError, match=r"prompt: expected at most 256 positions .* found 3\d\d"):
        list(engine.run([request(Document([Text((9,) * 300)], closed=False))]))
    with pytest.raises(UserError, match="image size: expected positive multiples of 2, found"):
        list(engine.run([request(size=(7, 8))]))
    with pytest.raises(UserError, match='draw: expected "auto"'):
        list(engine.run([request(draw="maybe")]))


@pytest.mark.parametrize("temperature", [5e-324, 1e-30, 1e-5, 1.0, 1000.0])
@pytest.mark.parametrize("top_p", [5e-324, 1e-9, 0.5, 1.0])
def test_extreme_temperatures_and_nuclei(temperature: float, top_p: float) -> None:
    """Whatever may be asked for, something likely is chosen, and nothing that is barred."""
    logits = torch.tensor([1.0, 5.0, -torch.inf, 4.9, -300.0])
    chosen = {sample(logits, temperature, top_p, torch.Generator().manual_seed(seed)) for seed in range(50)}
    assert 2 not in chosen
    if temperature < 1e-3 or top_p < 0.1:
        assert chosen == {1}


def test_events_can_be_pickled_and_need_no_torch() -> None:
    """A server's HTTP process reads them."""
    code = """
import pickle, sys
from transfuse.inference import Done, ImageEnd
done = Done(0, "stop", 1, 2, 3, 4)
assert pickle.loads(pickle.dumps(done)) == done
assert pickle.loads(pickle.dumps(ImageEnd(1, 0, None, pixels=[1], settings={}))).pixels == [1]
assert "torch" not in sys.modules
from transfuse.inference import Engine
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
