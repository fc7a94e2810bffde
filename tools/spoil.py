"""Spoils drawings in named ways: what the open-set classifier must refuse, and the small faults that it must not mind.

Every function takes a `Batch` and a generator, and returns float32 images `[image, 3, side, side]` in [0, 1]. Lengths
are shares of the thing's own side, so a small thing is spoiled as much as a large one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Batch:
    """Drawings of single things, and of other things in the same places.

    images, others  float32 `[image, 3, side, side]` in [0, 1], on the same backgrounds
    background      float32 `[image, 3, 1, 1]`
    place           float32 `[image, 3]`: centre x, centre y and side of the thing, as shares of the frame
    """

    images: Tensor
    others: Tensor
    background: Tensor
    place: Tensor

    def __getitem__(self, chosen: slice | Tensor) -> Batch:
        return Batch(self.images[chosen], self.others[chosen], self.background[chosen], self.place[chosen])

    @property
    def extent(self) -> Tensor:
        """The thing's side as a share of the frame, `[image, 1, 1, 1]`."""
        return self.place[:, 2].view(-1, 1, 1, 1)

    def coordinates(self) -> Tensor:
        """Positions around the thing's centre in units of its side, `[image, 2 (x, y), side, side]`."""
        side = self.images.shape[-1]
        axis = (torch.arange(side, dtype=torch.float32) + 0.5) / side
        frame = torch.stack([axis.view(1, -1).expand(side, side), axis.view(-1, 1).expand(side, side)])
        return (frame - self.place[:, :2].view(-1, 2, 1, 1)) / self.extent


Spoil = Callable[[Batch, torch.Generator], Tensor]


def between(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw one number for each image, `[count, 1, 1, 1]`."""
    return low + (high - low) * torch.rand((count, 1, 1, 1), generator=generator)


def smooth(batch: Batch, channels: int, cells: int, generator: torch.Generator, mode: str = "bicubic") -> Tensor:
    """Draw noise of about unit variance with `cells` bumps along the thing's side, `[image, channels, side, side]`.

    mode: "nearest" gives squares.
    """
    coarse = torch.randn((len(batch.images), channels, 2 * cells, 2 * cells), generator=generator)
    around = batch.coordinates().permute(0, 2, 3, 1)
    field = F.grid_sample(coarse, around, mode=mode, padding_mode="reflection", align_corners=False)
    return field if mode == "nearest" else 1.3 * field


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Convolve each image with a Gaussian of `sigma` pixels, `[image, 1, 1, 1]`."""
    side = x.shape[-1]
    down, across = torch.fft.fftfreq(side).view(-1, 1), torch.fft.rfftfreq(side).view(1, -1)
    gain = torch.exp(-2 * torch.pi**2 * sigma**2 * (down**2 + across**2))
    return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(side, side))


