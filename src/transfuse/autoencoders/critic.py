"""The patch discriminator (Isola et al. 2017, as in Esser et al. 2021): is this patch of an image real?"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


class PatchCritic(nn.Module):
    """Images `[image, 3, row, column]` -> one score per patch `[image, 1, row / 4, column / 4]`; positive: real.

    Two convolutions of stride 2, two of stride 1, as for small images; group norms where the original has batch norms,
    so that an image is judged alone and the parts of a step do not depend on how it was split.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.halve = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.halve_norm = nn.GroupNorm(GROUPS, 2 * width)
        self.widen = nn.Conv2d(2 * width, 4 * width, 3, padding=1)
        self.widen_norm = nn.GroupNorm(GROUPS, 4 * width)
        self.score = nn.Conv2d(4 * width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.enter(x), 0.2)
        x = F.leaky_relu(self.halve_norm(self.halve(x)), 0.2)
        return self.score(F.leaky_relu(self.widen_norm(self.widen(x)), 0.2))
