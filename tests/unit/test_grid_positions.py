"""Two-dimensional rotary positions: the layout, its symmetries, and the same images however they are computed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import exported, latent, randomised, tiny
from hypothesis import given
from hypothesis import strategies as st

from transfuse.diffusion import Sampler, SamplerConfig
from transfuse.inference import Engine, ImageEnd, Request
from transfuse.inference.model_runner import ModelRunner
from transfuse.model import Grouped, RopeScaling, Transfusion, dense
from transfuse.model.layers import rotary_table
from transfuse.rng import generator_for
from transfuse.sequence import (
    Batch,
    Document,
    Image,
    SequenceFormat,
    Text,
    Tokenizer,
    collate,
    images_alone,
    layout_document,
    unconditional,
)

FORMAT = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2, positions="2d")
RASTER = replace(FORMAT, positions="raster")
SIDES = st.integers(1, 40)
SAMPLER = SamplerConfig("ddim", 3)


def run(model: Transfusion, batch: Batch, attend=dense, level: int = 100) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of all positions, and predictions; image number i is at timestep i * level."""
    times = torch.arange(len(batch.latents)) * level
    every = torch.arange(batch.positions)
    images = (batch.patches, batch.latents, times) if len(batch.latents) else ()
    output = model(batch.input_ids, batch.position_ids, attend(batch), every, *images)
    return output.logits, list(output.predictions)


def test_the_example_of_the_layout() -> None:
    document = Document([Text((7, 8)), Image(latent(4, 4)), Text((9,))])
    positions = layout_document(document, FORMAT).position_ids
    tokens = [0, 1, 2, 3, None, None, None, None, 8, 9, 10]
    for found, expected in zip(positions.tolist(), tokens, strict=True):
        assert expected is None or found == [expected] * 3
    assert positions[4:8].tolist() == [[4, 4.5, 4.5], [4, 4.5, 6.5], [4, 6.5, 4.5], [4, 6.5, 6.5]]


@given(rows=SIDES, columns=SIDES, first=st.integers(0, 3000))
def test_patches_lie_between_boi_and_eoi_and_transpose(rows: int, columns: int, first: int) -> None:
    positions = FORMAT.patch_positions(first, rows, columns)
    span = FORMAT.span(rows, columns)
    assert positions.shape == (rows * columns, 3)
    assert 1 <= span <= min(rows * columns, 16)
    assert (positions[:, 0] == first).all()
    assert first - 0.5 <= positions.min()
    assert positions.max() <= first + span - 0.5
    grid = positions.reshape(rows, columns, 3)
    transposed = FORMAT.patch_positions(first, columns, rows).reshape(columns, rows, 3)
    np.testing.assert_array_equal(grid.swapaxes(0, 1), transposed[..., [0, 2, 1]])


@given(rows=st.integers(4, 20), columns=st.integers(4, 20), times=st.integers(2, 3))
def test_a_finer_grid_covers_the_same_area(rows: int, columns: int, times: int) -> None:
    """The mean position of the patches that a coarse patch is divided into is the coarse patch's own."""
    coarse = FORMAT.patch_positions(5, rows, columns).reshape(rows, columns, 3)
    fine = FORMAT.patch_positions(5, times * rows, times * columns)
    blocks = fine.reshape(rows, times, columns, times, 3).mean((1, 3))
    np.testing.assert_allclose(blocks, coarse, atol=1e-5)


@pytest.mark.parametrize("patches", [1, 2, 5, 16])
def test_one_row_has_the_raster_order_as_its_columns(patches: int) -> None:
    """Up to sixteen patches: columns, and the text after the image, are where the raster order has them."""
    document = Document([Text((7,)), Image(latent(2, 2 * patches)), Text((8, 9))])
    grid, raster = (layout_document(document, fmt).position_ids for fmt in (FORMAT, RASTER))
    np.testing.assert_array_equal(grid[:, 2], raster)
    assert len(set(grid[3 : 3 + patches, 1].tolist())) == 1
    assert (patches == 1) == bool((grid == raster[:, None]).all())


def test_the_text_after_an_image_does_not_depend_on_its_resolution() -> None:
    for rows, columns in ((8, 8), (8, 12), (32, 32)):
        positions = layout_document(Document([Image(latent(rows, columns)), Text((7,))]), FORMAT).position_ids
        assert positions[-2:].tolist() == [[19] * 3, [20] * 3]
    assert RASTER.span(4, 6) == 24


