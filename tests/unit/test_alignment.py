"""Alignment of images' hidden states with another network's features (REPA): its loss, gradients, runs and mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randomised, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import transfuse
from transfuse.autoencoders import DeferredEncoder, Pixels, images_to_tensor
from transfuse.autoencoders.features import MobileNetV2, load_features
from transfuse.data.sources import document_images
from transfuse.diffusion import DiffusionConfig, Process
from transfuse.errors import UserError
from transfuse.model import Transfusion
from transfuse.model.transfusion import AlignmentHead
from transfuse.recipes import Recipe, preset
from transfuse.runs import open_run, resolve
from transfuse.sequence import Batch, Document, Text, Tokenizer, collate
from transfuse.train import build_trainer, train
from transfuse.training import LossSums, ObjectiveConfig, TransfusionObjective
from transfuse.training.checkpoint import read

VARIANTS: list[dict[str, Any]] = [{}, {"experts": "all"}, {"timestep": "adaln", "positions": "2d"}, {"adapter": "unet"}]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with random weights of MobileNetV2, under which signals do not die."""
    generator = torch.Generator().manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "mobile.safetensors"
    state = {name: x for name, x in MobileNetV2().state_dict().items() if not name.endswith("num_batches_tracked")}
    for name, value in state.items():
        if value.dim() == 4:
            fan_in = value[0].numel()
            state[name] = torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5
    save_file(state, path)
    return path


def averages(pixels: Tensor) -> Tensor:
    """A teacher of patches of 2 x 2 pixels: their mean colour, and 1."""
    means = F.avg_pool2d(images_to_tensor(pixels), 2).permute(0, 2, 3, 1)
    return torch.cat([means, torch.ones_like(means[..., :1])], dim=-1)


def aligned(model: Transfusion, layer: int = 1, features: int = 4) -> Transfusion:
    model.image_alignment = AlignmentHead(model.config.d_model, layer, features)
    for number, weight in enumerate(model.image_alignment.parameters()):
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(number))
    return model


def objective(weight: float = 0.5, teacher: Any = averages) -> TransfusionObjective:
    process = Process(DiffusionConfig(prediction="x0"))
    return TransfusionObjective(ObjectiveConfig(align_weight=weight), process, 7, Pixels(), teacher)


def documents() -> list[Document]:
    """Images of two sizes, noised, shown clean, and talked about; and text alone. Images are still pixels."""
    deferred, made = DeferredEncoder(Pixels()), []
    for sample, (rows, columns) in enumerate([(4, 8), (4, 4), (4, 8)]):
        generator = torch.Generator().manual_seed(sample)
        pixels = torch.randint(0, 256, (1, rows, columns, 3), dtype=torch.uint8, generator=generator)
        image = replace(document_images(pixels.numpy(), deferred)[0], target=sample != 1)
        parts = [image, Text((12,))] if sample else [Text((10, 11)), image]
        made.append(Document(parts, sample=sample))
    return [*made, Document([Text((13, 14))], sample=3)]


def slow(model: Transfusion, goal: TransfusionObjective, batch: Batch) -> Tensor:
    """The sum of negative cosines, patch by patch, from what reaches the block after the aligned one."""
    assert model.image_alignment is not None
    reached: list[Any] = []
    block = model.transformer.blocks[model.image_alignment.layer]
    hook = block.register_forward_pre_hook(lambda module, inputs: reached.append(inputs[0]))
    goal.loss(model, batch)
    hook.remove()
    states = reached[0].image if model.config.experts != "shared" else reached[0][batch.patches]
    features = model.image_alignment(states)
    pixels = list(batch.pixels)
    for copy, original in batch.copies:
        pixels.insert(copy, pixels[original])
    targets = torch.cat([averages(image[None]).reshape(-1, 4) for image in pixels])
    return -torch.stack([torch.dot(a, b) / (a.norm() * b.norm()) for a, b in zip(features, targets, strict=True)]).sum()


def gradients(model: Transfusion, sums: LossSums, term: int) -> dict[str, Tensor]:
    model.zero_grad()
    sums.losses[term].backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("clean_copy", [False, True])
def test_the_loss_is_the_mean_cosine_of_patches(
    tokenizer: Tokenizer, variant: dict[str, Any], clean_copy: bool
) -> None:
    model, goal = aligned(randomised(tiny(**variant))), objective()
    fmt = replace(model.config.sequence_format(tokenizer), clean_copy=clean_copy)
    batch = collate(documents(), fmt)
    assert len(batch.copies) == clean_copy
    assert goal.names == ("text", "image", "align")
    assert goal.weights[2] == 0.5
    assert goal.counts(batch) == (len(batch.targets), 2, len(batch.patches))
    sums = goal.loss(model, batch)
    torch.testing.assert_close(sums.losses[2], slow(model, goal, batch), atol=1e-4, rtol=1e-5)
    prepared = goal.loss(model, goal.prepare(batch))
    assert torch.equal(prepared.losses, sums.losses), "the same ahead of the step"
    each = [collate([document], fmt) for document in documents()]
    apart = torch.stack([goal.loss(model, one).losses for one in each]).sum(0)
    torch.testing.assert_close(sums.losses, apart, atol=1e-4, rtol=1e-4)
    assert tuple(map(sum, zip(*map(goal.counts, each), strict=True))) == goal.counts(batch)


