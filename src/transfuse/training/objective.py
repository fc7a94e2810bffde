"""What is minimised: `L = L_LM + lambda * L_DDPM` (Transfusion section 3.1), each a mean over its own targets.

The rival and the control minimise the next-token loss alone, over text and codes alike (Chameleon) or text (Llama).
An objective gives *sums* and *counts*; the loop divides by counts taken over the whole step (all micro-batches, all
ranks), so that splitting a step never changes its loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autoencoders import ImageAutoencoder
from ..diffusion import Process
from ..model import LMHeadFn, Transfusion, for_batch, group_by_shape, stack_group
from ..rng import generator_for
from ..sequence import Batch, Images, shapes_of, stacked
from .token_loss import token_losses

ENCODED = 128
"""on a GPU pictures are encoded in multiples of so many"""

Details = dict[str, tuple[Tensor | float, float]]


@dataclass
class Sums:
    """Summed losses `[term]` with gradient, and details to log: name -> (sum, count), without. A sum may stay a tensor:
    to ask a device for its value is to wait for it."""

    losses: Tensor
    details: Details = field(default_factory=dict)


class StepBatch(Protocol):
    """What the loop needs of a batch: who is in it, how much of what (named, to be summed up), and to move it."""

    @property
    def samples(self) -> tuple[int, ...]: ...

    @property
    def quantities(self) -> dict[str, int]: ...

    def to(self, device: torch.device | str) -> Any: ...


class Objective(Protocol):
    """What the loop needs to train anything: named terms, their weights, their counts and their sums.

    before_step(model, batches) is called on every rank with its micro-batches of a step, before their sums.
    after_step(model, step, batches) is called when the optimizer has changed the weights, `step` being the number of
    steps done.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def counts(self, batch: Any) -> tuple[int, ...]: ...

    def before_step(self, model: nn.Module, batches: Sequence[Any]) -> None: ...

    def sums(self, model: nn.Module, batch: Any) -> Sums: ...

    def offenders(self, model: nn.Module, batch: Any) -> list[int]: ...

    def after_step(self, model: nn.Module, step: int, batches: Sequence[Any]) -> None: ...


@dataclass(frozen=True)
class ObjectiveConfig:
    image_weight: float = 5.0
    """lambda: weight of the diffusion loss beside the text loss"""
    z_weight: float = 0.0
    """of the squared logarithm of the softmax's denominator, which keeps logits from drifting (Chameleon: 1e-5)"""
    timestep_bins: int = 10
    """the diffusion loss is also logged in this many equal bins of the timestep"""

    def __post_init__(self) -> None:
        for name in ("image_weight", "z_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name}: expected at least 0, found {getattr(self, name)}")
        if self.timestep_bins < 1:
            raise ValueError(f"objective.timestep_bins: expected at least 1, found {self.timestep_bins}")


@dataclass
class Noised:
    """Images as the network sees them: latents x_t, timesteps `[I]`, and the target each prediction is held against."""

    latents: Images
    timesteps: Tensor
    targets: Images


