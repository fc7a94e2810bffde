"""Experts by kind of position: equal towers are one network, each reads and learns from its own positions alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import exported, latent, randomised, tiny
from torch._dynamo.testing import CompileCounterWithBackend

from transfuse.inference import Engine, ImageEnd, Request, TextDelta
from transfuse.inference.optimize import pack
from transfuse.model import Grouped, ModelConfig, Transfusion, dense
from transfuse.sequence import Batch, Document, Image, Text, Tokenizer, collate
from transfuse.training import Distributed, ParallelConfig, parallelize
from transfuse.training.parallel import compile_block

TRUNKS = [
    {},
    {"qkv_bias": True, "qk_norm": True, "qk_norm_type": "rms", "n_kv_heads": 2, "d_head": 24},
    {"qk_norm": True, "qk_norm_type": "rms-all", "norm_order": "swin", "nope_layers": (1,)},
    {"qk_norm": True, "norm_order": "swin"},
    {"images": "codes", "codebook_size": 16, "patch_size": 1, "image_attention": "causal"},
]


def equal_towers(shared: Transfusion, **changes: object) -> Transfusion:
    """A network with experts, both of whose towers are the transformer of `shared`."""
    model = Transfusion(replace(shared.config, **changes))  # type: ignore[arg-type]
    weights = shared.state_dict()
    names = {name: name.replace(".image.", ".").replace("image_norm", "norm") for name in model.state_dict()}
    model.load_state_dict({name: weights[source] for name, source in names.items()})
    return model


def packed(config: ModelConfig, tokenizer: Tokenizer, *documents: Document) -> Batch:
    return collate(documents, config.sequence_format(tokenizer), config.image_attention)


def some_documents(config: ModelConfig) -> list[Document]:
    """Text alone, an image alone, images of two sizes between words."""

    def image(rows: int, columns: int, seed: int) -> Image:
        if config.images == "codes":
            return Image(torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)))
        return Image(latent(rows, columns, seed))

    parts = [
        [Text((9, 8, 7))],
        [image(4, 4, 1)],
        [Text((5,)), image(2, 6, 2), Text((6, 5)), image(4, 4, 3), Text((11,))],
    ]
    return [Document(part, sample=number) for number, part in enumerate(parts)]


def passed(model: Transfusion, batch: Batch, attend=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    times = torch.arange(1, len(batch.latents) + 1) * 90
    attend = attend or Grouped(batch, torch.float32)
    output = model(
        batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, times
    )
    return output.logits, output.predictions


def loss(model: Transfusion, batch: Batch, attend=None) -> torch.Tensor:
    logits, predictions = passed(model, batch, attend)
    return logits.logsumexp(-1).sum() + sum((p.sin() * (p + 1)).sum() for p in predictions)


@pytest.mark.parametrize("experts", ["ffn", "all"])
@pytest.mark.parametrize("trunk", TRUNKS, ids=str)
def test_equal_towers_are_the_shared_network(trunk, experts: str, tokenizer: Tokenizer) -> None:
    """Outputs are equal, and the gradients of both towers add up to the shared one's."""
    shared = randomised(tiny(**trunk))
    model = equal_towers(shared, experts=experts)
    batch = packed(shared.config, tokenizer, *some_documents(shared.config))
    for attend in (None, dense(batch)):
        for found, expected in zip(passed(model, batch, attend), passed(shared, batch, attend), strict=True):
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    loss(shared, batch).backward()
    loss(model, batch).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in shared.named_parameters():
        twin = name.replace("transformer.norm", "transformer.image_norm")
        if name.startswith("transformer.blocks."):
            twin = ".".join([*name.split(".")[:3], "image", *name.split(".")[3:]])
        both = gradients[name] if twin not in gradients or twin == name else gradients[name] + gradients[twin]
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(both, parameter.grad, atol=2e-5 * max(1.0, scale), rtol=0)


@pytest.mark.parametrize("experts", ["ffn", "all"])
def test_a_tower_learns_from_its_own_positions_alone(experts: str, tokenizer: Tokenizer) -> None:
    model = randomised(tiny(experts=experts, image_d_ff=48))
    text, both = some_documents(model.config)[::2]
    loss(model, packed(model.config, tokenizer, text)).backward()
    for name, parameter in model.named_parameters():
        own = "image" not in name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == own, name
    # An image alone, read by no text: the markers around it are text, so only what they pass on is left out here.
    model.zero_grad()
    logits, predictions = passed(model, packed(model.config, tokenizer, both))
    predictions[0].sum().backward()
    assert model.transformer.norm.weight.grad is None or not model.transformer.norm.weight.grad.any()
    assert bool(model.transformer.image_norm.weight.grad.any())
    if experts == "all":  # the last block's text tower gives images their keys and values, and no more
        last = model.transformer.blocks[-1]
        assert not any(w.grad is not None and w.grad.any() for w in last.feed_forward.parameters())
        assert not any(w.grad is not None and w.grad.any() for w in last.out.parameters())
    model.zero_grad()
    logits = passed(model, packed(model.config, tokenizer, both))[0]
    logits.sum().backward()
    assert not model.transformer.image_norm.weight.grad.any()


