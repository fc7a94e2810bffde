"""Distillation: a student draws in a few steps without guidance what its teacher draws in many guided ones.

A step of the student takes the place of several of its teacher's (progressive distillation, arXiv 2202.00512), which
are guided (arXiv 2210.03142). An image of the data is noised to a level where a step of the student begins. The teacher
follows DDIM from there to the level where that step ends. The student learns the one prediction whose step leads to the
same point. Both are one network: the student begins with its teacher's weights. It learns the text of the same
documents, too, so that none is forgotten.

    teacher   t ---> . ---> . ---> s      teacher_steps / steps evaluations, each with and without the prompt
    student   t -----------------> s      one evaluation, with the prompt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..autoencoders import ImageAutoencoder, Pixels
from ..diffusion import Process, Sampler, SamplerConfig
from ..model import Transfusion, for_batch
from ..model.costs import train_flops
from ..sequence import FILL, Batch, Document, Image, Images, SequenceFormat, collate, shapes_of, stacked, unconditional
from .loss import Noised, ObjectiveConfig, TransfusionObjective

Predict = Callable[[Images, Tensor], Images]
"""(x_t of each image, their timesteps `[I]`) -> a teacher's predictions"""


@dataclass(frozen=True)
class DistilConfig:
    """The student's number of steps and its teacher's way of drawing. Raises ValueError, naming the field."""

    steps: int = 0
    """denoising steps of the student, whose teacher is the model in `start`; 0: no distillation"""
    teacher_steps: int | None = None
    """DDIM steps of the teacher, a multiple of `steps`; None: as many as it draws with, rounded up to a multiple"""
    guidance_scale: float | None = None
    """guidance scale of the teacher; None: its own"""
    guidance_interval: tuple[float, float] | None = None
    """noise levels, as shares of T, at which the teacher is guided; None: all, or its own with its own scale"""
    teacher_weights: str = ""
    """fingerprint of the teacher, filled in when a run begins; resuming requires the same"""

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"distil.steps: expected at least 0, found {self.steps}")
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise ValueError(f"distil.teacher_steps: expected at least 1, found {self.teacher_steps}")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"distil.guidance_scale: expected at least 0, found {self.guidance_scale}")
        if (interval := self.guidance_interval) is not None and not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"distil.guidance_interval: expected shares 0 <= low <= high <= 1, found {interval}")


def follow(process: Process, x: Images, levels: Tensor, predict: Predict) -> Images:
    """Return x_s of each image, led by `predict` and DDIM through its levels, int64 `[level, I]`, noisiest first."""
    limit = process.config.clip_x0
    for t, s in pairwise(levels):
        x0 = _each(process.predicted_x0, predict(x, t), x, t)
        if limit is not None:
            x0 = _each(lambda image: image.clamp(-limit, limit), x0)
        x = _each(process.step, x0, x, t, s)
    return x


def step_targets(process: Process, x_t: Images, x_s: Images, t: Tensor, s: Tensor) -> Images:
    """Return for each image the prediction at x_t whose step leads to x_s."""
    x0 = _each(process.x0_of_step, x_s, x_t, t, s)
    return _each(process.target, x0, _each(process.implied_noise, x0, x_t, t), t)


