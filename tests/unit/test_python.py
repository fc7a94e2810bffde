"""The package from Python, from the Hub's cache, in notebooks, in ComfyUI's and Gradio's hands, and off Linux."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import hub, write
from safetensors.torch import load_file

import transfuse
from transfuse.cli import run
from transfuse.data import DataSet
from transfuse.diffusion import SamplerConfig
from transfuse.errors import UserError
from transfuse.export import GenerationConfig
from transfuse.folders import fetched, is_repository, upload
from transfuse.inference import TransfusionPipeline
from transfuse.inference.arguments import DrawOptions, ReplySettings
from transfuse.inference.sequence_state import Request
from transfuse.model_card import read_card
from transfuse.vocabulary import Vocabulary

ROOT = Path(__file__).parents[2]


def integration(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "integrations" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_importing_the_package_imports_nothing_large() -> None:
    code = """
import sys, transfuse
assert not {"torch", "numpy", "PIL", "pydantic", "tyro", "transformers"} & set(sys.modules)
assert callable(transfuse.train) and callable(transfuse.evaluate)
import transfuse.train, transfuse.evaluate
assert callable(transfuse.train) and callable(transfuse.evaluate) and transfuse.train.Trained
assert transfuse.Recipe is type(transfuse.preset("tiny"))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_is_fast() -> None:
    """Less than 100 ms of processor time more than Python itself, the best of five: the machine may be busy."""

    def spent(code: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(spent("import transfuse") for _ in range(5)) - min(spent("pass") for _ in range(5)) < 0.1


def test_options_are_typed(served: Path) -> None:
    for function in (transfuse.load, transfuse.train.train_recipe, transfuse.evaluate.evaluate_model):
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds
    call = inspect.signature(TransfusionPipeline.__call__).parameters
    assert set(DrawOptions.__annotations__) == {*call} - {"self", "prompt", "image"}
    assert all(
        DrawOptions.__annotations__[name].__forward_arg__ == call[name].annotation
        for name in DrawOptions.__annotations__
    )
    fields = {
        field.name: field.type for field in dataclasses.fields(Request) if field.name not in ("document", "reuse")
    }
    assert {name: kind.__forward_arg__ for name, kind in ReplySettings.__annotations__.items()} == fields
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtpye'"):
        transfuse.load("small-64", dtpye="float16")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_token'"):
        transfuse.load(served).generate("a", max_token=3)  # type: ignore[call-arg]


def test_the_package_shows_what_it_has() -> None:
    code = """
import sys, transfuse
assert {"train", "evaluate", "tune", "preset", "Recipe", "curves", "load", "__version__"} <= set(dir(transfuse))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for called, function in (
        (transfuse.train, transfuse.train.train_recipe),
        (transfuse.evaluate, transfuse.evaluate.evaluate_model),
        (transfuse.tune, transfuse.tune.tune_model),
    ):
        assert inspect.signature(called) == inspect.signature(function)
        assert called.__doc__.startswith(function.__doc__)
    assert next(iter(inspect.signature(transfuse.train).parameters)) == "recipe"


def test_a_run_has_a_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = transfuse.preset("tiny")
    trained = transfuse.train(dataclasses.replace(recipe, loop=dataclasses.replace(recipe.loop, steps=1)))
    assert trained.export == Path("runs", "tiny", "export")
    assert (tmp_path / "runs" / "tiny" / "export" / "model.safetensors").is_file()


def test_evaluation_takes_data_seed_and_device(served: Path, pets: str, tmp_path: Path) -> None:
    words = ["data", "build", f"{pets}/train", "pets", "--size", "8", "--vocabulary", "300", "--workers", "0"]
    assert run([*words, "--heldout", "0.5"]) == 0
    options = {"data": tmp_path / "pets", "device": "cpu", "count": 2}
    found = transfuse.evaluate(served, ["denoising"], tmp_path / "out", **options)
    assert all("pets" in result["data"] for result in found["results"])


def test_whole_numbers_may_be_numpys(served: Path) -> None:
    pipe = transfuse.load(served)
    plain = pipe("a crab", generator=3, num_inference_steps=2, num_images_per_prompt=2, output_type="np").images
    counts = {"num_inference_steps": np.int64(2), "num_images_per_prompt": np.int32(2), "height": np.int16(8)}
    given = pipe("a crab", generator=np.int64(3), output_type="np", **counts)
    assert np.array_equal(plain, given.images)
    assert [type(seed) for seed in given.seeds] == [int, int]
    listed = pipe(["a crab"] * 2, generator=list(np.arange(3, 5)), num_inference_steps=2, output_type="np").images
    assert np.array_equal(plain, listed)


def test_captions_are_greedy_whatever_the_model_writes_with(served: Path) -> None:
    pipe = transfuse.load(served)
    picture = pipe("moon", generator=1, num_inference_steps=1).images[0]
    greedy = pipe.caption(picture)
    pipe.exported.generation = dataclasses.replace(pipe.exported.generation, temperature=50.0)
    assert pipe.caption(picture) == greedy
    tensors = pipe("moon", generator=1, num_inference_steps=1, output_type="pt").images
    assert pipe.caption(tensors) == greedy, "a pipeline's output of any type is one"


def test_negative_prompts_are_read_in_the_models_words(served: Path) -> None:
    pipe = transfuse.load(served)
    pipe.exported.vocabulary = Vocabulary(words=("a", "crab", "moon"), synonyms={"lobster": "crab"})
    options = {"generator": 1, "num_inference_steps": 2, "output_type": "np"}
    meant = pipe("a moon", negative_prompt="a crab", **options).images[0]
    assert np.array_equal(pipe("a moon", negative_prompt="a lobster", **options).images[0], meant)
    with pytest.raises(UserError, match='expected words that the model knows, found "zebra"'):
        pipe("a moon", negative_prompt="a zebra", strict=True, **options)


PICTURE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_interval": 0.3},
        {"guidance_interval": (0.4,)},
        {"guidance_interval": ("0", "0.9")},
        {"guidance_interval": (0.9, 0.1)},
        {"image_guidance_scale": "1.5", "image": PICTURE},
        {"candidates": "3"},
        {"candidates": 3.0},
        {"callback_on_step_end": "print"},
        {"num_inference_steps": 2.0},
        {"generator": 1.5},
        {"image": PICTURE, "mask_image": PICTURE + 255, "width": 16},
        {"image": PICTURE, "strength": 0.5, "height": 4},
        {"image": [PICTURE] * 3},
        {"image": np.full((8, 8, 3), 7.0)},
        {"image": 5},
        {"guidance_scale": PICTURE},
        {"generator": PICTURE},
        {"output_type": PICTURE[0]},
        {"candidates": PICTURE},
    ],
    ids=lambda options: "".join(options),
)
def test_wrong_options_of_a_call_are_one_line(served: Path, options: dict) -> None:
    with pytest.raises(UserError, match=r"^[a-z_ ]+: .*expected.*, found ") as caught:
        transfuse.load(served)("a crab", **{"num_inference_steps": 1, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"negative": "moon"},
        {"sampler": "dpmpp"},
        {"stop": None},
        {"stop": (1,)},
        {"stop": ("a", "")},
        {"start": PICTURE},
        {"max_tokens": 3.5},
        {"presence_penalty": "1"},
        {"frequency_penalty": None},
        {"logprobs": "2"},
        {"logprobs": 1.0},
        {"max_images": "2"},
        {"preview_every": None},
        {"image_guidance_scale": "2"},
        {"guidance_interval": 0.5},
        {"guidance_interval": ("a", "b")},
        {"top_p": None},
        {"seed": True},
        {"negative": PICTURE},
        {"temperature": PICTURE},
        {"stop": PICTURE},
    ],
    ids=lambda settings: "".join(settings),
)
def test_wrong_settings_of_a_reply_are_one_line(served: Path, settings: dict) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=f"^request: {name}: expected .*, found ") as caught:
        transfuse.load(served).generate("a crab", **settings)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_of_functions_are_one_line(served: Path, tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: transfuse.load(None), "model: expected a folder"),  # type: ignore[arg-type]
        (lambda: transfuse.load(3.5), "model: expected a folder"),  # type: ignore[arg-type]
        (lambda: transfuse.load(served, device="meta"), "device: expected cpu"),
        (lambda: transfuse.curves(None), "curves: expected run folders"),  # type: ignore[arg-type]
        (lambda: transfuse.preset(["tiny"]), "preset: expected a name"),  # type: ignore[arg-type]
        (lambda: transfuse.train(transfuse.preset("tiny"), 7), "folder: expected a path"),  # type: ignore[arg-type]
        (lambda: transfuse.evaluate(served, [None]), "evaluate: expected a list of names"),  # type: ignore[list-item]
        (lambda: transfuse.evaluate(served, ["text"], seed="1"), "seed: expected"),  # type: ignore[arg-type]
        (lambda: transfuse.evaluate(served, ["text"], device="tpu"), "device: expected"),  # type: ignore[arg-type]
        (lambda: transfuse.evaluate(None), "model: expected"),  # type: ignore[arg-type]
        (lambda: transfuse.tune(served, tmp_path, replay="0.3"), "replay: expected"),  # type: ignore[arg-type]
        (lambda: transfuse.tune(served, tmp_path, steps=9.5), "steps: expected"),  # type: ignore[arg-type]
        (lambda: transfuse.tune(served, None), "pictures: expected"),  # type: ignore[arg-type]
    ]
    for call, says in calls:
        with pytest.raises(UserError, match=f"^{says}.*, found ") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_wrong_types_are_one_line(served: Path) -> None:
    pipe = transfuse.load(served)
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: pipe.edit(None, "blue"), "image: expected one to change, found none"),  # type: ignore[arg-type]
        (lambda: pipe.generate(5), "prompt: expected text, or a list of texts and images, found 5"),  # type: ignore
        (lambda: pipe.generate("a", seed="x"), "seed: expected a whole number, found 'x'"),  # type: ignore[arg-type]
        (lambda: pipe.generate("a", size=8), "size: expected two whole numbers of pixels, found 8"),  # type: ignore
        (lambda: pipe.generate("a", temperature="hot"), "temperature: expected a number, found 'hot'"),  # type: ignore
        (lambda: transfuse.train("tiny", "a"), "recipe: expected a transfuse.Recipe"),  # type: ignore[arg-type]
        (lambda: transfuse.evaluate(served, "text"), "evaluate: expected a list of names"),
        (lambda: transfuse.evaluate(served, ["text"], count="3"), "a whole number as count"),  # type: ignore[arg-type]
    ]
    for call, says in calls:
        with pytest.raises(UserError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


USER = """
import transfuse

pipe = transfuse.load("small-64", dtype="float32", device="cpu")
image = pipe("a crab", guidance_scale=3.0, generator=[1]).images[0]
pipe.edit(image, "make it blue", num_inference_steps=4).save("blue.png")
text: str = pipe.generate(["what is", image], draw="never", max_tokens=4).text
words: list[str] = pipe.caption(image)
trained = transfuse.train(transfuse.preset("tiny"), "runs/tiny")
again = transfuse.train(transfuse.preset("tiny")).export
lines = transfuse.curves("runs/tiny").lines
numbers = transfuse.evaluate("small-64", ["text"], "out", count=3, data="pets", seed=1, device="cpu")
both = pipe(["a crab", "b"], image=[image, image]).images
"""
MISTAKES = {
    'pipe.edit(image, "x", num_inference_step=4)': "num_inference_step",
    'pipe.generate("x", temperature="hot")': "temperature",
    'pipe("x", output_type=3)': "output_type",
    'transfuse.load("x", compile="yes")': "compile",
    'transfuse.train("tiny", "runs/tiny")': "Recipe",
    'transfuse.evaluate("x", counts=3)': "counts",
}


@pytest.mark.long
def test_types_are_checked_in_a_users_file(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(USER)
    (tmp_path / "wrong.py").write_text(USER + "\n".join(MISTAKES))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", str(tmp_path / "cache")]
    found = subprocess.run([*command, "right.py"], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    found = subprocess.run([*command, "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    errors = {int(line.split(":")[1]): line for line in found.stdout.splitlines() if ": error:" in line}
    first = USER.count("\n") + 1
    for number, name in enumerate(MISTAKES.values(), first):
        assert name in errors.get(number, ""), (name, found.stdout)
    assert min(errors) == first


def test_rich_display(served: Path) -> None:
    pipe = transfuse.load(served)
    drawn = pipe(["a crab", "b"], num_inference_steps=1, generator=1)
    assert drawn._repr_html_().count('<img src="data:image/png;base64,') == 2
    assert "display:flex" in drawn._repr_html_(), "a grid: notebooks show images as blocks, one a line"
    assert pipe("a", num_inference_steps=1, output_type="np")._repr_html_() is None
    reply = pipe.generate("a crab", draw="force", max_tokens=4, sampler=pipe.request(["a"], steps=1).sampler)
    assert reply._repr_html_().count("<img") == len(reply.images) == 1


def test_curves_of_runs(tmp_path: Path) -> None:
    for run_, rate in (("a", 1.0), ("b", 2.0)):
        (tmp_path / run_).mkdir()
        lines = [{"step": step, "text": rate / step, "image_by_timestep/0": 1.0, "seconds": step} for step in (1, 2, 4)]
        lines.append({"step": 4, "choice/acc": 0.25})
        (tmp_path / run_ / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = transfuse.curves(tmp_path / "a", str(tmp_path / "b"))
    assert curves.names == ["text", "choice/acc"]
    assert curves.points(str(tmp_path / "b"), "text") == [(1, 2.0), (2, 1.0), (4, 0.5)]
    page = curves._repr_html_()
    assert page.count("<svg") == 1, "a number that was logged once has no curve"
    assert "--accent:#" in page, "colours do not depend on a page's theme"
    assert f"<td>{tmp_path / 'a'}</td><td>4</td><td>0.25</td><td>4</td>" in page
    with pytest.raises(UserError, match=r"c/metrics\.jsonl: expected the logged steps of a run, found none"):
        transfuse.curves(tmp_path / "c")


@pytest.fixture
def cached(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An export in the layout of the Hub's cache, without a network."""
    from huggingface_hub import constants

    repository = tmp_path / "hub" / "models--someone--crabs"
    shutil.copytree(served, repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return "someone/crabs"


def test_a_model_in_the_hubs_cache(cached: str, served: Path, tmp_path: Path, capsys) -> None:
    ours, theirs = (transfuse.load(name)("a crab", generator=1).images[0] for name in (served, cached))
    assert np.array_equal(ours, theirs)
    assert run(["generate", "a crab", "--draw", "force", "--model", cached, "--out", "out"]) == 0
    assert list((tmp_path / "out").glob("*.png"))
    assert is_repository(cached)
    assert fetched(cached).name == "abc123"
    capsys.readouterr()
    assert run(["caption", "a.png", "--model", "someone/else"]) == 2
    told = capsys.readouterr().err
    assert "someone/else: expected a folder, or a model on the Hub or in its cache, found none" in told
    assert told.count("\n") == 1


@pytest.fixture
def pets(cached: str, tmp_path: Path) -> str:
    """A repository of data in the same cache, whose files are links, as the Hub's library lays them out."""
    blobs = tmp_path / "hub" / "datasets--someone--pets" / "blobs"
    snapshot = blobs.parent / "snapshots" / "def456"
    for folder in (blobs, snapshot / "train", snapshot / "words", blobs.parent / "refs"):
        folder.mkdir(parents=True)
    (blobs.parent / "refs" / "main").write_text("def456")
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(blobs / f"{number}", "PNG")
        (snapshot / "train" / f"{number}.png").symlink_to(blobs / f"{number}")
        (snapshot / "train" / f"{number}.txt").write_text(f"pet number {number}")
        (snapshot / "words" / f"{number}.jsonl").write_text(json.dumps({"text": f"a word on pet {number}"}) + "\n")
    return "hf://datasets/someone/pets"


def test_data_in_the_hubs_cache(pets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "build", "--size", "8", "--vocabulary", "300", "--workers", "0"]
    documents = {}
    for name, source in {
        "folder": f"{pets}/train",
        "revision": f"{pets}@main/train/",
        "file": f"{pets}/words/3.jsonl",
        "numbers": pets + "/words/{2..5}.jsonl",
        "stars": f"{pets}/w*/*.jsonl",
    }.items():
        assert run([*words, source, name]) == 0, capsys.readouterr().err
        documents[name] = len(DataSet(str(tmp_path / name)))
    assert documents == {"folder": 6, "revision": 6, "file": 1, "numbers": 4, "stars": 6}
    for source, says in {
        f"{pets}/test": "expected",
        f"{pets}/*.tar": "found no such file on the Hub, or in its cache",
        "hf://datasets/someone/else": "expected data on the Hub or in its cache, found none",
        "hf://someone/pets/train": "expected hf://datasets/ORG/NAME or a path below it",
    }.items():
        capsys.readouterr()
        assert run([*words, source, "no"]) == 2
        told = capsys.readouterr().err
        assert says in told, told
        assert source in told or "/test" in told
        assert told.count("\n") == 1


@pytest.mark.parametrize("links", [True, False])
def test_tags_of_an_upload_do_not_change_the_folder(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr("os.symlink", lambda *_: (_ for _ in ()).throw(OSError("no privilege")))
    monkeypatch.chdir(tmp_path)
    own = {"README.md": "---\ntags: [old]\n---\nA model.\n", "model.safetensors": "weights", "vae/config.json": "{}"}
    folder, done = write(tmp_path / "mine", dict(own)), hub(tmp_path, monkeypatch)
    upload(Path("mine"), "someone/crabs", tags=["new", "old"], commit_message="x")
    there = tmp_path / "uploaded"
    assert read_card(there / "README.md") == ({"tags": ["old", "new"]}, "A model.\n")
    assert done["upload_folder"]["commit_message"] == "x"
    for name, content in own.items():
        assert (folder / name).read_text() == content
        assert name == "README.md" or (there / name).read_text() == content
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors", "vae"]


@pytest.mark.long
def test_a_run_starts_from_the_hubs_cache(cached: str, served: Path, tmp_path: Path) -> None:
    words = ["train", "tiny", "--start", cached, "--init.allow-changes", "network", "--loop.steps", "1"]
    assert run([*words, "--run", "hubs"]) == 0
    assert run(["train", "tiny", "--start", str(served), *words[4:], "--run", "ours"]) == 0
    hubs, ours = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("hubs", "ours"))
    assert all(torch.equal(hubs[name], weight) for name, weight in ours.items())
    assert run([*words, "--run", "hubs"]) == 0, "the same command finds the run finished"


def test_paths_are_not_taken_for_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/demo", "a", "a/b/c", "/a/b", "../a", "./b", str(tmp_path / "x")):
        assert not is_repository(name), name
    with pytest.raises(UserError, match=r"runs/demo/config\.json: expected a JSON file, found none"):
        transfuse.load("runs/demo")


OWN = GenerationConfig(SamplerConfig("ddim", steps=3), guidance_scale=1.5)
"""settings of a model that are not the usual ones"""


def test_comfyui_nodes_keep_its_contract(served: Path) -> None:
    nodes = integration("comfyui_transfuse")
    made = {name.removeprefix("Transfuse"): node for name, node in nodes.NODE_CLASS_MAPPINGS.items()}
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()

    def call(name: str, **given: object) -> object:
        """As ComfyUI does: inputs by name, defaults where none is connected, one output for each type."""
        node = made[name]
        wanted = node.INPUT_TYPES()["required"]
        values = {
            key: given.get(key, (kind[1] if len(kind) > 1 else {}).get("default")) for key, kind in wanted.items()
        }
        outputs = getattr(node(), node.FUNCTION)(**values)
        assert len(outputs) == len(node.RETURN_TYPES)
        return outputs[0]

    model = call("LoadModel", model=str(served), device="cpu")
    images = call("Draw", model=model, prompt="a crab", count=2, steps=2)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), torch.float32)
    assert 0 <= images.min() <= images.max() <= 1
    alone = model("a crab", generator=1, num_inference_steps=2, output_type="np").images[0]
    assert np.array_equal((images[1] * 255).round().numpy().astype(np.uint8), alone)
    model.exported.generation = OWN
    (own,) = call("Draw", model=model, prompt="moon", seed=4)
    assert np.array_equal((own * 255).round().numpy().astype(np.uint8), model("moon", generator=4).images[0])
    given = {"steps": 2, "guidance": 2.0}
    (other,) = call("Draw", model=model, prompt="moon", seed=4, **given)
    named = {"num_inference_steps": 2, "guidance_scale": 2.0}
    expected = model("moon", generator=4, **named).images[0]
    assert np.array_equal((other * 255).round().numpy().astype(np.uint8), expected)
    with pytest.raises(UserError, match=r"^request: negative: expected a guidance_scale other than 1.*$"):
        call("Draw", model=model, prompt="moon", negative="b", guidance=1.0)
    assert call("Edit", model=model, image=torch.rand(2, 20, 30, 3), instruction="b", steps=1).shape == (2, 8, 8, 3)
    assert call("Caption", model=model, image=images).count("\n") == 1