SCALINGS = [
    RopeScaling(),
    RopeScaling("yarn", factor=4.0, original_max_seq_len=64),
    RopeScaling("llama3", factor=8.0, original_max_seq_len=64),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.type)
def test_frequencies_turn_by_sequence_row_and_column_in_rotation(scaling: RopeScaling) -> None:
    config = tiny(positions="2d", d_head=16, rope_scaling=scaling)
    positions = torch.from_numpy(FORMAT.patch_positions(4, 5, 7))
    found = rotary_table(positions, config, torch.float32)
    of_axes = [rotary_table(positions[:, axis], config, torch.float32) for axis in range(3)]
    for channel in range(16):
        axis = channel % 8 % 3
        for part in range(2):
            assert torch.equal(found[part][..., channel], of_axes[axis][part][..., channel])
    # Transposing the image is the same as swapping the frequencies of rows and columns.
    transposed = torch.from_numpy(FORMAT.patch_positions(4, 7, 5)).view(7, 5, 3).transpose(0, 1).reshape(35, 3)
    swapped = rotary_table(positions[:, [0, 2, 1]], config, torch.float32)
    assert torch.equal(rotary_table(transposed, config, torch.float32)[0], swapped[0])


@pytest.mark.long  # the import alone takes longer than all other tests here
def test_sixteen_by_sixteen_patches_are_rotated_as_in_qwen3_vl() -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    from transformers import Qwen3VLTextConfig

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    theirs = modeling.Qwen3VLTextRotaryEmbedding(
        Qwen3VLTextConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=rope)
    )
    side = torch.arange(16)
    grid = torch.stack([torch.zeros(16, 16, dtype=torch.int64), *torch.meshgrid(side, side, indexing="ij")]).flatten(1)
    cosine, sine = theirs(torch.zeros(1), 9 + grid[:, None])
    positions = torch.from_numpy(FORMAT.patch_positions(9, 16, 16))
    ours = rotary_table(positions, tiny(positions="2d", d_head=32), torch.float32)
    torch.testing.assert_close(ours[0][:, 0], cosine[0])
    torch.testing.assert_close(ours[1][:, 0, 16:], sine[0, :, 16:])


def test_text_is_what_it_is_in_raster_order(tokenizer: Tokenizer) -> None:
    """Bit for bit, alone and before the first image; after an image the positions differ, and so do the logits."""
    grid, raster = (randomised(tiny(positions=positions)) for positions in ("2d", "raster"))
    text = Document([Text(tuple(range(10, 60)))])
    before = Document([Text(tuple(range(10, 30))), Image(latent(12, 8)), Text((30, 31))])
    for document, exact in ((text, 52), (before, 22)):
        a, b = (run(m, collate([document], m.config.sequence_format(tokenizer)))[0] for m in (grid, raster))
        assert torch.equal(a[:exact], b[:exact])
        assert exact == 52 or not torch.allclose(a[exact:], b[exact:], atol=1e-3)


