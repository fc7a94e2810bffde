"""An export in diffusers' layout: there and back to the byte, drawn from to the byte, its parts opened by diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import RESULT, hub
from safetensors.torch import load_file

import transfuse
from transfuse.cli import run
from transfuse.errors import UserError
from transfuse.export import load_export, relayout
from transfuse.model_card import add_results


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def theirs(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return relayout(served, tmp_path_factory.mktemp("theirs") / "model", "diffusers")


def test_there_and_back(served: Path, theirs: Path, tmp_path: Path) -> None:
    assert run(["export", str(theirs), "--out", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == files(served)
    assert run(["export", str(served), "--format", "diffusers", "--out", str(tmp_path / "again")]) == 0
    assert files(tmp_path / "again") == files(theirs)


def test_draws_the_same(served: Path, theirs: Path) -> None:
    ours, other = (transfuse.load(str(folder))("a crab", generator=3).images[0] for folder in (served, theirs))
    assert np.array_equal(ours, other)


def test_diffusers_opens_the_scheduler(theirs: Path) -> None:
    process = load_export(theirs).process
    for kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.DPMSolverMultistepScheduler):
        scheduler = kind.from_pretrained(theirs, subfolder="scheduler")
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), process.alpha_bar[1:], atol=1e-6, rtol=1e-4)
        assert scheduler.config.prediction_type == "sample"


def test_diffusers_opens_the_autoencoder(tmp_path: Path, tokenizer) -> None:
    from conftest import randomised, tiny

    from transfuse.autoencoders import open_autoencoder
    from transfuse.diffusion import DiffusionConfig
    from transfuse.export import GenerationConfig, save_export

    autoencoder = open_autoencoder("kl-f4-small")
    model = randomised(tiny(latent_channels=8))
    settings = (
        model.config,
        DiffusionConfig(prediction="v"),
        tokenizer,
        autoencoder,
        64,
        GenerationConfig(),
        "a model",
    )
    export = save_export(tmp_path / "export", model.state_dict(), *settings)
    theirs = relayout(export, tmp_path / "theirs", "diffusers")
    opened = diffusers.AutoencoderKL.from_pretrained(theirs, subfolder="vae")
    for name, weight in opened.state_dict().items():
        assert torch.equal(weight, autoencoder.state_dict()[name]), name
    index = transfuse.export.read_json(theirs / "model_index.json")
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_mistakes(served: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        relayout(tmp_path, tmp_path / "out", "diffusers")
    assert run(["export", str(served), "--format", "diffusers"]) == 2
    assert "expected --out" in capsys.readouterr().err
    assert run(["export", str(served), "--format", "llama", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "out").exists()


def opened(folder: Path | str, **parts: object) -> diffusers.DiffusionPipeline:
    options = {"custom_pipeline": str(folder), "trust_remote_code": True}
    return diffusers.DiffusionPipeline.from_pretrained(folder, **options, **parts)


@pytest.fixture(scope="module")
def pipe(theirs: Path) -> diffusers.DiffusionPipeline:
    return opened(theirs)


FEW = {"num_inference_steps": 3}
SAME = {"generator": 1, **FEW}
PICTURE = np.zeros((8, 8, 3), np.uint8)


def test_diffusers_pipeline_draws_the_same(served: Path, theirs: Path, pipe: diffusers.DiffusionPipeline) -> None:
    ours = transfuse.load(str(served))
    picture = ours("a crab", generator=3, **FEW).images[0]
    for options in (
        {},
        {"num_images_per_prompt": 2, "negative_prompt": "two balloons"},
        {"image": picture},
        {"image": picture, "strength": 0.5, "guidance_scale": 2.0},
    ):
        drawn, expected = (draw("a crab", **options, generator=3, **FEW).images for draw in (pipe, ours))
        assert len(drawn) == options.get("num_images_per_prompt", 1)
        assert all(np.array_equal(a, b) for a, b in zip(drawn, expected, strict=True))


def test_diffusers_outputs_and_generators(pipe: diffusers.DiffusionPipeline) -> None:
    drawn = {
        kind: pipe(["a crab", "moon"], generator=[torch.Generator().manual_seed(1), 7], output_type=kind, **FEW).images
        for kind in ("np", "pt", "latent")
    }
    assert drawn["np"].shape == (2, 8, 8, 3)
    assert drawn["np"].dtype == np.float32
    assert torch.equal(drawn["pt"], torch.from_numpy(drawn["np"]).permute(0, 3, 1, 2))
    assert drawn["latent"].shape == (2, 3, 8, 8)
    noisy = [pipe("moon", generator=7, output_type="np", eta=eta, **FEW).images for eta in (1.0, 1.0, 0.5)]
    assert np.array_equal(noisy[0], noisy[1])
    assert not np.array_equal(noisy[0], noisy[2])
    (alone,) = pipe("moon", generator=7, output_type="np", return_dict=False, **FEW)
    assert np.array_equal(alone[0], drawn["np"][1])
    steps = []

    def step_end(of, step, t, tensors):
        steps.append((of is pipe, step, tensors["latents"].shape))

    pipe("moon", callback_on_step_end=step_end, **FEW)
    assert steps == [(True, number, (1, 3, 8, 8)) for number in range(3)]


def test_diffusers_pipeline_moves_and_comes_back(
    served: Path, pipe: diffusers.DiffusionPipeline, tmp_path: Path
) -> None:
    assert set(pipe.components) == {"transformer", "vae", "tokenizer", "scheduler"}
    assert isinstance(pipe.components["scheduler"], diffusers.DDIMScheduler)
    pipe.save_pretrained(tmp_path / "saved")
    assert run(["export", str(tmp_path / "saved"), "--out", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == files(served)
    again = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "saved", custom_pipeline=str(tmp_path / "saved"), trust_remote_code=True
    )
    assert again.to("cpu", torch.bfloat16) is again
    assert (again.dtype, again.device.type, again.to(torch.float32).dtype) == (torch.bfloat16, "cpu", torch.float32)
    assert np.array_equal(again("b", generator=1, **FEW).images[0], pipe("b", generator=1, **FEW).images[0])


def test_what_diffusers_asks_for_and_this_pipeline_lacks_is_one_line(
    pipe: diffusers.DiffusionPipeline, tmp_path: Path
) -> None:
    for options in ({"variant": "fp16"}, {"safe_serialization": False}):
        with pytest.raises(UserError, match=r"^save_pretrained: expected no variant, and safetensors"):
            pipe.save_pretrained(tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match=r"^pipeline: expected the folder of an export .*, found a transformer$"):
        type(pipe)(**pipe.components)
    with pytest.raises(UserError, match=r"^pipeline: expected the folder of an export"):
        type(pipe)()("a crab")
    with pytest.raises(UserError, match=r"^device: expected cpu, cuda, cuda:N or mps, found meta$"):
        pipe.to("meta")


def test_parts_are_read_and_not_replaced(pipe: diffusers.DiffusionPipeline, theirs: Path) -> None:
    assert pipe.transformer is pipe.components["transformer"]
    assert pipe.vae is pipe.components["vae"]
    assert pipe.tokenizer is pipe.components["tokenizer"]
    assert pipe.scheduler.config.prediction_type == "sample"
    other = diffusers.EulerDiscreteScheduler()
    with pytest.raises(UserError, match=r"^scheduler: expected the export's own, .* found a EulerDiscreteScheduler$"):
        pipe.scheduler = other
    for name, given in (("scheduler", other), ("vae", torch.nn.Identity())):
        with pytest.raises(UserError, match=f"^pipeline: expected the folder of an export .*, found a {name}$"):
            opened(theirs, **{name: given})


def test_a_callback_ends_a_drawing(pipe: diffusers.DiffusionPipeline) -> None:
    seen = []

    def step_end(of, step, t, tensors):
        seen.append(tensors["latents"].clone())
        of._interrupt = step == 1
        return tensors

    options = {"generator": 5, "output_type": "latent"}
    early = pipe(["moon", "a crab"], num_inference_steps=6, callback_on_step_end=step_end, **options).images
    assert pipe.interrupt
    assert len(seen) == 2
    assert torch.equal(early, seen[-1])
    whole = pipe(["moon", "a crab"], num_inference_steps=6, **options).images
    assert not pipe.interrupt
    assert not torch.equal(whole, early)


@pytest.mark.parametrize("options", [{}, {"strength": 0.5}], ids=["instruction", "variation"])
def test_outputs_are_inputs(pipe: diffusers.DiffusionPipeline, options: dict) -> None:
    given = {
        kind: pipe(["moon", "a crab"], generator=9, output_type=kind, **FEW).images for kind in ("pil", "np", "pt")
    }
    changed = {"prompt": ["b", "two balloons"], "generator": 2, "output_type": "np", "num_images_per_prompt": 2}
    each = [pipe(**{**changed, **options}, image=images, **FEW).images for images in given.values()]
    assert all(np.array_equal(each[0], other) for other in each[1:])
    call = {**changed, **options, **FEW, "prompt": "two balloons", "generator": 4, "image": given["pil"][1]}
    assert np.array_equal(pipe(**call).images, each[0][2:]), "each prompt has its own image"
    with pytest.raises(UserError, match=r"^image: expected 1 or 3, as prompts, found 2$"):
        pipe(["a", "b", "c"], image=given["pt"], **options, **FEW)
    with pytest.raises(UserError, match=r"^image: expected values from 0 to 1 where they are floats, found -2 to 3$"):
        pipe("a", image=torch.linspace(-2, 3, 192).view(3, 8, 8), **options, **FEW)


def test_saves_what_it_was_moved_to_from_another_working_directory(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(theirs.parent)
    pipe = opened(theirs.name)
    monkeypatch.chdir(tmp_path)
    pipe.to(torch.bfloat16).save_pretrained("half")
    assert {weight.dtype for weight in load_export(tmp_path / "half").model.parameters()} == {torch.float32}
    stored = load_file(tmp_path / "half" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert np.array_equal(
        opened(tmp_path / "half").to(torch.bfloat16)("b", **SAME).images[0], pipe("b", **SAME).images[0]
    )
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)


@pytest.mark.parametrize("how", ["push", "save"])
def test_uploads_keep_the_model_card(how: str, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, done = relayout(served, tmp_path / "theirs", "diffusers"), hub(tmp_path, monkeypatch)
    add_results(theirs / "README.md", "crabs", [RESULT])
    pipe = opened(theirs)
    if how == "push":
        pipe.push_to_hub("someone/crabs", private=True, token="t", create_pr=True)
    else:
        pipe.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/crabs", token="t", create_pr=True)
    assert done["create_repo"]["token"] == "t"
    assert done["upload_folder"]["create_pr"] is True
    assert files(tmp_path / "uploaded") == files(theirs)


def test_another_revision_is_not_drawn_with_in_silence(
    served: Path, theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers reads the revision's files; the package would open the newest."""
    from huggingface_hub import constants

    snapshots = tmp_path / "hub" / "models--someone--crabs" / "snapshots"
    shutil.copytree(theirs, snapshots / "abc123")
    (snapshots.parent / "refs").mkdir()
    (snapshots.parent / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    kind = type(opened(theirs))
    index = json.loads((theirs / "model_index.json").read_text())
    names = {name: value for name, value in index.items() if not name.startswith("_")}
    kind(**names).register_to_config(_name_or_path="someone/crabs")
    older = names | {"weights": "0123456789abcdef"}
    with pytest.raises(
        UserError, match=r"^someone/crabs: expected weights 0123456789abcdef, found the newest, [0-9a-f]+: "
    ):
        kind(**older).register_to_config(_name_or_path="someone/crabs")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompt": 3}, "prompt: expected text, or a list of texts, found 3"),
        ({"prompt": []}, r"prompt: expected text, or a list of texts, found \[\]"),
        ({"negative_prompt": 1}, "negative_prompt: expected text"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt: expected 1 or 1, as prompts, found 2"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "negative: expected a guidance_scale other than 1"),
        ({"generator": "3"}, "generator: expected a torch.Generator, a seed or a list of them, found '3'"),
        ({"generator": [1, 2]}, "generator: expected 1, as there are images, found 2"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: expected a whole number of at least 1, found 0"),
        ({"height": "8"}, "height: expected a whole number of at least 1, found '8'"),
        ({"guidance_scale": "3"}, "guidance_scale: expected a number, found '3'"),
        ({"eta": 2}, "sampler: eta: expected 0..1 for ddim"),
        ({"eta": "0.5"}, "eta: expected a number, found '0.5'"),
        ({"image": np.zeros((8, 8, 3), np.uint8), "strength": "half"}, "strength: expected a number, found 'half'"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt: expected a whole number of at least 1, found True"),
        ({"num_inference_steps": True}, "steps: expected a whole number, found True"),
        ({"output_type": "jpg"}, "output_type: expected"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: expected a function, found 3"),
        ({"callback_on_step_end": lambda *_: (1, 2)}, "callback_on_step_end: expected it to return tensors by name"),
        ({"callback_on_step_end_tensor_inputs": None}, "callback_on_step_end_tensor_inputs: expected latents alone"),
        ({"image": [PICTURE, PICTURE]}, "image: expected 1, as prompts, found 2"),
        ({"image": PICTURE, "strength": 0.5, "height": 16}, "height: expected 8, as the image with strength or mask"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs: expected latents"),
    ],
)
def test_wrong_values_are_one_line(pipe: diffusers.DiffusionPipeline, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        pipe(**{"prompt": "a crab", **FEW, **options})
    assert "\n" not in str(caught.value)
