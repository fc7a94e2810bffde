"""Weights in eight bits: as near as eight bits allow, a quarter of the memory, refused before anything is read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import exported, saved

import transfuse
from transfuse.errors import UserError
from transfuse.inference import TransfusionPipeline
from transfuse.inference.optimize import PackedLinear
from transfuse.model.layers import Linear
from transfuse.sequence import Tokenizer


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("int4", "quantize: expected int8 or float8, found int4"),
        ("float8", "quantize: float8: expected CUDA with compute capability 8.9 or newer, found cpu"),
    ],
)
def test_refused_before_anything_is_read(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        transfuse.load(str(tmp_path / "no such folder"), quantize=kind)


def test_torchao_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match='expected torchao, found none; pip install "torchao<'):
        transfuse.load(str(tmp_path / "no such folder"), quantize="int8")


@pytest.fixture(scope="module", params=["shared", "all"])
def pipes(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TransfusionPipeline, TransfusionPipeline]:
    """A model whole and in eight bits: one tower for text and images, and one for each."""
    pytest.importorskip("torchao")
    folder = str(saved(exported(tokenizer, experts=request.param), tmp_path_factory.mktemp("model") / "export"))
    return transfuse.load(folder), transfuse.load(folder, quantize="int8")


def held(pipe: TransfusionPipeline) -> int:
    """Bytes of the weights of the blocks' linear maps, as they are kept."""
    total = 0
    for module in pipe.exported.model.transformer.blocks.modules():
        if isinstance(module, PackedLinear):
            total += module.packed.numel() * module.packed.element_size()
        elif isinstance(module, Linear):
            names, _ = module.weight.__tensor_flatten__()
            total += sum(part.numel() * part.element_size() for part in (getattr(module.weight, n) for n in names))
    return total


def test_the_blocks_alone_and_a_quarter_of_them(pipes: tuple[TransfusionPipeline, TransfusionPipeline]) -> None:
    whole, small = pipes
    assert isinstance(small.exported.model.lm_head, PackedLinear), "what keeps its bits is packed as ever"
    assert 0.24 < held(small) / held(whole) < 0.35, "a scale an output beside one byte a weight"


def test_as_near_as_eight_bits(pipes: tuple[TransfusionPipeline, TransfusionPipeline]) -> None:
    """One rounding of each weight to 1/254 of its row's largest: relative errors of a few thousandths a product."""
    drawn = [
        pipe("a crab", num_inference_steps=4, generator=3, guidance_scale=1.0, output_type="latent").images[0]
        for pipe in pipes
    ]
    distance = float((drawn[0] - drawn[1]).norm() / drawn[0].norm())
    assert 0 < distance < 0.05
    assert torch.isfinite(drawn[1]).all()
    assert pipes[1].generate("a crab", max_tokens=4).done.text_tokens <= 4
