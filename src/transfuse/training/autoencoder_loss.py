"""The loss of an autoencoder (Transfusion, Appendix A):

    L1 + perceptual + 0.5 adversarial + 0.2 identity + 1e-6 KL            or, instead of KL, the codebook's two terms

Each term is a mean over the images of a step. L1 is a mean over pixels; the KL is summed over the latent and divided by
the number of pixel values, which gives both the relative weight of latent diffusion, where both are sums. The critic is
trained in the same step: its loss is one more term, whose gradient stops at the reconstruction, as the adversarial
term's gradient stops at the critic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..autoencoders import AutoencoderConfig, ImageAutoencoder, images_to_tensor
from ..autoencoders.features import Features
from ..autoencoders.network import PatchCritic, initialise
from ..errors import UserError
from ..rng import generator_for
from .distributed import Distributed
from .loss import Details, LossSums, Objective


@dataclass(frozen=True)
class AutoencoderObjectiveConfig:
    """Weights of the terms; the defaults are the paper's.

    perceptual, identity   feature networks of the two terms: a local file or folder, or "imagenet-mobilenet"
                           (`autoencoders.features`); None: off. The paper: LPIPS and MoCo v2.
    adversarial_from       first step with a critic; None: never
    adaptive               scale the adversarial term to the gradient norm, at the last layer, of L1 and perceptual
                           together (VQGAN, arXiv 2012.09841, equation 7), both over the whole step
    critic_betas           Adam's betas for the critic (VQGAN)
    revive_after           codes that no image chose for this many steps are moved onto encoder outputs
    revive_until           fraction of the run after which no code is revived, so that the averaged weights settle
    """

    perceptual: str | None = None
    perceptual_weight: float = 1.0
    identity: str | None = None
    identity_weight: float = 0.2
    adversarial_weight: float = 0.5
    adversarial_from: int | None = 50_000
    adaptive: bool = True
    critic_betas: tuple[float, float] = (0.5, 0.9)
    kl_weight: float = 1e-6
    codebook_weight: float = 1.0
    commitment: float = 0.25
    """beta, weight of the encoder's part of the codebook loss"""
    revive_after: int = 200
    revive_until: float = 0.8

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.critic_betas):
            raise ValueError(f"objective.critic_betas: expected numbers from 0 to below 1, found {self.critic_betas}")


@dataclass
class ImageBatch:
    """Images `[image, 3, row, column]` in [-1, 1] of a step, and their numbers in the data set."""

    images: Tensor
    samples: tuple[int, ...]
    step: int

    @property
    def quantities(self) -> dict[str, int]:
        """Counts to sum over the run."""
        return {"images": len(self.samples), "pixels": self.images[:, 0].numel()}

    def to(self, device: torch.device | str) -> ImageBatch:
        """Return the batch on a device."""
        images = self.images.to(device).contiguous(memory_format=torch.channels_last)
        return ImageBatch(images, self.samples, self.step)


@dataclass(frozen=True)
class ImageLoader:
    """`loader(step)` returns this rank's images of a step in `accumulate` micro-batches.

    A step holds the images from number `step * batch_size` on.
    """

    image: Callable[[int], np.ndarray]
    batch_size: int
    accumulate: int = 1
    rank: int = 0
    ranks: int = 1

    def __call__(self, step: int) -> list[ImageBatch]:
        """Raises UserError if the batch size does not divide into equal micro-batches."""
        count = self.accumulate * self.ranks
        if self.batch_size % count:
            expected = f"a multiple of {count} (data.accumulate x processes)"
            raise UserError(f"data.batch_size: expected {expected}, found {self.batch_size}")
        size = self.batch_size // count
        first = step * self.batch_size + self.rank * size * self.accumulate
        parts = [tuple(range(start, start + size)) for start in range(first, first + size * self.accumulate, size)]
        return [ImageBatch(images_to_tensor(np.stack([self.image(n) for n in part])), part, step) for part in parts]

    def position(self) -> dict[str, int]:
        """Return nothing, because any step is found at once."""
        return {}

    def start_from(self, position: dict[str, int]) -> None:
        """Do nothing."""


