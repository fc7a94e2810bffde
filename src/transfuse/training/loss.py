"""Losses: `L = L_LM + lambda * L_DDPM` (Transfusion section 3.1), each a mean over its own targets.

The baselines minimise the next-token loss alone, over text and codes alike (Chameleon) or over text (Llama). An
objective returns sums and counts; the trainer divides by counts of the whole step (all micro-batches, all ranks), so
that splitting a step never changes its loss.

The token loss never holds all logits at once: 32,000 ids at 100,000 targets are 13 GB in float32, and as much again for
their gradient. Above `max_logits` they are computed in chunks of rows, and again in the backward pass, for one more
product of the output layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..autoencoders import ImageAutoencoder, Pixels
from ..diffusion import Process
from ..model import Output, Transfusion, for_batch, group_by_shape, stack_group
from ..model.layers import Linear, TiedLinear
from ..rng import generator_for
from ..sequence import Batch, Images, shapes_of, stacked

MAX_LOGITS = 2**26
"""logits that may exist at once: 256 MiB in float32, plus some copies"""
ENCODE_MULTIPLE = 128  # images per call of the autoencoder on a GPU, a multiple of this

PatchFeatures = Callable[[Tensor], Tensor]
"""a frozen network: uint8 `[image, row, column, 3]` -> features of the patches, `[image, row, column, D]`"""
Details = dict[str, tuple[Tensor | float, float]]
"""name -> (sum, count); a sum may be a tensor, because reading its value would wait for the device"""


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the loss terms. Raises ValueError, naming the field, for values out of range."""

    image_weight: float = 5.0
    """lambda: weight of the diffusion loss; the text loss has weight 1 (paper: 5)"""
    z_weight: float = 0.0
    """weight of z-loss, the squared log of the softmax's denominator (Chameleon: 1e-5)"""
    timestep_bins: int = 10
    """the diffusion loss is also logged in this many equal bins of the timestep"""
    align_weight: float = 0.0
    """weight of the alignment of images' hidden states with another network's features of the clean image (REPA, arXiv
    2410.06940: 0.5); 0: none"""
    align_layer: int = 2
    """number of the block, from 1, whose output is aligned"""
    align_teacher: str = "imagenet-mobilenet"
    """the network with the features: a file with weights of VGG16, ResNet-50 or MobileNetV2, or the latter's of an
    optional package"""

    def __post_init__(self) -> None:
        for name in ("image_weight", "z_weight", "align_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"objective.{name}: expected at least 0, found {getattr(self, name)}")
        for name in ("timestep_bins", "align_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name}: expected at least 1, found {getattr(self, name)}")


@dataclass
class LossSums:
    """Summed losses `[term]` with gradient, and details to log, without."""

    losses: Tensor
    details: Details = field(default_factory=dict)


class StepBatch(Protocol):
    """The trainer's view of a batch: its samples, named quantities to be summed, and a move to the device."""

    @property
    def samples(self) -> tuple[int, ...]: ...

    @property
    def quantities(self) -> dict[str, int]: ...

    def to(self, device: torch.device | str) -> Any: ...


class Objective(Protocol):
    """The trainer's view of a training goal: named loss terms with weights, target counts and summed losses."""

    names: tuple[str, ...]
    weights: tuple[float, ...]

    def counts(self, batch: Any) -> tuple[int, ...]:
        """Return the number of targets of each term."""

    def loss(self, model: Any, batch: Any) -> LossSums:
        """Return the losses summed over the batch's targets."""

    def nonfinite_samples(self, model: Any, batch: Any) -> list[int]:
        """Return the samples whose own loss is not finite."""

    def has_images(self, batch: Any) -> bool:
        """Return True if a document of a batch has an image, learned or read."""
        return True

    def before_step(self, model: Any, batches: Sequence[Any]) -> None:
        """Prepare a step: called on every rank with its micro-batches, before their losses."""
        return

    def after_step(self, model: Any, step: int, batches: Sequence[Any]) -> None:
        """Complete a step: called after the optimizer's update; `step` is the number of steps done."""
        return


def token_losses(
    head: Linear | TiedLinear, x: Tensor, targets: Tensor, z: bool, max_logits: int = MAX_LOGITS
) -> Tensor:
    """Return the losses of each target in float32: cross-entropy `[1, M]`, or cross-entropy and z `[2, M]`.

    x [M, C], targets [M]   hidden states, in any dtype, and the next tokens
    z                       add z-loss, the squared log of the softmax's denominator, which keeps logits from drifting

    Chunks give the same losses; gradients of the output layer's weight are summed chunk by chunk in its dtype.
    """
    if len(x) * head.out_features <= max_logits:
        return _token_losses(head, x, targets, z)
    rows = max(1, max_logits // head.out_features)
    parts = [
        # No random numbers are drawn, so no generator state is kept.
        checkpoint(_token_losses, head, *chunk, z, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(x.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _token_losses(head: Linear | TiedLinear, x: Tensor, targets: Tensor, z: bool) -> Tensor:
    logits = head(x).float()
    if not z:
        # Stacked, not `[None]`, because FSDP warns about views in its root's output.
        return torch.stack([F.cross_entropy(logits, targets, reduction="none")])
    denominator = logits.logsumexp(-1)  # computed once for both terms: the logits are the largest tensor of a step
    return torch.stack([denominator - logits.gather(-1, targets[:, None])[:, 0], denominator.square()])


class Noised(NamedTuple):
    """Noised images: latents x_t, timesteps `[I]`, and the targets of the predictions."""

    latents: Images
    timesteps: Tensor
    targets: Images


class TokenObjective(Objective):
    """Next-token loss: cross-entropy summed over all targets, text and codes of a joint vocabulary.

    The softmax covers the whole vocabulary at every position, as in Chameleon, so text competes with codes.
    """

    def __init__(
        self, config: ObjectiveConfig, seed: int, max_logits: int = MAX_LOGITS, terms: dict[str, float] | None = None
    ) -> None:
        self.config, self.seed, self.max_logits = config, seed, max_logits
        terms = (terms or {"tokens": 1.0}) | ({"z": config.z_weight} if config.z_weight else {})
        self.names, self.weights = tuple(terms), tuple(terms.values())

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the number of targets of each term."""
        return (len(batch.targets),) * len(self.names)

    def has_images(self, batch: Batch) -> bool:
        """Return True if a document of the batch has an image; a padding image belongs to none."""
        return len(batch.patches) > 0 and all(sample >= 0 for sample, _ in batch.noise_ids)

    def loss(self, model: Transfusion, batch: Batch) -> LossSums:
        """Return losses summed over the batch's targets; the details split text and codes."""
        losses = self._forward(model, batch).logits
        entropy, codes = losses[0].detach(), batch.is_image_token
        details: Details = {
            name: (entropy[chosen].sum(), float(chosen.sum()))
            for name, chosen in (("text", ~codes), ("codes", codes))
            if bool(chosen.any())
        }
        return LossSums(torch.stack([term.sum() for term in losses]), details)

    @torch.no_grad()
    def nonfinite_samples(self, model: Transfusion, batch: Batch) -> list[int]:
        """Return the samples whose own loss is not finite."""
        return self._samples_of(batch, ~self._forward(model, batch).logits[0].isfinite())

    def _forward(self, model: Transfusion, batch: Batch, noised: Noised | None = None) -> Output:
        """Return the network's output, with the losses of each target `[1 or 2, M]` (`token_losses`) for logits."""
        device, dropout = batch.input_ids.device, None
        if model.config.dropout:  # keyed by the batch's first sample, so that resuming is exact
            dropout = generator_for(self.seed, "dropout", batch.samples[0], device=device)
        z = bool(self.config.z_weight)
        output: Output = model(
            batch.input_ids,
            batch.position_ids,
            for_batch(batch, model.compute_dtype, model.config),
            batch.loss_positions,
            batch.patches,
            *(() if noised is None else (noised.latents, noised.timesteps.to(device))),
            dropout=dropout,
            lm_head_fn=partial(token_losses, targets=batch.targets, z=z, max_logits=self.max_logits),
        )
        return output

    def _samples_of(self, batch: Batch, targets: Tensor) -> list[int]:
        """Return the sample numbers of the documents with a chosen target (bool `[M]`)."""
        bounds = torch.tensor(batch.documents).cumsum(0)
        documents = torch.bucketize(batch.loss_positions.cpu()[targets.cpu()], bounds, right=True)
        return [batch.samples[document] for document in documents.tolist()]


class TransfusionObjective(TokenObjective):
    """Cross-entropy summed over text targets; mean squared error per image, summed over images.

    With `patch_features` also the negative cosine of the network's features and those, summed over the patches of all
    images, those that are shown clean among them (REPA, arXiv 2410.06940).

    autoencoder      encodes images that arrive as pixels, on its device
    patch_features   of the clean images, all of which arrive as pixels, on the same device
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        process: Process,
        seed: int,
        autoencoder: ImageAutoencoder | Pixels | None = None,
        patch_features: PatchFeatures | None = None,
        max_logits: int = MAX_LOGITS,
    ) -> None:
        aligned = {} if patch_features is None else {"align": config.align_weight}
        super().__init__(config, seed, max_logits, {"text": 1.0, "image": config.image_weight, **aligned})
        self.process, self.autoencoder, self.patch_features = process, autoencoder, patch_features

    def counts(self, batch: Batch) -> tuple[int, ...]:
        """Return the number of targets of each term."""
        real = any(sample >= 0 for sample, _ in batch.noise_ids)  # otherwise an image that fills up, alone
        of = {"image": batch.image_targets, "align": len(batch.patches) if real else 0}
        return tuple(of.get(name, len(batch.targets)) for name in self.names)

    def prepare(self, batch: Batch) -> Batch:
        """Return the batch with latents, features and noise: `encode` and `sample_noise`."""
        return self.sample_noise(self.encode(batch))

    def sample_noise(self, batch: Batch) -> Batch:
        """Return the batch with timesteps and noise: t in 1..T (or up to the cap), 0 for context images and originals.

        Both depend on (seed, sample, image) alone, so resuming or resharding changes nothing. Loaders call this ahead
        of the step, because sampling image by image takes longer than a GPU needs for its share of a step.
        """
        timesteps = torch.zeros(len(batch.latents), dtype=torch.int64)
        noise: list[Tensor] = []
        for number, ((sample, image), shape) in enumerate(zip(batch.noise_ids, shapes_of(batch.latents), strict=True)):
            generator = generator_for(self.seed, "noise", sample, image)
            if batch.denoise[number]:
                cap = int(batch.max_timestep[number]) or None
                timesteps[number] = self.sample_timestep(generator, shape[1], shape[2], cap)
            noise.append(torch.randn(shape, generator=generator))
        return replace(batch, timesteps=timesteps, noise=stacked(noise))

    def sample_timestep(self, generator: torch.Generator, rows: int, columns: int, cap: int | None) -> int:
        """Draw the timestep of an image, at most `cap`, whose latent has `rows` and `columns`."""
        return self.process.sample_timestep(generator, rows, columns, cap)

    def noise(self, batch: Batch) -> Noised:
        """Add noise to a batch of encoded images, by its timesteps and noise, which are sampled if it has none."""
        if batch.timesteps is None:
            batch = self.sample_noise(batch).to(batch.input_ids.device)
        timesteps = batch.timesteps
        assert timesteps is not None
        if isinstance(batch.latents, Tensor) and isinstance(batch.noise, Tensor):
            x0, noise, t = batch.latents, batch.noise, timesteps.to(batch.latents.device)
            return Noised(self.process.add_noise(x0, noise, t), timesteps, self.process.target(x0, noise, t))
        triples = list(zip(batch.latents, batch.noise, timesteps.unbind(0), strict=True))
        latents = [self.process.add_noise(x0, noise, t) for x0, noise, t in triples]
        return Noised(latents, timesteps, [self.process.target(x0, noise, t) for x0, noise, t in triples])

    def encode(self, batch: Batch) -> Batch:
        """Return the batch with latents, and with features to align with, of images that arrived as pixels.

        Raises ValueError without an autoencoder.
        """
        if not len(batch.pixels):
            return batch
        if self.patch_features is not None:
            batch = replace(batch, features=self._features(batch, self.patch_features))
        if self.autoencoder is None:
            raise ValueError("autoencoder: expected one, because images arrive as pixels, found none")
        original = dict(batch.copies)
        if isinstance(batch.latents, Tensor) and isinstance(batch.pixels, Tensor):
            encoded = _by_network(self.autoencoder.latents, batch.pixels)
            if original:
                numbers = range(len(batch.latents))
                place = {number: place for place, number in enumerate(n for n in numbers if n not in original)}
                encoded = encoded[[place[original.get(number, number)] for number in numbers]]
            return replace(batch, latents=encoded, pixels=())
        latents = list(batch.latents)
        waiting = [number for number, latent in enumerate(latents) if latent.is_meta and number not in original]
        for group in group_by_shape(batch.pixels):
            encoded = _by_network(self.autoencoder.latents, stack_group(batch.pixels, group))
            for number, latent in zip(group, encoded, strict=True):
                latents[waiting[number]] = latent
        for copy, number in batch.copies:
            latents[copy] = latents[number]
        return replace(batch, latents=stacked(latents), pixels=())

    @torch.no_grad()
    def _features(self, batch: Batch, network: PatchFeatures) -> Tensor:
        """Return a network's features of all patches, `[P, D]`."""
        original = dict(batch.copies)
        waiting = [number for number in range(len(batch.latents)) if number not in original]
        images: dict[int, Tensor] = {}
        for group in group_by_shape(batch.pixels):
            features = _by_network(network, stack_group(batch.pixels, group))
            images.update(zip([waiting[number] for number in group], features, strict=True))
        return torch.cat([images[original.get(n, n)].flatten(0, 1) for n in range(len(batch.latents))])

    def loss(self, model: Transfusion, batch: Batch) -> LossSums:
        """Return both losses summed over the batch's targets; the details are image errors in bins of the timestep."""
        tokens, errors, timesteps, aligned = self._losses(model, batch)
        weighted = (errors * self.process.weight(timesteps).to(errors))[batch.denoise]
        entropy, *z = [term.sum() for term in tokens]
        bins = self.config.timestep_bins
        number = (timesteps[batch.denoise] - 1) * bins // self.process.config.timesteps
        chosen = errors.detach().float()[batch.denoise]
        total = torch.zeros(bins, device=errors.device).index_add_(0, number.to(errors.device), chosen)
        count = torch.bincount(number, minlength=bins).tolist()
        details: Details = {f"image_by_timestep/{i}": (total[i], count[i]) for i in range(bins)}
        return LossSums(torch.stack([entropy, weighted.sum(), *aligned, *z]), details)

    @torch.no_grad()
    def nonfinite_samples(self, model: Transfusion, batch: Batch) -> list[int]:
        """Return the samples whose own loss is not finite."""
        tokens, errors, *_ = self._losses(model, batch)
        images = torch.nonzero(~errors.isfinite().cpu() & batch.denoise).flatten()
        return self._samples_of(batch, ~tokens[0].isfinite()) + [batch.noise_ids[i][0] for i in images.tolist()]

    def _losses(self, model: Transfusion, batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Return token losses `[1 or 2, M]`, and mean squared error and timestep of each image `[I]`.

        With features to align with also the sum of the patches' negative cosines.
        """
        batch = self.encode(batch)
        noised = self.noise(batch)
        output = self._forward(model, batch, noised)
        predictions, aligned = output.predictions, []
        if self.patch_features is not None and output.features is None:
            aligned = [torch.zeros((), device=batch.input_ids.device)]
        elif self.patch_features is not None and output.features is not None:
            features = output.features.float()
            # An image that fills up has no pixels, but a sharded head must be used on every rank.
            targets = torch.zeros_like(features) if batch.features is None else batch.features
            aligned = [-F.cosine_similarity(features, targets, dim=-1).sum()]
        if not len(predictions):
            errors = torch.zeros(0, device=batch.input_ids.device)
        elif batch.content:  # padding is not learned
            inside = []
            for prediction, target, area in zip(predictions, noised.targets, batch.content, strict=True):
                top, bottom, left, right = area or (0, target.shape[1], 0, target.shape[2])
                inside.append(F.mse_loss(prediction[:, top:bottom, left:right], target[:, top:bottom, left:right]))
            errors = torch.stack(inside)
        elif isinstance(predictions, Tensor) and isinstance(noised.targets, Tensor):
            errors = (predictions - noised.targets).square().flatten(1).mean(1)
        else:
            pairs = zip(predictions, noised.targets, strict=True)
            errors = torch.stack([F.mse_loss(prediction, target) for prediction, target in pairs])
        return output.logits, errors, noised.timesteps, aligned


def _by_network(network: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """Return what a network makes of uint8 `[image, row, column, 3]`."""
    count = len(pixels)
    if pixels.is_cuda:  # cuDNN plans every convolution again for each new number of images
        pixels = torch.cat([pixels, pixels[:1].expand(-count % ENCODE_MULTIPLE, *pixels.shape[1:])])
    return network(pixels)[:count]
