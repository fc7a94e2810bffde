"""Measures of reconstruction against slow oracles, closed forms and identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from emoji_scenes import World, WorldConfig
from transfuse.autoencoders import Pixels
from transfuse.evaluation.confidence import bootstrap
from transfuse.evaluation.image_quality import frechet_distance
from transfuse.evaluation.reconstruction import (
    BEST_PSNR,
    absolute_error,
    code_counts,
    codebook_use,
    evaluate_reconstruction,
    psnr,
    ssim,
)


class Halving:
    """Loses every second pixel."""

    name, factor, channels = "halving", 2, 3

    def encode(self, images):
        return F.avg_pool2d(Pixels().encode(images), 2)

    def decode(self, latents):
        return Pixels().decode(F.interpolate(latents, scale_factor=2.0))


class VQTokenizer(Halving):
    """Every latent is one of 64 colours, four levels of each primary; code 63, white, is never chosen."""

    name, codebook_size = "coded", 64
    places = torch.tensor([16, 4, 1]).view(3, 1, 1)

    def codes(self, images):
        levels = super().encode(images).add(1).mul(2).long().clamp(0, 3)
        return (levels * self.places).sum(1).clamp(max=62)

    def encode(self, images):
        codes = self.codes(images)[:, None]
        return ((codes // self.places) % 4).float() / 2 - 0.75


class Means:
    """Sees the mean colour and contrast."""

    name = "means"

    def pooled(self, images):
        assert images.dtype == torch.float32
        assert images.abs().max() <= 1
        return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


@pytest.fixture(scope="module")
def images():
    world = World(WorldConfig(size=32))
    return np.stack([world.render(world.scene(index)) for index in range(12)])


@pytest.fixture(scope="module")
def noisy(images):
    noise = np.random.default_rng(0).normal(0, 20, images.shape)
    return (images + noise).round().clip(0, 255).astype(np.uint8)


def slow_ssim(a, b) -> float:
    """One channel `[row, column]`, window by window, by the definition."""
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    actual = []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            x, y = (p[row : row + 11, column : column + 11].astype(np.float64) for p in (a, b))
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            covariance = (weights * (x - mx) * (y - my)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            actual.append((2 * mx * my + c1) * (2 * covariance + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return float(np.mean(actual))


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_psnr_is_its_definition(images, noisy) -> None:
    expected = [
        20 * math.log10(255 / math.sqrt(np.mean((x.astype(np.float64) - y) ** 2)))
        for x, y in zip(images, noisy, strict=True)
    ]
    np.testing.assert_allclose(psnr(images, noisy), expected, rtol=1e-12)
    np.testing.assert_array_equal(psnr(images, noisy), psnr(noisy, images))
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert psnr(black, white) == 0
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))


def test_psnr_of_equal_images_is_the_cap(images) -> None:
    assert (psnr(images, images) == BEST_PSNR).all()
    large = np.zeros((1, 256, 256, 3), np.uint8)
    nearly = large.copy()
    nearly[0, 0, 0, 0] = 1  # 101 dB
    assert psnr(large, nearly) == BEST_PSNR


@pytest.mark.parametrize(("rows", "columns"), [(11, 11), (17, 12), (32, 32)])
def test_ssim_is_its_definition_window_by_window(images, noisy, rows, columns) -> None:
    a, b = images[:2, -rows:, :columns], noisy[:2, -rows:, :columns]
    expected = [np.mean([slow_ssim(x[..., c], y[..., c]) for c in range(3)]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-9)


def test_ssim_identities(images, noisy) -> None:
    np.testing.assert_allclose(ssim(images, images), 1, rtol=1e-12)
    np.testing.assert_allclose(ssim(images, noisy), ssim(noisy, images), rtol=1e-12)
    flipped = ssim(images[:, ::-1], noisy[:, ::-1]), ssim(images.swapaxes(1, 2), noisy.swapaxes(1, 2))
    for actual in flipped:
        np.testing.assert_allclose(actual, ssim(images, noisy), rtol=1e-10)
    assert (ssim(images, noisy) < 1).all()
    # more images than are worked on at once, in order
    np.testing.assert_allclose([ssim(images[n : n + 1], noisy[n : n + 1])[0] for n in range(12)], ssim(images, noisy))
    # flat images: only the luminance is left
    a, b = np.full((1, 16, 16, 3), 100, np.uint8), np.full((1, 16, 16, 3), 120, np.uint8)
    c1 = 2.55**2
    assert ssim(a, b)[0] == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1))


def test_absolute_error_is_in_levels(images) -> None:
    shifted = images // 2 + 10
    np.testing.assert_allclose(absolute_error(shifted, shifted + 7), 7)
    np.testing.assert_allclose(absolute_error(shifted + 7, shifted), 7)


@pytest.mark.parametrize("measure", [psnr, ssim, absolute_error])
def test_pairs_that_cannot_be_compared_are_refused(measure, images) -> None:
    for a, b in [(images, images[:2]), (images / 255, images), (images[0], images[0]), (images[:0], images[:0])]:
        with pytest.raises(ValueError, match=rf"{measure.__name__}: expected .* found"):
            measure(a, b)


def test_ssim_refuses_images_smaller_than_its_window(images) -> None:
    with pytest.raises(ValueError, match="ssim: expected images of at least 11 x 11, found 10 x 32"):
        ssim(images[:, :10], images[:, :10])


# --- sets -------------------------------------------------------------------------------------------------------------


def exact(mean, covariance, count=64, seed=0):
    """Points whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).normal(size=(count, len(mean)))
    q = np.linalg.qr(x - x.mean(0))[0] * math.sqrt(count - 1)
    return q @ np.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_diagonal_gaussians() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 3.0])
    std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([3.0, 0.5, 0.1])
    a, b = exact(mean_a, np.diag(std_a**2)), exact(mean_b, np.diag(std_b**2), count=90, seed=1)
    expected = ((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(torch.from_numpy(a), b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_full_covariances_is_the_textbook_one() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(150, 6)) @ rng.normal(size=(6, 6)) + 1
    values, vectors = np.linalg.eigh(np.cov(a.T))
    root = vectors * np.sqrt(values) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ np.cov(b.T) @ root)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * middle
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert frechet_distance(a @ rotation + 5, b @ rotation + 5) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * expected, rel=1e-10)