class AutoencoderInTraining(nn.Module):
    """An autoencoder, its critic, and the age of each code since it was last chosen: the state of a checkpoint."""

    unused: Tensor
    """steps since each code was last chosen, int64 `[codebook_size]`"""

    def __init__(self, config: AutoencoderConfig, adversarial: bool, seed: int) -> None:
        super().__init__()
        self.autoencoder = ImageAutoencoder(config)
        self.autoencoder.initialise(seed)
        self.critic = PatchCritic() if adversarial else None
        if self.critic is not None:
            initialise(self.critic, seed + 1)
        size = config.codebook_size if config.kind == "vq" else 0
        self.register_buffer("unused", torch.zeros(size, dtype=torch.int64))


class AutoencoderObjective(Objective):
    """Sums every active term over images; `names` and `weights` list the active ones."""

    def __init__(
        self,
        config: AutoencoderObjectiveConfig,
        kind: str,
        steps: int,
        seed: int,
        perceptual: Features | None = None,
        identity: Features | None = None,
        bfloat16: bool = False,
        ranks: Distributed | None = None,
    ) -> None:
        self.ranks = ranks or Distributed()
        self.config, self.seed, self.steps, self.bfloat16 = config, seed, steps, bfloat16
        self.features = {"perceptual": perceptual, "identity": identity}
        terms = {"l1": 1.0}
        if perceptual is not None:
            terms["perceptual"] = config.perceptual_weight
        if identity is not None:
            terms["identity"] = config.identity_weight
        if kind == "kl":
            terms["kl"] = config.kl_weight
        else:
            terms |= {"codebook": config.codebook_weight, "commitment": config.codebook_weight * config.commitment}
        if config.adversarial_from is not None:
            terms |= {"adversarial": config.adversarial_weight, "critic": 1.0}
        self.names, self.weights = tuple(terms), tuple(terms.values())
        self._vectors: list[Tensor] = []  # encoder outputs of this step, for reviving codes
        self._ready: list[ImageBatch] = []  # micro-batches that `_scale` is valid for
        self._scale = torch.ones(())  # the adaptive weight
        self._kept: tuple[dict[str, Tensor], Details] | None = None  # the terms of a step's only micro-batch

    def counts(self, batch: ImageBatch) -> tuple[int, ...]:
        """Return the number of images for each term, 0 for terms that have not started."""
        late = () if self._adversarial(batch) else ("adversarial", "critic")
        return tuple(0 if name in late else len(batch.samples) for name in self.names)

    def _adversarial(self, batch: ImageBatch) -> bool:
        """Return True from the first step with a critic on."""
        return self.config.adversarial_from is not None and batch.step >= self.config.adversarial_from

    def before_step(self, model: AutoencoderInTraining, batches: Sequence[ImageBatch]) -> None:
        """Compute the adaptive weight over all micro-batches and ranks, so that it does not depend on the split.

        Micro-batches of a split step need one more forward pass for it; a single one does not.
        """
        self._ready, self._kept = [], None
        if not (self.config.adaptive and self._adversarial(batches[0])):
            return
        last, only = model.autoencoder.decoder.conv_out.weight, len(batches) == 1
        gradients = torch.zeros(2, *last.shape, device=last.device)
        for batch in batches:
            terms, details = self._terms(model, batch)
            named = dict(zip(self.names, self.weights, strict=True))
            apparent = [named[name] * terms[name].sum() for name in ("l1", "perceptual") if name in terms]
            for row, loss in enumerate((torch.stack(apparent).sum(), terms["adversarial"].sum())):
                gradients[row] += torch.autograd.grad(loss, last, retain_graph=only or row == 0)[0]
            if only:
                self._kept = terms, details
        count = self.ranks.sum(torch.tensor(sum(len(batch.samples) for batch in batches), device=last.device))
        lengths = (self.ranks.sum(gradients) / count).flatten(1).norm(dim=1)
        self._ready, self._scale = list(batches), (lengths[0] / (lengths[1] + 1e-4)).clamp(max=1e4)

    def loss(self, model: AutoencoderInTraining, batch: ImageBatch) -> LossSums:
        """Return the summed losses. A batch that `before_step` has not seen counts as a whole step."""
        weighs = self.config.adaptive and self._adversarial(batch)
        if weighs and not any(batch is ready for ready in self._ready):
            self.before_step(model, [batch])
        kept, self._kept = self._kept, None
        terms, details = self._terms(model, batch) if kept is None else kept
        if weighs:
            self._ready = [ready for ready in self._ready if ready is not batch]
            terms["adversarial"] = terms["adversarial"] * self._scale
            details["adaptive_weight"] = self._scale * len(batch.samples), len(batch.samples)
        return LossSums(torch.stack([terms[name].sum() for name in self.names]), details)

    @torch.no_grad()
    def nonfinite_samples(self, model: AutoencoderInTraining, batch: ImageBatch) -> list[int]:
        """Return the images with a loss that is not finite."""
        terms, _ = self._terms(model, batch)
        wrong = ~torch.stack([terms[name] for name in self.names]).isfinite().all(0)
        return [batch.samples[number] for number in torch.nonzero(wrong).flatten().tolist()]

    def _terms(self, model: AutoencoderInTraining, batch: ImageBatch) -> tuple[dict[str, Tensor], Details]:
        """Return each term per image `[image]`, and details to log."""
        images, count = batch.images, len(batch.samples)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            h = model.autoencoder.moments(images)
        h, noise = h.float(), None
        if model.autoencoder.config.kind == "kl":
            shape = (h.shape[1] // 2, *h.shape[2:])
            generators = [generator_for(self.seed, "posterior", sample) for sample in batch.samples]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(h)
        bottleneck = model.autoencoder.bottleneck(h, noise)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            made = model.autoencoder.reconstruct(bottleneck.z)
        made = made.float()
        terms = {"l1": (made - images).abs().flatten(1).mean(1)}
        for name, features in self.features.items():
            if features is not None:
                terms[name] = features.distance(made, images)
        if bottleneck.kl is not None:
            # Latent diffusion sums both L1 and KL (in nats) over an image.
            terms["kl"] = bottleneck.kl / images[0].numel()
        for name in ("codebook", "commitment"):
            if getattr(bottleneck, name) is not None:
                terms[name] = getattr(bottleneck, name)
        if self._adversarial(batch):
            # The hinge losses of generator and critic (arXiv 2012.09841).
            assert model.critic is not None
            frozen = {name: weight.detach() for name, weight in model.critic.named_parameters()}
            fooled: Tensor = torch.func.functional_call(model.critic, frozen, (made,))
            real, false = model.critic(images), model.critic(made.detach())
            hinge = 0.5 * (F.relu(1 - real).flatten(1).mean(1) + F.relu(1 + false).flatten(1).mean(1))
            terms |= {"adversarial": -fooled.flatten(1).mean(1), "critic": hinge}
        elif self.config.adversarial_from is not None:
            terms["adversarial"] = terms["critic"] = torch.zeros(count, device=images.device)
        squared = (made.detach().clamp(-1, 1) - images).square().flatten(1).mean(1)
        details: Details = {"psnr": ((10 * torch.log10(4 / squared.clamp_min(1e-10))).sum(), count)}
        if bottleneck.codes is not None:
            self._vectors.append(h.detach())
            details["codes_in_use"] = (model.unused < self.config.revive_after).float().mean(), 1
        return terms, details

    @torch.no_grad()
    def after_step(self, model: AutoencoderInTraining, step: int, batches: Sequence[ImageBatch]) -> None:
        """Age the codes and revive unused ones; the choice is a function of the step, so that resuming is exact."""
        own, self._vectors = self._vectors[-len(batches) :], []  # without those of a step that was left out
        if not own:
            return
        codebook, chosen = model.autoencoder.quantize, torch.zeros_like(model.unused)
        for h in own:
            chosen[codebook.nearest(h).unique()] = 1
        model.unused += 1
        model.unused[self.ranks.sum(chosen) > 0] = 0
        dead = torch.nonzero(model.unused >= self.config.revive_after).flatten()
        if not len(dead) or step >= self.config.revive_until * self.steps:
            return
        gathered = [h for outputs in self.ranks.gather([h.cpu() for h in own]) for h in outputs]
        vectors = torch.cat([h.movedim(1, -1).flatten(0, -2) for h in gathered])
        order = torch.randperm(len(vectors), generator=generator_for(self.seed, "revive", step))[: len(dead)]
        dead = dead[: len(order)]
        codebook.embedding.weight[dead] = vectors[order].to(codebook.embedding.weight)
        model.unused[dead] = 0
