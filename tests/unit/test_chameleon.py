"""The rivals beside Transfusion: Chameleon, whose images are codes, and Llama, which has none.

Losses and gradients of all three are held against a forward pass written out by hand, one document and one position at
a time; drawing by codes against whole passes without a cache.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import latent, randomised, tiny
from engines import CODEBOOK, PROMPT, STABLE, asking, chameleon, coded, codes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transfuse.autoencoders import (
    ImageAutoencoder,
    Pixels,
    VQTokenizer,
    open_autoencoder,
    save_autoencoder,
)
from transfuse.diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from transfuse.errors import UserError
from transfuse.evaluation.text import perplexity
from transfuse.export import Exported, GenerationConfig, load_export, save_export
from transfuse.inference import (
    Done,
    Engine,
    Event,
    ImageEnd,
    ImageProgress,
    ImageStart,
    Request,
    TextDelta,
    TransfusionPipeline,
    image_decoding,
)
from transfuse.inference import engine as engine_module
from transfuse.model import ModelConfig, Transfusion, dense
from transfuse.model.layers import RMSNorm
from transfuse.rng import generator_for
from transfuse.sequence import (
    Document,
    Image,
    SequenceFormat,
    Text,
    Tokenizer,
    collate,
    layout_document,
    unconditional,
    visible,
)
from transfuse.training import ObjectiveConfig, TokenObjective, TransfusionObjective

SEED = 11
G = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=1, first_code=100)


def llama(**changes: object) -> ModelConfig:
    return tiny(images="none", **changes)


# --- how a document is laid out ---


@dataclass
class Place:
    """A position, found by walking along the document, without the layout. sees: the end of the keys it sees."""

    token: int
    learned: bool = False
    image: int = -1
    row: int = 0
    column: int = 0
    sees: int = 0


def walk(document: Document, grammar: SequenceFormat, look_ahead: bool = False) -> list[Place]:
    places, number = [Place(grammar.bos)], 0
    for part in document.parts:
        if isinstance(part, Text):
            for token in part.ids:
                places.append(Place(token, part.predict and document.predict))
            continue
        places.append(Place(grammar.boi, document.predict))
        for row in range(part.latent.shape[-2] // grammar.patch_size):
            for column in range(part.latent.shape[-1] // grammar.patch_size):
                place = Place(0, False, number, row, column)
                if grammar.first_code is not None:
                    place.token, place.learned = grammar.first_code + int(part.latent[row, column]), part.target
                places.append(place)
        places.append(Place(grammar.eoi))
        number += 1
    if document.closed:
        places.append(Place(grammar.eos, document.predict))
    for position, place in enumerate(places):
        place.sees = position + 1
        while look_ahead and place.image >= 0 and place.sees < len(places) and places[place.sees].image == place.image:
            place.sees += 1
    return places


def test_a_document_of_codes_position_by_position() -> None:
    layout = layout_document(Document([Text((10, 11)), Image(torch.tensor([[5, 0, 7], [1, 2, 3]])), Text((12,))]), G)
    #                                 BOS  a   b  BOI  codes, row by row              EOI  c  EOS
    assert layout.input_ids.tolist() == [0, 10, 11, 2, 105, 100, 107, 101, 102, 103, 3, 12, 1]
    assert layout.position_ids.tolist() == list(range(13))
    assert layout.image.tolist() == [-1] * 4 + [0] * 6 + [-1] * 3
    # from BOI, and from every code but the last; never EOI
    assert layout.loss_mask.tolist() == [True] * 3 + [True] * 6 + [False] + [True] * 2 + [False]
    assert visible(layout, "causal")[1].tolist() == list(range(1, 14))
    (span,) = layout.spans
    assert (span.start, span.end) == (4, 10)


def test_what_is_learned_of_codes() -> None:
    picture = torch.tensor([[5, 6]])
    context = layout_document(Document([Image(picture, target=False), Text((10,))]), G)
    #                                  BOS BOI 105 106 EOI 10 EOS
    assert context.loss_mask.tolist() == [True, False, False, False, True, True, False]
    dropped = layout_document(unconditional(Document([Text((10, 11)), Image(picture)], sample=3)), G)
    assert dropped.input_ids.tolist() == [0, 2, 105, 106, 3, 1]
    assert dropped.loss_mask.tolist() == [False, True, True, False, False, False], "the codes, and no marker"
    prompt = layout_document(Document([Image(picture)], closed=False), G)
    assert prompt.input_ids.tolist() == [0, 2, 105, 106, 3]
    assert prompt.loss_mask.tolist() == [True, True, True, False, False]


def test_a_batch_of_codes_and_one_of_latents() -> None:
    pair = [Text((10, 11)), Image(codes(2, 3)), Image(codes(1, 1), target=False)]
    batch = collate([Document(pair, sample=4), Document([Text((12,))], sample=5)], G, "causal", multiple=16)
    assert batch.image_targets == 1
    assert int(batch.is_image_token.sum()) == 6
    assert (batch.targets[batch.is_image_token] - 100).tolist() == codes(2, 3).flatten().tolist()
    assert (batch.targets[~batch.is_image_token] < 100).all()
    assert batch.quantities == {"positions": 18, "text_targets": 2 + 2 + 1 + 1 + 1, "images": 1}
    assert (batch.input_ids[batch.patches] >= 100).all()
    assert len(batch.patches) == 7
    assert batch.denoise.tolist() == batch.max_timestep.tolist() == []
    assert batch.latents == batch.noise_ids == ()
    assert batch.samples == (4, 5)
    patches = replace(G, patch_size=2, first_code=None)
    batch = collate([Document([Text((10,)), Image(latent(2, 4))])], patches)
    assert not batch.is_image_token.any()
    assert batch.image_targets == 1
    assert len(batch.patches) == 2


def test_codes_and_latents_are_not_taken_for_one_another() -> None:
    for image in (Image(latent(2, 2)), Image(codes(2, 2)[None]), Image(codes(2, 2)[0])):
        with pytest.raises(ValueError, match=r"image: expected codes \[row, column\], found torch\.\w+ \("):
            layout_document(Document([image]), G)
    for image in (Image(codes(2, 2)), Image(latent(2, 2)[0])):
        with pytest.raises(ValueError, match=r"image: expected latent \[channel, row, column\] of floats, found"):
            layout_document(Document([image]), replace(G, first_code=None))


_texts = st.builds(Text, st.lists(st.integers(4, 99), max_size=5).map(tuple), st.booleans())
_pictures = st.builds(
    lambda rows, columns, seed, target: Image(codes(rows, columns, seed), target=target),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 9),
    st.booleans(),
)
_documents = st.builds(
    Document, st.lists(st.one_of(_texts, _pictures), max_size=5), st.integers(0, 99), st.booleans(), st.booleans()
)


@given(st.lists(_documents, min_size=1, max_size=4), st.sampled_from([1, 16]))
@settings(max_examples=60, deadline=None)
def test_codes_agree_with_a_walk(documents: list[Document], multiple: int) -> None:
    walked = [walk(document, G) for document in documents]
    for document, places in zip(documents, walked, strict=True):
        layout = layout_document(document, G)
        assert layout.input_ids.tolist() == [place.token for place in places]
        assert layout.image.tolist() == [place.image for place in places]
        assert layout.loss_mask.tolist() == [place.learned for place in places[1:]] + [False]
    batch = collate(documents, G, "causal", multiple)
    learned = [place for places in walked for place in places[1:] if place.learned]
    assert batch.targets.tolist() == [place.token for place in learned]
    assert batch.is_image_token.tolist() == [place.image >= 0 for place in learned]
    assert batch.image_targets == sum(image.target for document in documents for image in document.images)
    assert batch.positions - batch.n_padding == sum(map(len, walked))
    assert batch.documents[: len(walked)] == tuple(map(len, walked))
    ends = [sum(map(len, walked[:n])) + place.sees for n, places in enumerate(walked) for place in places]
    assert batch.kv_end[: len(ends)].tolist() == ends
    coded = sum(place.image >= 0 for place in learned)
    positions = sum(map(len, walked))
    assert batch.quantities == {
        "positions": positions,
        "text_targets": len(learned) - coded,
        "images": batch.image_targets,
    }
    assert len(batch.patches) == sum(place.image >= 0 for places in walked for place in places)
    assert not batch.latents
    assert not batch.noise_ids


# --- the losses of every arm, written out ---


def unit(x: Tensor, norm: RMSNorm) -> Tensor:
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def standard(x: Tensor, norm: torch.nn.Module) -> Tensor:
    """Of heads `[head, D]`: LayerNorm of each, by its own weight and bias."""
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view_as(x) + norm.bias.view_as(x)


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Of heads `[head, D]`: each pair (i, i + D / 2) turned by position / theta^(2 i / D)."""
    half = x.shape[-1] // 2
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)], dtype=x.dtype)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def trunk(model: Transfusion, x: list[Tensor], places: Sequence[Place]) -> list[Tensor]:
    """All blocks, one position at a time, with nothing of their own code. Each `[C]`."""
    config = model.config
    width, shared, channels = config.d_model, config.n_heads // config.kv_heads, config.head_dim
    for block in model.transformer.blocks:
        pre = config.norm_order == "pre"
        q, k, v = [], [], []
        for position, one in enumerate(x):
            heads = (block.qkv.weight @ (unit(one, block.attention_norm) if pre else one)).view(-1, channels)
            query, key, value = heads.split([config.n_heads, config.kv_heads, config.kv_heads])
            if config.qk_norm:
                query, key = standard(query, block.query_norm), standard(key, block.key_norm)
            q.append(turned(query, position, config.rope_theta))
            k.append(turned(key, position, config.rope_theta).repeat_interleave(shared, 0))
            v.append(value.repeat_interleave(shared, 0))
        after = []
        for one, query, place in zip(x, q, places, strict=True):
            keys, values = torch.stack(k[: place.sees]), torch.stack(v[: place.sees])
            share = ((keys * query).sum(-1) / math.sqrt(channels)).softmax(0)
            out = block.out.weight @ (share[..., None] * values).sum(0).view(width)
            one = one + (out if pre else unit(out, block.attention_norm))
            read = unit(one, block.feed_forward_norm) if pre else one
            gate, up = (block.feed_forward.gate_up.weight @ read).chunk(2)
            out = block.feed_forward.down.weight @ (gate * gate.sigmoid() * up)
            after.append(one + (out if pre else unit(out, block.feed_forward_norm)))
        x = after
    return [unit(one, model.transformer.norm) for one in x]


