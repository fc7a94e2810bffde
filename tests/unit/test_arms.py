"""The three arms of a comparison train on the same stream: Transfusion, Chameleon and a text-only Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import KeepsGradients, open_tiny

from emoji_scenes import World, caption, glosses
from transfuse.autoencoders import Pixels, VQTokenizer, open_autoencoder
from transfuse.data import StepLoader
from transfuse.errors import UserError
from transfuse.recipes import Recipe, preset
from transfuse.rng import generator_for
from transfuse.runs import resolve
from transfuse.sequence import Document, Text, Tokenizer, layout_document
from transfuse.train import build_trainer, export_run
from transfuse.training import Trainer, read
from transfuse.training.metrics import Average

ARMS = ("latents", "codes", "none")
BLOCK = 32
"""scenes a network encodes together"""


def arm(images: str, **data: object) -> Recipe:
    """The preset "tiny", for Transfusion as it is (pixels, 16 patches), the others with as little changed as can be."""
    recipe = preset("tiny")
    model = recipe.model
    if images == "codes":
        data = {"autoencoder": "vq-f4-small", **data}
        model = replace(
            model, images="codes", codebook_size=1024, patch_size=1, image_attention="causal", patch_positions="none"
        )
    if images == "none":
        model = replace(model, images="none")
    return replace(
        recipe,
        model=model,
        data=replace(recipe.data, **data),
        precision="float32",
        device="cpu",  # type: ignore[arg-type]
    )


Build = Callable[[Recipe, str], Trainer]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that builds the trainer of a run folder of this name, resumed if it has begun."""

    def make(recipe: Recipe, name: str) -> Trainer:
        trainer = build_trainer(open_tiny(recipe, tmp_path / name), tmp_path / name)
        trainer.restore()
        return trainer

    return make


def loader(trainer: Trainer) -> StepLoader:
    assert isinstance(trainer.load, StepLoader)
    return trainer.load


def kind(document: Document) -> list[object]:
    """Order of its parts, ids of its text, and what of it is learned: all but the picture."""
    parts = [
        ("text", part.ids, part.predict) if isinstance(part, Text) else ("image", part.target, part.max_timestep)
        for part in document.parts
    ]
    return [document.sample, document.closed, document.predict, parts]


def test_every_arm_sees_the_same_stream(build: Build, tmp_path: Path) -> None:
    """Sample i is one document: its text, its order, its caption dropped or not, and its scene, counted here again."""
    streams = {
        images: loader(build(arm(images, share_of="documents", text_share=0.5), images)).document for images in ARMS
    }
    recipe, tokenizer = arm("latents"), Tokenizer.load(tmp_path / "latents" / "tokenizer.json")
    world, texts = World(recipe.data.world), glosses("train")
    order = torch.randperm(len(texts), generator=generator_for(recipe.seed, "texts", 0))
    vq, pairs, orders = VQTokenizer(open_autoencoder("vq-f4-small")), 0, {"draw": 0, "dropped": 0, "caption": 0}
    block: tuple[int, torch.Tensor] = (-1, torch.empty(0))
    for sample in range(240):
        transfusion, chameleon, llama = (streams[images](sample) for images in ARMS)
        assert transfusion is not None
        assert chameleon is not None
        assert kind(transfusion) == kind(chameleon)
        if not transfusion.images:
            assert llama is not None
            assert kind(llama) == kind(transfusion)
            (part,) = transfusion.parts
            assert isinstance(part, Text)
            assert part.ids == tokenizer.encode(texts[order[sample - pairs]])
            continue
        assert llama is None, "left out, and nothing in its place"
        scene = world.scene(pairs)
        words = [part.ids for part in transfusion.parts if isinstance(part, Text)]
        assert words in ([], [tokenizer.encode(caption(scene, pairs))])
        orders["dropped" if not words else "draw" if isinstance(transfusion.parts[0], Text) else "caption"] += 1
        if pairs // BLOCK != block[0]:
            numbers = range(pairs, pairs + BLOCK)
            block = pairs // BLOCK, vq.encode(np.stack([world.render(world.scene(n)) for n in numbers]))
        (picture,), (codes,) = transfusion.images, chameleon.images
        assert (Pixels().decode(picture.latent[None])[0] == world.render(scene)).all()
        assert torch.equal(codes.latent, block[1][pairs % BLOCK])
        pairs += 1
    assert pairs == 120
    assert min(orders.values()) > 3
    for sample in range(pairs * 2, 2010):  # on past the end of the pattern
        llama = streams["none"](sample)
        if sample > 1990:
            transfusion, chameleon = streams["latents"](sample), streams["codes"](sample)
            assert transfusion is not None
            assert chameleon is not None
            assert kind(transfusion) == kind(chameleon)
            if llama is None:
                (picture,) = transfusion.images
                assert (Pixels().decode(picture.latent[None])[0] == world.render(world.scene(pairs))).all()
            else:
                assert kind(llama) == kind(transfusion)
                assert llama.parts == [Text(tokenizer.encode(texts[order[sample - pairs]]))]
        pairs += llama is None