class DistillationObjective(TransfusionObjective):
    """Text loss as in training, and the squared error of a step of the student against where its teacher arrives.

    teacher   a network without gradients, on the device of the batches
    form      the layout of the teacher's prompts, for its evaluation without one
    distil    resolved: the teacher's settings are not None

    Raises ValueError for more steps than the process has levels.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        process: Process,
        seed: int,
        teacher: Transfusion,
        form: SequenceFormat,
        distil: DistilConfig,
        autoencoder: ImageAutoencoder | Pixels | None = None,
    ) -> None:
        super().__init__(config, process, seed, autoencoder)
        assert distil.teacher_steps is not None
        assert distil.guidance_scale is not None
        self.teacher, self.form, self.distil = teacher, form, distil
        self.sampler = Sampler(process, SamplerConfig("ddim", distil.steps))
        self.teachers = Sampler(process, SamplerConfig("ddim", distil.teacher_steps))
        self.scale, self.interval = distil.guidance_scale, distil.guidance_interval or (0.0, 1.0)
        self.substeps = distil.teacher_steps // distil.steps

    def sample_timestep(self, generator: torch.Generator, rows: int, columns: int, cap: int | None) -> int:
        """Draw a level where a step of the student begins. `cap` is without effect: resolved recipes have none."""
        step = int(torch.randint(self.distil.steps, (), generator=generator))
        return self.sampler.timesteps_for(rows, columns)[step]

    @torch.no_grad()
    def noise(self, batch: Batch) -> Noised:
        """Add noise to a batch of encoded images; the targets are where the teacher arrives."""
        noised = super().noise(batch)
        drawn = batch.denoise.nonzero()[:, 0].tolist()
        if not drawn:
            return noised
        x_t = _pick(noised.latents, drawn)
        levels = self._levels(noised.timesteps[drawn], shapes_of(x_t))
        x_s = follow(self.process, x_t, levels, self._guided(batch, noised, drawn))
        targets = step_targets(self.process, x_t, x_s, levels[0], levels[-1])
        return noised._replace(targets=_put(noised.targets, drawn, targets))

    def teacher_flops(self, batch: Batch) -> int:
        """Return the operations of the teacher's evaluations, all counted as guided."""
        passes = [replace(batch, loss_positions=batch.loss_positions[:0])]
        if self.scale != 1 and batch.denoise.any():
            passes.append(self._without_prompt(_pick(batch.latents, batch.denoise.nonzero()[:, 0].tolist())))
        return self.substeps * sum(train_flops(self.teacher.config, each) for each in passes) // 3

    def _levels(self, timesteps: Tensor, shapes: Sequence[torch.Size]) -> Tensor:
        """Return the levels `[substeps + 1, I]` of the teacher's steps from each timestep on.

        The first and the last are those of the student's sampler. With a shift and very many steps a level of the
        teacher's sampler may be beyond them; it is clamped, and a step between equal levels changes nothing.
        """
        rows = []
        for t, (_, height, width) in zip(timesteps.tolist(), shapes, strict=True):
            grid = (*self.sampler.timesteps_for(height, width), 0)
            step = grid.index(t)
            end = grid[step + 1]
            between = self.teachers.timesteps_for(height, width)[step * self.substeps :][1 : self.substeps]
            rows.append((t, *(min(max(level, end), t) for level in between), end))
        return torch.tensor(rows).T

    def _guided(self, batch: Batch, noised: Noised, drawn: Sequence[int]) -> Predict:
        """Return the function of the teacher's guided predictions for the drawn images of a batch."""
        null = self._without_prompt(_pick(noised.latents, drawn)).to(batch.input_ids.device)
        with_prompt, without_prompt = self._predictions(batch), self._predictions(null)

        def predict(x: Images, t: Tensor) -> Images:
            timesteps = noised.timesteps.clone()
            timesteps[drawn] = t
            predictions = _pick(with_prompt(_put(noised.latents, drawn, x), timesteps), drawn)
            level = t / self.process.config.timesteps
            guided = (self.interval[0] <= level) & (level <= self.interval[1])
            if self.scale == 1 or not guided.any():
                return predictions
            scales = torch.where(guided, self.scale, 1.0)  # of each image
            return _each(
                # Classifier-free guidance (arXiv 2207.12598) of one image, or of all.
                lambda given, null, scale: null + scale[..., None, None, None].to(given) * (given - null),
                predictions,
                without_prompt(x, t),
                scales,
            )

        return predict

    def _without_prompt(self, latents: Images) -> Batch:
        """Return the null branch of images, as training's caption drop and the sampler have it."""
        documents = [unconditional(Document([Image(latent)], closed=False)) for latent in latents]
        return collate(documents, self.form, self.teacher.config.image_attention, FILL)

    def _predictions(self, batch: Batch) -> Predict:
        """Return the function of the teacher's predictions of a batch's images, with other latents for them."""
        attend = for_batch(batch, self.teacher.compute_dtype, self.teacher.config)

        def predict(latents: Images, timesteps: Tensor) -> Images:
            return self.teacher(
                batch.input_ids,
                batch.position_ids,
                attend,
                batch.loss_positions[:0],
                batch.patches,
                latents,
                timesteps.to(batch.input_ids.device),
            ).predictions

        return predict


def _each(function: Callable[..., Tensor], *of_images: Images) -> Images:
    """Apply a function of one or of many images: to stacked ones together, else to each with its own values."""
    if all(isinstance(values, Tensor) for values in of_images):
        return function(*of_images)
    return tuple(function(*values) for values in zip(*of_images, strict=True))


def _pick(images: Images, numbers: Sequence[int]) -> Images:
    return images[numbers] if isinstance(images, Tensor) else stacked([images[number] for number in numbers])


def _put(images: Images, numbers: Sequence[int], values: Images) -> Images:
    """Return the images with new values at some numbers."""
    new = dict(zip(numbers, values, strict=True))
    return stacked([new.get(number, image) for number, image in enumerate(images)])