def test_equal_features_are_the_least_loss(tokenizer: Tokenizer) -> None:
    """A head that gives the teacher's direction, whatever its length, loses -1 a patch; and nothing pulls at it."""
    model, goal = aligned(randomised(tiny())), objective(teacher=lambda pixels: averages(pixels) * 0 + 3)
    batch = collate(documents(), model.config.sequence_format(tokenizer))
    assert model.image_alignment is not None
    with torch.no_grad():
        model.image_alignment.outer.weight.zero_()
        model.image_alignment.outer.bias.fill_(0.2)  # type: ignore[union-attr]
    sums = goal.loss(model, batch)
    assert sums.losses[2].item() == pytest.approx(-len(batch.patches), rel=1e-6)
    assert max(gradient.abs().max() for gradient in gradients(model, sums, 2).values()) < 1e-5


@pytest.mark.parametrize("layer", [1, 2])
def test_blocks_above_learn_nothing_from_it(tokenizer: Tokenizer, layer: int) -> None:
    model, goal = aligned(randomised(tiny(n_layers=3)), layer), objective()
    batch = collate(documents(), model.config.sequence_format(tokenizer))
    found = gradients(model, goal.loss(model, batch), 2)
    for number in range(3):
        reached = [g for name, g in found.items() if name.startswith(f"transformer.blocks.{number}.") and g.any()]
        assert bool(reached) == (number < layer)
    assert found["image_alignment.inner.weight"].any()
    assert found["image_adapter.in_proj.weight"].any()
    assert "image_adapter.out_proj.weight" not in found or not found["image_adapter.out_proj.weight"].any()


def test_without_a_teacher_nothing_changes(tokenizer: Tokenizer) -> None:
    plain, with_head = randomised(tiny()), aligned(randomised(tiny()))
    batch = collate(documents(), plain.config.sequence_format(tokenizer))
    without, goal = objective(teacher=None), objective()
    assert without.names == ("text", "image")
    a, b = without.loss(plain, batch), goal.loss(with_head, batch)
    assert torch.equal(a.losses, b.losses[:2])


def test_an_image_that_fills_up_is_not_aligned(tokenizer: Tokenizer) -> None:
    """But it passes through the head, which a sharded network must use on every rank."""
    model, goal = aligned(randomised(tiny())), objective()
    fmt = model.config.sequence_format(tokenizer)
    batch = collate([Document([Text((12,))], sample=5)], fmt, padding_image=torch.zeros(3, 2, 2))
    sums = goal.loss(model, batch)
    assert goal.counts(batch)[1:] == (0, 0)
    assert sums.losses[2].item() == 0
    assert not gradients(model, sums, 2)["image_alignment.outer.weight"].any()
    text = collate([Document([Text((12,))], sample=5)], fmt)
    assert goal.loss(model, text).losses[2].item() == 0