@pytest.mark.parametrize("count", [5, 500])
def test_frechet_distance_of_equal_sets_is_nothing(count) -> None:
    """Also with fewer images than channels, where the covariance has no inverse."""
    a = np.random.default_rng(0).normal(size=(count, 40))
    assert frechet_distance(a, a) < 1e-10
    assert frechet_distance(a, a[::-1]) < 1e-10
    assert frechet_distance(a, a + 2) == pytest.approx(160)


def test_frechet_distance_refuses() -> None:
    a = np.ones((4, 3))
    for other, message in [(a[:1], "2 or more"), (a[:, :2], "3 and 2"), (a * np.nan, "finite"), (a[0], "found")]:
        with pytest.raises(ValueError, match=message):
            frechet_distance(a, other)


def test_codebook_use() -> None:
    assert codebook_use(code_counts(torch.arange(8).view(2, 2, 2), 8)) == (1.0, pytest.approx(8))
    assert codebook_use(code_counts(np.zeros(5, np.int64), 8)) == (1 / 8, 1.0)
    share, perplexity = codebook_use(code_counts(np.array([3, 3, 3, 7]), 10))
    assert share == 0.2
    assert perplexity == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
    for bad in ([8], [-1], [0.5], []):
        with pytest.raises(ValueError, match="codes: expected integers from 0 to 7, found"):
            code_counts(np.array(bad), 8)


# --- an autoencoder ---------------------------------------------------------------------------------------------------


def test_pixels_lose_nothing(images) -> None:
    actual = evaluate_reconstruction(Pixels(), [images], Means())
    assert (actual.psnr.value, actual.psnr.low, actual.psnr.high, actual.count) == (BEST_PSNR, BEST_PSNR, BEST_PSNR, 12)
    assert actual.ssim.value == pytest.approx(1)
    assert actual.l1.value == 0
    assert actual.frechet.value == pytest.approx(0, abs=1e-12)
    assert actual.features == "means"
    assert actual.codebook_size is actual.codebook_use is actual.codebook_perplexity is actual.codebook_counts is None
    latents = Pixels().encode(images).double()
    np.testing.assert_allclose(actual.latent_mean, latents.mean((0, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(actual.latent_std, latents.std((0, 2, 3), correction=0), rtol=1e-9)


def test_lossy_is_what_the_measures_say(images) -> None:
    """However the images are batched."""
    rebuilt = Halving().decode(Halving().encode(images))
    for size in (12, 5):
        actual = evaluate_reconstruction(Halving(), (images[n : n + size] for n in range(0, 12, size)), Means())
        np.testing.assert_array_equal(actual.psnr_by_image, psnr(images, rebuilt))
        np.testing.assert_allclose(actual.ssim_by_image, ssim(images, rebuilt))
        assert actual.psnr == bootstrap(psnr(images, rebuilt))
        assert actual.l1.value == pytest.approx(absolute_error(images, rebuilt).mean())
        features = [Means().pooled(Pixels().encode(pictures)) for pictures in (images, rebuilt)]
        assert actual.frechet.value == pytest.approx(frechet_distance(*features))
        assert 0 <= actual.frechet.low < actual.frechet.value < actual.frechet.high
        assert actual.encode_images_per_second > 0
        assert actual.decode_images_per_second > 0
        assert (actual.name, actual.device) == ("halving", "cpu")
    assert evaluate_reconstruction(Halving(), [images]).frechet is None


def test_codebook_is_measured(images) -> None:
    actual = evaluate_reconstruction(VQTokenizer(), [images[:7], images[7:]])
    codes = VQTokenizer().codes(images)
    assert (actual.codebook_use, actual.codebook_perplexity) == pytest.approx(codebook_use(code_counts(codes, 64)))
    np.testing.assert_array_equal(actual.codebook_counts, torch.bincount(codes.flatten(), minlength=64))
    assert actual.codebook_use < 1


def test_first_batch_is_not_timed(images) -> None:
    clock = iter([0.0, 100.0, 200.0, 300.0, 302.0, 306.0])  # began, between, ended: of two batches
    actual = evaluate_reconstruction(Halving(), [images[:4], images[4:]], clock=lambda: next(clock))
    assert (actual.encode_images_per_second, actual.decode_images_per_second) == (8 / 2, 8 / 4)


def test_what_cannot_be_evaluated_is_refused(images) -> None:
    with pytest.raises(ValueError, match="batches: expected at least one, found none"):
        evaluate_reconstruction(Pixels(), [])
    with pytest.raises(ValueError, match="at least 11 x 11, found 8 x 8"):
        evaluate_reconstruction(Pixels(), [images[:, :8, :8]])
    wrong = Halving()
    wrong.channels = 4
    with pytest.raises(ValueError, match=r"latents of halving: expected \(12, 4, 16, 16\), found \(12, 3, 16, 16\)"):
        evaluate_reconstruction(wrong, [images])
