"""The parts of parallelism that one process can test; the rest is in tests/distributed."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import randomised, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from transfuse.errors import UserError
from transfuse.model import ModelConfig, Transfusion
from transfuse.model.layers import Linear
from transfuse.training import Distributed, ParallelConfig, parallelize
from transfuse.training.distributed import restacked, stack, stacked_name
from transfuse.training.optimizer import clip_gradients
from transfuse.training.parallel import Parts, check_tensor_parallel


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicate": 0}, "parallel.replicate: expected at least 1, found 0"),
        ({"tensor": -1}, "parallel.tensor: expected at least 1, found -1"),
        ({"tensor": 2, "float8": True}, "parallel.float8: expected False with parallel.tensor 2, found True"),
    ],
)
def test_settings_that_can_not_be(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, r"parallel.tensor: expected a divisor of model.n_heads \(4\), found 3"),
        ({"d_ff": 130}, 4, r"expected a divisor of the hidden channels \(130\), found 4"),
        ({"n_kv_heads": 2}, 2, "parallel.tensor: expected 1 with model.n_kv_heads, found 2"),
        ({"qk_norm": True}, 2, "parallel.tensor: expected 1 with model.qk_norm, found 2"),
        ({"dropout": 0.1}, 2, "parallel.tensor: expected 1 with model.dropout, found 2"),
    ],
)
def test_networks_that_can_not_be_cut(changes, ranks: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tensor_parallel(tiny(**changes), ranks)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_stacked_matrices_are_found_again(parts: int, rows: int, columns: int) -> None:
    whole = torch.arange(parts * rows * columns).view(parts * rows, columns)
    names = [f"ema/blocks.0.qkv.parts.{number}.weight" for number in range(parts)]
    cut = [restacked(name, torch.empty(rows, columns), [whole]) for name in names]
    assert {stacked_name(name) for name in names} == {"ema/blocks.0.qkv.weight"}
    assert torch.equal(restacked("ema/blocks.0.qkv.weight", torch.empty(parts * rows, columns), cut), whole)
    assert torch.equal(stack(zip(names, cut, strict=True))["ema/blocks.0.qkv.weight"], whole)


def test_parts_are_the_stacked_matrix() -> None:
    linear = Linear(8, 12)
    parts = Parts(linear, 3).to_empty(device="cpu")
    with torch.no_grad():
        for number, part in enumerate(parts.parts):
            part.weight.copy_(linear.weight[4 * number : 4 * number + 4])
    x = torch.randn(5, 8)
    torch.testing.assert_close(parts(x), linear(x))


@pytest.mark.parametrize("largest", [0.01, 1e6])
def test_clipping_is_torchs(largest: float) -> None:
    model, other = nn.Linear(7, 5), nn.Linear(7, 5)
    for own, expected_layer in zip(model.parameters(), other.parameters(), strict=True):
        own.grad = torch.randn_like(own)
        expected_layer.grad = own.grad.clone()
    expected = nn.utils.clip_grad_norm_(model.parameters(), largest)
    assert clip_gradients(list(other.parameters()), largest, Distributed()) == expected
    for own, expected_layer in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(own.grad, expected_layer.grad)


def test_float8_is_an_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r'parallel\.float8: expected torchao, found none; pip install "torchao<'):
        parallelize(Transfusion.on_meta(tiny()), Distributed(), ParallelConfig(float8=True))


def test_float8_rounds_products_and_little_else() -> None:
    """Emulated on CPU: near, and not the same."""
    pytest.importorskip("torchao")
    config = ModelConfig(text_vocab_size=320, d_model=64, n_layers=2, n_heads=4, images="none")
    plain = randomised(config, compute_dtype=torch.bfloat16)
    rounded = parallelize(randomised(config, compute_dtype=torch.bfloat16), Distributed(), ParallelConfig(float8=True))
    x, positions = torch.randn(16, 64, dtype=torch.bfloat16), torch.arange(16)
    outputs = [model.transformer(x, positions, lambda layer, q, k, v: v.flatten(1)) for model in (plain, rounded)]
    difference = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 1e-4 < difference < 0.1
