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
from transfuse.serving.vllm_omni import cpu_platform


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
    strength: float | None = None


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
def test_its_engine_draws_and_writes(tmp_path: Path) -> None:
    """The real package, on a GPU or with a CPU build of vLLM: the bundled model draws, edits, describes and refuses."""
    pytest.importorskip("vllm_omni")
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if not (on_cpu or torch.cuda.is_available()):
        pytest.skip("neither a GPU nor a CPU build of vLLM")
    from vllm_omni.entrypoints.omni import Omni
    from vllm_omni.errors import OmniClientError
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    assert run(["export", "small-64", "--format", "diffusers", "--out", str(tmp_path / "theirs")]) == 0
    engine, mask = Omni(model=str(tmp_path / "theirs")), PIL.Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))

    def output(prompt: Any, **options: Any) -> Any:
        return engine.generate(prompt, OmniDiffusionSamplingParams(seed=7, num_inference_steps=5, **options))[0]

    try:
        star, again = (output("a star on a green background").images[0] for _ in range(2))
        edit = output({"prompt": "make the background red", "multi_modal_data": {"image": star}}).images[0]
        redraw = {"prompt": "a moon", "multi_modal_data": {"image": star, "mask_image": mask}}
        redrawn = output(redraw, strength=0.5).images
        several = output("a car", num_outputs_per_prompt=2).images
        told = output({"prompt": "", "modalities": ["text"], "multi_modal_data": {"image": star}})
        with pytest.raises(OmniClientError, match=r"^image: expected one, found 2$"):  # which ends an engine of `Omni`
            output({"prompt": "a car", "multi_modal_data": {"image": [star, star]}})
    finally:
        engine.close()
    assert star.size == (64, 64)
    assert same([star], [again])
    assert len(several) == 2
    assert told.final_output_type == "text"
    assert "star" in told.multimodal_output["text"]
    if on_cpu:  # the same numbers as without vLLM-Omni, in the engine's default dtype
        pipe = transfuse.load("small-64", dtype="bfloat16")
        settings: dict[str, Any] = {"generator": 7, "num_inference_steps": 5}
        assert same([star], pipe("a star on a green background", **settings).images)
        assert same([edit], [pipe.edit(star, "make the background red", **settings)])
        assert same(redrawn, pipe("a moon", image=star, mask_image=mask, strength=0.5, **settings).images)
        assert told.multimodal_output["text"] == pipe.caption(star)[0]


def test_without_it_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_omni", None)
    assert plug_in()() is None


def request(prompt: Any, sampling: Sampling) -> Any:
    return SimpleNamespace(prompts=[prompt], sampling_params=sampling)


@pytest.mark.parametrize("cpu", [True, False])
def test_brings_a_platform_where_vllm_is_a_cpu_build(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    class Unready:
        """The interface, whose methods a platform must have."""

        @classmethod
        def get_torch_device(cls, local_rank: int | None = None) -> torch.device:
            raise NotImplementedError

    names = ("vllm", "vllm.platforms", "vllm.platforms.cpu", "vllm_omni", "vllm_omni.platforms")
    modules: dict[str, Any] = {name: ModuleType(name) for name in (*names, "vllm_omni.platforms.interface")}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    modules["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: cpu)
    modules["vllm.platforms.cpu"].CpuPlatform = type("CpuPlatform", (), {"set_device": True})
    modules["vllm_omni.platforms.interface"].OmniPlatform = Unready
    modules["vllm_omni.platforms.interface"].OmniPlatformEnum = SimpleNamespace(OOT="oot")
    path = cpu_platform()
    assert (path is not None) == cpu
    if path:
        module_name, _, class_name = path.rpartition(".")
        platform = getattr(importlib.import_module(module_name), class_name)()
        assert platform.get_torch_device(0) == torch.device("cpu")
        assert platform.set_device, "vLLM's own methods stay"
        assert platform.max_memory_allocated() > 1e6
        assert platform.empty_cache() is None


def test_draws_and_edits_what_the_pipeline_does(omni: Any, served: Path) -> None:
    pipe = transfuse.load(str(served))
    for prompt in ("a crab", {"prompt": "a moon", "modalities": ["image"]}):
        text = prompt if isinstance(prompt, str) else prompt["prompt"]
        sampling = Sampling(seed=7, generator=torch.Generator().manual_seed(7))  # both are there in the real engine
        assert same(omni(request(prompt, sampling)).output, pipe(text, generator=7).images)
    picture = PIL.Image.new("RGB", (8, 8), "red")
    edit = {"prompt": "make it blue", "multi_modal_data": {"image": picture}, "negative_prompt": None}
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "generator": 5, "num_images_per_prompt": 2}
    expected = pipe("make it blue", image=picture, **settings).images
    sampling = Sampling(None, None, 3, 2.0, True, 2, None, 5)
    assert same(omni(request(edit, sampling)).output, expected)
    edit["multi_modal_data"] = {"img2img": picture}
    assert same(omni(request(edit, sampling)).output, expected), "the other name of an image"


def test_redraws_where_a_mask_says(omni: Any, served: Path) -> None:
    """The fields of its image edits: a mask, and how far from the image drawing begins."""
    pipe, picture, mask = transfuse.load(str(served)), PIL.Image.new("RGB", (8, 8), "red"), PIL.Image.new("L", (8, 8))
    mask.paste(255, (4, 0, 8, 8))
    prompt = {"prompt": "a moon", "multi_modal_data": {"image": [picture], "mask_image": mask}}
    expected = pipe("a moon", image=picture, mask_image=mask, strength=0.5, generator=3).images
    assert same(omni(request(prompt, Sampling(seed=3, strength=0.5))).output, expected)


@pytest.mark.parametrize("words", ["", "a crab"])
def test_writes_where_text_is_the_modality(omni: Any, served: Path, words: str) -> None:
    pipe, picture = transfuse.load(str(served)), PIL.Image.new("RGB", (8, 8), "green")
    reply = omni(request({"prompt": words, "modalities": ["text"], "multi_modal_data": {"image": picture}}, Sampling()))
    assert reply.error is None
    parts = [picture, words] if words else [picture]
    assert reply.output == {"payload": {"text": pipe.generate(parts, draw="never").text.strip()}}


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ({"prompt": "a crab", "negative_prompt": [3]}, {}, "negative_prompt: expected text"),
        ({"prompt": "a crab", "multi_modal_data": {"image": [0, 1]}}, {}, "image: expected one, found 2"),
        ({"prompt": "a crab", "multi_modal_data": {"video": 0}}, {}, "multi_modal_data: expected image or mask_image"),
        (
            {"prompt": "a", "multi_modal_data": {"mask_image": 0}, "modalities": ["text"]},
            {},
            "mask_image: expected none",
        ),
        ({"prompt": "a", "multi_modal_data": {"image": [3]}, "modalities": ["text"]}, {}, "image"),
        ("a crab", {"height": 7, "width": 8}, "7"),
    ],
)
def test_mistakes_are_an_answer(omni: Any, prompt: Any, sampling: dict[str, Any], message: str) -> None:
    reply = omni(request(prompt, Sampling(**sampling)))
    assert (reply.output, reply.error_status_code) == (None, 400)
    assert message in reply.error
    assert "\n" not in reply.error
