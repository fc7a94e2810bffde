"""What holds on the CPU holds on CUDA, up to rounding. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomised, tiny
from torch import Tensor

import transfuse
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.inference import score
from transfuse.model import dense, flexible
from transfuse.recipes import Recipe
from transfuse.recipes.small import tiny as tiny_recipe
from transfuse.sequence import Document, Image, SequenceFormat, Text, collate
from transfuse.train import train
from transfuse.training import ObjectiveConfig, TransfusionObjective

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True)
def _whole_products() -> Iterator[None]:
    """Float32 means float32: no products of ten bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, of the larger one's largest value."""
    return float((ours.cpu().double() - theirs.cpu().double()).abs().max() / theirs.abs().max().cpu())


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flex_attention_is_the_oracle(
    mixed: list[Document], grammar: SequenceFormat, dtype: torch.dtype, near: float, kv_heads: int
) -> None:
    """Output and gradients, of documents of every shape, in a run longer than a block of the mask."""
    batch = collate(mixed * 4, grammar).to(DEVICE)
    found = []
    for attend in (flexible(batch), dense(batch)):
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(batch.positions, heads, 32, generator=generator) for heads in (4, kv_heads, kv_heads))
        q, k, v = (x.to(DEVICE, dtype).requires_grad_() for x in drawn)
        out = attend(0, q, k, v)
        out.square().sum().backward()
        assert q.grad is not None
        assert k.grad is not None
        assert v.grad is not None
        found.append((out.detach(), q.grad, k.grad, v.grad))
    for ours, oracle in zip(*found, strict=True):
        assert apart(ours, oracle) < near


@pytest.mark.parametrize("adapter", ["linear", "unet"])
def test_losses_and_gradients_are_those_of_the_cpu(
    mixed: list[Document], grammar: SequenceFormat, adapter: str
) -> None:
    losses, gradients = [], []
    for device in ("cpu", DEVICE):
        model = randomised(tiny(adapter=adapter)).to(device)
        objective = TransfusionObjective(ObjectiveConfig(), Process(DiffusionConfig()), seed=0)
        sums = objective.loss(model, collate(mixed, grammar).to(device)).losses
        sums.sum().backward()
        losses.append(sums.detach())
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert apart(losses[1], losses[0]) < 1e-4
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert apart(gradients[1][name], gradient) < 1e-3, name


@pytest.mark.parametrize("ways", [{}, {"compile": True}, {"graphs": False}, {"compile": True, "graphs": False}])
def test_the_same_words_and_pictures(served: Path, ways: dict[str, bool]) -> None:
    prompts = ["a crab", "two mice on green"]
    words, pictures = [], []
    for device in ("cpu", DEVICE):
        pipe = transfuse.load(str(served), device=device, **(ways if device == DEVICE else {}))
        pictures.append(np.stack(pipe(prompts, generator=1, output_type="np").images).astype(int))
        asked = [replace(pipe.request([prompt]), draw="never", max_tokens=6) for prompt in prompts]
        words.append([reply.text for reply in pipe.replies(asked)])
        caption = pipe.caption(pipe("a crab", generator=2).images[0])
        assert isinstance(caption[0], str)
    assert words[0] == words[1]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2


def test_text_behind_an_image_is_as_likely_there(served: Path) -> None:
    scores = []
    for device in ("cpu", DEVICE):
        pipe = transfuse.load(str(served), device=device, precision="float32")
        image = pipe.part(np.zeros((16, 16, 3), dtype=np.uint8))
        assert isinstance(image, Image)
        scores.append(score(pipe.exported, [Document([image, Text(pipe.exported.tokenizer.encode("a crab"))])])[0].nll)
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3)


def latents() -> Recipe:
    """Pictures that are encoded on the device, steps from other processes."""
    base = tiny_recipe()
    return replace(
        base,
        model=replace(base.model, patch_size=4),
        diffusion=replace(base.diffusion, clip_x0=None),
        data=replace(base.data, autoencoder="kl-f4-small", workers=2),
    )


@pytest.mark.parametrize("make", [tiny_recipe, latents])
def test_a_run_trains_stops_goes_on_and_is_loaded(tmp_path: Path, make: Callable[[], Recipe]) -> None:
    """In bfloat16, with compiled blocks; what it exports draws on the device and on the CPU."""
    base = make()
    loop = replace(base.loop, steps=6, checkpoint_every=2, log_every=1, session_seconds=1e-9)
    recipe = replace(base, device=DEVICE, loop=loop, parallel=replace(base.parallel, compile=True))
    outcomes = [train(recipe, tmp_path).outcome]
    recipe = replace(recipe, loop=replace(loop, session_seconds=None))
    result = train(recipe, tmp_path)
    assert [*outcomes, result.outcome] == ["stopped", "finished"]
    assert result.export is not None
    drawn = [
        np.asarray(transfuse.load(str(result.export), device=device)("a crab", generator=0).images[0]).astype(int)
        for device in ("cpu", DEVICE)
    ]
    assert np.abs(drawn[0] - drawn[1]).max() <= 2