@pytest.mark.parametrize("side", [8, 16])
def test_features_are_those_of_the_patches(weights: Path, side: int) -> None:
    """One vector a patch, in its place: what changes in one column of patches changes those near it most."""
    network = load_features(weights)
    pixels = torch.randint(0, 256, (2, 4 * side, 6 * side, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    found = network.patches(pixels, side)
    assert found.shape == (2, 4, 6, 96)
    if side == 16:  # the network's own grid: nothing is resized
        expected = network.taps(images_to_tensor(pixels))[-2]
        torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-4)
    for near, far, column in ((slice(3, 6), slice(0, 2), 4), (slice(0, 3), slice(4, 6), 1)):
        changed = pixels.clone()
        changed[:, :, column * side : (column + 1) * side] = 255
        moved = (network.patches(changed, side) - found).norm(dim=-1)
        assert moved[:, :, near].mean() > 1.5 * moved[:, :, far].mean()


# --- runs ---


def recipe(weights: Path, **loop: Any) -> Recipe:
    base = preset("tiny")
    goal = replace(base.objective, align_weight=0.5, align_layer=1, align_teacher=str(weights))
    return replace(base, objective=goal, loop=replace(base.loop, steps=2, checkpoint_every=1, log_every=1, **loop))


Change = Callable[[Recipe], Recipe]
CHANGES: dict[str, Change] = {
    "latents": lambda made: replace(
        made,
        model=replace(made.model, patch_size=2),
        diffusion=replace(made.diffusion, clip_x0=None),
        data=replace(made.data, autoencoder="kl-f4-small"),
    ),
    "packed": lambda made: replace(made, data=replace(made.data, row_length=192, batch_size=2, accumulate=2)),
    "clean copies, two towers, Muon": lambda made: replace(
        made,
        model=replace(made.model, experts="all"),
        data=replace(made.data, context="clean-copy"),
        optimizer=replace(made.optimizer, name="muon"),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_run_resumes_bit_for_bit_and_its_export_has_no_head(tmp_path: Path, weights: Path, change: Change) -> None:
    train(change(recipe(weights)), tmp_path / "straight")
    for outcome in ("stopped", "finished"):  # too short a session for a second step
        session = {"session_seconds": 1e-9} if outcome == "stopped" else {}
        assert train(change(recipe(weights, **session)), tmp_path / "resumed").outcome == outcome
    straight, resumed = (read(tmp_path / name / "checkpoints/step-00000002") for name in ("straight", "resumed"))
    for group, tensors in straight.tensors.items():
        assert any("image_alignment." in name for name in tensors)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed.tensors[group][name]), name
    export = tmp_path / "straight/export"
    exported = load_file(export / "model.safetensors")
    assert not any("alignment" in name for name in exported)
    assert transfuse.load(export)("a crab", generator=1).images
    again = replace(change(recipe(weights)), start=str(export))
    begun = dict(build_trainer(open_run(again, tmp_path / "again"), tmp_path / "again").model.named_parameters())
    assert begun.keys() - exported.keys() == {name for name in begun if name.startswith("image_alignment.")}
    assert begun["image_alignment.inner.weight"].any()
    for name, weight in exported.items():
        assert torch.equal(begun[name], weight), name
    lines = (tmp_path / "straight/metrics.jsonl").read_text()
    assert '"align": -' in lines or '"align": 0.' in lines


def test_a_worker_prepares_the_same_batches(tmp_path: Path, weights: Path) -> None:
    made = CHANGES["latents"](recipe(weights))
    run = open_run(made, tmp_path)
    here = build_trainer(run, tmp_path).load(1)
    ahead = replace(run, recipe=replace(run.recipe, data=replace(made.data, workers=1)))
    trainer = build_trainer(ahead, tmp_path)
    there = trainer.load(1)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.features is not None
        assert theirs.features is not None
        assert not len(ours.pixels)
        torch.testing.assert_close(ours.features, theirs.features, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(torch.stack(list(ours.latents)), torch.stack(list(theirs.latents)))


def test_other_weights_begin_as_without(tmp_path: Path, weights: Path) -> None:
    """And so do its documents: the two runs differ by the loss alone."""
    made = recipe(weights)
    plain = replace(made, objective=replace(made.objective, align_weight=0.0))
    trainers = [
        build_trainer(open_run(each, folder), folder)
        for each, folder in ((made, tmp_path / "a"), (plain, tmp_path / "b"))
    ]
    weights_of = [dict(trainer.model.named_parameters()) for trainer in trainers]
    assert weights_of[0].keys() > weights_of[1].keys()
    for name, weight in weights_of[1].items():
        assert torch.equal(weight, weights_of[0][name]), name
    ours, theirs = (trainer.load(0)[0] for trainer in trainers)
    for field in ("input_ids", "timesteps", "patches"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))
    for field in ("latents", "noise"):
        for a, b in zip(getattr(ours, field), getattr(theirs, field), strict=True):
            assert torch.equal(a, b)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": {"images": "none"}, "data": {"text_share": 1.0}}, r'align_weight: expected 0 with model.images "none"'),
    ({"objective": {"align_layer": 3}}, r"align_layer: expected at most model.n_layers \(2\), found 3"),
    ({"parallel": {"tensor": 2}}, r"align_weight: expected 0 with parallel.tensor 2, found 0.5"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_settings_that_do_not_fit_are_one_line(weights: Path, changes: dict[str, Any], message: str) -> None:
    made = recipe(weights)
    for part, fields in changes.items():
        made = replace(made, **{part: replace(getattr(made, part), **fields)})
    with pytest.raises(UserError, match=rf"^objective.{message}"):
        resolve(made)


def test_a_missing_teacher_is_one_line(tmp_path: Path, weights: Path) -> None:
    made = recipe(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"none.pth: expected the weights of a network, found no file$"):
        open_run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for name, value in (("align_weight", -0.1), ("align_layer", 0)):
        with pytest.raises(ValueError, match=rf"^objective.{name}: expected at least"):
            ObjectiveConfig(**{name: value})