def test_texts_come_in_the_same_step(build: Build) -> None:
    """And what a step learns of text is the same in every arm, but for the captions."""
    steps = {}
    for images in ARMS:
        load = loader(build(arm(images, share_of="documents", text_share=0.4, accumulate=2), images))
        steps[images] = [load(step) for step in range(6)]
    left_out = 0
    for latents, codes, texts in zip(*steps.values(), strict=True):
        for a, b, c in zip(latents, codes, texts, strict=True):
            assert a.samples == b.samples
            ends, pictured = np.cumsum(a.documents), {sample for sample, _ in a.noise_ids}
            alone = tuple(sample for sample in a.samples if sample not in pictured)
            assert c.samples == (alone or (-1,))
            left_out += len(pictured)
            ids = [
                a.input_ids[end - length : end].tolist()
                for sample, end, length in zip(a.samples, ends, a.documents, strict=False)
                if sample in alone
            ]
            ends = np.cumsum(c.documents)
            assert (
                ids == [c.input_ids[e - n : e].tolist() for e, n in zip(ends, c.documents, strict=True)][: len(alone)]
            )
            if not alone:
                assert c.quantities["text_targets"] == 0
            assert a.quantities["text_targets"] == b.quantities["text_targets"]
            assert a.quantities["images"] == b.quantities["images"] == len(pictured)
    assert left_out > 20


