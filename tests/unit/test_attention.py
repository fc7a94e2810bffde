"""FlexAttention, as far as a CPU can show it: the block mask, the compiled kernel, and that nothing compiles twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import Largest, latent, randomised, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from transfuse.model import Attend, Transfusion, attention, dense, flexible
from transfuse.model.attention import block_mask
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate
from transfuse.training.parallel import compile_block

GRAMMAR = SequenceFormat(bos=0, eos=1, boi=2, eoi=3, patch_size=2)
SIDES = st.sampled_from([2, 4, 8, 24])
PARTS = st.one_of(
    st.integers(1, 300).map(lambda length: Text((9,) * length)),
    st.builds(lambda rows, columns: Image(latent(rows, columns)), SIDES, SIDES),
)


Seen = tuple[Tensor, Tensor, Tensor | None]


@st.composite
def layouts(draw: st.DrawFn) -> Seen:
    """What positions of random documents see, with noised copies and without."""
    documents = draw(st.lists(st.lists(PARTS, max_size=4).map(Document), min_size=1, max_size=6))
    form = replace(GRAMMAR, clean_copy=draw(st.booleans()))
    batch = collate(documents, form, draw(st.sampled_from(["bidirectional", "causal"])))
    return batch.kv_start, batch.kv_end, batch.gaps


@st.composite
def intervals(draw: st.DrawFn) -> Seen:
    """Any intervals at all in which each position sees itself, and any gaps before it."""
    length, seed = draw(st.integers(1, 300)), draw(st.integers(0, 2**32))
    shares = torch.rand(2, length, generator=torch.Generator().manual_seed(seed))
    before, after = shares.pow(draw(st.sampled_from([0.1, 1.0, 8.0])))
    position = torch.arange(length)
    start, end = position - (before * position).round(), position + 1 + (after * (length - 1 - position)).round()
    start, end = start.long(), end.long()
    if not draw(st.booleans()):
        return start, end, None
    shares = torch.rand(2, length, generator=torch.Generator().manual_seed(seed + 1))
    first = start + (shares[0] * (position - start)).long()
    return start, end, torch.stack([first, first + (shares[1] * (position - first)).long()])


@settings(deadline=None, max_examples=90)
@given(st.one_of(layouts(), intervals()), st.sampled_from([1, 4, 16, 128]))
def test_the_block_mask_is_what_torch_makes_of_all_pairs(seen: Seen, block: int) -> None:
    """Every table to the last number, the order of columns included, for queries and for keys."""
    start, end, gaps = seen
    length = len(start)
    first, last = torch.zeros(2, length, dtype=torch.int64) if gaps is None else gaps
    with patch.object(attention, "BLOCK", block):
        found = block_mask(start, end, gaps)
    expected = flex_attention.create_block_mask(
        lambda b, h, query, key: (
            (start[query] <= key) & (key < end[query]) & ~((first[query] <= key) & (key < last[query]))
        ),
        None, None, length, length, device="cpu", BLOCK_SIZE=block,
    )  # fmt: skip
    assert found.shape == expected.shape
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices"):
        for name in (kind, f"full_{kind}"):
            a, b = getattr(found, name), getattr(expected, name)
            assert a.dtype == b.dtype
            assert torch.equal(a, b), name


def test_the_block_mask_looks_at_no_pairs() -> None:
    batch = collate([Document([Text((9,) * 5000), Image(latent(16, 16))])] * 4, GRAMMAR)
    with Largest() as mode:
        block_mask(batch.kv_start, batch.kv_end)
    blocks = -(-batch.positions // attention.BLOCK)
    assert mode.elements <= max(4 * blocks**2, blocks * attention.BLOCK)


def some_batches(count: int, positions: int, form: SequenceFormat = GRAMMAR) -> Iterator[Batch]:
    """Batches of equally many positions, 910 or more, but different layouts; a document of each is several blocks."""
    for seed in range(count):
        rng = random.Random(seed)

        def document(words: int, rng: random.Random = rng) -> Document:
            parts = [
                Text((9,) * words),
                Image(latent(2 * rng.randint(1, 5), 2 * rng.randint(1, 5), rng.randint(0, 99))),
            ]
            return Document(parts if rng.random() < 0.5 else parts[::-1], sample=words)

        documents = [document(rng.randint(1, 25)) for _ in range(8)]
        documents.insert(rng.randint(0, 8), document(rng.randint(400, 440)))
        batch = collate(documents, form, multiple=positions)
        assert batch.positions == positions
        yield batch


def random_heads(batch: Batch, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(batch.positions, n, 16, generator=torch.Generator().manual_seed(n)) for n in (heads, 9, 10))
    return q, k[:, :kv_heads], v[:, :kv_heads]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts what is compiled; the kernel is FlexAttention's arithmetic, without a C++ compiler's half minute."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    kernel = torch.compile(flex_attention.flex_attention, backend=counter)
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: kernel)
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kv_heads", "clean_copy"), [pytest.param(4, False, marks=pytest.mark.long), (2, False), (2, True)]
)
@torch.no_grad()
def test_the_kernel_is_compiled_once_for_a_number_of_positions(kv_heads: int, clean_copy: bool, counted) -> None:
    compiled, form = [], replace(GRAMMAR, clean_copy=clean_copy)
    for positions, count in ((1000, 6), (1300, 2), (1100, 2)):
        for batch in some_batches(count, positions, form):
            heads = random_heads(batch, 4, kv_heads)
            torch.testing.assert_close(flexible(batch)(0, *heads), dense(batch)(0, *heads), atol=1e-5, rtol=1e-5)
            compiled.append(counted.frame_count)
    assert compiled == [1] * 6 + [2] * 4, "once with sizes fixed, once with sizes open"


def outputs(model: Transfusion, batch: Batch, attend: Attend) -> list[Tensor]:
    """Logits, predictions and, where they are asked for, gradients."""
    times = torch.arange(len(batch.latents))
    model.zero_grad()
    out = model(batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, times)
    if torch.is_grad_enabled():
        (out.logits.logsumexp(-1).sum() + sum(p.square().sum() for p in out.predictions)).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.logits.detach(), *(p.detach() for p in out.predictions), *gradients]


@pytest.mark.long
@pytest.mark.parametrize(("kv_heads", "learning"), [(4, False), (2, False), (2, True)])
def test_blocks_are_compiled_once(kv_heads: int, learning: bool, counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a block in one graph, attention within it, though `attend` is another function for every batch.

    FlexAttention refuses gradients on CPU for want of a kernel; its plain arithmetic gives them, unless it is asked.
    """
    if learning:
        if not hasattr(flex_attention, "_validate_device"):
            pytest.skip("this PyTorch refuses gradients on CPU elsewhere")
        monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    config = tiny(n_kv_heads=kv_heads)
    plain, model = randomised(config), randomised(config)
    for block in model.transformer.blocks:
        compile_block(block, backend=counted, fullgraph=True)
    compiled = []
    for positions, count in ((1000, 6), (1300, 1), (1100, 1)):
        for batch in some_batches(count, positions):
            with torch.set_grad_enabled(learning):
                found, expected = outputs(model, batch, flexible(batch)), outputs(plain, batch, dense(batch))
            assert len(found) == len(expected)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5 * max(1.0, float(b.abs().max())), rtol=0)
            compiled.append(counted.frame_count)
    assert compiled == [1] * 6 + [2] * 2, "one graph for all blocks: nothing looks at the number of a layer"


def why_no_kernel() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if not torch.cpu._is_avx2_supported():
        return "FlexAttention's CPU kernel needs AVX2"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler"
    return None


@torch.no_grad()
def test_the_compiled_kernel_equals_dense() -> None:
    """As it is used, by Inductor: the CPU's kernel goes by the same tables of blocks as the one for CUDA."""
    if reason := why_no_kernel():
        pytest.skip(reason)
    torch._dynamo.reset()
    for batch in some_batches(4, 1001):
        mask = block_mask(batch.kv_start, batch.kv_end)
        assert int(mask.full_kv_num_blocks.sum()) > 0
        assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) < mask.kv_indices.numel()
        heads = random_heads(batch, 4, 2)
        torch.testing.assert_close(flexible(batch)(0, *heads), dense(batch)(0, *heads), atol=1e-5, rtol=1e-5)
