"""The pipeline: the engine for people. Drawing works as in diffusers:

pipe = transfuse.load("runs/demo/export")
pipe("a crab on a blue background", num_inference_steps=25, guidance_scale=3.0).images[0]
pipe("a crab", image=picture, strength=0.6).images[0]      # a variation; with mask_image only where that says
pipe("a crab left of a star", candidates=4).images[0]      # of four, the one it would itself describe so
pipe.edit(picture, "make the background red")
pipe.caption(picture)
pipe.generate("a story about a crab")        # text and images, in whatever order the model chooses
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..devices import as_device, as_dtype
from ..diffusion import Sampler, SamplerConfig
from ..errors import UserError
from ..export import Exported, load_export, out_of_range
from ..images import ImageSource, decode_image, read_mask
from ..sequence import Document, Image, Text
from .engine import Engine
from .events import Done, Event, ImageEnd, ImageProgress, TextDelta
from .model_runner import Guidance, ModelRunner, compile_blocks
from .onednn import pack
from .pictures import latent_mask
from .quantize import Quantize, check_quantize
from .quantize import quantize as to_eight_bits
from .scoring import score
from .sequence_state import Request, Start, with_image_guidance
from .warmup import warm_up

PromptPart = str | Path | bytes | PIL.Image.Image | np.ndarray
"""Words, or a picture as `images.decode_image` takes it, except that a path is a `Path`: a str is words."""
Prompt = str | Sequence[PromptPart]

CANDIDATE = 1_000_003
"""from one candidate's seed to the next"""

StepEnd = Callable[["TransfusionPipeline", int, int, dict[str, Any]], dict[str, Any] | None]
"""diffusers' callback_on_step_end: pipeline, number of the step from 0, its noise level, its tensors"""


@dataclass
class ImagesOutput:
    """As diffusers' pipelines return it; `seeds` has the seed of each image."""

    images: list[Any]
    seeds: list[int]


@dataclass
class Reply:
    """What a row produced: texts and pictures in order, why it ended, and the count of what it took."""

    parts: list[str | PIL.Image.Image]
    done: Done
    seed: int = 0

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [part for part in self.parts if not isinstance(part, str)]