@pytest.mark.parametrize("images", ["latents", "codes"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_shares_of_positions(images: str, share: float, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a picture takes: 16 patches, or 64 codes."""
    monkeypatch.setattr(VQTokenizer, "encode", lambda self, images: torch.zeros(len(images), 8, 8, dtype=torch.int64))
    load, positions = loader(build(arm(images, text_share=share), "run")), {True: 0, False: 0}
    for sample in range(1000):
        document = load.document(sample)
        assert document is not None
        layout = layout_document(document, load.form)
        assert sum(span.end - span.start for span in layout.spans) in (0, 16 if images == "latents" else 64)
        positions[bool(document.images)] += len(layout)
    assert positions[False] / sum(positions.values()) == pytest.approx(share, abs=0.02)


def test_text_alone_is_all_text_by_positions(build: Build) -> None:
    """Nothing is left out, and the definitions come in the order in which the other arms read them."""
    alone = loader(build(arm("none", text_share=0.2), "none")).document
    mixed = loader(build(arm("latents", text_share=0.2), "latents")).document
    texts_of_mixed = [document for sample in range(400) if not (document := mixed(sample)).images]  # type: ignore[union-attr]
    assert len(texts_of_mixed) > 20
    for number, document in enumerate(texts_of_mixed):
        text_alone = alone(number)
        assert text_alone is not None
        assert text_alone.sample == number
        assert text_alone.parts == document.parts


def straight_and_resumed(recipe: Recipe, build: Build, cut: int, steps: int = 8) -> tuple[Trainer, Trainer]:
    """A run of `steps` steps, and one that was saved at step `cut` and resumed."""
    recipe = replace(recipe, loop=replace(recipe.loop, steps=steps, checkpoint_every=3, log_every=3))
    straight = build(recipe, "straight")
    straight.run()
    first, average = build(recipe, "resumed"), Average()
    while first.step < cut:
        first.train_step(average)
    first.save()
    resumed = build(recipe, "resumed")
    assert resumed.step == cut
    resumed.run()
    return straight, resumed


@pytest.mark.parametrize("cut", [1, 5])
@pytest.mark.parametrize(
    ("images", "share_of"),
    [("codes", "positions"), ("none", "documents"), ("none", "positions"), ("latents", "documents")],
)
def test_straight_equals_resumed(images: str, share_of: str, cut: int, build: Build) -> None:
    """Bit for bit, dropout included, with all of the stability set."""
    recipe = arm(images, share_of=share_of, text_share=0.4)
    model = replace(recipe.model, dropout=0.1, qk_norm=True, norm_order="swin")
    recipe = replace(recipe, model=model, objective=replace(recipe.objective, z_weight=1e-3))
    straight, resumed = straight_and_resumed(recipe, build, cut)
    assert straight.step == resumed.step == 8
    saved = [read(trainer.checkpoints.newest()[0]) for trainer in (straight, resumed)]
    assert saved[0] is not None
    assert saved[1] is not None
    for group, tensors in saved[0].tensors.items():
        assert tensors.keys() == saved[1].tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, saved[1].tensors[group][name]), (group, name)
    plain = build(replace(recipe, model=replace(model, dropout=0.0)), "plain")
    for name in ("positions", "images", "text_targets"):
        assert straight.totals[name] == resumed.totals[name]
    average = Average()
    plain.train_step(average)
    first = build(recipe, "first")
    first.train_step(average)
    assert not all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), first.model.parameters(), strict=True))


def gradients(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the gradients of a first step that changes no weight, and the means it logs."""
    trainer.optimizer = KeepsGradients(trainer.model)  # type: ignore[assignment]
    trainer.optimizer_config = replace(trainer.optimizer_config, learning_rate=0.0, final_learning_rate=0.0)
    average = Average()
    trainer.train_step(average)
    return trainer.optimizer.kept, average.means()  # type: ignore[attr-defined]


@pytest.mark.parametrize("images", ["codes", "none", "latents"])
def test_a_split_step_is_the_whole_one(images: str, build: Build) -> None:
    """Text alone: in parts of one sample most parts have nothing left to learn."""
    results = []
    for accumulate in (1, 4, 8):
        recipe = arm(images, share_of="documents", text_share=0.4, accumulate=accumulate)
        recipe = replace(recipe, objective=replace(recipe.objective, z_weight=0.1))
        results.append(gradients(build(recipe, str(accumulate))))
    whole, means = results[0]
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-3
    for split, split_means in results[1:]:
        assert split.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
        assert split_means.keys() == means.keys()
        for name, mean in means.items():
            assert split_means[name] == pytest.approx(mean, rel=1e-5), name


def test_a_step_without_any_text_is_finite(build: Build) -> None:
    """All samples of it are left out: nothing is learned, nothing breaks."""
    trainer = build(arm("none", share_of="documents", text_share=0.001), "run")
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    kept, means = gradients(trainer)
    assert all(bool((gradient == 0).all()) for gradient in kept.values())
    assert "tokens" not in means
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("images", ["codes", "none"])
def test_a_run_is_exported(images: str, build: Build, tmp_path: Path) -> None:
    from transfuse.inference import TransfusionPipeline

    recipe = arm(images)
    trainer = build(recipe, "run")
    trainer.train_step(Average())
    folder = export_run(resolve(recipe, trainer.folder), trainer, tmp_path / "export")
    pipe = TransfusionPipeline.from_pretrained(folder)
    if images == "codes":
        assert pipe("a crab", generator=0).images[0].size == (32, 32)
    else:
        assert isinstance(pipe.generate("crab:").text, str)


def test_recipes_that_do_not_fit() -> None:
    settled = resolve(replace(arm("codes"), model=replace(arm("codes").model, codebook_size=7))).recipe
    assert settled.model.codebook_size == 1024, "the autoencoder's"
    with pytest.raises(UserError, match="no such thing"):  # its export carries one, and should not fail at the end
        resolve(arm("none", autoencoder="no such thing"))
    for autoencoder, kind_found in (("pixels", "pixels"), ("kl-f4-small", "kl-f4-small")):
        with pytest.raises(UserError, match=f'data.autoencoder: expected one with a codebook, found "{kind_found}"'):
            resolve(arm("codes", autoencoder=autoencoder))
