"""Distillation: identities of its targets, a run with its resumption, and what its export draws by default."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal, exported, latent, randomised, tensors, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

import transfuse
from emoji_scenes import WorldConfig
from transfuse.cli import run
from transfuse.diffusion import DiffusionConfig, Process, Sampler, SamplerConfig
from transfuse.errors import UserError
from transfuse.export import relayout, save_export
from transfuse.inference import Engine, ImageEnd, Request
from transfuse.io import sha256
from transfuse.model import Transfusion
from transfuse.recipes import Recipe, preset
from transfuse.recipes.small import tiny as tiny_recipe
from transfuse.rng import generator_for
from transfuse.runs import open_run, resolve, student_of
from transfuse.runs.monitor import pipeline_of
from transfuse.sequence import Document, Image, SequenceFormat, Text, Tokenizer, collate
from transfuse.train import build_trainer, train
from transfuse.training import DistilConfig, DistillationObjective, ObjectiveConfig
from transfuse.training.distillation import follow, step_targets
from transfuse.training.finetune import LoRAConfig
from transfuse.training.trainer import Trainer

PROCESSES = [
    DiffusionConfig(prediction="x0", weighting="v"),
    DiffusionConfig(prediction="v"),
    DiffusionConfig(prediction="x0", clip_x0=0.8),
    DiffusionConfig(schedule="flow", prediction="v", shift=3.0),
]
MEAN, DEVIATION = 0.3, 0.5


def oracle(process: Process, x: Tensor, t: Tensor) -> Tensor:
    """The best prediction if every element of an image is normal with MEAN and DEVIATION."""
    signal, sigma = (table[t].view(-1, 1, 1, 1).float() for table in (process.signal, process.sigma))
    gain = DEVIATION**2 * signal / (DEVIATION**2 * signal**2 + sigma**2)
    x0 = MEAN + gain * (x - signal * MEAN)
    return process.target(x0, process.implied_noise(x0, x, t), t)


def walk(process: Process, x: Tensor, sampler: Sampler, first: int, steps: int, predict) -> Tensor:
    """Take steps of a sampler from its step number `first` on, image by image."""
    images = []
    for image in x:
        state = sampler.prepare(tuple(image.shape), torch.Generator().manual_seed(0), start=image)
        state = replace(state, index=first)
        for _ in range(steps):
            state = sampler.step(state, predict(state.x[None], torch.tensor([state.t]))[0])
        images.append(state.x)
    return torch.stack(images)


@pytest.mark.parametrize("config", PROCESSES, ids=str)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_one_step_of_the_student_is_two_of_a_perfect_teacher(config: DiffusionConfig, first: int) -> None:
    process = Process(config)
    many, few = (Sampler(process, SamplerConfig("ddim", steps)) for steps in (8, 4))
    x = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(first))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return oracle(process, x, t)

    grid = (*many.timesteps, 0)[2 * first : 2 * first + 3]
    levels = torch.tensor(grid)[:, None].expand(-1, 3)
    x_s = follow(process, x, levels, predict)
    torch.testing.assert_close(x_s, walk(process, x, many, 2 * first, 2, predict), rtol=1e-5, atol=1e-5)
    targets = step_targets(process, x, x_s, levels[0], levels[-1])
    student = walk(Process(replace(config, clip_x0=None)), x, few, first, 1, lambda _x, _t: targets[:1])
    torch.testing.assert_close(student[:1], x_s[:1], rtol=1e-5, atol=1e-5)
    once = walk(process, x, few, first, 1, predict)
    assert (once - x_s).abs().max() > 1e-4, "two steps are not one"


def test_images_of_several_sizes_are_led_as_each_alone() -> None:
    process = Process(DiffusionConfig(prediction="v"))
    images = tuple(torch.randn(2, rows, 4) for rows in (4, 8, 4))
    levels = torch.tensor([[900, 600, 300], [500, 300, 100], [250, 100, 0]])

    def predict(x, t):
        return tuple(oracle(process, image[None], level[None])[0] for image, level in zip(x, t, strict=True))

    together = follow(process, images, levels, predict)
    targets = step_targets(process, images, together, levels[0], levels[-1])
    for number, image in enumerate(images):
        alone = follow(process, (image,), levels[:, number : number + 1], predict)
        torch.testing.assert_close(together[number], alone[0])
        target = step_targets(process, (image,), alone, levels[0, number, None], levels[-1, number, None])
        torch.testing.assert_close(targets[number], target[0])


# --- the objective ----------------------------------------------------------------------------------------------------


def documents(side: int = 8) -> list[Document]:
    """A drawing, one without its prompt, an edit with a clean image before it, a caption of a clean image, a text."""
    words = Text((10, 11, 12))
    return [
        Document([words, Image(latent(side, 8))], sample=0),
        Document([Image(latent(8, 8))], sample=1, predict=False),
        Document([Image(latent(8, 8), target=False), words, Image(latent(side, 8))], sample=2),
        Document([Image(latent(8, 8), target=False), words], sample=3),
        Document([words], sample=4),
    ]


def image_loss(grammar: SequenceFormat, distil: DistilConfig, side: int = 8, seed: int = 0) -> float:
    """The image loss of a student that is its teacher."""
    model = randomised(tiny())
    process = Process(DiffusionConfig(prediction="x0", weighting="v"))
    goal = DistillationObjective(ObjectiveConfig(), process, seed, model, grammar, distil)
    return goal.loss(model, collate(documents(side), grammar)).losses[1].item()


@pytest.mark.parametrize("side", [8, 4])
@torch.no_grad()
def test_a_teacher_without_guidance_and_fewer_steps_has_nothing_to_teach_itself(grammar, side: int) -> None:
    same = [image_loss(grammar, DistilConfig(4, 4, 1.0), side, seed) for seed in range(4)]
    assert max(same) < 1e-8
    assert image_loss(grammar, DistilConfig(4, 8, 1.0), side) > 1e-4
    assert image_loss(grammar, DistilConfig(4, 4, 3.0), side) > 1e-4


@torch.no_grad()
def test_guidance_outside_its_interval_is_none(grammar) -> None:
    plain = image_loss(grammar, DistilConfig(4, 8, 1.0))
    assert image_loss(grammar, DistilConfig(4, 8, 3.0, (0.0, 0.05))) == plain, "no level of eight steps is below 0.125"
    assert image_loss(grammar, DistilConfig(4, 8, 3.0, (0.0, 0.8))) != plain


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@torch.no_grad()
def test_the_target_is_what_guided_drawing_reaches(grammar, tokenizer: Tokenizer, attention) -> None:
    """From noise, the teacher in a batch arrives where the engine does, guided by its own null branch."""
    made = exported(tokenizer, image_attention=attention)
    made = replace(made, process=Process(DiffusionConfig(prediction="x0", weighting="v")))
    words, sampler = Text((10, 11, 12)), SamplerConfig("ddim", 4)
    request = Request(Document([words], closed=False), draw="force", max_tokens=0, size=(8, 8), sampler=sampler, seed=3)
    (drawn,) = [event.latent for event in Engine(made).run([request]) if isinstance(event, ImageEnd)]
    goal = DistillationObjective(ObjectiveConfig(), made.process, 0, made.model, grammar, DistilConfig(1, 4, 3.0))
    noise = Sampler(made.process, sampler).prepare((3, 8, 8), generator_for(3, "image", 0)).x
    batch = collate([Document([words, Image(torch.zeros(3, 8, 8))]), Document([words])], grammar, attention)
    noised = goal.noise(replace(goal.sample_noise(batch), noise=noise[None]))
    arrived = made.process.step(noised.targets, noised.latents, noised.timesteps, torch.tensor([0]))
    torch.testing.assert_close(arrived[0], drawn, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 8.0])
@pytest.mark.parametrize("teacher_steps", [8, 500])
@torch.no_grad()
def test_a_student_learns_at_the_levels_that_it_draws_at(grammar, shift: float, teacher_steps: int) -> None:
    """Also where a shift and many steps leave the teacher fewer levels between them than it has steps."""
    process = Process(DiffusionConfig(prediction="x0", weighting="v", shift=shift))
    model = randomised(tiny())
    goal = DistillationObjective(ObjectiveConfig(), process, 0, model, grammar, DistilConfig(4, teacher_steps, 1.0))
    generator = torch.Generator().manual_seed(0)
    levels = {goal.sample_timestep(generator, 8, 8, None) for _ in range(64)}
    assert levels == set(Sampler(process, SamplerConfig("ddim", 4)).timesteps)
    seen: set[int] = set()

    class Watched(Transfusion):
        def forward(self, *arguments):
            seen.update(arguments[6].tolist())
            return super().forward(*arguments)

    goal.teacher = Watched(model.config).initialise(0)
    noised = goal.noise(collate([Document([Text((10,)), Image(latent(8, 8))], sample=1)], grammar))
    grid = (*Sampler(process, SamplerConfig("ddim", 4)).timesteps, 0)
    start = grid.index(int(noised.timesteps[0]))
    assert max(seen) == grid[start], "the teacher begins where the student does"
    assert min(seen) >= max(1, grid[start + 1])
    assert all(bool(target.isfinite().all()) for target in noised.targets)


# --- a run ------------------------------------------------------------------------------------------------------------


def recipe(start: Path | str, steps: int = 4, **changes: object) -> Recipe:
    base = tiny_recipe()
    data = replace(base.data, world=WorldConfig(size=16, nouns=4, max_objects=1), batch_size=8)
    loop = replace(base.loop, steps=steps, checkpoint_every=2, ema_decay=0.5, sample_every=0)
    settings = {"device": "cpu", "precision": "float32", "start": str(start), "distil": DistilConfig(2), **changes}
    return replace(base, data=data, loop=loop, **settings)


def begun(wanted: Recipe, folder: Path) -> Trainer:
    """The trainer of a run in `folder`, resumed if it has begun."""
    trainer = build_trainer(open_run(wanted, folder), folder)
    trainer.restore()
    return trainer


@pytest.mark.parametrize("way", [{}, {"lora": LoRAConfig(4)}], ids=["whole", "lora"])
def test_resumed_is_straight(way, served: Path, tmp_path: Path) -> None:
    straight = begun(recipe(served, **way), tmp_path / "straight")
    straight.run()
    stopped = begun(recipe(served, **way), tmp_path / "stopped")
    for _ in range(2):
        stopped.train_step(stopped.average)
    stopped.save()
    resumed = begun(recipe(served, **way), tmp_path / "stopped")
    assert resumed.step == 2
    resumed.run()
    assert_equal(tensors(resumed), tensors(straight))
    assert resumed.totals["flops"] == straight.totals["flops"]


def test_what_the_teacher_draws_with_is_recorded(served: Path) -> None:
    found, weights = resolve(recipe(served)).recipe, sha256(served / "model.safetensors")[:16]
    assert found.distil == DistilConfig(2, 20, 3.0, None, weights)  # the export's own default
    assert found.generation.sampler == SamplerConfig("ddim", 2)
    assert found.generation.guidance_scale == 1
    assert found.data.pairs.image_first_max_timestep == 0
    assert resolve(found).recipe == found
    assert resolve(recipe(served, distil=DistilConfig(3))).recipe.distil.teacher_steps == 21
    own = resolve(recipe(served, distil=DistilConfig(2, 6, 1.5, (0.2, 0.9)))).recipe
    assert own.distil == DistilConfig(2, 6, 1.5, (0.2, 0.9), weights)
    interval_alone = resolve(recipe(served, distil=DistilConfig(2, guidance_interval=(0.2, 0.9)))).recipe
    assert interval_alone.distil == DistilConfig(2, 20, 3.0, (0.2, 0.9), weights)


def test_a_run_keeps_the_teacher_that_it_began_with(served: Path, tmp_path: Path) -> None:
    teacher, run_folder = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(served, teacher)
    first = open_run(recipe(teacher), run_folder)
    assert open_run(recipe(teacher), run_folder).recipe == first.recipe
    weights = load_file(teacher / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, teacher / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json: distil\.teacher_weights: this run has '[0-9a-f]{16}', the "):
        open_run(recipe(teacher), run_folder)
    with pytest.raises(UserError, match=r"distil\.teacher_weights: expected .*, as the run began, found [0-9a-f]{16}$"):
        resolve(first.recipe)
    config = json.loads((run_folder / "config.json").read_text())
    del config["distil"]["teacher_weights"]  # as before recipes named them
    (run_folder / "config.json").write_text(json.dumps(config))
    assert open_run(recipe(teacher), run_folder).recipe.distil.teacher_weights == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"guidance_interval": (0.9, 0.2)},
            "distil.guidance_interval: expected shares 0 <= low <= high <= 1, found",
        ),
        (
            {"guidance_interval": (0.0, 1.5)},
            "distil.guidance_interval: expected shares 0 <= low <= high <= 1, found",
        ),
        ({"guidance_scale": -1.0}, "distil.guidance_scale: expected at least 0, found -1.0"),
    ],
)
def test_guidance_out_of_range_is_refused(values, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        DistilConfig(2, **values)


def test_the_export_draws_in_few_steps_and_says_so(served: Path, tmp_path: Path, capsys) -> None:
    trained = train(recipe(served), tmp_path / "run")
    assert trained.export is not None
    pipe = transfuse.load(str(trained.export))
    assert str(pipe.exported.distilled) == "draws in 2 steps without guidance what took its teacher 20 guided by 3"
    assert pipe.exported.distilled.steps == 2
    assert pipe.exported.distilled.teacher == transfuse.load(str(served)).exported.fingerprint
    request = pipe.request(["a crab"])
    assert (request.sampler, request.guidance_scale) == (SamplerConfig("ddim", 2), 1.0)
    image = pipe("a crab", generator=3).images[0]
    before = pipeline_of(trained.run, trained.trainer.averaged())("a crab", generator=3).images[0]
    assert np.array_equal(image, before)
    assert "draws in 2 steps without guidance" in (trained.export / "README.md").read_text()
    theirs = relayout(trained.export, tmp_path / "theirs", "diffusers")
    back = relayout(theirs, tmp_path / "back", "transfuse")
    for folder in (theirs, back):
        again = transfuse.load(str(folder))
        assert again.exported.distilled == pipe.exported.distilled
        assert np.array_equal(again("a crab", generator=3).images[0], image)
    assert run(["generate", "a crab", "--draw", "force", "--model", str(back), "--out", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert "draws in 2 steps without guidance" in printed.err
    assert json.loads(printed.out)["steps"] == 2


def test_a_student_can_be_a_teacher(served: Path, tmp_path: Path) -> None:
    first = train(recipe(served, 1, distil=DistilConfig(4, 8)), tmp_path / "four")
    second = resolve(recipe(str(first.export), 1, distil=DistilConfig(2)))
    assert second.recipe.distil == DistilConfig(2, 4, 1.0, None, second.recipe.distil.teacher_weights)


def test_a_command_distils_a_run_on_its_own_data(tmp_path: Path) -> None:
    base = replace(recipe("", 1, distil=DistilConfig()), preset="tiny")
    teacher = train(base, tmp_path / "teacher").export
    words = ["distil", str(teacher), "--steps", "3", "--run", str(tmp_path / "student"), "--loop.steps", "1"]
    words += ["--distil.teacher-steps", "6", "--data.batch-size", "4"]
    assert run(words) == 0
    made = json.loads((tmp_path / "student" / "config.json").read_text())
    assert made["data"]["world"] == {**made["data"]["world"], "size": 16, "nouns": 4}
    distil = {"steps": 3, "teacher_steps": 6, "guidance_scale": 2.0, "guidance_interval": None}
    assert made["distil"] == {**distil, "teacher_weights": sha256(teacher / "model.safetensors")[:16]}
    assert run(words) == 0, "the same command finds the run finished"
    student = transfuse.load(str(tmp_path / "student" / "export")).exported
    assert student.vocabulary == transfuse.load(str(teacher)).exported.vocabulary
    assert student.autoencoder.fingerprint == transfuse.load(str(teacher)).exported.autoencoder.fingerprint


def test_the_bundled_model_is_distilled_by_its_preset() -> None:
    found = student_of("small-64")
    assert found.start == "small-64"
    assert found.data == preset("small-64").data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": ""}, "distil.steps: expected 0 without a teacher"),
        ({"distil": DistilConfig(4, 10)}, "distil.teacher_steps: expected a multiple of the student's 4"),
        ({"distil": DistilConfig(4, 1004)}, "at most 1000, found 1004"),
    ],
)
def test_wrong_settings_are_one_line(served: Path, changes, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        resolve(replace(recipe(served), **changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("network", "prediction", "named"), [({}, "epsilon", "epsilon"), ({"images": "none"}, "x0", "none")]
)
def test_models_that_few_steps_cannot_draw_with_are_refused(tokenizer, tmp_path, network, prediction, named) -> None:
    made = exported(tokenizer, **network)
    parts = made.model.config, DiffusionConfig(prediction=prediction), tokenizer, made.autoencoder, 8, made.generation
    save_export(tmp_path / "e", made.model.state_dict(), *parts, "a model")
    with pytest.raises(UserError, match=f"expected a model that predicts x0 or v.*, found {named}"):
        resolve(recipe(tmp_path / "e"))


def test_an_export_without_a_recipe_needs_a_preset(served: Path, capsys) -> None:
    assert run(["distil", str(served)]) == 2
    assert "preset: expected a preset, whose data it learns from, found ''" in capsys.readouterr().err
    assert run(["distil"]) == 2
    assert "distil: expected an export folder, found none" in capsys.readouterr().err
