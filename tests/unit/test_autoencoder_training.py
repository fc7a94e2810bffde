from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import transfuse
from transfuse.autoencoders import ImageAutoencoder, load_autoencoder, save_autoencoder
from transfuse.autoencoders.features import Features, MobileNetV2
from transfuse.autoencoders.network import PatchCritic
from transfuse.errors import UserError
from transfuse.recipes import AutoencoderRecipe, preset
from transfuse.runs import resolve, settle_device
from transfuse.train import train
from transfuse.train_autoencoder import (
    FolderImages,
    build_autoencoder_trainer,
    resolve_autoencoder,
    train_autoencoder,
    unseen_world,
)
from transfuse.training.autoencoder_loss import AutoencoderInTraining, AutoencoderObjective, ImageBatch, ImageLoader
from transfuse.training.metrics import Average

pytestmark = pytest.mark.xdist_group("autoencoder_training")  # its fixtures are made once


@pytest.fixture(scope="module")
def features() -> Features:
    torch.manual_seed(0)
    return Features(MobileNetV2().eval().requires_grad_(False))


def recipe(kind: str = "kl", **objective) -> AutoencoderRecipe:
    base = preset(f"{kind}-tiny", AutoencoderRecipe)
    return settle_device(replace(base, objective=replace(base.objective, **objective)))


def parts(
    kind: str, features: Features | None = None, step: int = 100, **fields
) -> tuple[AutoencoderInTraining, AutoencoderObjective, ImageBatch]:
    asked = recipe(kind, **fields)
    model = AutoencoderInTraining(asked.model, True, seed=0)
    objective = AutoencoderObjective(asked.objective, kind, 1000, 0, features, features)
    loader = ImageLoader(resolve_autoencoder(asked).image, 4)
    return model, objective, replace(loader(step)[0], step=step)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_term_teaches(kind: str, features: Features) -> None:
    """Each term has a gradient into the networks it is meant for, and into no other."""
    model, objective, batch = parts(kind, features)
    assert objective.counts(batch) == (4,) * len(objective.names)
    bottleneck = {"kl"} if kind == "kl" else {"codebook", "commitment"}
    assert set(objective.names) == {"l1", "perceptual", "identity", "adversarial", "critic"} | bottleneck
    for number, name in enumerate(objective.names):
        model.zero_grad()
        objective.loss(model, batch).losses[number].backward()
        lengths = {
            part: sum(float(p.grad.norm()) for p in module.parameters() if p.grad is not None)
            for part, module in (("autoencoder", model.autoencoder), ("critic", model.critic))
        }
        taught = "critic" if name == "critic" else "autoencoder"
        assert lengths.pop(taught) > 0, name
        assert lengths.popitem()[1] == 0, name


def test_terms_are_least_at_the_truth(features: Features) -> None:
    """Nothing compares better with an image than the image itself."""
    truth = torch.rand(2, 3, 32, 32) * 2 - 1
    for amount in (0.05, 0.5):
        other = (truth + amount * torch.randn_like(truth)).requires_grad_()
        for distance in (lambda a, b: (a - b).abs().flatten(1).mean(1), features.distance):
            assert float(distance(truth, truth).detach().abs().max()) < 1e-6
            found = distance(other, truth)
            assert (found > 0).all()
            (gradient,) = torch.autograd.grad(found.sum(), other)
            assert float(distance(other - 1e-3 * gradient / gradient.abs().max(), truth).sum()) < float(found.sum())


@pytest.mark.parametrize("size", [16, 48])
def test_kl_weighs_what_it_does_in_latent_diffusion(size: int) -> None:
    """An image's loss is sum |x - y| + 1e-6 sum KL there, and that divided by the count of its numbers here."""
    model, objective, _ = parts("kl", adversarial_from=None)
    images = torch.rand(2, 3, size, 2 * size, generator=torch.Generator().manual_seed(size)) * 2 - 1
    losses = dict(
        zip(objective.names, objective.loss(model, ImageBatch(images, (5, 6), 0)).losses.tolist(), strict=True)
    )
    weights = dict(zip(objective.names, objective.weights, strict=True))
    mean, log_variance = model.autoencoder.moments(images).chunk(2, 1)
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    count = 3 * size * 2 * size
    assert count * weights["l1"] == count, "the sum of the absolute differences"
    assert losses["kl"] * weights["kl"] * count == pytest.approx(1e-6 * float(nats.detach().sum()), rel=1e-5)


