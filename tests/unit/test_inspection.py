"""The page about an autoencoder: every figure, nothing from elsewhere, and pictures that are what they say."""

from __future__ import annotations

import base64
import io
import json
import re
from html import unescape

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional as F

from emoji_scenes import World, WorldConfig
from transfuse import inspect_autoencoder as inspection
from transfuse.autoencoders import Pixels, open_autoencoder
from transfuse.errors import UserError
from transfuse.evaluation.confidence import Estimate
from transfuse.evaluation.reconstruction import channel_losses, evaluate_reconstruction, psnr
from transfuse.images import fit
from transfuse.inspect_autoencoder import amplified, inspect_autoencoder, plain_resize


class Halving:
    """Loses every second pixel."""

    name, factor, channels = "halving <b>", 2, 3

    def encode(self, images):
        return F.avg_pool2d(Pixels().encode(images), 2)

    def decode(self, latents):
        return Pixels().decode(F.interpolate(latents, scale_factor=2.0))


class VQTokenizer(Halving):
    """Latents are levels of grey: 8 of 32 codes are used at most."""

    name, codebook_size = "coded", 32

    def codes(self, images):
        return super().encode(images).mean(1).add(1).mul(4).long().clamp(0, 7)

    def encode(self, images):
        return (self.codes(images)[:, None].float() / 4 - 0.875).expand(-1, 3, -1, -1)


class Means:
    name = "means"

    def pooled(self, images):
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def pictures(split, count):
    world = World(WorldConfig(size=32, split=split))
    return np.stack([world.render(world.scene(index)) for index in range(count)])


@pytest.fixture(scope="module")
def images():
    return pictures("train", 40)


