"""A strict judge of drawings: it names one of all the world's nouns, or says that none of them can be made out.

    classifier = bundled_classifier()
    classifier(images)              # ["crab", None, ...]: None where no noun is plain enough
    classifier.digest               # eight digits of a hash of its weights: two reports with the same ones compare

The recogniser chooses among the few nouns of one world, so a blob of the right colour is enough. This classifier knows
all 328 nouns in every drawing style and was also trained on spoiled drawings (blurred, warped, blended, half erased, in
pieces) that it must refuse. `tools/train_open_set.py` made it and measured its own errors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..io import atomic_write
from .recogniser import pixels, resized, weights_digest

WEIGHTS = Path(__file__).with_name("weights") / "open-set.safetensors"
SIDE = 48
"""pixels along a side that the network looks at: pictures of 32 and of 64 pixels are both resized to it"""
CHANNELS = (32, 64, 64, 128, 128, 192)
STRIDES = (2, 2, 1, 2, 1, 2)


class Network(nn.Module):
    """Six convolutions, pooled; 0.6M parameters for 328 nouns."""

    def __init__(self, nouns: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in zip((3, *CHANNELS), CHANNELS, STRIDES, strict=False):
            layers += [
                nn.Conv2d(before, after, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(2 * CHANNELS[-1], nouns + 1)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[image, noun + 1]` of images `[image, 3, SIDE, SIDE]` in [-1, 1]; the last is "none"."""
        x = self.body(x)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1))


@dataclass(eq=False)
class OpenSetClassifier:
    """Names the noun in pictures with one thing, or refuses.

    nouns      every noun it knows, in the order of its logits
    threshold  least probability of the best noun; below it the answer is None
    accuracy          share named rightly of clean drawings that it never saw, by their size
    false_acceptance  share named at all of spoiled drawings of kinds it never saw, by kind, and their "mean"
    """

    nouns: tuple[str, ...]
    network: Network
    threshold: float
    accuracy: dict[str, float]
    false_acceptance: dict[str, float]

    @property
    def digest(self) -> str:
        """Eight digits of a hash of the weights and the threshold."""
        return weights_digest({**self.network.state_dict(), "threshold": torch.tensor(self.threshold)})

    @property
    def chance(self) -> float:
        """What a guess among the nouns and "none" scores."""
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
            name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
            for name, tensor in self.network.state_dict().items()
        }
        facts = {
            "nouns": json.dumps(self.nouns),
            "threshold": json.dumps(self.threshold),
            "measured": json.dumps([self.accuracy, self.false_acceptance]),
        }
        atomic_write(path, lambda aside: save_file(state, aside, metadata=facts))

    @classmethod
    def load(cls, path: Path) -> OpenSetClassifier:
        """Read what `save` wrote. Raises UserError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                nouns = tuple(json.loads(facts["nouns"]))
                threshold, (accuracy, false) = json.loads(facts["threshold"]), json.loads(facts["measured"])
                network = Network(len(nouns))
                network.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path}: expected a saved open-set classifier, found something else ({reason})") from None
        return cls(nouns, network.eval(), threshold, accuracy, false)


@cache
def bundled_classifier() -> OpenSetClassifier:
    """Return the classifier that comes with the package: one for all reports."""
    return OpenSetClassifier.load(WEIGHTS)