def test_a_step_that_was_left_out_revives_no_code() -> None:
    """Its vectors, which may not be finite, are forgotten, and so are those of looking for its samples."""
    model, objective, batch = parts("vq", revive_after=1)
    objective.loss(model, replace(batch, images=batch.images * float("nan")))
    objective.nonfinite_samples(model, batch)
    objective.loss(model, batch)
    vectors = objective._vectors[-1]
    model.unused += 1
    objective.after_step(model, 1, [batch])
    found = vectors.movedim(1, -1).flatten(0, -2)
    embedding = model.autoencoder.quantize.embedding.weight
    moved = (embedding[:, None] == found).all(-1).any(1)
    assert moved.any()
    assert embedding.isfinite().all()
    assert objective._vectors == []


def test_the_critic_waits_and_tells_apart() -> None:
    model, objective, batch = parts("kl", step=9)  # adversarial_from is 10
    losses = dict(zip(objective.names, objective.loss(model, batch).losses.tolist(), strict=True))
    assert losses["adversarial"] == losses["critic"] == 0
    counts = dict(zip(objective.names, objective.counts(batch), strict=True))
    assert counts["adversarial"] == counts["critic"] == 0, "no loss of 0 is logged, or taken for what is usual"
    assert counts["l1"] == 4
    assert losses["l1"] > 0
    model, objective, batch = parts("kl")
    optimizer = torch.optim.Adam(model.critic.parameters(), 1e-3)
    number = objective.names.index("critic")
    first = last = float(objective.loss(model, batch).losses[number])
    for _ in range(15):
        optimizer.zero_grad()
        loss = objective.loss(model, batch).losses[number]
        loss.backward()
        optimizer.step()
        last = float(loss)
    assert last < 0.5 * first


def test_the_critic_is_that_of_esser() -> None:
    """PatchGAN of three layers: 70 pixels a side, 2.76M parameters, a score for every 8 pixels."""
    critic = PatchCritic()
    assert sum(p.numel() for p in critic.parameters()) == pytest.approx(2.765e6, rel=1e-3)
    field, stride = 1, 1
    for layer in critic.modules():
        if isinstance(layer, torch.nn.Conv2d):
            field, stride = field + (layer.kernel_size[0] - 1) * stride, stride * layer.stride[0]
    assert (field, stride) == (70, 8)
    for size, scores in ((256, 30), (64, 6), (24, 1)):
        assert critic(torch.zeros(1, 3, size, size)).shape == (1, 1, scores, scores)


def test_an_image_too_small_for_the_critic_is_refused() -> None:
    asked = recipe("kl")
    with pytest.raises(UserError, match=r"data\.world\.size: expected at least 24 for the critic .*, found 16"):
        resolve_autoencoder(replace(asked, data=replace(asked.data, world=replace(asked.data.world, size=16))))


def test_betas_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.critic_betas: expected numbers from 0 to below 1, found"):
        recipe("vq", critic_betas=(0.5, 1.0))


def test_the_critic_has_moments_of_its_own(tmp_path: Path) -> None:
    """Two steps of Adam by hand, each network with its betas and its gradient clipped by its own norm."""
    asked = recipe("kl", adversarial_from=0, critic_betas=(0.3, 0.8))
    asked = replace(asked, optimizer=replace(asked.optimizer, clip=1e-3, betas=(0.7, 0.95), warmup=0))
    trainer = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path)
    names = ["critic.layers.0.weight", "autoencoder.encoder.conv_in.weight"]
    named = dict(trainer.model.named_parameters())
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    lengths = []
    zero_grad = trainer.optimizer.zero_grad

    def keep(set_to_none: bool = True) -> None:
        for name in names:
            gradients[name].append(named[name].grad.clone())
        for part in (trainer.model.critic, trainer.model.autoencoder):
            lengths.append(float(torch.stack([p.grad.norm() for p in part.parameters() if p.grad is not None]).norm()))
        zero_grad(set_to_none)

    trainer.optimizer.zero_grad = keep
    for _ in range(2):
        trainer.train_step(Average())
    assert lengths == pytest.approx([1e-3] * 4, rel=1e-2)
    for name, (first, second) in zip(names, [(0.3, 0.8), (0.7, 0.95)], strict=True):
        mean, square = torch.zeros(()), torch.zeros(())
        for gradient in gradients[name]:
            mean, square = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2
        state = trainer.optimizer.state[named[name]]
        torch.testing.assert_close(state["exp_avg"], mean, atol=1e-9, rtol=1e-4)
        torch.testing.assert_close(state["exp_avg_sq"], square, atol=1e-14, rtol=1e-4)


