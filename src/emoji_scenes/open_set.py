"""The strict judge of drawings: it names one of all nouns, or answers that none can be made out.

    classifier = bundled_classifier()
    classifier(images)              # ["crab", None, ...]: None where no noun is plain enough
    classifier.digest               # eight digits of a hash of its weights: reports with the same ones compare

The recogniser chooses among the few nouns of one configuration, so a blob of the right colour is enough for it. This
classifier knows all 328 nouns in every drawing style and was also trained to refuse spoiled drawings (blurred, warped,
blended, half erased, in pieces). `tools/train_open_set.py` trains it and measures its errors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transfuse.evaluation.generate import weights_digest
from transfuse.evaluation.image_quality import pixels

from .classifier import PooledNetwork, load_network, resized, save_network

WEIGHTS = Path(__file__).with_name("weights") / "open-set.safetensors"
SIDE = 48
"""Pixels per side that the network sees: images of 32 and of 64 pixels are resized."""


def open_set_network(nouns: int) -> PooledNetwork:
    """Return a network of 0.6M parameters for 328 nouns; its last output is "none"."""
    return PooledNetwork((32, 64, 64, 128, 128, 192), (2, 2, 1, 2, 1, 2), nouns + 1)


@dataclass(eq=False)
class OpenSetClassifier:
    """A classifier of images with one thing that may refuse.

    nouns      every noun, in the order of the logits
    threshold  least probability of the best noun; below it the answer is None
    accuracy          share named rightly of clean drawings that it never saw, by size
    false_acceptance  share named at all of spoiled drawings of kinds it never saw, by kind, and their "mean"
    """

    nouns: tuple[str, ...]
    network: PooledNetwork
    threshold: float
    accuracy: dict[str, float]
    false_acceptance: dict[str, float]

    @property
    def identity(self) -> str:
        return self.digest

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights and the threshold."""
        return weights_digest({**self.network.state_dict(), "threshold": torch.tensor(self.threshold)})

    @property
    def chance(self) -> float:
        """The accuracy of a guess among the nouns and "none"."""
        return 1 / (len(self.nouns) + 1)

    @torch.inference_mode()
    def probabilities(self, images: np.ndarray, batch: int = 128) -> Tensor:
        """Return `[image, noun + 1]` for uint8 images `[image, row, column, 3]`; the last column is "none"."""
        parts = [images[start : start + batch] for start in range(0, len(images), batch)]
        return torch.cat([self.network(resized(pixels(part), SIDE)).softmax(1) for part in parts])

    def __call__(self, images: np.ndarray) -> list[str | None]:
        """Return the noun in each image, or None where none is plain."""
        best, chosen = self.probabilities(images)[:, :-1].max(1)
        accepted = (best >= self.threshold).tolist()
        return [self.nouns[n] if plain else None for n, plain in zip(chosen.tolist(), accepted, strict=True)]

    def save(self, path: Path) -> None:
        """Write one safetensors file in half precision, whole or not at all."""
        state = {
            name: tensor.half() if tensor.is_floating_point() else tensor
            for name, tensor in self.network.state_dict().items()
        }
        facts = {
            "nouns": json.dumps(self.nouns),
            "threshold": json.dumps(self.threshold),
            "measured": json.dumps([self.accuracy, self.false_acceptance]),
        }
        save_network(path, state, facts)

    @classmethod
    def load(cls, path: Path) -> OpenSetClassifier:
        """Read a file of `save`. Raises UserError for any other file."""

        def read(facts: dict[str, str], state: dict[str, Tensor]) -> OpenSetClassifier:
            nouns = tuple(json.loads(facts["nouns"]))
            threshold, (accuracy, false) = json.loads(facts["threshold"]), json.loads(facts["measured"])
            network = open_set_network(len(nouns))
            network.load_state_dict(state)
            return cls(nouns, network.eval(), threshold, accuracy, false)

        return load_network(path, "a saved open-set classifier", read)


@cache
def bundled_classifier() -> OpenSetClassifier:
    """Return the classifier that comes with the package, the same for all reports."""
    return OpenSetClassifier.load(WEIGHTS)
