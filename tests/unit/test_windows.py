"""Sliding windows and tied embeddings: what a position sees, by brute force, and one matrix through a whole run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Make, latent, open_tiny, randomised, tiny
from safetensors.torch import load_file

from transfuse.export import load_export
from transfuse.model import ModelConfig, Transfusion, dense, for_batch
from transfuse.model.attention import Grouped, block_mask, starts_of
from transfuse.model.costs import count_parameters, train_flops
from transfuse.recipes import preset
from transfuse.sequence import Batch, Document, Image, SequenceFormat, Text, collate
from transfuse.train import build_trainer, export_run
from transfuse.training.checkpoint import read

FORMAT = SequenceFormat(0, 1, 2, 3, 2)
DOCUMENTS = [
    Document(
        [Text(tuple(range(10, 17))), Image(latent(4, 6, 1)), Text((20, 21, 22)), Image(latent(2, 2, 2))], sample=1
    ),
    Document([Image(latent(8, 4, 3)), Image(latent(4, 4, 4)), Text((30,) * 19)], sample=2),
    Document([Text((40,) * 30)], sample=3),
    Document([], sample=4),
]
WINDOWS = [1, 2, 5, 16, 64]


def seen(batch: Batch, attention: str, window: int | None) -> torch.Tensor:
    """`[query, key]`, as the rule is written: same document, and earlier within the window, or in the same image."""
    owners = list(itertools.chain(*([number] * length for number, length in enumerate(batch.documents))))
    image, count = [-1] * batch.positions, 0
    for start, end in itertools.pairwise([*batch.patches.tolist(), -1]):
        image[start] = count
        count += end != start + 1
    mask = torch.zeros(batch.positions, batch.positions, dtype=torch.bool)
    for query, key in itertools.product(range(batch.positions), repeat=2):
        together = attention == "bidirectional" and image[query] >= 0 and image[query] == image[key]
        near = key <= query and (window is None or query - key < window)
        mask[query, key] = owners[query] == owners[key] and (near or together)
    return mask


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_backend_sees_what_the_rule_says(window: int, attention: str) -> None:
    config = tiny(sliding_window=window, full_attention_layers=(1,), image_attention=attention, n_kv_heads=2)
    batch = collate(DOCUMENTS, FORMAT, config.image_attention, multiple=16)
    masks = {0: seen(batch, attention, window), 1: seen(batch, attention, None)}
    starts = starts_of(batch, config)
    blocks = [block_mask(start, batch.kv_end) for start in starts]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch.positions, heads, 16, generator=generator) for heads in (4, 2, 2))
    for layer, mask in masks.items():
        index = torch.arange(batch.positions)
        of_blocks = blocks[1 - layer].mask_mod(0, 0, index[:, None], index)
        assert torch.equal(of_blocks, mask)
        wide = [x.repeat_interleave(2, 1) for x in (k, v)]
        scores = torch.einsum("qhd,khd->hqk", q, wide[0]) / 4
        shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        expected = torch.einsum("hqk,khd->qhd", shares, wide[1]).flatten(1)
        for attend in (dense(batch, config), for_batch(batch, torch.float32, config)):
            torch.testing.assert_close(attend(layer, q, k, v), expected, atol=1e-5, rtol=1e-5)
        half = [x.bfloat16() for x in (q, k, v)]
        explicit = Grouped(batch, torch.bfloat16, config)(layer, *half)
        torch.testing.assert_close(explicit.float(), expected, atol=0.05, rtol=0.05)


def test_a_window_as_long_as_the_context_changes_no_bit() -> None:
    batch = collate(DOCUMENTS, FORMAT)
    every, outputs = torch.arange(batch.positions), []
    for window in (None, 256):
        model = randomised(tiny(sliding_window=window))
        attend = for_batch(batch, torch.float32, model.config)
        times = torch.zeros(len(batch.latents), dtype=torch.int64)
        inputs = batch.input_ids, batch.position_ids, attend, every, batch.patches, batch.latents, times
        outputs.append(model(*inputs).logits)
    assert torch.equal(*outputs)


def test_hidden_pairs_cost_nothing_in_the_count() -> None:
    batch = collate(DOCUMENTS, FORMAT)
    whole, windowed, half = (
        train_flops(tiny(**changes), batch)
        for changes in ({}, {"sliding_window": 4}, {"sliding_window": 4, "full_attention_layers": (0,)})
    )
    fewer = int(seen(batch, "bidirectional", None).sum() - seen(batch, "bidirectional", 4).sum())
    assert whole - windowed == 3 * 2 * 4 * 64 * fewer
    assert abs((whole - half) * 2 - (whole - windowed)) <= 3 * 2 * 4 * 64 * 2


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sliding_window": 0}, "sliding_window: expected a positive number, found 0"),
        ({"full_attention_layers": (0,)}, "full_attention_layers: expected none without a sliding_window"),
        ({"sliding_window": 4, "full_attention_layers": (2,)}, r"full_attention_layers: expected layers of 0\.\.1"),
    ],
)
def test_windows_that_no_network_has(changes: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny(**changes)


def test_tied_embeddings_are_one_matrix_with_the_gradient_of_both(make: Make) -> None:
    config = tiny(tie_embeddings=True)
    assert count_parameters(tiny()).total - count_parameters(config).total == 320 * 64
    tied, apart = randomised(config), Transfusion(tiny())
    apart.load_state_dict(tied.state_dict(), strict=False)
    with torch.no_grad():
        apart.lm_head.weight.copy_(tied.embedding.weight)
    batch = collate(DOCUMENTS, FORMAT)
    for model in (tied, apart):
        attend, times = dense(batch), torch.zeros(len(batch.latents), dtype=torch.int64)
        inputs = batch.input_ids, batch.position_ids, attend, batch.loss_positions, batch.patches, batch.latents, times
        logits = model(*inputs).logits
        torch.nn.functional.cross_entropy(logits, batch.targets).backward()
    both = apart.embedding.weight.grad + apart.lm_head.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, atol=1e-6, rtol=1e-4)
    assert [name for name, _ in tied.named_parameters() if "lm_head" in name] == []


def test_tied_embeddings_stay_tied_through_a_run(tmp_path: Path) -> None:
    base = preset("tiny")
    recipe = replace(
        base,
        model=replace(base.model, tie_embeddings=True, sliding_window=8),
        loop=replace(base.loop, steps=2, sample_every=0, checkpoint_every=1),
        device="cpu",
    )
    run = open_tiny(recipe, tmp_path)
    trainer = build_trainer(run, tmp_path)
    before = trainer.model.embedding.weight.detach().clone()
    assert trainer.run() == "finished"
    assert not torch.equal(trainer.model.embedding.weight, before)
    newest, _ = trainer.checkpoints.newest()
    assert newest is not None
    assert not [name for group in read(newest).tensors.values() for name in group if "lm_head" in name]
    folder = export_run(run, trainer, tmp_path / "export")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_export(folder).model
    assert isinstance(model.config, ModelConfig)
    assert model.lm_head.weight is model.embedding.weight
    assert torch.equal(model.embedding.weight, trainer.averaged()["embedding.weight"])
    again = build_trainer(open_tiny(recipe, tmp_path), tmp_path)
    assert again.restore()
    assert again.model.lm_head.weight is again.model.embedding.weight
    assert torch.equal(again.model.embedding.weight, trainer.model.embedding.weight)