class TokenObjective:
    """Plain next-token loss: cross-entropy summed over all targets, text and codes of one joint vocabulary.

    The softmax is over the whole vocabulary at every position, as in Chameleon: text competes with codes.
    """

    names: tuple[str, ...] = ("tokens",)
    weights: tuple[float, ...] = (1.0,)

    def __init__(self, config: ObjectiveConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        if config.z_weight:
            self.names, self.weights = (*self.names, "z"), (*self.weights, config.z_weight)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        return (len(batch.targets),) * len(self.names)

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Forward pass, and losses summed over the batch's own targets; text and codes apart among the details."""
        found = self._losses(model, batch)
        entropy, coded = found[0].detach(), batch.is_image_token
        details: Details = {
            name: (entropy[chosen].sum(), float(chosen.sum()))
            for name, chosen in (("text", ~coded), ("codes", coded))
            if bool(chosen.any())
        }
        return Sums(torch.stack([term.sum() for term in found]), details)

    @torch.no_grad()
    def offenders(self, model: nn.Module, batch: Batch) -> list[int]:
        """Samples whose own loss is not finite."""
        return _documents_of(batch, ~self._losses(model, batch)[0].isfinite())

    def before_step(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Nothing to do."""

    def after_step(self, model: nn.Module, step: int, batches: Sequence[Batch]) -> None:
        """Nothing to do."""

    def _losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """`[1 or 2, M]`, as `token_losses` gives them."""
        assert isinstance(model, Transfusion)
        attend, dropout = for_batch(batch, model.compute_dtype), _dropout(model, self.seed, batch)
        lm_head_fn = _token_losses(batch, self.config)
        losses, _ = model(
            batch.input_ids, batch.position_ids, attend, batch.loss_positions, dropout=dropout, lm_head_fn=lm_head_fn
        )
        return losses


def _token_losses(batch: Batch, config: ObjectiveConfig) -> LMHeadFn:
    return partial(token_losses, targets=batch.targets, z=bool(config.z_weight))


def _documents_of(batch: Batch, targets: Tensor) -> list[int]:
    """Sample numbers of the documents in which chosen targets `[M]` bool lie."""
    bounds = torch.tensor(batch.documents).cumsum(0)
    documents = torch.bucketize(batch.loss_positions.cpu()[targets.cpu()], bounds, right=True)
    return [batch.samples[document] for document in documents.tolist()]


def _dropout(model: Transfusion, seed: int, batch: Batch) -> torch.Generator | None:
    """What draws dropped elements: by the batch's first sample, so that a resumed run drops the same."""
    if not model.config.dropout:
        return None
    return generator_for(seed, "dropout", batch.samples[0], device=batch.input_ids.device)


@dataclass
class Losses:
    """Those of tokens `[1 or 2, M]`, mean squared error of each image `[I]`, its timestep `[I]`."""

    tokens: Tensor
    image: Tensor
    timesteps: Tensor


class TransfusionObjective:
    """Cross-entropy summed over text targets; mean squared error per image, summed over images.

    autoencoder: encodes the pictures that come as pixels, on its own device.
    """

    names: tuple[str, ...] = ("text", "image")

    def __init__(
        self, config: ObjectiveConfig, process: Process, seed: int, autoencoder: ImageAutoencoder | None = None
    ) -> None:
        self.config, self.process, self.seed, self.autoencoder = config, process, seed, autoencoder
        self.weights: tuple[float, ...] = (1.0, config.image_weight)
        if config.z_weight:
            self.names, self.weights = (*self.names, "z"), (*self.weights, config.z_weight)

    def counts(self, batch: Batch) -> tuple[int, ...]:
        counts = len(batch.targets), batch.image_targets
        return (*counts, len(batch.targets)) if self.config.z_weight else counts

    def draw(self, batch: Batch) -> Batch:
        """With timesteps and noise: t uniform in 1..T (or up to the image's cap), context images stay clean at t = 0.

        Both draws depend on (seed, sample, image) alone, so resuming or resharding changes nothing. A loader does this
        ahead: a draw for each image costs more time than a GPU takes for its share of a step.
        """
        timesteps = torch.zeros(len(batch.latents), dtype=torch.int64)
        noise: list[Tensor] = []
        for number, ((sample, image), shape) in enumerate(zip(batch.noise_ids, shapes_of(batch.latents), strict=True)):
            generator = generator_for(self.seed, "noise", sample, image)
            if batch.denoise[number]:
                most = self.process.config.timesteps
                cap = min(int(batch.max_timestep[number]) or most, most)
                timesteps[number] = torch.randint(1, cap + 1, (), generator=generator)
            noise.append(torch.randn(shape, generator=generator))
        return replace(batch, timesteps=timesteps, noise=stacked(noise))

    def noise(self, batch: Batch) -> Noised:
        """Noise a batch, whose pictures are encoded, as `draw` says."""
        if batch.timesteps is None:
            batch = self.draw(batch).to(batch.input_ids.device)
        timesteps = batch.timesteps
        assert timesteps is not None
        if isinstance(batch.latents, Tensor) and isinstance(batch.noise, Tensor):
            clean, drawn, t = batch.latents, batch.noise, timesteps.to(batch.latents.device)
            return Noised(self.process.add_noise(clean, drawn, t), timesteps, self.process.target(clean, drawn, t))
        triples = list(zip(batch.latents, batch.noise, timesteps.unbind(0), strict=True))
        return Noised(
            [self.process.add_noise(clean, drawn, t) for clean, drawn, t in triples],
            timesteps,
            [self.process.target(clean, drawn, t) for clean, drawn, t in triples],
        )

    def encoded(self, batch: Batch) -> Batch:
        """With the latents of what came as pixels."""
        if not len(batch.pixels):
            return batch
        if self.autoencoder is None:
            raise ValueError("autoencoder: expected one, for pictures that come as pixels, found none")
        if isinstance(batch.latents, Tensor) and isinstance(batch.pixels, Tensor):
            return replace(batch, latents=_encoded(self.autoencoder, batch.pixels), pixels=())
        latents = list(batch.latents)
        waiting = [number for number, latent in enumerate(latents) if latent.is_meta]
        for group in group_by_shape(batch.pixels):
            found = _encoded(self.autoencoder, stack_group(batch.pixels, group))
            for number, latent in zip(group, found, strict=True):
                latents[waiting[number]] = latent
        return replace(batch, latents=stacked(latents), pixels=())

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Forward pass, and both losses summed over the batch's own targets."""
        found = self._losses(model, batch)
        weighted = (found.image * self.process.weight(found.timesteps).to(found.image))[batch.denoise]
        entropy, *z = [term.sum() for term in found.tokens]
        bins = self._bins(found.image.detach(), found.timesteps, batch)
        return Sums(torch.stack([entropy, weighted.sum(), *z]), bins)

    @torch.no_grad()
    def offenders(self, model: nn.Module, batch: Batch) -> list[int]:
        """Samples whose own loss is not finite."""
        found = self._losses(model, batch)
        images = torch.nonzero(~found.image.isfinite().cpu() & batch.denoise).flatten()
        return _documents_of(batch, ~found.tokens[0].isfinite()) + [batch.noise_ids[i][0] for i in images.tolist()]

    def before_step(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        """Nothing to do."""

    def after_step(self, model: nn.Module, step: int, batches: Sequence[Batch]) -> None:
        """Nothing to do."""

    def _losses(self, model: nn.Module, batch: Batch) -> Losses:
        assert isinstance(model, Transfusion)
        batch = self.encoded(batch)
        noised = self.noise(batch)
        losses, predictions = model(
            batch.input_ids,
            batch.position_ids,
            for_batch(batch, model.compute_dtype),
            batch.loss_positions,
            batch.patches,
            noised.latents,
            noised.timesteps.to(batch.input_ids.device),
            _dropout(model, self.seed, batch),
            _token_losses(batch, self.config),
        )
        return Losses(losses, self._errors(predictions, noised, batch.input_ids.device), noised.timesteps)

    def _errors(self, predictions: Images, noised: Noised, device: torch.device) -> Tensor:
        """Mean squared error of each image `[I]`."""
        if not len(predictions):
            return torch.zeros(0, device=device)
        if isinstance(predictions, Tensor) and isinstance(noised.targets, Tensor):
            return (predictions - noised.targets).square().flatten(1).mean(1)
        pairs = zip(predictions, noised.targets, strict=True)
        return torch.stack([F.mse_loss(prediction, target) for prediction, target in pairs])

    def _bins(self, errors: Tensor, timesteps: Tensor, batch: Batch) -> Details:
        """Unweighted image error by bin of the timestep."""
        bins = self.config.timestep_bins
        number = (timesteps[batch.denoise] - 1) * bins // self.process.config.timesteps
        chosen = errors.float()[batch.denoise]
        total = torch.zeros(bins, device=errors.device).index_add_(0, number.to(errors.device), chosen)
        count = torch.bincount(number, minlength=bins).tolist()
        return {f"image_by_timestep/{i}": (total[i], count[i]) for i in range(bins)}


def _encoded(autoencoder: ImageAutoencoder, pictures: Tensor) -> Tensor:
    """uint8 `[image, row, column, 3]` -> latents."""
    count = len(pictures)
    if pictures.is_cuda:  # cuDNN plans every convolution anew for each number of images it has not met
        pictures = torch.cat([pictures, pictures[:1].expand(-count % ENCODED, *pictures.shape[1:])])
    return autoencoder.latents(pictures)[:count]