class TransfusionPipeline:
    """A loaded model with methods to draw, caption and write. Batches freely; each result equals that of it alone."""

    def __init__(self, exported: Exported, graphs: bool = True) -> None:
        self.exported = exported
        self.engine = Engine(ModelRunner(exported, graphs))

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
        quantize: Quantize | None = None,
        compile: bool = False,
        graphs: bool = True,
    ) -> TransfusionPipeline:
        """Load an export, made ready for inference. quantize: the blocks' weights in eight bits (`quantize`). compile:
        the blocks by torch.compile, at the first pass or `warm_up` (`compiled`). graphs: on CUDA, passes that come
        again are recorded (`recordings`), but not with eight bits, which was never tried."""
        dtype, device = as_dtype(dtype), as_device(device)
        torchao = None if quantize is None else check_quantize(quantize, torch.device(device))
        exported = load_export(path, dtype, device)
        exported.quantize, exported.compiled = quantize, compile
        if quantize is not None:
            to_eight_bits(exported.model, quantize, torchao)
        if compile:
            compile_blocks(exported.model)  # which does not know oneDNN's packed weights
        else:
            pack(exported.model)
        return cls(exported, graphs and quantize is None)

    def warm_up(self, rows: int = 1, guidance: Guidance | None = None) -> dict[str, float]:
        """Take every path once, and keep the faster way of guidance for drawing `rows` pictures together, or the one
        given; the seconds of each (`warmup.warm_up`). Results do not depend on it."""
        return warm_up(self.engine, self.request(["a"]), rows, guidance)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        image: ImageSource | None = None,
        strength: float | None = None,
        mask_image: ImageSource | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_images_per_prompt: int = 1,
        candidates: int = 1,
        generator: torch.Generator | int | None = None,
        sampler: str | None = None,
        callback_on_step_end: StepEnd | None = None,
        output_type: str = "pil",
    ) -> ImagesOutput:
        """Draw a picture for each prompt. output_type: "pil", "np" (uint8 `[row, column, 3]`) or "latent".

        image alone: prompts are instructions to change it, and it lies before them in the sequence, clean. With a
        strength or mask_image prompts describe the result, and the drawing begins from the image (`Start`). The mask
        selects what is redrawn: its transparent area, or the white one of an opaque mask (`images.read_mask`);
        elsewhere the image's latent stays: pixels, where that is what the autoencoder makes.
        guidance_interval: as in `Request`. candidates: draw each picture so many times, and keep the one from which the
        model itself would likeliest write its prompt; `seeds` has that one's. callback_on_step_end(pipe, step, t,
        {"latents": [image, channel, row, column]}) hears of every denoising step, of all candidates; other latents it
        gives back are refused.
        """
        if output_type not in ("pil", "np", "latent"):
            raise UserError(f'output_type: expected "pil", "np" or "latent", found {output_type!r}')
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [text for text in prompts for _ in range(num_images_per_prompt)]
        seeds = _seeds(generator, len(prompts))
        if image is None and (strength is not None or mask_image is not None):
            raise UserError("image: expected one with strength or mask_image, found none")
        start = None
        image = None if image is None else decode_image(image)
        if image is not None and (strength is not None or mask_image is not None):
            start = self.start(image, 1.0 if strength is None else strength, mask_image)
            height, width = image.shape[:2]
        before = [] if image is None or start is not None else [image]
        requests = [
            replace(
                with_image_guidance(
                    self.request([*before, text], num_inference_steps, guidance_scale, sampler, guidance_interval),
                    image_guidance_scale,
                ),
                draw="force",
                max_tokens=0,
                size=(height or self.exported.image_size, width or self.exported.image_size),
                start=start,
                seed=seed,
            )
            for text, seed in zip(prompts, seeds, strict=True)
        ]
        requests = repeated(requests, candidates)
        drawn = self._latents(requests, callback_on_step_end)
        kept = self._likeliest(requests, drawn, candidates)
        latents, seeds = [drawn[row] for row in kept], [requests[row].seed for row in kept]
        if output_type == "latent":
            return ImagesOutput(latents, seeds)
        arrays = [self.exported.autoencoder.decode(latent[None])[0] for latent in latents]
        return ImagesOutput([PIL.Image.fromarray(a) for a in arrays] if output_type == "pil" else arrays, seeds)

    def _latents(self, requests: Sequence[Request], step_end: StepEnd | None) -> list[Tensor]:
        """The drawing of each request, all of which take equal steps and so take them together."""
        found: dict[int, Tensor] = {}
        steps: list[Tensor] = []
        for event in self.engine.run(requests):
            match event:
                case ImageEnd(row, _, latent):
                    found[row] = latent
                case ImageProgress(latent=x) if x is not None and step_end is not None:
                    steps.append(x)
                    if len(steps) == len(requests):
                        latents, steps = torch.stack(steps), []
                        given = step_end(self, event.step - 1, event.t, {"latents": latents})
                        if given and given.get("latents", latents) is not latents:
                            raise ValueError("callback_on_step_end: expected the latents as they were, found others")
        return [found[row] for row in range(len(requests))]

    def edit(self, image: ImageSource, instruction: str, **options: Any) -> PIL.Image.Image:
        """The picture changed as the instruction says; options: those of a call."""
        picture: PIL.Image.Image = self(instruction, image=image, **options).images[0]
        return picture

    def start(self, image: ImageSource, strength: float = 1.0, mask_image: ImageSource | None = None) -> Start:
        """Encode a picture to begin a drawing from; the mask selects what is redrawn (`images.read_mask`). UserError
        where its sides do not divide into patches, or the mask does not fit it."""
        exported = self.exported
        if exported.model.config.images != "latents":
            raise UserError("start: expected none, for the model does not denoise, found one")
        factor = exported.autoencoder.factor * exported.model.config.patch_size
        pixels = decode_image(image)
        height, width = pixels.shape[:2]
        if width % factor or height % factor:
            raise UserError(f"image: expected sides in multiples of {factor}, found {width}x{height}")
        mask = None
        if mask_image is not None:
            mask = latent_mask(read_mask(mask_image, (height, width)), exported.autoencoder.factor)
        return Start(exported.autoencoder.encode(pixels[None])[0], strength, mask)

    def caption(self, images: ImageSource | Sequence[ImageSource], max_tokens: int = 64) -> list[str]:
        """Describe pictures, greedily; each must have the size the model was trained on."""
        pictures = list(images) if isinstance(images, Sequence) and not isinstance(images, str | bytes) else [images]
        pixels = [decode_image(picture) for picture in pictures]
        requests = [replace(self.request([one]), draw="never", max_tokens=max_tokens) for one in pixels]
        return [reply.text.strip() for reply in self.replies(requests)]

    def generate(
        self, prompt: Prompt, *, seed: int = 0, draw: str = "auto", max_tokens: int | None = None, **settings: Any
    ) -> Reply:
        """Go on from a prompt of text and pictures; settings are fields of `Request`."""
        request = replace(
            self.request([prompt] if isinstance(prompt, str) else prompt), seed=seed, draw=draw, **settings
        )
        if max_tokens is not None:
            request = replace(request, max_tokens=max_tokens)
        return self.replies([request])[0]

    def request(
        self,
        parts: Sequence[PromptPart],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Request:
        """A request from texts and pictures with the model's own defaults. Raises UserError for a bad setting."""
        defaults = self.exported.generation
        if steps is not None and not isinstance(steps, int):
            raise UserError(f"steps: expected a whole number, found {steps!r}")
        if self.exported.model.config.images != "latents" and (steps is not None or sampler is not None):
            raise UserError("steps, sampler: expected none, for the model does not denoise, found some")
        try:
            chosen = defaults.sampler
            if sampler is not None and sampler != chosen.name:
                chosen = SamplerConfig(sampler, chosen.steps)  # type: ignore[arg-type]
            if steps is not None:
                first = None if chosen.first is None else max(chosen.first, steps)
                chosen = replace(chosen, steps=steps, first=first)
            if chosen.steps > (most := self.exported.process.config.timesteps):
                raise UserError(f"steps: expected at most {most}, found {chosen.steps}")
            Sampler(self.exported.process, chosen)
        except ValueError as error:
            raise UserError(f"sampler: {error}") from None
        request = Request(
            Document([self.part(part) for part in parts], closed=False),
            max_tokens=defaults.max_tokens,
            size=(self.exported.image_size, self.exported.image_size),
            sampler=chosen,
            guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
            guidance_interval=defaults.guidance_interval if guidance_interval is None else guidance_interval,
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            code_temperature=defaults.code_temperature,
            code_top_p=defaults.code_top_p,
        )
        wrong = out_of_range(request)
        if wrong:
            raise UserError(wrong)
        return request

    def replies(self, requests: Sequence[Request], candidates: int = 1) -> list[Reply]:
        """Run requests together and gather each row's parts. candidates: answer each so many times, and keep the answer
        from whose first picture the model itself would likeliest write the prompt."""
        requests = repeated(requests, candidates)
        parts: list[list[str | PIL.Image.Image]] = [[] for _ in requests]
        first: list[Tensor | None] = [None for _ in requests]
        done: dict[int, Done] = {}
        for event in self.engine.run(requests):
            match event:
                case TextDelta(row, text):
                    if parts[row] and isinstance(parts[row][-1], str):
                        parts[row][-1] += text  # type: ignore[operator]
                    else:
                        parts[row].append(text)
                case ImageEnd(row, number, latent):
                    parts[row].append(self.picture(latent))
                    first[row] = latent if number == 0 else first[row]
                case Done(row):
                    done[row] = event
        kept = self._likeliest(requests, first, candidates)
        return [Reply(parts[row], done[row], requests[row].seed) for row in kept]

    def _likeliest(self, requests: Sequence[Request], first: Sequence[Tensor | None], candidates: int) -> list[int]:
        """Of each run of `candidates` requests the one to keep: its first picture would likeliest be described by its
        prompt. One without a picture is kept where none has any."""
        rows = range(0, len(requests), candidates)
        if candidates == 1:
            return list(rows)
        drawn = {row: Image(latent, target=False) for row, latent in enumerate(first) if latent is not None}
        said = [Document([image, *requests[row].document.parts], closed=False) for row, image in drawn.items()]
        found = dict(zip(drawn, (one.nll.sum() for one in score(self.exported, said)), strict=True))
        return [min(range(row, row + candidates), key=lambda one: found.get(one, math.inf)) for row in rows]

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request as they happen."""
        return self.engine.run([request])

    def picture(self, latent: Tensor) -> PIL.Image.Image:
        return PIL.Image.fromarray(self.exported.autoencoder.decode(latent[None])[0])

    def part(self, part: PromptPart) -> Text | Image:
        """A part of a document; a picture has the model's size."""
        if isinstance(part, str):
            return Text(self.exported.tokenizer.encode(part))
        side = self.exported.image_size
        pixels = decode_image(part)
        height, width = pixels.shape[:2]
        if (height, width) != (side, side):
            raise UserError(f"image: expected {side}x{side} pixels, found {width}x{height}")
        return Image(self.exported.autoencoder.encode(pixels[None])[0], target=False)


def repeated(requests: Sequence[Request], candidates: int) -> list[Request]:
    """Each request as often as it has candidates, with seeds of their own, the first as it is. Raises UserError where
    there is no telling which is best: no words, or pictures among them."""
    if candidates < 1:
        raise UserError(f"candidates: expected at least 1, found {candidates}")
    for request in requests if candidates > 1 else ():
        if not request.document.parts or not all(
            isinstance(part, Text) and part.ids for part in request.document.parts
        ):
            raise UserError("candidates: expected 1 where a prompt is not of words alone, found more")
    return [replace(one, seed=one.seed + number * CANDIDATE) for one in requests for number in range(candidates)]


def _seeds(generator: torch.Generator | int | None, count: int) -> list[int]:
    """One seed per image: counted up from a number, or drawn from a generator (a new one: not reproducible)."""
    if isinstance(generator, int):
        return [generator + number for number in range(count)]
    return torch.randint(2**31, (count,), generator=generator).tolist()