def test_the_adaptive_weight_is_that_of_the_whole_step(features: Features) -> None:
    """However a step is split, from its means: |gradient of L1 and perceptual| over |gradient of the adversarial|."""
    model, objective, batch = parts("vq", features, perceptual_weight=0.3)
    whole = float(objective.loss(model, batch).details["adaptive_weight"][0]) / 4
    halves = [ImageBatch(batch.images[a:b], batch.samples[a:b], batch.step) for a, b in ((0, 1), (1, 4))]
    objective.before_step(model, halves)
    split = [objective.loss(model, half).details["adaptive_weight"] for half in halves]
    assert [count for _, count in split] == [1, 3]
    assert [float(total) / count for total, count in split] == pytest.approx([whole] * 2, rel=1e-4)
    _, plain, _ = parts("vq", features, perceptual_weight=0.3, adaptive=False)
    losses = dict(zip(plain.names, plain.loss(model, batch).losses / 4, strict=True))
    last = model.autoencoder.decoder.conv_out.weight
    apparent, adversarial = (
        float(torch.autograd.grad(loss, last, retain_graph=True)[0].norm())
        for loss in (losses["l1"] + 0.3 * losses["perceptual"], losses["adversarial"])
    )
    assert whole == pytest.approx(apparent / (adversarial + 1e-4), rel=1e-4)
    alone = float(objective.loss(model, halves[0]).details["adaptive_weight"][0])
    assert alone != pytest.approx(whole, rel=0.01), "the parts alone would have had another"


def test_adaptive_weight_evens_the_gradients() -> None:
    lengths = {}
    for adaptive in (False, True):
        model, objective, batch = parts("kl", adaptive=adaptive)
        losses = objective.loss(model, batch).losses
        last = model.autoencoder.decoder.conv_out.weight
        for name in ("l1", "adversarial"):
            (gradient,) = torch.autograd.grad(losses[objective.names.index(name)], last, retain_graph=True)
            lengths[name, adaptive] = float(gradient.norm())
    assert lengths["adversarial", True] == pytest.approx(lengths["l1", True], rel=0.02)
    assert lengths["adversarial", False] != pytest.approx(lengths["l1", False], rel=0.1)


def test_dead_codes_are_revived() -> None:
    model, objective, batch = parts("vq", revive_after=2)
    codes = model.autoencoder.quantize.embedding.weight
    with torch.no_grad():
        codes[8:] = 1000.0  # nobody will choose them
    for step in (1, 2):
        objective.loss(model, batch)
        objective.after_step(model, step, [batch])
    assert float(codes.max()) < 1000
    vectors = model.autoencoder.moments(batch.images).movedim(1, -1).flatten(0, -2)
    apart = torch.cdist(codes[8:], vectors, compute_mode="donot_use_mm_for_euclid_dist")  # products cancel: 3e-3 off
    assert apart.min(1).values.max() < 1e-3
    with torch.no_grad():
        codes[8:] = 1000.0
    for step in (998, 999, 1000):  # the end of the run is left to settle
        objective.loss(model, batch)
        objective.after_step(model, step, [batch])
    assert float(codes.max()) == 1000