def displaced(x: Tensor, batch: Batch, offset: Tensor) -> Tensor:
    """Sample each image at its own positions plus `offset`, `[image, 2, side, side]` in units of the thing's side."""
    frame = (batch.coordinates() + offset) * batch.extent + batch.place[:, :2].view(-1, 2, 1, 1)
    return F.grid_sample(x, (2 * frame - 1).permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def matte(batch: Batch) -> Tensor:
    """Where the thing is, `[image, 1, side, side]` in [0, 1]."""
    return ((batch.images - batch.background).abs().amax(1, keepdim=True) * 8).clamp(max=1)


def over(batch: Batch, colour: Tensor, mask: Tensor) -> Tensor:
    """Lay colours over the plain background."""
    return torch.lerp(batch.background.expand_as(batch.images), colour, mask)


# --- faults that a good drawing may have ------------------------------------------------------------------------------


def slightly(batch: Batch, generator: torch.Generator) -> Tensor:
    """Bend, blur, tint and roughen a little, by amounts of each image's own; half of them are mirrored."""
    x, count, side = batch.images, len(batch.images), batch.images.shape[-1]
    bent = smooth(batch, 2, 5, generator) * between(0, 0.055, count, generator)
    jolted = smooth(batch, 2, 3, generator, "nearest") * between(0, 0.03, count, generator)
    x = blurred(displaced(x, batch, bent + jolted), between(0, 0.04, count, generator) * batch.extent * side)
    x = x + smooth(batch, 3, 8, generator) * matte(batch) * between(0, 0.1, count, generator)
    return roughened(x, generator)


def roughened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Recolour, tint, add noise and mirror: what says nothing about how plain the thing is.

    A quarter are recoloured, towards gray or another order of the channels, so that colour alone never settles a noun.
    """
    count = len(x)
    order = torch.randperm(3, generator=generator)
    other = torch.lerp(x[:, order], x.mean(1, keepdim=True), between(0, 1, count, generator))
    x = torch.where(torch.rand((count, 1, 1, 1), generator=generator) < 0.25, other, x)
    x = x * between(0.88, 1.12, count, generator) + 0.1 * (torch.rand((count, 3, 1, 1), generator=generator) - 0.5)
    x = x + between(0, 0.06, count, generator) * torch.randn(x.shape, generator=generator)
    return torch.where(torch.rand((count, 1, 1, 1), generator=generator) < 0.5, x.flip(3), x).clamp(0, 1)


# --- spoiled: in training ---------------------------------------------------------------------------------------------


def blur(batch: Batch, generator: torch.Generator) -> Tensor:
    """So far out of focus that only patches of colour are left."""
    return blurred(
        batch.images, between(0.11, 0.25, len(batch.images), generator) * batch.extent * batch.images.shape[-1]
    )


def warp(batch: Batch, generator: torch.Generator) -> Tensor:
    """Bent like rubber."""
    x = batch.images
    cells = int(torch.randint(3, 7, (), generator=generator))
    return displaced(x, batch, smooth(batch, 2, cells, generator) * between(0.11, 0.25, len(x), generator))


def blend(batch: Batch, generator: torch.Generator) -> Tensor:
    """Two things, each half transparent."""
    return torch.lerp(batch.images, batch.others, between(0.38, 0.62, len(batch.images), generator))


def halves(batch: Batch, generator: torch.Generator) -> Tensor:
    """One thing on one side of a line through the middle, another on the other."""
    return torch.where(_side_of_line(batch, generator, 0.08) > 0, batch.images, batch.others)


def _side_of_line(batch: Batch, generator: torch.Generator, off: float) -> Tensor:
    count = len(batch.images)
    angle = between(0, 2 * torch.pi, count, generator)
    x, y = batch.coordinates().split(1, dim=1)
    return x * angle.cos() + y * angle.sin() + between(-off, off, count, generator)


def blob(batch: Batch, generator: torch.Generator) -> Tensor:
    """A rounded patch of the thing's colours, its shape and its parts gone."""
    count, side = len(batch.images), batch.images.shape[-1]
    mask = matte(batch)
    colour = blurred(batch.images * mask, between(0.12, 0.3, count, generator) * batch.extent * side)
    weight = blurred(mask, between(0.12, 0.3, count, generator) * batch.extent * side)
    shape = blurred(mask, between(0.1, 0.16, count, generator) * batch.extent * side)
    shape = shape + 0.12 * smooth(batch, 1, 6, generator) * (shape > 0.05)
    average = (batch.images * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp_min(1)
    local = (colour / weight.clamp_min(0.05)).clamp(0, 1)
    return over(batch, torch.lerp(average, local, between(0, 1, count, generator)), ((shape - 0.42) * 6).clamp(0, 1))


def jigsaw(batch: Batch, generator: torch.Generator) -> Tensor:
    """Cut into squares that lie wrongly."""
    cells = int(torch.randint(2, 7, (), generator=generator))
    offset = smooth(batch, 2, cells, generator, "nearest") * between(0.14, 0.35, len(batch.images), generator)
    return displaced(batch.images, batch, offset)


def cloud(batch: Batch, generator: torch.Generator) -> Tensor:
    """Noised and smoothed again, as a denoiser does that knows colours and no shapes."""
    count, side = len(batch.images), batch.images.shape[-1]
    cells = int(torch.randint(5, 11, (), generator=generator))
    near = blurred(matte(batch), 0.06 * batch.extent * side).clamp(0, 1)
    x = blurred(batch.images, between(0.04, 0.09, count, generator) * batch.extent * side)
    return (x + smooth(batch, 3, cells, generator) * near * between(0.15, 0.5, count, generator)).clamp(0, 1)


def erased(batch: Batch, generator: torch.Generator) -> Tensor:
    """Half or more of the thing is missing."""
    keep = (_side_of_line(batch, generator, 0.05) > 0.05) & (matte(batch) > 0)
    strips = torch.lerp(batch.background.expand_as(batch.images), batch.images, keep.float())
    holes = smooth(batch, 1, 4, generator) > 0.2
    mixed = torch.where(holes, batch.images, batch.background)
    return torch.where(torch.rand((len(holes), 1, 1, 1), generator=generator) < 0.6, strips, mixed)


def texture(batch: Batch, generator: torch.Generator) -> Tensor:
    """The thing's pattern in a patch of another shape."""
    x, count = batch.images, len(batch.images)
    inside = batch.coordinates() * between(0.3, 0.8, count, generator)
    swirled = inside - batch.coordinates() + smooth(batch, 2, 6, generator) * between(0.08, 0.3, count, generator)
    radius = batch.coordinates().square().sum(1, keepdim=True).sqrt()
    square = batch.coordinates().abs().amax(1, keepdim=True)
    radius = torch.where(torch.rand((count, 1, 1, 1), generator=generator) < 0.4, square, radius)
    shape = 0.4 + 0.07 * smooth(batch, 1, 5, generator) - radius
    return over(batch, displaced(x, batch, swirled), (shape * 20).clamp(0, 1))


def ghosts(batch: Batch, generator: torch.Generator) -> Tensor:
    """Several copies of the thing over one another, shifted and mirrored: what a mean over places looks like."""
    x = batch.images
    copies = []
    for _ in range(4):
        offset = torch.randn((len(x), 2, 1, 1), generator=generator) * between(0.16, 0.3, len(x), generator)
        copies.append(displaced(x, batch, offset))
    copies[-1] = copies[-1].flip(3)
    return torch.stack(copies).mean(0)


def crowd(batch: Batch, generator: torch.Generator) -> Tensor:
    """The mean of several nouns' drawings, sharpened to a shape."""
    count, side = len(batch.images), batch.images.shape[-1]
    rolled = batch[torch.randperm(count, generator=generator)]
    offset = displaced(
        rolled.images, batch, (rolled.place[:, :2] - batch.place[:, :2]).view(-1, 2, 1, 1) / batch.extent
    )
    shape = (matte(batch) + matte(Batch(batch.others, batch.others, batch.background, batch.place))) / 2
    shape = blurred(shape, 0.05 * batch.extent * side)
    mean = (batch.images + batch.others + offset) / 3
    return over(batch, mean, ((shape - 0.35) * 5).clamp(0, 1))


def patchwork(batch: Batch, generator: torch.Generator) -> Tensor:
    """Every square of a coarse grid drawn by itself, unsure where the thing lies: seams, and a wrong outline."""
    x, count, cells = batch.images, len(batch.images), 4

    def guess() -> Tensor:
        offset = torch.randn((count, 2, cells, cells), generator=generator) * between(0.06, 0.22, count, generator)
        return displaced(x, batch, F.interpolate(offset, x.shape[-2:], mode="nearest"))

    mixed = (guess() + guess() + guess()) / 3
    mask = (mixed - batch.background).abs().amax(1, keepdim=True)
    sharp = ((mask - 0.25 * mask.amax((2, 3), keepdim=True)) * 8).clamp(0, 1)
    return over(batch, torch.lerp(mixed, guess(), between(0.3, 1, count, generator)), sharp)


def latents_noised(latents: Batch, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Latents of unit variance on their way to noise: its share of the variance is between `low` and `high`."""
    t = between(low, high, len(latents.images), generator)
    return (1 - t).sqrt() * latents.images + t.sqrt() * torch.randn(latents.images.shape, generator=generator)


def latents_warped(latents: Batch, generator: torch.Generator) -> Tensor:
    """Latents bent like rubber and somewhat noised: decoded, they have the right colours and textures and no shape."""
    amount = between(0.12, 0.28, len(latents.images), generator)
    bent = displaced(latents.images, latents, smooth(latents, 2, 5, generator) * amount)
    return latents_noised(replace(latents, images=bent), 0, 0.12, generator)


def nothing(batch: Batch, generator: torch.Generator) -> Tensor:
    """A background alone, or coloured clouds."""
    cells = int(torch.randint(2, 9, (), generator=generator))
    clouds = smooth(batch, 3, cells, generator) * between(0, 0.4, len(batch.images), generator)
    return (batch.background + clouds).clamp(0, 1)


TRAINED: dict[str, Spoil] = {
    "blur": blur,
    "warp": warp,
    "blend": blend,
    "halves": halves,
    "blob": blob,
    "jigsaw": jigsaw,
    "cloud": cloud,
    "erased": erased,
    "texture": texture,
    "ghosts": ghosts,
    "crowd": crowd,
    "patchwork": patchwork,
    "nothing": nothing,
}


# --- spoiled: never in training, to measure with ----------------------------------------------------------------------


def mosaic(batch: Batch, generator: torch.Generator) -> Tensor:
    """Three to five squares along the thing's side, each of one colour."""
    x, out = batch.images, []
    for one, place in zip(x, batch.place, strict=True):
        across = max(2, round(float(torch.randint(3, 6, (), generator=generator)) / float(place[2])))
        out.append(F.interpolate(F.adaptive_avg_pool2d(one[None], across), one.shape[-2:], mode="nearest"))
    return torch.cat(out)


def swirl(batch: Batch, generator: torch.Generator) -> Tensor:
    """Turned about its centre, the more the nearer to it."""
    x, y = batch.coordinates().split(1, dim=1)
    angle = between(3, 6, len(x), generator) * (1 - (x.square() + y.square()).sqrt() / 0.6).clamp(min=0)
    angle = angle * torch.where(torch.rand((len(x), 1, 1, 1), generator=generator) < 0.5, 1, -1)
    turned = torch.cat([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], dim=1)
    return displaced(batch.images, batch, turned - batch.coordinates())


def slipped(batch: Batch, generator: torch.Generator) -> Tensor:
    """Bands of rows that slipped sideways."""
    x = batch.images
    rows = torch.randn((len(x), 1, 16, 1), generator=generator) * between(0.2, 0.35, len(x), generator)
    around = batch.coordinates().permute(0, 2, 3, 1)
    slips = F.grid_sample(rows, around, mode="nearest", padding_mode="reflection", align_corners=False)
    return displaced(x, batch, torch.cat([slips, torch.zeros_like(slips)], dim=1))


def scattered(batch: Batch, generator: torch.Generator) -> Tensor:
    """Every pixel taken from somewhere near, as through rough glass."""
    x = batch.images
    offset = torch.randn((len(x), 2, *x.shape[-2:]), generator=generator) * between(0.13, 0.25, len(x), generator)
    return displaced(x, batch, offset)


def interleaved(batch: Batch, generator: torch.Generator) -> Tensor:
    """A chessboard of two things."""
    cells = between(3, 5, len(batch.images), generator)
    board = ((batch.coordinates() + 4) * cells).floor().sum(1, keepdim=True) % 2
    return torch.where(board > 0, batch.images, batch.others)


def phases(batch: Batch, generator: torch.Generator) -> Tensor:
    """Waves of the same strengths that start elsewhere: right colours and sizes of parts, wrong places."""
    whole = torch.fft.rfft2(batch.images - batch.background)
    turned = torch.randn((len(whole), 1, *whole.shape[-2:]), generator=generator)
    turned = turned * between(1.6, 2.6, len(whole), generator)
    mixed = torch.fft.irfft2(whole * torch.polar(torch.ones_like(turned), turned), s=batch.images.shape[-2:])
    near = (batch.coordinates().abs().amax(1, keepdim=True) < 0.55).float()
    return (batch.background + mixed * near).clamp(0, 1)


def low_rank(batch: Batch, generator: torch.Generator) -> Tensor:
    """Rebuilt from the few patterns that explain most of many nouns' drawings."""
    count, side = len(batch.images), 24
    axis = (torch.arange(side) + 0.5) / side - 0.5
    box = torch.stack([axis.view(1, -1).expand(side, side), axis.view(-1, 1).expand(side, side)])
    frame = box * batch.extent + batch.place[:, :2].view(-1, 2, 1, 1)
    grid = (2 * frame - 1).permute(0, 2, 3, 1)
    things = F.grid_sample(batch.images - batch.background, grid, padding_mode="border", align_corners=False)
    u, s, v = torch.linalg.svd(things.flatten(1), full_matrices=False)
    rank = min(24, count // 4)
    flat = (u[:, :rank] * s[:rank]) @ v[:rank]
    back = (2 * batch.coordinates()).permute(0, 2, 3, 1)
    return (batch.background + F.grid_sample(flat.view_as(things), back, align_corners=False)).clamp(0, 1)


UNSEEN: dict[str, Spoil] = {
    "mosaic": mosaic,
    "swirl": swirl,
    "slipped": slipped,
    "scattered": scattered,
    "interleaved": interleaved,
    "phases": phases,
    "low rank": low_rank,
}
