"""FID, KID, precision and recall against torch-fidelity, with shared random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluating import features_of_two_sets, images_of, random_inception

from transfuse.evaluation.image_quality import InceptionFeatures, frechet, kernel_distance, precision_recall

pytest.importorskip("torch_fidelity")


def their_numbers(a: np.ndarray, b: np.ndarray) -> list[float]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    statistics = [fid_features_to_statistics(features) for features in (x, y)]
    fid = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    kid = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=len(x), verbose=False)
    shares = prc_features_to_metric(x, y, verbose=False)
    return [fid, kid["kernel_inception_distance_mean"], shares["precision"], shares["recall"]]


def our_numbers(a: np.ndarray, b: np.ndarray) -> list[float]:
    return [frechet(a, b, 2).value, kernel_distance(a, b).value, *(share.value for share in precision_recall(a, b))]


def test_features_and_distances(tmp_path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = random_inception()
    classes = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    torch.save({**network.state_dict(), **classes}, tmp_path / "inception.pth")
    other = FeatureExtractorInceptionV3("inception", ["2048"], str(tmp_path / "inception.pth"))
    sees = InceptionFeatures(network, "drawn")
    sets = [images_of(seed) for seed in (1, 2)]
    a, b = (sees.features(images) for images in sets)
    for actual, images in zip((a, b), sets, strict=True):
        expected = other(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())[0]
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-4)
    np.testing.assert_allclose(our_numbers(a, b), their_numbers(a, b), rtol=1e-5)
    np.testing.assert_allclose(our_numbers(*features_of_two_sets()), their_numbers(*features_of_two_sets()), rtol=1e-5)
