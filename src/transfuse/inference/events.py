"""What is asked of the engine, and what it tells while it works: plain, typed data."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..diffusion import SamplerConfig
from ..sequence import Document


@dataclass(frozen=True, eq=False)
class Start:
    """A clean latent `[channel, row, column]` from which the first image of a request is drawn, in place of noise.

    strength   share of the denoising steps taken: 1 begins from noise, 0 is the image itself
    mask       bool `[row, column]` of latent elements, True where it is drawn anew; the rest stays. None: everywhere
    """

    latent: Tensor
    strength: float = 1.0
    mask: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to go on with.

    document         the prompt: an open document
    draw             "auto": the model decides (BOI is sampled); "force": an image comes first; "never": text only
    max_tokens       most text tokens to write; max_images: most images to draw
    size             pixels (rows, columns) of an image it draws
    guidance_scale   how far a drawing is pushed towards the prompt; 1: not at all
    image_guidance_scale   the same towards the images before it alone, the rest then being the words' own
                     (`guidance.guide`); None: words and images are one condition
    guidance_interval   noise levels, as shares of all (0 clean, 1 noise), at which a drawing is guided; elsewhere only
                     the prompt's own branch is computed. None: everywhere
    start            what the first image begins from; None: noise
    temperature      0 is greedy; top_p keeps the likeliest tokens that make up this much probability
    code_temperature, code_top_p   the same for the codes of images, where the model draws by codes
    preview_every    give the predicted clean latent with every so many steps; 0: never
    reuse            go on from what such a request before left in the cache, where it begins with the same positions,
                     and leave the same for the next: the turns of a conversation
    """

    document: Document
    draw: str = "auto"
    max_tokens: int = 64
    max_images: int = 1
    size: tuple[int, int] = (32, 32)
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig("dpmpp", steps=20))
    guidance_scale: float = 3.0
    image_guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    start: Start | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    code_temperature: float = 1.0
    code_top_p: float = 1.0
    seed: int = 0
    preview_every: int = 0
    reuse: bool = False

    def guided_at(self, level: float) -> bool:
        """Whether `guidance_interval` has this noise level, a share of all."""
        low, high = self.guidance_interval or (0, 1)
        return low <= level <= high


@dataclass(frozen=True)
class TextDelta:
    """One token the row has written, and the text it completes: empty where a character takes several tokens.

    The tokens of one character come together, once it is complete; those of a cut one before the next image or the end,
    as U+FFFD.
    """

    row: int
    text: str
    token: int


@dataclass(frozen=True)
class ImageStart:
    row: int
    number: int


@dataclass(frozen=True, eq=False)
class ImageProgress:
    """`step` of `total` denoising steps done, or codes chosen. latent: as noisy as the step leaves it, and t the noise
    level at which the step began, where the model denoises; preview: predicted clean latent, if asked for."""

    row: int
    number: int
    step: int
    total: int
    preview: Tensor | None = None
    latent: Tensor | None = None
    t: int = 0


@dataclass(frozen=True, eq=False)
class ImageEnd:
    """The finished latent `[channel, row, column]`, or codes int64 `[row, column]`."""

    row: int
    number: int
    latent: Tensor


@dataclass(frozen=True)
class Done:
    """The row has ended: reason is "stop" (end of sequence), "length" (max_tokens or context) or "images"."""

    row: int
    reason: str
    text_tokens: int
    images: int
    network_evaluations: int


@dataclass(frozen=True)
class Failed:
    """The row has ended without a result: memory does not suffice for it, even alone."""

    row: int
    reason: str = "out of memory"


Event = TextDelta | ImageStart | ImageProgress | ImageEnd | Done | Failed
