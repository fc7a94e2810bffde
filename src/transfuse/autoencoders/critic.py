"""The patch discriminator of the adversarial loss (arXiv 1611.07004, as in VQGAN, arXiv 2012.09841)."""

from __future__ import annotations

from torch import Tensor, nn

GROUPS = 8
SMALLEST = 24
"""side of the smallest image it scores, in pixels"""


class PatchCritic(nn.Module):
    """Scores patches of images, `[image, 3, row, column] -> [image, 1, row / 8 - 2, column / 8 - 2]`; positive is real.

    VQGAN's layout: three convolutions of stride 2 and two of stride 1, all 4 x 4, so that a score has a receptive field
    of 70 pixels; 2.8M parameters. Group norms replace batch norms, so that a score depends on its image alone and a
    step's result does not depend on how it is split.
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
