"""The plug-in for vLLM-Omni: against a stand-in for its registry and data classes, and in the real engine."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import transfuse
from transfuse.cli import run


@dataclass
class Sampling:
    """Fields of its `OmniDiffusionSamplingParams` that are read, with its defaults."""

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float = 1.0
    guidance_scale_provided: bool = False
    num_outputs_per_prompt: int = 1
    generator: torch.Generator | None = None
    seed: int | None = 0


@dataclass
class Output:
    output: Any = None
    error: str | None = None
    error_status_code: int | None = None


@dataclass
class Registry:
    """Its registry: the module and the name of each class, which is loaded when a model needs it."""

    known: dict[str, tuple[str, str]] = field(default_factory=dict)

    def register_diffusion_model(
        self,
        model_arch: str,
        module_name: str,
        class_name: str,
        pre_process_func_name: str | None = None,
        post_process_func_name: str | None = None,
    ) -> None:
        self.known[model_arch] = (module_name, class_name)

    def build(self, model: str, architecture: str) -> Any:
        """Build a model as its loader does: torch's default device, the dtype in its configuration, then weights."""
        module, name = self.known[architecture]
        config = SimpleNamespace(model=model, dtype=torch.float32)
        with torch.device("cpu"):
            made = getattr(importlib.import_module(module), name)(od_config=config)
        loaded = made.load_weights(iter(()))
        assert {key for key, _ in made.named_parameters()} <= loaded, "its strict check of what was loaded"
        if getattr(type(made), "dummy_run_num_frames", 1) > 0:  # its warm-up, which ends the engine if it fails
            sampling = Sampling(512, 512, 2, 0.0, True)
            assert not made(SimpleNamespace(prompts=[{"prompt": "dummy run"}], sampling_params=sampling)).error
        return made


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    models = Registry()
    for name in ("vllm_omni", "vllm_omni.diffusion", "vllm_omni.diffusion.registry", "vllm_omni.diffusion.data"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["vllm_omni.diffusion.registry"].register_diffusion_model = models.register_diffusion_model  # type: ignore[attr-defined]
    sys.modules["vllm_omni.diffusion.data"].DiffusionOutput = Output  # type: ignore[attr-defined]
    return models


def plug_in() -> Any:
    (plugin,) = [point for point in entry_points(group="vllm_omni.general_plugins") if point.name == "transfuse"]
    return plugin.load()


@pytest.fixture
def omni(registry: Registry, served: Path, tmp_path: Path) -> Any:
    """An export in diffusers' layout, found by the class named in its index, as vLLM-Omni finds it."""
    assert run(["export", str(served), "--format", "diffusers", "--out", str(tmp_path / "theirs")]) == 0
    register = plug_in()
    register()
    register()
    assert len(registry.known) == 1, "each process may call it more than once"
    return registry.build(str(tmp_path / "theirs"), "TransfusionPipeline")


def same(images: list[Any], others: list[Any]) -> bool:
    return len(images) == len(others) and all(
        (np.asarray(a) == np.asarray(b)).all() for a, b in zip(images, others, strict=True)
    )


@pytest.mark.slow
def test_its_engine_draws(served: Path, tmp_path: Path) -> None:
    """The real package starts with an export and draws the same image twice. It has no backend for CPUs."""
    pytest.importorskip("vllm_omni")
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    assert run(["export", str(served), "--format", "diffusers", "--out", str(tmp_path / "theirs")]) == 0
    engine = Omni(model=str(tmp_path / "theirs"))
    try:
        sampling = OmniDiffusionSamplingParams(seed=7, num_inference_steps=3)
        first, second = (engine.generate("a crab", sampling)[0].images for _ in range(2))
    finally:
        engine.close()
    assert first[0].size == (8, 8)
    assert same(first, second)


def test_without_it_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    assert plug_in()() is None


def test_draws_and_edits_what_the_pipeline_does(omni: Any, served: Path) -> None:
    pipe = transfuse.load(str(served))
    drawn = omni(SimpleNamespace(prompts=["a crab", {"prompt": "a moon"}], sampling_params=Sampling(seed=7)))
    assert same(drawn.output, [pipe(text, generator=7).images[0] for text in ("a crab", "a moon")])
    picture = PIL.Image.new("RGB", (8, 8), "red")
    edit = {"prompt": "make it blue", "multi_modal_data": {"image": picture}, "negative_prompt": None}
    sampling = Sampling(None, None, 3, 2.0, True, 2, None, 5)
    edited = omni(SimpleNamespace(prompts=[edit], sampling_params=sampling))
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": 5, "num_images_per_prompt": 2}
    assert same(edited.output, pipe("make it blue", image=picture, **settings).images)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ({"prompt": "a crab", "negative_prompt": [3]}, {}, "negative_prompt: expected text"),
        ({"prompt": "a crab", "multi_modal_data": {"image": [0, 1]}}, {}, "image: expected one to change, found 2"),
        ("a crab", {"height": 7, "width": 8}, "7"),
    ],
)
def test_mistakes_are_an_answer(omni: Any, prompt: Any, sampling: dict[str, Any], message: str) -> None:
    reply = omni(SimpleNamespace(prompts=[prompt], sampling_params=Sampling(**sampling)))
    assert (reply.output, reply.error_status_code) == (None, 400)
    assert message in reply.error
    assert "\n" not in reply.error
