"""The Inception-v3 of the Fréchet inception distance: TensorFlow's graph of 2015-12-05, as torch-fidelity converted it.

It is not torchvision's: average pools leave the padding out, the last block takes a maximum, images are enlarged as
TensorFlow 1 did (no half pixel), and there are 1008 classes. Only the 2048 pooled features are used here.

    sees = load_inception("weights-inception-2015-12-05-6726825d.pth")
    sees.features(images)                    # uint8 [image, row, column, 3] -> float64 [image, 2048]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..io import sha256

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SIDE = 299
EPSILON = 1e-3
CHANNELS = 2048

Kernel = int | tuple[int, int]
Plan = tuple[tuple[str, int, int | tuple[int, int], int, int | tuple[int, int]], ...]
"""Consecutive convolutions: name, output channels, kernel, stride, padding."""


class Convolution(nn.Module):
    """Convolution, norm and ReLU, with the names of the file: `conv.weight`, `bn.*`."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int, padding: Kernel) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Branches(nn.Module):
    """Parallel rows of convolutions with concatenated outputs; the last row may begin with a pool.

    A row that ends in two plans with names that end in `a` and `b` forks: both read what came before.
    """

    def __init__(self, inputs: int, rows: tuple[Plan, ...], pool: str = "") -> None:
        super().__init__()
        self.pool = pool
        self.rows = [[name for name, *_ in row] for row in rows]
        for row in rows:
            before = inputs
            for name, outputs, kernel, stride, padding in row:
                setattr(self, name, Convolution(before, outputs, kernel, stride, padding))
                if not name.endswith("a"):  # of a fork both ends read what is before it
                    before = outputs

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for names in self.rows:
            y = x
            if names == ["branch_pool"]:
                y = self._pooled(x)
            for at, name in enumerate(names):
                if name.endswith("b"):
                    continue
                z = getattr(self, name)(y)
                y = torch.cat([z, getattr(self, names[at + 1])(y)], 1) if name.endswith("a") else z
            out.append(y)
        if self.pool == "shrink":
            out.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(out, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _block_a(inputs: int, pooled: int) -> Branches:
    return Branches(
        inputs,
        (
            (("branch1x1", 64, 1, 1, 0),),
            (("branch5x5_1", 48, 1, 1, 0), ("branch5x5_2", 64, 5, 1, 2)),
            (("branch3x3dbl_1", 64, 1, 1, 0), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 1, 1)),
            (("branch_pool", pooled, 1, 1, 0),),
        ),
    )


def _block_b(inputs: int) -> Branches:
    double: Plan = (("branch3x3dbl_1", 64, 1, 1, 0), ("branch3x3dbl_2", 96, 3, 1, 1), ("branch3x3dbl_3", 96, 3, 2, 0))
    return Branches(inputs, ((("branch3x3", 384, 3, 2, 0),), double), pool="shrink")


def _block_c(inputs: int, width: int) -> Branches:
    across, down = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return Branches(
        inputs,
        (
            (("branch1x1", 192, 1, 1, 0),),
            (("branch7x7_1", width, 1, 1, 0), ("branch7x7_2", width, *across), ("branch7x7_3", 192, *down)),
            (
                ("branch7x7dbl_1", width, 1, 1, 0),
                ("branch7x7dbl_2", width, *down),
                ("branch7x7dbl_3", width, *across),
                ("branch7x7dbl_4", width, *down),
                ("branch7x7dbl_5", 192, *across),
            ),
            (("branch_pool", 192, 1, 1, 0),),
        ),
    )


def _block_d(inputs: int) -> Branches:
    return Branches(
        inputs,
        (
            (("branch3x3_1", 192, 1, 1, 0), ("branch3x3_2", 320, 3, 2, 0)),
            (
                ("branch7x7x3_1", 192, 1, 1, 0),
                ("branch7x7x3_2", 192, (1, 7), 1, (0, 3)),
                ("branch7x7x3_3", 192, (7, 1), 1, (3, 0)),
                ("branch7x7x3_4", 192, 3, 2, 0),
            ),
        ),
        pool="shrink",
    )


def _block_e(inputs: int, pool: str) -> Branches:
    fork = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return Branches(
        inputs,
        (
            (("branch1x1", 320, 1, 1, 0),),
            (("branch3x3_1", 384, 1, 1, 0), ("branch3x3_2a", 384, *fork[0]), ("branch3x3_2b", 384, *fork[1])),
            (
                ("branch3x3dbl_1", 448, 1, 1, 0),
                ("branch3x3dbl_2", 384, 3, 1, 1),
                ("branch3x3dbl_3a", 384, *fork[0]),
                ("branch3x3dbl_3b", 384, *fork[1]),
            ),
            (("branch_pool", 192, 1, 1, 0),),
        ),
        pool=pool,
    )


class Inception(nn.Module):
    """Inception-v3 without its classifier: uint8 `[image, 3, row, column]` to float32 `[image, 2048]`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1, 1, 0)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, 1, 0)
        for name, block in {
            "5b": _block_a(192, 32),
            "5c": _block_a(256, 64),
            "5d": _block_a(288, 64),
            "6a": _block_b(288),
            **{f"6{letter}": _block_c(768, width) for letter, width in zip("bcde", (128, 160, 160, 192), strict=True)},
            "7a": _block_d(768),
            "7b": _block_e(1280, "average"),
            "7c": _block_e(2048, "max"),
        }.items():
            setattr(self, f"Mixed_{name}", block)

    def forward(self, images: Tensor) -> Tensor:
        x = (enlarged(images.float(), SIDE) - 128) / 128
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = F.max_pool2d(x, 3, stride=2)
        return x.mean((2, 3))


def enlarged(x: Tensor, side: int) -> Tensor:
    """Resize bilinearly as TensorFlow 1: output pixel n is at `n * size / side`, no half-pixel shift, no smoothing."""
    for dimension in (-2, -1):
        size = x.shape[dimension]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * (size / side)
        low = at.floor().long().clamp_max(size - 1)
        high = (low + 1).clamp_max(size - 1)
        weight = (at - low).to(x.dtype)
        weight = weight[:, None] if dimension == -2 else weight
        below = x.index_select(dimension, low)
        x = below + (x.index_select(dimension, high) - below) * weight
    return x


class InceptionFeatures:
    """The network as `image_quality.ImageFeatures`."""

    name = "inception-2015-12-05"
    channels = CHANNELS

    def __init__(self, network: Inception, digest: str) -> None:
        self.network, self.digest = network.eval().requires_grad_(False), digest

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(images).permute(0, 3, 1, 2)
        return self.network(x.to(self.network.Conv2d_1a_3x3.conv.weight.device)).double().cpu().numpy()


def check_inception(path: Path) -> str:
    """Return the hash of the file with FID's weights. Raises UserError, with its source, for another file."""
    expected = FILE.removesuffix(".pth").rpartition("-")[2]
    if not path.is_file():
        raise UserError(f"{path}: expected {FILE} (SHA-256 {expected}...), found no file; people get it from {URL}")
    digest = sha256(path)
    if not digest.startswith(expected):
        raise UserError(f"{path}: expected SHA-256 {expected}..., found {digest[:16]}...; people get it from {URL}")
    return digest


def load_inception(path: Path, device: torch.device | str = "cpu") -> InceptionFeatures:
    """Read FID's weights after checking the file's hash; only tensors are unpickled."""
    digest = check_inception(path)
    network = Inception()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network.load_state_dict({name: value for name, value in weights.items() if not name.startswith("fc.")})
    return InceptionFeatures(network.to(device), digest[:8])