def time_vector(model: Transfusion, timestep: int) -> Tensor:
    layers = model.image_adapter.time
    angle = timestep * torch.exp(-math.log(10000) * torch.arange(128) / 128)  # up to 1000: rounded as the model does it
    waves = torch.cat([angle.cos(), angle.sin()]).double()
    inner = layers.inner.weight @ waves + layers.inner.bias
    return layers.outer.weight @ (inner * inner.sigmoid()) + layers.outer.bias


def window(image: Tensor, place: Place, size: int) -> Tensor:
    top, left = place.row * size, place.column * size
    return image[:, top : top + size, left : left + size].flatten()


def noised(process: Process, document: Document, number: int) -> tuple[Tensor, Tensor, int]:
    """x_t, what must be foretold, and t, of image `number`."""
    image = document.images[number]
    generator, t = generator_for(SEED, "noise", document.sample, number), 0
    if image.target:
        t = int(torch.randint(1, (image.max_timestep or process.config.timesteps) + 1, (), generator=generator))
    noise = torch.randn(image.latent.shape, generator=generator).double()
    clean, kept = image.latent.double(), process.alpha_bar[t]
    goal = noise if process.config.prediction == "epsilon" else clean
    return kept.sqrt() * clean + (1 - kept).sqrt() * noise, goal, t