@pytest.fixture(scope="module")
def done(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("inspection") / "deep" / "halving"
    names = [f"scene {index}" for index in range(40)]
    apart = {"unseen & <i>": pictures("heldout", 20), "the same": images}
    return inspect_autoencoder(Halving(), images, names, out, Means(), apart), out


def test_report_holds_what_was_measured(done, images) -> None:
    report, out = done
    assert json.loads((out / "report.json").read_text()) == report
    assert sorted(path.name for path in out.iterdir()) == ["index.html", "report.json"]
    found = evaluate_reconstruction(Halving(), [images], Means())
    assert report["psnr"] == found.psnr.value
    assert report["psnr_interval"] == [found.psnr.low, found.psnr.high]
    assert report["ssim"] == pytest.approx(found.ssim.value)
    assert report["l1"] == pytest.approx(found.l1.value)
    assert report["frechet"] == pytest.approx(found.frechet.value)
    assert report["frechet_interval"] == pytest.approx([found.frechet.low, found.frechet.high])
    assert report["latent_std"] == pytest.approx(found.latent_std.tolist())
    assert (report["autoencoder"], report["images"], report["features"]) == ("halving <b>", 40, "means")
    assert report["psnr_by_image"] == psnr(images, Halving().decode(Halving().encode(images))).tolist()
    assert report["names"][7] == "scene 7"
    assert report["codebook_counts"] is report["codebook_size"] is None


def test_sets_apart_are_measured_beside_the_first(done) -> None:
    report, _ = done
    unseen, same = report["held_apart"]["unseen & <i>"], report["held_apart"]["the same"]
    assert unseen["images"] == 20
    assert unseen["psnr_difference"] == unseen["psnr"] - report["psnr"]
    assert same["psnr_difference"] == 0
    low, high = same["psnr_difference_interval"]
    assert low < 0 < high
    assert same["psnr_interval"] == report["psnr_interval"]


def test_interval_of_a_difference_adds_in_squares() -> None:
    found = inspection._difference(Estimate(30.0, 27.0, 33.0, 9), Estimate(20.0, 16.0, 24.0, 9))
    assert (found.value, found.low, found.high) == (-10.0, -15.0, -5.0)


def test_page_shows_figures_and_needs_nothing_from_elsewhere(done) -> None:
    report, out = done
    html = (out / "index.html").read_text()
    assert "<b>halving" not in html
    assert "halving <b>" not in html
    assert "<i>" not in html.replace("unseen &amp; &lt;i&gt;", "")
    assert not re.search(r"https?://|@import|url\((?!#)|<script|<link|<iframe", html)
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', html))
    text = unescape(html)
    apart = ("held_apart", "channel_loss", "resize")
    shown = {name: value for name, value in report.items() if not name.endswith("by_image") and name not in apart}
    for value in shown.values():
        for leaf in value if isinstance(value, list) else [value]:
            assert (leaf if isinstance(leaf, str) else json.dumps(leaf)) in text
    for apart in report["held_apart"].values():
        assert f"{apart['psnr']:.2f} (" in text
        assert f"{apart['psnr_difference']:+.2f} (".replace("-", "\u2212") in text
    for decibels in report["psnr_by_image"]:
        assert f"<td>{decibels:.2f}</td>" in html


def shown_in(html, title):
    """(name, dB, original, reconstruction, plain resize if there is one, difference) of each card of a section."""
    part = html[html.index(f"<h2>{title}</h2>") :]
    found = []
    for card in part[: part.index("</section>")].split('<li class="card">')[1:]:
        name, decibels = re.search(r"<span>(.*?)</span><b>([\d.]+)\u202fdB", card).groups()
        sources = re.findall(r'base64,([^"]*)"', card)
        decoded = [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
        found.append((name, float(decibels), *decoded))
    return found


def test_pictures_are_what_their_labels_say(done, images) -> None:
    report, out = done
    html = (out / "index.html").read_text()
    rebuilt = Halving().decode(Halving().encode(images))
    worst, regular = shown_in(html, "The 8 worst"), shown_in(html, "A regular sample")
    for name, decibels, *shown in [*worst, *regular]:
        index = report["names"].index(name)
        assert decibels == pytest.approx(report["psnr_by_image"][index], abs=0.005)
        small = PIL.Image.fromarray(images[index]).resize((16, 16), PIL.Image.Resampling.LANCZOS)
        resized = np.asarray(small.resize((32, 32), PIL.Image.Resampling.LANCZOS))
        expected = [images[index], rebuilt[index], resized, amplified(images[index], rebuilt[index])]
        for picture, wanted in zip(shown, expected, strict=True):
            np.testing.assert_array_equal(picture, wanted)
    assert [name for name, *_ in worst] == [f"scene {index}" for index in np.argsort(report["psnr_by_image"])[:8]]
    places = [report["names"].index(name) for name, *_ in regular]
    assert (places[0], places[-1], len(places)) == (0, 39, 12)
    assert set(np.diff(places)) == {3, 4}


def test_difference_is_signed_around_grey() -> None:
    original = np.array([100, 100, 100, 0, 255], dtype=np.uint8)
    rebuilt = np.array([100, 101, 98, 255, 0], dtype=np.uint8)
    assert amplified(original, rebuilt).tolist() == [128, 133, 118, 255, 0]


def test_a_plain_resize_keeps_as_many_numbers_as_the_latent(done, images) -> None:
    """Its measures stand next to the autoencoder's on the first screen, in the report, and for each further set."""
    report, out = done
    resize = plain_resize(Halving(), 32, 32)
    assert resize.size == (16, 16), "3 numbers at each of 16 x 16 places"
    small = np.stack([fit(image, 16) for image in images])
    expected = np.stack([fit(image, 32) for image in small])
    assert report["resize"]["size"] == [16, 16]
    assert report["resize"]["psnr"] == pytest.approx(psnr(images, expected).mean())
    assert report["resize"]["frechet"] > 0
    assert report["held_apart"]["the same"]["resize"]["psnr"] == report["resize"]["psnr"]
    first_screen = (out / "index.html").read_text().split("<h2>")[0]
    assert f"a plain resize {report['resize']['psnr']:.4g}" in first_screen
    assert "100" not in unescape(re.sub(r'style="[^"]*"', "", first_screen.split("<main>")[1]))


@pytest.mark.parametrize(
    ("name", "size"),
    [("kl-f4-small", (26, 39)), ("vq-f4-small", (10, 15)), ("pixels", None)],
)
def test_sizes_of_a_plain_resize(name, size) -> None:
    """16 x 24 x 8 numbers, 16 x 24 codes of 10 bits, or all there is."""
    resize = plain_resize(open_autoencoder(name), 64, 96)
    assert (resize and resize.size) == size


def test_codebook_has_its_section(images, tmp_path) -> None:
    report = inspect_autoencoder(VQTokenizer(), images, [str(n) for n in range(40)], tmp_path)
    assert sum(report["codebook_counts"]) == 40 * 16 * 16
    assert report["codebook_use"] <= 8 / 32
    assert 1 <= report["codebook_perplexity"] <= 8
    html = (tmp_path / "index.html").read_text()
    assert "<h2>Codebook</h2>" in html
    assert "Use of each code" in html
    assert "<h2>Held apart</h2>" not in html
    assert "19.2 times fewer bits than the image" in html  # 24 bits of 4 pixels for one code of 5 bits


def test_few_images_that_lose_nothing(images, tmp_path) -> None:
    report = inspect_autoencoder(Pixels(), images[:2], ["a", "b"], tmp_path)
    assert report["psnr"] == 100
    html = (tmp_path / "index.html").read_text()
    assert not re.search(r"\b(nan|inf)\b", re.sub(r'src="[^"]*"', "", html))
    for _, decibels, original, rebuilt, difference in shown_in(html, "The 2 worst"):
        assert decibels == 100
        np.testing.assert_array_equal(original, rebuilt)
        assert (difference == 128).all()


def test_many_channels_are_folded(images, tmp_path) -> None:
    class Wide(Halving):
        factor, channels = 4, 48

        def encode(self, images):
            return F.pixel_unshuffle(Pixels().encode(images), 4)

        def decode(self, latents):
            return Pixels().decode(F.pixel_shuffle(latents, 4))

    html = latents_of(Wide(), images[:2], tmp_path)
    assert ">48 channels: " in html
    assert html.count("<tr>") == 49


def latents_of(autoencoder, images, out) -> str:
    """Return the page's section on channels."""
    inspect_autoencoder(autoencoder, images, [str(n) for n in range(len(images))], out)
    html = (out / "index.html").read_text()
    part = html[html.index("<h2>What each channel carries</h2>") :]
    return part[: part.index("</section>")]


class Padded(Halving):
    """Two channels more than it needs: 1 holds what the decoder does not read, 4 nothing at all."""

    channels = 5

    def encode(self, images):
        red, green, blue = super().encode(images).split(1, 1)
        return torch.cat([red, 3 * red - 1, green, blue, torch.full_like(red, 0.25)], 1)

    def decode(self, latents):
        return super().decode(latents[:, [0, 2, 3]])


def test_a_channel_is_worth_what_is_lost_without_it(images, tmp_path, capsys) -> None:
    report = inspect_autoencoder(Padded(), images, [str(n) for n in range(40)], tmp_path)
    latents, whole = Padded().encode(images), report["psnr"]
    losses = report["channel_loss"]
    assert len(losses) == 5
    assert report["channel_loss_images"] == 40
    for channel in (0, 2, 3):
        replaced = latents.clone()
        replaced[:, channel] = replaced[:, channel].mean()
        lost = whole - psnr(images, Padded().decode(replaced)).mean()
        assert losses[channel]["by_mean"] == pytest.approx(lost, abs=1e-3)
        assert losses[channel]["by_noise"] > losses[channel]["by_mean"] > 1
        assert losses[channel]["db_lost"] == losses[channel]["by_mean"]
        low, high = losses[channel]["by_mean_interval"]
        assert low < losses[channel]["by_mean"] < high
    assert losses[1]["db_lost"] == losses[4]["db_lost"] == 0
    lines = [f"channel {number} carries nothing: without it PSNR falls by 0.00 dB, less than 0.1" for number in (1, 4)]
    assert report["empty_channels"] == lines
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "carries" in line] == lines
    html = (tmp_path / "index.html").read_text()
    assert all(f">{line.capitalize()}.</p>" in html for line in lines)
    assert f"<td>{losses[2]['by_noise']:.2f} (" in html


def test_channels_of_a_codebook_are_weighed_before_the_choice(images, tmp_path) -> None:
    """The decoder chooses again; a channel of which all codes hold the same is worth nothing."""
    autoencoder = open_autoencoder("vq-f4-small")
    with torch.no_grad():
        autoencoder.quantize.embedding.weight[:, 1] = 0.5
    report = inspect_autoencoder(autoencoder, images[:8], [str(n) for n in range(8)], tmp_path)
    assert [line.split(":")[0] for line in report["empty_channels"]] == ["channel 1 carries nothing"]


def test_every_channel_of_the_bundled_kl_is_worth_a_decibel() -> None:
    world = World(WorldConfig(size=64, nouns=300, split="heldout"))
    scenes = np.stack([world.render(world.scene(index)) for index in range(100, 116)])
    losses = channel_losses(open_autoencoder("kl-f4-small"), scenes)
    assert len(losses) == 8
    assert min(loss.least for loss in losses) > 1


def test_refusals(images, tmp_path) -> None:
    with pytest.raises(ValueError, match="names: expected one for each of 40 images, found 1"):
        inspect_autoencoder(Pixels(), images, ["a"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: inspection not written"):
        inspect_autoencoder(Pixels(), images[:1], ["a"], tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