@pytest.mark.parametrize("kind", ["kl", pytest.param("vq", marks=pytest.mark.long)])
def test_straight_is_resumed(kind: str, tmp_path: Path) -> None:
    """With the critic at work and codes being revived: weights, average, moments and counts are the same to the bit."""
    asked = recipe(kind)
    straight = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path / "a")
    straight.run()
    first = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path / "b")
    for _ in range(13):
        first.train_step(Average())
    first.save()
    second = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path / "b")
    assert second.restore()
    assert second.step == 13
    second.run()
    for a, b in (
        (straight.model.state_dict(), second.model.state_dict()),
        (straight.ema.weights, second.ema.weights),
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert straight.totals["images"] == second.totals["images"] == 80
    if kind == "vq":
        assert straight.model.unused.any()


@pytest.mark.parametrize("adversarial_from", [0, 1000])
def test_a_split_step_is_the_same_step(adversarial_from: int, tmp_path: Path) -> None:
    trained = []
    for accumulate in (1, 2):
        asked = recipe("vq", adversarial_from=adversarial_from)
        asked = replace(asked, data=replace(asked.data, accumulate=accumulate), loop=replace(asked.loop, steps=3))
        trainer = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path / str(accumulate))
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), 1.0)  # Adam would blow rounding up
        for _ in range(3):
            trainer.train_step(Average())
        trained.append(trainer.model.state_dict())
    for name, whole in trained[0].items():
        torch.testing.assert_close(whole, trained[1][name], atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A KL and a VQ autoencoder, trained for a moment."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("kl", "vq"):
        _, export = train_autoencoder(preset(f"{kind}-tiny", AutoencoderRecipe), folder / kind)
        assert export == folder / kind / "export"
    return folder


def test_latents_of_an_export_are_normal(runs: Path) -> None:
    for kind in ("kl", "vq"):
        autoencoder = load_autoencoder(runs / kind / "export")
        assert autoencoder.name == f"{kind}-tiny"
        source = resolve_autoencoder(preset(f"{kind}-tiny", AutoencoderRecipe)).image
        latents = autoencoder.encode(np.stack([source(n) for n in range(512)]))
        assert latents.mean((0, 2, 3)).abs().max() < 1e-3
        assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_training_goes_on_from_an_autoencoder(runs: Path, tmp_path: Path) -> None:
    """Its weights are where the run starts; one of another trunk is refused before anything is written."""
    export = runs / "vq" / "export"
    asked = replace(recipe("vq"), start=str(export))
    trainer = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path / "a")
    started = load_autoencoder(export).state_dict()
    assert all((weight == started[name]).all() for name, weight in trainer.model.autoencoder.state_dict().items())
    assert all((trainer.ema.weights[f"autoencoder.{name}"] == weight).all() for name, weight in started.items())
    for change, message in (
        ({"widths": (16, 16)}, r"start: model\.widths: expected \(16, 16\), found \(8, 16\)"),
        ({"codebook_size": 64}, r"start: model\.codebook_size: expected 64, found 32"),
    ):
        with pytest.raises(UserError, match=message):
            train_autoencoder(replace(asked, model=replace(asked.model, **change)), tmp_path / "b")
    with pytest.raises(UserError, match="start: expected a trained autoencoder, found pixels"):
        train_autoencoder(replace(asked, start="pixels"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("quant_conv", [True, False])
def test_channels_are_drawn_again(quant_conv: bool, tmp_path: Path) -> None:
    """Those asked for say something else, with little noise; the others say what they did."""
    base = recipe("kl")
    asked = replace(base, model=replace(base.model, quant_conv=quant_conv, post_quant_conv=quant_conv))
    before = ImageAutoencoder(asked.model).initialise(4)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_autoencoder(tmp_path / "start", before, "start")
    asked = replace(asked, start=str(tmp_path / "start"), redraw=(3, 1))
    model = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path / "run").model.autoencoder
    images = ImageLoader(resolve_autoencoder(asked).image, 4)(0)[0].images
    (mean, log_variance), (was, was_log_variance) = (a.moments(images).chunk(2, 1) for a in (model, before))
    for kept in (0, 2):
        torch.testing.assert_close(mean[:, kept], was[:, kept], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_variance[:, kept], was_log_variance[:, kept], atol=1e-4, rtol=1e-4)
    for drawn in (1, 3):
        both = torch.stack([mean[:, drawn].flatten(), was[:, drawn].flatten()]).detach()
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.9
        assert float(log_variance[:, drawn].detach().mean()) == pytest.approx(-6, abs=1)


@pytest.mark.parametrize(
    ("kind", "start", "redraw", "message"),
    [
        ("kl", None, (0,), "redraw: expected a KL autoencoder to start from, found none"),
        ("vq", "export", (0,), "redraw: expected a KL autoencoder to start from, found a vq one"),
        ("kl", "export", (2, 4), r"redraw: expected channels from 0 to 3, found \(2, 4\)"),
        ("kl", "export", (-1,), r"redraw: expected channels from 0 to 3, found \(-1,\)"),
    ],
)
def test_channels_that_cannot_be_drawn_again(kind, start, redraw, message, runs: Path) -> None:
    start = start and str(runs / kind / start)
    with pytest.raises(UserError, match=message):
        resolve_autoencoder(replace(preset(f"{kind}-tiny", AutoencoderRecipe), start=start, redraw=redraw))


def transfusion(autoencoder: Path | str):
    base = preset("tiny")
    return replace(
        base,
        model=replace(base.model, patch_size=2),
        diffusion=replace(base.diffusion, clip_x0=None),
        data=replace(base.data, autoencoder=str(autoencoder)),
        loop=replace(base.loop, steps=2),
    )


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_transfusion_draws_through_it(kind: str, runs: Path, tmp_path: Path) -> None:
    export = train(transfusion(runs / kind / "export"), tmp_path / "run").export
    pipe = transfuse.load(str(export))
    assert pipe.exported.autoencoder.name == f"{kind}-tiny"
    assert pipe.exported.model.config.latent_channels == pipe.exported.autoencoder.channels
    picture = pipe("a crab", num_inference_steps=2, generator=1).images[0]
    assert picture.size == (32, 32)
    assert isinstance(pipe.caption(picture)[0], str)


def test_the_wrong_autoencoder_is_named(runs: Path, tmp_path: Path) -> None:
    export = train(transfusion(runs / "kl" / "export"), tmp_path / "run").export
    assert export is not None
    train_autoencoder(replace(preset("kl-tiny", AutoencoderRecipe), seed=5), tmp_path / "other")
    save_autoencoder(export / "autoencoder", load_autoencoder(tmp_path / "other" / "export"), "another")
    with pytest.raises(UserError, match=r'"kl-tiny" \([0-9a-f]{12}, 4 channels\), found "another" \([0-9a-f]{12}'):
        transfuse.load(str(export))


def test_pixel_clipping_is_refused_for_latents(runs: Path) -> None:
    wrong = replace(transfusion(runs / "kl" / "export"), diffusion=preset("tiny").diffusion)
    with pytest.raises(UserError, match=r"diffusion\.clip_x0: expected None with the autoencoder"):
        resolve(wrong)


def test_a_folder_of_images(tmp_path: Path, capsys) -> None:
    for number in range(3):
        PIL.Image.fromarray(np.full((40, 50, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    source = FolderImages(tmp_path, 32, seed=0)
    epochs = [[int(source(epoch * 4 + n)[0, 0, 0]) for n in range(4)] for epoch in range(4)]
    assert capsys.readouterr().err.count("bad.png") == 1
    assert all(set(epoch) == {0, 80, 160} for epoch in epochs)  # one of them stands in for the bad one
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = FolderImages(tmp_path, 32, seed=0)
    assert [int(again(4 + n)[0, 0, 0]) for n in range(4)] == epochs[1]
    only_bad = tmp_path / "only-bad"
    only_bad.mkdir()
    (only_bad / "bad.png").write_bytes(b"")
    with pytest.raises(UserError, match="expected images, found 1 files, none of which can be read"):
        FolderImages(only_bad, 32, seed=0)(0)
    assert source(5).shape == (32, 32, 3)
    asked = recipe("kl")
    asked = replace(asked, data=replace(asked.data, folder=str(tmp_path)), loop=replace(asked.loop, steps=2))
    assert train_autoencoder(asked, tmp_path / "run")[1] is not None


def test_unseen_nouns_are_unseen() -> None:
    trained = preset("kl-f4-small", AutoencoderRecipe).data.world
    unseen = unseen_world(trained)
    assert len(unseen.config.noun_names) == 28
    assert not set(unseen.config.noun_names) & set(trained.noun_names)


@pytest.mark.slow
def test_a_step_of_the_paper_preset(tmp_path: Path) -> None:
    """83.7M parameters, critic and all terms, on random input: finite, and every weight of the autoencoder moves."""
    asked = preset("kl-f8", AutoencoderRecipe)
    asked = replace(asked, objective=replace(asked.objective, adversarial_from=0), device="cpu")
    asked = replace(asked, data=replace(asked.data, batch_size=1), optimizer=replace(asked.optimizer, warmup=1))
    trainer = build_autoencoder_trainer(resolve_autoencoder(asked), tmp_path)
    noise = torch.rand(1, 3, 64, 64) * 2 - 1
    trainer.load = lambda step: [ImageBatch(noise, (step,), step)]
    before = {name: weight.clone() for name, weight in trainer.model.autoencoder.named_parameters()}
    average = Average()
    trainer.train_step(average)
    assert all(np.isfinite(value) for value in average.means().values())
    assert all((weight != before[name]).any() for name, weight in trainer.model.autoencoder.named_parameters())
