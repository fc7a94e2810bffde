"""The network: backends equal the dense oracle, packed equals unpacked, sizes equal the paper's."""

from __future__ import annotations

import pytest
import torch
from conftest import latent, randomised, tiny

from transfuse.model import SIZES, Grouped, ModelConfig, Transfusion, dense
from transfuse.model.costs import adapter_flops, count_parameters, forward_flops, train_flops
from transfuse.model.layers import RMSNorm, rotary_table, rotate
from transfuse.recipes import preset
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate

VARIANTS = [
    {"adapter": "linear"},
    {"adapter": "unet"},
    {"n_kv_heads": 2},
    {"timestep_at": "patch"},
    {"image_attention": "causal"},
    {"experts": "ffn"},
    {"experts": "all", "image_d_ff": 96, "n_kv_heads": 2, "positions": "2d"},
]


def run(model: Transfusion, batch: Batch, attend=None, timesteps=None):
    """Logits, predictions and gradients of a scalar that depends on all of them."""
    if timesteps is None:
        timesteps = torch.tensor([17 * (key[0] + key[1]) for key in batch.noise_ids], dtype=torch.int64)
    attend = attend or Grouped(batch, model.compute_dtype)
    output = model(
        batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, timesteps
    )
    model.zero_grad()
    loss = output.logits.float().logsumexp(-1).sum() + sum((p.sin() * (p + 1)).sum() for p in output.predictions)
    loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    a, b = a.detach(), b.detach()
    torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_grouped_equals_dense(variant, grammar: SequenceFormat, mixed) -> None:
    config = tiny(**variant)
    model = randomised(config)
    batch = collate(mixed, grammar, config.image_attention)
    expected, expected_gradients = run(model, batch, dense(batch))
    found, gradients = run(model, batch)
    close(found.logits, expected.logits)
    for a, b in zip(found.predictions, expected.predictions, strict=True):
        close(a, b)
    assert gradients.keys() == expected_gradients.keys()
    for name in gradients:
        close(gradients[name], expected_gradients[name])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_equals_unpacked(variant, grammar: SequenceFormat, mixed) -> None:
    config = tiny(**variant)
    model = randomised(config)
    together, gradients = run(model, collate(mixed, grammar, config.image_attention))
    logits, predictions, summed = [], [], {}
    for document in mixed:
        output, alone = run(model, collate([document], grammar, config.image_attention))
        logits.append(output.logits)
        predictions.extend(output.predictions)
        for name, gradient in alone.items():
            summed[name] = summed.get(name, 0) + gradient
    close(together.logits, torch.cat(logits))
    for a, b in zip(together.predictions, predictions, strict=True):
        close(a, b)
    for name in gradients:
        close(gradients[name], summed[name])


MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
ARMS = [
    {"adapter": "linear"},
    {"adapter": "linear", "timestep_at": "patch", "patch_positions": "none"},
    {"adapter": "unet"},
    {"adapter": "unet", "patch_size": 1, "unet_channels": (32,)},
    {"adapter": "linear", "patch_size": 1, "n_kv_heads": 2, "image_attention": "causal"},
    {"adapter": "unet", "patch_size": 4, "unet_channels": (16, 16, 32), "n_kv_heads": 1},
    {"qk_norm": True, "norm_order": "swin"},
    {"qk_norm": True, "qk_norm_type": "rms", "d_head": 24, "qkv_bias": True, "n_kv_heads": 2},
    {"qk_norm": True, "qk_norm_type": "rms-all", "norm_order": "swin", "nope_layers": (1,)},
    {"images": "codes", "codebook_size": 16, "patch_size": 1, "image_attention": "causal", "n_kv_heads": 2},
    {"experts": "all", "qkv_bias": True},
    {"images": "none"},
]


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ARMS, ids=str)
@pytest.mark.parametrize("sizes", [[(8, 8)] * 5, [(8, 8), (4, 12), (8, 8), (4, 4)], [(4, 8)]], ids=str)
def test_what_is_computed_does_not_depend_on_how_gradients_are_kept(variant, compute, sizes, tokenizer) -> None:
    """To the last bit, with weights that learn and weights that are frozen, whichever mode comes first."""
    config = tiny(**variant)
    model, grammar = randomised(config, compute_dtype=compute), config.sequence_format(tokenizer)

    def image(number: int, size: tuple[int, int]) -> Image:
        codes = torch.randint(0, 16, size, generator=torch.Generator().manual_seed(number))
        return Image(codes if config.images == "codes" else latent(*size, number))

    parts = [(Text((10, 11)), image(n, size), Text((12, 13 + n))) for n, size in enumerate(sizes)]
    if config.images == "none":
        parts = [(Text(tuple(range(10, 10 + rows * columns))),) for rows, columns in sizes]
    batch = collate([Document(part, sample=n) for n, part in enumerate(parts)], grammar, config.image_attention, 64)

    def values() -> list[torch.Tensor]:
        attend, timesteps = Grouped(batch, compute), torch.tensor([5 + 300 * key[0] for key in batch.noise_ids])
        inputs = (
            batch.input_ids,
            batch.position_ids,
            attend,
            batch.loss_positions,
            batch.patches,
            batch.latents,
            timesteps,
        )
        output = model(*inputs)
        return [output.logits, *output.predictions]

    found = {}
    for frozen in (False, True):
        model.requires_grad_(not frozen)
        for name, mode in MODES.items():
            with mode():
                found[name, frozen] = values()
    for way, tensors in found.items():
        for one, other in zip(tensors, found["grad", False], strict=True):
            assert torch.equal(one, other), way
    sum(tensor.float().square().sum() for tensor in found["grad", False]).backward()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotary_table_gives_what_is_made_without_it(compute, grammar: SequenceFormat, mixed) -> None:
    config = tiny(n_kv_heads=2)
    model, batch = randomised(config, compute_dtype=compute), collate(mixed, grammar)
    table = rotary_table(torch.arange(config.max_seq_len), config, compute)
    latents, timesteps = batch.latents, torch.arange(len(batch.latents))
    attend = Grouped(batch, compute)
    inputs = batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, latents, timesteps
    made, looked_up = model(*inputs), model(*inputs, table=table)
    assert torch.equal(made.logits, looked_up.logits)


