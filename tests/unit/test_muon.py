"""Muon: torch's own arithmetic on plain matrices, stacked ones apart, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import randomised, tiny
from torch import nn

from transfuse.errors import UserError
from transfuse.recipes import preset
from transfuse.recipes.autoencoders import AutoencoderRecipe
from transfuse.training import OptimizerConfig, build_optimizer
from transfuse.training.optimizer import Muon, MuonConfig, block_matrices, orthogonalised

SETTINGS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "momentum": 0.8},
    {"ns_steps": 3, "adjust_lr_fn": "original"},
]


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def theirs(weights: list[torch.Tensor], settings: dict[str, Any]) -> torch.optim.Muon:
    settings = {"adjust_lr_fn": "match_rms_adamw", **settings}
    return torch.optim.Muon([nn.Parameter(w.clone()) for w in weights], lr=0.02, weight_decay=0.1, **settings)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("rows", [(24,), (16, 8, 8), (40, 40)], ids=str)
def test_steps_are_those_of_torch_on_the_matrices_of_a_stack(settings: dict[str, Any], rows: tuple[int, ...]) -> None:
    """Square, wide and tall; torch computes Newton-Schulz in bfloat16 everywhere."""
    start = [matrix(count, 16, number) for number, count in enumerate(rows)]
    expected = theirs(start, settings)
    weight, other = nn.Parameter(torch.cat(start)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.1}]
    ours = Muon(groups, torch.optim.AdamW([other], lr=0.02), {weight: rows}, MuonConfig(**settings), torch.bfloat16)
    assert [group["lr"] for group in ours.param_groups] == [0.02, 0.02]
    for step in range(4):
        gradients = [matrix(count, 16, 100 * step + number) for number, count in enumerate(rows)]
        for parameter, gradient in zip(expected.param_groups[0]["params"], gradients, strict=True):
            parameter.grad = gradient
        weight.grad = torch.cat(gradients)
        expected.step()
        ours.step()
    torch.testing.assert_close(
        weight.detach(), torch.cat(expected.param_groups[0]["params"]).detach(), atol=1e-6, rtol=1e-6
    )
    if len(rows) > 1:  # the stack as one matrix is another update
        stack = theirs([torch.cat(start)], settings)
        stack.param_groups[0]["params"][0].grad = torch.cat(gradients)
        stack.step()
        assert not torch.allclose(stack.param_groups[0]["params"][0], weight, atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(64, 24), (16, 64), (8, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_become_about_one(rows: int, columns: int, dtype: torch.dtype) -> None:
    matrices = torch.stack([matrix(rows, columns, 3) * 1e-3, torch.zeros(rows, columns), matrix(rows, columns, 4)])
    first, zero, other = orthogonalised(matrices, 5, dtype)
    for values in (torch.linalg.svdvals(each.float()) for each in (first, other)):
        assert values.min() > 0.5
        assert values.max() < 1.3
    assert (zero == 0).all()


def test_matrices_of_blocks_have_momentum_and_all_else_is_adamw() -> None:
    model, plain = (randomised(tiny(timestep="adaln", experts="all", n_kv_heads=2)) for _ in range(2))
    config = OptimizerConfig(1e-2, name="muon", weight_decay=0.3)
    muon, adamw = build_optimizer(model, config), build_optimizer(plain, OptimizerConfig(1e-2, weight_decay=0.3))
    matrices = block_matrices(model)
    towers = ["", "image."]
    kinds = ["qkv", "out", "feed_forward.gate_up", "feed_forward.down"]
    expected = {f"transformer.blocks.{n}.{t}{kind}.weight" for n in range(2) for t in towers for kind in kinds}
    assert set(matrices) == expected
    assert matrices["transformer.blocks.1.image.qkv.weight"] == (64, 32, 32)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
        theirs.grad = ours.grad.clone()
    muon.step()
    adamw.step()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name not in matrices), name
        kept = {"momentum_buffer"} if name in matrices else {"step", "exp_avg", "exp_avg_sq"}
        assert set(muon.state[ours]) == kept, name
    muon.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())


def test_settings_that_cannot_be_are_one_line() -> None:
    with pytest.raises(ValueError, match=r"^optimizer.muon.ns_steps: expected 1 to 99, found 0"):
        MuonConfig(ns_steps=0)
    with pytest.raises(ValueError, match=r"^optimizer.name: expected adamw or muon, found mion"):
        OptimizerConfig(name="mion")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^optimizer.name: expected adamw for a network without"):
        build_optimizer(nn.Linear(4, 4), OptimizerConfig(name="muon"))
    with pytest.raises(UserError, match=r"^optimizer.name: expected adamw for an autoencoder, found muon"):
        AutoencoderRecipe(optimizer=OptimizerConfig(name="muon"))
    assert preset("latents-32").optimizer.name == "adamw"