def naive(
    model: Transfusion, documents: Sequence[Document], grammar: SequenceFormat, process: Process
) -> dict[str, list[Tensor]]:
    """Each target's own loss: entropy and z of tokens, apart for codes among the details, and the error of images."""
    config, found = model.config, {name: [] for name in ("text", "codes", "z", "image")}
    weigh = process.config.weighting == "v"
    for document in documents:
        places = walk(document, grammar, config.images == "latents" and config.image_attention == "bidirectional")
        images = [noised(process, document, n) for n in range(len(document.images))] if model.image_adapter else []
        x = []
        for place in places:
            if place.image < 0 or not images:
                x.append(model.embedding.weight[place.token])
                continue
            clouded, _, t = images[place.image]
            patch, time = window(clouded, place, config.patch_size), time_vector(model, t)
            enter = model.image_adapter.in_proj.weight
            entered = enter @ (patch + time) if config.timestep_at == "patch" else enter @ patch + time
            x.append(
                entered
                + model.image_adapter.positions.row[place.row]
                + model.image_adapter.positions.column[place.column]
            )
        x = trunk(model, x, places)
        for before, place in zip(x, places[1:], strict=False):
            if place.learned:
                logits = model.lm_head.weight @ before
                denominator = logits.exp().sum().log()
                found["text" if place.image < 0 else "codes"].append(denominator - logits[place.token])
                found["z"].append(denominator**2)
        for number, (_, goal, t) in enumerate(images):
            if not document.images[number].target:
                continue
            squares = []
            for after, place in zip(x, places, strict=True):
                if place.image == number:
                    error = model.image_adapter.out_proj.weight @ after - window(goal, place, config.patch_size)
                    squares += list(error.square())
            weight = 1 / max(1 - float(process.alpha_bar[t]), 0.05) if weigh else 1.0
            found["image"].append(weight * sum(squares) / len(squares))
    return found


ARMS = {
    "llama": (llama(), {}, {}),
    "llama, stable": (llama(**STABLE, n_kv_heads=2), {"z_weight": 0.1}, {}),
    "chameleon": (chameleon(**STABLE), {"z_weight": 0.1}, {}),
    "chameleon, plain": (chameleon(n_kv_heads=2), {}, {}),
    "transfusion": (tiny(), {}, {}),
    "transfusion, timestep before the linear map": (tiny(timestep_at="patch"), {}, {}),
    "transfusion, images alike": (tiny(), {"image_weight": 1.5}, {}),
    "transfusion, causal": (
        tiny(image_attention="causal", **STABLE),
        {"z_weight": 0.1, "image_weight": 1.5},
        {"prediction": "x0", "weighting": "v"},
    ),
}


def of_every_kind(config: ModelConfig, alike: bool = False) -> list[Document]:
    """Of all shapes: images of several sizes, adjacent, first, last, context; a dropped caption; markers alone.

    alike: the same with images of one size, which are computed together.
    """

    def image(rows: int, columns: int, seed: int, **options: object) -> Image:
        rows, columns = (2, 3) if alike else (rows, columns)
        made = codes(rows, columns, seed) if config.images == "codes" else latent(2 * rows, 2 * columns, seed)
        return Image(made, **options)  # type: ignore[arg-type]

    documents = [
        Document([Text((10, 11, 12)), image(2, 2, 1)], sample=1),
        Document([Text((13,))], sample=2),
        Document([image(3, 2, 2, max_timestep=500), Text((14, 15, 16, 17, 18, 19))], sample=3),
        Document([Text((20, 21)), image(1, 1, 3, target=False), image(2, 3, 4), Text((22,))], sample=4),
        Document([], sample=5),
        unconditional(Document([Text((9,)), image(2, 2, 5)], sample=6)),
        Document([Text((23, 30), predict=False), Text((31, 23, 30, 24))], sample=7, closed=False),
        Document([Text(tuple(range(40, 65)))], sample=8),
    ]
    return documents if config.images != "none" else [d for d in documents if not d.images]


@pytest.mark.parametrize("arm", ARMS)
def test_losses_and_gradients_written_out(arm: str, tokenizer: Tokenizer) -> None:
    """No packing, no backend, no loss function: the sum over targets, the count, the weights, and all gradients."""
    config, weights, diffusion = ARMS[arm]
    model = randomised(config)
    exact = randomised(config).double()
    grammar, process = config.sequence_format(tokenizer), Process(DiffusionConfig(**diffusion))
    goal: TokenObjective | TransfusionObjective = TokenObjective(ObjectiveConfig(**weights), SEED)
    if config.images == "latents":
        goal = TransfusionObjective(ObjectiveConfig(**weights), process, SEED)
    documents = of_every_kind(config, alike="alike" in arm)
    found = naive(exact, documents, grammar, process)
    terms = {"text": found["text"], "image": found["image"]}
    factors = {"text": 1.0, "image": weights.get("image_weight", 5.0), "tokens": 1.0, "z": weights.get("z_weight")}
    if config.images != "latents":
        terms = {"tokens": found["text"] + found["codes"]}
    if factors["z"]:
        terms["z"] = found["z"]
    means = [factors[name] * sum(losses) / len(losses) for name, losses in terms.items()]
    gradients = torch.autograd.grad(sum(means), list(exact.parameters()))
    expected = dict(zip(dict(exact.named_parameters()), gradients, strict=True))

    batch = collate(documents, grammar, config.image_attention, multiple=64)
    assert batch.n_padding
    counts = goal.counts(batch)
    assert goal.names == tuple(terms)
    assert goal.weights == tuple(factors[name] for name in terms)
    assert counts == tuple(map(len, terms.values()))
    sums = goal.loss(model, batch)
    for loss, losses in zip(sums.losses.tolist(), terms.values(), strict=True):
        assert loss == pytest.approx(float(sum(losses).detach()), rel=1e-5)
    if config.images != "latents":
        details = {
            name: (float(sum(found[name]).detach()), len(found[name])) for name in ("text", "codes") if found[name]
        }
        assert sums.details.keys() == details.keys()
        for name, detail in details.items():
            assert sums.details[name] == pytest.approx(detail, rel=1e-5)
    scale = torch.tensor(goal.weights) / torch.tensor(counts)
    (sums.losses * scale).sum().backward()
    for name, parameter in model.named_parameters():
        difference, largest = (parameter.grad - expected[name]).abs().max(), expected[name].abs().max()
        assert largest > 1e-3, name
        assert difference < 1e-5 * largest + 1e-6, name


# --- dropout ---


