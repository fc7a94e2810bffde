"""Distances between sets of pictures: against other packages' numbers, closed forms, and in the direction they must go.

The numbers named torch-fidelity were computed once with torch-fidelity 0.4.0 on the same random weights and pictures;
`tests/parity/test_fidelity.py` computes them where that package is installed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluating import RandomFilters, features_of_two_sets, images_of, random_inception

from emoji_scenes import WorldConfig
from emoji_scenes.scorer import SceneScorer
from transfuse.errors import UserError
from transfuse.evaluation.drawings import clip_scores
from transfuse.evaluation.image_quality import (
    InceptionFeatures,
    enlarged,
    frechet,
    kernel_distance,
    open_features,
    precision_recall,
)


def test_inception_features_equal_torch_fidelity() -> None:
    sees = InceptionFeatures(random_inception(), "drawn")
    a, b = sees.features(images_of(1)), sees.features(images_of(2))
    expected = [0.0, 0.005433910060673952, 0.09350085258483887, 5.781764030456543]
    np.testing.assert_allclose(a[0, :4], expected, atol=1e-4)
    assert a.mean() == pytest.approx(1.924997329711914, rel=1e-5)
    assert frechet(a, b, 2).value == pytest.approx(2741.128419365978, rel=1e-5)
    assert kernel_distance(a, b).value == pytest.approx(804.0841064453125, rel=1e-5)
    assert [share.value for share in precision_recall(a, b)] == [0.25, 0.25]


def test_distances_equal_torch_fidelity() -> None:
    a, b = features_of_two_sets()
    assert frechet(a, b, 2).value == pytest.approx(5.223590107336719, rel=1e-6)
    assert kernel_distance(a, b).value == pytest.approx(0.4319026470184326, rel=1e-5)
    precision, recall = precision_recall(a, b)
    assert (precision.value, recall.value) == pytest.approx((0.6, 0.6266666666666667))


def test_frechet_equals_the_closed_form_of_gaussians() -> None:
    """Whitened samples have exactly the moments they are given: diagonal Gaussians, sum of (s - t)^2 + (m - n)^2."""
    drawn = np.random.default_rng(0)
    sets, means, deviations = [], ([0.0, 1, 2], [1.0, 1, -1]), ([1.0, 2, 3], [2.0, 0.5, 3])
    for mean, deviation in zip(means, deviations, strict=True):
        x = drawn.normal(size=(500, 3))
        x -= x.mean(0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T)).T)
        sets.append(x * deviation + mean)
    expected = np.square(np.subtract(*means)).sum() + np.square(np.subtract(*deviations)).sum()
    actual = frechet(*sets)
    assert actual.value == pytest.approx(expected, rel=1e-10)
    assert actual.low < expected < actual.high


def test_kernel_distance_has_no_bias_and_an_honest_interval() -> None:
    """Between two samples of one distribution it is 0 on average, and 95 % intervals hold 0 about as often."""
    drawn = np.random.default_rng(1)
    actual = [kernel_distance(drawn.normal(size=(60, 8)), drawn.normal(size=(60, 8))) for _ in range(120)]
    values = np.array([estimate.value for estimate in actual])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert np.mean([estimate.low < 0 < estimate.high for estimate in actual]) > 0.88


def test_kernel_distance_of_many_is_a_mean_over_blocks() -> None:
    a, b = features_of_two_sets()
    parts = [kernel_distance(a[start : start + 100], b[start : start + 100]).value for start in (0, 100, 200)]
    assert kernel_distance(a, b, block=100).value == pytest.approx(np.mean(parts))


def test_precision_and_recall_of_a_narrow_and_of_a_wide_set() -> None:
    drawn = np.random.default_rng(2)
    real = drawn.normal(size=(400, 2))
    narrow, wide = 0.2 * drawn.normal(size=(400, 2)), 5 * drawn.normal(size=(400, 2))
    precision, recall = precision_recall(narrow, real)
    assert precision.value > 0.95
    assert recall.value < 0.3
    precision, recall = precision_recall(wide, real)
    assert precision.value < 0.5
    assert recall.value > 0.8


NEAR = WorldConfig(size=32, nouns=6, max_objects=1, max_count=1)


@pytest.mark.parametrize("damage", ["blur", "noise", "swap"])
def test_more_damage_is_farther_away(damage: str) -> None:
    far = WorldConfig(size=32, nouns=("castle", "church"), max_objects=1, max_count=1)
    real, other = (
        np.stack([pairs.picture(n) for n in range(160)])
        for pairs in (SceneScorer(NEAR).pairs(160, 32), SceneScorer(far).pairs(160, 32))
    )
    noise = np.random.default_rng(0).normal(size=real.shape)
    sets = []
    for amount in (0, 1, 2, 3):
        if damage == "noise":
            sets.append(np.clip(real + 30 * amount * noise, 0, 255).astype(np.uint8))
        elif damage == "swap":
            sets.append(np.concatenate([other[: 50 * amount], real[50 * amount :]]))
        else:
            kernel = 2 * amount + 1
            x = torch.nn.functional.avg_pool2d(
                torch.from_numpy(real).permute(0, 3, 1, 2).float(), kernel, 1, amount, count_include_pad=False
            )
            sets.append(x.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    features = [RandomFilters().features(images) for images in sets]
    for distances in (
        [frechet(part, features[0], 2).value for part in features],
        [kernel_distance(part, features[0]).value for part in features],
    ):
        assert distances == sorted(distances)
        assert distances[3] > 2 * abs(distances[1]) or damage == "blur"
    assert frechet(features[0], features[0], 2).value == pytest.approx(0, abs=1e-9)


def test_enlarging_is_that_of_tensorflow_1() -> None:
    """Pixel n is at n * size / side: worked out by hand for 2 pixels to 4."""
    x = torch.tensor([[[[0.0, 10.0], [20.0, 30.0]]]])
    row = torch.tensor([0.0, 5.0, 10.0, 10.0])
    assert torch.equal(enlarged(x, 4)[0, 0], torch.stack([row, row + 10, row + 20, row + 20]))


def test_a_missing_or_wrong_network_is_named_with_its_hash_and_source(tmp_path) -> None:
    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match=r"6726825d\.\.\.\), found no file; people get it from https://github.com"):
        open_features(str(path))
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"expected SHA-256 6726825d\.\.\., found"):
        open_features(str(path))


def test_clip_score_is_a_cosine_not_below_zero() -> None:
    """Better: the more a picture's embedding turns towards its text."""
    text = np.array([[1.0, 0], [0, 2], [3, 0], [1, 0]])
    pictures = np.array([[5.0, 0], [1, 1], [0, 1], [-1, 0]])
    np.testing.assert_allclose(clip_scores(pictures, text), [100, 100 / np.sqrt(2), 0, 0], atol=1e-9)