def test_the_gradio_functions(served: Path) -> None:
    draw, edit, caption = integration("gradio_app").functions(str(served))
    picture = draw("a crab", "", 3)
    assert np.array_equal(picture, transfuse.load(served)("a crab", generator=3).images[0])
    assert edit(picture.resize((30, 20)), "make it blue", 1).size == (8, 8)
    assert isinstance(caption(picture), str)
    assert np.array_equal(draw("a crab", "", None), draw("a crab", "", 0)), "the field of the seed may be emptied"


class Gradio:
    """A stand-in for gradio, whose pages refuse a component that was rendered before."""

    class Component:
        def __init__(self, value: object = None, **options: object) -> None:
            self.rendered = False

    Image = Text = Number = Component

    class Interface:
        def __init__(self, function: Callable, inputs: list, output: Any, flagging_mode: str) -> None:
            assert len(inspect.signature(function).parameters) == len(inputs)
            self.components = [*inputs, output]

    class TabbedInterface:
        def __init__(self, tabs: list, names: list[str], title: str) -> None:
            assert len(tabs) == len(names)
            for component in (component for tab in tabs for component in tab.components):
                assert not component.rendered, "DuplicateBlockError"
                component.rendered = True


def test_the_gradio_page_renders_each_component_once(served: Path) -> None:
    integration("gradio_app").page(str(served), Gradio)


