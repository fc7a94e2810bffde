"""The patch discriminator (Isola et al. 2017, as in Esser et al. 2021): is this patch of an image real?"""

from __future__ import annotations

from torch import Tensor, nn

GROUPS = 8
SMALLEST = 24
"""pixels a side of the smallest image it scores"""


class PatchCritic(nn.Module):
    """Images `[image, 3, row, column]` -> a score per patch, `[image, 1, row / 8 - 2, column / 8 - 2]`; positive: real.

    Esser's layout: three convolutions of stride 2 and two of stride 1, all 4 x 4, so that a score sees 70 pixels a
    side; 2.8M parameters. Group norms where the original has batch norms, so that an image is judged alone and the
    parts of a step do not depend on how it was split.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for inputs, outputs, stride in zip(widths, widths[1:], (2, 2, 1), strict=False):
            layers.append(nn.Conv2d(inputs, outputs, 4, stride=stride, padding=1, bias=False))
            layers += [nn.GroupNorm(GROUPS, outputs), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