@pytest.mark.parametrize("trunk", [{}, {"n_kv_heads": 2}, {"images": "codes", "codebook_size": 16, "patch_size": 1}])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_activations_give_the_same_gradients(trunk, recompute: str, tokenizer: Tokenizer) -> None:
    codes = {"image_attention": "causal"} if trunk.get("images") else {}
    config = tiny(experts="all", dropout=0.2, **trunk, **codes)
    batch, gradients = packed(config, tokenizer, *some_documents(config)), []
    for kind in ("none", recompute):
        model = parallelize(randomised(config), Distributed(), ParallelConfig(activation_checkpointing=kind))
        out = model(
            batch.input_ids,
            batch.position_ids,
            Grouped(batch, torch.float32),
            batch.loss_positions,
            batch.patches,
            batch.latents,
            torch.ones(len(batch.latents)),
            dropout=torch.Generator().manual_seed(3),
        )
        (out.logits.logsumexp(-1).sum() + sum(p.square().sum() for p in out.predictions)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_compiled_blocks_serve_any_number_of_patches(tokenizer: Tokenizer) -> None:
    """The first batch fixes the sizes, the second opens them, and no later one compiles anything."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    config = tiny(experts="all")
    plain, model = randomised(config), randomised(config)
    for block in model.transformer.blocks:
        compile_block(block, backend=counter, fullgraph=True)
    compiled = []
    for sizes in ([(4, 4)], [(4, 8), (2, 2)], [(8, 8)], [(2, 6), (4, 4), (2, 2)]):
        parts = [part for seed, size in enumerate(sizes) for part in (Text((9, seed + 5)), Image(latent(*size, seed)))]
        batch = collate([Document(parts)], config.sequence_format(tokenizer), multiple=64)
        gradients = []
        for network in (plain, model):
            network.zero_grad()
            loss(network, batch, dense(batch)).backward()
            gradients.append([w.grad for w in network.parameters() if w.grad is not None])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0)
        compiled.append(counter.frame_count)
    torch._dynamo.reset()
    assert compiled == [1, 2, 2, 2]


def test_ffn_experts_share_attention() -> None:
    names = {name for name, _ in Transfusion.on_meta(tiny(experts="ffn")).named_parameters() if ".image" in name}
    block = "transformer.blocks.0.image."
    assert {name for name in names if name.startswith(block)} == {
        f"{block}feed_forward_norm.weight",
        f"{block}feed_forward.gate_up.weight",
        f"{block}feed_forward.down.weight",
    }
    assert "transformer.image_norm.weight" in names


def broken(model: Transfusion, image: bool) -> None:
    """Make one tower's weights not numbers."""
    for name, parameter in model.transformer.named_parameters():
        if ("image" in name) == image:
            parameter.fill_(torch.nan)


@torch.no_grad()
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_engine_reads_one_tower_a_pass(tokenizer: Tokenizer, is_packed: bool) -> None:
    """Text is written without the image tower, and an image is denoised without the text tower."""
    ask = Request(Document([Text((10, 11, 12))], closed=False), draw="never", max_tokens=5)
    made = exported(tokenizer, experts="all")
    if is_packed:
        pack(made.model)
    expected = [event.token for event in Engine(made).run([ask]) if isinstance(event, TextDelta)]
    if not is_packed:
        broken(made.model, image=True)
        found = [event.token for event in Engine(made).run([ask]) if isinstance(event, TextDelta)]
        assert found == expected
        made = exported(tokenizer, experts="all")
    draw = replace(ask, draw="force", max_tokens=0, size=(8, 8), seed=3)
    engine, latents = Engine(made), []
    (image,) = [event.latent for event in engine.run([draw]) if isinstance(event, ImageEnd)]
    if is_packed:
        return
    engine = Engine(made)
    for index, events in enumerate(_steps(engine, draw)):
        latents += [event.latent for event in events if isinstance(event, ImageEnd)]
        if index == 1:  # the prompt and BOI have been read
            broken(made.model, image=False)
        if latents:
            break
    assert torch.equal(latents[0], image)


def _steps(engine: Engine, request: Request):
    engine.submit(request)
    while engine.busy:
        yield engine.step()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": "all", "images": "none"}, 'model.experts: expected shared with images "none", found all'),
        ({"image_d_ff": 64}, "model.image_d_ff: expected None with experts shared, found 64"),
        ({"experts": "ffn", "image_d_ff": 0}, "model.image_d_ff: expected a positive number, found 0"),
    ],
)
def test_networks_that_cannot_be(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
