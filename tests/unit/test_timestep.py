"""Where the network learns the timestep: in the patch layers, in every block (adaLN-zero), or nowhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import exported, latent, randomised, tiny

from transfuse.diffusion import Sampler, SamplerConfig
from transfuse.inference import Engine, ImageEnd, Request
from transfuse.inference.optimize import pack
from transfuse.model import Transfusion, dense
from transfuse.model.costs import adapter_flops, count_parameters, forward_flops
from transfuse.rng import generator_for
from transfuse.sequence import Batch, Document, Image, Text, Tokenizer, collate

PARTS = [Text((10, 11, 12)), Image(latent(8, 4, 1)), Text((13, 14)), Image(latent(4, 4, 2)), Text((15,))]
VARIANTS = [{}, {"adapter": "unet"}, {"norm_order": "swin"}, {"image_attention": "causal", "n_kv_heads": 2}]
VARIANTS += [{"experts": "ffn", "positions": "2d"}, {"experts": "all"}]


def run(model: Transfusion, batch: Batch, times: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    every = torch.arange(batch.positions)
    images = (batch.patches, batch.latents, torch.tensor(times)) if times else ()
    output = model(batch.input_ids, batch.position_ids, dense(batch), every, *images)
    return output.logits, list(output.predictions)


def without(model: Transfusion) -> Transfusion:
    """The same weights in a network that is not told the timestep."""
    other = Transfusion(replace(model.config, timestep="none"))
    other.load_state_dict({name: w for name, w in model.state_dict().items() if "modulation" not in name})
    return other


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_modulation_leaves_text_alone(tokenizer: Tokenizer, variant: dict) -> None:
    """Text alone is bit-equal to a network without, and so is the text before an image; what follows sees the image."""
    model = randomised(tiny(timestep="adaln", **variant))
    fmt = model.config.sequence_format(tokenizer)
    for parts, times in ((PARTS[:1], []), (PARTS, [300, 0])):
        batch = collate([Document(parts)], fmt, model.config.image_attention)
        (a, of_a), (b, of_b) = run(model, batch, times), run(without(model), batch, times)
        exact = 5 if times else batch.positions  # BOS, three tokens, BOI
        assert torch.equal(a[:exact], b[:exact])
        for x, y in zip(of_a, of_b, strict=True):
            assert not torch.allclose(x, y, atol=1e-2)
    assert not torch.allclose(a[-2:], b[-2:], atol=1e-3)


def test_a_new_network_passes_images_through_its_blocks(tokenizer: Tokenizer) -> None:
    """adaLN-zero: the gates of images are closed, and a seed gives text the weights of a network without."""
    model, plain = (Transfusion(tiny(timestep=timestep)).initialise(3) for timestep in ("adaln", "none"))
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name
    batch = collate([Document(PARTS)], model.config.sequence_format(tokenizer))
    assert model.image_adapter is not None
    vectors, _ = model.image_adapter.encode(batch.latents, torch.tensor([5, 900]), torch.float32)
    reached = []
    model.transformer.norm.register_forward_pre_hook(lambda module, inputs: reached.append(inputs[0]))
    run(model, batch, [5, 900])
    assert torch.equal(reached[0][batch.patches], vectors)
    text = torch.ones(batch.positions, dtype=torch.bool)
    text[batch.patches] = False
    assert not torch.allclose(reached[0][text], model.embedding(batch.input_ids)[text], atol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_images_are_modulated_by_their_own_timestep(tokenizer: Tokenizer, variant: dict) -> None:
    """Packed is unpacked, whatever the sizes; with "none" the timestep changes nothing, with "adaln" it does."""
    model = randomised(tiny(timestep="adaln", **variant))
    fmt = model.config.sequence_format(tokenizer)
    documents = [Document(PARTS, sample=1), Document([Text((20,))], sample=2), Document(PARTS[3:], sample=3)]
    together = run(model, collate(documents, fmt, model.config.image_attention), [7, 400, 900])[1]
    alone = [run(model, collate([d], fmt, model.config.image_attention), t)[1] for d, t in ((documents[0], [7, 400]),)]
    alone.append(run(model, collate(documents[2:], fmt, model.config.image_attention), [900])[1])
    for x, y in zip(together, alone[0] + alone[1], strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    other = run(model, collate(documents, fmt, model.config.image_attention), [7, 401, 900])[1]
    assert torch.equal(together[0], other[0]) or variant.get("image_attention") != "causal"
    assert not torch.equal(together[1], other[1])
    untold = without(model)
    batch = collate(documents, fmt, model.config.image_attention)
    for x, y in zip(run(untold, batch, [1, 2, 3])[1], run(untold, batch, [900, 50, 7])[1], strict=True):
        assert torch.equal(x, y)


def test_gradients_reach_every_image_in_a_batch_as_they_do_alone(tokenizer: Tokenizer) -> None:
    model = randomised(tiny(timestep="adaln"))
    fmt = model.config.sequence_format(tokenizer)
    documents = [Document([Text((9,)), Image(latent(4, side, side))]) for side in (4, 8, 4)]

    def gradients(batch: Batch, times: list[int]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        _, predictions = run(model, batch, times)
        torch.stack([prediction.square().sum() for prediction in predictions]).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together = gradients(collate(documents, fmt), [3, 500, 999])
    alone = [gradients(collate([d], fmt), [t]) for d, t in zip(documents, [3, 500, 999], strict=True)]
    assert together["timestep_modulation.out.weight"].abs().max() > 0
    for name, gradient in together.items():
        expected = torch.stack([one[name] for one in alone]).sum(0)
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("timestep", ["adaln", "none"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_engine_draws_what_whole_passes_draw(tokenizer: Tokenizer, timestep: str, variant: dict) -> None:
    """Requests of different sizes, steps and levels share a batch; packed weights change nothing."""
    made = exported(tokenizer, timestep=timestep, **variant)
    prompt = Document([Text((10, 11)), Image(latent(4, 4), target=False), Text((12,))], closed=False)
    base = Request(prompt, draw="force", max_tokens=0, guidance_scale=1.0, seed=5)
    requests = [
        replace(base, size=(8, 8), sampler=SamplerConfig("ddim", 2)),
        replace(base, size=(4, 8), sampler=SamplerConfig("ddim", 3), seed=6),
    ]
    expected = []
    for request in requests:
        sampler = Sampler(made.process, request.sampler)
        state = sampler.prepare((3, *request.size), generator_for(request.seed, "image", 0))
        while not state.done:
            document = replace(prompt, parts=[*prompt.parts, Image(state.x)])
            batch = collate([document], made.model.config.sequence_format(tokenizer), made.model.config.image_attention)
            state = sampler.step(state, run(made.model, batch, [0, state.t])[1][-1])
        expected.append(sampler.finish(state))
    for packed in (False, True):
        if packed:
            pack(made.model)
        found = {e.request_id: e.latent for e in Engine(made).run(requests) if isinstance(e, ImageEnd)}
        for number, image in enumerate(expected):
            torch.testing.assert_close(found[number], image, atol=2e-4, rtol=1e-3)


def test_parameters_and_operations_are_counted() -> None:
    added, adaln, none = (tiny(timestep=timestep) for timestep in ("added", "adaln", "none"))
    width = added.d_model
    embedding = (256 + 1) * width + (width + 1) * width
    assert count_parameters(added).adapter - count_parameters(none).adapter == embedding
    own = embedding + 6 * width * (width + 1) + added.n_layers * 6 * width
    assert count_parameters(adaln).total - count_parameters(none).total == own
    products = 2 * (256 * width + width * width)
    assert adapter_flops(added, 8, 8) - adapter_flops(none, 8, 8) == products
    images = [(8, 8), (4, 8)]
    more = forward_flops(adaln, 40, 100, 3, images) - forward_flops(none, 40, 100, 3, images)
    assert more == 2 * (products + 2 * 6 * width * width)
    assert forward_flops(adaln, 40, 100, 3, []) == forward_flops(none, 40, 100, 3, [])