VARIANTS = [
    {},
    {"adapter": "unet"},
    {"image_attention": "causal", "n_kv_heads": 2},
    {"nope_layers": (1,), "patch_positions": "none", "qk_norm": True, "qk_norm_type": "rms"},
    {"experts": "all", "timestep": "adaln"},
    {"rope_scaling": RopeScaling("yarn", factor=4.0, original_max_seq_len=64), "timestep_at": "patch"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_is_unpacked(tokenizer: Tokenizer, mixed: list[Document], variant: dict) -> None:
    model = randomised(tiny(positions="2d", **variant))
    fmt = model.config.sequence_format(tokenizer)
    documents = [*mixed, Document([Text((9,)), Image(latent(12, 8)), Text((8, 7))], sample=9)]
    together = collate(documents, fmt, model.config.image_attention, multiple=64)
    for attend in (dense, lambda batch: Grouped(batch, torch.float32)):
        logits, predictions = run(model, together, attend)
        begin = image = 0
        for document in documents:
            batch = collate([document], fmt, model.config.image_attention)
            count, end = len(batch.latents), begin + batch.positions
            times = (image + torch.arange(count)) * 100
            every = torch.arange(batch.positions)
            images = (batch.patches, batch.latents, times) if count else ()
            alone = model(batch.input_ids, batch.position_ids, dense(batch), every, *images)
            torch.testing.assert_close(logits[begin:end], alone.logits, atol=1e-5, rtol=1e-5)
            for found, expected in zip(predictions[image : image + count], alone.predictions, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            begin, image = end, image + count


def oracle(engine: Engine, request: Request, number: int, seen: Document, shape: tuple[int, int, int]) -> torch.Tensor:
    """Draw by whole passes without a cache; guided by the image branch too, if the request is."""
    model, process = engine.exported.model, engine.exported.process
    sampler = Sampler(process, request.sampler)
    state = sampler.prepare(shape, generator_for(request.seed, "image", number))

    def predict(document: Document) -> torch.Tensor:
        batch = collate([document], engine.grammar, model.config.image_attention)
        times = torch.zeros(len(batch.latents), dtype=torch.int64)
        times[-1] = state.t
        inputs = batch.input_ids, batch.position_ids, dense(batch), batch.loss_positions
        return model(*inputs, batch.patches, batch.latents, times).predictions[-1]

    while not state.done:
        whole = replace(seen, parts=[*seen.parts, Image(state.x)])
        given, null = predict(whole), predict(unconditional(whole))
        if request.image_guidance_scale is None or not seen.images:
            guided = null + request.guidance_scale * (given - null)
        else:
            alone = predict(images_alone(whole))
            guided = null + request.image_guidance_scale * (alone - null) + request.guidance_scale * (given - alone)
        state = sampler.step(state, guided)
    return sampler.finish(state)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_engine_draws_what_whole_passes_draw(tokenizer: Tokenizer, variant: dict) -> None:
    """Requests of different sizes and guidance in one batch; the second image of each sees the first."""
    engine = Engine(exported(tokenizer, positions="2d", **variant))
    prompt = Document([Text((10, 11)), Image(latent(4, 12), target=False), Text((12,))], closed=False)
    base = Request(prompt, draw="force", max_tokens=0, max_images=1, size=(12, 8), sampler=SAMPLER, seed=5)
    requests = [
        replace(base, guidance_scale=2.0),
        replace(base, size=(8, 8), guidance_scale=2.0, image_guidance_scale=1.5, seed=6),
        replace(base, document=Document([Text((20,))], closed=False), size=(2, 2), guidance_scale=3.0, seed=7),
        replace(base, size=(16, 12), guidance_scale=0.5, seed=8),
    ]
    found = {event.request_id: event.latent for event in engine.run(requests) if isinstance(event, ImageEnd)}
    for number, request in enumerate(requests):
        expected = oracle(engine, request, 0, request.document, (3, *request.size))
        torch.testing.assert_close(found[number], expected, atol=2e-4, rtol=1e-3)


def test_what_follows_an_image_in_the_cache_is_what_a_prompt_has(tokenizer: Tokenizer) -> None:
    """The logits after a drawn image, committed and continued token by token, are those of one uncached pass."""
    made = exported(tokenizer, positions="2d")
    runner = ModelRunner(made)
    before, drawn, after = (10, 11, 12), latent(12, 8, 3), (30, 31, 32)
    whole = Document([Text(before), Image(drawn, target=False), Text(after)], closed=False)
    expected, _ = run(made.model, collate([whole], runner.grammar), level=0)
    cache = runner.cache(1, 64)
    prompt = layout_document(Document([Text(before)], closed=False), runner.grammar)
    boi = len(prompt)
    runner.forward(cache, [runner.read(prompt, 0)], [])
    begun = layout_document(Document([Text((*before, runner.grammar.boi))], closed=False), runner.grammar)
    runner.forward(cache, [runner.read(begun, 0, known=boi)], [])
    committed = runner.commit(drawn, 0, boi + 1, begun.next_position)
    logits, _ = runner.forward(cache, [committed], [committed.segment.count - 1])
    torch.testing.assert_close(logits[0], expected[boi + 25], atol=1e-4, rtol=1e-4)
    for count in range(1, len(after) + 1):
        parts = [Text(before), Image(drawn, target=False), Text(after[:count])]
        read = layout_document(Document(parts, closed=False), runner.grammar)
        logits, _ = runner.forward(cache, [runner.read(read, 0, known=len(read) - 1)], [0])
        torch.testing.assert_close(logits[0], expected[len(read) - 1], atol=1e-4, rtol=1e-4)
