"""Compiled blocks: the same results, and nothing compiled twice whatever comes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import transfuse
from transfuse.export import load_export
from transfuse.inference import TransfusionPipeline
from transfuse.inference.optimize import compile_blocks


@pytest.fixture(autouse=True)
def _nothing_kept():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def drawn(pipe: TransfusionPipeline, prompts: list[str]) -> np.ndarray:
    return np.stack(pipe(prompts, num_inference_steps=3, generator=1, output_type="np").images).astype(int)


def written(pipe: TransfusionPipeline, prompts: list[str]) -> list[str]:
    asked = [replace(pipe.request([prompt]), draw="never", max_tokens=6) for prompt in prompts]
    return [reply.text for reply in pipe.replies(asked)]


def test_the_same_words_and_pictures(served: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    plain, fast = transfuse.load(str(served)), TransfusionPipeline(load_export(served))
    compile_blocks(fast.exported.model, counter)
    prompts = ["a crab", "two mice on green"]
    assert np.abs(drawn(plain, prompts) - drawn(fast, prompts)).max() <= 1
    assert written(plain, prompts) == written(fast, prompts)
    assert counter.frame_count


def test_few_graphs_serve_any_batch_and_depth(served: Path) -> None:
    pipe, counter = TransfusionPipeline(load_export(served)), CompileCounter()
    assert len(pipe.exported.model.transformer.blocks) > 1
    compile_blocks(pipe.exported.model, counter)
    pipe.warm_up()
    written(pipe, ["a crab"])
    warm = counter.frame_count
    assert warm <= 4, "two pieces, for one position and for several"
    for prompts in (["a crab"], ["a", "b c d"], ["two mice on green"] * 5):
        drawn(pipe, prompts)
        written(pipe, prompts)
    assert counter.frame_count == warm