@pytest.mark.parametrize("arm", ["llama", "chameleon", "transfusion"])
def test_dropout_is_a_function_of_seed_and_first_sample(arm: str, tokenizer: Tokenizer) -> None:
    config = ARMS[arm][0]
    # Without latents, for their noise depends on the seed as well.
    documents = of_every_kind(config if config.images == "codes" else llama())

    def losses(dropout: float, seed: int = 0, first: int = 1) -> Tensor:
        changed = replace(config, dropout=dropout)
        goal: TokenObjective | TransfusionObjective = TokenObjective(ObjectiveConfig(), seed)
        if config.images == "latents":
            goal = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), seed)
        batch = collate(
            [replace(documents[0], sample=first), *documents[1:]],
            config.sequence_format(tokenizer),
            config.image_attention,
        )
        return goal.loss(randomised(changed), batch).losses[0].detach()

    plain, one = losses(0.0), losses(0.1)
    assert torch.equal(losses(0.0, seed=1, first=99), plain), "no dropout at all"
    assert torch.equal(losses(0.1), one)
    for other in (losses(0.1, seed=1), losses(0.1, first=99), losses(0.2), plain):
        assert (other - one).abs() > 1e-4


@pytest.mark.parametrize("norm_order", ["pre", "swin"])
def test_share_that_is_dropped(norm_order: str) -> None:
    """Of what attention and the feed-forward layer give, each alone, before it is added; the rest is made up for."""

    def block(dropout: float) -> torch.nn.Module:
        made = (
            Transfusion(llama(norm_order=norm_order, dropout=dropout, d_model=256)).initialise(0).transformer.blocks[0]
        )
        for parameter in made.parameters():  # every channel and position alike
            parameter.detach().fill_(0.01)
        return made

    def added(silent: str, dropout: float, generator: torch.Generator | None) -> Tensor:
        with torch.no_grad():
            one = block(dropout)
            one.get_submodule(silent).weight.zero_()
            x = torch.ones(200, 256)
            nothing_turned = torch.ones(200, 1, 64), torch.zeros(200, 1, 64)
            return one(x, nothing_turned, lambda layer, q, k, v: v.flatten(1), generator) - x

    for silent in ("out", "feed_forward.down"):
        whole = added(silent, 0.0, None)
        assert whole.std() < 1e-6 < whole.abs().min()
        found = added(silent, 0.3, generator_for(0))
        zero = found.abs() < 1e-7
        assert float(zero.float().mean()) == pytest.approx(0.3, abs=0.01)
        torch.testing.assert_close(found[~zero], whole[~zero] / 0.7, rtol=1e-3, atol=0)
        assert zero.float().mean(0).max() < 0.5, "by element, not by channel"
        assert zero.float().mean(1).max() < 0.5, "nor by position"
        unused = generator_for(0)
        assert torch.equal(added(silent, 0.0, unused), whole)
        assert torch.equal(unused.get_state(), generator_for(0).get_state())
        assert torch.equal(added(silent, 0.3, None), whole), "never without a generator"


def test_dropout_is_of_training_alone(tokenizer: Tokenizer) -> None:
    plain, dropping = coded(tokenizer), coded(tokenizer, dropout=0.5)
    dropping.model.train()
    texts = ["a crab", "hello, world"]
    assert perplexity(plain, texts) == perplexity(dropping, texts)
    asked = Request(PROMPT, "force", max_tokens=8, size=(8, 8), code_temperature=0.0, image_guidance_scale=2.0)
    found = [list(Engine(one).run([asked, replace(asked, draw="never")])) for one in (plain, dropping)]
    assert [told(event) for event in found[0]] == [told(event) for event in found[1]]


# --- drawing by codes ---


def text_only(tokenizer: Tokenizer, **changes: object) -> Exported:
    model = randomised(llama(**changes)).eval().requires_grad_(False)
    return Exported(model, Process(DiffusionConfig()), Pixels(), tokenizer, 8, GenerationConfig())


def pictures(engine: Engine, *requests: Request) -> list[Tensor]:
    found = {event.request_id: event.latent for event in engine.run(requests) if isinstance(event, ImageEnd)}
    return [found[row] for row in range(len(requests))]


def whole_logits(model: Transfusion, grammar: SequenceFormat, document: Document) -> Tensor:
    """After every position, by one pass with a dense mask and without a cache."""
    batch = collate([document], grammar, "causal")
    return model(batch.input_ids, batch.position_ids, dense(batch), torch.arange(batch.positions)).logits


def uncached_codes(
    engine: Engine, document: Document, scale: float, image_scale: float | None = None, shape: tuple[int, int] = (4, 4)
) -> tuple[Tensor, Tensor]:
    """A greedy drawing, read anew from its beginning for each code, and the guided logits each was chosen from."""
    chosen: list[int] = []
    guided = []

    def following(whole: Document) -> Tensor:
        """Logits of the code to come. One more stands in its place; nothing before it can see that."""
        drawn = Image(torch.tensor([[*chosen, 0]]))
        logits = whole_logits(engine.exported.model, engine.grammar, replace(whole, parts=[*whole.parts, drawn]))
        return logits[-3][engine.config.text_vocab_size :]  # behind it are that one and EOI

    null, alone = replace(document, parts=[]), replace(document, parts=document.images)
    while len(chosen) < shape[0] * shape[1]:
        most, least = following(document), following(null)
        logits = least + scale * (most - least)
        if image_scale is not None and document.images:
            middle = following(alone)
            logits = least + image_scale * (middle - least) + scale * (most - middle)
        guided.append(logits)
        chosen.append(int(logits.argmax()))
    return torch.tensor(chosen).view(shape), torch.stack(guided)


def told(event: Event) -> list[object]:
    """An event as plain values, to compare."""
    plain = [value.tolist() if isinstance(value, Tensor) else value for value in vars(event).values()]
    return [type(event).__name__, *plain]


class Chosen:
    """Keeps the logits that codes, and sampled tokens, are chosen from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logits: list[Tensor] = []
        original = image_decoding.sample

        def sample(logits, temperature, top_p, generator):
            self.logits.append(logits.clone())
            return original(logits, temperature, top_p, generator)

        for module in (image_decoding, engine_module):
            monkeypatch.setattr(module, "sample", sample)


class Script:
    """Forces the tokens that row 0 chooses, and keeps the logits they would have been chosen from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> None:
        self.logits: list[Tensor] = []
        original = Engine._choose

        def choose(engine: Engine, row, logits, likeliest):
            self.logits.append(logits.clone())
            if tokens:
                yield from original(engine, row, logits, tokens.pop(0))
            else:
                yield from engine._finish(row, "stop")

        monkeypatch.setattr(Engine, "_choose", choose)