def test_doctor_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["doctor", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["next"]
    assert steps[0].startswith("transfuse generate ")
    assert any(step.startswith("transfuse demo") for step in steps)
    assert run(["doctor"]) == 0
    assert "next: transfuse generate" in capsys.readouterr().out


def test_mps_is_a_device_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from transfuse.devices import for_inference, pick_device

    if torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(UserError, match="device: expected a Mac with MPS, found none"):
        transfuse.load("small-64", device="mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert for_inference("mps", "auto") == ("mps", torch.float32)
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu"), "never by itself: it was not tried"


@pytest.mark.long
def test_commands_run_without_what_only_unix_has(tmp_path: Path) -> None:
    """And with a locale that is not UTF-8, as on Windows: no file is read or written in the locale's encoding."""
    code = """
import filelock, signal, sys, warnings  # filelock has a lock of Windows' own
for name in ("fcntl", "resource", "termios", "pwd", "grp"): sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM"): delattr(signal, name)
warnings.filterwarnings("error", category=EncodingWarning, module="transfuse")
from transfuse.cli import run
for words in (
    ["doctor"],
    ["plan", "tiny"],
    ["train", "tiny", "--run", "run", "--loop.steps", "2"],
    ["export", "run", "--out", "model"],
    ["export", "model", "--out", "theirs", "--format", "diffusers"],
    ["data", "build", "world", "scenes", "--count", "4", "--size", "32"],
    ["data", "verify", "scenes"],
    ["evaluate", "--model", "model", "--suite", "text", "--count", "2", "--out", "numbers"],
):
    assert run(words) == 0, words
"""
    command = [sys.executable, "-X", "warn_default_encoding", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