def test_bfloat16_backend_follows_float32(grammar: SequenceFormat, mixed) -> None:
    """The explicit bfloat16 product is the same attention: within bfloat16's own error of float32."""
    batch = collate(mixed, grammar)
    q, k, v = (torch.randn(batch.positions, 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    exact = dense(batch)(0, q, k, v)
    rough = Grouped(batch, torch.bfloat16)(0, q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert (rough.float() - exact).abs().max() < 0.05


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, root of the mean square."""
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize(("heads", "key_heads", "channels"), [(4, 4, 16), (4, 2, 64), (3, 1, 48)])
@pytest.mark.parametrize("sharpness", [1.0, 3.0, 6.0])
def test_attention_in_bfloat16_is_nearly_exact(
    heads, key_heads, channels, sharpness, grammar: SequenceFormat, mixed
) -> None:
    """However far apart scores are: beside float64, outputs are wrong by what rounding them costs (0.17 %) and little
    more, gradients by a few roundings."""
    long = Document([Text(tuple(range(10, 310))), Image(latent(16, 16))])
    batch = collate([*mixed, long], grammar)
    generator = torch.Generator().manual_seed(heads)
    shapes = [(batch.positions, count, channels) for count in (heads, key_heads, key_heads, heads)]
    q, k, v, gradient = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    rough = [x.clone().requires_grad_() for x in (sharpness * q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in rough]
    found, expected = Grouped(batch, torch.bfloat16)(0, *rough), dense(batch)(0, *exact)
    found.backward(gradient.flatten(1))
    expected.backward(gradient.flatten(1).double())
    assert error(found, expected) < 0.0025
    for one, other in zip(rough, exact, strict=True):
        assert error(one.grad, other.grad) < 0.006


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("positions", "channels", "size"), [(100, 64, 1.0), (33, 768, 30.0), (7, 24, 1e-3)])
def test_a_norm_is_rounded_once(positions: int, channels: int, size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(channels)
    x, gradient = (torch.randn(positions, channels, generator=generator).to(dtype) for _ in range(2))
    x = (size * x).requires_grad_()
    norm = RMSNorm(channels, 1e-5).to(torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
    exact, weight = (tensor.detach().double().requires_grad_() for tensor in (x, norm.weight))
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight
    found = norm(x)
    found.backward(gradient)
    expected.backward(gradient.double())
    once, more = (0.002, 0.005) if dtype == torch.bfloat16 else (1e-6, 2e-6)
    assert found.dtype == dtype
    assert error(found, expected) < once
    assert error(x.grad, exact.grad) < more
    assert error(norm.weight.grad, weight.grad) < more
    with torch.inference_mode():
        assert torch.equal(norm(x), found)


def test_no_leak_between_documents_and_images(grammar: SequenceFormat) -> None:
    model = randomised(tiny())

    def states(second: torch.Tensor, other: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        docs = [
            Document([Text((10, 11)), Image(latent(4, 4, 1)), Text((12,)), Image(second)], sample=1),
            Document([Text((other, 14)), Image(latent(4, 4, 3))], sample=2),
        ]
        output, _ = run(model, collate(docs, grammar))
        return output.logits, output.predictions

    changed = latent(4, 4, 2).clone()
    logits, predictions = states(latent(4, 4, 2), 13)
    changed[:, -1, -1] += 1
    logits2, predictions2 = states(changed, 13)
    assert torch.equal(predictions[0], predictions2[0]), "image 1 must not see image 2"
    assert torch.equal(logits[:4], logits2[:4]), "text before image 2 must not see it"
    assert torch.equal(predictions[2], predictions2[2]), "another document must not see it"
    assert (predictions[1][:, 0, 0] != predictions2[1][:, 0, 0]).any(), "its first patch must see its last"
    logits3, predictions3 = states(latent(4, 4, 2), 99)
    assert torch.equal(predictions[0], predictions3[0])
    assert torch.equal(predictions[1], predictions3[1])
    assert not torch.equal(logits, logits3)


def test_each_image_has_its_own_timestep(grammar: SequenceFormat) -> None:
    model = randomised(tiny())
    batch = collate([Document([Image(latent(4, 4)), Text((9,)), Image(latent(4, 4))])], grammar)
    one, _ = run(model, batch, timesteps=torch.tensor([10, 20]))
    two, _ = run(model, batch, timesteps=torch.tensor([10, 900]))
    assert torch.equal(one.predictions[0], two.predictions[0])
    assert not torch.equal(one.predictions[1], two.predictions[1])


@pytest.mark.parametrize("positions", ["none", "learned"])
def test_order_of_patches_matters_and_rows_are_not_columns(grammar: SequenceFormat, positions: str) -> None:
    model = randomised(tiny(patch_positions=positions))

    def predict(image: torch.Tensor) -> torch.Tensor:
        return run(model, collate([Document([Image(image)])], grammar))[0].predictions[0]

    image = latent(4, 8)
    flipped = predict(image.flip(2)).flip(2)
    assert predict(image).shape == (3, 4, 8)
    assert not torch.allclose(predict(image), flipped, atol=1e-4)
    assert not torch.allclose(predict(image), predict(image.transpose(1, 2)).transpose(1, 2), atol=1e-4)


def test_patches_round_trip(grammar: SequenceFormat) -> None:
    """Encoding with an identity and decoding with its inverse gives the latent back, whatever the sizes."""
    config = tiny(d_model=16, n_heads=1, patch_positions="none")
    model = Transfusion(config).initialise(0)
    patches = model.image_adapter
    with torch.no_grad():
        patches.in_proj.weight.zero_()
        patches.in_proj.weight[:12, :12] = torch.eye(12)
        patches.out_proj.weight.copy_(patches.in_proj.weight.T)
        patches.time.outer.weight.zero_()
    latents = [latent(4, 4, 1), latent(8, 2, 2), latent(4, 4, 3), latent(2, 6, 4)]
    vectors, state = patches.encode(latents, torch.zeros(4, dtype=torch.int64), torch.float32)
    assert len(vectors) == sum(x.shape[1] * x.shape[2] // 4 for x in latents)
    for found, expected in zip(patches.decode(vectors, latents, state), latents, strict=True):
        close(found, expected)
    # raster order: the second patch of the first image is its top row, next columns
    assert torch.equal(vectors[1, :12].view(3, 2, 2), latents[0][:, :2, 2:4])


@pytest.mark.parametrize(
    ("name", "millions"), [("0.16b", 162.4), ("0.37b", 373.9), ("0.76b", 777.9), ("1.4b", 1364.3), ("7b", 6738.4)]
)
def test_sizes_of_the_paper(name: str, millions: float) -> None:
    count = count_parameters(ModelConfig(**SIZES[name]))
    assert count.transformer / 1e6 == pytest.approx(millions, rel=0.005)
    assert count.adapter / count.transformer < 0.0055, "Table 7: at most 0.5 %"


@pytest.mark.parametrize(("channels", "patch"), [(8, 2), (3, 4), (16, 1)])
def test_a_timestep_before_the_linear_map_is_as_wide_as_a_patch(channels: int, patch: int) -> None:
    sizes = {"latent_channels": channels, "patch_size": patch, "patch_positions": "none"}
    before, after = (count_parameters(tiny(**sizes, timestep_at=at)) for at in ("patch", "hidden"))
    width, elements = 64, channels * patch**2

    def perceptron(outputs: int) -> int:
        return (256 + 1) * outputs + (outputs + 1) * outputs

    assert before.transformer == after.transformer
    assert before.adapter == 2 * elements * width + perceptron(elements)
    assert after.adapter == 2 * elements * width + perceptron(width)


def test_the_papers_presets_add_the_timestep_before_the_linear_map() -> None:
    for name in SIZES:
        assert preset(name).model.timestep_at == "patch"
        assert preset(f"{name}-unet").model.timestep_at == "hidden"
    with pytest.raises(ValueError, match=r'model\.timestep_at: expected hidden with adapter "unet", found patch'):
        tiny(adapter="unet", timestep_at="patch")


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
def test_unet_is_about_a_quarter_billion(patch: int) -> None:
    from transfuse.model.config import UNET_CHANNELS

    config = ModelConfig(**SIZES["0.76b"], adapter="unet", patch_size=patch, unet_channels=UNET_CHANNELS[patch])
    assert count_parameters(config).adapter / 1e9 == pytest.approx(0.27, rel=0.07)


@pytest.mark.parametrize("patch", [1, 2, 4, 8])
@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_every_patch_size(adapter: str, patch: int) -> None:
    config = tiny(adapter=adapter, patch_size=patch, unet_channels=(16, 16, 32, 32)[: patch.bit_length()])
    model = randomised(config)
    batch = collate([Document([Image(latent(8, 16)), Image(latent(8, 8))])], SequenceFormat(0, 1, 2, 3, patch))
    output, gradients = run(model, batch)
    assert [tuple(p.shape) for p in output.predictions] == [(3, 8, 16), (3, 8, 8)]
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "embedding" not in name)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["none", "learned"])
def test_a_silent_unet_is_linear_patch_layers(positions: str) -> None:
    """Beside the U-Net what the trunk says has a way of its own, or captions are never heard; and learned positions
    are not for linear layers alone, or left is never told from right (docs/LOG.md)."""
    linear, unet = (
        randomised(tiny(adapter=name, patch_positions=positions)).image_adapter for name in ("linear", "unet")
    )
    for part in (unet.in_proj, unet.last):
        part.weight.zero_()
        part.bias.zero_()
    linear.in_proj.load_state_dict(unet.skip_in.state_dict())
    linear.out_proj.load_state_dict(unet.skip_out.state_dict())
    linear.time.outer.weight.zero_()
    linear.time.outer.bias.zero_()
    if positions == "learned":
        linear.positions.load_state_dict(unet.positions.state_dict())
    latents, timesteps = [latent(8, 8), latent(4, 6), latent(8, 8, seed=1)], torch.tensor([3, 500, 990])
    theirs, groups = linear.encode(latents, timesteps, torch.float32)
    ours, state = unet.encode(latents, timesteps, torch.float32)
    close(ours, theirs)
    for mine, other in zip(unet.decode(ours, latents, state), linear.decode(ours, latents, groups), strict=True):
        close(mine, other)


def test_initialisation_is_a_function_of_the_seed_and_starts_at_the_variance(grammar: SequenceFormat) -> None:
    config = tiny()
    first, again = Transfusion(config).initialise(3), Transfusion.on_meta(config).to_empty(device="cpu").initialise(3)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.lm_head.weight, Transfusion(config).initialise(4).lm_head.weight)
    batch = collate([Document([Image(latent(4, 4))])], grammar)
    output, _ = run(first, batch)
    assert output.predictions[0].abs().max() == 0
    assert float(first.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_rotary_depends_on_distance_only() -> None:
    q, k = torch.randn(1, 1, 16), torch.randn(1, 1, 16)

    def score(a: int, b: int) -> torch.Tensor:
        table = rotary_table(torch.tensor([a, b]), tiny(d_head=16), torch.float32)
        x = rotate(torch.cat([q, k]), table)
        return (x[0] * x[1]).sum()

    close(score(3, 1), score(103, 101))
    assert abs(float(score(3, 1) - score(4, 1))) > 1e-4


@pytest.mark.parametrize("changes", [{}, {"experts": "all", "image_d_ff": 96}], ids=str)
def test_flops_equal_torchs_own_count(changes, grammar: SequenceFormat) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny(**changes)
    model = randomised(config, compute_dtype=torch.bfloat16)
    batch = collate([Document([Text((9,) * 5), Image(latent(4, 4))])], grammar)
    attend = Grouped(batch, torch.bfloat16)  # one document: its explicit products multiply every pair
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            batch.input_ids,
            batch.position_ids,
            attend,
            batch.loss_positions,
            batch.patches,
            batch.latents,
            torch.tensor([5]),
        )
    pairs = batch.positions**2
    assert (
        forward_flops(config, batch.positions, pairs, len(batch.loss_positions), [(4, 4)]) == counter.get_total_flops()
    )
    assert adapter_flops(config, 4, 4) > 0


@pytest.mark.parametrize(
    "variant", [{}, {"adapter": "unet"}, {"image_attention": "causal"}, {"n_kv_heads": 2}], ids=str
)
def test_operations_are_the_documents_own_however_a_step_is_split(variant, grammar: SequenceFormat, mixed) -> None:
    config = tiny(**variant)

    def count(*parts: list[Document], multiple: int = 1, idle: torch.Tensor | None = None) -> int:
        batches = [collate(part, grammar, config.image_attention, multiple, idle) for part in parts]
        return sum(train_flops(config, batch) for batch in batches)

    whole = count(mixed)
    assert whole == count(*([document] for document in mixed))
    for multiple, idle in ((64, None), (1000, latent(4, 4)), (128, latent(8, 2))):
        assert whole == count(mixed, multiple=multiple, idle=idle)
        assert whole == count(*([document] for document in mixed), multiple=multiple, idle=idle)
        assert whole == count(mixed[:3], mixed[3:5], mixed[5:], multiple=multiple, idle=idle)


def test_bad_sizes_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"model\.d_model: expected a multiple of 2 x n_heads \(8\), found 63"):
        tiny(d_model=63)
    with pytest.raises(ValueError, match=r"model\.patch_size: expected 1, 2, 4 or 8, found 3"):
        tiny(patch_size=3)
    with pytest.raises(ValueError, match=r"model\.unet_channels"):
        tiny(adapter="unet", patch_size=4)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_packed_weights_change_nothing(grammar: SequenceFormat, mixed, compute: torch.dtype) -> None:
    from transfuse.inference.optimize import PackedLinear, can_pack, pack

    model = randomised(tiny(), compute_dtype=compute).to(compute).eval().requires_grad_(False)
    batch = collate(mixed, grammar)
    times = torch.zeros(len(batch.latents), dtype=torch.int64)

    def outputs() -> list[torch.Tensor]:
        attend = Grouped(batch, compute)
        with torch.inference_mode():
            out = model(
                batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, times
            )
            nothing = model(
                batch.input_ids,
                batch.position_ids,
                attend,
                batch.loss_positions[:0],
                batch.patches,
                batch.latents,
                times,
            )
        assert nothing.logits.shape == (0, 320)
        return [out.logits.float(), *out.predictions]

    plain = outputs()
    pack(model)
    assert isinstance(model.lm_head, PackedLinear) == can_pack(compute)
    for a, b in zip(outputs(), plain, strict=True):
        close(a, b, 1e-5 if compute == torch.float32 else 0.05)