VARIANTS = [{}, {"n_kv_heads": 2}, STABLE]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_codes_equal_whole_recomputation(tokenizer: Tokenizer, monkeypatch, variant: dict, scale: float) -> None:
    engine, kept = Engine(coded(tokenizer, **variant)), Chosen(monkeypatch)
    (drawn,) = pictures(engine, asking(guidance_scale=scale))
    expected, guided = uncached_codes(engine, PROMPT, scale)
    assert drawn.dtype == torch.int64
    assert torch.equal(drawn, expected)
    assert len(expected.unique()) > 2, "a picture that can tell one mistake from another"
    torch.testing.assert_close(torch.stack(kept.logits), guided, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_script_of_codes_equals_whole_passes(tokenizer: Tokenizer, monkeypatch, variant: dict) -> None:
    """text, BOI, image, EOI, text, BOI, image: codes and every logit equal those of passes without a cache."""
    engine = Engine(coded(tokenizer, **variant))
    boi, eoi = engine.grammar.boi, engine.grammar.eoi
    script = Script(monkeypatch, [30, 31, boi, 32, boi, 33])
    asked = asking(draw="auto", max_tokens=20, max_images=2, guidance_scale=2.0, size=(4, 6))
    events = list(engine.run([asked]))
    drawn = [event.latent for event in events if isinstance(event, ImageEnd)]
    assert [e.token for e in events if isinstance(e, TextDelta)] == [30, 31, 32, 33]
    # a picture's first code needs no pass of its own, and its last one is read together with EOI
    assert events[-1] == Done(0, "stop", 4, 2, 2 * 5, 2 * 6)

    before = [Text((10, 11, 12, 30, 31))]
    first, _ = uncached_codes(engine, Document(before, closed=False), 2.0, shape=(2, 3))
    assert torch.equal(drawn[0], first)
    before += [Image(first), Text((32,))]
    second, _ = uncached_codes(engine, Document(before, closed=False), 2.0, shape=(2, 3))
    assert torch.equal(drawn[1], second)

    document = Document([*before, Image(second), Text((33,))], closed=False)
    tokens, whole = (
        layout_document(document, engine.grammar).input_ids,
        whole_logits(engine.exported.model, engine.grammar, document),
    )
    at = [3, 4, 5, 13, 14, 22, 23]  # logits were asked for after: 12, 30, 31, EOI, 32, EOI, 33
    assert tokens[at].tolist() == [12, 30, 31, eoi, 32, eoi, 33]
    found, allowed = torch.stack(script.logits), engine.runner.logit_mask == 0
    assert not allowed[engine.config.text_vocab_size :].any()
    assert (found[:, ~allowed] == -torch.inf).all()
    assert (found[-2:, boi] == -torch.inf).all(), "no third image"
    allowed[boi] = False
    torch.testing.assert_close(found[:, allowed], whole[at][:, allowed], atol=1e-4, rtol=1e-4)


def test_batched_codes_equal_those_alone(tokenizer: Tokenizer) -> None:
    """Prompts, lengths, sizes, phases, ways of guidance and of choosing all differ in one go."""
    engine = Engine(coded(tokenizer))
    picture, other = Image(codes(4, 4, 1), target=False), Image(codes(2, 3, 2), target=False)
    shown = Document([picture, Text((10, 14))], closed=False)
    requests = [
        asking(),
        asking(Document([Text((40,) * 17)], closed=False), guidance_scale=1.0, code_temperature=1.0),
        asking(Document([], closed=False), size=(4, 6), seed=7, code_temperature=1.0, code_top_p=0.5),
        asking(shown, draw="never", max_tokens=6),
        asking(shown, guidance_scale=4.0, image_guidance_scale=1.5),
        asking(Document([other, Text((8, 7)), picture], closed=False), draw="never", max_tokens=9, temperature=1.0),
        asking(Document([other, Text((15,))], closed=False), image_guidance_scale=1.0, size=(2, 2)),
        asking(size=(6, 4), guidance_scale=0.0, max_tokens=5, temperature=1.5, seed=8),
        asking(Document([Text((8,))], closed=False), image_guidance_scale=2.0, size=(2, 8), max_tokens=3, max_images=2),
    ]
    together = list(engine.run(requests))
    assert {event.request_id for event in together if isinstance(event, ImageEnd)} == {0, 1, 2, 4, 6, 7, 8}
    for row, one in enumerate(requests):
        mine = [event for event in together if event.request_id == row]
        alone = [replace(event, request_id=row) for event in engine.run([one])]
        assert [told(event) for event in mine] == [told(event) for event in alone]


def test_guidance_of_codes(tokenizer: Tokenizer) -> None:
    """Scale 1 is the prompt alone, scale 0 the null branch alone; a prompt of nothing has nothing to be guided to."""
    engine, nothing = Engine(coded(tokenizer)), Document([], closed=False)
    for document in (PROMPT, Document([Text((60, 61))], closed=False)):
        for scale in (0.0, 1.0, 3.0):
            (drawn,) = pictures(engine, asking(document, guidance_scale=scale))
            assert torch.equal(drawn, uncached_codes(engine, document, scale)[0])
    with_prompt, null = pictures(engine, asking(guidance_scale=1.0), asking(nothing, guidance_scale=1.0))
    strong, weak = pictures(engine, asking(guidance_scale=3.0), asking(guidance_scale=0.0))
    assert torch.equal(weak, null)
    assert not torch.equal(with_prompt, null)
    assert not torch.equal(with_prompt, strong)
    assert torch.equal(pictures(engine, asking(nothing, guidance_scale=7.0))[0], null)


@pytest.mark.parametrize(("scale", "image_scale"), [(3.0, 1.5), (2.0, 1.0), (1.0, 2.5), (0.0, 2.0), (1.0, 1.0)])
def test_three_branches_of_codes(tokenizer: Tokenizer, monkeypatch, scale: float, image_scale: float) -> None:
    engine, kept = Engine(coded(tokenizer)), Chosen(monkeypatch)
    before = [Image(codes(2, 3, 1)), Text((10, 14)), Image(codes(4, 4, 2)), Text((50,))]
    document = Document(before, closed=False)
    (drawn,) = pictures(engine, asking(document, guidance_scale=scale, image_guidance_scale=image_scale))
    expected, guided = uncached_codes(engine, document, scale, image_scale)
    torch.testing.assert_close(torch.stack(kept.logits), guided, atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn, expected)
    if scale != image_scale:
        (plain,) = pictures(engine, asking(document, guidance_scale=scale))
        assert not torch.equal(drawn, plain)


def test_image_guidance_without_an_image_is_guidance(tokenizer: Tokenizer, monkeypatch) -> None:
    """And a picture it has drawn itself is one it has seen, for the next."""
    engine = Engine(coded(tokenizer))
    with_scale, plain = pictures(
        engine, asking(guidance_scale=3.0, image_guidance_scale=1.5), asking(guidance_scale=3.0)
    )
    assert torch.equal(with_scale, plain)
    Script(monkeypatch, [engine.grammar.boi, 32, engine.grammar.boi])
    asked = asking(draw="auto", max_tokens=9, max_images=2, guidance_scale=3.0, image_guidance_scale=1.5)
    drawn = [event.latent for event in engine.run([asked]) if isinstance(event, ImageEnd)]
    assert torch.equal(drawn[0], plain)
    second = Document([*PROMPT.parts, Image(plain), Text((32,))], closed=False)
    assert torch.equal(drawn[1], uncached_codes(engine, second, 3.0, 1.5)[0])


@pytest.mark.parametrize("image_attention", ["bidirectional", "causal"])
@pytest.mark.parametrize(("scale", "image_scale"), [(3.0, 1.5), (2.0, 1.0), (1.0, 1.0)])
def test_three_branches_of_latents(
    tokenizer: Tokenizer, image_attention: str, scale: float, image_scale: float
) -> None:
    model = randomised(tiny(image_attention=image_attention)).eval().requires_grad_(False)
    process = Process(DiffusionConfig(prediction="x0", weighting="v", clip_x0=1.0))
    engine = Engine(Exported(model, process, Pixels(), tokenizer, 8, GenerationConfig()))
    seen = [Image(latent(4, 8, 1), target=False), Text((10, 14)), Image(latent(4, 4, 2), target=False), Text((50,))]
    document, ddim = Document(seen, closed=False), SamplerConfig("ddim", 3)
    asked = Request(
        document, "force", 0, size=(8, 4), sampler=ddim, guidance_scale=scale, image_guidance_scale=image_scale
    )

    def foretold(parts: Sequence[Text | Image], x: Tensor, t: int) -> Tensor:
        batch = collate([Document([*parts, Image(x)], closed=False)], engine.grammar, engine.config.image_attention)
        times = torch.zeros(len(batch.latents), dtype=torch.int64)
        times[-1] = t
        attend = dense(batch)
        return model(
            batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, times
        ).predictions[-1]

    sampler = Sampler(process, ddim)
    state = sampler.prepare((3, 8, 4), generator_for(0, "image", 0))
    while not state.done:
        whole, images, null = (foretold(parts, state.x, state.t) for parts in (seen, document.images, []))
        state = sampler.step(state, null + image_scale * (images - null) + scale * (whole - images))
    (drawn,) = pictures(engine, asked)
    torch.testing.assert_close(drawn, sampler.finish(state), atol=1e-4, rtol=1e-4)
    if scale != image_scale:
        (plain,) = pictures(engine, replace(asked, image_guidance_scale=None))
        assert (plain - drawn).abs().max() > 1e-3
    alone = replace(asked, document=PROMPT)
    with_scale, without = pictures(engine, alone, replace(alone, image_guidance_scale=None))
    assert torch.equal(with_scale, without)


@pytest.mark.parametrize("draw", ["auto", "never"])
def test_text_is_text_and_images_are_codes(tokenizer: Tokenizer, draw: str) -> None:
    """A model that would like nothing better than codes in its text, and text in its images."""
    one = coded(tokenizer)
    with torch.no_grad():
        one.model.lm_head.weight[one.model.config.text_vocab_size :] *= 6
        one.model.lm_head.weight[tokenizer.boi] *= 20
    engine, boi = Engine(one), tokenizer.boi
    requests = [
        asking(draw=draw, max_tokens=60, max_images=3, temperature=2.0, code_temperature=2.0, size=(4, 4), seed=seed)
        for seed in range(12)
    ]
    events = list(engine.run(requests))
    tokens = {event.token for event in events if isinstance(event, TextDelta)}
    assert len(tokens) > 100
    assert max(tokens) < tokenizer.vocab_size
    assert not tokens & {tokenizer.bos, tokenizer.eoi, boi}
    drawn = [event.latent for event in events if isinstance(event, ImageEnd)]
    assert bool(drawn) == (draw == "auto")
    for picture in drawn:
        assert picture.shape == (2, 2)
        assert 0 <= picture.min() <= picture.max() < CODEBOOK
    ends = [event for event in events if isinstance(event, Done)]
    assert len(ends) == len(requests)
    assert all(end.images <= 3 for end in ends)
    free = (whole_logits(engine.exported.model, engine.grammar, PROMPT)[-1] / 2).softmax(-1)
    assert free[engine.config.text_vocab_size :].sum() > 0.3, "without a bar there would be codes"


def test_events_of_codes_in_order(tokenizer: Tokenizer) -> None:
    engine = Engine(coded(tokenizer))
    events = list(engine.run([asking(preview_every=1)]))
    assert [type(event) for event in events] == [ImageStart, *[ImageProgress] * 16, ImageEnd, Done]
    assert [(e.step, e.total) for e in events if isinstance(e, ImageProgress)] == [(n, 16) for n in range(1, 17)]
    assert events[-1] == Done(0, "images", 0, 1, 15, 16)


def test_a_full_context_ends_a_row(tokenizer: Tokenizer) -> None:
    """An image that would not fit whole is never begun; one that just fits is drawn."""
    one = coded(tokenizer, max_seq_len=40)
    with torch.no_grad():
        one.model.lm_head.weight[tokenizer.boi] *= 20
    engine = Engine(one)
    requests = [
        asking(Document([Text((9,) * (1 + seed))], closed=False), draw="auto", max_tokens=60, max_images=9, seed=seed)
        for seed in range(36)
    ]
    requests = [
        replace(asked, temperature=2.0, size=((2, 2), (4, 4), (4, 6))[n % 3], image_guidance_scale=(None, 2.0)[n % 2])
        for n, asked in enumerate(requests)
    ]
    lengths = [len(layout_document(asked.document, engine.grammar)) for asked in requests]
    ends = {}
    for event in engine.run(requests):
        if isinstance(event, Done):
            rows, columns = (side // 2 for side in requests[event.request_id].size)
            ends[event.request_id] = event
            lengths[event.request_id] += event.text_tokens + event.images * (rows * columns + 2)
    assert len(ends) == len(requests)
    assert max(lengths) == 40
    assert sum(end.images for end in ends.values()) > 20
    for row, length in enumerate(lengths):
        assert (ends[row].reason == "length") == (length >= 39), "text leaves the last place free"
    fits = Document([Text((9,) * (40 - 1 - 18))], closed=False)
    assert pictures(engine, asking(fits))[0].shape == (4, 4)
    with pytest.raises(UserError, match="expected at most 40 positions with what is to come, found 41"):
        pictures(engine, asking(replace(fits, parts=[*fits.parts, Text((9,))])))


def test_a_code_costs_a_position_of_each_branch(tokenizer: Tokenizer, sizes: list[int]) -> None:
    engine = Engine(coded(tokenizer))
    document = Document([Image(codes(2, 2)), Text((9,) * 50)], closed=False)
    list(engine.run([asking(document, size=(4, 4))]))
    # prompt; null prefix (BOS, BOI), once; BOI; then every code but the last, in both branches
    assert sizes == [57, 2, 1, *[2] * 3]
    sizes.clear()
    list(engine.run([asking(document, size=(4, 4), guidance_scale=1.0, max_tokens=1)]))
    assert sizes == [57, 1, *[1] * 3, 2, *[1] * (len(sizes) - 6)], "one branch; the last code is read with EOI"
    sizes.clear()
    list(engine.run([asking(document, size=(4, 4), image_guidance_scale=2.0)]))
    assert sizes == [57, 1 + 8, *[3] * 3], "BOI; beside it BOS, the image in its markers, BOI"


def test_codes_are_a_function_of_the_seed(tokenizer: Tokenizer) -> None:
    engine = Engine(coded(tokenizer))
    asked = asking(code_temperature=1.0)
    one, again, other, narrow = pictures(engine, asked, asked, replace(asked, seed=6), replace(asked, code_top_p=1e-6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(narrow, pictures(engine, asking())[0]), "a nucleus of one is the likeliest"


def test_codes_are_drawn_by_their_probability(tokenizer: Tokenizer) -> None:
    """The first code of a thousand seeds: of guided logits, softened, in the nucleus alone."""
    engine, count = Engine(coded(tokenizer)), 1000
    _, guided = uncached_codes(engine, PROMPT, 2.0, shape=(1, 1))
    for temperature, top_p in ((1.5, 1.0), (1.5, 0.7)):
        asked = asking(size=(2, 2), guidance_scale=2.0, code_temperature=temperature, code_top_p=top_p)
        drawn = pictures(engine, *(replace(asked, seed=seed) for seed in range(count)))
        found = torch.bincount(torch.cat(drawn).flatten(), minlength=CODEBOOK) / count
        expected, total = torch.zeros(CODEBOOK), 0.0
        probabilities = (guided[0] / temperature).softmax(0)
        for code in probabilities.argsort(descending=True).tolist():
            if total < top_p:
                expected[code] = probabilities[code]
            total += float(probabilities[code])
        expected /= expected.sum()
        assert 0.05 < expected.max() < 0.7
        assert (found[expected == 0] == 0).all()
        spread = (expected * (1 - expected) / count).sqrt() + 1e-3
        assert ((found - expected) / spread).abs().max() < 4.5


def test_a_thousand_forced_images(tokenizer: Tokenizer) -> None:
    """Every one has exactly its codes, and each code has its turn."""
    engine = Engine(coded(tokenizer, d_model=32, n_layers=1, n_heads=2, d_ff=32))
    sizes, seen, drawn = [(4, 4), (6, 4), (4, 6), (6, 6), (2, 6)], torch.zeros(CODEBOOK), 0
    for batch in range(20):
        requests = [
            asking(
                Document([Text(tuple(range(4, 4 + seed % 7)))], closed=False),
                size=sizes[seed % 5],
                code_temperature=1.0,
                guidance_scale=(1.0, 3.0)[seed % 2],
                seed=seed,
            )
            for seed in range(50 * batch, 50 * batch + 50)
        ]
        started = dict.fromkeys(range(50), 0)
        for event in engine.run(requests):
            if isinstance(event, ImageProgress):
                started[event.request_id] += 1
            elif isinstance(event, ImageEnd):
                rows, columns = (side // 2 for side in requests[event.request_id].size)
                assert event.latent.shape == (rows, columns)
                assert started[event.request_id] == rows * columns
                assert 0 <= event.latent.min() <= event.latent.max() < CODEBOOK
                seen += torch.bincount(event.latent.flatten(), minlength=CODEBOOK)
                drawn += 1
            elif isinstance(event, Done):
                assert (event.reason, event.images, event.text_tokens) == ("images", 1, 0)
    assert drawn == 1000
    assert seen.sum() == sum(rows * columns // 4 for rows, columns in sizes) * 200
    assert seen.min() > 20


# --- what a model without images refuses ---


def test_a_model_of_text_alone(tokenizer: Tokenizer) -> None:
    one = text_only(tokenizer)
    with torch.no_grad():
        one.model.lm_head.weight[tokenizer.boi] *= 50
    engine, pipe = Engine(one), TransfusionPipeline(one)
    shown = Document([Image(latent(4, 4)), Text((9,))], closed=False)
    picture = PIL.Image.new("RGB", (8, 8))
    for refused in (
        lambda: list(engine.run([asking()])),
        lambda: list(engine.run([asking(shown, draw="never")])),
        lambda: list(engine.run([asking(draw="auto"), asking(shown, draw="auto")])),
        lambda: pipe("a crab"),
        lambda: pipe.caption(picture),
        lambda: pipe.generate(["what is", picture]),
    ):
        with pytest.raises(
            UserError, match=r"^request( 1)?: expected text alone, for the model knows no images"
        ) as told:
            refused()
        assert "\n" not in str(told.value)
    requests = [asking(draw="auto", max_tokens=40, max_images=3, temperature=2.0, seed=seed) for seed in range(8)]
    events = list(engine.run(requests))
    assert {type(event) for event in events} == {TextDelta, Done}
    assert len([event for event in events if isinstance(event, TextDelta)]) > 40
    assert all(event.images == 0 for event in events if isinstance(event, Done))
    assert tokenizer.boi not in {event.token for event in events if isinstance(event, TextDelta)}
    assert isinstance(pipe.generate("a crab", max_tokens=5).text, str)


@pytest.mark.parametrize("made", [coded, text_only])
def test_only_what_denoises_has_steps(made: Callable[[Tokenizer], Exported], tokenizer: Tokenizer) -> None:
    pipe = TransfusionPipeline(made(tokenizer))
    for options in ({"num_inference_steps": 5}, {"sampler": "ddim"}):
        with pytest.raises(UserError, match=r"^steps, sampler, eta: expected none, for the model does not denoise"):
            pipe("a crab", **options)
    with pytest.raises(UserError, match="steps, sampler, eta: expected none"):
        pipe.request(["a crab"], steps=0)


# --- exports ---


def export(folder: Path, one: Exported) -> Path:
    weights, size = dict(one.model.named_parameters()), one.image_size
    diffusion = one.process.config
    return save_export(
        folder, weights, one.model.config, diffusion, one.tokenizer, one.autoencoder, size, one.generation, "a card"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """An export of a Chameleon with the bundled VQ-VAE: 16 pixels, 4 x 4 of 1024 codes."""
    autoencoder = VQTokenizer(open_autoencoder("vq-f4-small"))
    model = randomised(chameleon(codebook_size=1024)).eval().requires_grad_(False)
    defaults = GenerationConfig(guidance_scale=2.0, max_tokens=8, code_temperature=0.7, code_top_p=0.9)
    one = Exported(model, Process(DiffusionConfig()), autoencoder, tokenizer, 16, defaults)
    return export(tmp_path_factory.mktemp("chameleon") / "export", one)


def test_export_of_a_chameleon(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["TransfusionChameleon"]
    assert config["autoencoder"]["name"] == "vq-f4-small"
    loaded = load_export(saved)
    assert loaded.model.config == chameleon(codebook_size=1024)
    assert isinstance(loaded.autoencoder, VQTokenizer)
    assert loaded.autoencoder.codebook_size == 1024
    assert (loaded.generation.code_temperature, loaded.generation.code_top_p) == (0.7, 0.9)
    for name, parameter in randomised(chameleon(codebook_size=1024)).named_parameters():
        assert torch.equal(dict(loaded.model.named_parameters())[name], parameter), name

    pipe = TransfusionPipeline.from_pretrained(saved)
    asked = pipe.request(["a crab"])
    assert (asked.guidance_scale, asked.code_temperature, asked.code_top_p) == (2.0, 0.7, 0.9)
    picture = pipe("a crab", generator=3).images[0]
    assert picture.size == (16, 16)
    drawn = pipe("a crab", generator=3, output_type="latent").images[0]
    assert drawn.shape == (4, 4)
    assert drawn.dtype == torch.int64
    shown = open_autoencoder("vq-f4-small").decode_codes(drawn[None])[0]  # type: ignore[attr-defined]
    assert (np.asarray(picture) == shown).all()
    assert pipe(["a crab", "a boat"], height=8, width=24, generator=0).images[1].size == (24, 8)
    with pytest.raises(UserError, match="image size: expected positive multiples of 4, found"):
        pipe("a crab", height=18)
    captions = pipe.caption([picture, pipe("a boat", generator=4).images[0]], max_tokens=6)
    assert len(captions) == 2
    assert all(isinstance(text, str) for text in captions)
    reply = pipe.generate(["a crab", picture], draw="force", max_tokens=4, image_guidance_scale=1.5)
    assert [image.size for image in reply.images] == [(16, 16)]
    assert reply.done.text_tokens <= 4


def test_an_autoencoder_that_is_not_its_own(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "export"
    shutil.copytree(saved, other)
    save_autoencoder(other / "autoencoder", open_autoencoder("kl-f4-small"), "kl-f4-small")
    with pytest.raises(
        UserError, match=r'"vq-f4-small" \(\w+, 1024 codes\), found "kl-f4-small" \(\w+, 0 codes\)'
    ) as told:
        load_export(other)
    assert "\n" not in str(told.value)
    alike = open_autoencoder("vq-f4-small")
    assert isinstance(alike, ImageAutoencoder)
    alike.quantize.embedding.weight[0, 0] += 1
    save_autoencoder(other / "autoencoder", alike, "vq-f4-small")
    with pytest.raises(UserError, match=r'found "vq-f4-small" \(\w+, 1024 codes\)'):
        load_export(other)
    with pytest.raises(ValueError, match='expected one with a codebook, found "kl-f4-small"'):
        VQTokenizer(open_autoencoder("kl-f4-small"))


@pytest.mark.parametrize("made", [text_only, coded])
def test_perplexity_of_every_kind(made: Callable[[Tokenizer], Exported], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of an export, by whole passes of one text at a time; the softmax is over codes too."""
    loaded = load_export(export(tmp_path / "export", made(tokenizer)))
    assert type(loaded.autoencoder) is (VQTokenizer if made is coded else Pixels)
    texts, nats, tokens = ["a crab on a boat", "hello", "the moon is red, two crabs"], 0.0, 0
    for text in texts:
        ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
        logits = whole_logits(
            loaded.model, loaded.model.config.sequence_format(tokenizer), Document([Text(tuple(ids[1:-1]))])
        )
        for scores, following in zip(logits.double(), ids[1:], strict=False):
            nats += float(scores.exp().sum().log() - scores[following])
            tokens += 1
    found = perplexity(loaded, texts, batch=2)
    assert found.tokens == tokens
    assert found.perplexity.value == pytest.approx(math.exp(nats / tokens), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"draw": "force", "max_images": 0}, "max_images: expected at least 1 where one is forced, found 0"),
        ({"code_top_p": 0.0}, "code_top_p: expected a share above 0, at most 1, found 0.0"),
        ({"top_p": 1.5}, "top_p: expected a share above 0, at most 1, found 1.5"),
        (
            {"document": Document([Image(torch.full((2, 2), 10**6))], closed=False)},
            r"image: expected codes from 0 to \d+, found 1000000 to 1000000",
        ),
    ],
    ids=["max_images", "code_top_p", "top_p", "codes"],
)
def test_requests_that_can_not_be(changes: dict[str, object], told: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=f"^request: {told}$"):
        list(Engine(coded(tokenizer)).run([asking(**changes)]))
